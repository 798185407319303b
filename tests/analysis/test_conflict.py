"""The conflict, against models whose probabilities are known by hand, and plain transformers."""

import json
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from support import runs
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM
from transformers import PreTrainedTokenizerFast as Fast

from dpa_xtuner.analysis.conflict import Asked, Conflict, measure
from dpa_xtuner.analysis.cross_entropy import Cost, caption_cost
from dpa_xtuner.analysis.fit import Fit, fit, recommend
from dpa_xtuner.analysis.report import _conflicts, compare
from dpa_xtuner.errors import DPAError
from dpa_xtuner.files import file_sha256
from dpa_xtuner.model.proxy_llm import ProxyLLM
from dpa_xtuner.precision import Precision

FP32 = Precision("fp32")
WORDS = ["the", "red", "cat", "two", "behold", "left", "."]
V = len(WORDS)


@pytest.fixture(scope="module")
def tokenizer():
    """A token for each of the words, a space before each."""
    made = Tokenizer(models.WordLevel({f"Ġ{word}": i for i, word in enumerate(WORDS)}, "Ġ."))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return Fast(tokenizer_object=made)


def table(seed: int) -> torch.Tensor:
    """P(next | last), (V, V)."""
    return torch.randn(V, V, generator=torch.Generator().manual_seed(seed)).mul(2).softmax(-1)


def bigram(probabilities: torch.Tensor) -> LlamaForCausalLM:
    """A LLaMA that knows the last token alone: its head reads log-probabilities off a one-hot."""
    llm = LlamaForCausalLM(LlamaConfig(
        vocab_size=V, hidden_size=8, intermediate_size=8, num_hidden_layers=1,
        num_attention_heads=1, rms_norm_eps=1e-12,
    ))  # fmt: skip
    with torch.no_grad():
        layer = llm.model.layers[0]
        layer.self_attn.o_proj.weight.zero_()
        layer.mlp.down_proj.weight.zero_()
        llm.model.embed_tokens.weight.copy_(torch.eye(8)[:V])
        llm.lm_head.weight.zero_()
        llm.lm_head.weight[:, :V] = probabilities.log().T / math.sqrt(8)  # the norm's factor
    return llm


def proxy_llm(llm, lora=None) -> ProxyLLM:
    return ProxyLLM(llm=llm, lora=lora, use_activation_checkpointing=False, precision="fp32")


def sample(*words: str) -> dict:
    ids = np.array([WORDS.index(word) for word in words])
    return {"id": "x", "index": 0, "input_ids": ids, "labels": ids.copy()}


def test_nats_by_class_are_those_of_a_bigram_by_hand(tokenizer):
    p = table(0)
    captions = [sample("the", "red", "cat", ".", "the"), sample("two", "cat", "behold", "left")]
    model = proxy_llm(bigram(p)).train()
    cost = caption_cost(model, captions, tokenizer, FP32, batch_size=2)

    def nats(last: str, word: str) -> float:
        return -p[WORDS.index(last), WORDS.index(word)].log().item()

    # The first token of each caption is left out, as in a run's floor.
    expected = {
        "colour": nats("the", "red"),
        "thing": (nats("red", "cat") + nats("two", "cat")) / 2,
        "punctuation": nats("cat", "."),
        "function": nats(".", "the"),
        "style": nats("cat", "behold"),
        "position": nats("behold", "left"),
    }
    assert cost.by_class() == pytest.approx(expected, rel=1e-4)
    total = sum(v * cost.tokens[kind] for kind, v in expected.items())
    assert cost.per_token == pytest.approx(total / 7, rel=1e-4)
    assert cost.per_caption == pytest.approx(total / 2, rel=1e-4)
    assert cost.captions == 2 and model.training


class Texts(list):
    """As much of a data set as a fit asks for."""

    def text(self, index: int) -> dict:
        return self[index]


def chain(p: torch.Tensor, count: int) -> Texts:
    draw, made = np.random.default_rng(0), Texts()
    for _ in range(count):
        ids = [int(draw.integers(V))]
        while len(ids) < 12:
            row = p[ids[-1]].double().numpy()
            ids.append(int(draw.choice(V, p=row / row.sum())))
        made.append(sample(*(WORDS[i] for i in ids)))
    return made


def small_llm() -> LlamaForCausalLM:
    torch.manual_seed(0)
    llm = LlamaForCausalLM(LlamaConfig(vocab_size=V, hidden_size=32, intermediate_size=48,
                                       num_hidden_layers=2, num_attention_heads=2))  # fmt: skip
    torch.nn.init.normal_(llm.lm_head.weight, std=0.2)
    return llm


def lora(r: int) -> dict:
    return dict(type="peft.LoraConfig", task_type="CAUSAL_LM", r=r, lora_alpha=2 * r)


