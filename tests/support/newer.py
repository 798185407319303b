"""Families that need a newer transformers than the one that is installed."""

import pytest
import transformers
from packaging.version import Version

from dpa_xtuner.families.base import known_families


def is_too_old_for(family: str) -> bool:
    return Version(transformers.__version__) < Version(known_families()[family].since)


def skip_unless_known(family: str) -> None:
    if is_too_old_for(family):
        pytest.skip(f"{family} needs transformers {known_families()[family].since}")
