"""Hooks of several ranks: the same decisions on all, those of one process; nothing waits for ever."""

import contextlib
import copy
import functools

import jobs
import pytest
import torch

import fntrain as ft
from fntrain.core.errors import CheckpointError, ReplicaError
from fntrain.shell.checkpoints.save_load import checkpoints


def refused(fn):
    """What an error of fn says, with its notes; on every rank that it came to."""
    try:
        fn()
    except Exception as error:
        return "\n".join([f"{type(error).__name__}: {error}", *getattr(error, "__notes__", ())])


VALUES = [5.0, 4.0, 3.0, 3.5, 9.0, 3.2, 3.1, 30.0, 2.0, 2.5, 2.2, 2.1]


def varied(apart, state):
    """A metric that differs between ranks by so much that each alone would decide otherwise; its mean does not."""
    ranks = state.run.ranks
    value = VALUES[state.position % len(VALUES)]
    if apart and ranks.world_size > 1:
        weights = torch.tensor([float(n) for n in ranks.gather(state.metrics["batch_weight"])])
        value += apart * (1.0 if ranks.rank == 0 else -float(weights[0] / weights[1:].sum()))
    return state.replace(metrics={**state.metrics, "x": value})


DECIDING = {
    "early_stopping": lambda _: ft.hooks.early_stopping("x", mode="min", patience=3),
    "stop_when": lambda _: ft.hooks.stop_when(lambda state: state.metrics["loss"] < 0.98, "low"),
    "reduce_lr_on_plateau": lambda _: ft.hooks.reduce_lr_on_plateau("x", mode="min", patience=1, factor=0.5),
    "rollback_on_spike": lambda _: ft.hooks.rollback_on_spike("x", window=2, snapshot_every=2, look_every=1, factor=2),
    "best_checkpoint": lambda path: ft.hooks.best_checkpoint(path, "x", mode="min"),
    "keep_best": lambda path: ft.hooks.checkpoint(
        path, every=1, keep_last=1, keep_best=ft.hooks.keep_best("x", mode="min", n=3)
    ),
}


def decided(name, apart, path=None, steps=10, strategy="ddp"):
    """Train with a hook that decides; what it remembers, and where the run ended."""
    step_fn, state, data = jobs.parts(dtype=torch.float64)
    hooks = [
        ft.hook(after_step=functools.partial(varied, apart), communicates=True),
        DECIDING[name](path),
        ft.hooks.check_replicas(every=1),
    ]
    if name in ("best_checkpoint", "keep_best"):
        hooks[1:] = hooks[:0:-1]
    final = ft.fit(ft.shell.distribute(step_fn, strategy), hooks, state=state, data=data, max_steps=steps)
    extra, memory = dict(final.extra), dict(final.hooks)
    left = sorted(at.name for at in checkpoints(path)) if path else []
    return {**jobs.summary(final), "extra": extra, "memory": repr(memory), "position": final.position, "left": left}


@pytest.mark.parametrize("apart", [0.0, 20.0])
@pytest.mark.parametrize("name", DECIDING)
def test_hooks_decide_as_in_one_process(ranks, tmp_path, name, apart):
    """Also on a metric that differs between ranks: its mean decides; what hooks remember is alike on all."""
    paths = [tmp_path / "ranks", tmp_path / "alone"] if name in ("best_checkpoint", "keep_best") else [None, None]
    found, alone = ranks(2)(decided, name, apart, paths[0]), decided(name, apart, paths[1])
    assert len({one["digest"] for one in found}) == 1
    for one in found:
        assert {key: one[key] for key in ("step", "position", "extra", "left", "stop")} == {
            key: alone[key] for key in ("step", "position", "extra", "left", "stop")
        }
        if apart == 0.0 and name != "rollback_on_spike":
            assert one["memory"] == alone["memory"]


def decided_in_parts(name, apart, path):
    return {**decided(name, apart, path, strategy="fsdp"), "params": None, "buffers": None, "digest": None}


@pytest.mark.parametrize("name", DECIDING)
def test_hooks_of_ranks_that_hold_parts_decide_the_same(ranks, tmp_path, name):
    """With strategy="fsdp", where each saves and keeps its own part."""
    paths = [tmp_path / "ranks", tmp_path / "alone"] if name in ("best_checkpoint", "keep_best") else [None, None]
    found, alone = ranks(2)(decided_in_parts, name, 20.0, paths[0]), decided(name, 20.0, paths[1])
    for one in found:
        for key in ("step", "position", "extra", "left", "stop"):
            assert one[key] == alone[key], key


