"""Check all data of a config, without training."""

from pathlib import Path

from mmengine.registry import DATASETS, DefaultScope

from dpa_xtuner.data import check_dataset
from dpa_xtuner.precision import Precision
from dpa_xtuner.stages.build import dataset_config
from dpa_xtuner.stages.run import Run
from dpa_xtuner.stages.settings import config_from_file, read_settings


def check_config(path: Path, options: dict | None, sample: int | None) -> bool:
    """Check the data of ``align`` and ``tune``, and print a report on each.

    ``proxy`` reads the captions of ``align``.

    Args:
        path: a DPA config.
        options: settings as in ``--cfg-options``.
        sample: number of samples whose images are opened; None opens all.

    Returns:
        Whether all data can be used.

    Raises:
        DPAError: settings, models or data files can't be read.
    """
    cfg = config_from_file(path, options)
    run = Run.of(cfg, read_settings(cfg), Precision("fp32"))  # no weight is loaded
    ok = True
    for name, stage in run.stages.items():
        if not stage.sees_pictures:
            continue
        dataset = dataset_config(run, stage)
        with DefaultScope.overwrite_default_scope("mmengine"):
            everything = dict(skip_limit=1.0, held_out=0, share=1.0, weights=None)
            built = DATASETS.build(dataset | everything)
        report = check_dataset(built, sample=sample)
        print(f"\nStage {name}: {dataset['data_path']}\n{report}")
        ok = ok and report.ok
    return ok
