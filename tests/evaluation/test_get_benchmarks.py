"""Data files from a server on this machine."""

import hashlib
import os
import subprocess
import sys
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock

import pytest

from dpa_xtuner.evaluation import benchmarks as table
from dpa_xtuner.evaluation import text_benchmarks as text
from dpa_xtuner.evaluation.benchmarks import Benchmark, DataFile

ROOT = Path(__file__).resolve().parents[2]
with mock.patch.dict(os.environ):  # where it leaves a note that XTuner is not needed
    import get_benchmarks

CONTENT = bytes(range(256)) * 8000  # two blocks
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves its content, and remembers from where on it was asked for."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[int] = []
        self.knows_ranges = True
        self.content = CONTENT
        self.breaks_off_at = len(CONTENT)


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):
        start = int((self.headers.get("Range") or "bytes=0-").split("=")[1].rstrip("-"))
        self.server.asked.append(start)
        if self.path == "/gone.tsv":
            return self.send_error(404)
        if start and not self.server.knows_ranges:
            start = 0
        content = self.server.content
        if start >= len(content):
            return self.send_error(416)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(content) - start))
        self.end_headers()
        self.wfile.write(content[start : self.server.breaks_off_at])

    def log_message(self, *_):
        pass


@pytest.fixture
def server():
    with Server() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


@pytest.fixture
def register(server, monkeypatch):
    """Gives a benchmark whose file is on the server."""
    monkeypatch.setattr(table, "BENCHMARKS", dict(table.BENCHMARKS))

    def make(name="made", md5=MD5, host=None):
        host = host or f"http://127.0.0.1:{server.server_port}"
        file = DataFile(name, md5, f"{host}/{name}.tsv")
        table.register_benchmark(Benchmark(name, name, "general", (file,)))

    return make


def test_fetched_whole(register, server, tmp_path, capsys):
    register()
    assert get_benchmarks.get(["made"], tmp_path / "new") is False
    assert (tmp_path / "new/made.tsv").read_bytes() == CONTENT
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["made.tsv"]
    assert "1 of 1 files are in" in capsys.readouterr().out
    assert get_benchmarks.get(["made"], tmp_path / "new") is False
    assert server.asked == [0]  # not fetched again


@pytest.mark.parametrize("knows_ranges", [True, False])
def test_goes_on_after_a_stop(knows_ranges, register, server, tmp_path, capsys):
    register()
    server.knows_ranges = knows_ranges
    server.breaks_off_at = 1_500_000
    assert get_benchmarks.get(["made"], tmp_path) is True
    assert not (tmp_path / "made.tsv").exists()
    assert "1,500,000 of 2,048,000 bytes" in capsys.readouterr().out
    server.breaks_off_at = len(CONTENT)
    assert get_benchmarks.get(["made"], tmp_path) is False
    assert (tmp_path / "made.tsv").read_bytes() == CONTENT
    assert server.asked == [0, 1_500_000]


def test_stopped_after_the_last_byte(register, tmp_path):
    register()
    (tmp_path / "made.tsv.partial").write_bytes(CONTENT)
    assert get_benchmarks.get(["made"], tmp_path) is False
    assert (tmp_path / "made.tsv").read_bytes() == CONTENT


def test_another_content_is_not_taken(register, tmp_path, capsys):
    register(md5="0" * 32)
    assert get_benchmarks.get(["made"], tmp_path) is True
    assert list(tmp_path.iterdir()) == []
    assert f"md5 {MD5}, expected {'0' * 32}" in capsys.readouterr().out


def test_a_file_with_another_md5_is_left_alone(register, server, tmp_path, capsys):
    register()
    (tmp_path / "made.tsv").write_text("mine")
    assert get_benchmarks.get(["made"], tmp_path) is True
    assert (tmp_path / "made.tsv").read_text() == "mine"
    assert server.asked == []
    out = capsys.readouterr().out
    assert hashlib.md5(b"mine").hexdigest() in out and "Move it away" in out


def test_one_that_is_gone_does_not_stop_the_others(register, tmp_path, capsys):
    register("gone")
    register("made")
    assert get_benchmarks.get(["gone", "made"], tmp_path) is True
    assert (tmp_path / "made.tsv").exists()
    out = capsys.readouterr().out
    assert "Not Found" in out and "1 of 2 files are in" in out


def test_without_a_network(register, tmp_path, capsys):
    register("one", host="http://127.0.0.1:9")
    register("two", host="http://127.0.0.1:9")
    assert get_benchmarks.get(["one", "two"], tmp_path) is True
    out = capsys.readouterr().out
    assert out.count("Connection refused") == 2
    assert f"put it at {tmp_path / 'two.tsv'}" in out
    assert f"md5       {MD5}" in out
    assert "from      http://127.0.0.1:9/two.tsv" in out


