"""Two visual encoders side by side."""

import math
from pathlib import Path
from typing import Any

import torch
from mmengine.utils import get_object_from_string
from torch import Tensor, nn
from torch.nn.functional import interpolate
from transformers import PretrainedConfig

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.encoders.base import SETTING, Encoder, build_encoder
from dpa_xtuner.registry import ENCODERS

HALVES = ("first", "second")


class PairConfig(PretrainedConfig):
    """The configurations of two encoders.

    Args:
        first: of the first.
        second: of the second.
        colours: mean and standard deviation of the colours (red, green, blue) that the
            first's image processor subtracts and divides by, and those of the second's.
        kwargs: of :class:`transformers.PretrainedConfig`; ``hidden_size`` and ``image_size``
            are the pair's.
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
        self.first = first
        self.second = second
        self.colours = colours


class PairModel(nn.Module):
    """Two modules, and the pair's configuration."""

    config_class = PairConfig

    def __init__(self, config: PairConfig, first: nn.Module, second: nn.Module):
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
        """Load both.

        Args:
            pretrained_model_name_or_path: of both; see :class:`Pair`.
            kinds: of the two, for :func:`build_encoder`.
            output_loading_info: return (module, its ``missing_keys``) in place of the module.
            kwargs: of either's ``from_pretrained``.
        """
        pair, modules, missing = Pair(*kinds), [], []
        names = split_name(pretrained_model_name_or_path)
        for half, kind, part in zip(HALVES, pair.kinds, names, strict=True):
            options = kind.loader(part)
            load = get_object_from_string(options.pop("type"))
            path = options.pop("pretrained_model_name_or_path")
            module, info = load(path, **options, **kwargs, output_loading_info=True)
            modules.append(module)
            missing += [f"{half}.{key}" for key in info["missing_keys"]]
        model = cls(pair.config(pretrained_model_name_or_path), *modules)
        model.name_or_path = pretrained_model_name_or_path
        return (model, {"missing_keys": missing}) if output_loading_info else model

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the first's weights."""
        return self.first.dtype


