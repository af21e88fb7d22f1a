"""A stop that one rank asks for: all stop after that step, and the next, in which they hear of it, leaves no trace."""

import functools

import jobs
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import fntrain as ft

STRATEGIES = ["ddp", "fsdp"]


def ask(rank, at, state):
    if state.run.ranks.rank in (rank, "alone") and state.step == at:
        return ft.stop(state, "enough")
    return None


def counted(state):
    """Remember how often a step was begun; a step that is given up must not count."""
    return ft.remember(state, "begun", state.hooks["begun"] + 1)


def whole(state):
    """What a state is; of ranks that hold parts, gathered."""
    full = {name: getattr(value, "full_tensor", lambda v=value: v)().clone() for name, value in state.params.items()}
    return {
        "params": full,
        "buffers": {name: value.clone() for name, value in state.buffers.items()},
        "step": state.step,
        "position": state.position,
        "begun": state.hooks["begun"],
        "stop": state.run.stop,
        "loss": float(state.metrics["loss"]),
        "leaving": state.run.leaving,
    }


def trained(strategy, hooks=(), max_steps=9, data=None, **options):
    options = {"norm": True, "optimizer": ft.optimizer(torch.optim.AdamW, lr=0.1), **options}
    step_fn, state, stream = jobs.parts(**options)
    step_fn = ft.shell.distribute(step_fn, strategy)
    hooks = [ft.stateful("begun", 0, before_step=counted), *hooks]
    yielded, seen = [], ft.hook(after_train=lambda state: yielded.append(whole(state)))
    states = ft.states(step_fn, [*hooks, seen], state=state, data=data or stream, max_steps=max_steps)
    yielded.extend(state.step for state in states)
    return yielded


def alike(found, others):
    for mine, its in zip(found, others, strict=True):
        for field in ("params", "buffers"):
            assert all(torch.equal(mine[field][name], its[field][name]) for name in its[field]), field
        assert {k: mine[k] for k in ("step", "position", "begun", "loss")} == {
            k: its[k] for k in ("step", "position", "begun", "loss")
        }


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_a_run_that_one_rank_stops_is_a_run_of_so_many_steps(ranks, strategy, accumulate):
    """Parameters, buffers, position, metrics and what hooks remember, bit for bit; the step given up left nothing."""
    hooks = [ft.hook(after_step=functools.partial(ask, 1, 5))]
    found = ranks(2)(functools.partial(trained, strategy, hooks, accumulate=accumulate))
    plain = ranks(2)(functools.partial(trained, strategy, max_steps=5, accumulate=accumulate))
    alike([one[-1] for one in found], [next(e for e in one if isinstance(e, dict)) for one in plain])
    assert {one[-1]["stop"] for one in found} == {ft.state.Stop("requested", "enough (rank 1)")}
    assert not any(one[-1]["leaving"] for one in found)


def kept_buffers(strategy):
    """A twin whose step, when it is given up, leaves what its forward wrote."""
    from fntrain.shell.in_place import InPlace

    right = InPlace.undo
    InPlace.undo = InPlace.end
    try:
        return trained(strategy, [ft.hook(after_step=functools.partial(ask, 1, 5))])
    finally:
        InPlace.undo = right


def test_the_law_can_fail(ranks):
    """Running statistics of a batch that no step was made of."""
    found, plain = ranks(2)(kept_buffers, "ddp"), ranks(2)(functools.partial(trained, "ddp", max_steps=5))
    with pytest.raises(AssertionError, match="buffers"):
        alike([one[-1] for one in found], [next(e for e in one if isinstance(e, dict)) for one in plain])


def test_all_ranks_yield_the_same_states(ranks):
    """Also the one that asks: a loop over states may have collectives of its own."""
    hooks = [ft.hook(after_step=functools.partial(ask, 0, 3))]
    for one in ranks(3)(functools.partial(trained, "ddp", hooks)):
        assert one[:-1] == [1, 2, 3] and one[-1]["step"] == 3


@pytest.mark.parametrize("at", [8, 9])
def test_a_stop_in_the_last_steps(ranks, at):
    """At the very last one too, where no step comes after it."""
    for one in ranks(2)(functools.partial(trained, "ddp", [ft.hook(after_step=functools.partial(ask, 1, at))])):
        assert [e for e in one if isinstance(e, int)] == list(range(1, at + 1))
        last = next(e for e in one if isinstance(e, dict))
        assert (last["step"], last["stop"]) == (at, ft.state.Stop("requested", "enough (rank 1)"))


def on_all(state):
    return ft.stop(state, "data") if state.step == 3 else None


def ended(hooks):
    step_fn, state, data = jobs.parts()
    step_fn = ft.shell.distribute(step_fn)
    batches = [batch for batch, _ in zip(data.at(0), range(3), strict=False)]
    final = ft.fit(step_fn, hooks, state=state, data=ft.data.own_share(batches), max_steps=9)
    return final.step, final.run.stop


def test_a_stop_where_the_data_ends_is_no_lack_of_data(ranks):
    """There is no batch for the step that would be given up."""
    assert ranks(2)(ended, [ft.hook(after_step=on_all)]) == [(3, ft.state.Stop("requested", "data"))] * 2


def by_hand():
    """After `fit` was stopped, the step goes on when it is called."""
    step_fn, state, data = jobs.parts()
    step_fn = ft.shell.distribute(step_fn)
    stop = ft.hook(after_step=functools.partial(ask, 1, 2))
    final = ft.fit(step_fn, [stop], state=state, data=data, max_steps=9)
    share = data.shard(step_fn.ranks.rank, 2)
    return step_fn(final, next(share.at(final.position))).step


def test_a_step_called_after_a_stop_is_made(ranks):
    """`run.stop` of the state that `fit` returned is no reason to give it up."""
    assert ranks(2)(by_hand) == [3, 3]


class Messages(TorchDispatchMode):
    """Kinds and bytes of collectives."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "c10d":
            self.found.append((func._opname, sum(tensor.nbytes for tensor in args[0])))
        return func(*args, **(kwargs or {}))


def messages(dtype, **options):
    """What a step sends; not one of the first two, where torch still arranges its buckets."""
    step_fn, state, data = jobs.parts(dtype=dtype)
    step_fn = ft.shell.distribute(step_fn, **options)
    batches = data.shard(step_fn.ranks.rank, 2).at(0)
    for _ in range(3):
        state = step_fn(state, next(batches))
    with Messages() as counted:
        step_fn(state, next(batches))
    return counted.found, sum(param.nbytes for param in step_fn.step.slots.params.values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_a_step_sends_its_gradients_and_four_numbers(ranks, dtype, size):
    """In one message: loss, weight, what counts, and whether one is leaving."""
    for found, gradients in ranks(2)(messages, dtype):
        assert found == [("allreduce_", gradients + 4 * size)]


def test_numbers_of_a_model_in_half_precision_go_beside_its_gradients(ranks):
    """In float32: as halves they would lose what they say."""
    for found, gradients in ranks(2)(messages, torch.bfloat16):
        assert sorted(found) == [("allreduce_", 16), ("allreduce_", gradients)]


def test_compressed_gradients_have_a_message_of_numbers_beside_them(ranks):
    """As halves these would lose what they say."""
    for found, gradients in ranks(2)(functools.partial(messages, torch.float32, compress="bf16")):
        assert sorted(found) == [("allreduce_", 32), ("allreduce_", gradients // 2)]
