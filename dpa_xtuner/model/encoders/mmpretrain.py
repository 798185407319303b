"""Any backbone of MMPretrain, by the name of its config; an optional dependency."""

from inspect import signature
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from accelerate import init_empty_weights
from mmengine.config import Config
from mmengine.registry import DefaultScope
from mmengine.runner.checkpoint import CheckpointLoader
from safetensors.torch import load_model, save_file, save_model
from torch import Tensor, nn
from transformers import CLIPImageProcessor, PretrainedConfig

from dpa_xtuner.errors import DPAError, check_installed, install, nearest
from dpa_xtuner.model.encoders.base import SETTING, VisionEncoder, VisionEncoderSpec
from dpa_xtuner.registry import ENCODERS

# Sizes for rehearsals, by backbone; other backbones are rehearsed at full size.
_VIT = {"embed_dims": 32, "num_layers": 2, "num_heads": 2, "feedforward_channels": 64}
_TINY = {
    "VisionTransformer": _VIT,
    "ViTEVA02": _VIT,
    "SwinTransformer": {"embed_dims": 8, "depths": [1, 1, 1, 1], "num_heads": [1, 1, 2, 2]},
    "ConvNeXt": {"depths": [1, 1, 1, 1], "channels": [8, 16, 24, 32]},
}