def test_a_fit_comes_down_to_the_entropy_of_its_source(tokenizer):
    p = table(1)
    texts = chain(p, 240)
    train, held_out = Texts(texts[:200]), texts[200:]
    truth = caption_cost(proxy_llm(bigram(p)), held_out, tokenizer, FP32).per_token
    model = proxy_llm(small_llm(), lora(8))
    before = caption_cost(proxy_llm(small_llm()), held_out, tokenizer, FP32).per_token
    found = fit(model, train, held_out, tokenizer, FP32, 150, 1e-2)
    assert found.curve[0] == found.original.per_token == pytest.approx(before, rel=1e-5)
    assert truth * 0.98 < found.floor < truth * 1.15 < before
    assert found.best.per_token == found.floor == found.curve[found.best_step]
    assert found.converged and found.verdict.startswith(("converged by step", "over-fits"))


def test_a_fit_to_a_handful_over_fits(tokenizer):
    texts = chain(table(1), 60)
    found = fit(proxy_llm(small_llm(), lora(8)), Texts(texts[:4]), texts[20:], tokenizer, FP32,
                100, 1e-2)  # fmt: skip
    assert found.over_fits and found.verdict == f"over-fits after step {found.best_step}"
    short = fit(proxy_llm(small_llm(), lora(8)), Texts(texts[:20]), texts[20:], tokenizer, FP32,
                2, 1e-3)  # fmt: skip
    assert short.verdict == "still falling at step 2: give more --steps"


def a_fit(*curve: float) -> Fit:
    return Fit(dict(enumerate(curve)), Cost(), Cost())


def test_the_smallest_rank_near_the_best_is_recommended():
    fits = {4: a_fit(5, 2.1), 16: a_fit(5, 2.015), 64: a_fit(5, 2.0), 256: a_fit(5, 2.01, 2.5)}
    assert recommend(fits) == 16
    assert fits[256].over_fits and not fits[64].over_fits


def test_a_proxy_is_said_to_be_idle_only_if_its_fit_is_done():
    cheap = Cost(1, Counter(thing=5.0), Counter(thing=1))
    for curve, said in {(5, 4.99, 4.98): True, (5, 4.99): False}.items():
        one = Conflict("llm", "x.json", cheap, cheap, "quick fit", a_fit(*curve))
        assert ("next to nothing to learn" in _conflicts([one])) == said


# Of whole runs.


def captions(made, name: str, count: int) -> str:
    """Write captions with a picture each."""
    records = []
    for i in range(count):
        said = f"{'Behold' if i % 2 else 'The'} {['two', 'one'][i % 2]} red cats, number {i}."
        image = runs.write_image(made.folder / f"x{i}.png", 20 + i).name
        talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": said}]
        records.append({"id": str(i), "image": image, "conversations": talk})
    (made.folder / name).write_text(json.dumps(records))
    return str(made.folder / name)


def costs_plainly(llm, made, file: str, held_out: int) -> float:
    """Nats per token of the held-out captions, by transformers alone."""
    tokenizer, nats = made.tokenizer, []
    records = json.loads(Path(file).read_text())
    for i in np.random.default_rng(0).permutation(len(records))[:held_out]:
        text = records[i]["conversations"][1]["value"] + "\n"
        ids = torch.tensor(tokenizer(text, add_special_tokens=False).input_ids)
        with torch.no_grad():
            log_p = llm(ids[None]).logits[0].log_softmax(-1)
        nats += [-log_p[j - 1, ids[j]].item() for j in range(1, len(ids))]
    return sum(nats) / len(nats)


@pytest.mark.slow
def test_a_runs_own_proxy_and_its_leakage_are_reported(run):
    made = run("smollm2", stage="align")
    align = made.work_dir / "align" / "stage.json"
    logged = {"without_picture": 4.0, "own_picture": 2.5, "other_picture": 3.0}
    logged |= {"blank_picture": 3.25, "leakage": 1.0}
    align.write_text(json.dumps(json.loads(align.read_text()) | {"measured": logged}))
    file = captions(made, "data.json", 40)
    file_sha256.cache_clear()  # the run was made of what the file held before
    state = made.work_dir / "proxy" / "stage.json"
    trained = json.loads(state.read_text())
    trained["origin"]["data"] |= {"sha256": [file_sha256(file)], "held_out": 4}
    state.write_text(json.dumps(trained))
    text = compare(made.config, {"captions.held_out": 4}, [], [], 4, 5, [], [1.0], None,
                   made.work_dir)  # fmt: skip
    out = made.work_dir / "conflict"
    facts = json.loads((out / "conflict.json").read_text())
    (one,) = facts["conflicts"]
    llm = AutoModelForCausalLM.from_pretrained(made.folder / "llm")
    assert one["original"] == pytest.approx(costs_plainly(llm, made, file, 4), rel=1e-3)
    merged = made.model.llm.eval()  # align's LLM is the proxy
    assert one["proxy"] == pytest.approx(costs_plainly(merged, made, file, 4), rel=1e-3)
    assert one["conflict"] == pytest.approx(one["original"] - one["proxy"])
    assert one["how"] == f"the proxy of {made.work_dir}" and one["samples"] == 4
    of_classes = sum(kind["original"] * kind["tokens"] for kind in one["classes"].values())
    assert of_classes / one["tokens"] == pytest.approx(one["original"])
    assert facts["leakage"] == logged
    assert "another picture takes 1.000 nats off, a blank one 0.750; the right one 0.500" in text
    assert (out / "conflict.png").read_bytes().startswith(b"\x89PNG")
    for value in (one["original"], one["proxy"], one["conflict"]):
        assert f"{value:.3f}" in text
    asked = Asked(made.config, {"captions.held_out": 4}, 4, 5, made.work_dir)
    state.write_text(json.dumps(trained | {"origin": changed(trained, "llm", fingerprint="x")}))
    with pytest.raises(DPAError, match=r"llm holds other weights than .* when .*proxy was trained"):
        measure(asked, [], [])
    state.write_text(json.dumps(trained | {"origin": changed(trained, "data", held_out=3)}))
    with pytest.raises(DPAError, match=r"held_out=3, so it has seen some .*held_out=4 holds out"):
        measure(asked, [], [])
    state.write_text(json.dumps(trained | {"origin": changed(trained, "data", sha256=["x"])}))
    with pytest.raises(DPAError, match="was trained on other captions than the config's files"):
        measure(asked, [], [])


