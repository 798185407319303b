"""Every launcher that `xtuner train` knows starts the same run."""

import os
import sys
from pathlib import Path

import pytest
from support import harness
from support.harness import Layout

pytestmark = pytest.mark.slow


def test_slurm_starts_the_run_that_torchrun_does(reference, tmp_path):
    layout = Layout(ranks=2)
    scontrol = tmp_path / "bin" / "scontrol"
    scontrol.parent.mkdir()
    scontrol.write_text("#!/bin/sh\necho 127.0.0.1\n")  # the first host of the job
    scontrol.chmod(0o755)

    def as_srun_does() -> None:
        rank = os.environ.pop("RANK")
        for name in ("WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR"):
            del os.environ[name]
        os.environ.update(SLURM_PROCID=rank, SLURM_LOCALID=rank, SLURM_NTASKS="2")
        os.environ.update(SLURM_NODELIST="here", PATH=f"{scontrol.parent}:{os.environ['PATH']}")
        sys.argv[sys.argv.index("pytorch")] = "slurm"

    work_dir = tmp_path / "run"
    harness.finish("proxy", work_dir, *layout.options(), prepare=as_srun_does, ranks=2)
    assert _proxy(work_dir).keys() == _proxy(reference(layout).work_dir).keys()
    assert harness.differing(_proxy(work_dir), _proxy(reference(layout).work_dir)) == []


def _proxy(work_dir: Path) -> dict:
    weights = harness.weights(work_dir)
    return {name: tensor for name, tensor in weights.items() if name.startswith("proxy/")}


def test_slurm_outside_a_job_is_told_in_one_message(tiny, tmp_path):
    code, output = harness.run("proxy", tmp_path / "run", arguments=("--launcher", "slurm"))
    assert code == 1 and "Traceback" not in output
    assert "--launcher slurm needs SLURM_" in output
