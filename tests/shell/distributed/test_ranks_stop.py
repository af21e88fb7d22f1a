"""A stop that one rank asks for, wherever it does: all stop after that step, and it is a run of so many steps."""

import contextlib
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
    """Remember how often a step was begun."""
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
    }


def trained(strategy, hooks=(), max_steps=9, data=None, **options):
    options = {"norm": True, "optimizer": ft.optimizer(torch.optim.AdamW, lr=0.1), **options}
    step_fn, state, stream = jobs.parts(**options)
    step_fn = ft.shell.distribute(step_fn, strategy)
    hooks = [ft.stateful("begun", 0, before_step=counted, stops=False), *hooks]
    yielded, seen = [], ft.hook(after_train=lambda state: yielded.append(whole(state)))
    states = ft.states(step_fn, [*hooks, seen], state=state, data=data or stream, max_steps=max_steps)
    yielded.extend(state.step for state in states)
    return yielded


def last(run):
    return next(one for one in run if isinstance(one, dict))


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
    """Parameters, buffers, position, metrics and what hooks remember, bit for bit."""
    hooks = [ft.hook(after_step=functools.partial(ask, 1, 5))]
    found = ranks(2)(functools.partial(trained, strategy, hooks, accumulate=accumulate))
    plain = ranks(2)(functools.partial(trained, strategy, max_steps=5, accumulate=accumulate))
    alike([last(one) for one in found], [last(one) for one in plain])
    assert {last(one)["stop"] for one in found} == {ft.Stop("requested", "enough (rank 1)")}


def test_all_ranks_yield_the_same_states(ranks):
    """Also the one that asks: a loop over states may have collectives of its own."""
    hooks = [ft.hook(after_step=functools.partial(ask, 0, 3))]
    for one in ranks(3)(functools.partial(trained, "ddp", hooks)):
        assert [e for e in one if isinstance(e, int)] == [1, 2, 3] and last(one)["step"] == 3


@pytest.mark.parametrize("at", [8, 9])
def test_a_stop_in_the_last_steps(ranks, at):
    """At the very last one too, where no step comes after it."""
    for one in ranks(2)(functools.partial(trained, "ddp", [ft.hook(after_step=functools.partial(ask, 1, at))])):
        assert [e for e in one if isinstance(e, int)] == list(range(1, at + 1))
        assert (last(one)["step"], last(one)["stop"]) == (at, ft.Stop("requested", "enough (rank 1)"))


def spiked(every, before):
    """In the step in which all go back from step 6 to step 4, one rank asks to stop, before that or after it."""

    def report(state):
        return state.replace(metrics={**state.metrics, "x": 9.0 if state.position == 6 else 1.0})

    def ends(state):
        return ft.stop(state, "enough") if state.run.ranks.rank == 0 and state.position == 6 else None

    stopper = ft.every(every, ft.hook(after_step=ends))
    rollback = ft.hooks.rollback_on_spike("x", window=2, snapshot_every=2, look_every=1)
    step_fn, state, data = jobs.parts()
    hooks = [ft.hook(after_step=report, stops=False), *([stopper, rollback] if before else [rollback, stopper])]
    final = ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=9)
    return final.step, final.position, final.run.stop


@pytest.mark.parametrize(("every", "before"), [(6, True), (4, False), (1, True)])
def test_a_stop_and_a_roll_back_in_one_step(ranks, every, before):
    """All leave: they ask each other for the step whose gates were asked, wherever the run is after it."""
    assert ranks(2)(spiked, every, before) == [(4, 6, ft.Stop("requested", "enough (rank 0)"))] * 2