def deaf(apart):
    """A twin in which each rank decides on its own value."""
    from fntrain.hooks import plateau

    right, plateau.metric_over_ranks = plateau.metric_over_ranks, lambda state, name: state.metrics.get(name)
    try:
        return refused(functools.partial(decided, "reduce_lr_on_plateau", apart))
    finally:
        plateau.metric_over_ranks = right


def test_the_law_can_fail(ranks):
    """Ranks that decide on their own values part; check_replicas says what differs."""
    told = ranks(2)(deaf, 20.0)
    assert all(one.startswith("ReplicaError: step 1: state.hooks.reduce_lr_on_plateau.best of rank 1") for one in told)


def evaluated_apart():
    """A hand-written evaluation whose results differ by rank, or are there on rank 0 only."""

    def measure(state):
        rank = state.run.ranks.rank
        return {"x": VALUES[state.step] + rank} | ({"first": 1.0 * state.step} if rank == 0 else {})

    step_fn, state, data = jobs.parts()
    hooks = [
        ft.hooks.evaluate(measure, every=1),
        ft.hooks.reduce_lr_on_plateau("eval/x", mode="min", patience=0),
        ft.hooks.early_stopping("eval/first", mode="min", patience=2),
        ft.hooks.check_replicas(every=1),
    ]
    return jobs.summary(ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=6))


def test_results_of_an_evaluation_written_by_hand_are_alike(ranks):
    """The mean over the ranks that return them."""
    found = ranks(2)(evaluated_apart)
    assert len({one["digest"] for one in found}) == 1 and {one["step"] for one in found} == {3}
    assert {one["metrics"]["eval/x"] for one in found} == {VALUES[3] + 0.5}
    assert found[0]["stop"] == found[1]["stop"]


def stopped(rank, where):
    """One rank asks to stop, where the others do not."""

    def ask(state):
        if state.run.ranks.rank == rank and (where == "before_train" or state.step == 2):
            return ft.stop(state, "enough")
        return None

    step_fn, state, data = jobs.parts()
    hooks = [ft.hook(**{where: ask}), ft.hooks.check_replicas(every=1)]
    return jobs.summary(ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=5))


@pytest.mark.parametrize(("where", "step"), [("before_train", 0), ("before_step", 3), ("after_step", 2)])
def test_a_stop_on_one_rank_stops_all_after_the_same_step(ranks, where, step):
    """And the reason says which rank it was."""
    for one in ranks(3)(stopped, 1, where):
        assert one["step"] == step
        assert one["stop"] == ft.Stop("requested", "enough (rank 1)")


def finite(lengths, how):
    """Data of which each rank has its own part, of another length."""
    step_fn, state, data = jobs.parts()
    step_fn = ft.shell.distribute(step_fn)
    rank = step_fn.ranks.rank
    batches = [batch for batch, _ in zip(data.at(0), range(lengths[rank]), strict=False)]
    final = ft.fit(
        step_fn,
        [ft.hooks.write_metrics(ft.writers.memory(), every=2)],
        state=state,
        data=ft.data.own_share(how(batches)),
        max_steps=None,
    )
    return jobs.summary(final)


@pytest.mark.parametrize("how", [list, iter])
@pytest.mark.parametrize("lengths", [(2, 4), (4, 2), (3, 3), (0, 1)])
def test_data_that_ends_on_one_rank_first_ends_all(ranks, lengths, how):
    """After the same step, with the same words."""
    for one in ranks(2)(finite, lengths, how):
        assert one["step"] == min(lengths)
        assert one["stop"] == ft.Stop("done", f"data ended after {min(lengths)} batches")


def started(change, data=None):
    """Start a run that is changed on rank 1."""
    step_fn, state, stream = jobs.parts(norm=True)
    step_fn = ft.shell.distribute(step_fn)
    settings = {"hooks": [ft.hooks.check_replicas(every=2)], "state": state, "data": data or stream, "max_steps": 1}
    if step_fn.ranks.rank == 1:
        settings |= change(settings)
    return refused(lambda: ft.fit(step_fn, **settings))


def other_steps(_):
    return {"max_steps": 2}


def other_hooks(_):
    return {"hooks": [ft.hooks.check_replicas(every=3)]}


def no_hooks(_):
    return {"hooks": []}


