"""Convert a stock XTuner LLaVA config to a DPA config that keeps its model, data and schedule.

The tables below name the keys that are taken over. The other keys, if their values differ from
what a DPA config does, are listed at the top of the new config.
"""

import os
import re
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from xtuner.configs import cfgs_name_path

from dpa_xtuner.data.templates import resolve_template
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.files import write_text
from dpa_xtuner.layout import ALIGN, TUNE
from dpa_xtuner.registry import FAMILIES

_GPUS = 8  # what XTuner's documentation trains its LLaVA configs on
_ENCODERS = {
    "CLIPVisionModel": "clip",
    "SiglipVisionModel": "siglip",
    "Dinov2Model": "dinov2",
    "Dinov2WithRegistersModel": "dinov2",
}
# Stock key -> DPA setting of the stage that the stock config trains.
_STAGE_KEYS = {
    "optim_wrapper.optimizer.lr": "lr",
    "train_dataloader.batch_size": "batch_size",
    "train_cfg.max_epochs": "max_epochs",
    "dataset.pad_image_to_square": "pad_image_to_square",
    "model.llm_lora.r": "lora.r",
    "model.llm_lora.lora_alpha": "lora.lora_alpha",
    "model.llm_lora.lora_dropout": "lora.lora_dropout",
}
# Stock key -> DPA key, for all stages.
_RUN_KEYS = {
    "model.llm.pretrained_model_name_or_path": "llm_name_or_path",
    "model.visual_encoder.pretrained_model_name_or_path": "visual_encoder_name_or_path",
    "model.projector_depth": "projector.depth",
}
# Keys that are the same in both, for all stages.
_SAME_KEYS = re.compile(
    r"model\.llm\.(?!type|torch_dtype|trust_remote_code)"
    r"|model\.(use_activation_checkpointing|visual_select_layer)"
    r"|train_dataloader\.(num_workers|pin_memory)|default_hooks\.checkpoint\.max_keep_ckpts"
    r"|optim_wrapper\.(clip_grad|optimizer\.(betas|weight_decay))|randomness\.seed"
)
# Keys that a DPA setting is computed from, and keys that DPA leaves no choice in.
_READ = re.compile(
    r"model\.(freeze_llm|llm\.)|optim_wrapper\.accumulative_counts"
    r"|dataset\.(data_path|image_folder|max_length|tokenizer|image_processor|template_map_fn)"
    r"|train_dataloader\.(collate_fn|sampler\.(?!type))|default_hooks\.checkpoint\.interval"
    r"|param_scheduler\.(LinearLR\.|CosineAnnealingLR\.(?!eta_min))"
)
# Values that change nothing, in addition to those of ``_base_/dpa.py``.
_USUAL = {
    "model.freeze_visual_encoder": True,
    "model.llm_lora.bias": "none",
    "model.llm_lora.task_type": "CAUSAL_LM",
    "dataset.dataset_map_fn": "llava_map_fn",
    "param_scheduler.CosineAnnealingLR.eta_min": 0.0,
}
_USUAL_TYPES = {"LLaVAModel", "LoraConfig", "LLaVADataset", "LengthGroupedSampler", "TrainLoop"}
# Values of keys that a stock config may leave out.
_DEFAULTS = {
    "model.freeze_visual_encoder": False,
    "optim_wrapper.accumulative_counts": 1,
    "optim_wrapper.clip_grad": None,
    "default_hooks.checkpoint.max_keep_ckpts": -1,
}
# Dicts that are taken over, or listed, as a whole.
_WHOLE = {"quantization_config", "clip_grad", "visual_encoder_lora", "template_map_fn"}


