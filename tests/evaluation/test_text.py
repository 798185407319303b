"""Text-only data sets in their real formats, on a tiny LLM, through OpenCompass."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from support import harness
from support.internlm import to_internlm2
from tokenizers import ByteLevelBPETokenizer
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    CLIPVisionConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from dpa_xtuner.errors import DPAError
from dpa_xtuner.evaluation import evaluate as evaluation
from dpa_xtuner.evaluation import report, show, text, text_benchmarks
from dpa_xtuner.evaluation.benchmarks import NO_ANSWER
from dpa_xtuner.evaluation.evaluate import Options
from dpa_xtuner.evaluation.text_benchmarks import TEXT_BENCHMARKS, TextBenchmark
from dpa_xtuner.evaluation.text_model import LanguageModel, load_llm
from dpa_xtuner.versions import language_model

pytestmark = pytest.mark.slow

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIAL = ["<|pad|>", "<|im_start|>", "<|im_end|>"]
MMLU_SUBJECTS = 57
POSITIONS = 8192  # GSM8K's prompt has 5000 bytes
SUBJECTS_RUN = 3


def llama(**changes) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=260, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=2, max_position_embeddings=POSITIONS, initializer_range=0.3,
        bos_token_id=None, eos_token_id=2, pad_token_id=0, **changes,
    )  # fmt: skip


@pytest.fixture(scope="module")
def llm(tmp_path_factory) -> Path:
    """A random LLaMA with a byte tokenizer and ChatML."""
    folder = tmp_path_factory.mktemp("llm")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(["some text"], vocab_size=259, special_tokens=SPECIAL)
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe._tokenizer, pad_token=SPECIAL[0], eos_token=SPECIAL[2]
    )
    tokenizer.chat_template = CHATML
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    LlamaForCausalLM(llama()).save_pretrained(folder)
    return folder


def lines(path: Path, records: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records))


ARC = [  # stem, options, answer
    ("Which of these is a bird?", ["cat", "crow", "carp", "cow"], "B"),
    ("What is ice made of?", ["sand", "iron", "water", "wood"], "C"),
    ("Which is the largest?", ["Sun", "Moon", "Earth", "Mars"], "A"),
    ("What do bees make?", ["milk", "silk", "wool", "honey"], "D"),
]
HELLASWAG = [
    ("Cooking: A man cuts bread.", ["He eats it.", "He flies.", "He swims home.", "No."], 0),
    ("Sport: She runs.", ["The tree sings.", "She stops.", "Bread.", "It is a fish."], 1),
    ("Music: They play.", ["A stone.", "They paint.", "People clap.", "It rains up."], 2),
]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """All files, laid out as OpenCompass's archives are."""
    root = tmp_path_factory.mktemp("data")
    lines(
        root / "ARC/ARC-c/ARC-Challenge-Dev.jsonl",
        [
            {
                "id": f"Mercury_{i}",
                "question": {
                    "stem": stem,
                    "choices": [
                        {"text": t, "label": letter}
                        for t, letter in zip(options, "ABCD", strict=True)
                    ],
                },
                "answerKey": answer,
            }
            for i, (stem, options, answer) in enumerate(ARC)
        ],
    )
    lines(
        root / "SuperGLUE/BoolQ/val.jsonl",
        [
            {"question": "is iron a metal", "passage": "Iron -- It is.", "idx": 0, "label": "true"},
            {"question": "is ice hot", "passage": "Ice -- It is cold.", "idx": 1, "label": "false"},
        ],
    )
    for split in ("train", "test"):
        lines(
            root / f"gsm8k/{split}.jsonl",
            [
                {"question": "2 + 3?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"},
                {"question": "1000 * 2?", "answer": "It is 2000.\n#### 2,000"},
            ],
        )
    lines(
        root / "hellaswag/hellaswag.jsonl",
        [{"query": q, "choices": choices, "gold": gold} for q, choices, gold in HELLASWAG],
    )
    for split in ("train", "dev"):
        lines(
            root / f"piqa/{split}.jsonl",
            [
                {"id": "a", "goal": "To cut bread,", "sol1": "use a knife.", "sol2": "use soup."},
                {"id": "b", "goal": "To boil water,", "sol1": "freeze it.", "sol2": "heat it."},
            ],
        )
        (root / f"piqa/{split}-labels.lst").write_text("0\n1\n")
    for config in TEXT_BENCHMARKS["mmlu"].configs():
        for split, count in (("dev", 5), ("test", 2)):
            file = root / "mmlu" / split / f"{config['name']}_{split}.csv"
            file.parent.mkdir(parents=True, exist_ok=True)
            with file.open("w", newline="") as out:
                csv.writer(out).writerows(
                    [[f"Question {i}, of many?", "one", "two", "three", "four", "ABCD"[i % 4]]
                     for i in range(count)]
                )  # fmt: skip
    return root


