"""Vision transformers of Hugging Face transformers."""

import shutil
from pathlib import Path

from torch import nn
from transformers import AutoConfig, AutoModel, Dinov2Config, PretrainedConfig

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.encoders.base import VisionEncoderSpec
from dpa_xtuner.registry import ENCODERS
from dpa_xtuner.versions import require_transformers


@ENCODERS.register_module("clip")
class CLIP(VisionEncoderSpec):
    """CLIP's vision transformer; features of the second-last layer, as in LLaVA 1.5."""

    model = "transformers.CLIPVisionModel.from_pretrained"
    image_processor = "transformers.CLIPImageProcessor.from_pretrained"
    model_types = ("clip", "clip_vision_model")


@ENCODERS.register_module(["siglip", "siglip2"])
class SigLIP(VisionEncoderSpec):
    """SigLIP, and SigLIP 2 at a fixed resolution, which is published as a SigLIP.

    It has no class token. Features of the second-last layer, as in LLaVA-OneVision.
    """

    model = "transformers.SiglipVisionModel.from_pretrained"
    image_processor = "transformers.SiglipImageProcessor.from_pretrained"
    model_types = ("siglip", "siglip_vision_model")


@ENCODERS.register_module("dinov2")
class DINOv2(VisionEncoderSpec):
    """DINOv2, with or without register tokens; features of the last layer, after the final norm.

    Args:
        image_size: the images' height and width, a multiple of the patch size. The published
            image processors scale to 256 and crop 224; ours scales to this size and crops nothing.
            The model interpolates its position embeddings to other sizes.
        layer: see :class:`VisionEncoderSpec`.
    """

    model = "transformers.AutoModel.from_pretrained"  # the config tells the two classes apart
    image_processor = "transformers.BitImageProcessor.from_pretrained"
    layer = None
    model_types: tuple[str, ...] = ("dinov2", "dinov2_with_registers")
    # Image and patch size stay, since the user sets the images' size for them.
    tiny_config = {  # noqa: RUF012
        "hidden_size": 32,
        "intermediate_size": 64,
        "mlp_ratio": 2,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
    }

    def __init__(self, image_size: int = 224, layer: int | None = None):
        super().__init__(layer)
        self.size = image_size

    def processor(self, name: str) -> dict:
        """Scale to the encoder's size, whatever the published processor does."""
        sizes = {"shortest_edge": self.size}, {"height": self.size, "width": self.size}
        return super().processor(name) | dict(zip(("size", "crop_size"), sizes, strict=True))

    def config(self, name: str, local_only: bool = False) -> PretrainedConfig:
        """Read the configuration, and check the image size against the patch size."""
        config = super().config(name, local_only)
        if self.size < 1 or self.size % config.patch_size:
            raise DPAError(
                f"encoder.image_size={self.size} is not a multiple of the patch size "
                f"{config.patch_size} of {name}. Take one, such as {16 * config.patch_size}."
            )
        return config

    def default_config(self) -> PretrainedConfig:
        """Make the configuration of DINOv2 base."""
        return Dinov2Config(image_size=518, patch_size=14)

    def build(self, config: PretrainedConfig) -> nn.Module:
        """Build the module of the config's class, with random weights."""
        return AutoModel.from_config(config)

    def image_size(self, config: PretrainedConfig) -> int:
        """Return the size that is set: the published one is that of the position embeddings."""
        return self.size


@ENCODERS.register_module("dinov3")
class DINOv3(DINOv2):
    """DINOv3's vision transformers, whose rotary embeddings take any size.

    Args:
        image_size: see :class:`DINOv2`.
        layer: see :class:`VisionEncoderSpec`.

    Raises:
        DPAError: transformers is older than 4.56.
    """

    model_types = ("dinov3_vit",)

    def __init__(self, image_size: int = 224, layer: int | None = None):
        require_transformers("4.56", "encoder='dinov3'")
        super().__init__(image_size, layer)

    def default_config(self) -> PretrainedConfig:
        """Make the configuration of DINOv3 small."""
        return AutoConfig.for_model("dinov3_vit", num_register_tokens=4)


@ENCODERS.register_module("internvit")
class InternViT(VisionEncoderSpec):
    """InternViT, which needs its remote code; features of the last layer, as in InternVL 1.5.

    Args:
        trust_remote_code: must be True, since loading runs code from its repository.
        layer: see :class:`VisionEncoderSpec`; InternViT-6B-448px-V1-2 needs -4.

    Raises:
        DPAError: ``trust_remote_code`` is not True.
    """

    model = "transformers.AutoModel.from_pretrained"
    image_processor = "transformers.CLIPImageProcessor.from_pretrained"
    layer = -1
    model_types = ("intern_vit_6b",)

    def __init__(self, trust_remote_code: bool = False, layer: int | None = None):
        if trust_remote_code is not True:
            raise DPAError(
                "The encoder 'internvit' runs code from its repository, which you must allow: "
                "encoder=dict(type='internvit', trust_remote_code=True)."
            )
        super().__init__(layer)

    def loader(self, name: str) -> dict:
        """Add ``trust_remote_code``."""
        return super().loader(name) | {"trust_remote_code": True}

    def build(self, config: PretrainedConfig) -> nn.Module:
        """Build the module of the remote class, with random weights."""
        return AutoModel.from_config(config, trust_remote_code=True)

    def write_tiny(self, config: PretrainedConfig, folder: Path) -> None:
        """Write a tiny module, and copy the code of a local folder."""
        super().write_tiny(config, folder)
        _copy_code(config, folder)

    def save(self, module: nn.Module, folder: Path, state=None, processor=None) -> None:
        """Write the module, and copy the code of a local folder."""
        super().save(module, folder, state, processor)
        _copy_code(module.config, folder)


def _copy_code(config: PretrainedConfig, folder: Path) -> None:
    for code in Path(config.name_or_path).glob("*.py"):
        shutil.copy(code, folder)
