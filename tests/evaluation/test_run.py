"""One call of OpenCompass: what it finds, what a rerun does, and what makes it start afresh."""

import dataclasses
import json
import shutil
import signal
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from filelock import FileLock
from safetensors.torch import load_file, save_file
from support.tiny_folder import rows, write_data

import dpa_xtuner
from dpa_xtuner import precision
from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation import cache_key, run, visual
from dpa_xtuner.evaluation import evaluate as evaluation
from dpa_xtuner.evaluation.benchmarks import BENCHMARKS, NO_ANSWER, find_benchmarks
from dpa_xtuner.evaluation.evaluate import Options
from dpa_xtuner.evaluation.folder import check_llava, labels
from dpa_xtuner.evaluation.model import LlavaFolder

pytestmark = pytest.mark.slow


@pytest.fixture
def answered(monkeypatch):
    """Lists the questions that a model is asked, batch by batch."""
    asked, plain = [], LlavaFolder.generate

    def generate(self, inputs, max_out_len):
        asked.append([messages[-1]["content"][-1]["text"] for messages in inputs])
        return plain(self, inputs, 8)

    monkeypatch.setattr(LlavaFolder, "generate", generate)
    return asked


def evaluate(folders, data, work_dir, names=("ai2d", "mmvp"), **options):
    options = Options(**options)
    asked = {
        b: visual.data_sets_of(b, data, work_dir, options.limit) for b in find_benchmarks(names)
    }
    return evaluation.evaluate(visual.models_of(folders, options), asked, work_dir, options)


def samples(details):
    return {key: [d["index"] for d in found] for key, found in details.items()}


def test_answers_are_kept_and_a_rerun_asks_nothing(folder, data, tmp_path, answered):
    report, details = evaluate([folder], data, tmp_path / "work", batch_size=4)
    assert [len(batch) for batch in answered] == [4, 2, 4]
    lengths = [len(question) for question in answered[0] + answered[1]]
    assert lengths == sorted(lengths, reverse=True)
    assert not report.failures()
    result = report.models["tiny"]["ai2d"]
    assert (result.samples, result.failed, result.error) == (6, [], "")

    kept = details["tiny", "AI2D_TEST"]
    assert sorted(d["index"] for d in kept) == [1, 2, 3, 4, 5, 6]
    by_hand = 100 * sum(d["correct"] for d in kept) / 6
    assert result.score == pytest.approx(by_hand)
    gold = {line["index"]: line["answer"] for line in rows("AI2D_TEST", 6)}
    for detail in kept:
        assert detail["answer"] == gold[detail["index"]]
        assert "select the correct answer" in detail["question"] and detail["prediction"]
        assert Path(detail["image"]).is_file()
    (predictions,) = (tmp_path / "work/results/predictions").glob("tiny-*/AI2D_TEST-*.json")
    first = json.loads(predictions.read_text())["0"]
    assert not (tmp_path / "work/icl_inference_output").exists()
    assert first["origin_prompt"][0]["content"][0]["image_url"] and first["gold"]

    answered.clear()
    written = {p: p.stat().st_mtime_ns for p in (tmp_path / "work/results").rglob("*.json")}
    again, details_again = evaluate([folder], data, tmp_path / "work", batch_size=4)
    assert (again, details_again) == (report, details) and not answered
    assert written == {p: p.stat().st_mtime_ns for p in written}  # nothing is scored again
    evaluate([folder], data, tmp_path / "work", batch_size=4, fresh=True)
    assert [len(batch) for batch in answered] == [4, 2, 4]
    assert all(p.stat().st_mtime_ns > time for p, time in written.items())