def other_seed(settings):
    return {"state": settings["state"].replace(seed=7)}


def other_step(settings):
    return {"state": settings["state"].replace(step=1)}


def other_params(settings):
    state = ft.snapshot(settings["state"])
    state.params["layers.2.bias"][1] += 1
    return {"state": state}


def other_buffers(settings):
    state = ft.snapshot(settings["state"])
    state.buffers["layers.1.num_batches_tracked"].add_(1)
    return {"state": state}


def other_batches(settings):
    data = settings["data"]
    return {"data": ft.data.stream(data.dataset, 5, seed=0)}


def other_extra(settings):
    return {"state": settings["state"].replace(extra={"note": 1})}


def nothing_else(_):
    return {}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_steps, "max_steps: rank 1 has 2, rank 0 has 1"),
        (other_hooks, "hooks: rank 1 has ['check_replicas every 3 from 1 to None'], rank 0 has ['check_replicas every"),
        (no_hooks, "hooks: rank 1 has [], rank 0 has ["),
        (other_seed, "state.seed: rank 1 has 7, rank 0 has 0"),
        (other_step, "state.step: rank 1 has 1, rank 0 has 0"),
        (other_params, "state.params.layers.2.bias: rank 1 has 'torch.float32 [3] "),
        (other_buffers, "state.buffers.layers.1.num_batches_tracked: rank 1 has 'torch.int64 [] 1', rank 0 has"),
        (other_batches, "data: rank 1 has {'samples': 37, 'batch_size': 5, "),
        (other_extra, "state.extra.note: rank 1 has 1, rank 0 has None"),
    ],
)
def test_ranks_that_would_not_start_alike_are_refused(ranks, change, words):
    """On all ranks, with the name of what differs."""
    for told in ranks(2)(started, change):
        assert told.startswith(f"ValueError: {words}") and "all ranks must start alike" in told


def test_ranks_that_start_alike_are_not_refused(ranks):
    """The twin of the refusals."""
    assert ranks(2)(started, nothing_else) == [None, None]


@pytest.mark.parametrize("data", [[1, 2], torch.utils.data.DataLoader([1, 2])], ids=["list", "DataLoader"])
def test_data_that_every_rank_would_read_whole_is_refused(ranks, data):
    """With both ways out."""
    for told in ranks(2)(started, nothing_else, data):
        assert told == (
            f"ValueError: data: each of 2 ranks would read the same batches of {type(data).__name__}; use "
            "ft.data.stream(...), or ft.data.own_share(data) if what each rank reads is its own part already"
        )


COMMUNICATING = {
    "evaluate": lambda: ft.hooks.evaluate(dict, every=2),
    "write_metrics": lambda: ft.hooks.write_metrics(ft.writers.memory()),
    "checkpoint": lambda: ft.hooks.checkpoint("runs", every=2),
    "best_checkpoint": lambda: ft.hooks.best_checkpoint("runs", "x", mode="min"),
    "early_stopping": lambda: ft.hooks.early_stopping("x", mode="min", patience=1),
    "reduce_lr_on_plateau": lambda: ft.hooks.reduce_lr_on_plateau("x", mode="min"),
    "rollback_on_spike": lambda: ft.hooks.rollback_on_spike(),
    "precise_bn": lambda: ft.hooks.precise_bn(jobs.Net(norm=True), [torch.ones(2, 6)], every=2),
    "check_replicas": lambda: ft.hooks.check_replicas(every=2),
    "on_signal": lambda: ft.hooks.on_signal(),
}


@pytest.mark.parametrize("name", COMMUNICATING)
def test_hooks_that_communicate_run_on_all_ranks_or_not_at_all(name):
    """Refused when built, with what to do instead, for a run of one process too; alone or composed."""
    hook = COMMUNICATING[name]()
    for one in (hook, ft.compose(ft.hook(after_step=print), hook)):
        with pytest.raises(ValueError, match=r"on_main: .*communicates.*leave on_main out"):
            ft.on_main(one)
        with pytest.raises(ValueError, match=r"when: .*communicates.*every, first or between, or decide inside"):
            ft.when(bool, one)
        ft.every(3, ft.first(9, one))


def perturbed(change, rank):
    """One rank changes something after step 2."""

    def harm(state):
        if state.run.ranks.rank == rank and state.step == 2:
            return change(state)
        return None

    step_fn, state, data = jobs.parts(norm=True)
    hooks = [ft.hook(after_step=harm), counter(), ft.hooks.check_replicas(every=2)]
    return refused(lambda: ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=3))


