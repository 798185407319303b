"""Signals, a launcher that is gone, and a reader that is gone.

The processes are real where what starts them matters, and carry a mark in their environment by
which all of them are found, whatever has become of their parents.
"""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable
from contextlib import suppress
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
from filelock import FileLock
from support import harness

from dpa_xtuner.engine.hooks import IterationSeedHook

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
TOOL = [sys.executable, str(ROOT / "tools" / "train.py")]
XTUNER = ["xtuner", "train"]
TRAINS = str(Path(find_spec("xtuner").origin).parent / "tools" / "train.py")  # what it starts
LONG = ("proxy.max_epochs=1000", "proxy.max_steps=5000")
SECONDS = 10


def state(work_dir: Path, stage: str = "proxy") -> dict:
    try:
        return json.loads((work_dir / stage / "stage.json").read_text())
    except FileNotFoundError:
        return {}


def wait_for(condition: Callable[[], bool], seconds: float, what: str) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, what
        time.sleep(0.02)


class Command:
    """A command with all the processes that come of it."""

    def __init__(self, command: list[str], work_dir: Path, ranks: int):
        self.mark = uuid.uuid4().hex
        self.work_dir, self.log = work_dir, work_dir.with_suffix(".log")
        environment = {"MARK": self.mark, "DPA_STAGE": "proxy", "NPROC_PER_NODE": str(ranks)}
        paths = {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
        arguments = [str(harness.TINY_CONFIG), "--work-dir", str(work_dir), "--cfg-options", *LONG]
        # A checkpoint would take seconds, most of them for the layout of the config in it.
        arguments += ["proxy.save_steps=5000", "default_hooks.logger.interval=1"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, *arguments, "train_dataloader.num_workers=1"],
                env=os.environ | paths | environment,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )

    def processes(self) -> list[psutil.Process]:
        found = []
        for process in psutil.process_iter():
            with suppress(psutil.Error):
                if process.environ().get("MARK") == self.mark:
                    found += [process] * (process.status() != psutil.STATUS_ZOMBIE)
        return found

    def trains(self) -> bool:
        assert self.processes(), self.output()
        return "Iter(train)" in self.output()

    def output(self) -> str:
        return self.log.read_text()

    def ends(self, seconds: float = SECONDS) -> int:
        """Wait for all processes; the exit code."""
        wait_for(lambda: not self.processes(), seconds, f"processes are left after {seconds} s")
        return self.process.wait()

    def close(self) -> None:
        for process in self.processes():
            with suppress(psutil.Error):
                process.kill()
        self.process.wait()


@pytest.fixture
def start(tiny, tmp_path):
    """Starts a command that trains; no process outlives the test."""
    started = []

    def make(command: list[str], ranks: int = 1) -> Command:
        started.append(Command(command, tmp_path / "run", ranks))
        return started[-1]

    yield make
    for command in started:
        command.close()


@pytest.mark.parametrize(
    ("command", "number"),
    [(TOOL, signal.SIGINT), (XTUNER, signal.SIGTERM)],
    ids=["tool", "xtuner"],
)
def test_a_signal_to_the_command_ends_all_its_processes(command, number, start):
    run = start(command, ranks=2)
    wait_for(run.trains, 90, "it does not begin to train")
    before = len(run.output())
    if number == signal.SIGINT:  # as a terminal sends it
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    code = run.ends()
    told = run.output()[before:]
    assert told.count("call the same command again") == 1 and "Traceback" not in told, told
    if command is TOOL:
        assert code == 128 + number
    assert state(run.work_dir)["status"] == "stopped"
    assert state(run.work_dir)["reason"].startswith("SIG")
    with FileLock(run.work_dir / "proxy/.lock", timeout=0):  # nobody holds it
        pass


