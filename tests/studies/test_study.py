"""The study: its world, its statistics, and its smallest version from end to end."""

import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from mmengine.registry import DATASETS
from scipy.stats import ttest_rel
from support import tiny_llava

from studies import world
from studies.analysis import Interval, Results, gains_of_variants
from studies.measure import StudyHook, look
from studies.plan import SEEDS, STUDIES, Cell
from studies.report import fill
from studies.tables import drawings, tables

ROOT = Path(__file__).resolve().parents[2]


def test_a_scene_says_what_its_questions_ask():
    scene = world.Scene((0, 0), (1, 1))
    assert scene.description() == (
        "the picture shows a red cup on the left and a blue bell on the right ."
    )
    assert dict(scene.questions()) == {
        "question : what thing is on the left ?": "cup",
        "question : what colour is on the left ?": "red",
        "question : what thing is on the right ?": "bell",
        "question : what colour is on the right ?": "blue",
    }
    assert scene.caption(0, np.random.default_rng(0)) == scene.description()
    words = scene.caption(3, np.random.default_rng(0)).split()
    assert words[3:5] == ["red", "cup"] and words[8:10] == ["blue", "bell"] and len(words) == 13
    style = words[:3] + words[5:8] + words[10:]
    follows = dict(zip(world.STYLE, world.chain(), strict=True))
    for word, after in itertools.pairwise(style):
        assert after in [world.STYLE[i] for i in follows[word]]


def test_texts_mark_what_the_description_tells():
    words = world.tokenizer()
    tokens, marks = world.texts(words, 8, np.random.default_rng(0))
    firsts = set()
    for row, mark in zip(tokens, marks, strict=True):
        first, again, *asked = words.decode(row).split(" .")[:-1]
        firsts.add(first.split()[1])
        told = [word for word in first.split() if word in world.THINGS + world.COLOURS]
        marked = words.convert_ids_to_tokens(row[mark])
        assert marked[:4] == told and all(word in again.split() for word in told)
        assert sorted(marked[4:]) == sorted(told)
        for answer, text in zip(marked[4:], asked, strict=True):
            assert text.endswith(f"answer : {answer}")
    assert firsts == {"picture", "the"}


def test_a_picture_is_its_two_halves():
    draw = np.random.default_rng(0)
    one, other = world.Scene((0, 0), (1, 1)), world.Scene((0, 0), (2, 5))
    first, second = (world.picture(scene, draw).astype(float) for scene in (one, other))
    noise = np.abs(first[:, :8] - second[:, :8]).mean()
    assert noise < np.abs(first[:, 8:] - second[:, 8:]).mean() / 1.3


def test_a_look_is_that_of_plain_transformers():
    model = tiny_llava.build(sharp=True).eval()
    rows = [tiny_llava.sample(1, "image", 5 + i, 20 + i, 30) for i in range(6)]
    batch = model.data_preprocessor(collated(rows), False)["data"]
    found = look(model, [batch])
    p_w, p_wo, right = [], [], []
    for row in rows:
        tokens = torch.from_numpy(row["input_ids"])
        embeds = model.llm.get_input_embeddings()(tokens.clamp(min=0))
        with torch.no_grad():
            embeds[tokens < 0] = model.encode_images(row["pixel_values"][0][None])[0]
            logits = model.llm(inputs_embeds=embeds[None]).logits[0, -3]
            at = torch.arange(len(tokens))[tokens >= 0]
            # Without a mask, transformers 5 takes a gap in the positions for another sample.
            given = dict(position_ids=at[None], attention_mask=torch.ones_like(at)[None])
            plain = model.llm(tokens[tokens >= 0][None], **given).logits[0, -3]
        p_w.append(logits.softmax(-1)[tokens[-2]].item())
        p_wo.append(plain.softmax(-1)[tokens[-2]].item())
        right.append(logits.argmax() == tokens[-2])
    learned = [p >= 0.5 for p in p_w]
    assert found["accuracy"] == pytest.approx(np.mean(right))
    assert found["learned"] == pytest.approx(np.mean(learned))
    for name, kind in (("d_learned", True), ("d_unlearned", False)):
        d = [a - b for a, b, c in zip(p_w, p_wo, learned, strict=True) if c is kind]
        assert found[name] == (pytest.approx(np.mean(d), abs=1e-5) if d else None)


