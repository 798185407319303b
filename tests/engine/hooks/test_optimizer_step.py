"""A step does not depend on how its batch is cut; with DeepSpeed as without it."""

import os
from contextlib import nullcontext
from types import SimpleNamespace

import deepspeed
import pytest
import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_grad
from mmengine._strategy.deepspeed import DeepSpeedOptimWrapper, MMDeepSpeedEngineWrapper
from mmengine.model import MMDistributedDataParallel
from mmengine.optim import OptimWrapper
from support.harness import Processes, free_port
from support.tiny_llava import MIXED, build, sample

from dpa_xtuner import compat
from dpa_xtuner.data import collate
from dpa_xtuner.engine.hooks import OptimizerStepHook
from dpa_xtuner.errors import DPAError

pytestmark = pytest.mark.slow

EIGHT = MIXED + [
    sample(1, 6, 40, 41, "image", 42, 43, 9, 44, 45, 10, 46),
    sample(1, "image", 8, 9),  # nothing supervised
    sample(1, 47, 48),
    sample("image", 5, 27, 28, 29, 37, 38),
]
CMO = dict(type="cmo", d_min=0.0005, d_max=0.03)
Updates = dict[str, torch.Tensor]

ROUNDING = 2e-6  # of float32 sums; transformers 5 draws other weights, with larger terms


def make(normalize: str, **kwargs):
    return build(True, loss=CMO, normalize=normalize, **kwargs).train()


def trained(model) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def step(normalize: str, micro_batches: list[list[dict]], wrap=None, **clip) -> Updates:
    """What SGD with a learning rate of 1 takes off the weights in a step."""
    model = make(normalize)
    before = {name: p.detach().clone() for name, p in trained(model).items()}
    counts = len(micro_batches)
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    wrapper = OptimWrapper(optimizer, accumulative_counts=counts, **clip)
    wrapped = wrap(model) if wrap else model
    if normalize == "global":
        OptimizerStepHook().before_train(SimpleNamespace(model=wrapped, optim_wrapper=wrapper))
    wrapper.initialize_count_status(wrapped, 0, 2 * counts)
    for samples in micro_batches:
        assert all(torch.equal(before[name], p) for name, p in trained(model).items())
        wrapped.train_step(collate(samples), wrapper)
    return {name: before[name] - p.detach() for name, p in trained(model).items()}


def cut(samples: list[dict], size: int) -> list[list[dict]]:
    return [samples[i : i + size] for i in range(0, len(samples), size)]