@dataclass(frozen=True)
class Stock:
    """A LLaVA config of XTuner: one training, either of the projector alone or of the LLM too.

    Attributes:
        name: name of its file without ``.py``.
        keys: dotted key -> value; classes and functions are dotted names. ``dataset`` is the
            first data set, ``dataset_1`` the keys of the next one that differ from it.
        paths: "data_path" and "image_folder" of each data set in LLaVA's format.
    """

    name: str
    keys: dict[str, Any]
    paths: dict[str, list[str]]

    @property
    def stage(self) -> str:
        """The DPA stage that trains the same components: align or tune."""
        trains_llm = not self.keys.get("model.freeze_llm") or "model.llm_lora.r" in self.keys
        return TUNE if trains_llm else ALIGN

    @property
    def continues(self) -> str | None:
        """Name of the stock config whose projector it starts with."""
        path = self.keys.get("model.pretrained_pth")
        return Path(path).parent.name if path else None

    @property
    def quantised(self) -> bool:
        """Whether its LLM is loaded in 4 or 8 bit."""
        return "model.llm.quantization_config" in self.keys

    @property
    def gpus(self) -> int:
        """Number of GPUs in its name; 8 if there is none."""
        found = re.search(r"_gpu(\d+)", self.name)
        return int(found[1]) if found else _GPUS


def stock_names() -> list[str]:
    """List all LLaVA configs of the installed XTuner."""
    return sorted(n for n in cfgs_name_path if "llava" in n and not n.startswith("convert_"))


def find_stock(name: str | Path) -> Stock:
    """Read a stock LLaVA config.

    Args:
        name: one of :func:`stock_names`, or a path to such a file, edited or not.

    Raises:
        DPAError: it does not exist, or is not a LLaVA config.
    """
    path = Path(name)
    if not path.is_file():
        if str(name) not in stock_names():
            raise DPAError(
                f"{str(name)!r} is neither a file nor a LLaVA config of XTuner"
                f"{nearest(str(name), stock_names()) or '.'} Known: {', '.join(stock_names())}."
            )
        path = Path(cfgs_name_path[str(name)])
    cfg = Config.fromfile(path).to_dict()
    if _last(cfg.get("model", {}).get("type", "")) != "LLaVAModel":
        raise DPAError(
            f"{path} is no LLaVA config: its model is not a dict(type=LLaVAModel, ...). Give one "
            f"like {stock_names()[0]}."
        )
    return _read(path.stem, cfg)


def _read(name: str, cfg: dict) -> Stock:
    given = {key: cfg[key] for key in signature(Runner.__init__).parameters if key in cfg}
    given["custom_hooks"] = [_last(hook["type"]) for hook in cfg.get("custom_hooks") or []]
    given["param_scheduler"] = {_last(one["type"]): one for one in cfg["param_scheduler"]}
    given["train_dataloader"] = loader = dict(cfg["train_dataloader"])
    dataset = loader.pop("dataset")
    datasets = dataset.get("datasets", [dataset])
    llava = [one for one in datasets if _last(one["type"]) == "LLaVADataset"]
    paths = {key: [one[key] for one in llava] for key in ("data_path", "image_folder")}
    first, *others = llava + [one for one in datasets if one not in llava]
    given["dataset"] = first
    for number, one in enumerate(others, 1):
        taken = paths if one in llava else ()
        given[f"dataset_{number}"] = {
            key: one[key] for key in one if key not in taken and one[key] != first.get(key)
        }
    keys = {key: value for key, value in _flat(given).items() if value not in (None, [])}
    return Stock(name, _DEFAULTS | keys, paths)


def find_partner(stock: Stock) -> Stock | None:
    """Find the stock config of the other stage: what it continues, or what continues it.

    If several continue it, those that load the LLM alike come first, and of these the one with
    the shortest name.
    """
    if stock.stage == TUNE:
        return find_stock(stock.continues) if stock.continues in stock_names() else None
    # Reading a config takes a tenth of a second, so only those that name it are read.
    named = [n for n in stock_names() if f"{stock.name}/" in Path(cfgs_name_path[n]).read_text()]
    found = [other for other in map(find_stock, named) if other.continues == stock.name]
    found.sort(key=lambda other: (other.quantised != stock.quantised, len(other.name)))
    return found[0] if found else None


