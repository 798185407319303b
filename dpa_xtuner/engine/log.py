"""What a run's log says, and what it leaves out."""

import logging
import platform
import warnings

from mmengine.device import get_device
from mmengine.logging import MMLogger

from dpa_xtuner.versions import installed_versions

# Said at each start, of no use to who reads the log. By MMEngine 0.10.6 and XTuner 0.2.0, and from
# "Using env variable" on before our runner starts: by MMEngine, DeepSpeed, bitsandbytes, torch.
_LEFT_OUT = (
    "Hooks will be executed in the following order",
    "Distributed training is not used, all SyncBatchNorm",
    '"FileClient" will be deprecated',
    '"HardDiskBackend" is the alias',
    "Dataset DPADataset has no metainfo",
    "LengthGroupedSampler",
    "Exp name: ",
    "Reach the end of the dataloader",
    "Using env variable",
    "Setting accelerator to CPU",
    "The installed version of bitsandbytes was compiled without GPU support",
    "Failed to load CPU gemm_4bit_forward",
    "No CUDA runtime is found",
)
_LOGGERS = (
    "DeepSpeed",
    "bitsandbytes.cextension",
    "bitsandbytes.backends.cpu.ops",
    "torch.utils.cpp_extension",
)


def quieten_start(rank: int = 0) -> None:
    """Leave such notes out of what a process prints before its runner has a log.

    Call it before the packages are imported: they print most of theirs meanwhile.

    Args:
        rank: of this process; only rank 0 logs.
    """
    for name in _LOGGERS:
        logging.getLogger(name).addFilter(_is_of_use)
    warnings.filterwarnings("ignore", "Setting (OMP|MKL)_NUM_THREADS")  # MMEngine, on each rank
    warnings.filterwarnings("ignore", "(Distutils was imported|Setuptools is replacing)")
    logger = MMLogger.get_current_instance()
    logger.addFilter(_is_of_use)
    if rank != 0:
        logger.setLevel(logging.ERROR)


def quieten(logger: logging.Logger) -> None:
    """Leave MMEngine's and XTuner's notes about themselves out of a run's log."""
    logger.addFilter(_is_of_use)
    # OptimizerStepHook wraps that method, and still calls it before the scheduler's.
    warnings.filterwarnings("ignore", "Seems like `optimizer.step\\(\\)` has been overridden")


def _is_of_use(record: logging.LogRecord) -> bool:
    # DeepSpeed 0.16.2 lists its whole configuration at each start; 0.19 warns only, as here.
    if record.name == "DeepSpeed" and record.levelno < logging.WARNING:
        return False
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
