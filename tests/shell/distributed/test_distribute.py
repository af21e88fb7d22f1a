"""distribute: several ranks do the step that one process does."""

import functools
from datetime import timedelta

import attrs
import jobs
import pytest
import torch
import torch.distributed as dist
from pool import TIMEOUT
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import fntrain as ft
from fntrain.shell.distributed import replicas as exchange

TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-12}


def close(ranks, alone, dtype):
    """Whether values are those of one process, relative to the largest of their tensor."""
    for name, value in alone["params"].items():
        scale = value.abs().max()
        for one in ranks:
            assert (one["params"][name] - value).abs().max() <= TOLERANCE[dtype] * scale, name


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("loss", jobs.LOSSES)
@pytest.mark.parametrize("size", [2, 3])
def test_ranks_with_ragged_micro_batches_are_one_process_with_the_whole_batch(ranks, size, loss, accumulate, dtype):
    """Batches of 11 over 2 or 3 ranks, in 1 or 3 micro-batches: gradients and losses of the whole batch."""
    job = functools.partial(jobs.train, loss, accumulate=accumulate, dtype=dtype, clip_grad_norm=0.5)
    found, alone = ranks(size)(job), jobs.train(loss, dtype=dtype, clip_grad_norm=0.5)
    close(found, alone, dtype)
    assert len({one["digest"] for one in found}) == 1
    for name in ("loss", "grad_norm"):
        for one in found:
            assert one["metrics"][name] == pytest.approx(alone["metrics"][name], rel=10 * TOLERANCE[dtype])


def scaled_by_run():
    recipe = ft.Recipe(
        config=ft.Config(batch_size=4, lr=0.1, max_steps=8, reference_world_size=1),
        build_model=lambda config: torch.nn.Linear(2, 1),
        build_data=lambda config: torch.ones(8, 2),
        loss_fn=lambda model, batch: model(batch).square().mean(),
    )
    job = ft.build(recipe)
    return job.config.batch_size, job.config.lr, job.config.max_steps, job.data.batch_size


def test_settings_for_one_process_are_scaled_to_the_ranks(ranks):
    """With reference_world_size: the linear scaling rule, applied by build."""
    assert ranks(2)(scaled_by_run) == [(8, 0.2, 4, 8)] * 2
    assert scaled_by_run() == (4, 0.1, 8, 4)


def with_another_seed_per_rank():
    step_fn, state, data = jobs.parts()
    data = attrs.evolve(data, seed=ft.shell.ranks().rank)
    ft.fit(ft.shell.distribute(step_fn), state=state, data=data, max_steps=1)


def test_ranks_whose_data_come_in_another_order_are_refused(ranks):
    """Their shares would not make up one batch."""
    with pytest.raises(RuntimeError, match=r"ValueError: data: rank 1 has \{.*'seed': 1.*rank 0 has \{.*'seed': 0"):
        ranks(2)(with_another_seed_per_rank)


def time_limits():
    """Of the process group, and of the channels between ranks."""
    here = ft.shell.ranks()
    aside = here.channel()
    groups = (dist.group.WORLD, here.group, aside.group)
    limits = [group._get_backend(torch.device("cpu")).options._timeout for group in groups]
    aside.close()
    return limits


def test_channels_wait_as_long_as_the_process_group(ranks):
    """Not torch's half an hour."""
    for limits in ranks(2)(time_limits):
        assert set(limits) == {timedelta(seconds=TIMEOUT)}


class Copies(TorchDispatchMode):
    """Counts copies from device to device."""

    def __init__(self):
        super().__init__()
        self.number = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.number += func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("number", [3, 2.5, True])
def test_numbers_to_add_up_are_not_copied_to_the_device(number):
    """A copy from the host's memory would wait for all that the device has to do."""
    with FakeTensorMode(), Copies() as copies:
        found = exchange._doubles([number], torch.device("cuda"))
    assert copies.number == 0 and (found.device.type, found.dtype, found.shape) == ("cuda", torch.float64, (1,))
    assert exchange._doubles([number], torch.device("cpu")).item() == number


KINDS = [
    torch.float32,
    torch.float64,
    torch.bfloat16,
    torch.int16,
    torch.int64,
    torch.uint8,
    torch.bool,
    torch.complex64,
]


def shared_buffers(size):
    """Buffers of all kinds, different on each rank; a view with strides, one without elements."""
    rank = dist.get_rank() if dist.is_initialized() else 0
    made = [
        torch.full((), rank + 1).to(kind) if n % 2 else torch.full((3, n), rank + 1).to(kind)
        for n, kind in enumerate(KINDS)
    ]
    made += [torch.full((2,), 1j * (rank + 1)).conj()]
    made += [torch.arange(12.0).add(100 * rank).view(3, 4).t(), torch.empty(0, 2)]
    if dist.is_initialized():
        exchange.Exchanging(ft.shell.ranks()).broadcast(made[:size])
    return [one.resolve_conj() for one in made[:size]]


@pytest.mark.parametrize("size", [0, 1, len(KINDS) + 3])
def test_buffers_of_all_kinds_are_those_of_rank_0(ranks, size):
    """One message of bytes: torch's own by gloo lacks some dtypes, and sends one for each."""
    expected = shared_buffers(size)
    for found in ranks(2)(shared_buffers, size):
        assert ft.core.tree.bitwise_equal(found, expected)
