"""From a stock XTuner LLaVA config to one of ours that keeps its model, data and schedule."""

import os
import re
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.runner import Runner
from mmengine.utils import get_object_from_string
from transformers import BitsAndBytesConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from xtuner.configs import cfgs_name_path
from xtuner.utils import PROMPT_TEMPLATE

from dpa_xtuner.data.problems import Problem
from dpa_xtuner.data.records import Record
from dpa_xtuner.data.templates import resolve_template, to_pieces
from dpa_xtuner.errors import DPAError, nearest
from dpa_xtuner.files import write_text
from dpa_xtuner.registry import FAMILIES

_WIDTH = 100
_GPUS = 8  # what XTuner's documentation trains its LLaVA configs on
_ENCODERS = {
    "CLIPVisionModel": "clip",
    "SiglipVisionModel": "siglip",
    "Dinov2Model": "dinov2",
    "Dinov2WithRegistersModel": "dinov2",
}
_LORA = ("r", "lora_alpha", "lora_dropout")
_SHARED = ("max_length", "pad_image_to_square", "template_map_fn")
_COPIED = ("visual_select_layer", "use_activation_checkpointing")
# What becomes of a stock hook that does not go on here.
_HOOKS = {
    "DatasetInfoHook": "the start-up check and tools/check_data.py look at the data instead",
    "EvaluateChatHook": "no answers are generated while training",
}
_DEFAULT_HOOKS = {
    "CheckpointHook",
    "DistSamplerSeedHook",
    "IterTimerHook",
    "LoggerHook",
    "ParamSchedulerHook",
}
# Keys that are read below, by place: whatever else a config holds is told as not kept.
_READ = {
    "model": {"type", "llm", "visual_encoder", "freeze_llm", "freeze_visual_encoder", "llm_lora",
              "visual_encoder_lora", "pretrained_pth", "projector_depth", *_COPIED},
    "llm_lora": {"type", "bias", "task_type", *_LORA},
    "dataset": {"type", "data_path", "image_folder", "max_length", "pad_image_to_square",
                "tokenizer", "image_processor", "dataset_map_fn", "template_map_fn"},
    "dataloader": {"batch_size", "num_workers", "pin_memory", "dataset", "sampler", "collate_fn"},
    "optimizer": {"type", "lr", "betas", "weight_decay"},
    "optim_wrapper": {"type", "optimizer", "clip_grad", "accumulative_counts", "loss_scale",
                      "dtype"},
    "train_cfg": {"type", "max_epochs", "by_epoch"},
    "runner": {"model", "train_dataloader", "optim_wrapper", "param_scheduler", "train_cfg",
               "custom_hooks", "default_hooks", "randomness", "env_cfg", "launcher", "work_dir",
               "resume", "log_level", "log_processor", "experiment_name", "cfg"},
}  # fmt: skip
# The order of a config's lines; an empty one between two groups.
_GROUPS = (
    ("family", "llm_name_or_path", "prompt_template"),
    ("visual_encoder_name_or_path", "encoder", "projector"),
    ("captions", "instructions"),
    ("align", "tune"),
    ("tokenizer", "model"),
)


