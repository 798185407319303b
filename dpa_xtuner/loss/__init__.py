"""Losses, by name."""

from dpa_xtuner.loss.cross_entropy import cross_entropy
from dpa_xtuner.loss.registry import LOSSES

__all__ = ["LOSSES", "cross_entropy"]
