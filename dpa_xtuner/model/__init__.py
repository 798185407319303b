"""The models: XTuner's, with the loss, the adapter and the projector at their seams.

Without XTuner (see :mod:`dpa_xtuner`) there is :mod:`dpa_xtuner.model.configs` and nothing else.
"""

import os

__all__ = []

if os.environ.get("DPA_WITHOUT_XTUNER") != "1":
    from dpa_xtuner.model.dpa_llava import DPALLaVAModel
    from dpa_xtuner.model.proxy_llm import ProxyLLM

    __all__ += ["DPALLaVAModel", "ProxyLLM"]
