"""Measure a training step of stage ``align``: stock XTuner, ours, and a plain CMO, side by side.

A step is forward, backward and the projector's optimizer step, on a random LLM that is frozen:

    python benchmarks/benchmark_step.py --head --growth --out docs
"""

import argparse
import json
import os
import platform
import resource
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import isclose
from operator import truediv
from pathlib import Path
from statistics import median
from time import perf_counter
from types import SimpleNamespace

import psutil
import torch
import transformers
import xtuner
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import CLIPVisionConfig, CLIPVisionModel, LlamaConfig, LlamaForCausalLM
from xtuner.dataset.collate_fns import default_collate_fn
from xtuner.model import LLaVAModel
from xtuner.utils import IGNORE_INDEX, IMAGE_TOKEN_INDEX

from dpa_xtuner.data import collate
from dpa_xtuner.loss import token_log_probs
from dpa_xtuner.loss.head import LOGITS_AT_ONCE_ON_CPU, ChunkedHead
from dpa_xtuner.model.dpa_llava import DPALLaVAModel
from dpa_xtuner.tables import markdown

ROWS = ("stock", "uniform", "cmo", "cal", "plain")
GROWTH_ROWS = ("stock", "uniform", "cmo", "plain")
ABOUT = """\
Forward, backward and optimizer step of the projector in the stage `align`, with a random LLM that
is frozen and an encoder so small that the LLM dominates. `stock` is XTuner's `LLaVAModel`;
`uniform`, `cmo` and `cal` are ours; `plain` is CMO by its formula with nothing saved: a second
pass over the whole sequence, logits at all positions, full softmax. The rows of a shape are timed
in one process, in turn; a ratio is the median of those within a turn. Peak memory is that of a
process of its own for each row, beyond what it had after its imports: so the model is in it. The
figures come from this command:"""
WARM_UP = 2  # steps of each row that are not timed
PATCH = 14


