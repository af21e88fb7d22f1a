"""The order of hooks is data: what each makes, what must come before it and why. Every rule, broken and kept."""

import pytest

import fntrain as ft


def report(name="evaluate"):
    return ft.hooks.evaluate(lambda state: {}, every=1, name=name)


def own(**declared):
    return ft.hook(name="own", **declared)


ema = ft.hooks.ema(name="ema")
evaluate, averages = report(), ft.hooks.evaluate(lambda state: {}, every=1, weights="ema")
write = ft.hooks.write_metrics(())
rollback = ft.hooks.rollback_on_spike()
other_rollback = ft.hooks.rollback_on_spike("norm", name="other_rollback")
lasting = ft.stateful("lasting", 0, outlives=True)
best = ft.hooks.best_checkpoint("best", "x", mode="min")
other_best = ft.hooks.best_checkpoint("other", "y", mode="min", name="other_best")
checkpoint = ft.hooks.checkpoint("runs", every=1)
scored = ft.hooks.checkpoint("scored", every=1, keep_best=ft.hooks.keep_best("x", mode="min"), name="scored")

STALE = "which would save that memory one step old"
TWICE = "which may go back to an earlier step, and it would count that step twice"
UNSEEN = "which would not see them"

# (a list that is refused, what makes the later one late, why; a list of the same hooks that is not)
BROKEN = [
    ([checkpoint, ema], "'ema' has memory", "'checkpoint'", STALE, [ema, checkpoint]),
    ([checkpoint, best], "'best_checkpoint' has memory", "'checkpoint'", STALE, [best, checkpoint]),
    ([checkpoint, scored], "'scored' has memory", "'checkpoint'", STALE, [scored, checkpoint]),
    ([checkpoint, rollback], "'rollback_on_spike' has memory", "'checkpoint'", STALE, [rollback, checkpoint]),
    ([checkpoint, lasting], "'lasting' has memory", "'checkpoint'", STALE, [lasting, checkpoint]),
    ([best, ema], "'ema' has memory", "'best_checkpoint'", STALE, [ema, best]),
    ([best, rollback], "'rollback_on_spike' has memory", "'best_checkpoint'", STALE, [rollback, best]),
    ([rollback, ema], "'ema' has memory", "'rollback_on_spike'", TWICE, [ema, rollback]),
    ([write, evaluate], "'evaluate' reports metrics", "'write_metrics'", UNSEEN, [evaluate, write]),
    ([write, rollback], "'rollback_on_spike' reports metrics", "'write_metrics'", UNSEEN, [rollback, write]),
    ([write, own(makes="metrics")], "'own' reports metrics", "'write_metrics'", UNSEEN, [own(makes="metrics"), write]),
    (
        [own(needs=[ft.Needs("tea", "is a reason")]), ft.hook(name="kettle", makes={"tea", "steam"})],
        "'kettle' makes 'tea'",
        "'own'",
        "which is a reason",
        [ft.hook(name="kettle", makes={"tea", "steam"}), own(needs=[ft.Needs("tea", "is a reason")])],
    ),
]  # fmt: skip


def start(hooks):
    """As far as arguments are checked: nothing is opened."""
    state = ft.TrainState(step=0, position=0, seed=0, params={})
    ft.states(lambda state, batch: state.advance(), hooks, state=state, data=[], max_steps=1)


@pytest.mark.parametrize(("hooks", "late", "early", "reason", "kept"), BROKEN)
def test_a_hook_after_one_that_needs_what_it_makes_is_refused(hooks, late, early, reason, kept):
    """Both are named, with the reason and what to do; the other way round they are accepted. Timed or gated alike."""
    name = late.partition(" ")[0]
    for wrapped in (hooks, ft.hooks.timed(hooks), [ft.every(2, hook) for hook in hooks]):
        with pytest.raises(ValueError, match="^hooks: ") as caught:
            start(wrapped)
        assert str(caught.value) == f"hooks: {late} and is listed after {early}, {reason}; list {name} before it"
    start(kept)
    start(ft.hooks.timed(kept))


@pytest.mark.parametrize(
    "hooks",
    [
        [best, other_best, checkpoint],
        [best, scored],
        [rollback, best, scored],
        [rollback, other_rollback],
        [rollback, lasting, checkpoint],
        [checkpoint, write, evaluate][::2],
        [ema, averages, rollback, best, write, checkpoint],
        [ft.hook(needs=[ft.Needs("memory", "is a reason", but="lasting memory")]), lasting],
    ],
)
def test_lists_that_break_no_rule(hooks):
    """Best checkpoints follow each other; what outlives a roll-back may come after the hook that goes back."""
    start(hooks)


@pytest.mark.parametrize("hooks", [[averages], [averages, ema], [ft.hook(name="ema"), averages], [lasting, averages]])
def test_a_hook_that_must_be_there_is_missed(hooks):
    """Not there, listed later, of that name without memory, or of another name."""
    with pytest.raises(
        ValueError, match="'evaluate' reads the memory of 'ema', and no hook of that name is listed before"
    ):
        start(hooks)


def test_two_of_one_name_are_refused():
    """Their memory would be one."""
    with pytest.raises(ValueError, match="two hooks are named ema; give each a name"):
        start([ema, ft.hooks.ema()])


def test_what_a_hook_declares_is_kept_by_its_makers():
    """hook, stateful and resource take the same words, one or several; a word that is none is an error."""
    declared = {"makes": ["a", "b"], "outlives": ("x",), "needs": [ft.Needs("c", "why")]}
    hooks = [
        ft.hook(**declared),
        ft.stateful("s", {"x": 1}, **declared),
        ft.resource(ft.hook, name="r", init=dict, **declared),
    ]
    assert all(hook.makes == {"a", "b"} and hook.needs == (ft.Needs("c", "why"),) for hook in hooks)
    assert [sorted(hook.made) for hook in hooks] == [["a", "b", "lasting memory"]] + [
        ["a", "b", "lasting memory", "memory"]
    ] * 2
    assert ft.hook(makes="ab").makes == {"ab"}
    with pytest.raises(TypeError, match="saves"):
        ft.hook(saves=True)
