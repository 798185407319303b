"""The tuned LLM alone, in the format that the next round of tuning begins with, for each family."""

import json
import warnings

import pytest
import torch
from mmengine.registry import MODELS
from support import runs
from transformers import AutoModelForCausalLM

from dpa_xtuner.errors import DPAError
from dpa_xtuner.export import export_config
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.build import model_config
from dpa_xtuner.stages.provenance import provenance_of
from dpa_xtuner.stages.run import Run, check_models
from dpa_xtuner.stages.settings import config_from_file

pytestmark = pytest.mark.slow


def next_round(made: runs.Run, llm) -> runs.Run:
    """A run that begins with the LLM and the projector of another, before its first step."""
    options = {"llm_name_or_path": str(llm)}
    options["tune.init_projector"] = str(made.work_dir / "tune/projector")
    cfg = config_from_file(made.config, options)
    cfg.work_dir, cfg.launcher = str(made.folder / "next"), "none"
    run = Run.of(cfg, Precision(cfg.precision))
    cfg, row = run.cfg, run.stages["tune"]
    check_models(run, [row])
    provenance_of(run, row)  # checks the inputs
    model = MODELS.build(model_config(run, row))
    return runs.Run(made.folder, made.config, run.settings, cfg, model, "tune")


@pytest.mark.parametrize("family", runs.KINDS)
@pytest.mark.parametrize("train_llm", ["full", "lora"])
def test_the_next_round_has_the_tokens_and_logits_of_this_one(run, tmp_path, family, train_llm):
    made = run(family, train_llm=train_llm)
    out = export_config(made.config, fmt="llm", work_dir=made.work_dir, out=tmp_path / "llm",
                        dtype="float32")  # fmt: skip
    following = next_round(made, out)
    image = runs.write_image(tmp_path / "image.png")
    for record in runs.RECORDS:
        tokens = made.prompt(record)
        assert following.prompt(record) == tokens
        expected = made.exact_logits(tokens, image)
        assert expected.std() > 0.3
        found = following.exact_logits(tokens, image)
        torch.testing.assert_close(found, expected, atol=5e-6, rtol=0)
    llm, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values()) and llm.config.use_cache
    attention = llm.config._attn_implementation
    assert attention == ("eager" if family == "gemma2" else "sdpa")


def test_where_it_goes(run):
    """Beside the projector for an adapter; an LLM that was trained in full lies there already."""
    made = run("qwen2")
    out = export_config(made.config, fmt="llm", work_dir=made.work_dir)
    assert out == made.work_dir / "tune/llm" and runs.record(out)["format"] == "llm"
    made = run("qwen2", train_llm="full")
    out = made.work_dir / "tune/llm"
    before = {file: file.stat().st_mtime_ns for file in out.iterdir()}
    assert export_config(made.config, fmt="llm", work_dir=made.work_dir) == out
    assert {file: file.stat().st_mtime_ns for file in out.iterdir()} == before
    (out / "tokenizer_config.json").unlink()  # as earlier versions wrote it
    with pytest.raises(DPAError, match="llm exists, but is not an earlier export"):
        export_config(made.config, fmt="llm", work_dir=made.work_dir)


def test_published_generation_settings_that_transformers_refuses_to_save(run, tmp_path):
    odd = {"temperature": 0.9, "top_p": 0.6, "eos_token_id": [1, 2]}
    for family in ("vicuna", "internlm2"):
        made = run(family)
        (made.folder / "llm/generation_config.json").write_text(json.dumps(odd))
        with warnings.catch_warnings():
            warnings.simplefilter("default")  # pytest's filter hides what becomes the error
            out = export_config(made.config, fmt="llm", work_dir=made.work_dir,
                                out=tmp_path / family)  # fmt: skip
        written = json.loads((out / "generation_config.json").read_text())
        assert {key: written[key] for key in odd} == odd


def test_what_has_no_llm_of_its_own_is_refused(run):
    made = run("qwen2")
    with pytest.raises(DPAError, match=r"stage align trains no LLM\n--format hf or .* parts can"):
        export_config(made.config, "align", "llm", work_dir=made.work_dir)
    options = {"model.llm.quantization_config": dict(load_in_4bit=True)}
    with pytest.raises(DPAError, match=r"the LLM is quantised.*\n--format .*parts can"):
        export_config(made.config, "tune", "llm", work_dir=made.work_dir, options=options)
