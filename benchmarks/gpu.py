"""Check and measure everything that needs a GPU, in one command.

    python benchmarks/gpu.py --minutes 8 --out docs/gpu
    python benchmarks/gpu.py --report docs/gpu > docs/gpu.md

Each part runs in a process of its own, with a share of the minutes, and writes its results file
after each figure. So a part that fails, or that is cut off, costs no other part. On a CPU
(``--device cpu``) the same code runs with tiny shapes: that shows that it works, and no speed.
"""

import argparse
import contextlib
import itertools
import json
import math
import os
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from datetime import datetime, timezone
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before transformers is imported: it would wait

ROOT = Path(__file__).parents[1]
TINY_CONFIG = ROOT / "tests" / "support" / "tiny_config.py"
COMMAND = "python benchmarks/gpu.py --minutes 8 --out docs/gpu"

# Dense bfloat16 FLOP/s with float32 accumulation, from NVIDIA's data sheets (those with a star
# there count sparse products: half of it). The first name that is part of the device's name.
PEAKS = {
    "H200": 989e12,  # nvidia.com/en-us/data-center/h200: 1,979 sparse
    "H100 PCIe": 756e12,  # H100 data sheet: 1,513 sparse
    "H100 NVL": 835e12,  # H100 data sheet: 1,671 sparse
    "H100": 989e12,  # SXM5, "H100 80GB HBM3"; H100 data sheet: 1,979 sparse
    "A100": 312e12,  # A100 data sheet, SXM and PCIe
    "4090": 165e12,  # Ada architecture white paper, table of the RTX 4090
}


MINIMUM = 60
"""Seconds that a part may take, whatever its share: its imports alone take up to half a minute."""
CUT_OFF = 75
"""Exit code of a part that had no time left; what it has measured is kept."""


class Part(NamedTuple):
    """A part of the measurements.

    Attributes:
        work: does it, writing to a ``Results``.
        share: of the time, in relation to the other parts'.
        title: for the report.
        about: what is measured and how, for the report.
    """

    work: Callable
    share: float
    title: str
    about: str


class Results:
    """The results file of a part: written anew, as a whole, after each row.

    Args:
        folder: of the results.
        part: name of the part.
        device: ``"cuda"`` or ``"cpu"``.
        until: when the part has to end, as ``time.time()`` counts.
    """

    def __init__(self, folder: Path, part: str, device: str, until: float):
        self.path, self.device = folder / f"{part}.json", device
        self.until, self.cut_off = until, False
        self.content = {
            "part": part, "state": "cut off", **describe(device), "notes": [], "tables": {}
        }  # fmt: skip
        self.write()

    def write(self) -> None:
        """Write the file: whole or not at all."""
        partial = self.path.with_name(f".{self.path.name}.partial")
        partial.write_text(json.dumps(self.content, indent=2) + "\n")
        os.replace(partial, self.path)

    def add(self, table: str, **row: Any) -> None:
        """Add a row to a table, and print it."""
        self.content["tables"].setdefault(table, []).append(row)
        self.write()
        print(f"{table}: {row}", flush=True)

    def note(self, text: str) -> None:
        """Add a sentence to the results, and print it."""
        self.content["notes"].append(text)
        self.write()
        print(text, flush=True)

    def need(self, seconds: float) -> None:
        """Raise a TimeoutError if a figure needs more time than is left."""
        if self.until - time.time() < seconds:
            self.cut_off = True
            raise TimeoutError("no time was left")

    @contextlib.contextmanager
    def attempt(self, what: str) -> Iterator[None]:
        """Note a failure of ``what`` in place of its figure, and go on."""
        try:
            yield
        except (Exception, SystemExit) as error:  # of whatever kind: the next figure is tried
            why = "out of memory" if isinstance(error, torch.OutOfMemoryError) else error
            text = str(why).strip() or type(error).__name__
            self.note(f"{what}: not measured ({type(error).__name__}: {text.splitlines()[0]})")
        if self.device == "cuda":
            torch.cuda.empty_cache()


def describe(device: str) -> dict[str, str]:
    """Name device, driver, versions and date."""
    name = platform.processor() or platform.machine()
    driver = "none"
    if device == "cuda":
        properties = torch.cuda.get_device_properties(0)
        name = f"{properties.name}, {properties.total_memory / 2**30:.0f} GiB"
        asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
        with contextlib.suppress(OSError, subprocess.SubprocessError):
            driver = subprocess.run(
                asked, capture_output=True, text=True, check=True, timeout=20
            ).stdout.split("\n")[0]
    found = {}
    for package in ("torch", "transformers", "peft", "xtuner", "mmengine", "flash_attn",
                    "liger_kernel", "triton"):  # fmt: skip
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return {
        "device": name,
        "driver": driver,
        "cuda": str(torch.version.cuda),
        "python": platform.python_version(),
        "versions": ", ".join(f"{k} {v}" for k, v in found.items()),
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d"),
    }


# Timing


class Timing(NamedTuple):
    """What a step takes.

    Attributes:
        seconds: median of the repeats.
        peak_gb: most memory that PyTorch held at a time (10**9 bytes), the model's included; nan
            on a CPU.
    """

    seconds: float
    peak_gb: float


def measure(step: Callable[[], object], device: str, repeats: int, warm_up: int = 2) -> Timing:
    """Time a step: by CUDA events on a GPU, median of ``repeats`` after ``warm_up``."""
    for _ in range(warm_up):
        step()
    if device == "cpu":
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            step()
            times.append(time.perf_counter() - begin)
        return Timing(median(times), math.nan)
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        step()
        event.record()
    torch.cuda.synchronize()
    pairs = itertools.pairwise(events)
    seconds = median(begin.elapsed_time(end) / 1000 for begin, end in pairs)
    return Timing(seconds, torch.cuda.max_memory_allocated() / 1e9)