class MMPretrainConfig(PretrainedConfig):
    """The configuration of a backbone of MMPretrain.

    Args:
        backbone: MMPretrain's config of the backbone.
        image_size: height and width of the images.
        image_mean: mean of the colours red, green, blue, from 0 to 1.
        image_std: their standard deviations.
        checkpoint: address of the weights that MMPretrain publishes.
        kwargs: arguments of :class:`transformers.PretrainedConfig`.

    Attributes:
        hidden_size: channels of the last feature map.
        grid: height and width of the last feature map.
    """

    model_type = "mmpretrain"

    def __init__(
        self,
        backbone: dict | None = None,
        image_size: int = 224,
        image_mean: list[float] | None = None,
        image_std: list[float] | None = None,
        checkpoint: str | None = None,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.backbone: Any = backbone  # None only in the empty configuration
        self.image_size = image_size
        self.image_mean = image_mean
        self.image_std = image_std
        self.checkpoint = checkpoint
        if backbone is not None:  # transformers builds an empty configuration to compare with
            self.hidden_size, *self.grid = _feature_map(backbone, image_size)

    @classmethod
    def from_pretrained(cls, name: str, **kwargs) -> "MMPretrainConfig":
        """Read it from a folder, or from the config that MMPretrain ships under a name.

        Args:
            name: the folder or the name.
            kwargs: arguments of transformers' method.

        Raises:
            DPAError: MMPretrain is not installed or has no such config, or its backbone gives
                no feature map.
        """
        if Path(name).is_dir():
            return super().from_pretrained(name, **kwargs)
        try:
            from mmpretrain import list_models
            from mmpretrain.apis import ModelHub
        except ImportError as error:  # it, or what it needs
            raise DPAError(
                f"The encoder 'mmpretrain' needs the package mmpretrain ({error}). Install it: "
                f"{install('mmpretrain')}."
            ) from None

        known = list_models()
        if name.lower() not in known:
            raise DPAError(
                f"{SETTING}={name!r} is neither a folder nor the name of an MMPretrain config"
                f"{nearest(name, known) or '.'} mmpretrain.list_models() lists all {len(known)}."
            )
        info = ModelHub.get(name)
        model, colours = info.config.model, info.config.data_preprocessor
        if "backbone" not in model or not colours.get("to_rgb", False):
            what = (
                "takes BGR images" if "backbone" in model else f"is a {model.type}, no classifier"
            )
            raise DPAError(
                f"{SETTING}={name!r} {what}. Take the config of a classifier of RGB images."
            )
        backbone = model.backbone.to_dict()
        return cls(
            backbone={key: value for key, value in backbone.items() if key != "init_cfg"},
            image_size=_image_size(info.config),
            image_mean=[value / 255 for value in colours.mean],
            image_std=[value / 255 for value in colours.std],
            checkpoint=info.weights,
        )


class MMPretrainModel(nn.Module):
    """A backbone whose last feature map is a sequence of tokens.

    It does not derive from transformers' class, which renames weights called ``gamma``, as
    ConvNeXt's are.
    """

    config_class = MMPretrainConfig

    def __init__(self, config: MMPretrainConfig):
        super().__init__()
        self.config = config
        self.backbone = _build(config.backbone)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Turn (N, 3, H, W) into (N, tokens, hidden size), the feature map row by row."""
        maps = self.backbone(pixel_values)  # the last is (N, C, h, w)
        return maps[-1].flatten(2).transpose(1, 2)  # (N, h w, C)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""
        return next(self.parameters()).dtype

    def save_pretrained(
        self, folder: str | Path, state_dict: dict[str, Tensor] | None = None
    ) -> None:
        """Write ``config.json`` and ``model.safetensors``.

        Args:
            folder: target folder.
            state_dict: weights to write in place of the module's, such as gathered ones.
        """
        self.config.save_pretrained(folder)
        file = Path(folder) / "model.safetensors"
        if state_dict is None:
            save_model(self, str(file), metadata={"format": "pt"})
        else:
            save_file(state_dict, file, metadata={"format": "pt"})

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        checkpoint: str | None = None,
        torch_dtype: torch.dtype = torch.float32,
        output_loading_info: bool = False,
    ):
        """Load a folder that :meth:`save_pretrained` wrote, or a named config's published weights.

        Args:
            pretrained_model_name_or_path: a folder or the name of a config.
            checkpoint: file or address of a named config's weights; None for MMPretrain's.
            torch_dtype: dtype of the weights.
            output_loading_info: return (module, its ``missing_keys``) in place of the module.

        Raises:
            DPAError: the weights can't be read.
        """
        config = MMPretrainConfig.from_pretrained(pretrained_model_name_or_path)
        model = cls(config)
        weights = Path(pretrained_model_name_or_path) / "model.safetensors"
        if weights.is_file():
            missing, _ = load_model(model, str(weights), strict=False)
        else:
            missing = model._load_backbone(checkpoint or config.checkpoint)
        model.to(torch_dtype).eval()
        return (model, {"missing_keys": list(missing)}) if output_loading_info else model

    def _load_backbone(self, checkpoint: str | None) -> list[str]:
        try:
            state = CheckpointLoader.load_checkpoint(checkpoint, map_location="cpu")
        except (OSError, TypeError, AttributeError, UnpicklingError) as error:
            raise DPAError(
                f"The weights {checkpoint!r} can't be read ({error}). Download them and give the "
                f"file: encoder=dict(type='mmpretrain', checkpoint=FILE)."
            ) from None
        state = state.get("state_dict", state)
        prefix = "backbone."
        inner = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        return self.backbone.load_state_dict(inner or state, strict=False).missing_keys


@ENCODERS.register_module("mmpretrain")
class MMPretrain(VisionEncoderSpec):
    """A backbone of MMPretrain (EVA-02, ViT, Swin, ConvNeXt, ...): its last feature map.

    ``visual_encoder_name_or_path`` is the name of an MMPretrain config, or a folder that
    ``MMPretrainModel.save_pretrained`` wrote.

    Args:
        checkpoint: file of a named config's weights; None downloads them.
    """

    model = "dpa_xtuner.model.encoders.mmpretrain.MMPretrainModel.from_pretrained"
    image_processor = "transformers.CLIPImageProcessor.from_pretrained"
    layer = None

    def __init__(self, checkpoint: str | None = None):
        super().__init__()
        self.checkpoint = checkpoint

    def loader(self, name: str) -> dict:
        """Add the checkpoint's file."""
        return super().loader(name) | ({"checkpoint": self.checkpoint} if self.checkpoint else {})

    def processor(self, name: str) -> dict:
        """Use a named config's size and normalisation; scale the whole image, crop nothing."""
        if Path(name).is_dir():
            return super().processor(name)
        return {"type": "transformers.CLIPImageProcessor", **_preparation(self.config(name))}

    def default_config(self) -> PretrainedConfig:
        """Refuse: MMPretrain ships the configs, and a folder has its own.

        Raises:
            DPAError: always.
        """
        raise DPAError(f"{SETTING} is neither a folder nor the name of an MMPretrain config.")

    def tokens(self, config: MMPretrainConfig) -> int:
        """Count the positions of the feature map."""
        return config.grid[0] * config.grid[1]

    def hidden(self, module: VisionEncoder, pixel_values: Tensor) -> Tensor:
        """Compute the feature map as tokens.

        Raises:
            DPAError: a layer is set.
        """
        if self.layer is not None:
            raise DPAError(
                f"The encoder 'mmpretrain' gives its last feature map, not the layer {self.layer}: "
                f"leave model.visual_select_layer out."
            )
        return module(pixel_values)

    def write_tiny(self, config: MMPretrainConfig, folder: Path) -> None:
        """Write a backbone of the same class, tiny if :data:`_TINY` has its class."""
        arch = _TINY.get(config.backbone["type"])
        backbone = config.backbone | ({"arch": arch} if arch else {})
        torch.manual_seed(0)
        tiny = MMPretrainConfig(backbone, config.image_size, config.image_mean, config.image_std)
        self.build(tiny).save_pretrained(folder)
        CLIPImageProcessor(**_preparation(config)).save_pretrained(folder)


def _preparation(config: MMPretrainConfig) -> dict:
    size = config.image_size
    return {
        "size": {"shortest_edge": size},
        "crop_size": {"height": size, "width": size},
        "image_mean": config.image_mean,
        "image_std": config.image_std,
    }


def _build(backbone: dict) -> nn.Module:
    check_installed("mmpretrain", "mmpretrain", "mmcv")
    from mmpretrain.registry import MODELS

    with DefaultScope.overwrite_default_scope("mmpretrain"):
        owner = MODELS.get(backbone["type"])
        arguments = {name for c in owner.__mro__ for name in signature(c.__init__).parameters}
        # A classifier asks for a class token or a mean: ask for feature maps instead.
        maps = {"out_type": "featmap", "gap_before_final_norm": False}
        return MODELS.build(backbone | {k: v for k, v in maps.items() if k in arguments})


def _feature_map(backbone: dict, image_size: int) -> tuple[int, int, int]:
    """Find channels, height and width of the last output, without allocating weights."""
    with init_empty_weights():
        module = _build(backbone)
    module.eval()  # not chained: MMPretrain's eval() returns nothing
    module.to("meta")  # buffers
    outputs = module(torch.empty(1, 3, image_size, image_size, device="meta"))
    shape = outputs[-1].shape if isinstance(outputs, (tuple, list)) else ()
    if len(shape) != 4:
        raise DPAError(
            f"The backbone {backbone['type']} gives {tuple(shape) or type(outputs).__name__}, not "
            f"a feature map (N, C, H, W). Take another config."
        )
    return tuple(shape[1:])


def _image_size(config: Config) -> int:
    loader = config.get("test_dataloader")
    steps = reversed(loader.dataset.pipeline) if loader else ()
    tested = [step.get("crop_size") or step.get("scale") for step in steps]
    sizes = [config.model.backbone.get("img_size"), *tested]
    size = next((size for size in sizes if size is not None), 224)
    return size if isinstance(size, int) else size[0]
