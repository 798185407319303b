"""The spec of a kind of visual encoder; the defaults are those of an ordinary ViT."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from dpa_xtuner.errors import DPAError
from dpa_xtuner.model.configs import model_class, read_config
from dpa_xtuner.model.fingerprint import gathered
from dpa_xtuner.registry import ENCODERS, build_named
from dpa_xtuner.versions import published_prefix

SETTING = "visual_encoder_name_or_path"


class VisionEncoder(Protocol):
    """The interface of a visual encoder's module, whatever its kind."""

    config: PretrainedConfig

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of its weights."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Iterate over its weights."""

    def __call__(self, pixel_values: Tensor, **kwargs: Any) -> Any:
        """Encode images (N, 3, H, W) of that dtype; only the spec reads the output."""


class VisionEncoderSpec:
    """A kind of visual encoder: how it is loaded, and which of its outputs are the patches.

    To add a kind, derive from this class, name its classes, and override what differs from a ViT
    of transformers, whose patch tokens come last in its sequence.

    Args:
        layer: index into the module's ``hidden_states`` (0 is the embeddings, -1 the last
            layer); None for the default of the kind.

    Attributes:
        model: the ``from_pretrained`` of the module, as a config's ``type``.
        image_processor: the same of its image processor.
        layer: the layer whose output is the features; None for ``last_hidden_state``,
            which follows the final norm if the model has one.
        model_types: values of ``model_type`` in the configurations that it can load; empty for
            any.
        tiny_config: changes that make a configuration tiny, for rehearsals; keys that the
            configuration lacks are ignored.
    """

    model: str
    image_processor: str
    layer: int | None = -2
    model_types: tuple[str, ...] = ()
    tiny_config: dict[str, Any] = {  # noqa: RUF012, overridden as a whole
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    }

    def __init__(self, layer: int | None = None):
        if layer is not None:
            self.layer = layer

    def loader(self, name: str) -> dict:
        """Return the config that builds the module with its published weights."""
        return {"type": self.model, "pretrained_model_name_or_path": name}

    def processor(self, name: str) -> dict:
        """Return the config that builds its image processor: one size and one normalisation."""
        return {"type": self.image_processor, "pretrained_model_name_or_path": name}

    def config(self, name: str, local_only: bool = False) -> PretrainedConfig:
        """Read the published configuration.

        Args:
            name: a local folder or a hub name.
            local_only: look only in folders and the hub's cache.

        Raises:
            DPAError: it can't be found, or belongs to another kind.
        """
        config = read_config(SETTING, self.loader(name), local_only)
        # A class of transformers reads any configuration, and keeps the type written in it.
        if self.model_types and config.model_type not in self.model_types:
            raise DPAError(
                f"{SETTING}={name!r} is a model of type {config.model_type!r}, but the encoder "
                f"{type(self).__name__} loads {', '.join(self.model_types)}. Set encoder to "
                f"the kind that loads it; known: {', '.join(sorted(ENCODERS.module_dict))}."
            )
        return config

    def default_config(self) -> PretrainedConfig:
        """Make a configuration for rehearsals, used if the published one is not on this machine.

        Raises:
            DPAError: the kind has no default configuration.
        """
        owner = model_class({"type": self.model})
        if getattr(owner, "config_class", None) is None:
            raise DPAError(
                f"{SETTING} is not on this machine, and {self.model} has no default configuration "
                f"to rehearse with. Give a local folder."
            )
        return owner.config_class()

    def build(self, config: PretrainedConfig) -> Any:
        """Build the module from a configuration, with random weights."""
        return model_class({"type": self.model})(config)

    def image_size(self, config: PretrainedConfig) -> int:
        """Return the height and width of its images (or tiles)."""
        return config.image_size

    def tokens(self, config: PretrainedConfig) -> int:
        """Count the patch tokens of one image (or tile), before the projector."""
        return (self.image_size(config) // config.patch_size) ** 2

    def hidden_size(self, config: PretrainedConfig) -> int:
        """Return the number of channels of a token."""
        return config.hidden_size

    def features(self, module: VisionEncoder, pixel_values: Tensor) -> Tensor:
        """Compute patch features, without class and register tokens.

        Args:
            module: the loaded module.
            pixel_values: (N, 3, H, W), of the module's dtype.

        Returns:
            (N, tokens, hidden size), the patches row by row.
        """
        hidden = self.hidden(module, pixel_values)  # (N, T, C), the patches last
        return hidden[:, hidden.shape[1] - self.tokens(module.config) :]  # (N, tokens, C)

    def hidden(self, module: VisionEncoder, pixel_values: Tensor) -> Tensor:
        """Compute all tokens (N, T, C) of the features' layer.

        Raises:
            DPAError: the module has no such layer.
        """
        if self.layer is None:
            return module(pixel_values).last_hidden_state
        states = module(pixel_values, output_hidden_states=True).hidden_states
        _check_layer(self.layer, len(states), type(module).__name__)
        return states[self.layer]

    def freeze_unread(self, module: VisionEncoder) -> None:
        """Freeze parameters that the features don't depend on, such as later layers.

        They would get no gradient, which DistributedDataParallel refuses.

        Args:
            module: the module to train; its other parameters are not changed.
        """
        parameters = [parameter for parameter in module.parameters() if parameter.requires_grad]
        size, like = self.image_size(module.config), parameters[0]
        with gathered(list(module.parameters())), torch.enable_grad():
            blank = torch.zeros(1, 3, size, size, dtype=like.dtype, device=like.device)
            features = self.features(module, blank)  # (1, tokens, C)
            gradients = torch.autograd.grad(features.sum(), parameters, allow_unused=True)
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.requires_grad_(gradient is not None)

    def save(
        self,
        module: Any,
        folder: Path,
        state: dict[str, Tensor] | None = None,
        processor: Any = None,
    ) -> None:
        """Write a module so that :meth:`loader` can load it, with its image processor.

        Args:
            module: loaded by this kind.
            folder: target folder; exists.
            state: weights to write in place of the module's, such as gathered ones.
            processor: the image processor of the run.
        """
        if prefix := published_prefix(module):  # which transformers 5 does not give back
            state = module.state_dict() if state is None else state
            state = {prefix + name: weight for name, weight in state.items()}
        module.save_pretrained(folder, state_dict=state)
        processor.save_pretrained(folder)

    def check_layer(self, config: PretrainedConfig) -> None:
        """Check before loading that the module will have the features' layer.

        Args:
            config: the published configuration; passes if it has no number of layers.

        Raises:
            DPAError: it has no such layer.
        """
        layers = getattr(config, "num_hidden_layers", None)
        if self.layer is not None and layers is not None:
            _check_layer(self.layer, layers + 1, type(self).__name__)

    def write_tiny(self, config: PretrainedConfig, folder: Path) -> None:
        """Write a tiny module of random weights, and its image processor, for a rehearsal.

        Args:
            config: configuration of the architecture; not changed.
            folder: target folder; created if it is missing.
        """
        changes = {k: v for k, v in self.tiny_config.items() if hasattr(config, k)}
        # Some configurations name their layers; the names follow from the number of layers.
        named = ("stage_names", "out_features", "out_indices")
        kept = {k: v for k, v in config.to_dict().items() if k not in named}
        config = type(config).from_dict(kept | changes)
        torch.manual_seed(0)
        self.build(config).save_pretrained(folder)
        size = self.image_size(config)
        owner = model_class({"type": self.image_processor})
        default = owner()
        sizes = {name: getattr(default, name, None) for name in ("size", "crop_size")}
        # Since transformers 5 a size is an object, whose dict is the sides that are set.
        owner(
            **{name: dict.fromkeys(dict(sides), size) for name, sides in sizes.items() if sides}
        ).save_pretrained(folder)


def _check_layer(layer: int, states: int, name: str) -> None:
    if type(layer) is not int or not -states <= layer < states:
        raise DPAError(
            f"The feature layer {layer!r} is not one of the {states} hidden states of {name}; set "
            f"a layer from {-states} to {states - 1}."
        )


Encoder = VisionEncoderSpec
"""The former name; users' kinds may derive from it."""


def build_encoder(cfg: str | dict) -> VisionEncoderSpec:
    """Build the spec of a kind of encoder from its name or ``dict(type=name, ...)``.

    Args:
        cfg: a name in :data:`dpa_xtuner.registry.ENCODERS`, or a dict of one and its arguments.

    Raises:
        DPAError: unknown name or argument, or a value out of range.
    """
    return build_named(ENCODERS, cfg)
