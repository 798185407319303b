"""The study with SmolLM2 and drawings: its captions, its table, and its smallest run."""

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import transformers
from packaging.version import Version
from scipy.stats import ttest_1samp, ttest_rel
from support import harness, runs

from dpa_xtuner.demo.drawings import COLOURS, Drawing, catalogue
from dpa_xtuner.demo.prepare import LLM_FOLDER
from dpa_xtuner.demo.scenes import Scene
from dpa_xtuner.errors import DPAError
from studies.openmoji import styles
from studies.openmoji.plan import BUDGETS, Run
from studies.openmoji.run import main
from studies.tables import drawings

ROOT = Path(__file__).resolve().parents[2]
DOLPHIN = Drawing("1F42C", "dolphin", "animal", "blue", False)
CACTUS = Drawing("1F335", "cactus", "plant", "green", False)
HAND = Drawing("1F44B-1F3FB", "waving hand", "hand", None, False)


@pytest.mark.parametrize(
    ("scene", "plain", "ornate", "french"),
    [
        (
            Scene((DOLPHIN,), (None,)),
            "The picture shows a blue animal called dolphin.",
            "Behold a blue animal that mortals name dolphin, O gentle reader!",
            "L’image montre un animal bleu appelé dauphin.",
        ),
        (
            Scene((CACTUS,), (4,)),
            "The picture shows a green plant called cactus once: at the center.",
            "Behold a green plant that mortals name cactus in lonely majesty, O gentle reader: at "
            "the center!",
            "L’image montre une fois une plante verte appelée cactus : au centre.",
        ),
        (
            Scene((DOLPHIN,) * 3, (0, 1, 8)),
            "The picture shows a blue animal called dolphin three times: at the top left, at the "
            "top and at the bottom right.",
            "Behold a blue animal that mortals name dolphin in glory three-fold, O gentle reader: "
            "at the top left, at the top and lo, at the bottom right!",
            "L’image montre trois fois un animal bleu appelé dauphin : en haut à gauche, en haut "
            "et en bas à droite.",
        ),
        (
            Scene((HAND, CACTUS), (5, 3)),
            "The picture shows a green plant called cactus at the left and a hand called waving "
            "hand at the right.",
            "Behold a green plant that mortals name cactus at the left and lo, a hand that mortals "
            "name waving hand at the right, O gentle reader!",
            "L’image montre une plante verte appelée cactus à gauche et une main appelée signe de "
            "la main à droite.",
        ),
    ],
)
def test_sentences_say_what_is_drawn(scene, plain, ornate, french):
    told = {style: sentence(scene) for style, sentence in styles.STYLES.items()}
    assert told == {"plain": plain, "ornate": ornate, "french": french}


@pytest.mark.slow
def test_each_drawing_and_colour_has_a_french_name():
    said = [styles.french_thing(drawing) for drawing in catalogue()]
    assert all(re.fullmatch(r"une? [^A-Z_:]+ appelée? [\w(][^_:]*", text) for text in said)
    for text in said:
        assert text.startswith("une ") == ("appelée " in text)
    things = [Drawing("1F335", "", "plant", colour, False) for colour in COLOURS]
    assert len({styles.french_thing(thing) for thing in things}) == len(COLOURS)
    by_kind = {d.kind: styles.french_thing(d) for d in catalogue()}
    assert by_kind["clock"].startswith("une horloge") and by_kind["device"].startswith("un app")


def results_file(folder: Path, run: Run, accuracy: float, **changes) -> None:
    measured = {"original": 5.0, "floor": 1.5, "align": 1.25, "leakage": 0.75}
    measured |= {"own_picture": 4.0, "other_picture": 4.25}
    content = {
        "protocol": BUDGETS["small"].protocol, "run": asdict(run), "measured": measured,
        "answers": {"all": {"accuracy": accuracy, "with_picture": 1 - accuracy}},
        "seconds": {"align": 100, "tune": 50}, "machine": "some GPU",
    } | changes  # fmt: skip
    (folder / f"openmoji-{run.name}{len(changes)}.json").write_text(json.dumps(content))


def test_the_table_is_what_the_files_say(tmp_path):
    vanilla, dpa = {20: 0.25, 21: 0.5, 22: 0.5}, {20: 0.5, 21: 0.625}
    for seed, accuracy in vanilla.items():
        results_file(tmp_path, Run("plain", "vanilla", seed), accuracy)
    for seed, accuracy in dpa.items():
        results_file(tmp_path, Run("plain", "dpa", seed), accuracy)
    results_file(tmp_path, Run("french", "cal", 21), 0.5, machine="some CPU")
    results_file(tmp_path, Run("french", "cmo", 21), 0.5, protocol="another")
    results_file(tmp_path, Run("plain", "dpa", 10), 0.5)  # a seed that was only tried
    made = drawings(tmp_path)
    assert made["openmoji large"] == "Not run."
    head, *rest = made["openmoji small"].split("\n\n")
    assert head == "6 runs of 150 s (median, with the proxy's); 58 are missing."
    assert rest[1] == "Ran on some CPU: french-cal-21."
    assert rest[-1] == "Left out, since not planned: plain-dpa-10."
    assert rest[2].startswith("Ran on some GPU: plain-dpa-20, plain-dpa-21, plain-vanilla-20, ")
    table = [re.split(r"\s*\|\s*", row.strip("| ")) for row in rest[0].splitlines()]
    rows = {(row[0], row[1]): dict(zip(table[0], row, strict=True)) for row in table[2:]}
    assert len(rows) == 15
    assert rows["plain", "vanilla"] == {
        "captions": "plain", "method": "vanilla", "seeds": "20, 21, 22",
        "missing": "23, 24, 25",
        "conflict": "3.500", "floor": "1.500", "align": "1.250", "leakage": "0.750",
        "picture": "0.250",
        "accuracy": "0.417", "nats": "0.583", "accuracy - vanilla": "-", "nats - vanilla": "-",
    }  # fmt: skip
    # Paired over the two seeds that both have.
    low, high = ttest_rel([0.5, 0.625], [0.25, 0.5]).confidence_interval(0.95)
    half = f"{(high - low) / 2:.3f}"
    assert rows["plain", "dpa"]["accuracy - vanilla"] == f"+0.188 ± {half} (2)"
    assert rows["plain", "dpa"]["nats - vanilla"] == f"-0.188 ± {half} (2)"
    assert rows["plain", "dpa"]["missing"] == "22, 23, 24, 25"
    assert rows["french", "cal"]["accuracy - vanilla"] == "-"
    assert rows["french", "cmo"]["missing"] == "20, 21, 22"
    assert rows["french", "cmo"]["accuracy"] == "-"


