"""Measures how fast an evaluation answers, and what comes before its first answer.

The wrapper that `tools/eval.py` uses answers batches; VLMEvalKit's wrapper of XTuner's LLaVA
models (`vlmeval/vlm/llava/llava_xtuner.py` of 0.0.20) answers one question after the other: it
encodes the image, puts the features between the embeddings of the text, and generates. Its loop is
written down here for a Hugging Face LLaVA folder, so that both ask the same model the same
questions, greedily, in turn:

    python tools/benchmark_eval.py work_dirs/dpa_smollm2_135m_openmoji/tune/hf --out docs

`--startup` measures instead how long `tools/eval.py` takes to its first answer, and with what:

    python tools/benchmark_eval.py --startup FOLDER --benchmarks mmvp --data DIR
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
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(args.repeats):
            for way, answer in ways.items():
                begin = time.perf_counter()
                answer()
                seconds[way].append(time.perf_counter() - begin)
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
    return f"{title}\n\n{table(header, rows)}"


def table(header: list[str], rows: list[list[str]]) -> str:
    """Lays cells out as a Markdown table that also reads well as text."""
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    ruler = ["-" * widths[0], *("-" * (width - 1) + ":" for width in widths[1:])]
    return "\n".join(
        "| " + " | ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]) + " |"
        for row in (header, ruler, *rows)
    )