def test_align_starts_from_a_given_projector_and_tune_does_not(tmp_path, monkeypatch):
    given, new = tiny_llava.build(), tiny_llava.build()
    torch.nn.init.normal_(given.projector.model[0].weight)
    given.projector.save_pretrained(tmp_path / "projector")
    hook = StudyHook("none.jsonl", 25, str(tmp_path / "projector"))
    before = new.projector.state_dict()["model.0.weight"].clone()
    monkeypatch.setattr(DATASETS, "build", lambda _: [])
    cfg = SimpleNamespace(train_dataloader=SimpleNamespace(dataset=SimpleNamespace(to_dict=dict)))
    for stage, expected in (("tune", before), ("align", given.projector.model[0].weight)):
        hook.before_train(SimpleNamespace(model=new, cfg=cfg, work_dir=str(tmp_path / stage)))
        assert torch.equal(new.projector.model[0].weight, expected)


def collated(rows: list[dict]) -> dict:
    from dpa_xtuner.data import collate

    return collate(rows)


def test_an_interval_is_students():
    a, b = [0.9, 0.8, 0.95, 0.7], [0.5, 0.6, 0.65, 0.55]
    found = Interval.of(x - y for x, y in zip(a, b, strict=True))
    low, high = ttest_rel(a, b).confidence_interval(0.95)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx((low, high))
    assert found.clear and not Interval.of([0.1, -0.2, 0.15]).clear
    assert not Interval.of([0.5]).clear and str(Interval.of([0.5])) == "+0.500 (1)"


def test_a_block_is_replaced_and_the_rest_is_left():
    page = "a\n<!-- one -->\nold\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    assert fill(page, {"one": "| new |"}) == (
        "a\n<!-- one -->\n\n| new |\n\n<!-- end -->\nb\n<!-- two -->\n<!-- end -->\n"
    )


@pytest.fixture(scope="module")
def smallest(tmp_path_factory):
    """The smallest study, run to its end."""
    folder = tmp_path_factory.mktemp("study")
    command = [sys.executable, "-m", "studies.run", "smallest", "--processes", "1"]
    command += ["--results", str(folder / "results/a.jsonl"), "--work-dir", str(folder / "work")]

    def run() -> str:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
        return done.stdout

    return folder, run, run()


