"""fit and states: order, ends, errors, data; and that what goes wrong is said and nothing is left open."""

import itertools
import pickle

import broken
import pytest
import torch
from cases import batches, make, square_loss

import fntrain as ft
from fntrain.core import ranks
from fntrain.core.ranks import ALONE, Ranks

SGD = ft.optimizer(torch.optim.SGD, lr=0.1)


def start(**fields):
    return ft.TrainState(**{"step": 0, "position": 0, "seed": 0, "params": {}} | fields)


def count(state, batch):
    """The smallest step function: it counts, and reports its batch."""
    return state.advance(metrics={"batch": batch})


class Numbers:
    """Data that can start anywhere; batch number s is s. It records what is opened and closed."""

    def __init__(self):
        self.log = []

    def at(self, position):
        self.log.append(("open", position))
        try:
            yield from itertools.count(position)
        finally:
            self.log.append(("close", position))


def recorder(log, name, **returns):
    """A hook that writes down every call."""

    def callback(phase):
        return lambda state: (log.append((phase, name, state.step)), returns.get(phase))[1]

    phases = ("before_train", "before_step", "after_step", "after_train")
    return ft.hook(name=name, **{phase: callback(phase) for phase in phases})


def fit(hooks=(), max_steps=3, step_fn=count, state=None, data=None):
    return ft.fit(step_fn, hooks, state=state or start(), data=Numbers() if data is None else data, max_steps=max_steps)


def test_fit_is_the_fold():
    """fit equals functools.reduce over the batches, bit for bit."""
    model, data = make("mlp"), batches("mlp", 4)
    step_fn = ft.supervised_step(model, square_loss, SGD)
    state = ft.init_state(model, SGD)
    assert ft.fit(step_fn, state=state, data=data, max_steps=4) == __import__("functools").reduce(step_fn, data, state)


def test_order_is_list_order_in_every_phase():
    """Batch, before_step, step, after_step; hooks in list order; train callbacks once."""
    log = []
    fit([recorder(log, "a"), recorder(log, "b")], max_steps=2)
    expected = [("before_train", "a", 0), ("before_train", "b", 0)]
    for step in (0, 1):
        expected += [("before_step", "a", step), ("before_step", "b", step)]
        expected += [("after_step", "a", step + 1), ("after_step", "b", step + 1)]
    assert log == [*expected, ("after_train", "a", 2), ("after_train", "b", 2)]


def test_states_yields_every_step_once_and_fit_is_the_last():
    """The scan has one state a step; its last element, after after_train, is what fit returns."""
    mark = ft.hook(after_train=lambda state: state.replace(extra={"end": state.step}))
    scan = list(ft.states(count, [mark], state=start(), data=Numbers(), max_steps=3))
    assert [state.step for state in scan] == [1, 2, 3]
    assert scan[-1] == fit([mark])
    assert scan[-1].extra == {"end": 3}
    assert scan[-1].run.stop == ft.Stop("done", "max_steps=3 reached")


def test_a_run_with_nothing_to_do_returns_its_state():
    """At max_steps already: hooks open and close, no step is made, nothing is yielded."""
    log = []
    assert fit([recorder(log, "a")], state=start(step=3, position=3)).step == 3
    assert [phase for phase, *_ in log] == ["before_train", "after_train"]
    assert list(ft.states(count, state=start(step=3, position=3), data=Numbers(), max_steps=3)) == []


def test_finite_data_ends_the_run_when_declared():
    """max_steps=None runs to the end of the data and says how many batches there were."""
    final = fit(data=["x", "y"], max_steps=None)
    assert (final.step, final.run.stop.reason) == (2, "data ended after 2 batches")
    assert [s.step for s in ft.states(count, state=start(), data=["x", "y"])] == [1, 2]