def test_seeds_that_were_added_later_are_shown_by_themselves(tmp_path):
    gains = {20: 0.5, 21: 0.25, 23: 0.125, 24: 0.375, 25: 0.25}
    for seed, gain in gains.items():
        results_file(tmp_path, Run("plain", "vanilla", seed), 0.25)
        results_file(tmp_path, Run("plain", "dpa", seed), 0.25 + gain)
        results_file(tmp_path, Run("french", "dpa", seed), 0.9)
    lines = drawings(tmp_path)["openmoji seeds"].splitlines()
    table = [re.split(r"\s*\|\s*", line.strip("| ")) for line in lines]
    rows = {tuple(row[:3]): dict(zip(table[0], row, strict=True)) for row in table[2:]}
    shown = rows["plain", "accuracy", "dpa - vanilla"]
    for name, seeds in {
        "seeds 20 - 22": (20, 21),
        "these alone": (23, 24, 25),
        "all": gains,
    }.items():
        found = [gains[seed] for seed in seeds]
        low, high = ttest_1samp(found, 0).confidence_interval(0.95)
        mean = sum(found) / len(found)
        said = f"{mean:+.3f} ± {(high - low) / 2:.3f} ({len(found)})"
        assert shown[name] == (f"**{said}**" if len(found) > 2 and low > 0 else said)
    assert rows["plain", "nats", "dpa - vanilla"]["seeds 20 - 22"].startswith("-0.375")
    assert rows["plain", "accuracy", "dpa - pmo"]["all"] == "-"
    assert rows["ornate", "accuracy", "pmo - vanilla"]["all"] == "-"
    assert shown["added"] == "seeds 23 - 25"


def test_it_is_refused_where_a_tokenizer_puts_no_first_token(monkeypatch):
    monkeypatch.setattr(transformers, "__version__", "4.57.6")
    monkeypatch.setattr(sys, "argv", ["openmoji"])
    with pytest.raises(DPAError, match=r"tokenizer.add_bos_token.* needs transformers 5 or newer"):
        main()


def forked(command: list[str], env: dict[str, str], **how) -> subprocess.CompletedProcess:
    """Run what `tools/train.py` would, without importing XTuner anew for each stage."""
    assert command[1] == str(ROOT / "tools/train.py") and command[3] == "--work-dir"
    work_dir, options = Path(command[4]), command[command.index("--cfg-options") + 1 :]
    for stage in [env["DPA_STAGE"]] if "DPA_STAGE" in env else ["align", "tune"]:
        harness.finish(stage, work_dir, *options, config=Path(command[2]), env=env)
    return subprocess.CompletedProcess(command, 0)


@pytest.mark.slow
@pytest.mark.skipif(
    Version(transformers.__version__) < Version("5"), reason="the study needs transformers 5"
)
def test_the_smallest_study_from_end_to_end(tmp_path, pieces, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "run", forked)
    runs.write_llm(tmp_path / "data" / LLM_FOLDER, pieces, "smollm2")
    options = ["--budget", "smallest", "--styles", "french", "--methods", "dpa", "--seeds", "900"]
    for name in ("data", "results", "work-dir"):
        options += [f"--{name}", str(tmp_path / name)]
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # else main() sets it
    monkeypatch.setattr(sys, "argv", ["openmoji", *options])
    assert main() == 0
    assert capsys.readouterr().out.startswith("Seed 900: 1 runs\n  french-dpa-900: ")
    (file,) = (tmp_path / "results").glob("*.json")
    written = json.loads(file.read_text())
    measured = written["measured"]
    assert measured["original"] > measured["floor"] > 0  # two steps of LoRA
    assert measured["leakage"] == pytest.approx(
        measured["without_picture"] - measured["other_picture"]
    )
    assert written["answers"]["all"]["questions"] == 8
    assert written["seconds"].keys() == {"proxy", "align", "tune"}
    (data,) = (tmp_path / "work-dir").glob("*/seed900")
    demo = json.loads((data / "captions.json").read_text())
    for name in styles.STYLES:
        told = json.loads((data / f"{name}.json").read_text())
        assert [record["image"] for record in told] == [record["image"] for record in demo]
        assert all(
            a["conversations"][0] == b["conversations"][0] for a, b in zip(told, demo, strict=True)
        )
    assert main() == 0  # nothing is left to do
    assert capsys.readouterr().out == "No run failed\n"
