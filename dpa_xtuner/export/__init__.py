"""A trained model in formats that other programs open."""

from dpa_xtuner.export.export import export_config
from dpa_xtuner.export.refusals import FORMATS

__all__ = ["FORMATS", "export_config"]