@pytest.mark.slow
def test_the_table_is_what_the_files_say(smallest):
    folder, _, _ = smallest
    lines = [json.loads(line) for line in (folder / "results/a.jsonl").read_text().splitlines()]
    cells = [line["cell"] for line in lines]
    by_run = {
        (cell["variant"] or cell["method"], cell["seed"]): line
        for cell, line in zip(cells, lines, strict=True)
    }
    assert by_run.keys() == {(m, s) for m in ("vanilla", "pmo", "proxy_first") for s in (900, 901)}
    page = folder / "page.md"
    page.write_text("<!-- gains -->\n<!-- end -->\n<!-- conflict -->\n<!-- end -->\n")
    subprocess.run(
        [sys.executable, "-m", "studies.report", "--study", "smallest", "--results",
         str(folder / "results"), "--page", str(page)],
        cwd=ROOT, check=True, capture_output=True,
    )  # fmt: skip

    def area(line: dict) -> float:
        steps, looks = line["tune"]["steps"], line["tune"]["looks"]
        parts = [
            (b - a) * (x["accuracy"] + y["accuracy"]) / 2
            for a, b, x, y in zip(steps, steps[1:], looks, looks[1:], strict=False)
        ]
        return sum(parts) / (steps[-1] - steps[0])

    d = [area(by_run["pmo", s]) - area(by_run["vanilla", s]) for s in (900, 901)]
    mean = sum(d) / 2
    half = 12.706 * abs(d[0] - d[1]) / math.sqrt(2) / math.sqrt(2)  # t of one degree of freedom
    written = page.read_text()
    gain = re.search(r"([+-]\d\.\d+) ± (\d\.\d+)", written)
    assert float(gain[1]) == pytest.approx(mean, abs=6e-4)
    assert float(gain[2]) == pytest.approx(half, abs=6e-4)
    measured = [by_run["pmo", s]["measured"] for s in (900, 901)]
    conflict = sum(m["original"] - m["floor"] for m in measured) / 2
    assert f" {conflict:.2f} |" in written and f" {9 * conflict:.2f} |" in written
    for name in ("gains", "curves", "mechanism"):
        assert (folder / f"results_{name}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_a_study_goes_on_where_it_stopped(smallest):
    folder, run, first = smallest
    assert first.count(" s\n") == 6
    file = folder / "results/a.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:-1]))
    (folder / "results/other.jsonl").write_text(
        json.dumps(json.loads(lines[0]) | {"protocol": "another"}) + "\n"
    )
    again = run()
    assert again.count("1 runs") == 1 and again.count(" s\n") == 1
    old, new = json.loads(lines[-1]), json.loads(file.read_text().splitlines()[-1])
    for key in ("cell", "measured", "tune"):  # the same to the last digit
        assert new[key] == old[key]
    sizes = STUDIES["smallest"].sizes
    assert len(Results(folder / "results", sizes.protocol).runs) == 6
    assert "No run failed" in run()


@pytest.mark.slow
def test_a_seed_of_another_world_is_left_out(smallest):
    folder, run, _ = smallest
    lines = [json.loads(line) for line in (folder / "results/a.jsonl").read_text().splitlines()]
    worlds = {line["cell"]["seed"]: line["world"] for line in lines}
    assert len(set(worlds.values())) == 2
    # Seed 900 was begun on another machine, seed 901 here; a run of each is missing.
    others = [line | {"world": "another"} for line in lines if line["cell"]["seed"] == 900][1:]
    own = [line for line in lines if line["cell"]["seed"] == 901][1:]
    whole = "".join(json.dumps(line) + "\n" for line in lines)
    file = folder / "results/a.jsonl"
    file.write_text("".join(json.dumps(line) + "\n" for line in others + own))
    said = run()
    file.write_text(whole)
    assert "seed 901: 1 runs" in said and "seed 900: 1 runs" not in said
    assert "Left out: seeds 900. Their finished runs have another LLM" in said
    assert "Not finished" not in said


def test_a_seed_whose_runs_name_no_world_is_left_out_before_its_llm_is_trained(tmp_path):
    from studies.run import is_same_world

    assert is_same_world(tmp_path, 7, {Cell(2, "pmo", 8): "another"})
    assert not is_same_world(tmp_path, 7, {Cell(2, "pmo", 7): ""})


def line(cell: Cell, accuracy: float, **more) -> str:
    """A line of a results file."""
    look = {"accuracy": accuracy, "learned": 0.5, "d_learned": 0.4, "d_unlearned": None}
    measured = {"original": 9.0, "floor": 3.0, "leakage": 2.0, "other_picture": 5.0}
    measured["align"] = 2.75
    measured |= {"own_picture": 4.0, "proxy_reads": 0.5}
    return json.dumps({
        "protocol": "p", "cell": vars(cell), "measured": measured, "caption_tokens": 10,
        "tune": {"steps": [0, 25], "looks": [look, look]}, "llm_accuracy": 1.0, "seconds": 9.0,
        "machine": "m", **more,
    })  # fmt: skip


def test_runs_of_two_worlds_are_not_compared(tmp_path):
    one, other = Cell(2, "vanilla", 7), Cell(2, "pmo", 7)
    (tmp_path / "a.jsonl").write_text(line(one, 0.5, world="a") + "\n")
    (tmp_path / "b.jsonl").write_text(line(other, 0.5) + "\n")
    with pytest.raises(SystemExit, match="the runs of seed 7 have different LLMs"):
        Results(tmp_path, "p")


def test_the_replication_is_judged_by_its_own_seeds_when_all_are_run(tmp_path):
    new = SEEDS["replication"]
    gains = {30: 0.3, 35: 0.1, 40: 9.0} | {seed: 0.01 * (seed - 55) for seed in new}
    lines = [line(Cell(6, "vanilla", seed), 0.5) for seed in gains]
    lines += [line(Cell(6, "pmo", seed), 0.5 + gain) for seed, gain in gains.items()]
    lines += [line(Cell(6, "dpa", seed), 0.4 + gain) for seed, gain in gains.items()]
    lines += [line(Cell(6, "dpa", seed, 1.0, "cmo_in_align"), 0.9) for seed in new[:4]]
    zero = {30: (0.9, 0.1), 50: (0.5, 0.25), 51: (0.5, 0.25)}  # pmo's and vanilla's
    lines += [line(Cell(0, "pmo", seed), pmo) for seed, (pmo, _) in zero.items()]
    lines += [line(Cell(0, "vanilla", seed), vanilla) for seed, (_, vanilla) in zero.items()]
    (tmp_path / "a.jsonl").write_text("\n".join(lines) + "\n")
    table = tables(Results(tmp_path, "p"))["replication"]
    rows = [re.split(r"\s*\|\s*", row.strip("| ")) for row in table.splitlines()[2:]]
    low, high = ttest_rel([0.01 * (s - 55) for s in new], [0.0] * 10).confidence_interval(0.95)
    half = f"{(high - low) / 2:.3f}"
    assert rows[0][:3] == ["R1", "6", "pmo - vanilla"]
    assert rows[0][3].startswith("+0.200 ± ") and rows[0][3].endswith("(2)")
    # At level 0 the gain is 0.25 for both of the new seeds that were run there.
    low, high = ttest_rel([-0.05 - 0.25, -0.04 - 0.25], [0.0] * 2).confidence_interval(0.95)
    more = f"-0.295 ± {(high - low) / 2:.3f} (2)"
    assert rows[0][4:] == [f"-0.005 ± {half} (10)", "no", more]
    assert rows[1][:3] == ["R2", "6", "pmo - dpa"] and rows[1][-2:] == ["yes", "-"]
    assert rows[2][-2] == "4 of 10 seeds" and rows[3][-3:] == ["-", "not run", "-"]


def test_all_tables_are_made_of_few_results(tmp_path):
    cells = {
        Cell(2, "vanilla", 0): 0.5, Cell(2, "pmo", 0): 0.7, Cell(2, "dpa", 0): 0.6,
        Cell(2, "dpa", 0, 1.0, "cmo_in_align"): 0.75,
        Cell(2, "vanilla", 0, 0.25): 0.25, Cell(2, "pmo", 0, 0.25): 0.5,
        Cell(6, "pmo", 0): 0.5, Cell(6, "vanilla", 0): 0.25,
        Cell(6, "pmo", 0, 1.0, "small_batches"): 0.5,
        Cell(6, "vanilla", 0, 1.0, "small_batches_vanilla"): 0.75,
    }  # fmt: skip
    (tmp_path / "r.jsonl").write_text("\n".join(line(*each) for each in cells.items()) + "\n")
    made = tables(Results(tmp_path, "p"))
    rows = {name: [re.split(r"\s*\|\s*", row.strip("| ")) for row in table.splitlines()[2:]]
            for name, table in made.items()}  # fmt: skip
    assert rows["gains"][0] == ["2", "0.50", "+0.200 (1)", "-", "+0.100 (1)", "-", "-0.100 (1)"]
    conflict = ["9.00", "3.00", "6.00", "54.00", "0.50"]
    assert rows["conflict"] == [["2", *conflict], ["6", *conflict]]
    assert rows["batches"] == [
        ["6", "pmo", "0.25", "0.50", "0.25", "+0.250 (1)", "-"],
        ["6", "small_batches", "0.25", "0.50", "0.75", "-0.250 (1)", "-0.500 (1)"],
    ]
    assert rows["variants"][0] == [
        "cmo_in_align", "2", "0.75", "+0.250 (1)", "+0.150 (1)", "dpa", "+0.050 (1)", "0.75",
        "+0.250 (1)",
    ]  # fmt: skip
    assert rows["shares"][0] == ["2", "25%", "0.25", "+0.250 (1)", "-", "-", "-"]
    assert ["2", "pmo", "2.00", "1.00", "0.70"] in rows["leakage"]


def test_a_variant_is_compared_with_its_own_base():
    results = Results(Path("none"), "p")
    for cell, accuracy in (
        (Cell(2, "vanilla", 0), 0.5),
        (Cell(2, "pmo", 0), 0.7),
        (Cell(2, "pmo", 0, 1.0, "long"), 0.8),
        (Cell(2, "vanilla", 0, 1.0, "long_vanilla"), 0.9),
        (Cell(2, "dpa", 0, 1.0, "window_1"), 0.6),
        (Cell(2, "vanilla", 1), 0.5),
        (Cell(2, "pmo", 1, 1.0, "gentle_proxy"), 0.6),  # of another seed than most: left out
    ):
        results.runs[cell] = {"tune": {"steps": [0, 25], "looks": [{"accuracy": accuracy}] * 2}}
    gains = {name: gain.mean for name, gain in gains_of_variants(results, 2).items()}
    assert list(gains) == ["long", "window_1", "pmo"]
    assert gains == pytest.approx({"long": -0.1, "window_1": 0.1, "pmo": 0.2})


def test_the_published_tables_are_those_of_the_files_under_todays_protocol():
    results = Results(ROOT / "studies/results", STUDIES["full"].sizes.protocol)
    page = (ROOT / "docs/results.md").read_text()
    made = tables(results) | drawings(ROOT / "studies/results")
    assert fill(page, made) == page
    assert all(f"<!-- {name} -->" in page for name in made)
