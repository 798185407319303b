"""The plugin, as a config's ``custom_imports`` names it.

Importing it applies :mod:`dpa_xtuner.compat`, and registers our classes by name in MMEngine's
registries. Runs whose config does not import it are unaffected.
"""

# ruff: noqa: E402

from dpa_xtuner.streams import outlive_readers

outlive_readers()  # first, since DeepSpeed prints while it is imported

from dpa_xtuner import compat
from dpa_xtuner.engine.log import quieten_start

quieten_start()
compat.apply()  # before XTuner and peft are imported

import dpa_xtuner.data
import dpa_xtuner.engine.hooks
import dpa_xtuner.engine.loop
import dpa_xtuner.engine.optim
import dpa_xtuner.engine.runner  # noqa: F401
from dpa_xtuner.engine.uncaught import answer_uncaught

answer_uncaught()