@ENCODERS.register_module("pair")
class Pair(Encoder):
    """Two encoders that see the same image; a token's channels are the first's, then the second's.

    ``visual_encoder_name_or_path`` is ``'NAME + NAME'``, or a folder with the subfolders
    ``first`` and ``second``. The image is prepared for the first; the second gets the same
    pixels in its own size and normalisation. The second's features are interpolated to the
    first's grid where theirs is another.

    Args:
        first: a kind of encoder, by name or as a dict of its name and arguments.
        second: another.

    Raises:
        DPAError: a half is not known.
    """

    model = "dpa_xtuner.model.encoders.pair.PairModel.from_pretrained"
    layer = None

    def __init__(self, first: str | dict, second: str | dict):
        super().__init__()
        self.halves = [first, second]
        self.kinds = build_encoder(first), build_encoder(second)
        self.image_processor = self.kinds[0].image_processor

    def loader(self, name: str) -> dict:
        """With the kinds of the halves."""
        # A list, since XTuner's builder would build dicts with a type that are values.
        return super().loader(name) | {"kinds": self.halves}

    def processor(self, name: str) -> dict:
        """The first's."""
        return self.kinds[0].processor(split_name(name)[0])

    def config(self, name: str, local_only: bool = False) -> PairConfig:
        """Both published configurations, and the colours of their image processors.

        Raises:
            DPAError: as the halves', or a grid that is not square has to be changed.
        """
        names = split_name(name)
        configs = [k.config(n, local_only) for k, n in zip(self.kinds, names, strict=True)]
        colours = [_colours(k.processor(n)) for k, n in zip(self.kinds, names, strict=True)]
        return self._pair(configs, colours)

    def default_config(self) -> PairConfig:
        """Of both kinds' own."""
        colours = [[[0.5] * 3, [0.5] * 3]] * 2
        return self._pair([kind.default_config() for kind in self.kinds], colours)

    def _pair(self, configs: list[PretrainedConfig], colours: list) -> PairConfig:
        counts = [kind.tokens(config) for kind, config in zip(self.kinds, configs, strict=True)]
        if counts[0] != counts[1] and any(math.isqrt(n) ** 2 != n for n in counts):
            raise DPAError(
                f"The encoders of the pair give {counts[0]} and {counts[1]} tokens, and only "
                f"square grids can be made equal. Change the image size of one."
            )
        return PairConfig(
            *configs,
            colours,
            hidden_size=sum(k.hidden_size(c) for k, c in zip(self.kinds, configs, strict=True)),
            image_size=self.kinds[0].image_size(configs[0]),
        )

    def build(self, config: PairConfig) -> PairModel:
        """Both modules, with random weights."""
        first, second = self.kinds
        return PairModel(config, first.build(config.first), second.build(config.second))

    def tokens(self, config: PairConfig) -> int:
        """The first's."""
        return self.kinds[0].tokens(config.first)

    def features(self, module: PairModel, pixel_values: Tensor) -> Tensor:
        """See :meth:`Encoder.features`.

        Raises:
            DPAError: one layer was chosen for both.
        """
        if self.layer is not None:
            raise DPAError(
                "model.visual_select_layer can't be set for a pair: set the layer of each, as in "
                "encoder=dict(type='pair', first=dict(type='siglip', layer=-1), second=...)."
            )
        one, other = self.kinds
        first = one.features(module.first, pixel_values)
        second = other.features(module.second, self._for_second(module.config, pixel_values))
        return torch.cat([first, _regrid(second, first.shape[1])], dim=-1)

    def _for_second(self, config: PairConfig, pixel_values: Tensor) -> Tensor:
        pixels = pixel_values.float()
        colours = pixels.new_tensor(config.colours)[..., None, None]  # (2, 2, 3, 1, 1)
        (mean, std), (new_mean, new_std) = colours
        pixels = (pixels * std + mean - new_mean) / new_std
        size = self.kinds[1].image_size(config.second)
        if pixels.shape[-1] != size:
            pixels = interpolate(pixels, (size, size), mode="bicubic", antialias=True)
        return pixels.to(pixel_values.dtype)

    def save(self, module: PairModel, folder: Path, state=None, processor=None) -> None:
        """Both, in subfolders; the second's image processor is the one that it was published with.

        See :meth:`Encoder.save`.
        """
        second = _built(self.kinds[1].processor(split_name(module.name_or_path)[1]))
        for half, kind, own in zip(HALVES, self.kinds, (processor, second), strict=True):
            inner = None if state is None else {
                key.removeprefix(f"{half}."): tensor
                for key, tensor in state.items()
                if key.startswith(f"{half}.")
            }  # fmt: skip
            (folder / half).mkdir()
            kind.save(getattr(module, half), folder / half, inner, own)

    def write_tiny(self, config: PairConfig, folder: Path) -> None:
        """Both, in subfolders."""
        for half, kind in zip(HALVES, self.kinds, strict=True):
            kind.write_tiny(getattr(config, half), folder / half)


def split_name(name: str) -> tuple[str, str]:
    """The two names in the name of a pair.

    Raises:
        DPAError: there are not two.
    """
    if Path(name).is_dir():
        return str(Path(name) / HALVES[0]), str(Path(name) / HALVES[1])
    parts = tuple(part.strip() for part in name.split(" + "))
    if len(parts) != 2 or not all(parts):
        raise DPAError(
            f"{SETTING}={name!r} does not name a pair of encoders: give 'NAME + NAME', or a folder "
            f"with the subfolders first and second."
        )
    return parts


def _colours(processor: dict) -> list[list[float]]:
    built = _built(processor)
    return [list(built.image_mean), list(built.image_std)]


def _built(processor: dict) -> Any:
    options = dict(processor)
    build = get_object_from_string(options.pop("type"))
    name = options.pop("pretrained_model_name_or_path", None)
    return build(**options) if name is None else build(name, **options)


def _regrid(tokens: Tensor, n: int) -> Tensor:
    """(N, m, C) on a square grid to (N, n, C) on another."""
    if tokens.shape[1] == n:
        return tokens
    old, new = math.isqrt(tokens.shape[1]), math.isqrt(n)
    grid = tokens.transpose(1, 2).unflatten(2, (old, old)).float()
    grid = interpolate(grid, (new, new), mode="bilinear", antialias=True)
    return grid.flatten(2).transpose(1, 2).to(tokens.dtype)
