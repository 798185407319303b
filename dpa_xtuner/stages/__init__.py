"""The three stages: what each one is, and how one follows the other."""

from dpa_xtuner.engine.loop import DPATrainLoop
from dpa_xtuner.engine.optim import Bf16OptimWrapper, WarmupCosineLR
from dpa_xtuner.engine.runner import FlexibleRunner, Runner
from dpa_xtuner.stages.settings import Settings
from dpa_xtuner.stages.table import STAGE_NAMES, Stage, stage_table

__all__ = [
    "STAGE_NAMES",
    "Bf16OptimWrapper",
    "DPATrainLoop",
    "FlexibleRunner",
    "Runner",
    "Settings",
    "Stage",
    "WarmupCosineLR",
    "stage_table",
]
