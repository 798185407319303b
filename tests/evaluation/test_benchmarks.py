"""The table of benchmarks."""

import subprocess
import sys
from dataclasses import replace

import pytest

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation import benchmarks as table
from dpa_xtuner.evaluation.benchmarks import (
    BENCHMARKS,
    Benchmark,
    DataFile,
    find_benchmarks,
    register_benchmark,
)
from dpa_xtuner.evaluation.cache_key import file_digest

MADE = Benchmark("made", "Made", "general", (DataFile("one", "0" * 32), DataFile("two")))


@pytest.fixture(autouse=True)
def own_table(monkeypatch):
    monkeypatch.setattr(table, "BENCHMARKS", dict(BENCHMARKS))


def test_the_papers_columns():
    assert list(BENCHMARKS)[:7] == [
        "mmbench", "ai2d", "docvqa", "ocrbench", "cvbench", "mmvp", "naturalbench"
    ]  # fmt: skip
    kinds = [b.kind for b in find_benchmarks(["all"])]
    assert kinds == ["general"] * 4 + ["vision-centric"] * 3


def test_files_are_vlmevalkits():
    import vlmeval.dataset as known

    for benchmark in find_benchmarks(["all"]):
        for file in benchmark.files:
            kind = next(k for k in known.IMAGE_DATASET if file.dataset in k.DATASET_URL)
            assert kind.DATASET_URL[file.dataset] == file.url
            assert kind.DATASET_MD5[file.dataset] == file.md5
            assert file.url.endswith("/" + file.name)


def test_the_table_is_light():
    """Help and checks of arguments wait for no library."""
    code = (
        "import sys, dpa_xtuner.evaluation.benchmarks\n"
        "heavy = {'vlmeval', 'opencompass', 'torch', 'pandas', 'xtuner', 'mmengine'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert output.stdout == "[]\n", output.stderr


def test_find():
    assert [b.name for b in find_benchmarks(["mmvp", "ai2d", "mmvp"])] == ["ai2d", "mmvp"]
    assert len(find_benchmarks(["all", "mmvp"])) == 7
    with pytest.raises(DPAError, match=r"no benchmark 'ocrbnch'; did you mean 'ocrbench'\?.*mmvp"):
        find_benchmarks(["ocrbnch"])
    with pytest.raises(DPAError, match="no benchmark 'MMBench'; did you mean 'mmbench'"):
        find_benchmarks(["MMBench"])


def test_register():
    register_benchmark(MADE)
    register_benchmark(MADE)
    (made,) = find_benchmarks(["made"])
    assert made == replace(MADE, module=__name__)  # it may hold the classes, and is hashed
    assert made not in find_benchmarks(["all"])
    with pytest.raises(DPAError, match="another benchmark 'mmvp'"):
        register_benchmark(Benchmark("mmvp", "MMVP", "general", ()))
    with pytest.raises(DPAError, match="kind='special'"):
        Benchmark("made", "Made", "special", ())


def test_missing_files(tmp_path):
    absent, other = MADE.missing(tmp_path)
    assert str(absent).startswith(f"Made: {tmp_path / 'one.tsv'}: not there")
    assert other.path == tmp_path / "two.tsv"

    (tmp_path / "one.tsv").write_text("another")
    (tmp_path / "two.tsv").write_text("whatever")
    (wrong,) = MADE.missing(tmp_path)
    assert wrong.file.name == "one.tsv" and wrong.md5
    assert "its md5 is b32d73e56ec99bc5ec8f83871cde708a, expected 0000" in str(wrong)


def test_md5_follows_the_file(tmp_path):
    file = tmp_path / "file"
    file.write_bytes(b"")
    assert file_digest(file) == "d41d8cd98f00b204e9800998ecf8427e"
    file.write_bytes(b"another")
    assert file_digest(file) == "b32d73e56ec99bc5ec8f83871cde708a"


def test_opencompass_builds_the_config(tmp_path):
    """The types are found by name, and no module of ours has to be imported before."""
    from opencompass.registry import (
        ICL_EVALUATORS,
        ICL_INFERENCERS,
        ICL_PROMPT_TEMPLATES,
        ICL_RETRIEVERS,
        LOAD_DATASET,
    )

    config = BENCHMARKS["mmvp"].config("MMVP", tmp_path, limit=5)
    assert LOAD_DATASET.get(config["type"]).__name__ == "EvaluationDataset"
    infer = config["infer_cfg"]
    assert ICL_PROMPT_TEMPLATES.get(infer["prompt_template"]["type"])
    assert ICL_RETRIEVERS.get(infer["retriever"]["type"])
    assert ICL_INFERENCERS.get(infer["inferencer"]["type"])
    assert ICL_EVALUATORS.build(config["eval_cfg"]["evaluator"]).dataset_name == "MMVP"
