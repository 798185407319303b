"""The multimodal model of the stages align and tune."""

from collections import OrderedDict

import torch
from mmengine.registry import MODELS
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel
from xtuner.model import LLaVAModel
from xtuner.registry import BUILDER

from dpa_xtuner.errors import DPAError
from dpa_xtuner.layout import LLM, VISUAL_ENCODER
from dpa_xtuner.loss import Objective, TokenLogProbs
from dpa_xtuner.model.contrast import contrast_log_probs
from dpa_xtuner.model.contrast_cache import ContrastCache
from dpa_xtuner.model.encoders import build_encoder
from dpa_xtuner.model.fingerprint import fingerprint
from dpa_xtuner.model.llm import add_lora, load, merge_adapter, supervised_log_probs
from dpa_xtuner.model.projectors import build_projector, read_projector
from dpa_xtuner.precision import Precision
from dpa_xtuner.versions import embedding_scale


@BUILDER.register_module()  # for xtuner convert
@MODELS.register_module()
class DPALLaVAModel(LLaVAModel):
    """XTuner's LLaVA with a weighted loss, a merged adapter, and named encoders and projectors.

    Args:
        llm: a config dict or a module.
        visual_encoder: a config dict or a module, of the kind ``encoder``.
        encoder: the kind of visual encoder, by name or as a dict of its name and arguments
            (:func:`dpa_xtuner.model.encoders.build_encoder`).
        projector: by name or as a dict of its name and arguments
            (:func:`dpa_xtuner.model.projectors.build_projector`).
        visual_select_layer: the encoder's layer, in place of the default of its kind.
        loss: a weighting scheme, by name or as a dict of its name and arguments
            (:func:`dpa_xtuner.loss.build_scheme`).
        normalize: see :func:`dpa_xtuner.loss.relevance_loss`.
        precision: what the run computes in (:class:`dpa_xtuner.precision.Precision`).
        merged_adapter: a PEFT adapter folder, to be added to the LLM's weights
            (:func:`dpa_xtuner.model.llm.merge_adapter`).
        pretrained_projector: a folder written by the projector's ``save_pretrained``.
        freeze_projector: train no weight of the projector.
        use_activation_checkpointing: see :meth:`activation_checkpointing_enable`.
        kwargs: arguments of :class:`xtuner.model.LLaVAModel`.

    Attributes:
        encoder_spec: the spec of the visual encoder's kind.
        contrast_cache: a :class:`dpa_xtuner.model.contrast_cache.ContrastCache` that replaces the
            contrast pass, or None.
    """

    llm: PreTrainedModel | PeftModel
    is_first_iter: bool

    def __init__(
        self,
        llm: dict | nn.Module,
        visual_encoder: dict | nn.Module,
        encoder: str | dict = "clip",
        projector: str | dict = "mlp",
        visual_select_layer: int | None = None,
        loss: str | dict = "uniform",
        normalize: str = "micro_batch",
        precision: str = "bf16",
        merged_adapter: str | None = None,
        pretrained_projector: str | None = None,
        freeze_projector: bool = False,
        use_activation_checkpointing: bool = True,
        **kwargs,
    ):
        if "projector_depth" in kwargs:
            raise DPAError(
                f"model.projector_depth={kwargs['projector_depth']} has no effect: set "
                f"projector=dict(type='mlp', depth={kwargs['projector_depth']})."
            )
        llm, visual_encoder = load(llm), load(visual_encoder)
        run_precision = Precision(precision)
        fingerprints = {
            LLM: fingerprint(llm, run_precision.fingerprint_dtype),
            VISUAL_ENCODER: fingerprint(visual_encoder, run_precision.fingerprint_dtype),
        }
        if merged_adapter is not None:
            llm = merge_adapter(llm, merged_adapter)
        spec = build_encoder(encoder)
        if visual_select_layer is not None:
            spec.layer = visual_select_layer
        # XTuner draws random numbers for its own projector, which ours replaces: don't count them.
        with torch.random.fork_rng(devices=[]):
            super().__init__(
                llm=llm,
                visual_encoder=visual_encoder,
                visual_select_layer=spec.layer,
                use_activation_checkpointing=False,
                **kwargs,
            )
        self.encoder_spec = spec
        self.projector = build_projector(
            projector, spec.hidden_size(self.visual_encoder.config), self.llm.config.hidden_size
        )
        self.projector.requires_grad_(not freeze_projector)
        if not self.freeze_visual_encoder:
            spec.freeze_unread(self.visual_encoder)
        if use_activation_checkpointing:
            self.llm.enable_input_require_grads()
            self.activation_checkpointing_enable()
        _undo_dispatch(self.llm)
        self.precision, self.fingerprints = run_precision, fingerprints
        # Trained weights are float32 under autocast; DeepSpeed makes its own copies.
        self.projector.float()
        if pretrained_projector is not None:
            self.projector.load_state_dict(read_projector(self.projector, pretrained_projector))
        self.objective = Objective(loss, normalize)
        self.contrast_cache: ContrastCache | None = None

    def _prepare_llm_for_lora(self, lora_config, use_activation_checkpointing=True) -> None:
        self.llm = add_lora(self.llm, self._parse_lora_config(lora_config))

    def activation_checkpointing_enable(self) -> None:
        """Recompute activations of the LLM, and of a trained encoder, in the backward pass.

        Stock checkpointing is reentrant, the only kind that ZeRO-3 supports. It gives no gradient
        to a module whose input needs none. The inputs of the LLM and of a trained encoder's layers
        need one; the projector's may not, so the projector is left out. A frozen encoder has no
        backward pass.
        """
        for module in self._recomputed():
            module.gradient_checkpointing_enable({"use_reentrant": True})

    def activation_checkpointing_disable(self) -> None:
        """Keep all activations again."""
        for module in self._recomputed():
            module.gradient_checkpointing_disable()

    def _recomputed(self) -> list[PreTrainedModel]:
        encoder = self.visual_encoder
        able = getattr(encoder, "supports_gradient_checkpointing", False)
        return [self.llm, encoder] if able and not self.freeze_visual_encoder else [self.llm]

    def state_dict(self, *args, **kwargs) -> dict[str, Tensor]:
        """Return what a checkpoint holds: trained weights, and the buffers of their components.

        Args:
            args: of PyTorch's method.
            kwargs: of PyTorch's method.
        """
        state = super(LLaVAModel, self).state_dict(*args, **kwargs)
        named = self.named_parameters(remove_duplicate=False)
        trains = {name: parameter.requires_grad for name, parameter in named}
        modules = {name.split(".")[0] for name, trained in trains.items() if trained}
        buffers = {name for name, _ in self.named_buffers() if name.split(".")[0] in modules}
        # MMEngine sets an attribute on it, which a plain dict does not allow.
        return OrderedDict((k, v) for k, v in state.items() if trains.get(k, k in buffers))

    def train(self, mode: bool = True) -> "DPALLaVAModel":
        """Switch the mode, but keep a frozen visual encoder in evaluation mode."""
        super().train(mode)
        if self.freeze_visual_encoder:
            self.visual_encoder.eval()
        return self

    def encode_images(self, pixel_values: Tensor) -> Tensor:
        """Project the patch features of images.

        Args:
            pixel_values: (N, 3, H, W), images or tiles.

        Returns:
            (N, image tokens, H of the LLM).

        Raises:
            DPAError: the images' size is not the encoder's.
        """
        size = self.encoder_spec.image_size(self.visual_encoder.config)
        if pixel_values.shape[-2:] != (size, size):
            height, width = pixel_values.shape[-2:]
            raise DPAError(
                f"The images are {height} x {width}, but the visual encoder takes {size} x {size}. "
                f"Give the data set the encoder's own image_processor."
            )
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.freeze_visual_encoder):
            patches = self.encoder_spec.features(
                self.visual_encoder, pixel_values.to(self.visual_encoder.dtype)
            )  # (N, n, C)
        features = self.projector(patches.to(self.projector.dtype))  # (N, image tokens, H)
        return features * embedding_scale(self.llm)

    def splice(self, data: dict) -> dict[str, Tensor]:
        """Put the images' features into the text's embeddings.

        A batch without an image runs the encoder on one blank picture and ignores its features:
        every rank then calls the same modules, as ZeRO-3 and DDP need.

        Args:
            data: a batch of :func:`dpa_xtuner.data.collate`; not changed.

        Returns:
            The decoder's inputs: ``inputs_embeds`` (B, T, H), ``attention_mask`` and
            ``position_ids`` (B, T).

        Raises:
            DPAError: the encoder's number of tokens is not the data set's.
        """
        embeds = self.llm.get_input_embeddings()(data["input_ids"])  # (B, T, H)
        pixel_values = data.get("pixel_values")
        if pixel_values is None:
            size = self.encoder_spec.image_size(self.visual_encoder.config)
            features = self.encode_images(embeds.new_zeros(1, 3, size, size))  # (1, n, H)
            # Times 0: the projector gets a gradient, of zeros.
            embeds = embeds + 0 * features.sum().to(embeds.dtype)
        else:
            features = self.encode_images(pixel_values).to(embeds.dtype)  # (N, n, H)
            if self.is_first_iter:  # once, since reading the count makes the GPU wait
                _check_image_tokens(data, features)
                self.is_first_iter = False
            embeds = embeds.masked_scatter(data["image_mask"].unsqueeze(-1), features)
        return {
            "inputs_embeds": embeds,
            "attention_mask": data["attention_mask"],
            "position_ids": data["position_ids"],
        }

    def log_probs(self, data: dict) -> TokenLogProbs:
        """Compute the log-probabilities of the supervised tokens of a collated batch."""
        return supervised_log_probs(self.llm, self.splice(data), data)

    def forward(self, data: dict, data_samples=None, mode: str = "loss"):
        """Compute a batch's loss (``mode="loss"``) or log-probabilities (``"tensor"``)."""
        if mode == "loss":
            return self.compute_loss(data)
        if mode == "tensor":
            return self.log_probs(data)
        raise ValueError(f"mode={mode!r} is not one of 'loss', 'tensor'")

    def compute_loss(self, data: dict, data_samples=None) -> dict[str, Tensor]:
        """Compute the loss and the log's figures of a batch of :func:`dpa_xtuner.data.collate`."""
        # Before the contrast pass, since autocast caches casts: the cached ones must carry a graph.
        log_probs = self.log_probs(data)
        no_image = None
        if self.objective.scheme.contrast and self.contrast_cache is not None:
            no_image = self.contrast_cache.read(data["indices"], data["labels"].device)
        elif self.objective.scheme.contrast:
            no_image = contrast_log_probs(self.llm, data)
        return self.objective(log_probs, no_image, data)


def _undo_dispatch(llm: nn.Module) -> None:
    """Remove XTuner's own forward methods from the LLM's layers.

    They are made for packed sequences and sequence parallelism. XTuner 0.2.0 installs them wherever
    FlashAttention-2 is installed, and without a process group they fail.
    """
    for module in llm.modules():
        forward = getattr(module.__dict__.get("forward"), "__func__", None)
        if forward is not None and forward.__module__.startswith("xtuner."):
            del module.forward


def _check_image_tokens(data: dict, features: Tensor) -> None:
    images, tokens, _ = features.shape
    expected = int(data["image_mask"].sum())
    if expected != images * tokens:
        raise DPAError(
            f"The batch holds {expected} image positions for {images} images, but the projector "
            f"gives {tokens} tokens for each. The data set's image_tokens must be {tokens}."
        )
