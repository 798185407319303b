"""From the encoder's patch features to the LLM's embeddings: projectors, by name."""

import json
import math
from inspect import signature
from pathlib import Path
from typing import TypeAlias

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.nn import functional
from xtuner.model.modules import ProjectorConfig, ProjectorModel

from dpa_xtuner.errors import DPAError
from dpa_xtuner.registry import PROJECTORS, find_named


class Projector(nn.Module):
    """Base class of projectors, which are saved with their type and arguments.

    The constructor takes ``visual_hidden_size`` and ``llm_hidden_size`` first, then whatever a
    config may set; ``forward`` takes (N, n, ``visual_hidden_size``), the patches row by row,
    and returns (N, ``tokens(n)``, ``llm_hidden_size``). To count tokens before loading, a projector
    is built on the meta device, for an LLM of any width.

    Attributes:
        settings: ``type`` and all arguments, as given to :func:`build_projector`.
    """

    settings: dict

    def tokens(self, n: int) -> int:
        """Count the tokens that come out for an image (or tile) of ``n`` patches."""
        return n

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return next(self.parameters()).dtype

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None, **_
    ) -> None:
        """Write ``config.json``, the settings, and ``model.safetensors``.

        Args:
            folder: target folder; created if it is missing.
            state_dict: weights to write in place of the module's, such as gathered ones.
            _: other arguments of transformers' ``save_pretrained``; not used.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "config.json").write_text(json.dumps(self.settings, indent=2) + "\n")
        state = self.state_dict() if state_dict is None else state_dict
        state = {name: tensor.contiguous() for name, tensor in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


ProjectorModule: TypeAlias = Projector | ProjectorModel
"""What :func:`build_projector` builds: one of ours, or XTuner's."""


@PROJECTORS.register_module("mlp")
def mlp(visual_hidden_size: int, llm_hidden_size: int, depth: int = 2) -> ProjectorModel:
    """Build XTuner's projector, patch by patch: linear layers with a GELU between them.

    Args:
        visual_hidden_size: channels of a patch.
        llm_hidden_size: channels of an embedding.
        depth: number of linear layers.

    Raises:
        DPAError: the depth is not above 0.
    """
    _check_number("depth", depth)
    return ProjectorModel(
        ProjectorConfig(
            visual_hidden_size=visual_hidden_size, llm_hidden_size=llm_hidden_size, depth=depth
        )
    )


def _check_number(name: str, value: int) -> None:
    if value < 1:
        raise DPAError(f"projector.{name}={value!r} is not a whole number above 0.")


def _two_layers(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, outputs), nn.GELU(), nn.Linear(outputs, outputs))


