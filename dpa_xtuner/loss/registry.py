"""The registry of losses."""

from mmengine.registry import Registry

LOSSES = Registry("dpa loss", scope="dpa_xtuner")
"""Functions ``(logits (N, V), targets (N,)) -> scalar`` over the supervised tokens of a batch."""