def test_data_that_runs_out_is_an_error():
    """Data that ends before max_steps says how many batches it gave and what to do; hooks close."""
    log = []
    with pytest.raises(ft.DataExhaustedError, match=r"ended after 2 batches, at step 2 of max_steps=5; give more"):
        fit([recorder(log, "a")], data=["x", "y"], max_steps=5)
    assert log[-1] == ("after_train", "a", 2)


def test_a_reiterable_given_to_a_state_under_way_is_refused():
    """A list would start again at batch 0: silently wrong, so an error; an iterator goes on."""
    under_way = start(step=2, position=2)
    with pytest.raises(ValueError, match=r"list starts at its first batch again, but the state is at position 2"):
        fit(state=under_way, data=["a", "b", "c"])
    assert fit(state=under_way, data=itertools.islice("abc", 2, None)).metrics["batch"] == "c"


def test_an_iterator_of_the_caller_can_be_gone_on_with():
    """fit does not close an iterator it did not open."""
    batches_left = iter("abcd")
    assert fit(max_steps=2, data=batches_left).metrics["batch"] == "b"
    assert next(batches_left) == "c"


def test_a_positioned_source_is_opened_at_the_position_and_closed():
    """A resumed state asks for its own position; the source is closed at the end."""
    data = Numbers()
    assert fit(state=start(step=5, position=7), data=data, max_steps=7).metrics["batch"] == 8
    assert data.log == [("open", 7), ("close", 7)]


def test_a_roll_back_opens_the_data_again_where_the_state_is():
    """A hook that returns an older state with its own position gets those batches again; keeping the position skips."""
    for keep_position, expected in ((False, [0, 1, 2, 1, 2, 3]), (True, [0, 1, 2, 3, 4, 5])):
        seen, kept = [], {}

        def back(state, seen=seen, kept=kept, keep=keep_position):
            seen.append(state.metrics["batch"])
            kept.setdefault(state.step, state)
            if state.step == 3 and len(seen) == 3:
                return kept[1].replace(position=state.position) if keep else kept[1]
            return None

        final = fit([ft.hook(after_step=back)], max_steps=4)
        assert seen == expected
        assert final.step == 4
        assert final.position == (6 if keep_position else 4)


def test_what_outlives_a_roll_back_is_as_it_is_now():
    """All of a memory, or some entries of it; the rest is that of then, and the run that of now."""
    kept = {}

    def count(name):
        def more(state):
            memory = state.hooks[name]
            return ft.remember(state, name, {key: number + 1 for key, number in memory.items()})

        return more

    def back(state):
        kept.setdefault(state.step, state)
        return state.go_back(kept[1]) if state.step == 3 and state.hooks["all"]["a"] == 3 else None

    outlives = {"none": False, "all": True, "some": ("b",)}
    counters = [
        ft.stateful(name, {"a": 0, "b": 0}, after_step=count(name), outlives=what) for name, what in outlives.items()
    ]
    final = fit([*counters, ft.hook(after_step=back)], max_steps=4)
    assert final.hooks == {"none": {"a": 4, "b": 4}, "all": {"a": 6, "b": 6}, "some": {"a": 4, "b": 6}}
    assert final.run.max_steps == 4 and final.position == 4


def test_at_end_runs_again_if_hooks_changed_the_state_since():
    """What a hook made of the last state at the end, a later one at_end has to see, though it ran at that step."""
    seen = []
    change = ft.hook(after_step=lambda state: state.replace(extra={"at": state.step}))
    look = ft.hook(after_step=lambda state: seen.append((state.step, dict(state.extra))))
    fit([ft.at_end(ft.every(3, change)), ft.at_end(ft.every(2, look))], max_steps=4)
    assert seen == [(2, {}), (4, {"at": 3}), (4, {"at": 4})]
    del seen[:]
    fit([ft.at_end(ft.every(2, look)), ft.at_end(ft.every(3, change))], max_steps=4)
    assert seen == [(2, {}), (4, {"at": 3})]  # listed before it, it is not told