def test_xtuner_that_is_killed_while_the_run_imports_leaves_no_run(start, tmp_path):
    """``xtuner`` is one that starts what XTuner 0.2.0 does, and imports nothing before."""
    xtuner = tmp_path / "xtuner"
    xtuner.write_text(
        f"import subprocess, sys\nsubprocess.run(['python', {TRAINS!r}, *sys.argv[2:]])"
    )
    run = start([sys.executable, str(xtuner), "train"])
    wait_for(lambda: any(TRAINS in process.cmdline() for process in run.processes()), 60, "no run")
    run.process.kill()
    assert run.ends(seconds=60) == -signal.SIGKILL
    end = "\nStopped (the command that started it has ended); call the same command again to go on."
    assert end in run.output() and "Iter(train)" not in run.output()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_while_xtuner_is_imported_is_one_sentence(number, start):
    run = start(TOOL)
    wait_for(lambda: len(run.processes()) == 2, 20, "it starts nothing")
    time.sleep(1)
    if number == signal.SIGINT:
        os.killpg(run.process.pid, number)
    else:
        run.process.send_signal(number)
    assert run.ends() == 128 + number
    assert run.output() == f"\nStopped ({number.name}); call the same command again to go on.\n"


# In forked processes, which need no import.


def before_iteration(number: int, act: Callable[[Path], None], rank: int = 0):
    """For `prepare`: call `act(stage's folder)` before an iteration, on one rank."""

    def prepare() -> None:
        stock = IterationSeedHook.before_train_iter

        def acting(self, runner, batch_idx, data_batch=None):
            stock(self, runner, batch_idx, data_batch)
            if batch_idx == number and runner.rank == rank:
                act(Path(runner.work_dir))

        IterationSeedHook.before_train_iter = acting

    return prepare


def hang(folder: Path) -> None:
    """Never come back from C, where no handler of Python's can run."""
    (folder / "hangs").touch()
    mutex = ctypes.create_string_buffer(128)
    for _ in range(2):
        ctypes.CDLL(None).pthread_mutex_lock(mutex)


def test_a_main_thread_that_hangs_is_ended_all_the_same(tiny, tmp_path):
    work_dir = tmp_path / "run"
    run = harness.start("proxy", work_dir, prepare=before_iteration(3, hang))
    wait_for((work_dir / "proxy/hangs").exists, 60, "it does not train")
    os.kill(run.pids[0], signal.SIGTERM)
    assert run.wait(SECONDS) == 128 + signal.SIGTERM
    assert summary_of(work_dir, "proxy").split()[:2] == ["proxy", "stopped"]


def test_an_error_that_a_signal_became_is_still_a_stop(tiny, tmp_path):
    def swallow(folder: Path) -> None:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(60)
        except:  # noqa: E722, as in MMEngine's config writer
            raise SyntaxError("nothing but a signal") from None

    code, output = harness.run("proxy", tmp_path / "run", prepare=before_iteration(5, swallow))
    assert code == 128 + signal.SIGTERM and "SyntaxError" not in output
    found = state(tmp_path / "run")
    assert (found["status"], found["reason"], found["steps"]) == ("stopped", "SIGTERM", 2)


def test_a_signal_to_a_forked_child_is_none_to_the_run(tiny, tmp_path):
    def fork(folder: Path) -> None:
        pid = os.fork()
        if pid == 0:
            time.sleep(60)
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid, number)
        assert os.waitpid(pid, 0)[1] == signal.SIGTERM

    harness.finish("proxy", tmp_path / "run", prepare=before_iteration(3, fork))


def test_a_run_outlives_a_parent_that_is_no_launcher_and_a_hangup_that_it_ignores(tiny, tmp_path):
    work_dir = tmp_path / "run"

    def as_nohup_does() -> None:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        if os.fork():  # the shell, which ends while the run trains
            wait_for((work_dir / "proxy/left").exists, 60, "it does not train")
            os._exit(0)

    def be_left(folder: Path) -> None:
        parent = os.getppid()
        (folder / "left").touch()
        wait_for(lambda: os.getppid() != parent, 20, "the parent does not end")
        os.kill(os.getpid(), signal.SIGHUP)
        time.sleep(2.5)  # it looks for its launchers each second

    act = before_iteration(3, be_left)
    run = harness.start("proxy", work_dir, prepare=lambda: (act(), as_nohup_does()))
    assert run.wait(90) == 0
    wait_for(lambda: state(work_dir).get("status") != "running", 60, "it does not end")
    assert state(work_dir)["status"] == "finished"


