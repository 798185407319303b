"""A Hugging Face export, asked by plain transformers, against the model that was trained."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import newer, runs
from xtuner.utils import IMAGE_TOKEN_INDEX

from dpa_xtuner.export import export_config
from dpa_xtuner.versions import LLAVA_HOLDS_AN_LLM

pytestmark = pytest.mark.slow

# name: family and how it was trained
DINO = dict(type="dinov2", image_size=16, layer=-2)
MODELS = {
    "llama3": ("llama3", {}),
    "internlm2": ("internlm2", dict(train_llm="full")),
    "internlm3": ("internlm3", {}),
    "qwen2": ("qwen2", dict(encoder="siglip")),
    "qwen2_5": ("qwen2_5", dict(train_llm="full", encoder=DINO)),
    "qwen3": ("qwen3", dict(train_llm="full")),
    "llama2": ("llama2", {}),
    "vicuna": ("vicuna", dict(train_llm="full")),
    "llama3_1": ("llama3_1", dict(start_from="proxy")),
    **({"gemma2": ("gemma2", dict(train_llm="full"))} if LLAVA_HOLDS_AN_LLM else {}),
    "smollm2": ("smollm2", dict(start_from="proxy", encoder="siglip")),
    "llama3_2": ("llama3_2", {}),
    "gemma3": ("gemma3", dict(train_llm="full")),
    "smollm3": ("smollm3", {}),
    "mistral": ("mistral", {}),
    "ministral": ("ministral", {}),
    "qwen3_moe": ("qwen3_moe", dict(train_llm="full")),
}  # fmt: skip
USER = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is it?"}]}
REPLY = {"role": "assistant", "content": [{"type": "text", "text": "Two cats."}]}
AGAIN = {"role": "user", "content": [{"type": "text", "text": "And the dog?"}]}
CONVERSATIONS = [[USER], [USER, REPLY, AGAIN]]


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> Path:
    return runs.write_image(tmp_path_factory.mktemp("image") / "square.png")


def ask(jobs: dict, image: Path, folder: Path) -> dict:
    """What plain transformers makes of exported folders, in a process of its own."""
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [sys.executable, str(runs.PLAIN)]
    command += [str(image), str(folder / "jobs.json"), str(folder / "found.pt")]
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(folder / "found.pt", weights_only=False)


@pytest.fixture(scope="module")
def answers(run, image, tmp_path_factory):
    made, jobs = {}, {}
    for name, (family, how) in MODELS.items():
        if newer.is_too_old_for(family):
            continue
        made[name] = run(family, **how)
        out = export_config(made[name].config, work_dir=made[name].work_dir, dtype="float32")
        jobs[name] = (str(out), CONVERSATIONS)
    return made, ask(jobs, image, tmp_path_factory.mktemp("asked"))


@pytest.mark.parametrize("name", MODELS)
def test_logits_and_greedy_text_are_those_of_the_training_model(name, answers, image):
    newer.skip_unless_known(name)
    made, found = answers[0][name], answers[1][name]
    assert not any(found["info"].values()), found["info"]
    assert found["attention"] == ("eager" if name == "gemma2" else "sdpa")
    for record, ids, logits, exact, said in zip(
        runs.RECORDS, found["ids"], found["logits"], found["exact"], found["said"], strict=True
    ):
        tokens = made.prompt(record)
        place = ids.index(found["image_id"])
        count = ids.count(found["image_id"])
        assert ids[:place] + [IMAGE_TOKEN_INDEX] + ids[place + count :] == tokens
        trained = made.logits(tokens, image)
        expected = made.exact_logits(tokens, image)
        assert expected.std() > 0.3
        rows = expected.shape[1]
        torch.testing.assert_close(exact[:, :rows], expected, atol=5e-6, rtol=0)
        # In float32 the training's own pass is up to 2e-5 off, and the export's rounds elsewhere
        # where an adapter was added to the weights.
        own_rounding = (trained - expected).abs().max().item()
        torch.testing.assert_close(logits[:, :rows], trained, atol=1e-5 + own_rounding, rtol=0)
        ends = [found["ends"]] if isinstance(found["ends"], int) else found["ends"]
        assert said == made.greedy(tokens, image, 8, ends, found["image_id"])