@dataclass(frozen=True)
class Shape:
    """The sizes of a model and of its batch.

    Attributes:
        hidden: the LLM's width; its heads are 128 wide.
        layers: of the LLM.
        vocabulary: of the LLM.
        text: text tokens of each sample: the first, before the images, is not supervised.
        images: for each sample.
        image_size: pixels; a patch of 14 is an image token.
    """

    hidden: int
    layers: int
    vocabulary: int
    text: tuple[int, ...]
    images: int = 1
    image_size: int = 336

    @property
    def image_tokens(self) -> int:
        """Tokens of all images of a sample."""
        return self.images * (self.image_size // PATCH) ** 2

    def __str__(self) -> str:
        text = "-".join(str(n) for n in sorted(set(self.text)))
        return (
            f"hidden {self.hidden}, {self.layers} layers, vocabulary {self.vocabulary}, "
            f"{text} text + {self.image_tokens} image tokens, batch {len(self.text)}"
        )


SHAPES = {
    "vocabulary": Shape(512, 8, 49152, (64,) * 4),
    "7b": Shape(768, 8, 8192, (64, 128)),
    "text": Shape(512, 8, 49152, (200,) * 4),
    "tiles": Shape(512, 8, 49152, (64,), images=5),
}
# (x axis, values, shape of a value) of each panel of the plot.
GROWTH = (
    (
        "image tokens (64 text tokens)",
        (256, 512, 1024, 2048, 4096),
        lambda n: Shape(256, 4, 16384, (64,), images=n // 256, image_size=224),
    ),
    (
        "text tokens (576 image tokens)",
        (32, 64, 128, 256, 512, 1024),
        lambda n: Shape(256, 4, 16384, (n,)),
    ),
)


class PlainCMO(LLaVAModel):
    """CMO by its formula with nothing saved: the reference for what our model saves.

    A second pass over the whole sequence with the image positions out of its attention; logits
    at all positions of both passes, in float32, and their full softmax.
    """

    def forward(self, data: dict, data_samples=None, mode: str = "loss") -> dict[str, Tensor]:
        """Return the loss of a stock batch with our ``image_mask`` (B, T)."""
        self._image_mask = data.pop("image_mask")
        return super().forward(data, data_samples, mode)

    def compute_loss(self, data: dict, data_samples=None) -> dict[str, Tensor]:
        """Compute sum_j w_j CE_j / (sum_j w_j + 1e-6) over supervised tokens."""
        labels = data.pop("labels")
        logits = self.llm(**data).logits.float()  # (B, T, V)
        supervised = labels[:, 1:] != IGNORE_INDEX  # (B, T - 1)
        targets = labels[:, 1:].clamp(min=0).unsqueeze(-1)
        with torch.no_grad():
            text = data["attention_mask"] & ~self._image_mask
            no_image = self.llm(**{**data, "attention_mask": text}).logits.float()  # (B, T, V)
            p_w = logits[:, :-1].softmax(-1).gather(-1, targets).squeeze(-1)
            # From the last text token before: for the token after an image, the one before it.
            columns = torch.arange(text.shape[1], device=text.device).expand(text.shape)
            before = columns.where(text, 0).cummax(1).values[:, :-1]  # (B, T - 1)
            rows = torch.arange(len(text), device=text.device)[:, None]
            p_wo = no_image.softmax(-1)[rows, before, targets[..., 0]]
            relevance = (p_w - p_wo).clamp(0.05, 0.5).where(supervised, 0)
            counts = supervised.to(relevance.dtype)
            weights = F.avg_pool1d(relevance, 3, 1, 1)
            weights /= F.avg_pool1d(counts, 3, 1, 1).clamp(min=1e-6)
            weights = weights.where(supervised, 0)
        cross_entropy = F.cross_entropy(
            logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), reduction="none"
        )
        loss = (weights.flatten() * cross_entropy).sum() / (weights.sum() + 1e-6)
        return {"loss": loss}


class _ComputedAgain(ChunkedHead):
    """The package's head as if it trained.

    It keeps the hidden states, not their gradient, and forms the logits again in the backward pass.
    Only the gradient of the hidden states is needed.
    """

    @staticmethod
    def forward(ctx, *args):
        """Run the package's forward pass as if the head trained."""

        def keep(*tensors: Tensor | None) -> None:
            ctx.save_for_backward(*tensors)

        shim = SimpleNamespace(
            needs_input_grad=(True, True, False),
            save_for_backward=keep,
            mark_non_differentiable=ctx.mark_non_differentiable,
        )
        outputs = ChunkedHead.forward(shim, *args)
        ctx.formed, ctx.softcap, ctx.rows = shim.formed, shim.softcap, shim.rows
        ctx.dtype = shim.dtype
        return outputs


def build(row: str, shape: Shape, args: argparse.Namespace) -> nn.Module:
    """Build a row's model with random weights, the same for each row.

    The LLM and the encoder have ``args.dtype``; the projector, which trains, is float32.

    Args:
        row: one of ``ROWS``.
        shape: of the LLM and the images.
        args: its ``dtype`` and ``checkpointing``.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    llm = LlamaForCausalLM(
        LlamaConfig(
            hidden_size=shape.hidden,
            intermediate_size=round(shape.hidden * 8 / 3 / 64) * 64,
            num_hidden_layers=shape.layers,
            # Heads of 128, four to a key and value head, as InternLM2.5's and Llama-3.1's.
            num_attention_heads=shape.hidden // 128,
            num_key_value_heads=max(1, shape.hidden // 512),
            vocab_size=shape.vocabulary,
            max_position_embeddings=8192,
        )
    )
    # So small that the LLM dominates, as it does in a real model.
    encoder = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=2,
            image_size=shape.image_size,
            patch_size=PATCH,
        )
    )
    common = dict(
        llm=llm.to(dtype),
        visual_encoder=encoder.to(dtype),
        freeze_llm=True,
        freeze_visual_encoder=True,
        use_activation_checkpointing=args.checkpointing == "on",
    )
    if row in ("stock", "plain"):
        model = (LLaVAModel if row == "stock" else PlainCMO)(**common)
    else:
        model = DPALLaVAModel(**common, loss=row)
    model.projector.float()
    return model.train()


def make_data(row: str, shape: Shape) -> dict:
    """Make a row's batch, the same tokens and pictures for each, in the row's own format.

    Args:
        row: one of ``ROWS``.
        shape: of the batch.
    """
    generator = torch.Generator().manual_seed(0)
    ours, stock = [], []
    for number, length in enumerate(shape.text):
        text = torch.randint(3, shape.vocabulary, (length,), generator=generator).tolist()
        size = (3, shape.image_size, shape.image_size)
        pixels = torch.randn(shape.images, *size, generator=generator)
        for samples, places in ((ours, shape.image_tokens), (stock, shape.images)):
            ids = torch.tensor([text[0], *[IMAGE_TOKEN_INDEX] * places, *text[1:]])
            labels = ids.clone()
            labels[: places + 1] = IGNORE_INDEX
            samples.append({"input_ids": ids, "labels": labels, "pixel_values": pixels})
        arrays = {key: ours[-1][key].numpy() for key in ("input_ids", "labels")}
        ours[-1].update(arrays, id=str(number), index=number)
    data = collate(ours)["data"]
    if row in ("stock", "plain"):
        image_mask = data["image_mask"]
        data = default_collate_fn(stock)["data"]
        data["pixel_values"] = data["pixel_values"].flatten(0, 1)
        if row == "plain":
            data["image_mask"] = image_mask
    return data


def make_step(row: str, shape: Shape, args: argparse.Namespace) -> Callable[[], float]:
    """Make the function that does a training step of a row and returns its loss."""
    model, data = build(row, shape, args), make_data(row, shape)
    optimizer = torch.optim.AdamW(model.projector.parameters(), lr=2e-3, weight_decay=0.0)

    def step() -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=args.dtype == "bfloat16"):
            loss = model(dict(data))["loss"]  # a copy, since stock's changes it
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss.item()

    return step


def time_steps(rows: Iterable[str], shape: Shape, args: argparse.Namespace) -> dict[str, dict]:
    """Time the rows of a shape in this process, in turn, so that a busy moment hits them all.

    Args:
        rows: of ``ROWS``.
        shape: of all of them.
        args: its ``repeats``, ``dtype`` and ``checkpointing``.

    Returns:
        Of each row the median of its seconds a step, all of them, the median of their ratios to
        stock's step of the same turn, and the loss before the first step.
    """
    steps = {row: make_step(row, shape, args) for row in rows}
    losses = {row: step() for row, step in steps.items()}
    for row, reference in {"uniform": "stock", "cmo": "plain"}.items():
        if reference in losses and not isclose(losses[row], losses[reference], rel_tol=5e-3):
            raise RuntimeError(f"{row} does not compute what {reference} does: {losses}")
    for _ in range(WARM_UP - 1):
        for step in steps.values():
            step()
    seconds = {row: [] for row in steps}
    for _ in range(args.repeats):
        for row, step in steps.items():
            begin = perf_counter()
            step()
            seconds[row].append(perf_counter() - begin)
    return {
        row: {
            "step_s": median(times),
            "ratio_to_stock": median(map(truediv, times, seconds["stock"])),
            "all_step_s": times,
            "first_loss": losses[row],
        }
        for row, times in seconds.items()
    }


def measure_memory(row: str, shape: Shape, args: argparse.Namespace) -> float:
    """Do two steps of a row and return this process's peak memory beyond the imports, in MB."""
    imports = psutil.Process().memory_info().rss
    step = make_step(row, shape, args)
    for _ in range(2):
        step()
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - imports) / 1e6