def by_itself(how):
    """A step around a distributed one, a step written by hand, the pure step, one in place."""
    step_fn, state, data = jobs.parts()
    together = ft.shell.distribute(step_fn)
    data = data.shard(together.ranks.rank, 2)
    forms = {
        "lambda": lambda state, batch: together(state, batch),
        "by hand": lambda state, batch: state.advance(),
        "pure": step_fn,
        "wrapped": ft.wrap(together, lambda state, batch: together(state, batch)),
        "alone": ft.shell.alone(step_fn),
    }
    try:
        return ft.fit(forms[how], state=state, data=ft.data.own_share(data.at(0)), max_steps=2).run.ranks.world_size
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize("how", ["lambda", "by hand", "pure"])
def test_a_step_that_would_train_each_rank_alone_is_refused(ranks, how):
    """With the three ways out."""
    for told in ranks(2)(by_itself, how):
        assert told.startswith("step_fn: each of the 2 processes would train ")
        assert all(way in told for way in ("ft.shell.distribute(step_fn)", "ft.wrap(step_fn, fn)", "ft.shell.alone"))


@pytest.mark.parametrize(("how", "size"), [("wrapped", 2), ("alone", 1)])
def test_a_step_that_says_its_ranks_is_not_refused(ranks, how, size):
    """Around a distributed step by ft.wrap, or alone because it says so."""
    assert ranks(2)(by_itself, how) == [size] * 2


def ended(hooks):
    step_fn, state, data = jobs.parts()
    step_fn = ft.shell.distribute(step_fn)
    batches = [batch for batch, _ in zip(data.at(0), range(3), strict=False)]
    final = ft.fit(step_fn, hooks, state=state, data=ft.data.own_share(batches), max_steps=9)
    return final.step, final.run.stop


def test_a_stop_where_the_data_ends_is_no_lack_of_data(ranks):
    """Nobody asks for a batch after it."""
    stop = ft.Stop("requested", "enough (rank 1)")
    assert ranks(2)(ended, [ft.hook(after_step=functools.partial(ask, 1, 3))]) == [(3, stop)] * 2


def by_hand():
    """After `fit` was stopped, the step goes on when it is called."""
    step_fn, state, data = jobs.parts()
    step_fn = ft.shell.distribute(step_fn)
    stop = ft.hook(after_step=functools.partial(ask, 1, 2))
    final = ft.fit(step_fn, [stop], state=state, data=data, max_steps=9)
    share = data.shard(step_fn.ranks.rank, 2)
    return step_fn(final, next(share.at(final.position))).step


def test_a_step_called_after_a_stop_is_made(ranks):
    """`run.stop` of the state that `fit` returned is of that run."""
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
    return counted.found, sum(param.nbytes for param in step_fn.memory.body.slots.params.values())


@pytest.mark.parametrize(("dtype", "size"), [(torch.float32, 4), (torch.float64, 8)])
def test_a_step_sends_its_gradients_and_three_numbers(ranks, dtype, size):
    """In one message: loss, weight and what counts."""
    for found, gradients in ranks(2)(messages, dtype):
        assert found == [("allreduce_", gradients + 3 * size)]


def test_numbers_of_a_model_in_half_precision_go_beside_its_gradients(ranks):
    """In float32: as halves they would lose what they say."""
    for found, gradients in ranks(2)(messages, torch.bfloat16):
        assert sorted(found) == [("allreduce_", 12), ("allreduce_", gradients)]


def test_compressed_gradients_have_a_message_of_numbers_beside_them(ranks):
    """As halves these would lose what they say."""
    for found, gradients in ranks(2)(functools.partial(messages, torch.float32, compress="bf16")):
        assert sorted(found) == [("allreduce_", 24), ("allreduce_", gradients // 2)]


def apart(model, batch):
    return {"n": torch.tensor(5), "class": jobs.mean_loss(model, batch)}


def unlike(model, batch):
    return jobs.mean_loss(model, batch).item()


LOSSES = {
    "a number": unlike,
    "None": lambda model, batch: None,
    "empty": lambda model, batch: {},
    "a number in a dict": lambda model, batch: {"n": 3, "class": jobs.mean_loss(model, batch)},
    "detached": lambda model, batch: jobs.mean_loss(model, batch).detach(),
    "a vector": lambda model, batch: jobs.mean_loss(model, batch)[None],
    "weighted in a dict": lambda model, batch: {"a": ft.weighted(jobs.mean_loss(model, batch), 1)},
    "of nothing": lambda model, batch: torch.ones((), requires_grad=True),
}


def said(name):
    step_fn, state, data = jobs.parts(loss_fn=LOSSES[name])
    step_fn = ft.shell.distribute(step_fn)
    share = data if step_fn.ranks.world_size == 1 else data.shard(step_fn.ranks.rank, 2)
    try:
        step_fn(state, next(share.at(0)))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "of nothing"])
