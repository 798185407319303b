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
from dpa_xtuner.export.source import Source, read_source
from dpa_xtuner.families.base import known_families
from dpa_xtuner.layout import PROXY
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.artifacts import is_finished
from dpa_xtuner.stages.components import LLM, LLM_ADAPTER
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import ProxySettings, config_from_file
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


def measure(
    asked: Asked,
    llms: Sequence[str],
    captions: Sequence[str],
    ranks: Sequence[int] = (),
    shares: Sequence[float] = (1.0,),
) -> tuple[list[Conflict], dict[float, dict[int, Fit]]]:
    """Measure each caption file under each LLM; then fit a proxy of each rank to each share.

    For the config's LLM and captions, the run's proxy is used if its stage is finished and captions
    were held out from it. Every other proxy is fitted quickly. Settings and data of all are checked
    before the first one is.

    Args:
        asked: what is to be measured.
        llms: folders or names on a hub; empty for the config's LLM.
        captions: files; empty for the config's captions.
        ranks: of LoRA; its scale keeps its ratio to the rank.
        shares: of the captions; those that are measured are the same for all.

    Returns:
        The conflict of each LLM and file; and by share and rank, the fit.

    Raises:
        DPAError: settings, models or data can't be used; or ranks are to be compared for more than
            one LLM or file.
    """
    run = _run(asked, {})  # so that wrong settings of the config are reported first
    the_configs: Sequence[str | None] = [None]
    every = itertools.product(
        dict.fromkeys(llms or the_configs), dict.fromkeys(captions or the_configs)
    )
    targets = [_changes(asked, *each) for each in every]
    if ranks and len(targets) > 1:
        raise DPAError(
            f"--ranks compares for one LLM and one file of captions, and {len(targets)} pairs of "
            f"them are given: give at most one --llm and one --captions."
        )
    known = None if llms or captions else _own_proxy(asked, run)
    trials = [] if known else [_Trial.of(asked, changes) for changes in targets]
    trials_by_rank = _rank_trials(asked, targets[0], ranks, shares) if ranks else {}
    conflicts = [_of_run(asked, known)] if known else [trial.conflict() for trial in trials]
    by_rank = {
        share: {rank: trial.fit() for rank, trial in of_share.items()}
        for share, of_share in trials_by_rank.items()
    }
    return conflicts, by_rank


def _rank_trials(
    asked: Asked, changes: dict, ranks: Sequence[int], shares: Sequence[float]
) -> dict[float, dict[int, "_Trial"]]:
    lora = _proxy_settings(_run(asked, changes | {"proxy.train_llm": "lora"})).lora
    found: dict[float, dict[int, _Trial]] = {share: {} for share in shares}
    for share, rank in itertools.product(shares, ranks):
        of_rank = {"proxy.lora.r": rank, "proxy.lora.lora_alpha": rank * lora.lora_alpha / lora.r}
        found[share][rank] = _Trial.of(asked, changes | of_rank | {"captions.share": share})
    return found


@dataclass(frozen=True)
class _Trial:
    """A quick fit whose settings and data are checked.

    Attributes:
        run: with the settings of the fit.
        train: the captions to fit to.
        samples: those that are measured.
        steps: of the fit, at most.
        note: what the report has to say of it.
    """

    run: Run
    train: DPADataset
    samples: list[dict]
    steps: int
    note: str

    @classmethod
    def of(cls, asked: Asked, changes: dict) -> "_Trial":
        forced = {"captions.held_out": asked.samples, "proxy.train_llm": "lora"}
        run, note = _run(asked, changes | forced), ""
        if run.precision.name == "fp16":
            run = _run(asked, changes | forced, Precision("fp32"))
            note = " in float32, since float16 needs a scaled loss"
        return cls(run, *_split(run, run.stages[PROXY], asked.samples), asked.steps, note)

    def fit(self) -> Fit:
        run = self.run
        torch.manual_seed(0)  # of the adapter's first weights
        model, lr = build_model(run, run.stages[PROXY]), _proxy_settings(run).lr
        return fit(model, self.train, self.samples, run.tokenizer, run.precision, self.steps, lr)

    def conflict(self) -> Conflict:
        found, settings = self.fit(), self.run.settings
        files, how = ", ".join(settings.captions.files), f"quick fit{self.note}, {found.verdict}"
        return Conflict(settings.llm_name_or_path, files, found.original, found.best, how, found)


def _own_proxy(asked: Asked, run: Run) -> Source | None:
    """Find the run's own proxy, if there is one that captions were held out from."""
    held_out = run.settings.captions.held_out
    if not held_out or not is_finished(asked.base / PROXY):
        return None
    source = read_source(asked.config, PROXY, asked.base, options=asked.options)
    trained = source.stage_provenance.get("data", {})
    now = [data_sha256(file) for file in run.settings.captions.files]
    if trained.get("sha256") != now:
        raise DPAError(
            f"The proxy in {asked.base} was trained on other captions than the config's files hold "
            f"now, so it may have seen those to be measured. Put them back, or give another "
            f"--work-dir to have a proxy fitted."
        )
    if (before := trained.get("held_out", 0)) < held_out:
        raise DPAError(
            f"The proxy in {asked.base} was trained with captions.held_out={before}, so it has "
            f"seen some of the captions that captions.held_out={held_out} holds out. Set it to "
            f"{before}, or give another --work-dir to have a proxy fitted."
        )
    return source


def _of_run(asked: Asked, source: Source) -> Conflict:
    """Measure by the run's own proxy."""
    run, stage = source.run, source.stage
    _, samples = _split(run, stage, asked.samples)
    adapter = source.written(LLM_ADAPTER)
    bare = replace(stage, trains=())
    # With a new adapter, which adds nothing yet. In the run it was not merged either: a sum in
    # bfloat16 is rounded, and was 0.015 nats off in the demo.
    model = build_model(run, stage if adapter else bare).to(get_device())
    source.refuse_other(LLM, model.fingerprints[LLM])
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


def _proxy_settings(run: Run) -> ProxySettings:
    proxy = run.settings.proxy
    assert proxy is not None, "_run refuses a method without the stage"
    return proxy


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
