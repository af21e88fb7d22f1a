"""The laws of several ranks where these compute on GPUs: by NCCL with a GPU for each, else by way of the host on one.

Every job also runs on the CPU, so that what is tested is known to be a law before a GPU sees it.
"""

import contextlib
import functools

import attrs
import jobs
import pytest
import torch
from test_ranks_stop import ask

import fntrain as ft
from fntrain.shell.steps.graphs import Graphs

GPU = [pytest.mark.gpu, pytest.mark.filterwarnings("ignore")]
NCCL = [*GPU, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs a GPU for each of 2 ranks")]
DEVICES = ["cpu", pytest.param("cuda", marks=GPU)]
BY_NCCL = ["cpu", pytest.param("cuda", marks=NCCL)]
BOTH = [  # gloo has not all that "fsdp" needs on a GPU
    ("ddp", "cpu"),
    pytest.param("ddp", "cuda", marks=GPU),
    ("fsdp", "cpu"),
    pytest.param("fsdp", "cuda", marks=NCCL),
]
STEPS = 6


def parts(device, **options):
    """As `jobs.parts`, the model on a device."""
    adam = ft.optimizer(torch.optim.AdamW, lr=0.05, **({"fused": True} if device == "cuda" else {}))
    step_fn, _, data = jobs.parts(**{"norm": True, "optimizer": adam, **options})
    step_fn.model.to(device)
    step_fn = attrs.evolve(step_fn)  # of the memory where the model is now
    return step_fn, ft.init_state(step_fn.model, step_fn.optimizer), data


def whole(state):
    full = ft.core.tree.map_tensors(
        lambda tensor: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).cpu().clone(),
        {"params": dict(state.params), "buffers": dict(state.buffers), "opt_state": dict(state.opt_state)},
    )
    return {**full, "step": state.step, "loss": float(state.metrics["loss"]), "stop": state.run.stop}


def trained(device, strategy="ddp", hooks=(), poisoned=None, max_steps=STEPS, options=None, **kwargs):
    """A run's end, and which steps were skipped; one rank's batch may be nan."""
    skipped, here = [], [0]

    def loss_fn(model, batch):
        loss = jobs.masked_loss(model, batch)
        bad = here[0] == poisoned and torch.distributed.is_initialized() and torch.distributed.get_rank() == 1
        return attrs.evolve(loss, loss_sum=loss.loss_sum * float("nan")) if bad else loss

    def before(state):
        here[0] = state.step + 1

    def after(state):
        skipped.append(float(state.metrics.get("skipped_steps", 0)))

    step_fn, state, data = parts(device, loss_fn=loss_fn, **kwargs)
    step_fn = ft.shell.distribute(step_fn, strategy, **(options or {}))
    assert isinstance(step_fn.execution, Graphs) == (device == "cuda")
    watch = ft.hook(before_step=before, after_step=after)
    return whole(ft.fit(step_fn, [watch, *hooks], state=state, data=data, max_steps=max_steps)), skipped


def close(found, alone, rtol):
    for name, value in alone["params"].items():
        assert (found["params"][name] - value).abs().max() <= rtol * value.abs().max(), name
    assert abs(found["loss"] - alone["loss"]) <= rtol * abs(alone["loss"])


def equal(one, other, *fields):
    return all(ft.core.tree.bitwise_equal(one[field], other[field]) for field in fields)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("device", DEVICES)
def test_ddp_is_one_process(ranks, device, accumulate):
    """Weighted losses over ragged shares, in float64."""
    job = functools.partial(trained, device, norm=False, accumulate=accumulate, dtype=torch.float64)
    alone, found = job(), ranks(2)(job)
    assert equal(found[0][0], found[1][0], "params", "opt_state")
    for one, _ in found:
        close(one, alone[0], 1e-11)


@pytest.mark.parametrize("wrapped", [False, True])
@pytest.mark.parametrize("device", BY_NCCL)
def test_fsdp_is_one_process(ranks, device, wrapped):
    """In parts, gathered as a whole or block by block."""
    options = {"wrap": linear} if wrapped else {}
    job = functools.partial(trained, device, norm=False, dtype=torch.float64)
    for one, _ in ranks(2)(functools.partial(job, strategy="fsdp", options=options)):
        close(one, job()[0], 1e-11)


def linear(_name, module):
    return isinstance(module, torch.nn.Linear)