def plain(llm: Path) -> list[text.TextLLM]:
    return [text.TextLLM("an LLM", "", "original", llm, llm)]


def evaluate(llms, asked, root, work_dir, options):
    models = [text.describe(llm, options, llms[0].label) for llm in llms]
    data_sets = {b: text.data_sets_of(b, root, work_dir, options.limit) for b in asked}
    return evaluation.evaluate(models, data_sets, work_dir, options)


def benchmarks(*names: str) -> list[TextBenchmark]:
    return [TEXT_BENCHMARKS[name] for name in names]


def scores(row: dict) -> dict:
    return {name: result.score for name, result in row.items()}


def samples(row: dict) -> dict:
    return {name: result.samples for name, result in row.items()}


def test_answers_are_scored_as_by_hand(llm, data, tmp_path, monkeypatch):
    said = {
        "bird": "B",
        "ice": "The answer is C, since ice is water.",
        # A letter in the reason of a failure is no answer, though A were right.
        "largest": f"{NO_ANSWER}: A CUDA error",
        "bees": "A",
        "2 + 3": "2 + 3 = 5\nThe answer is 5\n",
        "1000": "The answer is 200.",
    }

    def generate(self, inputs, max_out_len):
        questions = [[m["prompt"] for m in prompt if m["prompt"]][-1] for prompt in inputs]
        return [next(a for word, a in said.items() if word in q) for q in questions]

    monkeypatch.setattr(LanguageModel, "generate", generate)
    asked = benchmarks("arc", "gsm8k")
    found, _ = evaluate(plain(llm), asked, data, tmp_path, Options())
    (row,) = found.models.values()
    # ARC: two of four. GSM8K: one of two.
    assert scores(row) == {"arc": 50.0, "gsm8k": 50.0}
    assert samples(row) == {"arc": 4, "gsm8k": 2}
    assert row["arc"].failed == [{"dataset": "arc", "index": 2, "reason": "A CUDA error"}]
    assert row["gsm8k"].failed == found.failures() == []
    (result,) = (tmp_path / "results" / "results").glob("original-*/arc-*.json")
    details = json.loads(result.read_text())["details"]
    assert [d["correct"] for d in details] == [True, True, False, False]
    assert [d["extracted"] for d in details] == ["B", "C", "", "A"]


def test_a_data_set_without_any_answer_is_trouble(llm, data, tmp_path):
    config = json.loads((llm / "config.json").read_text()) | {"max_position_embeddings": 64}
    short = tmp_path / "short"
    shutil.copytree(llm, short)
    (short / "config.json").write_text(json.dumps(config))
    found, _ = evaluate(plain(short), benchmarks("boolq"), data, tmp_path / "work", Options())
    result = found.models["an LLM"]["boolq"]
    assert len(result.failed) == 2 and result.score == 0.0
    (line,) = found.failures()
    assert "an LLM, boolq: no sample of boolq could be answered (a prompt of" in line


def nats(llm, tokenizer, words: str) -> float:
    ids = tokenizer(words, return_tensors="pt").input_ids
    with torch.no_grad():
        loss = llm(input_ids=ids, labels=ids).loss
    return float(loss) * (ids.shape[1] - 1) / ids.shape[1]


def test_likelihoods_are_those_of_plain_transformers(llm, data, tmp_path):
    model, tokenizer = AutoModelForCausalLM.from_pretrained(llm), AutoTokenizer.from_pretrained(llm)
    found = []
    for query, choices, _ in HELLASWAG:
        context = query.split(": ", 2)[-1]
        cost = [nats(model, tokenizer, f"{context}\n{choice}") for choice in choices]
        found.append(cost.index(min(cost)))
    made, _ = evaluate(plain(llm), benchmarks("hellaswag"), data, tmp_path, Options(batch_size=3))
    right = sum(one == gold for one, (_, _, gold) in zip(found, HELLASWAG, strict=True))
    assert made.models["an LLM"]["hellaswag"].score == pytest.approx(100 * right / 3)
    (result,) = (tmp_path / "results" / "results").glob("original-*/hellaswag-*.json")
    details = json.loads(result.read_text())["details"]
    assert [int(d["prediction"]) for d in details] == found and len(set(found)) > 1
    wrapper, texts = LanguageModel(str(llm)), ["hello", "a longer text", "xy"]
    expected = [nats(model, tokenizer, words) for words in texts]
    assert wrapper.get_ppl(texts) == pytest.approx(expected, rel=1e-5)  # whatever the padding
    assert [wrapper.get_ppl([t])[0] for t in texts] == pytest.approx(expected, rel=1e-5)