def fail(folder: Path) -> None:
    raise RuntimeError("out of paper\nand more")


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_crash_is_failed_with_its_reason_and_the_next_run_counts_on(ranks, tiny, tmp_path):
    work_dir = tmp_path / "run"
    crash = before_iteration(9 // ranks, fail, rank=ranks - 1)
    assert harness.run("proxy", work_dir, ranks=ranks, prepare=crash)[0] == 1
    found = state(work_dir)
    assert (found["status"], found["steps"]) == ("failed", 4)
    assert found["reason"] == "RuntimeError: out of paper"
    row = summary_of(work_dir, "proxy")
    assert row.split()[:4] == ["proxy", "failed", "4", str(found["seconds"])]
    assert "RuntimeError: out of paper" in row

    state_file = work_dir / "proxy/stage.json"
    state_file.write_text(json.dumps(found | {"seconds": 1000.0}))
    harness.finish("proxy", work_dir, ranks=ranks)
    assert state(work_dir)["status"] == "finished" and "reason" not in state(work_dir)
    assert state(work_dir)["steps"] == 6 and 1000 < state(work_dir)["seconds"] < 1100


def test_seconds_and_steps_are_written_with_each_checkpoint(tiny, tmp_path):
    work_dir = tmp_path / "run"
    die = before_iteration(11, lambda folder: harness.die())
    assert harness.run("proxy", work_dir, prepare=die)[0] == -signal.SIGKILL
    killed = state(work_dir)
    assert killed["steps"] == 4 and killed["seconds"] > 0
    assert summary_of(work_dir, "proxy").split()[:3] == ["proxy", "stopped", "4"]
    with FileLock(work_dir / "proxy/.lock"):  # another process trains
        assert summary_of(work_dir, "proxy").split()[:2] == ["proxy", "running"]
    harness.finish("proxy", work_dir)
    assert state(work_dir)["seconds"] > killed["seconds"]


def summary_of(work_dir: Path, stage: str) -> str:
    """The stage's row of what tools/train.py prints."""
    code = (
        f"import sys; sys.path.insert(0, {str(ROOT / 'tools')!r}); from pathlib import Path\n"
        f"import train; print(train.summary(Path({str(work_dir)!r})))"
    )
    text = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return next(line for line in text.stdout.splitlines() if line.startswith(stage))


def test_a_reader_that_is_gone_neither_stops_nor_fails_a_run(tiny, tmp_path):
    def into_a_pipe_without_reader() -> None:
        reader, writer = os.pipe()
        os.close(reader)
        os.dup2(writer, 1)
        os.dup2(writer, 2)
        os.close(writer)

    work_dir = tmp_path / "run"
    prepare = into_a_pipe_without_reader
    code, output = harness.run("proxy", work_dir, prepare=prepare)
    assert (code, output) == (0, "")
    (log,) = (work_dir / "proxy").glob("*/*.log")
    assert "Stage proxy (1 of 3)" in log.read_text()
    assert f"Wrote llm_adapter to {work_dir / 'proxy/llm_adapter'}" in log.read_text()


@pytest.mark.parametrize("tool", [["list_configs.py"], ["_xtuner_train.py", "--help"]])
def test_a_tool_whose_reader_is_gone_prints_no_traceback(tool):
    command = [sys.executable, str(ROOT / "tools" / tool[0]), *tool[1:]]
    reader, writer = os.pipe()
    os.close(reader)
    ended = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert ended.returncode == 0
    assert "BrokenPipeError" not in ended.stderr.split("bitsandbytes")[-1], ended.stderr