def peak_flops() -> float:
    """Return the card's bfloat16 peak in FLOP/s, nan for one that is not in ``PEAKS``."""
    if not torch.cuda.is_available():
        return math.nan
    name = torch.cuda.get_device_name(0)
    return next((peak for part, peak in PEAKS.items() if part in name), math.nan)


def rounded(number: float, digits: int = 3) -> float | None:
    """Round to significant digits; None for nan."""
    return None if math.isnan(number) else float(f"{number:.{digits}g}")


# Models


class Sizes(NamedTuple):
    """The shapes of a device.

    Attributes:
        llms: configurations, by name.
        encoder: configuration of the visual encoder.
        samples: of a micro-batch.
        captions: text tokens of a caption, each a micro-batch.
        repeats: timed steps.
        rank: of LoRA.
        vocabularies: of the head, by name.
        hidden: of the head.
    """

    llms: dict[str, Any]
    encoder: Any
    samples: int
    captions: tuple[int, ...]
    repeats: int
    rank: int
    vocabularies: tuple[int, ...]
    hidden: int


def sizes(device: str) -> Sizes:
    """Give the real shapes for a GPU and tiny ones for a CPU."""
    from transformers import CLIPVisionConfig, LlamaConfig, Qwen2Config

    if device == "cpu":
        tiny = dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2)
        tiny |= dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=500)
        encoder = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=3)
        encoder |= dict(num_attention_heads=2, image_size=28, patch_size=14)
        llms = {"tiny": LlamaConfig(**tiny)}
        return Sizes(llms, CLIPVisionConfig(**encoder), 2, (8, 20), 2, 4, (500,), 64)
    qwen = Qwen2Config(  # huggingface.co/Qwen/Qwen2.5-7B
        hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, vocab_size=152064, max_position_embeddings=32768,
        use_sliding_window=False,
    )  # fmt: skip
    internlm = LlamaConfig(  # huggingface.co/internlm/internlm2_5-7b, as LLaMA
        hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
        num_key_value_heads=8, vocab_size=92544, max_position_embeddings=32768,
    )  # fmt: skip
    encoder = CLIPVisionConfig(  # huggingface.co/openai/clip-vit-large-patch14-336
        hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16,
        image_size=336, patch_size=14,
    )  # fmt: skip
    llms = {"Qwen2.5-7B": qwen, "InternLM2.5-7B": internlm}
    return Sizes(llms, encoder, 8, (50, 200), 10, 256, (49152, 152064), 3584)


def make_on(device: str, owner: type, config: Any) -> nn.Module:
    """Make a frozen model of random bfloat16 weights on the device itself."""
    default = torch.get_default_dtype()
    config._attn_implementation = "sdpa"
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(device):
            return owner(config).to(torch.bfloat16).requires_grad_(False)
    finally:
        torch.set_default_dtype(default)


def make_llm(config: Any, device: str, results: Results) -> nn.Module:
    """Make an LLM with as many layers as half of the memory holds; say so if it is not all."""
    from transformers import LlamaForCausalLM, Qwen2ForCausalLM

    kinds = {"llama": LlamaForCausalLM, "qwen2": Qwen2ForCausalLM}
    if device == "cuda":
        room = torch.cuda.get_device_properties(0).total_memory / 2
        layer = 2 * config.hidden_size * (3 * config.intermediate_size + 2.5 * config.hidden_size)
        fits = int((room - 4 * config.vocab_size * config.hidden_size) / layer)
        if fits < config.num_hidden_layers:
            results.note(f"{config.num_hidden_layers} layers don't fit: {fits} are measured")
            config.num_hidden_layers = fits
            if getattr(config, "layer_types", None):
                config.layer_types = config.layer_types[:fits]
    return make_on(device, kinds[config.model_type], config)


def use_attention(llm: nn.Module, name: str) -> None:
    """Choose the LLM's attention: sdpa, flash_attention_2 or flex_attention.

    Raises:
        ImportError: it is not installed.
    """
    if name == "flash_attention_2" and not find_spec("flash_attn"):
        raise ImportError("flash-attn is not installed")
    if hasattr(llm, "set_attn_implementation"):  # since transformers 4.54; it checks
        llm.set_attn_implementation(name)
    llm.config._attn_implementation = name


