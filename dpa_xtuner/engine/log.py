"""What a run's log says, and what it leaves out."""

import logging
import platform
import warnings

from mmengine.device import get_device

from dpa_xtuner.versions import installed_versions

# Said at each start, of no use to who reads the log. By MMEngine 0.10.6 and XTuner 0.2.0.
_LEFT_OUT = (
    "Hooks will be executed in the following order",
    "Distributed training is not used, all SyncBatchNorm",
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    "Dataset DPADataset has no metainfo",
    "LengthGroupedSampler",
)


def quieten(logger: logging.Logger) -> None:
    """Leave MMEngine's and XTuner's notes about themselves out of a run's log."""
    logger.addFilter(_is_of_use)
    # OptimizerStepHook wraps that method, and still calls it before the scheduler's.
    warnings.filterwarnings("ignore", "Seems like `optimizer.step\\(\\)` has been overridden")


def _is_of_use(record: logging.LogRecord) -> bool:
    return not record.getMessage().startswith(_LEFT_OUT)


def describe(config: str) -> str:
    """Describe what a stage runs on, in place of MMEngine's list and the whole config.

    Args:
        config: file that holds the config of the stage.
    """
    versions = ", ".join(f"{name} {version}" for name, version in installed_versions().items())
    return (
        f"On {get_device().upper()} with Python {platform.python_version()}, {versions}. "
        f"The config of this stage: {config}"
    )
