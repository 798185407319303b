"""tools/eval.py: what it prints, its exit codes and what it imports."""

import dataclasses
import importlib.util
import json
import os
import shutil
import subprocess
import sys

import pytest
from support import harness
from support.run_eval import TOOL
from support.tiny_folder import rows, write_data

from dpa_xtuner.evaluation.benchmarks import BENCHMARKS

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tool():
    """The tool as a module."""
    sys.path.insert(0, str(TOOL.parent))
    spec = importlib.util.spec_from_file_location("eval_tool", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    yield module
    sys.path.remove(str(TOOL.parent))


@pytest.fixture
def call(tool, monkeypatch, capsys, any_file, tmp_path):
    """Calls it in this process; gives exit code, output and errors."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("LMUData", raising=False)

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        try:
            code = tool.main()
        except SystemExit as stop:
            code = stop.code
            if isinstance(code, str):  # as Python ends a process
                print(code, file=sys.stderr)
                code = 1
        out, err = capsys.readouterr()
        return code, out, err

    return run


def refused(result):
    """The last line of what it says, which is all but for the usage."""
    code, out, err = result
    assert code in (1, 2) and not out and "Traceback" not in err
    return err.strip().splitlines()[-1]


def test_help_is_fast():
    script = (
        f"import runpy, sys; sys.path.insert(0, {str(TOOL.parent)!r}); sys.argv = ['eval', '-h']\n"
        f"try: runpy.run_path({str(TOOL)!r}, run_name='__main__')\n"
        "finally: assert not {'torch', 'opencompass', 'mmengine', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, timeout=20)


def test_typos_are_told_in_one_line(call, folder, data, tmp_path):
    where = ["--data", data]
    line = refused(call(folder, "--benchmarks", "mmpv", *where))
    assert "'mmpv'; did you mean 'mmvp'?" in line and "naturalbench" in line
    assert "'mmul'; did you mean 'mmlu'?" in refused(call(folder, "--benchmarks", "mmul", *where))
    assert "Did you mean dpa_internlm2_7b or" in refused(call("dpa_internlm_7b", *where))
    assert "'no/where' is not there: expected the folder of" in refused(call("no/where", *where))
    assert "has no config.json" in refused(call(tmp_path, "--benchmarks", "ai2d", *where))
    for option, value in (("--batch-size", 0), ("--limit", 0), ("--limit", -3), ("--show", 0)):
        line = refused(call(folder, *where, option, value))
        assert f"argument {option}: invalid whole number (1 or more) value: '{value}'" in line
    assert "--gpus 99; this machine has" in refused(
        call(folder, "--benchmarks", "ai2d", *where, "--gpus", 99)
    )
    assert not (tmp_path / "work_dirs").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (dict(model_type="qwen2"), "a model of type 'qwen2'"),
        (dict(vision_config={"model_type": "pixtral"}), "'llava' with Pixtral"),
        (dict(vision_config=None, model_type="gpt2"), "a model of type 'gpt2'"),
        ("preprocessor_config.json", "no preprocessor_config.json"),
        ("model.safetensors", "no *.safetensors or *.bin"),
    ],
)
def test_folders_that_are_no_llava(call, folder, data, tmp_path, change, message):
    copy = shutil.copytree(folder, tmp_path / "copy")
    if isinstance(change, str):
        (copy / change).unlink()
    else:
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps(config | change))
    line = refused(call(copy, "--benchmarks", "ai2d", "--data", data))
    assert message in line and "expected the folder of a LlavaForConditionalGeneration" in line


def test_missing_files_are_left_out_and_nothing_is_an_error(call, folder, data):
    code, out, err = call(folder, "--data", data, "--benchmarks", "ai2d", "docvqa", "--limit", "2")
    assert code == 0 and "Left out: DocVQA: " in err and "get_benchmarks.py docvqa" in err
    assert "- Left out: DocVQA: " in out
    code, out, err = call(folder, "--data", data, "--benchmarks", "docvqa", "ocrbench")
    assert code == 1 and not out and err.count("Left out: ") == 2
    assert "has no files of these benchmarks" in err


def test_a_file_that_is_not_the_published_one(call, folder, data, tmp_path):
    file = dataclasses.replace(BENCHMARKS["ai2d"].files[0], md5="0" * 32)
    BENCHMARKS["ai2d"] = dataclasses.replace(BENCHMARKS["ai2d"], files=(file,))
    arguments = folder, "--data", data, "--benchmarks", "ai2d", "mmvp", "--limit", "2"
    table = tmp_path / "work_dirs/eval/table.json"
    code, out, err = call(*arguments)
    assert code == 0 and "Left out: AI2D: " in err and "--ignore-md5" in err
    assert {row["benchmark"] for row in json.loads(table.read_text())["rows"]} == {"mmvp"}
    code, out, err = call(*arguments, "--ignore-md5")
    assert code == 0 and "Left out" not in err + out
    line = f"AI2D: {data / 'AI2D_TEST.tsv'} is not the published file (its md5 is "
    assert line in err and f"- {line}" in out and "MMVP: " not in err
    found = json.loads(table.read_text())
    assert {"ai2d", "mmvp"} < {row["benchmark"] for row in found["rows"]}
    assert [text.startswith(line) for text in found["other_files"]] == [True]


def test_pictures_and_text_don_t_wait_for_each_others_files(call, tool, folder, data, monkeypatch):
    """What is there is evaluated, whichever of the two kinds has no file."""
    from dpa_xtuner.evaluation.text_benchmarks import TextBenchmark

    code, out, err = call(folder, "--data", data, "--benchmarks", "ai2d", "piqa", "--limit", "2")
    assert code == 0 and "AI2D" in out and "Left out: PIQA: " in err
    assert "- Left out: PIQA: " in out
    monkeypatch.setattr(TextBenchmark, "missing", lambda self, root: [])
    asked = []
    monkeypatch.setattr(tool, "_evaluate_kind", lambda *found: asked.extend(found[3:]) or 3)
    code, out, err = call(folder, "--data", data, "--benchmarks", "docvqa", "piqa")
    assert code == 3 and "Left out: DocVQA" in err and [b.name for b in asked[0]] == ["piqa"]
    (line,) = asked[1].left_out  # for the table that there is
    assert line.startswith("DocVQA: ")


def test_a_failed_task_is_exit_code_1(call, folder, data, tmp_path):
    lines = rows("MMVP", 4)
    lines[0]["question"] = "Not that of the pair?"
    write_data(data, "MMVP", lines)
    arguments = [folder, "--data", data, "--benchmarks", "ai2d", "mmvp", "--show", "1"]
    code, out, err = call(*arguments)
    assert code == 1 and err.strip().splitlines()[-1].startswith("dpa_xtuner: tiny, mmvp: failed")
    assert "| tiny " in out  # and what is there is shown
    write_data(data, "MMVP", rows("MMVP", 4))
    code, out, err = call(*arguments)
    assert code == 0
    work = tmp_path / "work_dirs/eval"
    assert out.strip().splitlines()[-2:] == [
        "work_dirs/eval/table.md",
        "work_dirs/eval/wrong_answers.html",
    ]
    assert (work / "wrong_answers.html").read_text().count("<section>") == 2
    assert {p.name for p in work.glob("table.*")} == {"table.md", "table.csv", "table.json"}


def test_benchmarks_of_ones_own(call, folder, data, tmp_path, monkeypatch):
    (tmp_path / "my_benchmarks.py").write_text(
        "from dpa_xtuner.evaluation.benchmarks import Benchmark, DataFile, register_benchmark\n"
        "files = (DataFile('MyQuestions'),)\n"
        "register_benchmark(Benchmark('mine', 'Mine', 'general', files, judge='exact matching'))\n"
    )
    (tmp_path / "broken.py").write_text("1 +")
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p != os.getcwd()])
    monkeypatch.setenv("PYTHONPATH", "")
    write_data(data, "MyQuestions", rows("AI2D_TEST", 2))
    arguments = [folder, "--data", data, "--benchmarks", "mine"]
    for wrong in ("my_benchmark", "no.such", "my_benchmarks.more", "./my_benchmarks.py", ""):
        line = refused(call(*arguments, "--import", wrong))
        assert f"--import {wrong}: there is no such module. Give the name of a module" in line
    line = refused(call(*arguments, "--import", "broken"))
    assert "--import broken: SyntaxError: invalid syntax (broken.py, line 1)" in line
    code, out, _ = call(*arguments, "--import", "my_benchmarks")
    assert code == 0 and "Mine" in out


def test_a_config_is_exported_first(call, tool, folder, data, tmp_path, monkeypatch):
    export = tmp_path / "export.py"
    export.write_text(
        "import shutil, sys\n"
        "print(sys.argv[1:])\n"
        f"if 'internlm3' in sys.argv[1]: sys.exit('it is not trained')\n"
        f"shutil.copytree({str(folder)!r}, sys.argv[sys.argv.index('-o') + 1])\n"
    )
    monkeypatch.setattr(tool, "EXPORT", export)
    arguments = ["--data", data, "--benchmarks", "ai2d", "--limit", "2"]
    code, out, _ = call("dpa_internlm2_7b", *arguments)
    assert code == 0 and "| dpa_internlm2_7b-tune " in out
    assert (tmp_path / "work_dirs/dpa_internlm2_7b/tune/hf/config.json").is_file()
    code, _, err = call("dpa_internlm3_8b", *arguments)
    assert code == 1 and "can't be exported" in err.strip().splitlines()[-1]


def test_neither_xtuner_nor_deepspeed_is_imported(folder, data, tmp_path):
    """In the process that answers and scores; and $LMUData is where the files are."""
    command = [
        sys.executable,
        str(harness.SUPPORT / "run_eval.py"),
        str(folder),
        "--benchmarks",
        "ai2d",
    ]
    environment = os.environ | {"LMUData": str(data)}
    found = subprocess.run(
        [*command, "--limit", "2"], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert found.returncode == 0, found.stderr
    assert "imported: opencompass torch transformers vlmeval" in found.stdout.splitlines()
