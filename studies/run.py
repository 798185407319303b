"""Run a study: python -m studies.run quick.

Each stage of each run is `xtuner train` in a forked process, so that XTuner is imported once.
Runs share a seed's LLM, encoder, data and proxies. What is finished, here or in another results
file of the same protocol, is skipped: the same command continues a study.
"""

# ruff: noqa: E402, the environment is set before the imports
import argparse
import gc
import hashlib
import json
import os
import platform
import shutil
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
# Imports ask for the GPU, bitsandbytes for its capability. Asked through CUDA, no forked process
# could use it. No run needs bitsandbytes.
os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"
sys.modules["bitsandbytes"] = None  # type: ignore[assignment]

import numpy as np
import torch
import transformers
from PIL import Image
from transformers import AutoTokenizer, CLIPImageProcessor, LlamaForCausalLM

import dpa_xtuner.plugin  # noqa: F401, registers what a config names
from dpa_xtuner.data import dataset, images
from dpa_xtuner.files import read_json, whole_folder, write_json, write_text
from dpa_xtuner.layout import PROJECTOR
from dpa_xtuner.stages.artifacts import is_finished
from studies import schemes, world  # noqa: F401, schemes registers its classes
from studies.measure import MEASURES
from studies.plan import STUDIES, THEN, Cell, Sizes, read_runs

HERE = Path(__file__).parent
os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a forked process would wait for its threads


def main() -> int:
    """Run what is not finished; the exit code is 1 if a run failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("study", choices=STUDIES)
    parser.add_argument("--seeds", type=int, nargs="+", help="in place of the study's own")
    parser.add_argument("--parts", nargs="+", help="of the study; default: all")
    parser.add_argument("--results", type=Path, help="default: studies/results/<study>.jsonl")
    parser.add_argument("--work-dir", type=Path, default=Path("work_dirs/study"))
    parser.add_argument("--processes", type=int, default=os.cpu_count())
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start none after")
    given = parser.parse_args()
    torch.set_num_threads(1)
    study, end = STUDIES[given.study], time.monotonic() + 60 * given.minutes
    results = given.results or HERE / "results" / f"{given.study}.jsonl"
    results.parent.mkdir(parents=True, exist_ok=True)
    folder = given.work_dir / study.sizes.protocol
    parts = [part for part in study.parts if not given.parts or part.name in given.parts]
    known = finished(results.parent, study.sizes)
    seeds = [
        seed
        for seed in given.seeds or study.seeds
        if any(cell not in known for part in parts for cell in part.cells(seed))
    ]
    left_out = [seed for seed in seeds if not is_same_world(folder, seed, known)]
    failed = in_parallel(
        {f"world{seed}": partial(make_world, folder, study.sizes, seed)
         for seed in seeds if seed not in left_out},
        given.processes, end,
    )  # fmt: skip
    left_out = [seed for seed in seeds if not is_same_world(folder, seed, known)]
    seeds = [seed for seed in seeds if seed not in left_out]
    for part in parts:
        for seed in seeds:
            known = finished(results.parent, study.sizes)
            cells = [cell for cell in part.cells(seed) if cell not in known]
            if not cells or not world_of(folder, seed).exists():
                continue
            if time.monotonic() > end:
                break
            print(f"{part.name}, seed {seed}: {len(cells)} runs", flush=True)
            failed += run_seed(folder, results, study.sizes, cells, given.processes, end)
    print(f"Failed: {', '.join(failed)}" if failed else "No run failed")
    wanted = {cell for part in parts for seed in seeds for cell in part.cells(seed)}
    if left := wanted - finished(results.parent, study.sizes).keys():
        print(f"Not finished: {len(left)} runs. The same command continues")
    if left_out:
        print(
            f"Left out: seeds {', '.join(map(str, left_out))}. Their finished runs have another "
            "LLM or encoder than is drawn here, or don't say which. Give other seeds (--seeds), "
            "or another folder for all of them (--results)"
        )
    return bool(failed)


def finished(folder: Path, sizes: Sizes) -> dict[Cell, str]:
    """Name the world of each run that results files in a folder hold already."""
    runs = read_runs(folder, sizes.protocol)
    return {cell: line.get("world", "") for cell, line in runs.items()}


def make_world(folder: Path, sizes: Sizes, seed: int) -> None:
    """Train a seed's LLM and write its encoder, unless they are there."""
    place = world_of(folder, seed)
    if place.exists():
        return
    with whole_folder(place) as made:
        world.write_encoder(made / "encoder", seed)
        accuracy = world.train_llm(made / "llm", sizes.llm_steps, seed)
        write_json(made / "world.json", {"llm_accuracy": accuracy})
    print(f"The LLM of seed {seed} gets {accuracy:.1%} right from a description", flush=True)


def world_of(folder: Path, seed: int) -> Path:
    """Name the folder of a seed's LLM and encoder."""
    return folder / f"world{seed}"


