"""Losses, by name."""

from dpa_xtuner.loss.cross_entropy import cross_entropy

__all__ = ["cross_entropy"]