def test_a_step_around_a_step_keeps_its_ranks():
    """ft.wrap calls the function given and says the ranks of the step in it, ALONE for a step that says nothing."""

    class Ranked:
        ranks = Ranks(rank=1, world_size=1)

        def __call__(self, state, batch):
            return count(state, batch)

    step_fn = Ranked()
    wrapped = ft.wrap(step_fn, lambda state, batch: step_fn(state, -batch))
    assert wrapped.ranks is Ranked.ranks and ft.wrap(count, count).ranks is ALONE
    assert fit(step_fn=wrapped, max_steps=3).metrics["batch"] == -2
    assert pickle.loads(pickle.dumps(ft.wrap(count, count))) == ft.wrap(count, count)
    for wrong in ((3, count), (count, None)):
        with pytest.raises(TypeError, match="expected a function of state and batch"):
            ft.wrap(*wrong)


def test_in_a_group_a_step_that_says_nothing_of_its_ranks_is_refused(monkeypatch):
    """Each process would train by itself; one that does so by choice says it."""
    monkeypatch.setattr(ranks, "num_processes", lambda: 2)
    for step_fn in (count, ft.wrap(count, count), ft.supervised_step(make("mlp"), square_loss, SGD)):
        with pytest.raises(ValueError, match=r"each of the 2 processes would train .* by itself.*ft\.shell\.alone"):
            ft.states(step_fn, state=start(), data=Numbers(), max_steps=1)
    assert fit(step_fn=ft.shell.alone(count)).step == 3
    assert fit(step_fn=ft.wrap(ft.shell.alone(count), count)).step == 3


def test_leaving_early_runs_after_train_and_closes():
    """break out of states(): after_train runs with the reason, the data is closed."""
    log, data, stops = [], Numbers(), []
    hooks = [recorder(log, "a"), ft.hook(after_train=lambda state: stops.append(state.run.stop))]
    run = ft.states(count, hooks, state=start(), data=data, max_steps=9)
    for state in run:
        if state.step == 2:
            break
    run.close()
    assert log[-1] == ("after_train", "a", 2)
    assert stops == [ft.Stop("requested", "states() was left early")]
    assert data.log[-1] == ("close", 0)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
def test_a_step_that_raises_closes_everything_and_says_where(error):
    """The error keeps its kind, names the step, and every hook's after_train sees why."""
    log, data, stops = [], Numbers(), []

    def failing(state, batch):
        if state.step == 2:
            raise error("in the model")
        return count(state, batch)

    with pytest.raises(error) as caught:
        fit([recorder(log, "a"), ft.hook(after_train=lambda s: stops.append(s.run.stop))], 9, failing, data=data)
    assert "in the step function, at step 3 (batch number 2)" in caught.value.__notes__
    assert log[-1] == ("after_train", "a", 2)
    assert stops[0].kind == "error"
    assert "in the model" in stops[0].reason
    assert data.log[-1] == ("close", 0)


@pytest.mark.parametrize("phase", ["before_train", "before_step", "after_step", "after_train"])
def test_a_hook_that_raises_is_named_and_others_close(phase):
    """An error in any phase says which hook and step; the other hooks' after_train still run."""
    log = []

    def fail(state):
        raise RuntimeError("disk full")

    with pytest.raises(RuntimeError, match="disk full") as caught:
        fit([ft.hook(name="bad", **{phase: fail}), recorder(log, "after")])
    assert any("fail of hook 'bad', at step" in note for note in caught.value.__notes__)
    assert log[-1][:2] == ("after_train", "after")


def test_the_first_error_wins_and_later_ones_are_noted():
    """Errors of after_train do not hide the one that ended the run."""

    def fail(state):
        raise OSError("second")

    def failing(state, batch):
        raise ValueError("first")

    with pytest.raises(ValueError, match="first") as caught:
        fit([ft.hook(after_train=fail, name="x"), ft.hook(after_train=fail, name="y")], step_fn=failing)
    assert sum("OSError: second" in note for note in caught.value.__notes__) == 2