def world_hash(place: Path) -> str:
    """Hash the files of an LLM's and an encoder's weights."""
    files = (place / f"{name}/model.safetensors" for name in ("llm", "encoder"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:8]


def is_same_world(folder: Path, seed: int, known: dict[Cell, str]) -> bool:
    """Tell whether a seed's finished runs, if any, have the LLM and encoder that are here.

    Another machine, or other packages, may draw others of the same seed.
    """
    worlds = {world for cell, world in known.items() if cell.seed == seed}
    if "" in worlds:  # lines that don't say which: no world is known to be theirs
        return False
    place = world_of(folder, seed)
    return not place.exists() or worlds <= {world_hash(place)}


def make_data(folder: Path, sizes: Sizes, seed: int, levels: Iterable[int]) -> Path:
    """Write a seed's pictures, captions of some levels and questions, unless they are there."""
    data = folder / f"seed{seed}"
    draw = np.random.default_rng([seed, 1])
    held_out = 256
    told = world.scenes(sizes.captions + held_out, draw)
    if not data.exists():
        with whole_folder(data) as made:
            _write_pictures(made, "c", told, draw)
            for name, count in (("questions", sizes.questions), ("asked", sizes.asked)):
                about = world.scenes(count // 4, draw)
                _write_pictures(made, name[0], about, draw)
                talks = [
                    (f"{name[0]}{i}", f"<image>\n{question}", answer)
                    for i, scene in enumerate(about)
                    for question, answer in scene.questions()
                ]
                _write_records(made / f"{name}.jsonl", talks)
    for level in levels:
        if not (file := data / f"captions{level}.jsonl").exists():
            draw = np.random.default_rng([seed, 2, level])
            talks = [
                (f"c{i}", "<image>", scene.caption(level, draw)) for i, scene in enumerate(told)
            ]
            _write_records(file, talks)
    return data


def _write_pictures(folder: Path, name: str, scenes: list[world.Scene], draw) -> None:
    for i, scene in enumerate(scenes):
        Image.fromarray(world.picture(scene, draw)).save(folder / f"{name}{i}.png")


def _write_records(file: Path, talks: list[tuple[str, str, str]]) -> None:
    records = [
        {"id": str(i), "image": f"{image}.png", "conversations": [
            {"from": "human", "value": human}, {"from": "gpt", "value": gpt}]}
        for i, (image, human, gpt) in enumerate(talks)
    ]  # fmt: skip
    write_text(file, "".join(json.dumps(record) + "\n" for record in records))


def keep_pictures(data: Path, encoder: Path) -> None:
    """Load a seed's pictures now: its runs all load them alike, and find them in memory."""
    load = getattr(images.load_pixels, "unkept", images.load_pixels)
    processor = CLIPImageProcessor.from_pretrained(encoder)
    kept = {str(file): load(file, processor, False) for file in data.absolute().glob("*.png")}

    def load_kept(path, *how):
        return kept[str(path)] if str(path) in kept else load(path, *how)

    load_kept.unkept = load  # type: ignore[attr-defined]
    images.load_pixels = dataset.load_pixels = load_kept
    gc.freeze()  # or each child's garbage collection walks over, and so copies, all of it


def run_seed(
    folder: Path, results: Path, sizes: Sizes, cells: list[Cell], processes: int, end: float
) -> list[str]:
    """Train the runs of a seed, proxies first.

    Returns:
        Names of those that failed.
    """
    data = make_data(folder, sizes, cells[0].seed, {cell.level for cell in cells})
    keep_pictures(data, world_of(folder, cells[0].seed) / "encoder")
    proxies = {folder / cell.proxy: cell for cell in cells if cell.proxy}
    failed = in_parallel(
        {place.name: partial(train, folder, cell, place, ["proxy"])
         for place, cell in proxies.items() if not _has_proxy(place)},
        processes, end,
    )  # fmt: skip
    ready = [cell for cell in cells if not cell.proxy or _has_proxy(folder / cell.proxy)]
    return failed + in_parallel(
        {cell.name: partial(one_run, folder, results, sizes, cell) for cell in ready},
        processes, end,
    )  # fmt: skip


def _has_proxy(place: Path) -> bool:
    return is_finished(place / "proxy")


def proxy_reads(llm: Path, adapter: Path) -> float:
    """Measure how well a proxy, an adapter of an LLM, still reads descriptions."""
    from peft import PeftModel  # after the plugin, which mends what peft imports

    original = LlamaForCausalLM.from_pretrained(llm)
    proxy = PeftModel.from_pretrained(original, str(adapter)).eval()
    words = AutoTokenizer.from_pretrained(llm)
    return world.reads(proxy, words, np.random.default_rng(0))


def one_run(folder: Path, results: Path, sizes: Sizes, cell: Cell) -> None:
    """Train `align` and `tune`, and append what was measured to the results."""
    began, work_dir = time.monotonic(), folder / cell.name
    own_world = world_of(folder, cell.seed)
    shutil.rmtree(work_dir, ignore_errors=True)
    if cell.proxy:
        shutil.copytree(folder / cell.proxy / "proxy", work_dir / "proxy")
    then: dict[str, object] = {}
    if cell.variant in THEN:
        train(folder, cell, work_dir, ["align"])
        first = (work_dir / "align").rename(work_dir / "first_align")
        then = {"method": "vanilla", "custom_hooks.0.projector": str(first / PROJECTOR)}
        then |= THEN[cell.variant]
    train(folder, cell, work_dir, ["align", "tune"], then)
    measured = read_json(work_dir / "align/stage.json", "")["measured"]
    proxy = read_json(work_dir / "proxy/stage.json", "").get("measured", {})
    if cell.proxy:
        measured["proxy_reads"] = proxy_reads(own_world / "llm", work_dir / "proxy/llm_adapter")
    line = {
        "protocol": sizes.protocol,
        "cell": vars(cell),
        "measured": proxy | measured,
        "caption_tokens": 3 * cell.level + 4 if cell.level else 17,
        "tune": read_json(work_dir / f"tune/{MEASURES}", ""),
        "llm_accuracy": read_json(own_world / "world.json", "")["llm_accuracy"],
        "world": world_hash(own_world),
        "seconds": round(time.monotonic() - began, 1),
        "machine": f"{platform.machine()}, torch {torch.__version__}, "
        f"transformers {transformers.__version__}",
    }
    with results.open("a", encoding="utf-8") as file:  # one write, so that lines stay whole
        file.write(json.dumps(line) + "\n")
    shutil.rmtree(work_dir)
    print(f"  {cell.name}: {line['seconds']} s", flush=True)


def train(
    folder: Path,
    cell: Cell,
    work_dir: Path,
    stages: list[str],
    changed: dict[str, object] | None = None,
) -> None:
    """Run `xtuner train` for each of the stages, in a process of its own.

    Args:
        folder: of the world.
        cell: the run.
        work_dir: where its stages are.
        stages: to be trained, in order.
        changed: settings in place of the run's own.

    Raises:
        SystemExit: a stage failed; the end of its log is printed.
    """
    data = (folder / f"seed{cell.seed}").absolute()
    options = {
        "method": cell.method,
        "captions.data_path": f"{data}/captions{cell.level}.jsonl",
        "captions.image_folder": data,
        "captions.share": cell.share,
        "instructions.data_path": f"{data}/questions.jsonl",
        "instructions.image_folder": data,
        "custom_hooks.0.questions": f"{data}/asked.jsonl",
        "randomness.seed": cell.seed,
        **cell.settings,
        **(changed or {}),
    }
    argv = ["train.py", str(HERE / "config.py"), "--work-dir", str(work_dir), "--cfg-options"]
    argv += [f"{key}={value}" for key, value in options.items()]
    work_dir.mkdir(parents=True, exist_ok=True)
    for stage in stages:
        log = work_dir / f"{stage}.log"
        environment = {"DPA_STAGE": stage, "DPA_WORLD": str(world_of(folder, cell.seed).absolute()),
                       "DPA_CACHE": str(folder.absolute() / "tokens")}  # fmt: skip
        child = fork(partial(_xtuner_train, argv, environment), log)
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise SystemExit(f"{work_dir.name}, {stage}:\n{log.read_text()[-3000:]}")


def _xtuner_train(argv: list[str], environment: dict[str, str]) -> None:
    from xtuner.tools import train as xtuner_train

    os.environ.update(environment)
    sys.argv = argv
    xtuner_train.main()


def fork(task: Callable[[], None], log: Path | None = None) -> int:
    """Do something in a child process, its output in a file; return its id."""
    sys.stdout.flush()
    if child := os.fork():
        return child
    code = 1
    try:
        if log is not None:
            out = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(out, 1)
            os.dup2(out, 2)
        task()
        code = 0
    except SystemExit as stop:
        code = 1 if stop.code else 0
        print(stop.code or "", file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os._exit(code)


def in_parallel(
    tasks: dict[str, Callable[[], None]], processes: int, end: float = float("inf")
) -> list[str]:
    """Do tasks in child processes, some at a time.

    Args:
        tasks: by name.
        processes: at a time.
        end: monotonic time after which none is started.

    Returns:
        Names of those that failed.
    """
    running: dict[int, str] = {}
    failed = []
    waiting = list(tasks.items())
    while waiting or running:
        if waiting and time.monotonic() > end:
            waiting = []
            continue
        if waiting and len(running) < processes:
            name, task = waiting.pop(0)
            running[fork(task)] = name
            continue
        child, status = os.wait()
        name = running.pop(child)
        if os.waitstatus_to_exitcode(status):
            failed.append(name)
    return failed


if __name__ == "__main__":
    from mmengine.config import config as mmengine_config
    from xtuner.tools import train as _  # noqa: F401, takes seconds, so once for all children

    # A third of a second of each stage goes into laying out the dumped config.
    mmengine_config.FormatCode = lambda code, **style: (code, True)
    sys.exit(main())
