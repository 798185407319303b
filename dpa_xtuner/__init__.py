"""Decoupled Proxy Alignment (arXiv 2509.14735) for XTuner and MMEngine.

Importing the package, as a config's ``custom_imports`` does, registers its parts by
name in MMEngine's registries, makes ``zero1``, ``zero2`` and ``zero3`` known to
``xtuner train --deepspeed``, and mends what :mod:`dpa_xtuner.compat` lists.
"""

from dpa_xtuner import compat

compat.apply()

from dpa_xtuner import data, hooks, loss, model, stages  # noqa: E402
from dpa_xtuner.errors import DPAError  # noqa: E402

__all__ = ["DPAError", "compat", "data", "hooks", "loss", "model", "stages"]
__version__ = "0.1.0"
