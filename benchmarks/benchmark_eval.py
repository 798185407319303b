"""Measures how fast an evaluation answers, and what comes before its first answer.

The wrapper that `tools/eval.py` uses answers batches; VLMEvalKit's wrapper of XTuner's LLaVA
models (`vlmeval/vlm/llava/llava_xtuner.py` of 0.0.20) answers one question after the other: it
encodes the image, puts the features between the embeddings of the text, and generates. Its loop is
written down here for a Hugging Face LLaVA folder, so that both ask the same model the same
questions, greedily, in turn:

    python tools/benchmark_eval.py work_dirs/dpa_smollm2_135m_openmoji/tune/hf --out docs

`--startup` measures instead how long `tools/eval.py` takes to its first answer, and with what:

    python tools/benchmark_eval.py FOLDER --startup -- --benchmarks mmvp --data DIR
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from statistics import median

os.environ["DPA_WITHOUT_XTUNER"] = "1"
os.environ.setdefault("HF_HUB_OFFLINE", "1")

TOOLS = Path(__file__).resolve().parent
ONE_BY_ONE = "one by one"
QUESTIONS = Path("data/openmoji/heldout_questions.json")  # of the demo


class OneByOne:
    """VLMEvalKit's loop for XTuner's LLaVA models, on the parts of a LLaVA folder's model.

    Args:
        wrapper: A `LlavaFolder`, whose model, processor and chat template are used.
        max_new_tokens: Longest answer.
    """

    def __init__(self, wrapper, max_new_tokens: int):
        self.model, self.tokenizer = wrapper.model, wrapper.tokenizer
        self.image_processor, self.pads = wrapper.processor.image_processor, wrapper.pads
        self.wrapper, self.max_new_tokens = wrapper, max_new_tokens

    def __call__(self, image: Path, question: str) -> str:
        """Answers one question."""
        import torch
        from PIL import Image

        from dpa_xtuner.evaluation.model import padded

        config = self.model.config
        picture = Image.open(image).convert("RGB")
        if self.pads:
            colour = tuple(int(x * 255) for x in self.image_processor.image_mean)
            picture = padded(picture, colour)
        pixels = self.image_processor.preprocess(picture, return_tensors="pt")["pixel_values"]
        pixels = pixels.to(self.model.device, self.model.dtype)
        visual = self.model.vision_tower(pixels, output_hidden_states=True)
        features = visual.hidden_states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = self.model.multi_modal_projector(features)

        ids, _ = self.wrapper.encode_messages(messages(image, question))
        first = ids.index(config.image_token_index)
        chunks = ids[:first], ids[first + features.shape[1] :]
        embed = self.model.language_model.get_input_embeddings()
        before, after = (embed(torch.tensor([ids], device=pixels.device)) for ids in chunks)
        generated = self.model.language_model.generate(
            inputs_embeds=torch.cat([before, features.to(before.dtype), after], dim=1),
            generation_config=self.model.generation_config,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.wrapper.pad_id,
        )
        return self.tokenizer.decode(generated[0], skip_special_tokens=True).strip()


def messages(image: Path, question: str) -> list[dict]:
    """A question as OpenCompass's VLMEvalKit data sets ask it."""
    content = [{"type": "image", "image_url": str(image)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def load_questions(path: Path, count: int) -> list[tuple[Path, str]]:
    """The first questions of a LLaVA-format JSON; pictures are looked for beside it."""
    records = [r for r in json.loads(path.read_text()) if r.get("image")][:count]
    return [
        (
            path.parent / record["image"],
            record["conversations"][0]["value"].replace("<image>", "").strip(),
        )
        for record in records
    ]


def measure(args: argparse.Namespace) -> dict:
    """Times the ways in turn, so that a busy moment hits them all.

    Returns:
        What was measured on what; of each way the median of its samples/s, all of them, and the
        median of their ratios to one by one within a turn.
    """
    import torch

    from dpa_xtuner.evaluation.model import LlavaFolder

    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    questions = load_questions(args.questions, args.samples)
    wrapper = LlavaFolder(str(args.folder))
    alone = OneByOne(wrapper, args.max_new_tokens)
    # Longest first, as the evaluation's data sets come.
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i][1]))

    def batched(size: int) -> list[str]:
        """The answers in the order of the questions, asked so many at a time."""
        answers = [""] * len(questions)
        for start in range(0, len(order), size):
            places = order[start : start + size]
            asked = [messages(*questions[i]) for i in places]
            given = wrapper.generate(asked, max_out_len=args.max_new_tokens)
            for place, answer in zip(places, given, strict=True):
                answers[place] = answer
        return answers

    ways: dict[str, Callable[[], list[str]]] = {
        ONE_BY_ONE: lambda: [alone(*question) for question in questions]
    }
    for size in args.batch_sizes:
        ways[f"batch {size}"] = lambda size=size: batched(size)
    with torch.inference_mode():
        answers = {way: answer() for way, answer in ways.items()}  # warms up
        seconds = time_in_turn(ways, args.repeats)
    tokens = [len(wrapper.tokenizer(answer)["input_ids"]) for answer in answers[ONE_BY_ONE]]
    rows = {
        way: {
            "samples_per_s": len(questions) / median(taken),
            "ratio": median(map(truediv, seconds[ONE_BY_ONE], taken)),
            "same_answers": sum(map(str.__eq__, answers[way], answers[ONE_BY_ONE])),
            "all_s": taken,
        }
        for way, taken in seconds.items()
    }
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(load_before),
        "samples": len(questions),
        "tokens_per_answer": sum(tokens) / len(tokens),
        "image_tokens": wrapper.image_tokens,
        "dtype": str(wrapper.model.dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "rows": rows,
    }