@dataclass(frozen=True)
class Stock:
    """A LLaVA config of XTuner: one training, of the projector alone or of the LLM too.

    Attributes:
        name: its file's name without ``.py``.
        cfg: its content.
    """

    name: str
    cfg: Config

    @property
    def stage(self) -> str:
        """The stage of ours that it is: "align" or "tune"."""
        trains_llm = not self.cfg.model.get("freeze_llm") or "llm_lora" in self.cfg.model
        return "tune" if trains_llm else "align"

    @property
    def datasets(self) -> list[dict]:
        """The configs of its data sets, one or more."""
        dataset = self.cfg.train_dataloader.dataset
        return dataset.get("datasets", [dataset])

    @property
    def template(self) -> str | dict | None:
        """The prompt template: XTuner's name for it, or else the template itself."""
        template = (self.datasets[-1].get("template_map_fn") or {}).get("template")
        if not isinstance(template, dict):
            return template
        plain = _plain(template)
        names = [name for name, known in PROMPT_TEMPLATE.items() if dict(known) == plain]
        return min(names, key=len, default=plain)

    @property
    def quantised(self) -> bool:
        """Whether its LLM is loaded in 4 or 8 bit."""
        return bool(self.cfg.model.llm.get("quantization_config"))

    @property
    def continues(self) -> str | None:
        """Name of the stock config whose projector it starts from."""
        path = self.cfg.model.get("pretrained_pth")
        return Path(path).parent.name if path else None

    @property
    def gpus(self) -> int:
        """Number of GPUs that its name says, 8 where it says none."""
        found = re.search(r"_gpu(\d+)", self.name)
        return int(found[1]) if found else _GPUS


def stock_names() -> list[str]:
    """All LLaVA configs that the installed XTuner lists."""
    return sorted(n for n in cfgs_name_path if "llava" in n and not n.startswith("convert_"))


def find_stock(name: str | Path) -> Stock:
    """Read a stock LLaVA config.

    Args:
        name: one of :func:`stock_names`, or a path to such a file, edited or not.

    Raises:
        DPAError: there is none, or it is no LLaVA config.
    """
    path = Path(name)
    if not path.is_file():
        if str(name) not in stock_names():
            raise DPAError(
                f"{str(name)!r} is neither a file nor a LLaVA config of XTuner"
                f"{nearest(str(name), stock_names()) or '.'} Known: {', '.join(stock_names())}."
            )
        path = Path(cfgs_name_path[str(name)])
    cfg = Config.fromfile(path)
    if "model" not in cfg or _last(cfg.model.get("type")) != "LLaVAModel":
        raise DPAError(
            f"{path} is no LLaVA config: its model is not a dict(type=LLaVAModel, ...). Give one "
            f"like {stock_names()[0]}."
        )
    return Stock(path.stem, cfg)


def find_partner(stock: Stock) -> Stock | None:
    """The stock config of the other stage: what it continues, or what continues it.

    Of several that continue it, those that load the LLM alike come first, and of these the
    one with the shortest name.
    """
    if stock.stage == "tune":
        return find_stock(stock.continues) if stock.continues in stock_names() else None
    # Reading a config takes a tenth of a second, so only those that name it are read.
    named = [n for n in stock_names() if f"{stock.name}/" in Path(cfgs_name_path[n]).read_text()]
    found = [other for other in map(find_stock, named) if other.continues == stock.name]
    by_likeness = sorted(found, key=lambda o: (o.quantised != stock.quantised, len(o.name)))
    return by_likeness[0] if by_likeness else None


@dataclass(frozen=True)
class Converted:
    """What became of a stock config.

    Attributes:
        settings: what differs from ``_base_/dpa.py``.
        comments: what is to be said above a setting, by its name.
        header: where each stage comes from.
        not_kept: what could not be kept, a line each.
    """

    settings: dict[str, Any]
    comments: dict[str, str]
    header: list[str]
    not_kept: list[str]


def convert(stock: Stock, base: Config) -> Converted:
    """Translate a stock config, together with its partner, into settings of ours.

    Args:
        stock: what the model is taken from, and one of the stages align and tune.
        base: ``_base_/dpa.py``.
    """
    partner = find_partner(stock)
    both = {s.stage: s for s in (stock, partner) if s is not None}
    settings, comments, lost = _model(stock)
    stages_of: dict[str, list[str]] = {}
    for stage, data in (("align", "captions"), ("tune", "instructions")):
        if stage in both:
            settings[data] = _data(both[stage])
            settings[stage] = _schedule(both[stage])
            for line in _not_kept(both[stage]):
                stages_of.setdefault(line, []).append(stage)
    lost += [f"{' and '.join(stages)}: {line}" for line, stages in stages_of.items()]
    if stock.quantised and "tune" not in both:
        settings["tune"] = {"train_llm": "lora"}
    if partner is not None:
        lost += _disagreements(stock, partner)
    settings = _difference(settings | _runtime(stock), _plain(base._cfg_dict))
    return Converted(settings, comments, _header(both, stock), lost)