class Bench:
    """The models of a step, and the steps.

    Args:
        config: of the LLM.
        shapes: of the device.
        results: gets notes.
    """

    def __init__(self, config: Any, shapes: Sizes, results: Results):
        # The plugin first: it mends what XTuner imports.
        import dpa_xtuner.plugin  # noqa: F401, I001
        import benchmark_step
        from transformers import CLIPVisionModel

        from dpa_xtuner.model.dpa_llava import DPALLaVAModel

        self.device, self.shapes, self.tools = results.device, shapes, benchmark_step
        self.llm = make_llm(config, self.device, results)
        self.encoder = make_on(self.device, CLIPVisionModel, shapes.encoder)
        common = dict(llm=self.llm, visual_encoder=self.encoder, freeze_llm=True,
                      freeze_visual_encoder=True, use_activation_checkpointing=False)  # fmt: skip
        # Ours last: it removes XTuner's own attention, which needs a process group, from the LLM.
        others = {"stock": benchmark_step.LLaVAModel, "plain": benchmark_step.PlainCMO}
        self.models = {row: owner(**common) for row, owner in others.items()}
        self.models["ours"] = DPALLaVAModel(**common, normalize="global")
        for model in self.models.values():
            model.projector.float().to(self.device)
            model.train()
        self.projector = {
            key: value.clone() for key, value in self.models["ours"].projector.state_dict().items()
        }

    def texts(self, tokens: int, equal: bool = False) -> tuple[int, ...]:
        """Lengths of a micro-batch: about as unequal as the sampler leaves them, or equal."""
        count = self.shapes.samples
        spread = 0 if equal else max(1, tokens // 10)
        return tuple(tokens - spread + 2 * spread * i // max(1, count - 1) for i in range(count))

    def data(self, row: str, texts: tuple[int, ...]) -> dict:
        """Make a row's batch on the device."""
        config = self.llm.config
        shape = self.tools.Shape(
            config.hidden_size, config.num_hidden_layers, config.vocab_size, texts,
            image_size=self.shapes.encoder.image_size,
        )  # fmt: skip
        made = self.tools.make_data(row, shape)
        return {k: v.to(self.device) if torch.is_tensor(v) else v for k, v in made.items()}

    def step(
        self, row: str, texts: tuple[int, ...], model: nn.Module | None = None, fused: bool = False
    ) -> Callable[[], Tensor]:
        """Make the function that does a training step and returns its loss.

        Args:
            row: stock, plain, or a scheme of ours.
            texts: text tokens of each sample.
            model: in place of the row's.
            fused: whether AdamW is.
        """
        from dpa_xtuner.loss import Objective

        owner = model or self.models[row if row in self.models else "ours"]
        if hasattr(owner, "objective"):
            owner.objective = Objective(row, "global")
        owner.projector.load_state_dict(self.projector)
        data = self.data(row, texts)
        trained = [p for p in owner.parameters() if p.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=1e-5, weight_decay=0.0, fused=fused)

        def step() -> Tensor:
            """Train one step, and return its loss."""
            with torch.autocast(self.device, torch.bfloat16):
                loss = owner(dict(data))["loss"]  # a copy, since stock's changes it
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            if hasattr(owner, "objective"):
                owner.objective.seen = {}
            return loss.detach()

        return step

    def useful_flops(self, row: str, texts: tuple[int, ...], trained: int = 0) -> float:
        """Count the operations that a step needs: no padding, nothing computed twice.

        2 for each weight and token forwards, and again for the gradient of its input; a trained
        weight has its own gradient. Attention: 4 T^2 H a layer forwards, half of it causal, twice
        that backwards. The head is asked about supervised tokens alone.

        Args:
            row: stock counts as uniform does, plain as cmo.
            texts: text tokens of each sample.
            trained: trained weights of the LLM.
        """
        config, images = self.llm.config, (self.shapes.encoder.image_size // 14) ** 2
        decoder = sum(p.numel() for p in self.llm.get_decoder().layers.parameters())
        width = config.num_hidden_layers * config.hidden_size

        def forward(length: int) -> tuple[float, float]:
            return 2.0 * decoder * length, 2.0 * length**2 * width

        total = 0.0
        for text in texts:
            linear, attention = forward(text + images)
            total += 2 * linear + 3 * attention + 6.0 * trained * (text + images)
            head = 2.0 * config.vocab_size * config.hidden_size * (text - 1)
            total += 2 * head
            if row in ("cmo", "cal", "plain"):
                total += sum(forward(text)) + head
        encoder = sum(p.numel() for p in self.encoder.parameters())
        projector = sum(p.numel() for p in self.models["ours"].projector.parameters())
        return total + len(texts) * images * (2.0 * encoder + 4.0 * projector)


# The parts


def correctness(results: Results) -> None:
    """Compare loss, token weights and projector gradient with the CPU in float32."""
    import dpa_xtuner.plugin  # noqa: F401, I001
    import benchmark_step

    from dpa_xtuner.loss import build_scheme, relevance_loss, supervised_mask
    from dpa_xtuner.model.contrast import contrast_log_probs
    from dpa_xtuner.precision import DTYPES, Precision

    torch.backends.cudnn.allow_tf32 = False  # or a float32 convolution would round to 11 bits
    shape = benchmark_step.Shape(256, 2, 1000, (12, 20, 33), image_size=56)
    args = argparse.Namespace(dtype="float32", checkpointing="off")
    made = benchmark_step.build("cmo", shape, args)
    with torch.no_grad():  # a fresh model hardly tells tokens apart
        for parameter in made.llm.parameters():
            parameter.mul_(3 if parameter.dim() > 1 else 1)
        made.llm.get_output_embeddings().weight.mul_(3)
    state = nn.Module.state_dict(made)
    data = benchmark_step.make_data("cmo", shape)
    # Supervise what the model says of the picture, so that the weights differ.
    with torch.no_grad():
        said = made.llm(**made.splice(data)).logits.argmax(-1)[:, :-1]  # (B, T - 1)
    mask = supervised_mask(data["labels"])
    data["labels"][:, 1:][mask] = said[mask]

    def compute(device: str, name: str) -> dict[str, Tensor]:
        """Compute loss, weights and gradient on a device, in a precision."""
        model = benchmark_step.build("cmo", shape, args)
        nn.Module.load_state_dict(model, state)
        model.llm.to(DTYPES[name])
        model.visual_encoder.to(DTYPES[name])
        model.to(device)
        there = {k: v.to(device) if torch.is_tensor(v) else v for k, v in data.items()}
        with Precision(name).autocast(device):
            log_probs = model.log_probs(there)
            no_image = contrast_log_probs(model.llm, there)
            found = relevance_loss(log_probs, no_image, mask.to(device), build_scheme("cmo"))
        (found.loss * 1024).backward()  # so that float16's gradients don't vanish
        gradient = torch.cat([p.grad.flatten() for p in model.projector.parameters()]) / 1024
        both = {"loss": found.loss.detach(), "weights": found.weights, "gradient": gradient}
        return {key: value.double().cpu() for key, value in both.items()}

    expected = compute("cpu", "fp32")
    # What rounding to 24, 8 and 11 bits leaves of a few layers' sums, with room.
    for name, bound in {"fp32": 1e-3, "bf16": 0.06, "fp16": 0.01}.items():
        with results.attempt(f"{name} against the CPU's float32"):
            found = compute(results.device, name)
            off = {key: (found[key] - expected[key]).norm() / expected[key].norm()
                   for key in expected}  # fmt: skip
            rows = {f"{key}, relative error": rounded(float(value)) for key, value in off.items()}
            holds = all(float(value) <= bound for value in off.values())
            results.add("Against float32 on the CPU", precision=name, **rows, bound=bound,
                        holds="yes" if holds else "NO")  # fmt: skip


def steps(results: Results) -> None:
    """Time steps of ``align`` and ``tune``, and what could make them faster."""
    shapes = sizes(results.device)
    with results.attempt("products"):
        _matrix_products(results)
    for name, config in shapes.llms.items():
        with results.attempt(f"steps of {name}"):
            results.need(10)
            bench = Bench(config, shapes, results)
            _step_rows(results, bench, name)
            _attention_rows(results, bench, name)
            _variants(results, bench, name)
            _tune_rows(results, bench, name)
            bench = None  # before the next LLM is made


def _matrix_products(results: Results) -> None:
    side = 8192 if results.device == "cuda" else 256
    a, b = (torch.randn(side, side, device=results.device, dtype=torch.bfloat16) for _ in "ab")
    seconds = measure(lambda: a @ b, results.device, 10).seconds
    results.add(
        "What the card reaches in one product of bfloat16 matrices", side=side,
        TFLOP_s=rounded(2 * side**3 / seconds / 1e12), peak=rounded(peak_flops() / 1e12),
    )  # fmt: skip


def _step_rows(results: Results, bench: Bench, name: str) -> None:
    """Time steps of ``align``, without and then with activation checkpointing."""
    shapes, model = bench.shapes, bench.models["ours"]
    every = ("stock", "cmo", "uniform", "cal", "plain")
    cases = [(tokens, False, every) for tokens in shapes.captions]
    cases += [(shapes.captions[0], True, every[:3])]
    for tokens, again, rows in cases:
        texts = bench.texts(tokens)
        losses: dict[str, float] = {}
        seconds: dict[str, float] = {}
        if again:
            model.activation_checkpointing_enable()
        for row in rows:
            with results.attempt(f"{name}, {row}, {tokens} tokens, recomputed {again}"):
                results.need(3)
                step = bench.step(row, texts)
                losses[row] = float(step())
                timing = measure(step, results.device, shapes.repeats)
                seconds[row] = timing.seconds
                results.add(
                    f"A step of align, {name}, {bench.llm.config.num_hidden_layers} layers",
                    step=row, caption=tokens, recomputed="yes" if again else "no",
                    **_cost(timing, bench.useful_flops(row, texts)),
                    to_stock=rounded(timing.seconds / seconds.get("stock", math.nan)),
                    loss=rounded(losses[row], 4),
                )  # fmt: skip
        for ours, other in {"uniform": "stock", "cmo": "plain"}.items():
            if {ours, other} <= losses.keys() and not math.isclose(
                losses[ours], losses[other], rel_tol=0.02
            ):
                results.note(f"{ours} and {other} differ in their first loss: {losses}")
    model.activation_checkpointing_disable()


def _cost(timing: Timing, flops: float) -> dict[str, Any]:
    return {
        "ms": rounded(timing.seconds * 1000),
        "peak_GB": rounded(timing.peak_gb),
        "of_peak_FLOPs": rounded(flops / timing.seconds / peak_flops()),
    }


def _attention_rows(results: Results, bench: Bench, name: str) -> None:
    """Time the decoder, forwards and backwards, with each attention and layout of the samples."""
    device, llm = results.device, bench.llm
    decoder, hidden = llm.get_decoder(), llm.config.hidden_size
    images = (bench.shapes.encoder.image_size // 14) ** 2
    lengths = torch.tensor([images + n for n in bench.texts(bench.shapes.captions[0])])
    places = torch.cat([torch.arange(n) for n in lengths.tolist()])  # (sum of lengths,)
    longest = int(lengths.max())
    mask = torch.arange(longest) < lengths[:, None]  # (B, T)
    # Two samples a row; a sample attends to its own earlier tokens. (B / 2, 1, 2 T, 2 T)
    sample = torch.arange(2 * longest) // longest
    own = (sample[:, None] == sample) & torch.ones(2 * longest, 2 * longest).tril().bool()
    packed = torch.zeros(own.shape, dtype=torch.bfloat16).masked_fill(~own, float("-inf"))
    packed = packed.expand(len(lengths) // 2, 1, *own.shape)
    halves = torch.arange(longest).repeat(len(lengths) // 2, 2)
    layouts = {
        "equal lengths": (len(lengths), longest, {}),
        "padded": (len(lengths), longest, {"attention_mask": mask}),
        "two to a row": (len(lengths) // 2, 2 * longest,
                         {"attention_mask": packed, "position_ids": halves}),
        "no padding": (1, len(places), {"position_ids": places[None]}),
    }  # fmt: skip
    cases = [("sdpa", "equal lengths"), ("sdpa", "padded"), ("sdpa", "two to a row"),
             ("flash_attention_2", "padded"), ("flash_attention_2", "no padding"),
             ("sdpa", "no padding")]  # fmt: skip
    if device == "cuda":  # flex attention has no backward pass on a CPU
        cases += [("flex_attention", "padded"), ("flex_attention", "no padding")]
    for attention, layout in cases:
        with results.attempt(f"{name}, {attention}, {layout}"):
            results.need(90 if attention == "flex_attention" else 5)  # it is compiled first
            use_attention(llm, attention)
            rows, width, inputs = layouts[layout]
            inputs = {key: value.to(device) for key, value in inputs.items()}
            shape = (rows, width, hidden)
            embeds = torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True)

            def run(embeds: Tensor = embeds, inputs: dict = inputs) -> None:
                out = decoder(inputs_embeds=embeds, use_cache=False, **inputs).last_hidden_state
                out.backward(torch.ones_like(out))
                embeds.grad = None

            timing = measure(run, device, bench.shapes.repeats)
            results.add(f"The decoder alone, forwards and backwards, {name}", attention=attention,
                        samples=layout, tokens=rows * width, ms=rounded(timing.seconds * 1000),
                        peak_GB=rounded(timing.peak_gb))  # fmt: skip
    use_attention(llm, "sdpa")


def _variants(results: Results, bench: Bench, name: str) -> None:
    """Time what could make a CMO step faster, each beside the step as it is."""
    texts = bench.texts(bench.shapes.captions[0])
    table = f"Candidates, a CMO step of align, {name}"

    def add(what: str, step: Callable[[], object]) -> None:
        timing = measure(step, results.device, bench.shapes.repeats)
        results.add(table, candidate=what, ms=rounded(timing.seconds * 1000),
                    peak_GB=rounded(timing.peak_gb))  # fmt: skip

    with results.attempt("the step as it is"):
        results.need(3)
        add("as it is", bench.step("cmo", texts))
    with results.attempt("the encoder alone"):
        results.need(3)
        pixels = bench.data("cmo", texts)["pixel_values"].to(torch.bfloat16)
        with torch.no_grad():
            add("the encoder alone: what a cache of its features saves",
                lambda: bench.encoder(pixels, output_hidden_states=True))  # fmt: skip
    with results.attempt("synchronisations"):
        step = bench.step("cmo", texts)
        step()
        results.add("How often a step waits for the GPU", step="cmo", times=_synchronisations(step))
    with results.attempt("flash_attention_2"):
        results.need(5)
        use_attention(bench.llm, "flash_attention_2")
        add("FlashAttention-2, padded", bench.step("cmo", texts))
    use_attention(bench.llm, "sdpa")
    if results.device == "cuda":  # a CPU needs a compiler, and minutes
        with results.attempt("compiled layers"):
            results.need(150)
            layers = bench.llm.get_decoder().layers
            for layer in layers:
                layer.compile()
            try:
                add("decoder layers compiled", bench.step("cmo", texts))
            finally:
                for layer in layers:
                    layer._compiled_call_impl = None


def _synchronisations(step: Callable[[], object]) -> int | None:
    if not torch.cuda.is_available():
        return None
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchroniz" in str(warning.message) for warning in seen)


def _tune_rows(results: Results, bench: Bench, name: str) -> None:
    """Time a step of ``tune`` with LoRA. It changes the LLM, so it comes last."""
    from peft import LoraConfig

    from dpa_xtuner.model.dpa_llava import DPALLaVAModel

    texts = bench.texts(bench.shapes.captions[-1])[: bench.shapes.samples // 2]
    with results.attempt(f"{name}, tune"):
        results.need(10)
        rank = bench.shapes.rank
        model = DPALLaVAModel(
            llm=bench.llm, visual_encoder=bench.encoder, freeze_llm=True,
            freeze_visual_encoder=True, use_activation_checkpointing=True, normalize="global",
            llm_lora=LoraConfig(r=rank, lora_alpha=2 * rank, task_type="CAUSAL_LM"),
        )  # fmt: skip
        model.to(results.device).train()
        trained = sum(p.numel() for p in model.llm.parameters() if p.requires_grad)
        for again, fused in ((True, False), (True, True), (False, False)):
            with results.attempt(f"{name}, tune, recomputed {again}"):
                results.need(5)
                if not again:
                    model.activation_checkpointing_disable()
                step = bench.step("cmo", texts, model, fused)
                timing = measure(step, results.device, bench.shapes.repeats)
                results.add(
                    f"A step of tune with LoRA of rank {rank}, {name}", samples=len(texts),
                    answer=bench.shapes.captions[-1], recomputed="yes" if again else "no",
                    fused_AdamW="yes" if fused else "no",
                    **_cost(timing, bench.useful_flops("cmo", texts, trained)),
                )  # fmt: skip


def heads(results: Results) -> None:
    """Time head and cross entropy with the gradient of the hidden states; the head is frozen."""
    from torch.nn import functional as F

    from dpa_xtuner.loss import token_log_probs

    shapes, device = sizes(results.device), results.device
    for vocabulary in shapes.vocabularies:
        for tokens in shapes.captions:
            count = tokens * shapes.samples
            like = dict(device=device, dtype=torch.bfloat16)
            hidden = torch.randn(count, shapes.hidden, **like).requires_grad_()
            weight = torch.randn(vocabulary, shapes.hidden, **like) * 0.02
            targets = torch.randint(vocabulary, (count,), device=device)

            def plain(hidden=hidden, weight=weight, targets=targets) -> Tensor:
                return F.cross_entropy((hidden @ weight.T).float(), targets, reduction="none")

            def ours(hidden=hidden, weight=weight, targets=targets) -> Tensor:
                return token_log_probs(hidden, targets, weight).cross_entropy

            def torchs(hidden=hidden, weight=weight, targets=targets) -> Tensor:
                return F.linear_cross_entropy(hidden, weight, targets, reduction="none")

            def ligers(hidden=hidden, weight=weight, targets=targets) -> Tensor:
                from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

                found = liger_fused_linear_cross_entropy(hidden, weight, targets, reduction="none")
                return found[0] if isinstance(found, tuple) else found

            ways = {"ours, chunked": ours, "plain PyTorch": plain,
                    "torch's linear_cross_entropy": torchs, "liger-kernel": ligers}  # fmt: skip
            expected = torch.autograd.grad(plain().mean(), hidden)[0]
            for way, compute in ways.items():
                with results.attempt(f"{way}, vocabulary {vocabulary}"):
                    results.need(2)
                    gradient = torch.autograd.grad(compute().mean(), hidden)[0]
                    error = (gradient - expected).norm() / expected.norm()
                    timing = measure(
                        lambda run=compute, hidden=hidden: torch.autograd.grad(
                            run().mean(), hidden
                        ),
                        device,
                        shapes.repeats,
                    )
                    results.add(
                        "Head and cross entropy, forwards and backwards", way=way,
                        vocabulary=vocabulary, tokens=count, ms=rounded(timing.seconds * 1000),
                        peak_GB=rounded(timing.peak_gb), gradient_off_by=rounded(float(error)),
                    )  # fmt: skip


def profile(results: Results) -> None:
    """List the ten most expensive kernels of a CMO step, and how long the GPU waits."""
    from torch.profiler import ProfilerActivity

    shapes = sizes(results.device)
    name, config = next(iter(shapes.llms.items()))
    bench = Bench(config, shapes, results)
    step, count = bench.step("cmo", bench.texts(shapes.captions[0])), 3
    activities = [ProfilerActivity.CPU]
    if results.device == "cuda":
        activities.append(ProfilerActivity.CUDA)
    for _ in range(3):
        step()
    with torch.profiler.profile(activities=activities) as profiler:
        for _ in range(count):
            step()
        if results.device == "cuda":
            torch.cuda.synchronize()
    trace = results.path.with_suffix(".trace")
    profiler.export_chrome_trace(str(trace))
    events = json.loads(trace.read_text())["traceEvents"]
    trace.unlink()
    kinds = {"kernel", "gpu_memcpy", "gpu_memset"} if results.device == "cuda" else {"cpu_op"}
    ran = [e for e in events if e.get("cat") in kinds and e.get("dur")]
    totals: dict[str, list[float]] = {}
    for event in ran:
        totals.setdefault(event["name"], []).append(event["dur"])
    everything = sum(map(sum, totals.values()))
    for kernel, times in sorted(totals.items(), key=lambda item: -sum(item[1]))[:10]:
        results.add(f"The most expensive kernels of a CMO step, {name}", kernel=kernel[:90],
                    calls=len(times) // count, ms=rounded(sum(times) / count / 1000),
                    share=rounded(sum(times) / everything))  # fmt: skip
    busy, end = 0.0, -math.inf  # merge what overlaps
    for begin, stop in sorted((e["ts"], e["ts"] + e["dur"]) for e in ran):
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    if not ran:
        raise RuntimeError("the profiler saw no kernel")
    whole = end - min(e["ts"] for e in ran)
    results.add("The share of time in which no kernel runs", step=f"cmo, {name}",
                share=rounded(1 - busy / whole))  # fmt: skip


def stages(results: Results) -> None:
    """Train the three stages of a tiny config: twice, killed and resumed, in float16; export."""
    results.need(100 if results.device == "cpu" else 30)
    with tempfile.TemporaryDirectory(prefix="dpa_gpu_") as folder:
        _run_stages(results, Path(folder))


def _run_stages(results: Results, folder: Path) -> None:
    environment = {**os.environ, "DPA_TINY": str(folder), "DPA_CACHE": str(folder / "cache")}
    environment |= {"HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    _make_inputs(folder)

    def start(name: str, *options: str) -> subprocess.Popen:
        command = [sys.executable, str(ROOT / "tools" / "train.py"), str(TINY_CONFIG)]
        command += ["--work-dir", str(folder / name), "--cfg-options", *options]
        with open(folder / f"{name}.log", "a") as log:
            return subprocess.Popen(
                command, env=environment, stdout=log, stderr=log, start_new_session=True
            )

    runs = {"bf16, killed": "bf16"}
    if results.device == "cuda":  # beside each other; on a CPU one takes a minute
        runs = {"bf16": "bf16", "bf16, the same seed": "bf16", **runs, "fp16": "fp16"}
    going = {name: start(name, f"precision={how}") for name, how in runs.items()}
    killed = False
    try:
        while any(process.poll() is None for process in going.values()):
            results.need(15)
            if not killed and list((folder / "bf16, killed" / "align").glob("iter_*")):
                os.killpg(going["bf16, killed"].pid, signal.SIGKILL)
                going["bf16, killed"].wait()
                going["bf16, killed"] = start("bf16, killed", "precision=bf16")
                killed = True
            time.sleep(0.1)
    except TimeoutError:
        results.note("The runs were stopped: no time was left.")
    finally:
        for process in going.values():
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    for name, process in going.items():
        if process.returncode > 0:
            log = (folder / f"{name}.log").read_text().strip().splitlines()
            results.note(f"{name} failed: {log[-1] if log else 'no output'}")
        losses = [
            f"{stage} {json.loads(line)['loss']:.3f}"
            for stage in ("proxy", "align", "tune")
            for line in _last_losses(folder / name / stage)
        ]
        again = f"{', resumed' if killed else ', NOT killed in time'}" if "killed" in name else ""
        code = "stopped" if process.returncode < 0 else process.returncode
        results.add("The three stages of a tiny config", run=name + again, exit_code=code,
                    last_losses=", ".join(losses))  # fmt: skip
    if results.cut_off:
        return
    for name in list(runs)[1:3]:
        with results.attempt(f"weights of {name}"):
            results.add("Weights against those of the run `bf16`", run=name,
                        **_differences(folder / "bf16", folder / name))  # fmt: skip
    with results.attempt("the export"):
        results.need(10)
        _open_export(results, folder, next(iter(runs)), environment)


def _make_inputs(folder: Path) -> None:
    import dpa_xtuner.plugin  # noqa: F401, I001
    from mmengine.config import Config

    from dpa_xtuner.planning.rehearsal import PRECISION, make_inputs
    from dpa_xtuner.stages.run import Run

    os.environ["DPA_TINY"] = str(folder)
    make_inputs(Run.of(Config.fromfile(TINY_CONFIG), PRECISION), folder)


def _last_losses(stage: Path) -> list[str]:
    """Return the last line of a stage's log that has a loss, if there is one."""
    logs = sorted(stage.glob("*/vis_data/scalars.json"))
    lines = [line for log in logs for line in log.read_text().splitlines() if '"loss"' in line]
    return lines[-1:]


def _differences(one: Path, other: Path) -> dict[str, Any]:
    """Compare all weights that two runs have written."""
    from safetensors.torch import load_file

    count, unequal, largest, first = 0, 0, 0.0, ""
    for file in sorted(one.glob("*/*/*.safetensors")):
        others = load_file(other / file.relative_to(one))
        for key, tensor in load_file(file).items():
            count += 1
            if not torch.equal(tensor, others[key]):
                unequal += 1
                first = first or f"{file.relative_to(one)}: {key}"
                off = (tensor.double() - others[key].double()).norm()
                largest = max(largest, float(off / tensor.double().norm()))
    if not count:
        raise FileNotFoundError(f"{one} has no weights")
    return dict(tensors=count, unequal=unequal, largest_relative_difference=rounded(largest),
                first=first)  # fmt: skip


def _open_export(results: Results, folder: Path, run: str, environment: dict[str, str]) -> None:
    """Export a run in float32, and open it by transformers alone."""
    from transformers import LlavaForConditionalGeneration

    out = folder / "exported"
    command = [sys.executable, str(ROOT / "tools" / "export.py"), str(TINY_CONFIG), "-o", str(out)]
    command += ["--work-dir", str(folder / run), "--dtype", "float32"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError((done.stderr or done.stdout).strip().splitlines()[-1])
    model = LlavaForConditionalGeneration.from_pretrained(out).to(results.device).eval()
    text = torch.arange(3, 11, device=results.device)[None]
    with torch.no_grad():
        logits = model(input_ids=text).logits
    results.add(f"Export of the run `{run}`", opened_by="transformers", logits=str([*logits.shape]),
                finite="yes" if logits.isfinite().all() else "NO")  # fmt: skip


def study(results: Results) -> None:
    """Run further seeds of the study, if it is there, as many as fit into the time."""
    if not (ROOT / "studies" / "run.py").is_file():
        results.note("studies/ is not there: not measured.")
        return
    if results.device == "cpu":
        results.note("On a CPU, `make study` runs it: not measured here.")
        return
    results.need(120)
    lines = results.path.with_suffix(".jsonl")
    minutes = (results.until - time.time()) / 60 - 1  # the last ones need a minute
    command = [sys.executable, "-m", "studies.run", "full", "--parts", "methods"]
    command += ["--seeds", "40", "41", "--processes", "8"]
    command += ["--minutes", f"{minutes:.1f}", "--results", str(lines)]
    with tempfile.TemporaryDirectory(prefix="dpa_study_") as folder:
        done = subprocess.run([*command, "--work-dir", folder], cwd=ROOT)
    results.add("The study", command=shlex.join(command[1:]), exit_code=done.returncode,
                runs=len(lines.read_text().splitlines()) if lines.is_file() else 0)  # fmt: skip
    results.note(f"Copy {lines.name} into studies/results, and run `python -m studies.report`.")


PARTS = {
    "correctness": Part(
        correctness, 1.5, "Numbers",
        "A tiny model with the same weights on the GPU and on the CPU: loss of CMO, weights of the "
        "tokens, gradient of the projector. The error is the norm of the difference over the norm.",
    ),
    "steps": Part(
        steps, 5, "Cost of a step",
        "Random weights, micro-batches of 8 samples (tune: 4) of 576 image tokens and captions "
        "whose lengths differ by up to a tenth. `stock` is XTuner's model, `plain` CMO by its "
        "formula with nothing saved. Median of 10 after 2, by CUDA events. `recomputed`: "
        "activation checkpointing. `of_peak_FLOPs`: operations that the step needs, over time and "
        "the card's dense bfloat16 peak.",
    ),
    "stages": Part(
        stages, 6, "Three stages",
        "A tiny config, six steps a stage, each run a process of its own.",
    ),
    "profile": Part(
        profile, 1, "Profile", "Three steps under torch.profiler.",
    ),
    "head": Part(
        heads, 1, "Head and loss",
        "Of the supervised tokens, with the gradient of the hidden states; the head is frozen.",
    ),
    "study": Part(
        study, 2, "Study",
        "Further seeds of the study's world (`studies/`). The study of SmolLM2-135M is a command "
        "of its own: `python -m studies.openmoji`.",
    ),
}  # fmt: skip


def run_part(name: str, args: argparse.Namespace) -> None:
    """Do a part in this process."""
    results = Results(args.out, name, args.device, args.until)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that it ends what it started
    try:
        PARTS[name].work(results)
    except (TimeoutError, KeyboardInterrupt):
        sys.exit(CUT_OFF)  # its state is "cut off" from the beginning
    except (Exception, SystemExit) as error:
        results.content["state"] = f"failed: {type(error).__name__}: {error}"
        results.write()
        raise
    if results.cut_off:
        sys.exit(CUT_OFF)
    results.content["state"] = "complete"
    results.write()


def run_all(args: argparse.Namespace) -> int:
    """Do the parts one after the other, each in its share of the time that is left."""
    args.out.mkdir(parents=True, exist_ok=True)
    print(", ".join(f"{key} {value}" for key, value in describe(args.device).items()), flush=True)
    end = time.monotonic() + args.minutes * 60 - 5
    shares = {name: PARTS[name].share for name in args.parts}
    codes = {}
    for name in args.parts:
        left = end - time.monotonic()
        seconds = max(0, min(left, max(MINIMUM, left * shares[name] / sum(shares.values()))))
        del shares[name]
        if seconds < MINIMUM / 6:
            print(f"\n{name}: no time was left", flush=True)
            continue
        until = time.time() + seconds - 3  # before it is stopped
        command = [sys.executable, __file__, "--part", name, "--until", f"{until:.1f}"]
        command += ["--device", args.device, "--out", str(args.out)]
        print(f"\n{name}: up to {seconds:.0f} s", flush=True)
        began = time.monotonic()
        process = subprocess.Popen(command, start_new_session=True)
        try:
            codes[name] = process.wait(seconds)
        except subprocess.TimeoutExpired:
            codes[name] = CUT_OFF
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(2)
        finally:
            with contextlib.suppress(ProcessLookupError):  # and what it has started
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        how = "cut off" if codes[name] == CUT_OFF else f"exit code {codes[name]}"
        print(f"{name}: {time.monotonic() - began:.0f} s, {how}", flush=True)
    print(f"\n{report(args.out)}")
    return any(code not in (0, CUT_OFF) for code in codes.values())


# The report


INTRODUCTION = f"""\
# On a GPU

This command checks and measures everything that needs a GPU, the most valuable parts first. A run
that is cut off keeps what it has:

    {COMMAND}

It needs no network and no weights: models are made on the GPU. It runs on the versions of
every file of `constraints/`; [`install.md`](install.md) is for a machine without
a network. A library that is missing costs only the figures that need it. `--device cpu` runs the
same code with tiny shapes, as the tests do. The tests also run most of what is for a GPU alone on
a pretended one: tensors that compute on the CPU, and refuse to be mixed with others.

`python benchmarks/gpu.py --report docs/gpu > docs/gpu.md` writes this page from the results. Each
part names its card and date, or says that it was not measured. Many GPUs are in
[`scaling.md`](scaling.md).

The goals, for a CMO step of `align` at the 7B shapes on one H100: at most 0.8 of stock XTuner's
time; at least 45 % of the card's bfloat16 peak without activation checkpointing; at most 8 % more
than a `uniform` step; at most 0.6 of `plain`'s peak memory. A candidate for a faster step is
adopted with a figure before and after from one run. Only changes that need no figure were made: a
CMO micro-batch makes the GPU wait 8 times in place of 14, with the same numbers to the bit, and
ranks get about as many tokens."""


def report(folder: Path) -> str:
    """Lay out all results as Markdown; say what is missing, and the command that measures it."""
    parts = [INTRODUCTION]
    for name, part in PARTS.items():
        parts += [f"## {part.title}", part.about]
        path = folder / f"{name}.json"
        if not path.is_file():
            parts += [f"**Not measured.** `{COMMAND} --parts {name}` measures it."]
            continue
        content = json.loads(path.read_text())
        if content["state"] != "complete":
            parts += [f"**Not complete** ({content['state']})."]
        keys = ("device", "driver", "cuda", "python", "versions", "date")
        parts += ["; ".join(f"{key}: {content[key]}" for key in keys) + "."]
        for title, rows in content["tables"].items():
            parts += [f"{title}:", _table(rows)]
        parts += [f"- {note}" for note in content["notes"]]
    return "\n\n".join(parts)


def _table(rows: list[dict]) -> str:
    header = list(dict.fromkeys(key for row in rows for key in row))
    lines = ["| " + " | ".join(key.replace("_", " ") for key in header) + " |"]
    lines += ["|" + "---|" * len(header)]
    for row in rows:
        cells = ("" if row.get(key) is None else str(row[key]) for key in header)
        lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"]
    return "\n".join(lines)


def main() -> int:
    """Measure, or report."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    usual = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--minutes", type=float, default=8, help="for all parts together")
    parser.add_argument("--device", choices=["cuda", "cpu"], default=usual)
    parser.add_argument("--out", type=Path, default=Path("docs/gpu"), help="folder of the results")
    parser.add_argument("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--report", type=Path, metavar="FOLDER", help="print its results")
    parser.add_argument("--part", choices=list(PARTS), help=argparse.SUPPRESS)
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.report:
        print(report(args.report))
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: there is no GPU that this PyTorch can use. Try --device cpu.")
    args.out = args.out.resolve()
    sys.path.insert(0, str(ROOT))
    if args.part:
        run_part(args.part, args)
        return 0
    return run_all(args)


if __name__ == "__main__":
    sys.exit(main())