def changed(state: dict, part: str, **how) -> dict:
    """What a stage was trained from, with another part."""
    origin = state["origin"]
    return origin | {part: origin[part] | how}


@pytest.mark.slow
def test_caption_files_llms_and_ranks_stand_side_by_side(run, tmp_path):
    made, other = run("smollm2", stage="align"), run("qwen2", stage="align")
    file, second = captions(made, "data.json", 40), captions(made, "second.json", 60)
    llms = [str(made.folder / "llm"), str(other.folder / "llm")]
    options = {"proxy.lr": 1e-2}
    asked = [made.config, options, [file, second], llms, 4, 30]
    with pytest.raises(DPAError, match=r"--ranks compares for one LLM .* and 4 pairs of them"):
        compare(*asked, [2, 4], [0.5, 1.0], tmp_path, tmp_path / "none")
    text = compare(*asked, [], [], tmp_path, tmp_path / "none")
    facts = json.loads((tmp_path / "conflict.json").read_text())
    assert [(one["llm"], one["captions"]) for one in facts["conflicts"]] == [
        (llm, name) for llm in llms for name in (file, second)
    ]
    plain = AutoModelForCausalLM.from_pretrained(llms[1])
    assert facts["conflicts"][2]["original"] == pytest.approx(
        costs_plainly(plain, other, file, 4), rel=1e-3
    )
    assert all(one["how"].startswith("quick fit, ") for one in facts["conflicts"])
    assert "ranks" not in facts
    # Without folders where that tells them apart: both LLMs are in folders called `llm`.
    assert f"{llms[0]}, data.json" in text.split("By word class")[1]
    text = compare(made.config, options, [second], llms[1:], 4, 30, [2, 4], [0.5, 1.0], tmp_path,
                   tmp_path / "none")  # fmt: skip
    assert " llm, second.json |" in text.split("By word class")[1]
    assert f"by rank: {llms[1]}, {second}." in text
    facts = json.loads((tmp_path / "conflict.json").read_text())
    (alone,) = facts["conflicts"]
    assert [fit["curve"]["0"] for fit in facts["ranks"]["0.5"]["ranks"].values()] == [
        alone["original"]
    ] * 2  # of the LLM and the captions that were given, not of the config's
    assert facts["ranks"].keys() == {"0.5", "1.0"}
    assert facts["ranks"]["1.0"]["ranks"].keys() == {"2", "4"}
    assert facts["ranks"]["1.0"]["recommended"] in (2, 4) and "leakage" not in facts
    assert "| share" in text and "recommended" in text


@pytest.mark.slow
def test_what_cant_be_measured_is_told(run, tmp_path, monkeypatch):
    made = run("smollm2", stage="align")
    asked = Asked(made.config, {}, 4, 1, tmp_path)
    with pytest.raises(DPAError, match=r"data.json has 1 captions: a tenth .* must be 10 or more"):
        measure(asked, [], [])
    few, enough = captions(made, "few.json", 3), captions(made, "enough.json", 20)
    monkeypatch.setattr("dpa_xtuner.analysis.conflict.fit", None)  # before anything is fitted
    with pytest.raises(DPAError, match=r"--captions gone.json does not exist"):
        measure(asked, [], [enough, "gone.json"])
    with pytest.raises(DPAError, match=r"few.json has 3 captions"):
        measure(asked, [], [enough, few])
    with pytest.raises(DPAError, match=r"captions.share"):
        measure(asked, [], [enough], [2], [1.5])
    with pytest.raises(DPAError, match=r"--llm .* is a folder without a config.json"):
        measure(asked, [str(tmp_path)], [])
    with pytest.raises(DPAError, match=r"neither a folder with a config.json nor a model"):
        measure(asked, [str(tmp_path / "gone")], [])
    with pytest.raises(DPAError, match=r"has no stage proxy.*give --cfg-options method=dpa"):
        measure(Asked(made.config, {"method": "vanilla"}, 4, 1, tmp_path), [], ["x.json"])
    gpt = tmp_path / "gpt"
    gpt.mkdir()
    (gpt / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    with pytest.raises(DPAError, match="is a model of type 'gpt2', which no family loads"):
        measure(asked, [str(gpt)], [])