def source(converted: Converted, base: str) -> str:
    """The text of a config file.

    Args:
        converted: what it sets and says.
        base: path of ``_base_/dpa.py`` as the file is to name it.
    """
    lines = [line for text in converted.header for line in _comment(text)]
    if converted.not_kept:
        lines += ["#", "# Not kept:"]
        lines += [line for text in converted.not_kept for line in _comment(text, "  - ")]
    lines += [f"_base_ = [{base!r}]", ""]
    others = tuple(key for key in converted.settings if key not in sum(_GROUPS, ()))
    for group in (*_GROUPS, others):
        present = [key for key in group if key in converted.settings]
        for key in present:
            lines += _comment(converted.comments.get(key, ""))
            lines += [f"{key} = {_python(converted.settings[key], len(key) + 3)}"]
        lines += [""] if present else []
    return "\n".join(lines[:-1]) + "\n"


def _header(both: dict[str, Stock], stock: Stock) -> list[str]:
    lines = [f"Made by tools/apply_dpa.py from XTuner's {stock.name}."]
    lines += [f"{stage}: the training of {one.name}." for stage, one in sorted(both.items())]
    if "align" not in both:
        lines += ["captions and align: not in it, and what it continues is no stock config; set "
                  "captions."]  # fmt: skip
    if "tune" not in both:
        lines += ["instructions and tune: not in it, and no stock config continues it; set "
                  "instructions."]  # fmt: skip
    lines += ["proxy: the method's own, on the captions' text."]
    gpus = " and ".join(sorted({str(one.gpus) for one in both.values()}))
    return [*lines, f"Global batch sizes are those on {gpus} GPU{'s' * (gpus != '1')}."]