def time_in_turn(ways: dict[str, Callable[[], object]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each way, one of each in every turn."""
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(repeats):
        for way, answer in ways.items():
            begin = time.perf_counter()
            answer()
            seconds[way].append(time.perf_counter() - begin)
    return seconds


def machine(load: float) -> str:
    """Says on what and with which versions, and whether others were computing as well."""
    import torch
    import transformers

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    text = (
        f"{(names or [platform.machine()])[0]}, {os.cpu_count()} CPUs; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    if load > 0.5:
        text += f"; BUSY MACHINE: the load was {load:.1f} before this process began to compute"
    return text


def throughput_table(result: dict) -> str:
    """The ways under a line that says what they did."""
    from dpa_xtuner.tables import markdown

    rows = [
        [
            way,
            f"{row['samples_per_s']:.2f}",
            f"{row['ratio']:.2f}",
            f"{row['same_answers']} of {result['samples']}",
        ]
        for way, row in result["rows"].items()
    ]
    title = (
        f"{result['samples']} questions, {result['image_tokens']} image tokens, answers of "
        f"{result['tokens_per_answer']:.1f} tokens; {result['dtype']}, {result['threads']} "
        f"threads; median of {len(result['rows'][ONE_BY_ONE]['all_s'])}\n{result['machine']}"
    )
    header = ["way", "samples/s", "times one by one", "same answers"]
    return f"{title}\n\n{markdown(header, rows)}"


WATCHED = ("torch", "transformers", "datasets", "mmengine", "opencompass", "vlmeval")
"""Packages whose import is timed, each without those of the others that it brings along."""


def watch_imports(seconds: dict[str, float]) -> None:
    """Adds to `seconds` what each of `WATCHED` takes to import in this process, from now on."""
    import builtins

    plain, stack = builtins.__import__, []

    def timed(name: str, *args, **kwargs):
        """Imports, and counts what a watched package takes without the others it imports."""
        top = name.partition(".")[0]
        level = args[3] if len(args) > 3 else kwargs.get("level", 0)
        if level or top not in WATCHED or (stack and stack[-1][0] == top):
            return plain(name, *args, **kwargs)
        stack.append([top, 0.0])
        begin = time.perf_counter()
        try:
            return plain(name, *args, **kwargs)
        finally:
            taken = time.perf_counter() - begin
            _, others = stack.pop()
            seconds[top] = seconds.get(top, 0.0) + taken - others
            if stack:
                stack[-1][1] += taken

    builtins.__import__ = timed


def first_answer(arguments: list[str], out: Path, begun: float) -> None:
    """Runs `tools/eval.py` in this process and writes what came before its first answer.

    Args:
        arguments: Of `tools/eval.py`.
        out: JSON of seconds to write.
        begun: `time.time()` when this process was started.
    """
    imports: dict[str, float] = {}
    watch_imports(imports)
    spent = {"model": 0.0, "data": 0.0, "first batch": 0.0}
    sys.path.insert(0, str(TOOLS))

    def counted(what: str, function: Callable, last: bool = False) -> Callable:
        """`function`, its seconds without imports added to `spent`; the last one writes `out`."""

        def call(*args, **kwargs):
            """Calls it."""
            begin, before = time.perf_counter(), sum(imports.values())
            result = function(*args, **kwargs)
            spent[what] += time.perf_counter() - begin - (sum(imports.values()) - before)
            if last and not out.exists():
                total = time.time() - begun
                known = sum(imports.values()) + sum(spent.values())
                split = {**{f"import {name}": s for name, s in imports.items()}, **spent}
                out.write_text(json.dumps({**split, "other": total - known, "total": total}))
            return result

        return call

    import eval as tool  # tools/eval.py

    from dpa_xtuner.evaluation.dataset import EvaluationDataset
    from dpa_xtuner.evaluation.model import LlavaFolder

    LlavaFolder.__init__ = counted("model", LlavaFolder.__init__)
    EvaluationDataset.__init__ = counted("data", EvaluationDataset.__init__)
    LlavaFolder.generate = counted("first batch", LlavaFolder.generate, last=True)
    sys.argv = ["eval.py", *arguments]
    sys.exit(tool.main())


def measure_startup(args: argparse.Namespace) -> dict:
    """Starts `tools/eval.py` several times, in new work dirs: medians of what comes first."""
    load_before = os.getloadavg()[0]
    found: list[dict[str, float]] = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            out = Path(folder, "seconds.json")
            command = [sys.executable, __file__, "--first-answer", str(out), str(time.time())]
            asked = [str(args.folder), *args.eval_arguments]
            done = subprocess.run(
                [*command, *asked, "--work-dir", str(Path(folder, "eval"))],
                capture_output=True,
                text=True,
            )
            if done.returncode or not out.exists():
                print(done.stdout[-2000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
                raise SystemExit("tools/eval.py failed, see above.")
            found.append(json.loads(out.read_text()))
    names = sorted({name for run in found for name in run} - {"total"})
    split = {name: median(run.get(name, 0.0) for run in found) for name in names}
    split["total"] = median(run["total"] for run in found)
    return {
        "command": shlex.join(["python", *sys.argv]),
        "machine": machine(load_before),
        "repeats": args.repeats,
        "seconds": split,
        "all": found,
    }


def startup_table(result: dict) -> str:
    """What comes before the first answer, the longest first."""
    from dpa_xtuner.tables import markdown

    seconds = dict(result["seconds"])
    total = seconds.pop("total")
    rows = [
        [name, f"{taken:.1f}", f"{taken / total:.0%}"]
        for name, taken in sorted(seconds.items(), key=lambda item: -item[1])
    ]
    rows.append(["total", f"{total:.1f}", "100%"])
    title = f"To the first batch's answers; median of {result['repeats']}\n{result['machine']}"
    return f"{title}\n\n{markdown(['part', 's', 'share'], rows)}"


def main() -> int:
    """Measure, print the table, and write the JSON."""
    if sys.argv[1:2] == ["--first-answer"]:  # a process of measure_startup
        first_answer(sys.argv[4:], Path(sys.argv[2]), float(sys.argv[3]))
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="LLaVA folder")
    parser.add_argument("--questions", type=Path, default=QUESTIONS,
                        help=f"LLaVA-format JSON; default: {QUESTIONS}")  # fmt: skip
    parser.add_argument("--samples", type=int, default=48, help="questions of it; default: 48")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--max-new-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--startup", action="store_true",
                        help="time to the first answer of tools/eval.py, whose "
                        "arguments follow behind --")  # fmt: skip
    parser.add_argument("--out", type=Path,
                        help="folder for benchmark_eval.json or _startup.json")  # fmt: skip
    place = sys.argv.index("--") if "--" in sys.argv else len(sys.argv)
    args = parser.parse_args(sys.argv[1:place])
    args.eval_arguments = sys.argv[place + 1 :]  # of tools/eval.py
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
    if args.startup:
        name, result = "benchmark_eval_startup.json", measure_startup(args)
        print(startup_table(result))
    else:
        name, result = "benchmark_eval.json", measure(args)
        print(throughput_table(result))
    if args.out:
        from dpa_xtuner.files import write_json

        write_json(args.out / name, result)
    return 0


if __name__ == "__main__":
    sys.exit(main())