def counter():
    return ft.stateful("count", 0, after_step=lambda state: None)


def of_params(state):
    state.params["layers.2.weight"][0, 0] += 1e-6


def of_buffers(state):
    state.buffers["layers.1.running_var"].mul_(1.0001)


def of_optimizer(state):
    state.opt_state["layers.0.bias"]["momentum_buffer"].zero_()


def of_hooks(state):
    return ft.remember(state, "count", 5)


@pytest.mark.parametrize(
    ("change", "leaf"),
    [
        (of_params, "params.layers.2.weight"),
        (of_buffers, "buffers.layers.1.running_var"),
        (of_optimizer, "opt_state.layers.0.bias.momentum_buffer"),
        (of_hooks, "hooks.count"),
        (None, None),
    ],
)
@pytest.mark.parametrize(("size", "rank"), [(2, 1), (3, 0), (3, 2)])
def test_check_replicas_names_leaf_and_rank(ranks, size, rank, change, leaf):
    """The odd one out of three, wherever it is; and nobody where nothing differs."""
    told = ranks(size)(perturbed, change or unharmed, rank)
    assert len(set(told)) == 1
    if leaf is None:
        assert told[0] is None
    else:
        assert told[0].startswith(f"{ReplicaError.__name__}: step 2: state.{leaf} of rank {rank} is not that of the")


def unharmed(state):
    return None


def failing(rank):
    """One rank raises in a hook, or all do."""

    def fail(state):
        if state.step == 2 and rank in (None, state.run.ranks.rank):
            raise RuntimeError("no more")

    step_fn, state, data = jobs.parts()
    ended = []
    hooks = [
        ft.hook(after_step=fail, after_train=lambda state: ended.append(state.run.stop.kind)),
        ft.hooks.write_metrics(ft.writers.memory(), every=3),
        ft.hooks.check_replicas(every=2),
    ]
    told = refused(lambda: ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=3))
    return told, ended


def test_after_an_error_hooks_that_communicate_are_skipped_with_a_note(ranks):
    """The others end as ever."""
    for told, ended in ranks(2)(failing, None):
        assert told.startswith("RuntimeError: no more") and ended == ["error"]
        for name in ("write_metrics", "check_replicas"):
            assert f"after_train of hook '{name}' was skipped: other ranks may not answer any more" in told


def test_an_error_of_one_rank_does_not_make_it_wait(ranks):
    """Its after_train comes to an end; the launcher (here: the pool) ends the others."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*no more"):
        ranks(2)(raising)


def raising():
    raise RuntimeError(failing(1)[0])


def failing_at_the_end(directory, what):
    """One rank fails after the last step; others are then in a collective of the hook, or past it."""

    def asked(state):
        if what == "hook" and state.run.ranks.rank == 1:
            raise RuntimeError("no more")
        state.run.ranks.gather("of the first hook")

    def full(*args, **kwargs):
        raise CheckpointError("No space left on device")

    step_fn, state, data = jobs.parts()
    hooks = [
        ft.hook(after_train=asked, communicates=True),
        ft.hooks.checkpoint(directory, every=9),
        ft.hook(after_train=lambda state: state.run.ranks.gather("of the last hook"), communicates=True),
    ]
    with pytest.MonkeyPatch.context() as patch:
        if what == "save":
            patch.setattr("fntrain.shell.checkpoints.saver.commit", full)
        return refused(lambda: ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=2))


def raising_at_the_end(directory):
    told = failing_at_the_end(directory, "hook")
    assert "hook 'checkpoint' was skipped: other ranks may not answer any more" in told
    raise RuntimeError(told)


def test_an_error_of_one_rank_after_the_last_step_does_not_make_it_wait(ranks, tmp_path):
    """Its other hooks' collectives would meet those that the other ranks wait in."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*no more"):
        ranks(2)(raising_at_the_end, tmp_path, timeout=120)


def test_a_last_save_that_fails_is_an_error_on_all_ranks(ranks, tmp_path):
    """The first rank alone saves what all hold."""
    for told in ranks(2)(failing_at_the_end, tmp_path, "save", timeout=120):
        assert "CheckpointError: rank 0: No space left" in told