@pytest.fixture
def archive(server, monkeypatch, tmp_path):
    """GSM8K's archive, with small files in it, on the server."""
    packed = tmp_path / "packed.zip"
    with zipfile.ZipFile(packed, "w") as file:
        for name in ("train.jsonl", "test.jsonl", "more/beside.txt"):
            file.writestr(f"gsm8k/{name}", name)
    server.content = packed.read_bytes()
    md5 = hashlib.md5(server.content).hexdigest()
    url = f"http://127.0.0.1:{server.server_port}/gsm8k.zip"
    monkeypatch.setitem(text.ARCHIVES, "gsm8k", DataFile("gsm8k", md5, url, "zip"))
    return packed


def test_text_comes_in_archives(archive, server, tmp_path, capsys):
    folder = tmp_path / "new"
    assert get_benchmarks.get(["gsm8k"], folder) is False
    for name in ("train.jsonl", "test.jsonl", "more/beside.txt"):
        assert (folder / "gsm8k" / name).read_text() == name
    assert sorted(p.name for p in folder.iterdir()) == ["gsm8k", "gsm8k.zip"]
    assert "1 of 1 files are in" in capsys.readouterr().out
    assert get_benchmarks.get(["gsm8k"], folder) is False
    assert server.asked == [0]
    assert text.TEXT_BENCHMARKS["gsm8k"].missing(folder) == []


def test_an_archive_that_was_put_there(archive, server, tmp_path, capsys):
    folder = tmp_path / "new"
    folder.mkdir()
    (folder / ".gsm8k.partial/gsm8k").mkdir(parents=True)  # of a killed process
    (folder / "gsm8k.zip").write_bytes(archive.read_bytes()[:-1])
    assert get_benchmarks.get(["gsm8k"], folder) is True
    assert not (folder / "gsm8k").exists()
    assert f"expected {text.ARCHIVES['gsm8k'].md5}: cut short" in capsys.readouterr().out
    (folder / "gsm8k.zip").write_bytes(archive.read_bytes())
    assert get_benchmarks.get(["gsm8k"], folder, fetch_them=False) is True
    assert get_benchmarks.get(["gsm8k"], folder) is False
    assert sorted(p.name for p in folder.iterdir()) == ["gsm8k", "gsm8k.zip"]
    (folder / "gsm8k/test.jsonl").unlink()
    capsys.readouterr()
    assert get_benchmarks.get(["gsm8k"], folder) is True
    out = capsys.readouterr().out
    assert f"{folder / 'gsm8k/test.jsonl'}: not there" in out
    assert f"move {folder / 'gsm8k'} away" in out
    assert (folder / "gsm8k/train.jsonl").is_file() and server.asked == []


def test_an_archive_without_its_folder(archive, monkeypatch, tmp_path, capsys):
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("other/train.jsonl", "")
    md5 = hashlib.md5(archive.read_bytes()).hexdigest()
    monkeypatch.setitem(text.ARCHIVES, "gsm8k", DataFile("gsm8k", md5, ending="zip"))
    archive.rename(tmp_path / "gsm8k.zip")
    assert get_benchmarks.get(["gsm8k"], tmp_path) is True
    assert "problem   it holds no folder gsm8k" in capsys.readouterr().out
    assert [p.name for p in tmp_path.iterdir()] == ["gsm8k.zip"]


def test_archives_are_opencompasss():
    from opencompass.utils.datasets_info import DATASETS_URL

    known = [(entry["url"], entry["md5"]) for entry in DATASETS_URL.values()]
    assert {b.path.partition("/")[0] for b in text.TEXT_BENCHMARKS.values()} == {*text.ARCHIVES}
    for folder, archive in text.ARCHIVES.items():
        assert archive.dataset == folder and (archive.url, archive.md5) in known


def run(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "tools/get_benchmarks.py"), *arguments]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT)


def test_from_a_shell(tmp_path):
    listed = run("all", "--list", "--data", str(tmp_path))
    assert listed.returncode == 1
    assert "0 of 8 files are in" in listed.stdout
    for benchmark in table.find_benchmarks(["all"]):
        for file in benchmark.files:
            assert f"missing  {file.name}" in listed.stdout
            assert file.md5 in listed.stdout and file.url in listed.stdout
    listed = run("text", "--list", "--data", str(tmp_path))
    assert listed.returncode == 1 and "0 of 6 files are in" in listed.stdout
    for archive in text.ARCHIVES.values():
        assert f"put it at {tmp_path / archive.name}" in listed.stdout
        assert archive.md5 in listed.stdout and archive.url in listed.stdout
    unknown = run("mmbnch", "--data", str(tmp_path))
    assert unknown.returncode == 1
    assert unknown.stderr.strip().startswith(
        "dpa_xtuner: There is no benchmark 'mmbnch'; did you mean 'mmbench'?"
    )