def test_what_changed_is_asked_again_and_nothing_else(folder, other, data, tmp_path, answered):
    def again(*folders, names=("ai2d", "mmvp"), **options):
        answered.clear()
        _, details = evaluate(list(folders), data, tmp_path / "work", names, **options)
        return sum(map(len, answered)), details

    copy = shutil.copytree(folder, tmp_path / "tiny")
    assert again(copy)[0] == 10
    assert again(copy)[0] == 0

    changed = rows("AI2D_TEST", 6)
    changed[2]["question"] = "What is that?"
    write_data(data, "AI2D_TEST", changed)
    count, details = again(copy)  # MMVP's four are not asked again
    assert count == 6 and "that" in str(details["tiny", "AI2D_TEST"])

    changed[2]["image"] = changed[3]["image"]  # a picture alone: VLMEvalKit would not see that
    write_data(data, "AI2D_TEST", changed)
    count, details = again(copy)
    third, fourth = (
        Path(d["image"]).read_bytes()
        for i in (3, 4) for d in details["tiny", "AI2D_TEST"] if d["index"] == i
    )  # fmt: skip
    assert count == 6 and third == fourth

    assert again(copy, limit=1)[0] == 1 + 2  # a question, and a pair
    assert again(copy, limit=1)[0] == 0
    assert again(copy)[0] == 0

    template = json.loads((copy / "chat_template.json").read_text())["chat_template"]
    template = template.replace("{{ c.text }}", "Be brief. {{ c.text }}")
    (copy / "chat_template.json").write_text(json.dumps({"chat_template": template}))
    assert again(copy)[0] == 10

    weights = load_file(copy / "model.safetensors")
    weights["multi_modal_projector.linear_2.bias"] += 1
    save_file(weights, copy / "model.safetensors", {"format": "pt"})
    assert again(copy)[0] == 10

    assert again(copy, other)[0] == 10  # a second model, and nothing of the first
    namesake = shutil.copytree(other, tmp_path / "else/tiny")
    (namesake / "README.md").write_text("other content")
    report, _ = evaluate([copy, namesake], data, tmp_path / "work", ["ai2d"])
    assert [label.endswith("-tiny") for label in report.models] == [True, True]  # not "tiny" now
    assert sum(map(len, answered)) == 10 + 6  # and yet the first one's answers are found again


def test_versions_and_ones_own_module_are_in_the_key(data, tmp_path, monkeypatch):
    """So that a change of either asks again; other changes of code are left to --fresh."""
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "own_module.py").write_text("")

    def names():
        own = dataclasses.replace(BENCHMARKS["ai2d"], module="own_module")
        return [
            visual.data_sets_of(b, data, tmp_path / "work", None)["AI2D_TEST"]["abbr"]
            for b in (BENCHMARKS["ai2d"], own)
        ]

    before = names()
    assert names() == before
    (tmp_path / "own_module.py").write_text("changed = True")
    published, own = names()
    assert published == before[0] and own != before[1]
    monkeypatch.setattr(cache_key, "__version__", "1000")
    assert not {*names()} & {published, own}
    monkeypatch.setattr(cache_key, "__version__", dpa_xtuner.__version__)
    assert names() == [published, own]
    monkeypatch.setattr(cache_key, "version", lambda package: f"{package} of another day")
    assert not {*names()} & {published, own}


def test_the_type_that_answers_are_computed_in_is_in_the_key(folder, tmp_path, monkeypatch):
    """A folder in bfloat16 is computed in float32 by a CPU that would only emulate it."""
    half = shutil.copytree(folder, tmp_path / "half")
    config = json.loads((half / "config.json").read_text())
    (half / "config.json").write_text(json.dumps({**config, "torch_dtype": "bfloat16"}))
    found, types = [], []
    for native in (True, False):
        monkeypatch.setattr(precision, "computes_bf16", lambda device, native=native: native)
        found.append(
            [model.config["abbr"] for model in visual.models_of([half, folder], Options())]
        )
        types.append(LlavaFolder(str(half), "cpu").model.dtype)
    assert types == [torch.bfloat16, torch.float32]
    assert found[0][0] != found[1][0] and found[0][1] == found[1][1]