def convert(stock: Stock, base: Config) -> tuple[Config, list[str]]:
    """Translate a stock config and its partner to DPA settings.

    Args:
        stock: gives the models, and one of the stages align and tune.
        base: ``_base_/dpa.py``.

    Returns:
        The settings that differ from ``base``, and notes: where each stage comes from, and which
        keys were not taken over.
    """
    partner, known = find_partner(stock), _flat(base.to_dict())
    both = {one.stage: one for one in (stock, partner) if one is not None}
    settings, notes = _of_run(stock)
    for stage, data in ((ALIGN, "captions"), (TUNE, "instructions")):
        if stage in both:
            settings |= _of_stage(both[stage], data)
            notes.append(f"{stage}: the training of {both[stage].name}.")
        else:
            notes.append(f"{stage}: no stock config belongs to this one; set {data}.")
    if stock.quantised and TUNE not in both:
        settings[f"{TUNE}.train_llm"] = "lora"
    notes.append("proxy: the method's own, on the captions' text.")
    gpus = " and ".join(sorted({str(one.gpus) for one in both.values()}))
    notes.append(f"Global batch sizes are those on {gpus} GPU{'s' * (gpus != '1')}.")
    for stage, one in both.items():
        notes += [f"Not taken over into {stage}:", *_not_kept(one, stock, known)]
    changed = Config()
    changed.merge_from_dict(
        {key: value for key, value in settings.items() if value != known.get(key)}
    )
    return changed, notes


def write_config(stock: Stock, output: Path, base: Path) -> list[str]:
    """Write a stock config as a DPA config.

    Args:
        stock: from :func:`find_stock`.
        output: the new file. Its ``_base_`` is relative if both files are in one checkout, so
            that the checkout can be moved, and absolute otherwise.
        base: ``configs/_base_/dpa.py``.

    Returns:
        The notes of :func:`convert`, which are the file's first lines.

    Raises:
        DPAError: ``output`` exists already.
    """
    if output.exists():
        raise DPAError(f"{output} exists. Give another name with -o, or remove it.")
    settings, notes = convert(stock, Config.fromfile(base))
    checkout, folder = base.resolve().parents[2], output.resolve().parent
    inside = folder.is_relative_to(checkout)
    path = Path(os.path.relpath(base, folder) if inside else base.resolve()).as_posix()
    parts = [f"# {note}" for note in notes] + [f"_base_ = [{path!r}]\n"]
    # Key by key, since MMEngine sorts the keys of a config.
    parts += [Config({key: settings[key]}).pretty_text.strip() for key in settings]
    folder.mkdir(parents=True, exist_ok=True)
    write_text(output, "\n".join(parts) + "\n")
    return notes


def family_of(llm: str) -> str | None:
    """Find the family whose name the LLM's name holds, such as ``llama3`` in Meta-Llama-3-8B.

    If a digit or a b follows, it is another number: InternLM-20B is not an InternLM2, and Gemma-2B
    is not a Gemma 2.
    """
    FAMILIES.import_from_location()
    return _named_in(llm, FAMILIES.module_dict)


def _named_in(llm: str, names: Iterable[str]) -> str | None:
    found = [name for name in names if re.search(_pattern(name), Path(llm).name.lower())]
    return max(found, key=len, default=None)


def _pattern(name: str) -> str:
    words = re.findall(r"[a-z]+|[0-9]+", name)
    end = r"(?![0-9b])" if words[-1].isdigit() else ""
    return r"(?<![a-z])" + r"[-_. ]?".join(words) + end


def _of_run(stock: Stock) -> tuple[dict[str, Any], list[str]]:
    """Translate the keys that hold for all stages; returns settings by dotted key, and notes."""
    keys, notes = stock.keys, [f"Made by tools/apply_dpa.py from XTuner's {stock.name}."]
    llm = keys["model.llm.pretrained_model_name_or_path"]
    family = family_of(llm)
    settings: dict[str, Any] = {"family": family}
    for key in filter(_of_all_stages, keys):
        settings[_RUN_KEYS.get(key, key)] = keys[key]
    encoder = _last(keys["model.visual_encoder.type"])
    if encoder in _ENCODERS:
        settings["encoder.type"] = _ENCODERS[encoder]
    if stock.quantised:  # the setting ``precision`` decides what it computes in
        loading = settings["model.llm.quantization_config"]
        settings["model.llm.quantization_config"] = {
            key: loading[key] for key in loading if key != "bnb_4bit_compute_dtype"
        }
    template = keys.get("dataset.template_map_fn", {}).get("template")
    template = _last(template) if isinstance(template, str) else template
    if family is not None:
        if not _writes_the_same(template, FAMILIES.get(family).template):
            settings["prompt_template"] = template
            notes.append("prompt_template is XTuner's; without it, the family's own is used.")
        return settings, notes
    settings["prompt_template"] = template
    if native := _named_in(llm, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES):
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[native]
        settings["model.llm.type"] = f"transformers.{kind}.from_pretrained"
    else:
        settings["model.llm.type"] = keys["model.llm.type"]
        if keys.get("model.llm.trust_remote_code"):
            settings["model.llm.trust_remote_code"] = True
            settings["tokenizer.trust_remote_code"] = True
            notes.append("The code of LLM and tokenizer comes with the model, and is run.")
    return settings, notes