def time_heads(args: argparse.Namespace) -> dict[str, dict]:
    """Time head and cross entropy with the gradient of the hidden states, forward and backward.

    1024 supervised tokens, hidden 512, vocabulary 49152, a frozen head.

    Args:
        args: its ``repeats`` and ``dtype``.

    Returns:
        Of each number of rows at a time, median seconds with the gradient formed in the forward
        pass, with the logits computed again in the backward pass, and of plain PyTorch, which
        keeps all logits.
    """
    torch.manual_seed(0)
    dtype = getattr(torch, args.dtype)
    hidden = torch.randn(1024, 512, dtype=dtype, requires_grad=True)
    weight = torch.randn(49152, 512, dtype=dtype) * 0.02
    targets = torch.randint(49152, (1024,))
    ways = {"plain": {"all": lambda: F.cross_entropy((hidden @ weight.T).float(), targets)}}
    ways |= {"formed": {}, "again": {}}
    for rows in (16, 64, 256, LOGITS_AT_ONCE_ON_CPU // len(weight), 1024):
        ways["formed"][rows] = lambda rows=rows: token_log_probs(
            hidden, targets, weight, chunk_size=rows
        ).cross_entropy.mean()
        ways["again"][rows] = lambda rows=rows: _ComputedAgain.apply(
            hidden, weight, None, targets, None, rows, dtype
        )[0].mean()
    seconds: dict[tuple, list[float]] = {}
    expected = torch.autograd.grad(ways["plain"]["all"](), hidden)[0]
    for _ in range(args.repeats + 1):  # the first warms up
        for way, sizes in ways.items():
            for rows, loss in sizes.items():
                begin = perf_counter()
                gradient = torch.autograd.grad(loss(), hidden)[0]
                seconds.setdefault((way, rows), []).append(perf_counter() - begin)
                torch.testing.assert_close(gradient, expected, rtol=0.05, atol=1e-5)
    results: dict[str, dict] = {}
    for (way, rows), times in seconds.items():
        results.setdefault(str(rows), {})[f"{way}_s"] = median(times[1:])
    return results


def grow(panel: int, args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Time ``GROWTH_ROWS`` at each value of a panel of ``GROWTH``.

    Args:
        panel: its number.
        args: as ``time_steps``.

    Returns:
        Of each value and row the median seconds of a step, of 3 at most.
    """
    args = argparse.Namespace(**{**vars(args), "repeats": min(3, args.repeats)})
    _, values, shape_of = GROWTH[panel]
    timed = {value: time_steps(GROWTH_ROWS, shape_of(value), args) for value in values}
    return {
        str(value): {row: result["step_s"] for row, result in rows.items()}
        for value, rows in timed.items()
    }


def run(task: list[str], args: argparse.Namespace):
    """Run a task in its own process and return what it measures.

    Args:
        task: "time" SHAPE, "memory" SHAPE ROW, "head" or "growth" PANEL.
        args: the command's.
    """
    command = [sys.executable, __file__, "--repeats", str(args.repeats), "--dtype", args.dtype]
    command += ["--checkpointing", args.checkpointing, "--task", *task]
    environment = {**os.environ, "TRANSFORMERS_VERBOSITY": "error", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def do(task: list[str], args: argparse.Namespace):
    """Do in this process what ``run`` describes."""
    kind, *rest = task
    if kind == "time":
        return time_steps(ROWS, SHAPES[rest[0]], args)
    if kind == "memory":
        return measure_memory(rest[1], SHAPES[rest[0]], args)
    return time_heads(args) if kind == "head" else grow(int(rest[0]), args)


def measure(args: argparse.Namespace) -> dict:
    """Run all measurements, one process after the other."""
    results: dict = {"command": shlex.join(["python", *sys.argv]), "machine": describe(args)}
    results["shapes"] = {}
    for name in args.shapes:
        rows = run(["time", name], args)
        for row in rows:
            rows[row]["peak_mb"] = run(["memory", name, row], args)
        for row in rows:
            rows[row]["ratio_to_plain"] = rows[row]["peak_mb"] / rows["plain"]["peak_mb"]
        results["shapes"][name] = {"shape": str(SHAPES[name]), "rows": rows}
        print(f"\n{shape_table(name, results)}", flush=True)
    if args.head:
        results["head"] = run(["head"], args)
        print(f"\n{head_table(results)}", flush=True)
    if args.growth:
        results["growth"] = [run(["growth", str(panel)], args) for panel in range(len(GROWTH))]
        print(f"\n{growth_tables(results)}", flush=True)
    return results


def describe(args: argparse.Namespace) -> str:
    """Name machine, precision and versions of the measurement in a line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [line for line in info.read_text().splitlines() if line.startswith("model name")]
        cpu = names[0].partition(": ")[2] if names else cpu
    precision = {
        "bfloat16": "LLM and encoder bfloat16, projector float32, under bfloat16 autocast",
        "float32": "all in float32",
    }[args.dtype]
    return (
        f"{cpu}, {torch.get_num_threads()} threads; {precision}; activation checkpointing "
        f"{args.checkpointing}; median of {args.repeats}; Python {platform.python_version()}, "
        f"torch {torch.__version__}, transformers {transformers.__version__}, "
        f"XTuner {xtuner.__version__}"
    )


def shape_table(name: str, results: dict) -> str:
    """Lay out the rows of a shape under its description."""
    shape = results["shapes"][name]
    rows = [
        [
            row,
            f"{result['step_s']:.2f}",
            f"{result['ratio_to_stock']:.2f}",
            f"{result['peak_mb']:.0f}",
            f"{result['ratio_to_plain']:.2f}",
        ]
        for row, result in shape["rows"].items()
    ]
    header = ["step", "s", "ratio to stock", "peak memory, MB", "ratio to plain"]
    return f"`{name}`: {shape['shape']}\n\n{markdown(header, rows)}"


def head_table(results: dict) -> str:
    """Lay out the head's ways, a line for each number of rows at a time."""
    header = ["rows at a time", "gradient formed forwards, ms", "logits again backwards, ms"]
    ways = ("formed_s", "again_s", "plain_s")
    rows = [
        [size, *(f"{1000 * times[way]:.0f}" if way in times else "" for way in ways)]
        for size, times in results["head"].items()
    ]
    title = "Head and cross entropy of 1024 tokens, hidden 512, vocabulary 49152, head frozen"
    return f"{title}\n\n{markdown([*header, 'plain PyTorch, ms'], rows)}"


def growth_tables(results: dict) -> str:
    """Seconds of a step, a table for each panel of the plot."""
    parts = []
    for (axis, _, shape_of), values in zip(GROWTH, results["growth"], strict=True):
        rows = [
            [value, *(f"{times[row]:.2f}" for row in GROWTH_ROWS)]
            for value, times in values.items()
        ]
        shape = shape_of(256)
        title = f"Step, s; hidden {shape.hidden}, {shape.layers} layers, "
        title += f"vocabulary {shape.vocabulary}, batch {len(shape.text)}"
        parts.append(f"{title}\n\n{markdown([axis, *GROWTH_ROWS], rows)}")
    return "\n\n".join(parts)


def plot(results: dict, path: Path) -> None:
    """Draw the growth of a step's time."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panels = pyplot.subplots(1, len(GROWTH), figsize=(10, 4), sharey=True)
    for panel, (axis, values, _), measured in zip(panels, GROWTH, results["growth"], strict=True):
        for row in GROWTH_ROWS:
            panel.plot(values, [measured[str(v)][row] for v in values], marker="o", label=row)
        panel.set_xscale("log", base=2)
        panel.set_yscale("log")
        panel.set_xticks(values, [f"{v:,}" for v in values])
        panel.set_xlabel(axis)
        panel.grid(alpha=0.3, which="both")
    panels[0].set_ylabel("seconds a step")
    panels[0].legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def write(results: dict, folder: Path) -> None:
    """Write ``benchmark_step.json``, ``.md`` and, where growth was measured, ``.png``.

    Args:
        results: of ``measure``.
        folder: where to; made where it is missing.
    """
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "benchmark_step.json").write_text(json.dumps(results, indent=2) + "\n")
    parts = ["# A training step, measured", ABOUT, f"    {results['command']}"]
    parts += [f"{results['machine']}."]
    parts += [shape_table(name, results) for name in results["shapes"]]
    if "head" in results:
        parts += [head_table(results)]
    if "growth" in results:
        plot(results, folder / "benchmark_step.png")
        parts += ["![Step time against image and text tokens](benchmark_step.png)"]
        parts += [growth_tables(results)]
    (folder / "benchmark_step.md").write_text("\n\n".join(parts) + "\n")


def main() -> None:
    """Measure, print tables, and write them if asked to."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--repeats", type=int, default=5, help="timed steps of each row")
    parser.add_argument("--shapes", nargs="*", choices=list(SHAPES), default=list(SHAPES))
    parser.add_argument("--head", action="store_true", help="compare the ways of the chunked head")
    parser.add_argument("--growth", action="store_true", help="measure the growth with the tokens")
    parser.add_argument("--dtype", choices=["bfloat16", "float32"], default="bfloat16")
    parser.add_argument("--checkpointing", choices=["on", "off"], default="off")
    parser.add_argument("--out", type=Path, help="folder for benchmark_step.{json,md,png}")
    parser.add_argument("--task", nargs="+", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.task:
        print(json.dumps(do(args.task, args)))
        return
    print(describe(args))
    results = measure(args)
    if args.out:
        write(results, args.out)


if __name__ == "__main__":
    main()
