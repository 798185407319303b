"""Two visual encoders side by side."""

import math
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PretrainedConfig
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.encoders.base import SETTING, VisionEncoder, VisionEncoderSpec, build_encoder
from dpa_xtuner.registry import ENCODERS

HALVES = ("first", "second")


class PairConfig(PretrainedConfig):
    """The configurations of two encoders.

    Args:
        first: configuration of the first encoder.
        second: configuration of the second encoder.
        colours: mean and standard deviation of the colours (red, green, blue), by which the
            first image processor normalises, then those of the second.
        kwargs: arguments of :class:`transformers.PretrainedConfig`; ``hidden_size`` and
            ``image_size`` are those of the pair.
    """

    model_type = "pair"

    def __init__(
        self,
        first: PretrainedConfig | None = None,
        second: PretrainedConfig | None = None,
        colours: list[list[list[float]]] | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.first, self.second, self.colours = first, second, colours


class PairModel(nn.Module):
    """Two encoder modules, and the configuration of the pair."""

    config_class = PairConfig
    name_or_path: str

    def __init__(self, config: PairConfig, first: VisionEncoder, second: VisionEncoder):
        super().__init__()
        self.config, self.first, self.second = config, first, second

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        kinds: list[str | dict],
        output_loading_info: bool = False,
        **kwargs,
    ):
        """Load both encoders.

        Args:
            pretrained_model_name_or_path: the name of the pair; see :class:`Pair`.
            kinds: the two kinds, for :func:`build_encoder`.
            output_loading_info: return (module, its ``missing_keys``) in place of the module.
            kwargs: arguments of both ``from_pretrained``.
        """
        pair, modules, missing = Pair(*kinds), [], []
        names = split_name(pretrained_model_name_or_path)
        for half, spec, name in zip(HALVES, pair.specs, names, strict=True):
            loader = spec.loader(name) | kwargs | {"output_loading_info": True}
            module, info = BUILDER.build(loader)
            modules.append(module)
            missing += [f"{half}.{key}" for key in info["missing_keys"]]
        model = cls(pair.config(pretrained_model_name_or_path), *modules)
        model.name_or_path = pretrained_model_name_or_path
        return (model, {"missing_keys": missing}) if output_loading_info else model

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the first encoder's weights."""
        return self.first.dtype