class Files:
    """Resources that record opening and closing, and can fail at either."""

    def __init__(self, fail=None):
        self.log, self.fail = [], fail

    def hook(self, name):
        return ft.resource(lambda: _Manager(self, name), name=name)


class _Manager:
    def __init__(self, files, name):
        self.files, self.name = files, name

    def __enter__(self):
        if self.files.fail == f"open {self.name}":
            raise OSError("cannot open")
        self.files.log.append(f"open {self.name}")
        return ft.hook(after_step=lambda state: self.files.log.append(f"step {self.name}"))

    def __exit__(self, *_):
        self.files.log.append(f"close {self.name}")
        if self.files.fail == f"close {self.name}":
            raise OSError("cannot close")


def test_resources_are_opened_used_and_closed_in_turn():
    """A hook's resource lives exactly as long as the run."""
    files = Files()
    fit([files.hook("a"), files.hook("b")], max_steps=1)
    assert files.log == ["open a", "open b", "step a", "step b", "close b", "close a"]


@pytest.mark.parametrize("fail", ["open b", "close b"])
def test_a_resource_that_fails_leaves_no_other_open(fail):
    """Whatever was opened is closed, and the failure is raised."""
    files = Files(fail)
    with pytest.raises(OSError, match="cannot"):
        fit([files.hook("a"), files.hook("b")], max_steps=1)
    assert files.log[-1] == "close a"


def test_a_resource_that_fails_to_close_does_not_hide_the_first_error():
    """The error of the step wins over that of closing."""

    def failing(state, batch):
        raise ValueError("first")

    with pytest.raises(ValueError, match="first") as caught:
        fit([Files("close a").hook("a")], step_fn=failing)
    assert any("cannot close" in note for note in caught.value.__notes__)


def test_a_stop_is_sticky():
    """A later hook can neither clear nor replace the first request; the step's other hooks still run."""
    log = []
    hooks = [
        ft.hook(after_step=lambda state: ft.stop(state, "enough") if state.step == 2 else None),
        ft.hook(after_step=lambda state: ft.stop(state, "other") if state.step == 2 else None),
        ft.hook(after_step=lambda state: state.replace(run=ft.Run(max_steps=99))),
        recorder(log, "last"),
    ]
    final = fit(hooks, max_steps=9)
    assert final.run.stop == ft.Stop("requested", "enough")
    assert final.step == 2
    assert ("after_step", "last", 2) in log