@pytest.mark.parametrize("strategy", [pytest.param(name, marks=NCCL) for name in ("ddp", "fsdp")])
def test_statistics_of_the_global_batch(ranks, strategy):
    """With sync_batchnorm normalised values, gradients and buffers are those of one process."""
    job = functools.partial(trained, "cuda", dtype=torch.float64)
    alone = job()[0]
    for one, _ in ranks(2)(functools.partial(job, strategy=strategy, options={"sync_batchnorm": True})):
        close(one, alone, 1e-9)
        for name, value in alone["buffers"].items():
            assert torch.allclose(one["buffers"][name].double(), value.double(), rtol=1e-9), name


@pytest.mark.parametrize(("strategy", "device"), BOTH)
def test_a_nan_on_one_rank_skips_the_step_on_all(ranks, strategy, device):
    """The device decides, the same on each; the run goes on."""
    found = ranks(2)(functools.partial(trained, device, strategy, poisoned=3))
    assert [skipped for _, skipped in found] == [[0, 0, 1, 0, 0, 0]] * 2
    assert equal(found[0][0], found[1][0], "params", "buffers", "opt_state")
    assert all(value.isfinite().all() for value in found[0][0]["params"].values())


@pytest.mark.parametrize("device", DEVICES)
def test_a_stop_on_one_rank_is_the_end_of_so_many_steps(ranks, device):
    """Bit for bit."""
    stopped = ranks(2)(functools.partial(trained, device, hooks=[ft.hook(after_step=functools.partial(ask, 1, 4))]))
    plain = ranks(2)(functools.partial(trained, device, max_steps=4))
    for (one, _), (other, _) in zip(stopped, plain, strict=True):
        assert one["step"] == 4 and equal(one, other, "params", "buffers", "opt_state")
        assert one["stop"] == ft.Stop("requested", "enough (rank 1)")


@pytest.mark.parametrize(
    ("device", "precision"),
    [("cpu", "bf16"), pytest.param("cuda", "bf16", marks=GPU), pytest.param("cuda", "fp16", marks=GPU)],
)
def test_precision_and_compressed_gradients(ranks, device, precision):
    """Ranks stay bitwise equal, and near one process."""
    job = functools.partial(trained, device, norm=False, precision=precision)
    for options in ({}, {"compress": precision}):
        found = ranks(2)(functools.partial(job, options=options))
        assert equal(found[0][0], found[1][0], "params", "opt_state")
        close(found[0][0], job()[0], 0.5)


def saved(device, strategy, directory):
    hooks = [ft.hooks.checkpoint(directory, every=STEPS)]
    return trained(device, strategy, hooks)[0]


@pytest.mark.parametrize(("strategy", "device"), BOTH)
def test_what_ranks_saved_is_read_on_the_host(ranks, tmp_path, strategy, device):
    """Whole and bit for bit, with one process and no device."""
    found = ranks(2)(saved, device, strategy, tmp_path / "run")
    _, template, _ = parts("cpu")
    state = ft.resume_or(template, tmp_path / "run")
    assert state.step == STEPS
    mine = {"params": dict(state.params), "buffers": dict(state.buffers), "opt_state": dict(state.opt_state)}
    assert equal(mine, found[0], "params", "buffers", "opt_state")


def undisturbed(device):
    """Steps under which any wait for the device is an error."""
    step_fn, state, data = parts(device, clip_grad_norm=1.0)
    step_fn = ft.shell.distribute(step_fn)
    batches = data.shard(step_fn.ranks.rank, 2).at(0)
    ready = [{name: value.to(device) for name, value in next(batches).items()} for _ in range(12)]
    for batch in ready[:5]:
        state = step_fn(state, batch)
    with watched() if device == "cuda" else contextlib.nullcontext():
        for batch in ready[5:]:
            state = step_fn(state, batch)
    return float(state.metrics["loss"])


@contextlib.contextmanager
def watched():
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("device", BY_NCCL)
def test_steps_never_wait_for_the_device(ranks, device):
    """Sums stay there."""
    found = ranks(2)(undisturbed, device)
    assert found[0] == found[1]


def reduced_precision(device):
    final, _ = trained(device, "fsdp", norm=False, options={"mixed_precision": "bf16", "wrap": linear})
    return final


@pytest.mark.parametrize("device", BY_NCCL)
def test_fsdp_in_mixed_precision(ranks, device):
    """Gathered as bfloat16, kept in float32."""
    found = ranks(2)(reduced_precision, device)
    close(found[0], trained(device, norm=False)[0], 0.5)
    assert {value.dtype for value in found[0]["params"].values()} == {torch.float32}