def test_only_what_is_read_of_a_models_folder_counts(folder, tmp_path):
    """Not what an evaluation, or a person, puts beside it, nor where it was exported from."""
    copy = shutil.copytree(folder, tmp_path / "copy")
    before = visual.models_of([copy], Options())
    for name in ("README.md", "eval.log", "work_dirs/eval/table.json", ".cache/a.json"):
        (copy / name).parent.mkdir(parents=True, exist_ok=True)
        (copy / name).write_text("{}")
    (copy / "dpa.json").write_text(json.dumps({"config": "here.py", "pad_image_to_square": False}))
    assert visual.models_of([copy], Options()) == before
    for name, content in (
        ("dpa.json", {"config": "there.py", "pad_image_to_square": True}),
        ("generation_config.json", {"repetition_penalty": 2}),
        ("merges.txt", {}),
    ):
        (copy / name).write_text(json.dumps(content))
        after = visual.models_of([copy], Options())
        assert after != before
        before = after


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", '{"model_type": "llava", "vision_config": "x"}', "vision_config is not"),
        ("config.json", '{"model_type": "llava", "text_config": [1]}', "text_config is not a dict"),
        ("generation_config.json", "{", r"generation_config.json is broken \(Expecting"),
        ("tokenizer_config.json", "[]", r"tokenizer_config.json is broken \(no object in it"),
    ],
)
def test_broken_configs_are_refused(name, content, message, folder, tmp_path):
    copy = shutil.copytree(folder, tmp_path / "copy")
    check_llava(copy)
    (copy / name).write_text(content)
    with pytest.raises(DPAError, match=message):
        check_llava(copy)


def test_several_models_are_compared_under_short_names(folder, other, data, tmp_path, answered):
    report, _ = evaluate([folder, other, folder], data, tmp_path / "work", ["ai2d"])
    assert list(report.models) == ["tiny", "other"]
    places = [Path("a/run/tune/hf"), Path("b/run/tune/hf"), Path("b/run/align/hf")]
    expected = [f"{x}-run-{y}" for x, y in (("a", "tune"), ("b", "tune"), ("b", "align"))]
    assert labels([tmp_path / p for p in places]) == expected
    assert labels([tmp_path / "work_dirs/dpa_x/tune/hf"]) == ["dpa_x-tune"]
    assert labels([Path("/hf")]) == ["_"]
    places = [tmp_path / "m", tmp_path / "m/hf", tmp_path / "a b", tmp_path / "a_b"]
    assert len(set(labels(places))) == 4  # a model that shares a row's label would be lost
    (tmp_path / "link").symlink_to("other")
    assert labels([tmp_path / "link"]) == ["link"]


def test_models_of_one_label_or_one_content_have_rows_of_their_own(
    folder, other, data, tmp_path, answered
):
    model = shutil.copytree(folder, tmp_path / "m")
    shutil.copytree(other, model / "hf")
    same = shutil.copytree(other, tmp_path / "copy/hf")
    folders = [model, model / "hf", same, tmp_path / "x/copy"]
    shutil.copytree(other, folders[-1])
    report, _ = evaluate(folders, data, tmp_path / "work", ["ai2d"])
    assert len(report.models) == 4 and not report.failures()


def test_never_two_models_in_memory(folder, other, data, tmp_path, monkeypatch):
    alive, plain = weakref.WeakSet(), LlavaFolder.__init__

    def load(self, *args, **kwargs):
        assert not alive
        plain(self, *args, **kwargs)
        alive.add(self)

    monkeypatch.setattr(LlavaFolder, "__init__", load)
    report, _ = evaluate([folder, other], data, tmp_path / "work", limit=1)
    assert not report.failures()