def test_a_text_that_fails_costs_its_sample_and_wins_nothing(llm, data, tmp_path, monkeypatch):
    # ARC's likelihoods. The first question has one candidate that raises, among those of a batch;
    # all of the third's, whose right one is the first, do or give no number.
    forward = LlamaForCausalLM.forward
    tokenizer = AutoTokenizer.from_pretrained(llm)

    def failing(self, input_ids, **kwargs):
        texts = tokenizer.batch_decode(input_ids)
        if any(("largest" in t and "Sun" in t) or ("bird" in t and "carp" in t) for t in texts):
            raise ValueError("such a text is too much")
        output = forward(self, input_ids, **kwargs)
        for row, words in enumerate(texts):
            if "largest" in words:
                output.logits[row] = torch.nan
        return output

    asked = benchmarks("arc_likelihood")
    before, _ = evaluate(plain(llm), asked, data, tmp_path / "before", Options())
    monkeypatch.setattr(LlamaForCausalLM, "forward", failing)
    after, _ = evaluate(plain(llm), asked, data, tmp_path / "after", Options())
    whole, result = (r.models["an LLM"]["arc_likelihood"] for r in (before, after))
    assert whole.failed == [] and len(result.failed) == 2 and result.samples == 4
    assert after.failures() == []
    found = [
        json.loads(
            next((tmp_path / run / "results/results").rglob("arc_likelihood-*.json")).read_text()
        )
        for run in ("before", "after")
    ]
    assert [(f["index"], f["reason"]) for f in found[1]["failed"]] == [
        (0, "ValueError: such a text is too much"),
        (2, "ValueError: such a text is too much"),
    ]
    correct = [d["correct"] for d in found[1]["details"]]
    assert correct == [
        False,
        found[0]["details"][1]["correct"],
        False,
        found[0]["details"][3]["correct"],
    ]
    assert result.score == 25.0 * sum(correct)
    assert not list(tmp_path.rglob("*.unchecked"))


def test_a_text_longer_than_the_positions_is_not_cut(llm):
    wrapper = LanguageModel(str(llm))
    alone = wrapper.get_ppl(["hello"])[0]
    wrapper.longest = len("hello")
    assert list(wrapper.get_ppl(["hello", "a longer text"])) == pytest.approx([alone, float("inf")])
    reason = f"{NO_ANSWER}: a text of 13 tokens; the model has 5 positions"
    assert wrapper.failures == {"a longer text": reason}


def test_all_data_sets_run_and_a_rerun_does_nothing(llm, data, tmp_path, monkeypatch):
    monkeypatch.setattr(text, "ANSWER_TOKENS", 4)
    all_configs = TextBenchmark.configs
    monkeypatch.setattr(TextBenchmark, "configs", lambda self: all_configs(self)[:SUBJECTS_RUN])
    asked = list(TEXT_BENCHMARKS.values())
    evaluated = evaluate(plain(llm), asked, data, tmp_path, Options(limit=2))
    (row,) = evaluated[0].models.values()
    assert evaluated[0].failures() == [] and set(row) == set(TEXT_BENCHMARKS)
    assert samples(row) == dict.fromkeys(TEXT_BENCHMARKS, 2) | {"mmlu": SUBJECTS_RUN}
    assert all(0 <= score <= 100 for score in scores(row).values())
    page = show.page(evaluated[1], 1)  # no picture, and prompts of several messages
    assert "<h2>an LLM, gsm8k</h2>" in page and "2 + 3?" in page and "&#39;prompt&#39;" not in page

    def refuse(*args, **kwargs):
        raise AssertionError("loaded again")

    monkeypatch.setattr(LanguageModel, "__init__", refuse)
    assert evaluate(plain(llm), asked, data, tmp_path, Options(limit=2)) == evaluated


