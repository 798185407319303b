"""Decoupled Proxy Alignment (arXiv 2509.14735) for XTuner and MMEngine.

The plugin is :mod:`dpa_xtuner.plugin`.
"""

import sys

__version__ = "0.2.0"

# Older configs name the package itself in custom_imports; XTuner's commands import it. Processes
# without XTuner, such as OpenCompass's, save the seconds that importing XTuner takes.
if "xtuner" in sys.modules:
    from dpa_xtuner import plugin as plugin