def test_a_failing_sample_costs_that_sample(folder, data, tmp_path, answered):
    lines = rows("AI2D_TEST", 6)
    lines[1]["image"] = lines[1]["image"][:200]  # broken
    lines[4]["image"] = None
    write_data(data, "AI2D_TEST", lines)
    report, details = evaluate([folder], data, tmp_path / "work")
    result = report.models["tiny"]["ai2d"]
    assert result.samples == 6 and not report.failures()
    assert sorted(f["index"] for f in result.failed) == [2, 5]
    assert {f["dataset"] for f in result.failed} == {"AI2D_TEST"}
    assert {f["index"]: f["reason"] for f in result.failed}[5] == "no picture is given"
    wrong = {d["index"]: d for d in details["tiny", "AI2D_TEST"]}
    for index in (2, 5):
        assert wrong[index]["prediction"].startswith(NO_ANSWER)
        assert wrong[index]["correct"] is False


def test_a_failing_task_is_named_and_the_others_run(folder, data, tmp_path, answered):
    lines = rows("MMVP", 4)
    lines[0]["question"] = "Not that of the pair?"  # VLMEvalKit refuses to score this
    write_data(data, "MMVP", lines)
    report, details = evaluate([folder], data, tmp_path / "work", ["mmvp", "ai2d"])
    assert report.models["tiny"]["mmvp"].score is None
    assert report.models["tiny"]["ai2d"].score is not None
    (line,) = report.failures()
    log, _, reason = line.removeprefix("tiny, mmvp: failed, see ").partition(" (")
    assert reason == "AssertionError)" and "AssertionError" in Path(log).read_text()
    assert list(details) == [("tiny", "AI2D_TEST")]

    write_data(data, "MMVP", rows("MMVP", 4))
    report, _ = evaluate([folder], data, tmp_path / "work", ["mmvp", "ai2d"])
    assert not report.failures()


def test_a_model_that_cannot_be_loaded_fails_alone(folder, data, tmp_path, answered):
    broken = shutil.copytree(folder, tmp_path / "broken")
    (broken / "model.safetensors").write_bytes(b"cut short")
    report, _ = evaluate([broken, folder], data, tmp_path / "work")
    assert [line.partition(": ")[0] for line in report.failures()] == [
        "broken, ai2d",
        "broken, mmvp",
    ]
    for line in report.failures():  # the log of scoring would say that there are no answers
        log, _, reason = line.partition(": failed, see ")[2].partition(" (")
        assert "SafetensorError" in reason and reason[:-1] in Path(log).read_text()
    assert report.models["tiny"]["ai2d"].score is not None


def test_no_sample_answered_is_a_failure_and_asked_again(folder, data, tmp_path, monkeypatch):
    reason = f"{NO_ANSWER}: broken"
    monkeypatch.setattr(
        LlavaFolder, "generate", lambda self, inputs, max_out_len: [reason] * len(inputs)
    )
    report, _ = evaluate([folder], data, tmp_path / "work", ["ai2d"])
    assert report.failures() == ["tiny, ai2d: no sample of AI2D_TEST could be answered (broken)"]
    # Which is no fault of the samples: they are asked again.
    monkeypatch.setattr(LlavaFolder, "generate", lambda _, inputs, max_out_len: ["A"] * len(inputs))
    report, _ = evaluate([folder], data, tmp_path / "work", ["ai2d"])
    assert not report.failures() and report.models["tiny"]["ai2d"].failed == []


def test_half_written_files_are_not_trusted(folder, data, tmp_path, answered):
    work = tmp_path / "work"
    report, _ = evaluate([folder], data, work)
    results = next((work / "results/results").glob("tiny-*/AI2D*.json"))
    answers = next((work / "results/predictions").glob("tiny-*/AI2D*.json"))
    kept = json.loads(answers.read_text())
    results.write_text(results.read_text()[:100])
    answers.write_text(answers.read_text()[:100])
    # What OpenCompass has at that moment: a line for each answer, with a separator of Unicode
    # inside, and the last line torn.
    lines = [json.dumps({"idx": i, **kept[i]}, ensure_ascii=False) for i in kept]
    lines[1] = lines[1].replace('"prediction": "', '"prediction": "\u2028')
    tmp = answers.with_name(f"tmp_{answers.stem}.jsonl")
    tmp.write_text("\n".join(lines[:4])[:-5], encoding="utf-8")
    answered.clear()
    again, _ = evaluate([folder], data, work)
    assert again == report and sum(map(len, answered)) == 3


