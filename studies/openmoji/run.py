"""Run the study with SmolLM2-135M and drawings: python -m studies.openmoji.

    python -m studies.openmoji --processes 6          # on a GPU: all runs of the large budget
    python -m studies.openmoji --budget small --methods vanilla dpa --seeds 20

Each run is `tools/train.py` with the demo's models and questions, on the machine's device. It
writes a file of its own into studies/results/; `python -m studies.report` merges all files there,
wherever they were written. What is finished is skipped: the same command continues.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path

import torch

import dpa_xtuner.plugin  # noqa: F401, mends what the others import
from dpa_xtuner.demo import report, scenes, trained
from dpa_xtuner.demo.prepare import LLM_FOLDER, VIT_FOLDER, copy_vit, write_smollm2
from dpa_xtuner.files import whole_folder, write_json
from dpa_xtuner.layout import ALIGN, PROXY, TUNE
from dpa_xtuner.stages.artifacts import is_finished, read_state
from dpa_xtuner.stages.methods import METHODS as PIPELINES
from dpa_xtuner.versions import require_transformers
from studies.openmoji.plan import BUDGETS, HERE, Budget, Run, load, planned
from studies.openmoji.styles import STYLES, write_data
from studies.plan import METHODS

ROOT = HERE.parents[1]


@dataclass(frozen=True)
class Study:
    """Folders and budget of a study; see the command's options."""

    budget: Budget
    models: Path
    work_dir: Path
    results: Path
    name: str

    def data(self, seed: int) -> Path:
        """Return the folder of a seed's pictures, captions and questions."""
        return self.work_dir / f"seed{seed}"

    def proxy(self, run: Run) -> Path:
        """Return the folder of the proxy of a style and seed, which its methods share."""
        return self.work_dir / f"{run.style}-proxy-{run.seed}"

    def make_proxy(self, run: Run) -> str:
        """Train the proxy; return what went wrong, if anything."""
        place = self.proxy(run)
        if is_finished(place / PROXY):
            return ""
        return self._train(replace(run, method="pmo"), place, {"DPA_STAGE": PROXY})

    def make_run(self, run: Run) -> str:
        """Train `align` and `tune`, ask the questions and write the file of results."""
        place, proxy = self.work_dir / run.name, self.proxy(run)
        if not is_finished(proxy / PROXY):
            return f"{run.name}: its proxy failed\n"
        if PIPELINES[run.method].proxy and not (place / PROXY).exists():
            with whole_folder(place / PROXY) as copy:
                shutil.copytree(proxy / PROXY, copy, dirs_exist_ok=True)
        if wrong := self._train(run, place):
            return wrong
        states = {PROXY: read_state(proxy / PROXY)}
        states |= {stage: read_state(place / stage) for stage in (ALIGN, TUNE)}
        device = torch.cuda.get_device_name() if torch.cuda.is_available() else platform.machine()
        content = {
            "protocol": self.budget.protocol,
            "run": asdict(run),
            "measured": states[PROXY]["measured"] | states[ALIGN]["measured"],
            "answers": self._answers(run, place),
            "seconds": {stage: state["seconds"] for stage, state in states.items()},
            "machine": f"{device}, {states[ALIGN]['origin']['precision']}, "
            f"torch {torch.__version__}",
        }
        write_json(self.results / f"openmoji-{self.name}-{run.name}.json", content)
        shutil.rmtree(place)
        print(f"  {run.name}: {sum(content['seconds'].values()):.0f} s", flush=True)
        return ""

    def _train(self, run: Run, place: Path, environment: dict[str, str] | None = None) -> str:
        data = self.data(run.seed).absolute()
        options = {
            "method": run.method,
            "captions.data_path": data / f"{run.style}.json",
            "captions.image_folder": data,
            "instructions.data_path": data / scenes.QUESTIONS,
            "instructions.image_folder": data,
            "randomness.seed": run.seed,
            **self.budget.settings(PIPELINES[run.method].proxy),
        }
        command = [sys.executable, ROOT / "tools/train.py", HERE / "config.py"]
        command += ["--work-dir", place, "--cfg-options", *(f"{k}={v}" for k, v in options.items())]
        folders = {"DPA_DATA": self.models.absolute(), "DPA_CACHE": self.work_dir / "tokens"}
        place.mkdir(parents=True, exist_ok=True)
        with (place / "log.txt").open("w+") as log:
            done = subprocess.run(
                list(map(str, command)), stdout=log, stderr=subprocess.STDOUT,
                env=os.environ | {k: str(v) for k, v in folders.items()} | (environment or {}),
            )  # fmt: skip
            log.seek(0)
            return f"{place.name}:\n{log.read()[-2000:]}\n" if done.returncode else ""

    def _answers(self, run: Run, place: Path) -> dict[str, dict]:
        # On the CPU, on each machine: it takes seconds, and all are asked alike.
        asked = report.load_questions(self.data(run.seed) / scenes.HELD_OUT_QUESTIONS)
        found = report.ask_questions(trained.after_training(self.models, place), asked)
        return {kind: asdict(row) for kind, row in found.rows.items()}


def main() -> int:
    """Run what is not finished; the exit code is 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "large" if torch.cuda.is_available() else "small"
    parser.add_argument("--budget", choices=BUDGETS, default=default, help="default: %(default)s")
    parser.add_argument("--styles", nargs="+", choices=STYLES, default=STYLES)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, nargs="+", help="default: all planned runs")
    parser.add_argument("--data", type=Path, default="data", help="the demo's; made if missing")
    parser.add_argument("--results", type=Path, default=HERE.parent / "results")
    parser.add_argument("--work-dir", type=Path, default="work_dirs/openmoji")
    parser.add_argument("--processes", type=int, default=1)
    given = parser.parse_args()
    require_transformers("5", "tokenizer.add_bos_token, and so this study,")
    chosen, plan = BUDGETS[given.budget], planned(given.budget)
    os.environ.setdefault("OMP_NUM_THREADS", str((os.cpu_count() or 1) // given.processes or 1))
    study = Study(chosen, given.data, given.work_dir / chosen.protocol, given.results, given.budget)
    for folder in (study.models / "models", study.results):
        folder.mkdir(parents=True, exist_ok=True)
    write_smollm2(study.models / LLM_FOLDER)
    copy_vit(study.models / VIT_FOLDER)
    failed: list[str] = []
    # Processes that start anew: one that has seen a GPU can't be forked.
    with ProcessPoolExecutor(given.processes, mp_context=get_context("spawn")) as pool:
        do = map if given.processes == 1 else pool.map
        for seed in given.seeds or sorted({run.seed for run in plan}):
            wanted = [Run(style, m, seed) for style in given.styles for m in given.methods]
            known = load(study.results, chosen.protocol)
            runs = [r for r in wanted if r not in known and (given.seeds or r in plan)]
            if not runs:
                continue
            print(f"Seed {seed}: {len(runs)} runs", flush=True)
            write_data(study.data(seed), chosen.recipe(seed))
            proxies = {run.style: run for run in runs}.values()
            failed += filter(None, do(study.make_proxy, proxies))
            failed += filter(None, do(study.make_run, runs))
    print("".join(failed) or "No run failed")
    return bool(failed)
