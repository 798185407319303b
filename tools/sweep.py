"""Run one config with a list or a grid of settings, and make a table of the results.

    python tools/sweep.py CONFIG --grid method=vanilla,pmo,cmo,dpa proxy.lora.r=64,256
    python tools/sweep.py CONFIG --list runs.yaml

Each run has its own folder in the work dir. The table is written there, as sweep.md and
sweep.csv. If a run fails, the others still run. After an interruption, run the same command
again: finished runs are skipped. All other arguments are passed to tools/train.py.
"""

import argparse
import os
import sys
from pathlib import Path

from _configs import check_options, find_config
from _processes import run as run_command

TRAIN = Path(__file__).with_name("train.py")


def main() -> int:
    """Run the sweep; the exit code is 1 if any run did not finish."""
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("config", help="path or name of a config")
    parser.add_argument("--grid", nargs="+", default=[], metavar="SETTING=VALUE,VALUE")
    parser.add_argument("--list", metavar="FILE", help="YAML, JSON or .py with a list 'runs'")
    parser.add_argument("--work-dir", help="default: work_dirs/<config's name>-sweep")
    parser.add_argument("--cfg-options", nargs="+", default=[], help="settings of all runs")
    parser.add_argument("--rehearse", action="store_true", help="rehearse each run")
    parser.add_argument("--table", action="store_true", help="make the table; run nothing")
    known, others = parser.parse_known_args()
    check_options(known.cfg_options)
    config = find_config(known.config)
    work_dir = Path(known.work_dir or f"work_dirs/{config.stem}-sweep")
    if known.rehearse:
        os.environ["DPA_REHEARSE"] = "1"
    suffix = "-rehearsal" if os.environ.get("DPA_REHEARSE", "0") not in ("", "0") else ""
    work_dir = Path(f"{work_dir}{suffix}")

    import dpa_xtuner.plugin  # noqa: F401
    from dpa_xtuner.errors import cli_errors
    from dpa_xtuner.planning import sweep

    with cli_errors():
        if not known.table:
            _run_all(known, others, config, work_dir, sweep)
        print(f"\n{sweep.save_table(work_dir, suffix)}", flush=True)
        statuses = [run["status"] for run in sweep.read_runs(work_dir).values()]
    return 0 if statuses and set(statuses) == {"finished"} else 1


def _run_all(known, others: list[str], config: Path, work_dir: Path, sweep) -> None:
    wanted = sweep.read_list(known.list) if known.list else sweep.grid(known.grid)
    common = dict(option.split("=", 1) for option in known.cfg_options)
    runs = sweep.plan(config, wanted, common)
    for run in runs:
        if run.refused:
            print(f"{run.name} can't be run: {run.refused}\n", file=sys.stderr, flush=True)
            sweep.write_status(work_dir, run, "refused")
    for number, run in enumerate(runs, 1):
        if run.refused or sweep.is_run_finished(work_dir, run):
            continue
        print(f"\nRun {number} of {len(runs)}: {run.name}", flush=True)
        sweep.write_status(work_dir, run, "running")
        options = [f"{key}={value}" for key, value in (common | run.options).items()]
        command = [sys.executable, str(TRAIN), str(config), "--work-dir", str(work_dir / run.name)]
        command += [*others, *(["--cfg-options", *options] if options else [])]
        try:
            code = run_command(command)
        except SystemExit:
            sweep.write_status(work_dir, run, "stopped")
            raise
        sweep.write_status(work_dir, run, "finished" if code == 0 else f"failed (exit code {code})")


if __name__ == "__main__":
    sys.exit(main())