def test_two_at_a_time_are_refused(folder, data, tmp_path, answered):
    (tmp_path / "work").mkdir()
    with FileLock(tmp_path / "work/.lock"), pytest.raises(DPAError, match="Another evaluation"):
        evaluate([folder], data, tmp_path / "work")


def test_killed_and_continued(folder, data, tmp_path, answered):
    """By a signal that nothing can catch, between two batches."""
    killing = tmp_path / "killing.py"
    killing.write_text(
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from dpa_xtuner.evaluation import model, visual\n"
        "from dpa_xtuner.evaluation.benchmarks import find_benchmarks\n"
        "from dpa_xtuner.evaluation.evaluate import Options, evaluate\n"
        "plain, calls = model.LlavaFolder.generate, []\n"
        "def generate(self, inputs, max_out_len):\n"
        "    calls.append(1)\n"
        "    if len(calls) > 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "    return plain(self, inputs, 8)\n"
        "model.LlavaFolder.generate = generate\n"
        f"work, data = Path({str(tmp_path / 'work')!r}), Path({str(data)!r})\n"
        "benchmarks, options = find_benchmarks(['ai2d', 'mmvp']), Options(batch_size=2)\n"
        "asked = {b: visual.data_sets_of(b, data, work, None) for b in benchmarks}\n"
        f"models = visual.models_of([Path({str(folder)!r})], options)\n"
        "evaluate(models, asked, work, options)\n"
    )
    found = subprocess.run([sys.executable, str(killing)], capture_output=True)
    assert found.returncode == -signal.SIGKILL, found.stderr.decode()
    report, details = evaluate([folder], data, tmp_path / "work", batch_size=2)
    assert [len(batch) for batch in answered] == [2, 2, 2]  # four of the six were there
    fresh, fresh_details = evaluate([folder], data, tmp_path / "fresh", batch_size=2)
    assert report.models == fresh.models
    assert samples(details) == samples(fresh_details)
    assert [d["prediction"] for d in details["tiny", "AI2D_TEST"]] == [
        d["prediction"] for d in fresh_details["tiny", "AI2D_TEST"]
    ]


def test_several_workers_give_the_same(folder, data, tmp_path):
    """Processes of OpenCompass's local runner, a data set in parts; one that can't be read."""
    write_data(data, "AI2D_TEST", rows("AI2D_TEST", 20))
    write_data(data, "OCRBench", rows("OCRBench", 3))
    (data / "OCRBench.tsv").write_bytes(b"\xff\xfe not a table")
    benchmarks = [BENCHMARKS[name] for name in ("ocrbench", "ai2d")]
    configs = [model.config for model in visual.models_of([folder], Options())]
    found = []
    for workers in (1, 2):
        work = tmp_path / f"work{workers}"
        datasets = [
            config
            for benchmark in benchmarks
            for config in visual.data_sets_of(benchmark, data, work, None).values()
        ]
        for config in datasets:
            config["infer_cfg"]["inferencer"]["max_out_len"] = 8
        found.append(run.run(configs, datasets, work, workers))
    one, two = found
    assert list(one) == list(two) and len(one) == 2
    failures, (a, b) = ([list(outcome.values())[i] for outcome in found] for i in (0, 1))
    assert all("UnicodeDecodeError" in error and "OCRBench" in error for error in failures)
    assert a["score"] == b["score"] and a["samples"] == b["samples"] == 20
    assert [d["prediction"] for d in a["details"]] == [d["prediction"] for d in b["details"]]
    names = {p.name.rpartition("_")[2] for p in (tmp_path / "work2").rglob("predictions/*/*.json")}
    assert names == {"0.json", "1.json"}
