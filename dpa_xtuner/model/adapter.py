"""LoRA adapters: read, check, add to a model's weights, write."""

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.fingerprint import gathered

_LORA = re.compile(r"(.+)\.lora_([AB])\.(?:default\.)?weight")


class Adapter(NamedTuple):
    """LoRA weights.

    Attributes:
        layers: a layer's name -> its A (r, in) and its B (out, r).
        r: the rank.
        lora_alpha: the scale, multiplied by ``r``.
    """

    layers: dict[str, tuple[Tensor, Tensor]]
    r: int
    lora_alpha: float

    def add_to(self, module: nn.Module) -> None:
        """Add B A alpha / r to the layers' weights, in float32, rounded once.

        Every rank must call it, since ZeRO-3 gathers the weights.

        Args:
            module: the model that the adapter was trained on; changed in place.

        Raises:
            DPAError: the module lacks these layers, or their sizes differ.
        """
        self.refuse_other(module)
        for name, (a, b) in self.layers.items():
            weight = module.get_parameter(f"{name}.weight")
            with torch.no_grad(), gathered([weight], modify=True):
                a, b = a.to(weight.device).float(), b.to(weight.device).float()
                delta = (b @ a) * (self.lora_alpha / self.r)  # (out, in)
                weight.data.copy_((weight.data.float() + delta).to(weight.dtype))

    def refuse_other(self, module: nn.Module) -> None:
        """Refuse a module that the adapter does not fit.

        Raises:
            DPAError: the module lacks layers, or their sizes differ.
        """
        sizes = {
            name: tuple(getattr(weight, "ds_shape", weight.shape))
            for name, weight in module.named_parameters()
        }
        wrong = []
        for name, (a, b) in self.layers.items():
            size = sizes.get(f"{name}.weight")  # (out, in)
            if size != (len(b), a.shape[1]) or len(a) != b.shape[1]:
                wrong.append(f"  {name}: A {tuple(a.shape)}, B {tuple(b.shape)}, weight {size}")
        if wrong:
            more = f"\n  and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise DPAError(
                f"The adapter does not fit a {type(module).__name__}: it was trained on another "
                f"model, or is damaged.\n" + "\n".join(wrong[:5]) + more
            )

    def refuse_partial(self, module: PreTrainedModel, targets: list[str] | None) -> None:
        """Refuse an adapter that lacks some of the layers that a stage adapts.

        Args:
            module: the LLM; may be on the meta device.
            targets: last names of the adapted layers; None for every linear one but the head.

        Raises:
            DPAError: layers are missing.
        """
        head = module.get_output_embeddings()
        wanted = [
            name for name, layer in module.named_modules()
            if isinstance(layer, nn.Linear) and layer is not head
            and (targets is None or name.rsplit(".", 1)[-1] in targets)
        ]  # fmt: skip
        _refuse_missing(f"{name}.lora_A and B" for name in wanted if name not in self.layers)

    def save(self, folder: Path, base: str) -> None:
        """Write a PEFT folder.

        Args:
            folder: target folder; created if it is missing.
            base: name of the model that it adapts.
        """
        LoraConfig(
            task_type="CAUSAL_LM",
            base_model_name_or_path=base,
            r=self.r,
            lora_alpha=self.lora_alpha,  # type: ignore[arg-type]  # a fraction does as well
            target_modules=sorted({name.rsplit(".", 1)[-1] for name in self.layers}),
            inference_mode=True,
        ).save_pretrained(str(folder))
        state = {
            f"base_model.model.{name}.lora_{half}.weight": weight.contiguous()
            for name, both in self.layers.items()
            for half, weight in zip("AB", both, strict=True)
        }
        save_file(state, folder / "adapter_model.safetensors", {"format": "pt"})


def read_adapter(folder: Path | str) -> Adapter:
    """Read a PEFT LoRA adapter folder.

    Raises:
        DPAError: it holds no LoRA weights, half of a layer's weights is missing, or the rank
            differs from that of its config.
    """
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    state = load_file(folder / "adapter_model.safetensors")
    state = {name.removeprefix("base_model.model."): tensor for name, tensor in state.items()}
    adapter = adapter_of(state, config["r"], config["lora_alpha"])
    if adapter is None:
        raise DPAError(f"{folder} holds no LoRA weights: train the stage again that writes it.")
    return adapter


def adapter_of(state: dict[str, Tensor], r: int, lora_alpha: float) -> Adapter | None:
    """Find the adapter in a state dict.

    Args:
        state: names as in the adapted model; other weights are ignored.
        r: the rank in the config.
        lora_alpha: the scale in the config.

    Returns:
        None if there is no adapter.

    Raises:
        DPAError: half of a layer's weights is missing, or the rank differs.
    """
    found = {m.groups(): t for name, t in state.items() if (m := _LORA.fullmatch(name))}
    names = sorted({name for name, _ in found})
    if not names:
        return None
    _refuse_missing(f"{n}.lora_{half}" for n in names for half in "AB" if (n, half) not in found)
    layers = {name: (found[name, "A"], found[name, "B"]) for name in names}
    rank = len(next(iter(layers.values()))[0])
    if rank != r:
        raise DPAError(f"The adapter has rank {rank}, but the config says {r}: set it as trained.")
    return Adapter(layers, r, lora_alpha)


def without_adapter(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the weights that belong to no adapter, named as in the model without one."""
    return {k.replace(".base_layer.", "."): v for k, v in state.items() if ".lora_" not in k}


def _refuse_missing(names: Iterable[str]) -> None:
    if missing := list(names):
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DPAError(
            f"Part of the adapter is missing: {', '.join(missing[:5])}{more}. Without it the "
            f"model would not be the one that was trained."
        )