def _model(stock: Stock) -> tuple[dict[str, Any], dict[str, str], list[str]]:
    """Settings of the models, what to say above them, and what of them is lost."""
    cfg = stock.cfg.model
    settings: dict[str, Any] = {
        "llm_name_or_path": cfg.llm.pretrained_model_name_or_path,
        "visual_encoder_name_or_path": cfg.visual_encoder.pretrained_model_name_or_path,
    }
    comments, lost = {}, []
    read = {"type", "pretrained_model_name_or_path", "trust_remote_code", "torch_dtype"}
    llm = {key: _plain(value) for key, value in cfg.llm.items() if key not in read}
    if stock.quantised:
        llm["quantization_config"] = _quantisation(cfg.llm.quantization_config)
    family = family_of(settings["llm_name_or_path"])
    if family is not None:
        settings["family"] = family
    template = stock.template
    if family is None:
        settings["prompt_template"] = template
        native = _named_in(settings["llm_name_or_path"], MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        kind = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(native)
        llm = {
            "type": f"transformers.{kind}.from_pretrained" if kind else _dotted(cfg.llm.type)
        } | llm
        if not kind and cfg.llm.get("trust_remote_code"):
            llm["trust_remote_code"] = True
            settings["tokenizer"] = {"trust_remote_code": True}
            comments["tokenizer"] = (
                "The stock config asks for it: the code of LLM and tokenizer comes with the model."
            )
    elif template is not None and _renders_otherwise(template, FAMILIES.get(family).template):
        settings["prompt_template"] = template
        comments["prompt_template"] = (
            f"XTuner's. Without this line, the template that family {family} was published with."
        )
    encoder = _last(_owner(cfg.visual_encoder.type))
    if encoder in _ENCODERS:
        settings["encoder"] = {"type": _ENCODERS[encoder]}
    else:
        lost.append(f"visual encoder of type {encoder}: choose an encoder=dict(type=...) for it")
    if "projector_depth" in cfg:
        settings["projector"] = {"type": "mlp", "depth": cfg.projector_depth}
    rest = {key: cfg[key] for key in _COPIED if key in cfg}
    settings["model"] = rest | {"llm": llm}
    return settings, comments, lost


def family_of(llm: str) -> str | None:
    """The family whose name the LLM's name holds, such as ``llama3`` in Meta-Llama-3-8B.

    A digit or a b that follows is another number: InternLM-20B is no InternLM2, and Gemma-2B
    no Gemma 2.
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


def _renders_otherwise(template: str | dict, own: dict) -> bool:
    turns = (("Hello", "Hi."), ("What is it?", "A cat."))
    records = [Record("", (), system, turns) for system in (None, "Be brief.")]
    left, right = (
        [_rendered(record, resolve_template(t)) for record in records] for t in (template, own)
    )
    return left != right


def _rendered(record: Record, template: dict) -> list[tuple]:
    """The pieces, with neighbours that are supervised alike put together."""
    rendered: list[tuple] = []
    pieces = to_pieces(record, "chat", template)
    if isinstance(pieces, Problem):  # it has no place for a system turn
        return [pieces]
    for content, supervised in pieces:
        if rendered and isinstance(content, str) and rendered[-1][1] is supervised:
            content = rendered.pop()[0] + content
        rendered.append((content, supervised))
    return rendered


def _quantisation(cfg: dict) -> dict:
    """As XTuner's, without bitsandbytes' defaults; ``precision`` says what it computes in."""
    defaults = {p.name: p.default for p in signature(BitsAndBytesConfig).parameters.values()}
    kept = {k: v for k, v in _plain(cfg).items() if k != "type" and v != defaults.get(k)}
    kept.pop("bnb_4bit_compute_dtype", None)
    return {"type": "transformers.BitsAndBytesConfig", **kept}


def _data(stock: Stock) -> dict[str, Any]:
    datasets = [d for d in stock.datasets if _last(d["type"]) == "LLaVADataset"]
    paths = {key: [d[key] for d in datasets] for key in ("data_path", "image_folder")}
    if not datasets:
        return {}
    return paths if len(datasets) > 1 else {key: path[0] for key, path in paths.items()}


def _schedule(stock: Stock) -> dict[str, Any]:
    cfg, first = stock.cfg, stock.datasets[0]
    accumulate = cfg.optim_wrapper.get("accumulative_counts", 1)
    batch = cfg.train_dataloader.batch_size
    epochs = cfg.train_cfg.get("max_epochs", 1)
    warmup = sum(s.get("end", 0) for s in cfg.param_scheduler if _last(s["type"]) == "LinearLR")
    settings = {
        "lr": cfg.optim_wrapper.optimizer.lr,
        "batch_size": batch,
        "global_batch_size": batch * accumulate * stock.gpus,
        "max_epochs": epochs,
        # Ours counts the images' tokens too.
        "max_length": first["max_length"] + _image_tokens(stock),
        "pad_image_to_square": first["pad_image_to_square"],
        "warmup_ratio": warmup / epochs,
        "save_steps": max(1, round(cfg.default_hooks.checkpoint.interval / accumulate)),
    }
    if stock.stage == "tune":
        lora = cfg.model.get("llm_lora")
        settings["train_llm"] = "lora" if lora else "full"
        if lora:
            settings["lora"] = {key: lora[key] for key in _LORA}
    return settings


def _image_tokens(stock: Stock) -> int:
    """Patches of an image, by the encoder's name: CLIP ViT-L/14-336 where it does not say."""
    name = stock.cfg.model.visual_encoder.pretrained_model_name_or_path
    found = re.search(r"patch(\d+)-(\d+)", name)
    patch, size = map(int, found.groups()) if found else (14, 336)
    return (size // patch) ** 2


def _runtime(stock: Stock) -> dict[str, Any]:
    cfg = stock.cfg
    optimizer = {k: _plain(cfg.optim_wrapper.optimizer[k]) for k in ("betas", "weight_decay")}
    settings = {
        "train_dataloader": {"num_workers": cfg.train_dataloader.num_workers},
        "optim_wrapper": {
            "optimizer": optimizer, "clip_grad": _plain(cfg.optim_wrapper.get("clip_grad"))
        },
        "default_hooks": {
            "checkpoint": {"max_keep_ckpts": cfg.default_hooks.checkpoint.get("max_keep_ckpts", -1)}
        },
    }  # fmt: skip
    if cfg.randomness.get("seed") is not None:
        settings["randomness"] = {"seed": cfg.randomness.seed}
    return settings


def _not_kept(stock: Stock) -> list[str]:
    """What a stock config has that is different here, or missing."""
    cfg, stage = stock.cfg, stock.stage
    model, wrapper, loader = cfg.model, cfg.optim_wrapper, cfg.train_dataloader
    lost = []
    if _last(wrapper.type) != "OptimWrapper":
        dtype, kind = wrapper.get("dtype", "float16"), _last(wrapper.type)
        lost.append(f"training in {dtype} ({kind}): what the hardware computes best; set precision")
    if _last(wrapper.optimizer.type) != "AdamW":
        lost.append(f"optimizer {_last(wrapper.optimizer.type)}: AdamW; set optim_wrapper")
    if stock.continues:
        lost.append(f"pretrained_pth {model.pretrained_pth}: align trains the projector")
    if "visual_encoder_lora" in model:
        rank = model.visual_encoder_lora.r
        lost.append(f"a LoRA of rank {rank} on the visual encoder: it stays as it is")
    elif not model.get("freeze_visual_encoder"):
        lost.append("a trained visual encoder: it stays as it is")
    if stage == "align":
        lost.append("captions inside the prompt template: they follow their images at once")
    if _last(loader.sampler.type) != "LengthGroupedSampler":
        lost.append(
            f"samples in the order of {_last(loader.sampler.type)}: those of a global batch are "
            f"sorted by length"
        )
    for dataset in stock.datasets:
        if _last(dataset["type"]) != "LLaVADataset":
            lost.append(
                f"data of type {_last(dataset['type'])} ({dataset['data_path']}): write it as "
                f"LLaVA-format JSON and add it to the data_path list"
            )
        else:
            lost += _unread(dataset, "dataset")
    if any(d.get(key) != stock.datasets[0].get(key) for d in stock.datasets for key in _SHARED):
        lost.append(f"data sets that differ in {', '.join(_SHARED)}: all have those of the first")
    for one in cfg.param_scheduler:
        if _last(one["type"]) not in ("LinearLR", "CosineAnnealingLR") or one.get("eta_min"):
            lost.append(f"{_last(one['type'])} of the learning rate: a cosine down to 0")
    for hook in [*cfg.get("custom_hooks", []), *cfg.default_hooks.values()]:
        name = _last(hook["type"])
        if name not in _DEFAULT_HOOKS:
            lost.append(f"{name}: {_HOOKS.get(name, 'add it to custom_hooks')}")
    lost += _unread(model, "model") + _unread(loader, "dataloader")
    lost += _unread(wrapper.optimizer, "optimizer") + _unread(wrapper, "optim_wrapper")
    lost += _unread(cfg.train_cfg, "train_cfg") + _unread(model.get("llm_lora", {}), "llm_lora")
    of_runner = set(signature(Runner.__init__).parameters)
    lost += _unread({key: cfg[key] for key in of_runner & cfg.keys()}, "runner")
    return lost


def _unread(cfg: dict, place: str) -> list[str]:
    return [
        f"{key}={_plain(cfg[key])!r} of its {place}"
        for key in sorted(cfg.keys() - _READ[place])
        if cfg[key] is not None
    ]


def _disagreements(stock: Stock, partner: Stock) -> list[str]:
    llms = [one.cfg.model.llm for one in (stock, partner)]
    names = [llm.pretrained_model_name_or_path for llm in llms]
    lost = []
    if names[0] != names[1]:
        lost.append(f"{partner.stage}: its LLM {names[1]}; all stages have that of {stock.stage}")
    if stock.quantised != partner.quantised:
        how = "in 4 bit" if partner.quantised else "in 16 bit"
        lost.append(f"{partner.stage}: its LLM {how}; all stages load it as {stock.stage} does")
    return lost


def _difference(settings: dict, base: dict) -> dict:
    """The settings that are not those of ``base``, in nested dicts too."""
    changed = {}
    for key, value in settings.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            value = _difference(value, base[key])
            if value:
                changed[key] = value
        elif key not in base or value != base[key]:
            changed[key] = value
    return changed


def _plain(value: Any) -> Any:
    """Built-in types only; classes and functions as dotted names."""
    if isinstance(value, dict):
        return {key: _plain(value[key]) for key in value}
    if isinstance(value, (list, tuple)):
        return type(value)(_plain(item) for item in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return _dotted(value)


def _dotted(kind: Any) -> str:
    """``transformers.AutoModel.from_pretrained``, the shortest name that finds it."""
    if isinstance(kind, str):
        return kind
    if not hasattr(kind, "__qualname__"):  # torch.float16
        return str(kind)
    owner = getattr(kind, "__self__", None)
    tail = f".{kind.__name__}" if owner is not None else ""
    kind = kind if owner is None else owner
    package = kind.__module__.split(".")[0]
    try:
        short = get_object_from_string(f"{package}.{kind.__qualname__}") is kind
    except (ImportError, AttributeError):
        short = False
    return f"{package if short else kind.__module__}.{kind.__qualname__}{tail}"


def _owner(kind: Any) -> str:
    return _dotted(kind).removesuffix(".from_pretrained")


def _last(kind: Any) -> str:
    return "" if kind is None else _dotted(kind).rsplit(".", 1)[-1]


def _comment(text: str, bullet: str = "") -> list[str]:
    first, rest = f"# {bullet}", f"# {' ' * len(bullet)}"
    return textwrap.wrap(
        text, _WIDTH, initial_indent=first, subsequent_indent=rest,
        break_long_words=False, break_on_hyphens=False,
    )  # fmt: skip


def _python(value: Any, column: int, indent: int = 4) -> str:
    """A value as source text that starts at a column, wrapped as in ``configs``."""
    if isinstance(value, dict):
        items, brackets = [f"{key}=" for key in value], ("dict(", ")")
        values = list(value.values())
    elif isinstance(value, list):
        items, brackets = [""] * len(value), ("[", "]")
        values = value
    else:
        return repr(value)
    parts = [f"{item}{_python(v, 0, indent + 4)}" for item, v in zip(items, values, strict=True)]
    line = brackets[0] + ", ".join(parts) + brackets[1]
    if column + len(line) <= _WIDTH and "\n" not in line:
        return line
    parts = [
        f"{item}{_python(v, indent + len(item), indent + 4)}"
        for item, v in zip(items, values, strict=True)
    ]
    space = " " * indent
    return f"{brackets[0]}\n{space}" + f",\n{space}".join(parts) + brackets[1]


def write_config(stock: Stock, output: Path, base: Path) -> Converted:
    """Write a stock config as one of ours.

    Args:
        stock: of :func:`find_stock`.
        output: the new file; its ``_base_`` is relative where both lie in one checkout, so
            that it can be moved with it, and absolute elsewhere.
        base: ``configs/_base_/dpa.py``.

    Raises:
        DPAError: there is a file of that name.
    """
    if output.exists():
        raise DPAError(f"{output} exists. Give another name with -o, or remove it.")
    converted = convert(stock, Config.fromfile(base))
    checkout, folder = base.resolve().parents[2], output.resolve().parent
    inside = folder.is_relative_to(checkout)
    path = os.path.relpath(base, folder) if inside else str(base.resolve())
    folder.mkdir(parents=True, exist_ok=True)
    write_text(output, source(converted, Path(path).as_posix()))
    return converted
