"""Exports a trained model in formats that other programs can open."""

from dpa_xtuner.export.export import export_config

__all__ = ["export_config"]
