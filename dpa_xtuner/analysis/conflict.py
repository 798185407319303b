"""Language prior conflict: what captions cost an LLM, and a proxy that has learned their style."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from mmengine.device import get_device
from peft import set_peft_model_state_dict
from safetensors.torch import load_file

from dpa_xtuner.analysis.cross_entropy import Cost, caption_cost
from dpa_xtuner.analysis.fit import Fit, fit
from dpa_xtuner.analysis.models import build_model, split_data, spread
from dpa_xtuner.data import DPADataset
from dpa_xtuner.data.formats import data_sha256
from dpa_xtuner.errors import DPAError
from dpa_xtuner.export.source import read_source
from dpa_xtuner.families.base import known_families
from dpa_xtuner.layout import PROXY
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import is_finished
from dpa_xtuner.stages.components import LLM, LLM_ADAPTER
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import config_from_file
from dpa_xtuner.stages.table import Stage

WORTH = 0.1
"""Nats per token below which a proxy has next to nothing to learn."""


@dataclass(frozen=True)
class Conflict:
    """What one caption set costs one LLM.

    Attributes:
        llm: its folder or name on a hub.
        captions: the file, or files, of the captions.
        original: what they cost the LLM.
        proxy: what they cost the proxy.
        how: the proxy: the run's, or a quick fit and how that went.
        fitted: the fit, if it is one.
    """

    llm: str
    captions: str
    original: Cost
    proxy: Cost
    how: str
    fitted: Fit | None = None

    @property
    def per_token(self) -> float:
        """Nats per token that the proxy takes off."""
        return self.original.per_token - self.proxy.per_token

    @property
    def per_caption(self) -> float:
        """Nats per caption that the proxy takes off."""
        return self.original.per_caption - self.proxy.per_caption

    def facts(self) -> dict[str, Any]:
        """All of it, for a JSON file."""
        before, after = self.original.by_class(), self.proxy.by_class()
        classes = {
            kind: {
                "tokens": self.original.tokens[kind],
                "original": before[kind],
                "proxy": after[kind],
                "conflict": before[kind] - after[kind],
            }
            for kind in before
        }
        return {
            "llm": self.llm,
            "captions": self.captions,
            "samples": self.original.captions,
            "tokens": self.original.tokens.total(),
            "original": self.original.per_token,
            "proxy": self.proxy.per_token,
            "conflict": self.per_token,
            "conflict_per_caption": self.per_caption,
            "how": self.how,
            "classes": classes,
            "curve": self.fitted.curve if self.fitted else None,
        }


@dataclass(frozen=True)
class Asked:
    """What is to be measured.

    Attributes:
        config: a DPA config.
        options: as of ``--cfg-options``.
        samples: held-out captions to measure, at most a tenth of all.
        steps: of a quick fit, at most.
        base: the run's work dir.
    """

    config: Path
    options: dict
    samples: int
    steps: int
    base: Path


def measure(asked: Asked, llms: Sequence[str], captions: Sequence[str]) -> list[Conflict]:
    """Measure each caption file under each LLM.

    For the config's LLM and captions, the run's proxy is used if its stage is finished and captions
    were held out from it. Every other proxy is fitted quickly.

    Args:
        asked: what is to be measured.
        llms: folders or names on a hub; empty for the config's LLM.
        captions: files; empty for the config's captions.

    Raises:
        DPAError: settings, models or data can't be used.
    """
    run = _run(asked, {})  # so that wrong settings of the config are reported first
    if not llms and not captions and (found := _of_run(asked, run)):
        return [found]
    the_configs: Sequence[str | None] = [None]
    every = itertools.product(llms or the_configs, captions or the_configs)
    return [fitted(asked, _changes(asked, llm, file)) for llm, file in every]


def by_rank(asked: Asked, ranks: Sequence[int], shares: Sequence[float]) -> dict[float, dict]:
    """Fit a proxy of each rank to each share of the config's captions.

    The scale keeps its ratio to the rank, and the held-out captions are the same for all.

    Returns:
        By share and rank, the :class:`dpa_xtuner.analysis.fit.Fit`.

    Raises:
        DPAError: settings, models or data can't be used.
    """
    lora = _run(asked, {"proxy.train_llm": "lora"}).settings.proxy.lora  # type: ignore[union-attr]
    found: dict[float, dict] = {share: {} for share in shares}
    for share in shares:
        for rank in ranks:
            alpha = rank * lora.lora_alpha / lora.r
            changes = {
                "captions.share": share,
                "proxy.lora.r": rank,
                "proxy.lora.lora_alpha": alpha,
            }
            found[share][rank] = fitted(asked, changes).fitted
    return found


def fitted(asked: Asked, changes: dict) -> Conflict:
    """Measure by a quick fit.

    Args:
        asked: what is to be measured.
        changes: settings in place of the config's.
    """
    forced = {"captions.held_out": asked.samples, "proxy.train_llm": "lora"}
    run = _run(asked, changes | forced)
    asked_for = run.precision.name
    if asked_for == "fp16":
        run = _run(asked, changes | forced, Precision("fp32"))
    stage, settings = run.stages[PROXY], run.settings
    train, samples = _split(run, stage, asked.samples)
    torch.manual_seed(0)  # of the adapter's first weights
    model, lr = build_model(run, stage), settings.proxy.lr  # type: ignore[union-attr]
    found = fit(model, train, samples, run.tokenizer, run.precision, asked.steps, lr)
    in_other = " in float32, since float16 needs a scaled loss" * (asked_for != run.precision.name)
    files, how = ", ".join(settings.captions.files), f"quick fit{in_other}, {found.verdict}"
    return Conflict(settings.llm_name_or_path, files, found.original, found.best, how, found)


def _of_run(asked: Asked, run: Run) -> Conflict | None:
    """Measured by the run's own proxy, if there is one that captions were held out from."""
    stage = run.stages[PROXY]
    if not run.settings.captions.held_out or not is_finished(asked.base / PROXY):
        return None
    source = read_source(asked.config, PROXY, asked.base, options=asked.options)
    now = [data_sha256(file) for file in run.settings.captions.files]
    if source.stage_provenance.get("data", {}).get("sha256") != now:
        raise DPAError(
            f"The proxy in {asked.base} was trained on other captions than the config's files hold "
            f"now, so it may have seen those to be measured. Put them back, or give another "
            f"--work-dir to have a proxy fitted."
        )
    _, samples = _split(run, stage, asked.samples)
    adapter = source.written(LLM_ADAPTER)
    bare = replace(stage, trains=())
    # With a new adapter, which adds nothing yet. In the run it was not merged either: a sum in
    # bfloat16 is rounded, and was 0.015 nats off in the demo.
    model = build_model(run, stage if adapter else bare).to(get_device())
    original = caption_cost(model, samples, run.tokenizer, run.precision)
    if adapter:
        set_peft_model_state_dict(model.llm, load_file(adapter / "adapter_model.safetensors"))
    else:
        del model  # before another of its size
        whole: dict[str, str] = {LLM: str(asked.base.absolute() / stage.writes[LLM])}
        model = build_model(run, replace(bare, loads=whole)).to(get_device())
    proxy = caption_cost(model, samples, run.tokenizer, run.precision)
    files, how = ", ".join(run.settings.captions.files), f"the proxy of {asked.base}"
    return Conflict(run.settings.llm_name_or_path, files, original, proxy, how)