def on_two_ranks(folder, body) -> None:
    """Run body(rank) in two processes with gloo between them."""
    port = str(free_port())

    def rank(number: int):
        def run() -> None:
            os.environ.update(RANK=str(number), LOCAL_RANK=str(number), WORLD_SIZE="2")
            os.environ.update(LOCAL_WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
            dist.init_process_group("gloo")
            body(number)
            dist.destroy_process_group()

        return run

    processes = Processes([rank(0), rank(1)], folder / "log")
    assert processes.wait() == 0, processes.log.read_text()


def distance(one: Updates, other: Updates) -> float:
    return max((one[name] - other[name]).abs().max().item() for name in one)


@pytest.fixture(scope="module")
def whole() -> Updates:
    updates = step("global", [EIGHT])
    assert min(update.abs().max().item() for update in updates.values()) > 0.01
    return updates


def test_one_batch_is_divided_by_its_own_weights(whole):
    assert distance(step("micro_batch", [EIGHT]), whole) < ROUNDING


@pytest.mark.parametrize("size", [1, 2, 4])
def test_accumulated_micro_batches_make_the_step_of_one_batch(size, whole):
    assert distance(step("global", cut(EIGHT, size)), whole) < ROUNDING
    assert distance(step("micro_batch", cut(EIGHT, size)), whole) > 1e-3


@pytest.mark.parametrize("size", [4, 2], ids=["whole", "accumulated"])
def test_two_ranks_make_the_step_of_one(size, whole, tmp_path):
    def body(rank: int) -> None:
        for normalize in ("global", "micro_batch"):
            updates = step(
                normalize,
                cut(EIGHT[4 * rank : 4 * rank + 4], size),
                wrap=lambda model: MMDistributedDataParallel(model, device_ids=None),
            )
            torch.save(updates, tmp_path / f"{normalize}-{rank}.pt")

    on_two_ranks(tmp_path, body)
    for rank in range(2):
        assert distance(torch.load(tmp_path / f"global-{rank}.pt"), whole) < ROUNDING
        assert distance(torch.load(tmp_path / f"micro_batch-{rank}.pt"), whole) > 1e-3


def test_each_step_has_its_own_weights():
    model = make("global")
    wrapper = OptimWrapper(torch.optim.SGD(trained(model).values(), lr=0.0), accumulative_counts=2)
    OptimizerStepHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    wrapper.initialize_count_status(model, 0, 8)
    seen = []
    optimizer_step = wrapper.optimizer.step

    def look(*args, **kwargs):
        seen.append({name: p.grad.clone() for name, p in trained(model).items()})
        optimizer_step(*args, **kwargs)

    wrapper.optimizer.step = look
    for samples in [*cut(EIGHT, 4), *cut(EIGHT[:4], 2)]:
        model.train_step(collate(samples), wrapper)
    assert distance(seen[0], step("global", [EIGHT])) < ROUNDING
    assert distance(seen[1], step("global", [EIGHT[:4]])) < ROUNDING


def norm(updates: Updates) -> float:
    return torch.cat([update.flatten() for update in updates.values()]).norm().item()


def test_the_divided_gradient_is_clipped(whole):
    below = dict(clip_grad=dict(max_norm=0.5 * norm(whole)))
    clipped = step("global", cut(EIGHT, 2), **below)
    assert distance(clipped, {name: 0.5 * update for name, update in whole.items()}) < 1e-5
    above = dict(clip_grad=dict(max_norm=1.1 * norm(whole)))
    assert distance(step("global", cut(EIGHT, 2), **above), whole) < ROUNDING


# DeepSpeed: each run in a process of its own.


def engine_of(model, stage: int, counts: int, bf16: bool, max_norm: float = 0.0):
    compat.deepspeed_without_mpi()
    deepspeed.init_distributed(dist_backend="gloo")
    optimizer = torch.optim.SGD(trained(model).values(), lr=1.0)
    engine, *_ = deepspeed.initialize(
        model=model,
        optimizer=optimizer,
        config=dict(
            train_micro_batch_size_per_gpu=1,
            gradient_accumulation_steps=counts,
            gradient_clipping=max_norm,
            zero_allow_untested_optimizer=True,
            zero_force_ds_cpu_optimizer=False,
            zero_optimization=dict(stage=stage, stage3_param_persistence_threshold=0),
            bf16=dict(enabled=bf16),
        ),
    )
    wrapper = DeepSpeedOptimWrapper(optimizer=engine.optimizer)
    wrapped = MMDeepSpeedEngineWrapper(model=engine, inputs_to_half=["pixel_values"])
    wrapper.model = wrapped
    return wrapped, wrapper


def in_a_process(folder, body) -> list:
    """What body() returns, from a child."""
    processes = Processes([lambda: torch.save(body(), folder / "result")], folder / "log")
    assert processes.wait() == 0, processes.log.read_text()[-3000:]
    return torch.load(folder / "result")


def deepspeed_step(stage: int, micro_batches: list[list[dict]], max_norm: float) -> Updates:
    model = make("global").bfloat16()
    names = list(trained(model))
    wrapped, wrapper = engine_of(model, stage, len(micro_batches), True, max_norm)
    OptimizerStepHook().before_train(SimpleNamespace(model=wrapped, optim_wrapper=wrapper))

    def look() -> Updates:
        return {name: safe_get_full_fp32_param(trained(model)[name]).clone() for name in names}

    before = look()
    for samples in micro_batches:
        wrapped.train_step(collate(samples), wrapper)
    return {name: before[name] - after for name, after in look().items()}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_deepspeed_divides_and_clips_as_plain_training_does(stage, whole, tmp_path):
    def body() -> list[Updates]:
        runs = [(cut(EIGHT, 8), 0.0), (cut(EIGHT, 4), 0.0), (cut(EIGHT, 4), 0.5 * norm(whole))]
        runs += [(cut(EIGHT, 4), 1.5 * norm(whole))]
        return [deepspeed_step(stage, *run) for run in runs]

    one, two, clipped, unclipped = in_a_process(tmp_path, body)
    assert similar(one, whole) and similar(two, whole) and similar(unclipped, whole)
    assert similar(clipped, {name: 0.5 * update for name, update in whole.items()})


@pytest.mark.parametrize("size", [4, 2], ids=["whole", "accumulated"])
def test_zero2_on_two_ranks_makes_the_step_of_one(size, whole, tmp_path):
    def body(rank: int) -> None:
        micro_batches = cut(EIGHT[4 * rank : 4 * rank + 4], size)
        torch.save(deepspeed_step(2, micro_batches, 0.0), tmp_path / f"{rank}.pt")

    on_two_ranks(tmp_path, body)
    ranks = [torch.load(tmp_path / f"{rank}.pt") for rank in range(2)]
    assert distance(*ranks) == 0
    assert similar(ranks[0], whole)
    assert not similar(step("micro_batch", cut(EIGHT, 4)), whole)


def similar(one: Updates, other: Updates) -> bool:
    """Within what bfloat16 leaves of the direction and of the length."""
    return distance(one, other) < 0.1 * max(update.abs().max().item() for update in other.values())


@pytest.mark.parametrize("fails", [False, True])
def test_deepspeeds_loss_scale_is_its_own_again_after_the_step(fails):
    model, seen = make("global"), []
    optimizer = SimpleNamespace(loss_scaler=None, loss_scale=4.0)  # of float16; 1 in bfloat16
    engine = SimpleNamespace(
        optimizer=optimizer,
        is_gradient_accumulation_boundary=lambda: True,
        gradient_accumulation_steps=lambda: 2,
    )

    def optimizer_step() -> None:
        seen.append(optimizer.loss_scale)
        if fails:
            raise RuntimeError("out of memory")

    wrapper = SimpleNamespace(model=engine, step=optimizer_step)
    OptimizerStepHook().before_train(SimpleNamespace(model=model, optim_wrapper=wrapper))
    of_two = {"weight": torch.tensor(6.0), "micro_batches": torch.tensor(2.0)}
    model.objective.seen = {name: value.double() for name, value in of_two.items()}
    with pytest.raises(RuntimeError, match="out of memory") if fails else nullcontext():
        wrapper.step()
    assert seen == [pytest.approx(4.0 * 6 / 2)]
    assert optimizer.loss_scale == pytest.approx(4.0)


def test_an_optimizer_without_a_loss_scale_is_refused(tmp_path):
    model = make("global")
    engine = SimpleNamespace(optimizer=torch.optim.SGD(trained(model).values(), lr=1.0))
    runner = SimpleNamespace(model=model, optim_wrapper=SimpleNamespace(model=engine, step=None))
    with pytest.raises(DPAError, match="'global' does not work with SGD: use --deepspeed zero1"):
        OptimizerStepHook().before_train(runner)


@pytest.mark.parametrize("head", ["trained", "frozen"])
def test_zero3_gives_the_gradients_of_plain_training(head, tmp_path):
    def fresh():
        model = make("micro_batch", freeze_llm=False, use_activation_checkpointing=False)
        model.llm.lm_head.requires_grad_(head == "trained")
        return model

    plain = fresh()
    plain.compute_loss(collate(EIGHT)["data"])["loss"].backward()
    expected = {name: p.grad for name, p in trained(plain).items()}
    assert ("llm.lm_head.weight" in expected) == (head == "trained")

    def body() -> Updates:
        model = fresh()
        wrapped, wrapper = engine_of(model, 3, 1, bf16=False)
        data = model.data_preprocessor(collate(EIGHT), True)
        wrapper.backward(wrapped.model(**data, mode="loss")["loss"])
        return {name: safe_get_full_grad(p).clone() for name, p in trained(model).items()}

    found = in_a_process(tmp_path, body)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.any() and torch.allclose(found[name], gradient, atol=1e-5), name
