"""distribute: several ranks do the step that one process does."""

import functools

import jobs
import pytest
import torch

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