def test_what_changes_is_asked_again(llm, data, tmp_path):
    (benchmark,) = benchmarks("arc")
    (likelihood,) = benchmarks("arc_likelihood")
    names = {
        text.data_sets_of(benchmark, data, tmp_path, None)["arc"]["abbr"],
        text.data_sets_of(benchmark, data, tmp_path, 2)["arc"]["abbr"],
        text.data_sets_of(likelihood, data, tmp_path, None)["arc_likelihood"]["abbr"],
    }
    file = tmp_path / benchmark.path
    lines(file, [{"other": "content"}])
    names.add(text.data_sets_of(benchmark, tmp_path, tmp_path, None)["arc"]["abbr"])
    assert len(names) == 4
    before = text.describe(plain(llm)[0], Options()).config["abbr"]
    assert text.describe(plain(llm)[0], Options(batch_size=4)).config["abbr"] == before
    source = tmp_path / "source"
    source.mkdir()
    (source / "tokenizer_config.json").write_text("{}")
    changed = text.TextLLM("an LLM", "", "original", llm, source)
    assert text.describe(changed, Options()).config["abbr"] != before


def test_missing_files_are_named_with_their_place(data, tmp_path):
    (benchmark,) = benchmarks("mmlu")
    assert benchmark.missing(data) == []
    (missing,) = benchmark.missing(tmp_path)
    assert missing.path.parent == tmp_path / "mmlu/dev" and missing.path.suffix == ".csv"
    others = 2 * MMLU_SUBJECTS - 1
    assert f"MMLU: {missing.path}: not there, or empty (and {others} more)" in str(missing)
    assert "get_benchmarks.py mmlu" in str(missing)
    both = benchmarks("mmlu", "piqa")
    assert text_benchmarks.split_names(["mmvp", "piqa", "all"]) == (both[1:], ["mmvp", "all"])
    assert text_benchmarks.split_names(["text"]) == (list(TEXT_BENCHMARKS.values()), [])
    (tmp_path / "piqa").mkdir()
    for name in ("train.jsonl", "train-labels.lst", "dev.jsonl", "dev-labels.lst"):
        (tmp_path / "piqa" / name).write_text("x" * (name != "dev.jsonl"))
    (missing,) = both[1].missing(tmp_path)
    assert missing.path == tmp_path / "piqa/dev.jsonl" and "more" not in str(missing)  # it is empty


def test_a_run_has_an_original_a_proxy_and_a_tuned_llm(llm, tmp_path):
    proxy = get_peft_model(
        AutoModelForCausalLM.from_pretrained(llm),
        LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False),
    )
    run = tmp_path / "some_run"
    proxy.save_pretrained(run / "proxy" / "llm_adapter")
    exported = run / "tune" / "hf"
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2,
        image_size=8, patch_size=4,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=llama(), image_token_index=259)
    llava = LlavaForConditionalGeneration(config)
    llava.save_pretrained(exported)
    AutoTokenizer.from_pretrained(llm).save_pretrained(exported)
    (exported / "dpa.json").write_text(json.dumps({"llm": str(llm)}))
    (given,) = text.llms_of([exported])  # no run's: it may have been moved
    assert given.role == "given" and given.label == "some_run-tune"
    (run / "tune" / "stage.json").write_text("{}")
    original, adapted, tuned, other = text.llms_of([exported, llm, exported])
    assert (original.role, adapted.role, tuned.role) == ("original", "proxy", "tuned")
    assert (other.role, other.label) == ("given", llm.name)
    ids = torch.arange(3, 20)[None]
    with torch.no_grad():
        merged = load_llm(str(adapted.llm), str(adapted.adapter))(ids).logits
        torch.testing.assert_close(merged, proxy.eval()(ids).logits, rtol=1e-4, atol=1e-4)
        found = load_llm(str(tuned.llm))(ids).logits
        torch.testing.assert_close(found, language_model(llava.eval())(ids).logits)
    assert text.describe(tuned, Options()).config["max_seq_len"] == POSITIONS
    assert tuned.label == "some_run: tuned LLM"
    (exported / "dpa.json").write_text(json.dumps({"llm": "no/such-model"}))
    with pytest.raises(DPAError, match="neither a folder nor in the hub cache"):
        text.llms_of([exported])
    with pytest.raises(DPAError, match=r"has no config\.json"):
        text.llms_of([tmp_path])