def _run(asked: Asked, changes: dict, precision: Precision | None = None) -> Run:
    options = asked.options | changes | {"work_dir": str(asked.base), "launcher": "none"}
    run = Run.of(config_from_file(asked.config, options), precision)
    if PROXY not in run.stages:
        raise DPAError(
            f"method={run.settings.method!r} of {asked.config} has no stage {PROXY}, whose "
            f"settings say how a proxy is fitted: give --cfg-options method=dpa."
        )
    return run


def _split(run: Run, stage: Stage, count: int) -> tuple[DPADataset, list[dict]]:
    """Return the captions to train on, and up to ``count`` held-out ones, evenly spread."""
    train, held_out = split_data(run, stage)
    if held_out is None:
        raise DPAError(
            f"{', '.join(run.settings.captions.files)} has {train.records} captions: a tenth of "
            f"them is held out to be measured, so there must be 10 or more."
        )
    return train, [held_out.text(i) for i in spread(len(held_out), count)]


def _changes(asked: Asked, llm: str | None, captions: str | None) -> dict:
    """Make settings for another LLM or other captions."""
    found: dict[str, Any] = {}
    if captions is not None:
        if not Path(captions).exists():
            raise DPAError(f"--captions {captions} does not exist: give data files or folders.")
        # Their pictures are not looked at.
        found |= {"captions.data_path": captions, "captions.weights": None}
        found["captions.image_folder"] = str(Path(captions).parent)
    if llm is not None:
        if Path(llm).is_dir() and not (Path(llm) / "config.json").is_file():
            raise DPAError(f"--llm {llm} is a folder without a config.json: give that of an LLM.")
        found["llm_name_or_path"] = llm
        run = _run(asked, found)
        kind, family = run.llm_config.model_type, run.settings.llm_family
        if family is not None and kind not in family.model_types:
            others = [n for n, other in known_families().items() if kind in other.model_types]
            if not others:
                raise DPAError(
                    f"--llm {llm} is a model of type {kind!r}, which no family loads: write a "
                    f"config for it, as docs/extending.md says, and give that."
                )
            found["family"] = others[0]  # any does, since captions have no chat template
    return found
