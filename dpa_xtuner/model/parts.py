"""The parts a model is made of, and how many parameters each trains."""

from torch import nn

PARTS = ("llm", "llm_adapter", "visual_encoder", "projector")
"""Every part a stage may build, in the order of the log."""


def part_of(name: str) -> str:
    """The part that a parameter of a model belongs to, by the parameter's name."""
    if ".lora_" in name:
        return "llm_adapter"
    return name.split(".")[0]


def count_parameters(model: nn.Module) -> dict[str, tuple[int, int]]:
    """Trainable and frozen parameters of each part, ZeRO-3's split ones counted whole."""
    counts: dict[str, tuple[int, int]] = {}
    for name, parameter in model.named_parameters():
        size = getattr(parameter, "ds_numel", parameter.numel())
        trainable, frozen = counts.get(part_of(name), (0, 0))
        if parameter.requires_grad:
            trainable += size
        else:
            frozen += size
        counts[part_of(name)] = trainable, frozen
    return {part: counts[part] for part in PARTS if part in counts}
