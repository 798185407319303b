"""Decoupled Proxy Alignment (arXiv 2509.14735) for XTuner and MMEngine.

The plugin is :mod:`dpa_xtuner.plugin`.
"""

import sys

__version__ = "0.1.0"

# Older configs name the package itself in custom_imports, which XTuner's commands read. Processes
# without XTuner, such as OpenCompass's, are spared the seconds that its import takes.
if "xtuner" in sys.modules:
    from dpa_xtuner import plugin as plugin
