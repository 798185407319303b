"""Decoupled Proxy Alignment (arXiv 2509.14735) for XTuner and MMEngine.

Importing the package, as a config's ``custom_imports`` does, registers its parts by
name in MMEngine's registries, makes ``zero1``, ``zero2`` and ``zero3`` known to
``xtuner train --deepspeed``, and mends what :mod:`dpa_xtuner.compat` lists.

All this is left out where the environment says ``DPA_WITHOUT_XTUNER=1``, as it does in
OpenCompass's processes: :mod:`dpa_xtuner.evaluation` needs nothing of XTuner, and is spared the
seconds that its import takes.
"""

import os

from dpa_xtuner.errors import DPAError
from dpa_xtuner.streams import outlive_readers

outlive_readers()  # DeepSpeed prints while it is imported

if os.environ.get("DPA_WITHOUT_XTUNER") != "1":
    from dpa_xtuner import compat

    compat.apply()

    from dpa_xtuner import data, hooks, loss, model, stages  # noqa: F401

__all__ = ["DPAError"]
__version__ = "0.1.0"