class _Blocks(Projector):
    """Base of projectors that turn each block of ``factor`` x ``factor`` patches into one token."""

    def __init__(self, factor: int):
        super().__init__()
        _check_number("factor", factor)
        self.factor = factor

    def tokens(self, n: int) -> int:
        """Count one token for each block.

        Raises:
            DPAError: ``n`` patches can't be cut into blocks.
        """
        side = math.isqrt(n)
        if side**2 != n:
            raise DPAError(
                f"{type(self).__name__} needs a square of patches, but the encoder gives {n}. "
                f"Take the projector mlp or resampler."
            )
        if side % self.factor:
            fits = [str(f) for f in range(2, side + 1) if side % f == 0]
            raise DPAError(
                f"projector.factor={self.factor} does not divide the encoder's {side} x {side} "
                f"patches. Take a factor of {', '.join(fits) or 1}, or another image size."
            )
        return (side // self.factor) ** 2

    def blocks(self, patches: Tensor) -> Tensor:
        """Cut (N, n, C) into blocks (N, tokens, factor², C); blocks and patches go row by row."""
        (count, n, channels), factor = patches.shape, self.factor
        side = math.isqrt(self.tokens(n))
        # (N, block row, row in block, block column, column in block, C)
        grid = patches.view(count, side, factor, side, factor, channels)
        return grid.transpose(2, 3).reshape(count, side * side, factor * factor, channels)


@PROJECTORS.register_module("pixel_shuffle")
class PixelShuffle(_Blocks):
    """Concatenates the patches of a block, then applies a norm and an MLP, as InternVL 1.5.

    Args:
        visual_hidden_size: channels of a patch.
        llm_hidden_size: channels of an embedding.
        factor: side of a block in patches; the tokens become fewer by its square.

    Raises:
        DPAError: the factor is not above 0.
    """

    def __init__(self, visual_hidden_size: int, llm_hidden_size: int, factor: int = 2):
        super().__init__(factor)
        channels = visual_hidden_size * factor**2
        self.norm = nn.LayerNorm(channels)
        self.model = _two_layers(channels, llm_hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Turn (N, n, C) into (N, n / factor², H)."""
        blocks = self.blocks(patches).flatten(2)  # (N, tokens, factor² C)
        return self.model(self.norm(blocks))  # (N, tokens, H)


@PROJECTORS.register_module("avg_pool")
class AveragePool(_Blocks):
    """Averages the patches of a block, then applies an MLP.

    Args:
        visual_hidden_size: channels of a patch.
        llm_hidden_size: channels of an embedding.
        factor: side of a block in patches; the tokens become fewer by its square.

    Raises:
        DPAError: the factor is not above 0.
    """

    def __init__(self, visual_hidden_size: int, llm_hidden_size: int, factor: int = 2):
        super().__init__(factor)
        self.model = _two_layers(visual_hidden_size, llm_hidden_size)

    def forward(self, patches: Tensor) -> Tensor:
        """Turn (N, n, C) into (N, n / factor², H)."""
        return self.model(self.blocks(patches).mean(2))  # (N, tokens, H)


@PROJECTORS.register_module("resampler")
class Resampler(Projector):
    """A fixed number of learned queries attend to all patches, as in Qwen-VL; then an MLP.

    It adds no position embeddings: the encoder's are in the features. So any number of patches in
    any shape will do.

    Args:
        visual_hidden_size: channels of a patch.
        llm_hidden_size: channels of an embedding.
        queries: number of queries, and so of tokens.

    Raises:
        DPAError: the number of queries is not above 0.
    """

    def __init__(self, visual_hidden_size: int, llm_hidden_size: int, queries: int = 64):
        super().__init__()
        _check_number("queries", queries)
        # Heads of 128 channels, or the next larger size that divides the width.
        most = max(1, llm_hidden_size // 128)
        self.heads = next(heads for heads in range(most, 0, -1) if llm_hidden_size % heads == 0)
        self.queries = nn.Parameter(torch.randn(queries, llm_hidden_size) * 0.02)
        self.norm_patches = nn.LayerNorm(visual_hidden_size)
        self.norm_queries = nn.LayerNorm(llm_hidden_size)
        # Not nn.MultiheadAttention: it reads its output layer's weight without calling the layer,
        # so ZeRO-3 would not gather the weight.
        self.query = nn.Linear(llm_hidden_size, llm_hidden_size)
        self.key = nn.Linear(visual_hidden_size, llm_hidden_size)
        self.value = nn.Linear(visual_hidden_size, llm_hidden_size)
        self.output = nn.Linear(llm_hidden_size, llm_hidden_size)
        self.norm_output = nn.LayerNorm(llm_hidden_size)
        self.model = _two_layers(llm_hidden_size, llm_hidden_size)

    def tokens(self, n: int) -> int:
        """Return the number of queries."""
        return len(self.queries)

    def forward(self, patches: Tensor) -> Tensor:
        """Turn (N, n, C) into (N, queries, H)."""
        patches = self.norm_patches(patches)
        queries = self.query(self.norm_queries(self.queries)).expand(len(patches), -1, -1)  # NQH
        seen = functional.scaled_dot_product_attention(
            self._split(queries), self._split(self.key(patches)), self._split(self.value(patches))
        )  # (N, heads, queries, H / heads)
        seen = self.queries + self.output(seen.transpose(1, 2).flatten(2))  # (N, queries, H)
        return seen + self.model(self.norm_output(seen))

    def _split(self, tokens: Tensor) -> Tensor:
        return tokens.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # (N, heads, T, H / heads)


def build_projector(
    cfg: str | dict, visual_hidden_size: int, llm_hidden_size: int
) -> ProjectorModule:
    """Build a projector from its name or ``dict(type=name, ...)``, with random weights.

    Args:
        cfg: a name in :data:`dpa_xtuner.registry.PROJECTORS`, or a dict of one and its arguments.
        visual_hidden_size: channels of a patch.
        llm_hidden_size: channels of an embedding.

    Raises:
        DPAError: unknown name or argument, a value out of range, or a class that can't be saved.
    """
    found, keywords = find_named(PROJECTORS, cfg, positional=2)
    projector = found(visual_hidden_size, llm_hidden_size, **keywords)
    name = cfg if isinstance(cfg, str) else cfg["type"]
    if not isinstance(projector, ProjectorModule):
        raise DPAError(
            f"The projector {name!r} is a {type(projector).__name__}, which can't be saved. Derive "
            f"its class from dpa_xtuner.model.projectors.Projector."
        )
    unsaved = projector.state_dict().keys() ^ dict(projector.named_parameters()).keys()
    if unsaved:
        raise DPAError(
            f"The projector {name!r} has state other than its own parameters "
            f"({', '.join(sorted(unsaved))}), but only parameters are saved. Register buffers "
            f"with persistent=False, and share no weights."
        )
    given = signature(found).bind(visual_hidden_size, llm_hidden_size, **keywords)
    given.apply_defaults()
    projector.settings = {"type": name, **given.arguments}
    return projector


def projected_tokens(projector: ProjectorModule, n: int) -> int:
    """Count the tokens that a projector makes of ``n`` patches.

    Raises:
        DPAError: it can't take ``n`` patches.
    """
    return projector.tokens(n) if isinstance(projector, Projector) else n


def read_projector(projector: ProjectorModule, folder: str) -> dict[str, Tensor]:
    """Read the weights of a saved projector, which must fit ``projector``.

    Args:
        projector: the one to compare with; may be on the meta device.
        folder: written by ``save_pretrained`` of such a projector.

    Raises:
        DPAError: type, arguments, keys or shapes differ; the message says which.
    """
    config, path = Path(folder) / "config.json", Path(folder) / "model.safetensors"
    # avg_pool's weights have the same names and shapes as mlp's, so compare the settings too.
    written = _without_sizes(json.loads(config.read_text(encoding="utf-8")))
    built = _without_sizes(
        projector.settings if isinstance(projector, Projector) else projector.config.to_dict()
    )
    if written != built:
        raise DPAError(
            f"{config} describes the projector {written}, but this model's is {built}. Set "
            f"projector to the one that was trained, or train this one in another --work-dir."
        )
    saved, model = load_file(path), projector.state_dict()
    wrong = [
        f"{key}: saved {_shape(saved, key)}, model {_shape(model, key)}"
        for key in sorted(saved.keys() | model.keys())
        if _shape(saved, key) != _shape(model, key)
    ]
    if wrong:
        raise DPAError(f"{path} does not fit the projector of this model: {'; '.join(wrong)}.")
    return saved


def load_projector(folder: str, visual_hidden_size: int, llm_hidden_size: int) -> ProjectorModule:
    """Build a saved projector with its weights, in evaluation mode and float32.

    Args:
        folder: written by ``save_pretrained`` of a projector.
        visual_hidden_size: channels of a patch.
        llm_hidden_size: channels of an embedding.

    Raises:
        DPAError: it was saved for other sizes, or its type is unknown.
    """
    settings = _without_sizes(json.loads((Path(folder) / "config.json").read_text("utf-8")))
    projector = build_projector(settings, visual_hidden_size, llm_hidden_size)
    projector.load_state_dict(read_projector(projector, folder))
    return projector.eval()


def _shape(weights: dict[str, Tensor], key: str) -> tuple[int, ...] | str:
    return tuple(weights[key].shape) if key in weights else "nothing"


def _without_sizes(settings: dict) -> dict:
    """Drop the sizes: the shapes of the weights show better which ones differ."""
    if settings.get("model_type") == ProjectorConfig.model_type:  # as XTuner writes it
        usual = {"hidden_act": "gelu", "bias": True}  # build_projector makes no others
        others = {
            key: settings[key] for key in usual if settings.get(key, usual[key]) != usual[key]
        }
        settings = {"type": "mlp", "depth": settings["depth"], **others}
    sizes = ("visual_hidden_size", "llm_hidden_size")
    return {key: value for key, value in settings.items() if key not in sizes}
