"""Train all stages of a config, as ``xtuner train`` does, with a proper exit code and a summary.

It takes all arguments of ``xtuner train``, and reads the same environment variables:
NPROC_PER_NODE, NNODES, NODE_RANK, PORT, ADDR.
"""

import argparse
import importlib.util
import json
import os
import random
import sys
from pathlib import Path

from _configs import check_options, find_config, say
from _processes import run
from filelock import FileLock, Timeout

from dpa_xtuner.layout import STAGE_NAMES, STATE_FILE


def command(config: Path, arguments: list[str]) -> list[str]:
    """Make the command that ``xtuner train`` would run, with this interpreter."""
    script = str(Path(__file__).with_name("_xtuner_train.py"))
    nodes, processes = (int(os.environ.get(name, 1)) for name in ("NNODES", "NPROC_PER_NODE"))
    if "slurm" in arguments or nodes * processes == 1:
        return [sys.executable, script, str(config), *arguments]
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={nodes}"]
    launcher += [
        f"--nproc_per_node={processes}",
        f"--node_rank={os.environ.get('NODE_RANK', 0)}",
        f"--master_addr={os.environ.get('ADDR', '127.0.0.1')}",
        f"--master_port={os.environ.get('PORT') or random.randint(20000, 29999)}",
    ]
    return [*launcher, script, str(config), *arguments, "--launcher", "pytorch"]


def summary(work_dir: Path) -> str:
    """Summarise each stage in a line: status, steps, time, measurements and written folders."""
    states = {stage: _state(work_dir / stage / STATE_FILE) for stage in STAGE_NAMES}
    begun = [stage for stage in STAGE_NAMES if states[stage]]
    if not begun:
        return "No stage has begun."
    lines = [f"{'stage':<7}{'status':<10}{'steps':>6}{'seconds':>9}  measured; written"]
    # Stages run in order, so the method has no stage before the first that has begun.
    for stage in STAGE_NAMES[STAGE_NAMES.index(begun[0]) :]:
        state = states[stage]
        measured = ", ".join(f"{k} {v:.3f}" for k, v in state.get("measured", {}).items())
        written = ", ".join(state.get("writes", {}).values())
        lines.append(
            f"{stage:<7}{state.get('status', '-'):<10}{state.get('steps', '-'):>6}"
            f"{state.get('seconds', '-'):>9}  "
            + "; ".join(filter(None, (state.get("reason"), measured, written)))
        )
    return "\n".join(lines)


def _state(path: Path) -> dict:
    try:
        state = json.loads(path.read_text())
    except FileNotFoundError:
        return {}
    except json.JSONDecodeError:  # the run has reported it
        return {"status": "broken"}
    if state.get("status") == "running" and not _is_locked(path.with_name(".lock")):
        return state | {"status": "stopped"}  # the run was killed before it could write this
    return state


def _is_locked(path: Path) -> bool:
    try:
        with FileLock(path, timeout=0):
            return False
    except Timeout:
        return True


def _check_deepspeed(name: str) -> None:
    """Refuse a ``--deepspeed`` that is neither a file nor one of XTuner's names."""
    if not importlib.util.find_spec("deepspeed"):
        from dpa_xtuner.errors import install

        raise SystemExit(f"--deepspeed needs DeepSpeed: {install('deepspeed')}")
    folder = Path(importlib.util.find_spec("xtuner").origin).parent / "configs" / "deepspeed"
    known = sorted(path.stem for path in folder.glob("*.json"))
    known += ["zero1", "zero2", "zero3"]
    if not Path(name).is_file() and name not in known:
        raise SystemExit(f"--deepspeed {name} is neither a file nor one of {', '.join(known)}.")


def main() -> int:
    """Train, and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument("--work-dir", help="default: work_dirs/<config's name>")
    parser.add_argument("--rehearse", action="store_true", help="tiny models, a few steps a stage")
    parser.add_argument("--deepspeed", metavar="zero2", help="or another of XTuner's, or a file")
    parser.add_argument("--cfg-options", nargs="+", action="extend", default=[], help="settings")
    known, others = parser.parse_known_args()
    check_options(known.cfg_options)
    if known.cfg_options:
        others += ["--cfg-options", *known.cfg_options]
    config = find_config(known.config)
    if known.rehearse:
        os.environ["DPA_REHEARSE"] = "1"
    if known.deepspeed is not None:
        _check_deepspeed(known.deepspeed)
        others += ["--deepspeed", known.deepspeed]
    work_dir = (known.work_dir or f"work_dirs/{config.stem}").rstrip("/")
    code = run(command(config, ["--work-dir", work_dir, *others]))
    rehearsal = "-rehearsal" if os.environ.get("DPA_REHEARSE", "0") not in ("", "0") else ""
    say(f"\n{summary(Path(work_dir + rehearsal))}")
    return code


if __name__ == "__main__":
    sys.exit(main())
