"""Measure how fast an evaluation answers, in batches and one question after the other.

The wrapper that ``tools/eval.py`` uses answers batches. VLMEvalKit's wrapper of XTuner's LLaVA
models (``vlmeval/vlm/llava/llava_xtuner.py`` of 0.0.20) answers one question after the other: it
encodes the image, puts the features between the embeddings of the text, and generates.
``OneByOne`` is that loop for a Hugging Face LLaVA folder, so that both ask the same model the same
questions, greedily, in turn:

    python benchmarks/benchmark_eval.py work_dirs/dpa_smollm2_135m_openmoji/tune/hf --out docs
"""

import argparse
import json
import os
import platform
import shlex
import sys
import time
from collections.abc import Callable
from operator import truediv
from pathlib import Path
from statistics import median

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
import transformers

from dpa_xtuner.evaluation.model import LlavaFolder
from dpa_xtuner.files import write_json
from dpa_xtuner.tables import markdown
from dpa_xtuner.versions import language_model

ONE_BY_ONE = "one by one"
QUESTIONS = Path("data/openmoji/heldout_questions.json")  # of the demo


class OneByOne:
    """VLMEvalKit's loop for XTuner's LLaVA models, on the modules of a LLaVA folder's model.

    Args:
        wrapper: its model, processor and chat template are used.
        max_new_tokens: longest answer.
    """

    def __init__(self, wrapper: LlavaFolder, max_new_tokens: int) -> None:
        self.wrapper, self.model, self.max_new_tokens = wrapper, wrapper.model, max_new_tokens

    def __call__(self, image: Path, question: str) -> str:
        """Answer one question."""
        config = self.model.config
        ids, (pixels,) = self.wrapper.encode_messages(messages(image, question))
        pixels = pixels.to(self.model.device, self.model.dtype)
        parts, llm = getattr(self.model, "model", self.model), language_model(self.model)
        visual = parts.vision_tower(pixels, output_hidden_states=True)
        features = visual.hidden_states[config.vision_feature_layer]
        if config.vision_feature_select_strategy == "default":
            features = features[:, 1:]
        features = parts.multi_modal_projector(features)  # (1, image tokens, hidden size)

        first = ids.index(config.image_token_index)
        chunks = ids[:first], ids[first + features.shape[1] :]
        embed = llm.get_input_embeddings()
        before, after = (embed(torch.tensor([ids], device=pixels.device)) for ids in chunks)
        generated = llm.generate(
            inputs_embeds=torch.cat([before, features.to(before.dtype), after], dim=1),
            generation_config=self.model.generation_config,
            max_new_tokens=self.max_new_tokens,
            do_sample=False,
            pad_token_id=self.wrapper.pad_id,
        )
        return self.wrapper.tokenizer.decode(generated[0], skip_special_tokens=True).strip()


def messages(image: Path, question: str) -> list[dict]:
    """Make a prompt as OpenCompass's VLMEvalKit data sets do."""
    content = [{"type": "image", "image_url": str(image)}, {"type": "text", "text": question}]
    return [{"role": "user", "content": content}]


def load_questions(path: Path, count: int) -> list[tuple[Path, str]]:
    """Read the first questions of a LLaVA-format JSON; picture paths are relative to its folder."""
    records = [record for record in json.loads(path.read_text()) if record.get("image")][:count]
    return [
        (
            path.parent / record["image"],
            record["conversations"][0]["value"].replace("<image>", "").strip(),
        )
        for record in records
    ]


def answer_in_batches(
    wrapper: LlavaFolder, questions: list[tuple[Path, str]], size: int, max_new_tokens: int
) -> list[str]:
    """Ask the longest questions first, as the evaluation does; return answers in their order."""
    order = sorted(range(len(questions)), key=lambda i: -len(questions[i][1]))
    answers = [""] * len(questions)
    for start in range(0, len(order), size):
        places = order[start : start + size]
        given = wrapper.generate([messages(*questions[i]) for i in places], max_new_tokens)
        for place, answer in zip(places, given, strict=True):
            answers[place] = answer
    return answers


def measure(args: argparse.Namespace) -> dict:
    """Time the ways in turn, so that a busy moment hits them all.

    Returns:
        What was measured on what; of each way the median of its samples/s, all seconds, and the
        median of its speed relative to one by one within a turn.
    """
    torch.set_num_threads(args.threads)
    load_before = os.getloadavg()[0]
    questions = load_questions(args.questions, args.samples)
    wrapper = LlavaFolder(str(args.folder))
    alone = OneByOne(wrapper, args.max_new_tokens)
    ways: dict[str, Callable[[], list[str]]] = {
        ONE_BY_ONE: lambda: [alone(*question) for question in questions]
    }
    for size in args.batch_sizes:
        ways[f"batch {size}"] = lambda size=size: answer_in_batches(
            wrapper, questions, size, args.max_new_tokens
        )
    seconds: dict[str, list[float]] = {way: [] for way in ways}
    with torch.inference_mode():
        answers = {way: answer() for way, answer in ways.items()}  # warms up
        for _ in range(args.repeats):
            for way, answer in ways.items():
                begin = time.perf_counter()
                answer()
                seconds[way].append(time.perf_counter() - begin)
    tokens = [wrapper.get_token_len(answer) for answer in answers[ONE_BY_ONE]]
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


def machine(load: float) -> str:
    """Name the CPU and the versions, and say whether others were computing as well."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    text = (
        f"{(names or [platform.machine()])[0]}, {os.cpu_count()} CPUs; Python "
        f"{platform.python_version()}, torch {torch.__version__}, transformers "
        f"{transformers.__version__}"
    )
    busy = f"; BUSY MACHINE: the load was {load:.1f} before this process began to compute"
    return text + busy * (load > 0.5)


def throughput_table(result: dict) -> str:
    """Lay out the ways under a line that says what they did."""
    rows = [
        [way, f"{row['samples_per_s']:.2f}", f"{row['ratio']:.2f}",
         f"{row['same_answers']} of {result['samples']}"]
        for way, row in result["rows"].items()
    ]  # fmt: skip
    title = (
        f"{result['samples']} questions, {result['image_tokens']} image tokens, answers of "
        f"{result['tokens_per_answer']:.1f} tokens; {result['dtype']}, {result['threads']} "
        f"threads; median of {len(result['rows'][ONE_BY_ONE]['all_s'])}\n{result['machine']}"
    )
    header = ["way", "samples/s", "times one by one", "same answers"]
    return f"{title}\n\n{markdown(header, rows)}"


def main() -> None:
    """Measure, print the table, and write the JSON."""
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
    parser.add_argument("--out", type=Path, help="folder for benchmark_eval.json")
    args = parser.parse_args()
    result = measure(args)
    print(throughput_table(result))
    if args.out:
        args.out.mkdir(parents=True, exist_ok=True)
        write_json(args.out / "benchmark_eval.json", result)


if __name__ == "__main__":
    main()