@ENCODERS.register_module("pair")
class Pair(VisionEncoderSpec):
    """Two encoders that see the same image; their channels are concatenated.

    ``visual_encoder_name_or_path`` is ``'NAME + NAME'``, or a folder with the subfolders
    ``first`` and ``second``. The image is prepared for the first encoder; the second gets the same
    pixels, scaled and normalised for it. The second's features are interpolated to the first's
    grid.

    Args:
        first: a kind of encoder, by name or as a dict of its name and arguments.
        second: the other kind.

    Raises:
        DPAError: one of them is unknown.
    """

    model = "dpa_xtuner.model.encoders.pair.PairModel.from_pretrained"
    layer = None

    def __init__(self, first: str | dict, second: str | dict):
        super().__init__()
        self.halves = [first, second]
        self.specs = build_encoder(first), build_encoder(second)
        self.image_processor = self.specs[0].image_processor

    def loader(self, name: str) -> dict:
        """Add the two kinds."""
        # A list: as values of keys, XTuner's builder would build these dicts, which have a type.
        return super().loader(name) | {"kinds": self.halves}

    def processor(self, name: str) -> dict:
        """Return the config of the first encoder's image processor."""
        return self.specs[0].processor(split_name(name)[0])

    def config(self, name: str, local_only: bool = False) -> PairConfig:
        """Read both published configurations, and the colours of their image processors.

        Raises:
            DPAError: as for either kind, or the grids differ and are not square.
        """
        halves = list(zip(self.specs, split_name(name), strict=True))
        configs = [spec.config(half, local_only) for spec, half in halves]
        return self._pair(configs, [_colours(spec.processor(half)) for spec, half in halves])

    def default_config(self) -> PairConfig:
        """Make a pair of both kinds' default configurations."""
        grey = [[0.5] * 3, [0.5] * 3]
        return self._pair([spec.default_config() for spec in self.specs], [grey, grey])

    def _pair(self, configs: list[PretrainedConfig], colours: list) -> PairConfig:
        (one, other), (first, second) = self.specs, configs
        n, m = one.tokens(first), other.tokens(second)
        if n != m and (math.isqrt(n) ** 2 != n or math.isqrt(m) ** 2 != m):
            raise DPAError(
                f"The encoders of the pair give {n} and {m} tokens, but only square grids can be "
                f"interpolated. Change the image size of one."
            )
        channels = one.hidden_size(first) + other.hidden_size(second)
        size = one.image_size(first)
        return PairConfig(first, second, colours, hidden_size=channels, image_size=size)

    def build(self, config: PairConfig) -> PairModel:
        """Build both modules, with random weights."""
        first, second = self.specs
        return PairModel(config, first.build(config.first), second.build(config.second))

    def tokens(self, config: PairConfig) -> int:
        """Count the tokens of the first encoder."""
        return self.specs[0].tokens(config.first)

    def features(  # type: ignore[override]  # a kind is given its own modules alone
        self, module: PairModel, pixel_values: Tensor
    ) -> Tensor:
        """See :meth:`VisionEncoderSpec.features`.

        Raises:
            DPAError: a layer is set for the whole pair.
        """
        if self.layer is not None:
            raise DPAError(
                "model.visual_select_layer can't be set for a pair: set the layer of each, as in "
                "encoder=dict(type='pair', first=dict(type='siglip', layer=-1), second=...)."
            )
        one, other = self.specs
        first = one.features(module.first, pixel_values)  # (N, n, C1)
        pixels = self._for_second(module.config, pixel_values)  # (N, 3, H2, W2)
        second = other.features(module.second, pixels)  # (N, m, C2)
        return torch.cat([first, _regrid(second, first.shape[1])], dim=-1)  # (N, n, C1 + C2)

    def _for_second(self, config: PairConfig, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.float()
        colours = pixels.new_tensor(config.colours)[..., None, None]  # (2, 2, 3, 1, 1)
        (mean, std), (new_mean, new_std) = colours
        # Undo the first encoder's normalisation, then apply the second's.
        pixels = (pixels * std + mean - new_mean) / new_std  # (N, 3, H, W)
        size = self.specs[1].image_size(config.second)
        if pixels.shape[-1] != size:
            pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        return pixels.to(pixel_values.dtype)

    def save(self, module: PairModel, folder: Path, state=None, processor=None) -> None:
        """Write both, in subfolders; see :meth:`VisionEncoderSpec.save`.

        The second encoder's image processor is the published one.
        """
        second = BUILDER.build(self.specs[1].processor(split_name(module.name_or_path)[1]))
        processors = processor, second
        for half, spec, half_processor in zip(HALVES, self.specs, processors, strict=True):
            inner = None if state is None else {
                key.removeprefix(f"{half}."): tensor
                for key, tensor in state.items()
                if key.startswith(f"{half}.")
            }  # fmt: skip
            (folder / half).mkdir()
            spec.save(getattr(module, half), folder / half, inner, half_processor)

    def write_tiny(self, config: PairConfig, folder: Path) -> None:
        """Write both, in subfolders."""
        for half, spec in zip(HALVES, self.specs, strict=True):
            spec.write_tiny(getattr(config, half), folder / half)


def split_name(name: str) -> list[str]:
    """Split the name of a pair into two names.

    Raises:
        DPAError: there are not two.
    """
    if Path(name).is_dir():
        return [str(Path(name) / half) for half in HALVES]
    names = [half.strip() for half in name.split(" + ")]
    if len(names) != 2 or not all(names):
        raise DPAError(
            f"{SETTING}={name!r} does not name a pair of encoders: give 'NAME + NAME', or a folder "
            f"with the subfolders first and second."
        )
    return names


def _colours(processor: dict) -> list[list[float]]:
    built = BUILDER.build(processor)
    return [list(built.image_mean), list(built.image_std)]


def _regrid(tokens: Tensor, n: int) -> Tensor:
    """Interpolate (N, m, C) on a square grid to (N, n, C) on another."""
    if tokens.shape[1] == n:
        return tokens
    old, new = math.isqrt(tokens.shape[1]), math.isqrt(n)
    grid = tokens.transpose(1, 2).unflatten(2, (old, old)).float()  # (N, C, old, old)
    grid = interpolate(grid, (new, new), mode="bilinear", antialias=True)  # (N, C, new, new)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)  # (N, n, C)
