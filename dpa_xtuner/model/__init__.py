"""The models: XTuner's, with the loss, the adapter and the projector at their seams."""

from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.model.proxy_llm import ProxyLLM

__all__ = ["DPALLaVAModel", "ProxyLLM"]