def raising_in_the_loop():
    """One rank's own loop over the states fails."""
    step_fn, state, data = jobs.parts()
    hooks = [ft.hooks.check_replicas(every=9), ft.hooks.write_metrics(ft.writers.memory(), every=9)]
    states = ft.states(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=9)
    with contextlib.closing(states):
        for state in states:
            if state.step == 2 and state.run.ranks.rank == 1:
                raise RuntimeError("no more")


def test_an_error_of_one_rank_in_the_loop_over_states_does_not_make_it_wait(ranks):
    """Nobody answers what its hooks would ask at the end."""
    with pytest.raises(RuntimeError, match=r"(?s)rank 1: .*no more.*after_train of hook 'write_metrics' was skipped"):
        ranks(2)(raising_in_the_loop, timeout=120)


def reported_on_main():
    def report(state):
        return state.replace(metrics={**state.metrics, "main": 7.0})

    step_fn, state, data = jobs.parts()
    kept = ft.writers.memory()
    hooks = [
        ft.on_main(ft.hook(after_step=report)),
        ft.hooks.early_stopping("main", mode="min", patience=2),
        ft.hooks.write_metrics(kept, every=1),
        ft.hooks.check_replicas(every=1),
    ]
    final = ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=5)
    return final.step, [row.scalars["main"] for row in kept.rows]


def test_a_metric_of_rank_0_only_is_written_and_decided_on_by_all(ranks):
    """on_main may report; what others make of it is the same on all ranks."""
    assert ranks(2)(reported_on_main) == [(3, [7.0] * 3), (3, [])]


def peaks():
    step_fn, state, data = jobs.parts()
    kept = ft.writers.memory()
    hooks = [ft.hooks.memory_stats(every=1), ft.hooks.write_metrics(kept, every=1)]
    final = ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=1)
    return final.metrics["memory/rss"], [row.scalars["memory/rss"] for row in kept.rows]


def test_memory_is_that_of_the_rank_with_most(ranks):
    """Of several ranks it ends the run."""
    found = ranks(2)(peaks)
    assert found[0][1] == [max(own for own, _ in found)]


def seldom(state):
    """Reports on rank 1 only, and not at every step."""
    if state.run.ranks.rank == 1 and state.step % 2 == 0:
        return state.replace(metrics={**state.metrics, "x": float(state.step)})
    return None


def decided_seldom(directory):
    step_fn, state, data = jobs.parts()
    hooks = [
        ft.hook(after_step=seldom),
        ft.hooks.reduce_lr_on_plateau("x", mode="min", patience=0),
        ft.hooks.early_stopping("x", mode="min", patience=2),
        ft.hooks.best_checkpoint(directory, "x", mode="max"),
        ft.hooks.check_replicas(every=1),
    ]
    final = ft.fit(ft.shell.distribute(step_fn), hooks, state=state, data=data, max_steps=20)
    return final.step, repr(dict(final.hooks)), [at.name for at in checkpoints(directory)]


def test_hooks_decide_on_what_one_rank_reports_at_some_steps(ranks, tmp_path):
    """The others are told of it, and of steps without it."""
    found = ranks(3)(decided_seldom, tmp_path)
    assert len({memory for _, memory, _ in found}) == 1 and found[0][0] == 6  # reports at 2, 4, 6
    assert found[0][2] == ["step_00000006"]


def left_early():
    """All ranks leave the loop over states; what they hold is used on."""
    torch.manual_seed(0)
    model = jobs.Net(norm=True)
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    kept = ft.writers.memory()
    samples = [{"x": sample["x"]} for sample in jobs.samples(torch.float32)[:9]]
    test = ft.evaluation(model, lambda model, batch: {"x": model(batch["x"]).mean()}, samples, batch_size=2)
    hooks = [
        ft.hooks.ema(0.5),
        ft.hooks.evaluate(test, every=2, weights="ema"),
        ft.hooks.write_metrics(kept, every=4),
        ft.hooks.check_replicas(every=1),
    ]
    step_fn = ft.shell.distribute(ft.supervised_step(model, jobs.mean_loss, sgd))
    for state in ft.states(step_fn, hooks, state=ft.init_state(model, sgd), data=jobs.parts()[2], max_steps=9):
        if state.step == 3:
            break
    return test(state), test(copy.deepcopy(state)), [row.step for row in kept.rows]


def test_the_loop_over_states_may_be_left(ranks):
    """By all ranks; evaluated together or by each alone, the state gives the same."""
    (first, alone, rows), (second, other, none) = ranks(2)(left_early)
    assert first == alone == second == other and rows == [2, 3] and none == []