def test_a_state_that_was_stopped_can_go_on():
    """The run record is of one call: a stopped or finished state is a start like any other."""
    first = fit([ft.hook(after_step=lambda state: ft.stop(state, "pause") if state.step == 1 else None)])
    assert fit(state=first, data=Numbers()).step == 3


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: fit(step_fn=lambda s, b: None), TypeError, "returned NoneType at step 1, expected a TrainState"),
        (lambda: fit(step_fn=lambda s, b: s), ValueError, r"went from step 0, position 0 to step 0.*state.advance"),
        (lambda: fit(step_fn=lambda s, b: s.replace(step=s.step + 1)), ValueError, "position 0; expected both"),
        (lambda: fit([ft.hook(after_step=lambda s: s.metrics, name="m")]), TypeError, r"hook\('m'.*returned mappingproxy"),
        (lambda: fit([print]), TypeError, "got builtin_function_or_method, expected ft.hook"),
        (lambda: fit(max_steps=-1), ValueError, "max_steps: got -1"),
        (lambda: fit(max_steps=2.5), ValueError, "max_steps: got 2.5"),
        (lambda: ft.fit(count, state={}, data=[]), TypeError, "state: got dict"),
        (lambda: fit([ft.hook(name="a"), ft.hook(name="a")]), ValueError, "two hooks are named a"),
        (lambda: fit(data=3), TypeError, "not iterable"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(call, error, message):
    """Every wrong argument or return value is an error that says where, what and what to do."""
    with pytest.raises(error, match=message):
        call()


def test_nothing_runs_before_the_iterator_is_asked():
    """states() is lazy, but what is wrong with its arguments is said at once."""
    data = Numbers()
    ft.states(count, state=start(), data=data, max_steps=3)
    assert data.log == []
    with pytest.raises(ValueError, match="max_steps"):
        ft.states(count, state=start(), data=data, max_steps=-3)


def test_memory_starts_fresh_is_kept_and_is_dropped_with_a_warning():
    """Memory of a new hook starts with its init; on resume it goes on; that of a removed hook is dropped, said."""
    counter = ft.stateful("n", 0, after_step=lambda s: ft.remember(s, "n", s.hooks["n"] + 1))
    first = fit([counter], max_steps=2)
    assert first.hooks == {"n": 2}
    assert fit([counter], state=first, max_steps=5).hooks == {"n": 5}
    with pytest.warns(UserWarning, match=r"dropped the memory of \['n'\]"):
        assert fit([], state=first, max_steps=5).hooks == {}


def test_a_hook_with_memory_after_a_checkpoint_is_refused(tmp_path):
    """[checkpoint, ema] would save the ema one step stale; the order is an error, and [ema, checkpoint] is fine."""
    ema = ft.stateful("ema", 0.0)
    checkpoint = ft.hooks.checkpoint(tmp_path, every=1)
    with pytest.raises(ValueError, match="'ema' has memory and is listed after 'checkpoint'"):
        fit([checkpoint, ema])
    fit([ema, checkpoint])


def test_on_main_runs_on_rank_0_only_and_may_only_report():
    """Other ranks leave the hook out; on rank 0 it may change metrics and nothing else."""

    class Ranked:
        ranks = Ranks(rank=1)

        def __call__(self, state, batch):
            return count(state, batch)

    log = []
    fit([ft.on_main(recorder(log, "main"))], step_fn=Ranked())
    assert log == []
    fit([ft.on_main(ft.hook(after_step=lambda s: s.replace(metrics={"x": 1})))])
    with pytest.raises(ValueError, match="changed extra; on one rank only metrics may change"):
        fit([ft.on_main(ft.hook(after_step=lambda s: s.replace(extra={"x": 1})))])


def test_the_gate_law_fails_for_a_gate_that_counts_calls():
    """A gate that counts its own calls fires elsewhere after a resume; every() looks at the step."""
    fired = {"ours": [], "broken": []}
    for name, gate in (("ours", ft.every), ("broken", broken.at_most_every)):
        hook = ft.hook(after_step=lambda s, name=name: fired[name].append(s.step))
        fit([gate(2, hook)], state=start(step=3, position=3), max_steps=8)
    assert fired == {"ours": [4, 6, 8], "broken": [5, 7]}


def test_a_hook_that_reports_after_the_writer_is_refused():
    """What evaluate reports after write_metrics ran would never be written: the order is an error."""
    evaluate = ft.hooks.evaluate(lambda state: {"x": 1}, every=2)
    with pytest.raises(ValueError, match="'evaluate' reports metrics and is listed after 'write_metrics'"):
        fit([ft.hooks.write_metrics(()), evaluate])
    fit([evaluate, ft.hooks.write_metrics(())])


def test_the_last_checkpoint_has_what_the_last_evaluation_left(tmp_path):
    """A best score of an evaluation at the end is in the checkpoint of that step, saved before it already."""

    def best(state):
        return ft.remember(state, "best", max(state.hooks["best"], state.metrics.get("eval/x", 0)))

    hooks = [
        ft.hooks.evaluate(lambda state: {"x": state.step}, every=100),
        ft.stateful("best", 0, after_train=best),
        ft.hooks.checkpoint(tmp_path, every=5),
    ]
    final = fit(hooks, max_steps=5)
    assert final.hooks == {"best": 5}
    assert ft.load(ft.latest(tmp_path)) == final


@pytest.mark.parametrize("error", [KeyboardInterrupt, SystemExit])
def test_ctrl_c_while_closing_closes_the_rest(error):
    """An interrupt in after_train or in a resource's closing is raised after all others have closed."""
    log, files, data = [], Files(), Numbers()

    def interrupt(state):
        raise error("now")

    with pytest.raises(error, match="now"):
        fit([ft.hook(after_train=interrupt), recorder(log, "later"), files.hook("a")], data=data)
    assert log[-1] == ("after_train", "later", 3)
    assert files.log[-1] == "close a"
    assert data.log[-1] == ("close", 0)


def test_a_predicate_that_fails_is_named_and_others_close():
    """An error of when() says whose gate it was, and after_train of the others runs."""
    log = []
    gated = ft.when(lambda state: 1 / 0, ft.hook(after_step=count, name="gated"))
    with pytest.raises(ZeroDivisionError) as caught:
        fit([gated, recorder(log, "other")])
    assert any("of hook 'gated', at step 1" in note for note in caught.value.__notes__)
    assert log[-1][0] == "after_train"


def test_at_end_runs_once_whatever_the_state_says_later():
    """A gate that closed after its hook ran is not asked again at the end."""
    ran = []
    first = ft.at_end(ft.when(lambda s: "x" not in s.extra, ft.hook(after_step=lambda s: ran.append(s.step))))
    then = ft.hook(after_step=lambda s: s.replace(extra={"x": 1}))
    fit([first, then], max_steps=1)
    assert ran == [1]
    fit([ft.at_end(ft.when(lambda s: False, ft.hook(after_step=lambda s: ran.append(s.step))))], max_steps=4)
    assert ran == [1, 4]


def test_before_step_may_not_move_the_position():
    """The batch of the old position is there already: training on it would be silently wrong."""
    move = ft.hook(before_step=lambda s: s.replace(position=100) if s.step == 2 else None)
    with pytest.raises(ValueError, match="before_step moved the position"):
        fit([move], max_steps=5)


def test_a_step_can_not_change_the_run_record():
    """What a step puts into run is not taken over."""
    final = fit(step_fn=lambda s, b: s.advance(run=ft.Run(max_steps=1, stop=ft.Stop("requested", "mine"))), max_steps=3)
    assert final.step == 3 and final.run.max_steps == 3


def test_memory_that_can_not_be_made_ends_the_run_as_other_errors_do():
    """after_train of the hooks runs, and what was opened is closed."""
    log, files = [], Files()
    with pytest.raises(ZeroDivisionError):
        fit([ft.stateful("n", lambda state: 1 / 0), recorder(log, "other"), files.hook("a")])
    assert log == [("after_train", "other", 0)] and files.log == ["open a", "close a"]


def test_memory_given_as_a_value_is_new_in_every_run():
    """An initial tensor written to by one run is not what the next one starts with."""
    hook = ft.stateful("n", torch.zeros(()), after_step=lambda s: s.hooks["n"].add_(1) and None)
    assert fit([hook]).hooks["n"] == fit([hook]).hooks["n"] == 3


def test_a_resource_that_opens_nothing_is_named():
    """open() must give a hook; the error says whose."""
    from contextlib import nullcontext

    with pytest.raises(TypeError, match=r"open\(\) gave NoneType") as caught:
        fit([ft.resource(nullcontext, name="empty")])
    assert "while opening hook 'empty'" in caught.value.__notes__
    gated = ft.every(2, ft.hook(after_step=print))  # its gate would be lost
    with pytest.raises(TypeError, match=r"open\(\) gave every\(2, .*put gates around the resource"):
        fit([ft.resource(lambda: nullcontext(gated), name="gated")])