def test_a_wrong_loss_is_refused_as_by_one_process(ranks, name):
    """With the same words."""
    assert ranks(2)(said, name) == [said(name)] * 2 and said(name) is not None


def test_a_loss_that_needs_no_parameter_names_them(ranks):
    """Torch would say so in the next step, after an update by what was not added up."""
    for told in ranks(2)(said, "of nothing"):
        assert told.startswith("ValueError: loss_fn: ['layers.0.weight', 'layers.0.bias', ") and "freeze them" in told


def test_a_term_without_a_gradient_may_come_first(ranks):
    """The numbers travel with another."""
    job = functools.partial(jobs.train, loss_fn=apart, dtype=torch.float64)
    alone = job()
    for found in ranks(2)(job):
        for name, value in alone["params"].items():
            assert (found["params"][name] - value).abs().max() < 1e-12


def failing_on_one():
    """transform_grads raises on one rank once, when the gradients are added up; the caller goes on."""
    calls = []

    def fails(grads):
        calls.append(1)
        if len(calls) == 3 and torch.distributed.get_rank() == 1:
            raise KeyError("once")
        return grads

    step_fn, state, data = jobs.parts(transform_grads=fails)
    step_fn = ft.shell.distribute(step_fn)
    batches = data.shard(step_fn.ranks.rank, 2).at(0)
    for _ in range(5):
        with contextlib.suppress(KeyError):
            state = step_fn(state, next(batches))
    return state.step


def test_an_error_of_one_rank_after_the_backward_leaves_the_others_alone(ranks):
    """It asks nobody to arrange gradients anew."""
    assert ranks(2)(failing_on_one) == [5, 4]


def questions(hooks):
    """At which steps a rank asks the others whether to stop."""
    from fntrain.shell.distributed.connected import Connected

    asked, right, now = [], Connected.max, [0]

    def max(self, number):  # noqa: A001
        asked.append(now[0])
        return right(self, number)

    look = ft.hook(before_step=lambda state: now.__setitem__(0, state.step + 1), stops=False)
    Connected.max = max
    try:
        trained("ddp", [look, *hooks], max_steps=6)
    finally:
        Connected.max = right
    return [step for step in asked if step]


def silent():
    return [
        ft.hooks.iteration_timer(),
        ft.hooks.ema(0.9),
        ft.hooks.write_metrics(ft.writers.memory(), every=2),
        ft.hooks.check_replicas(every=3),
        ft.hook(before_train=lambda state: None, after_train=lambda state: None),
        ft.on_main(ft.hook(after_step=lambda state: None)),
    ]


def test_ranks_ask_whether_to_stop_only_where_one_might(ranks):
    """Not for hooks that never do, or do on all alike; every n steps for one that runs every n."""

    assert ranks(2)(asking_of_each) == [{"silent": [], "every 2": [2, 4, 6], "every": [1, 2, 3, 4, 5, 6]}] * 2


def asking_of_each():
    def ends(state):
        pass

    return {
        "silent": questions(silent()),
        "every 2": questions([*silent(), ft.every(2, ft.hook(after_step=ends))]),
        "every": questions([ft.hooks.stop_when(lambda state: False, "never")]),
    }