def test_gemma2_keeps_its_attention_cap(tmp_path):
    """Which SDPA, transformers' choice for a published folder, leaves out."""
    config = Gemma2Config(
        vocab_size=64, hidden_size=16, intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_attention_heads=2, num_key_value_heads=1, attn_logit_softcapping=0.05,
        query_pre_attn_scalar=1, initializer_range=1.0, attn_implementation="eager",
    )  # fmt: skip
    torch.manual_seed(0)
    capped = Gemma2ForCausalLM(config).eval()
    capped.save_pretrained(tmp_path)
    ids = torch.arange(2, 30)[None]
    with torch.no_grad():
        expected = capped(ids).logits
        torch.testing.assert_close(load_llm(str(tmp_path)).eval()(ids).logits, expected)
        config.attn_logit_softcapping = 1e6  # as good as none
        without = Gemma2ForCausalLM.from_pretrained(tmp_path, config=config)
        assert (without(ids).logits - expected).abs().max() > 0.1


def test_the_table_shows_differences_to_the_original(tmp_path):
    """Each LLM of a run to that run's original; answers and likelihoods have no common mean."""
    failed = [{"dataset": "arc", "index": 3, "reason": "too long"}]
    asked = benchmarks("arc", "boolq", "hellaswag")
    found = {
        "a: original LLM": (40.0, 60.0, 30.0),
        "a: tuned LLM": (45.5, None, 20.0),
        "b: original LLM": (10.0, 20.0, 30.0),
        "b: tuned LLM": (11.0, 22.0, 33.0),
    }
    models = {
        label: {
            b.name: report.Result(score, 4, failed if b.name == "arc" and score == 45.5 else [])
            for b, score in zip(asked, values, strict=True)
        }
        for label, values in found.items()
    }
    compared = {label: f"{label[0]}: original LLM" for label in found}
    markdown = report.save_report(
        report.Report(models, asked, 4, ["PIQA"], compared=compared), tmp_path, "text"
    )
    cells = [[c.strip() for c in line.strip("|").split("|")] for line in markdown.split("\n")[:10]]
    assert [cells[0], *cells[2:9]] == [
        ["", "ARC-c", "BoolQ", "answer (2)", "HellaSwag"],
        ["a: original LLM", "40.0", "60.0", "50.0", "30.0"],
        ["a: tuned LLM", "45.5", "failed", "failed", "20.0"],
        ["difference", "+5.5", "", "", "-10.0"],
        ["b: original LLM", "10.0", "20.0", "15.0", "30.0"],
        ["b: tuned LLM", "11.0", "22.0", "16.5", "33.0"],
        ["difference", "+1.0", "+2.0", "+1.5", "+3.0"],
        ["chance", "25.0", "50.0", "37.5", "25.0"],
    ]
    assert "- Sample without an answer: a: tuned LLM, arc 3: too long" in markdown
    assert "- Left out: PIQA" in markdown
    rows = list(csv.DictReader((tmp_path / "text.csv").open()))
    assert [(r["difference"], r["failed"]) for r in rows if r["benchmark"] == "arc"] == [
        ("", "0"), ("5.5", "1"), ("", "0"), ("1.0", "0"),
    ]  # fmt: skip
    results = json.loads((tmp_path / "text.json").read_text())["results"]
    assert results["a: tuned LLM"]["arc"]["failed"] == failed


def test_internlm2_loads_without_remote_code_and_without_xtuner(tmp_path):
    code = (
        "import sys, torch; from dpa_xtuner.evaluation.text_model import load_llm;"
        "llm = load_llm(sys.argv[1]); print(type(llm).__name__);"
        "print([name for name in ('xtuner', 'deepspeed') if name in sys.modules])"
    )
    llm = LlamaForCausalLM(llama(num_key_value_heads=1))
    llm.save_pretrained(tmp_path, state_dict=to_internlm2(llm.state_dict(), llm.config))
    config = json.loads((tmp_path / "config.json").read_text())
    config |= {"model_type": "internlm2", "architectures": ["InternLM2ForCausalLM"], "bias": False}
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_internlm2.InternLM2ForCausalLM"}
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        text=True,
        capture_output=True,
    )
    assert done.stdout.split("\n")[:2] == ["LlamaForCausalLM", "[]"], done.stderr[-2000:]


def test_the_command_evaluates_what_is_there_without_xtuner(llm, data, tmp_path):
    shutil.copytree(data / "piqa", tmp_path / "data" / "piqa")
    command = [sys.executable, harness.SUPPORT / "run_eval.py", llm, "--work-dir", tmp_path]
    done = subprocess.run(
        [*command, "--benchmarks", "piqa", "mmlu", "--data", tmp_path / "data"],
        text=True,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Left out: MMLU: " in done.stderr
    assert done.stdout.splitlines()[-1].startswith("imported: opencompass torch transformers")
    assert (tmp_path / "text.md").read_text() in done.stdout + "\n"
    assert f"| {llm.name} " in (tmp_path / "text.md").read_text()