def _writes_the_same(template: str | dict | None, own: dict) -> bool:
    """Tell whether a template makes the same text of a conversation; None leaves it to ``own``."""
    given = own if template is None else resolve_template(template)
    of_text = (given.keys() | own.keys()) - {"STOP_WORDS", "STRIP", "AS_ONE_TEXT"}
    return all(given.get(key) == own.get(key) for key in of_text)


def _of_stage(stock: Stock, data: str) -> dict[str, Any]:
    """Translate the keys of the trained stage and its data to settings by dotted key."""
    keys = stock.keys
    accumulate = keys["optim_wrapper.accumulative_counts"]
    interval = keys["default_hooks.checkpoint.interval"]
    settings = {ours: keys[key] for key, ours in _STAGE_KEYS.items() if key in keys}
    settings |= {
        "global_batch_size": settings["batch_size"] * accumulate * stock.gpus,
        "max_length": keys["dataset.max_length"] + _image_tokens(stock),  # DPA counts these too
        "warmup_ratio": keys.get("param_scheduler.LinearLR.end", 0) / settings["max_epochs"],
        "save_steps": max(1, round(interval / accumulate)),
    }
    if stock.stage == TUNE:
        settings["train_llm"] = "lora" if "lora.r" in settings else "full"
    settings = {f"{stock.stage}.{key}": value for key, value in settings.items()}
    for key, paths in stock.paths.items():
        settings |= {f"{data}.{key}": paths if len(paths) > 1 else path for path in paths[:1]}
    return settings


def _image_tokens(stock: Stock) -> int:
    """Count the patches of an image by the encoder's name, else as for CLIP ViT-L/14-336."""
    name = stock.keys["model.visual_encoder.pretrained_model_name_or_path"]
    found = re.search(r"patch(\d+)-(\d+)", name)
    patch, size = map(int, found.groups()) if found else (14, 336)
    return (size // patch) ** 2


def _not_kept(one: Stock, stock: Stock, known: dict[str, Any]) -> list[str]:
    """List the keys of a stock config that are not taken over and would change something.

    Args:
        one: the stock config.
        stock: the same config or its partner; its keys hold for all stages.
        known: dotted key -> value of ``_base_/dpa.py``.
    """

    def is_same(key: str) -> bool:
        value = one.keys.get(key)
        if _of_all_stages(key):
            return value == stock.keys.get(key)
        usual = (_USUAL.get(key, known.get(key)), *_USUAL_TYPES, *_ENCODERS)
        read = key not in one.keys or key in _STAGE_KEYS or _READ.match(key)
        return bool(read) or value in usual or (isinstance(value, str) and _last(value) in usual)

    return [f"  {key}={one.keys.get(key)!r}" for key in one.keys | stock.keys if not is_same(key)]


def _of_all_stages(key: str) -> bool:
    return key in _RUN_KEYS or bool(_SAME_KEYS.match(key))


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    """Flatten nested dicts to dotted keys; an empty dict has none."""
    if not isinstance(value, dict) or path.rpartition(".")[2] in _WHOLE:
        return {path: value}
    found: dict[str, Any] = {}
    for key, below in value.items():
        found |= _flat(below, f"{path}.{key}" if path else key)
    return found


def _last(dotted: str) -> str:
    """Return the last name, such as AutoModel of ``transformers.AutoModel.from_pretrained``."""
    return dotted.removesuffix(".from_pretrained").rpartition(".")[2]
