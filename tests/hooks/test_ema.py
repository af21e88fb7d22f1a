"""hooks.ema: the averages of a hand-written loop bit for bit, in every checkpoint, and never stale or shared."""

import copy
import pickle

import attrs
import pytest
import torch
from cases import MODELS, batches, make, same, square_loss
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import fntrain as ft
from fntrain.testing import assert_resume_exact, assert_states_equal

ADAMW = ft.optimizer(torch.optim.AdamW, lr=0.05, fused=True)
SGD = ft.optimizer(torch.optim.SGD, lr=0.1)
FORMS = {"pure": lambda step_fn: step_fn, "in_place": ft.shell.in_place}


def count(state, batch):
    """A step by hand: every parameter and floating buffer grows by the batch, integers by one."""
    return state.advance(
        params={name: value + batch for name, value in state.params.items()},
        buffers={n: v + (batch if v.is_floating_point() else 1) for n, v in state.buffers.items()},
    )


def start(**fields):
    return ft.TrainState(**{"step": 0, "position": 0, "seed": 0, "params": {"w": torch.zeros(2)}} | fields)


def trained(name, hooks, *, form="pure", steps=5, optimizer=ADAMW):
    model = make(name)
    step_fn = FORMS[form](ft.supervised_step(model, square_loss, optimizer))
    return ft.fit(step_fn, hooks, state=ft.init_state(model, optimizer), data=batches(name, steps), max_steps=steps)


def by_hand(values, decay, *, every=1, warmup=True):
    """The average of tensors after each step, as a loop would keep it."""
    average, updates = values[0].clone(), 0
    for step, value in enumerate(values[1:], 1):
        if step % every == 0:
            d = min(decay, (1 + updates) / (10 + updates)) if warmup else decay
            average, updates = torch.lerp(average, value, 1 - d), updates + 1
    return average


@settings(max_examples=40, deadline=None)
@given(
    decay=st.floats(0, 1, exclude_max=True),
    every=st.integers(1, 4),
    warmup=st.booleans(),
    draws=st.lists(st.floats(-1e3, 1e3, width=32), max_size=12),
)
def test_it_is_the_loop_by_hand(decay, every, warmup, draws):
    """Whatever decay, period and weights: bitwise torch.lerp in a loop."""
    hook = ft.hooks.ema(decay, every=every, warmup=warmup)
    scan = [start(), *ft.states(count, [hook], state=start(), data=draws)]
    final = ft.fit(count, [hook], state=start(), data=draws)
    assert torch.equal(
        ft.hooks.averaged(final).params["w"],
        by_hand([state.params["w"] for state in scan], decay, every=every, warmup=warmup),
    )
    assert final.hooks["ema"]["updates"] == len(draws) // every


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_and_form_of_the_step_gives_the_same_averages(name, form):
    """Tied, frozen and unused parameters, buffers written or assigned, any layout: parameters and buffers by lerp."""
    model = make(name)
    step_fn = ft.supervised_step(model, square_loss, ADAMW)
    state = ft.init_state(model, ADAMW)
    scan = [state, *ft.states(step_fn, state=state, data=batches(name, 5), max_steps=5)]
    memory = trained(name, [ft.hooks.ema(0.9)], form=form).hooks["ema"]
    for field in ("params", "buffers"):
        assert memory[field].keys() == getattr(state, field).keys()
        for key, average in memory[field].items():
            values = [getattr(one, field)[key] for one in scan]
            assert torch.equal(average, by_hand(values, 0.9) if average.is_floating_point() else values[-1]), key


@pytest.mark.parametrize("name", ["mlp", "batchnorm"])
def test_it_agrees_with_torch(name):
    """AveragedModel of torch.optim.swa_utils, with its buffers, to rounding; the integer buffer exactly."""
    final = trained(name, [ft.hooks.ema(0.9, warmup=False)])
    model = make(name)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, fused=True)
    reference = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.9), use_buffers=True)
    reference.update_parameters(model)  # its first call copies
    for batch in batches(name, 5):
        with ft.events.collecting():
            loss = square_loss(model, batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        reference.update_parameters(model)
    averaged = ft.hooks.averaged(final)
    for key, value in reference.module.state_dict().items():
        ours = {**averaged.params, **averaged.buffers}[key]
        # torch truncates its average of integers; here they are those of the weights
        assert ours == 5 if key.endswith("num_batches_tracked") else torch.allclose(ours, value, rtol=1e-6, atol=1e-7)


def job(hooks, name="batchnorm", form="pure"):
    def build():
        model = make(name)
        step_fn = FORMS[form](ft.supervised_step(model, square_loss, ADAMW))
        data = ft.data.stream(torch.cat(batches(name, 3)), 4, seed=3)
        return {"step_fn": step_fn, "hooks": hooks(), "state": ft.init_state(model, ADAMW, seed=3), "data": data}

    return build


@pytest.mark.parametrize("form", FORMS)
def test_resume_is_exact_with_a_checkpoint_after_it(tmp_path, form):
    """[ema, checkpoint] resumed at any step ends with the bits of a run never stopped, the saved average included."""
    runs = iter(range(99))

    def hooks():
        saving = ft.hooks.checkpoint(tmp_path / str(next(runs)), every=2)
        return [ft.hooks.ema(0.9, every=2), ft.hooks.ema(0.5, name="fast"), saving]

    final = assert_resume_exact(job(hooks, form=form), num_steps=5)
    saved = ft.load(ft.latest(tmp_path / "0"))
    assert_states_equal(saved, final)
    assert ft.hooks.averaged(saved, "fast") == ft.hooks.averaged(final, "fast")


def test_the_law_refuses_memory_outside_the_state_and_stale_buffers():
    """A twin that keeps its averages in itself fails on resume; one that forgets buffers differs from the loop."""

    def leaky():
        kept = {}

        def after_step(state):
            old = kept.setdefault("w", dict(state.params))
            kept["w"] = {name: torch.lerp(old[name], value, 0.1) for name, value in state.params.items()}
            return state.replace(extra={"ema": kept["w"]})

        return [ft.hook(after_step=after_step)]

    with pytest.raises(AssertionError, match="resumed at step 1, the run ends differently"):
        assert_resume_exact(job(leaky), num_steps=3)

    def stale(state):
        new = hook.after_step(state)
        memory = {**new.hooks["ema"], "buffers": state.hooks["ema"]["buffers"]}
        return ft.remember(state, "ema", memory)

    hook = ft.hooks.ema(0.9)
    broken = trained("batchnorm", [attrs.evolve(hook, after_step=stale)])
    whole = trained("batchnorm", [hook])
    with pytest.raises(AssertionError, match="hooks.ema.buffers"):
        assert_states_equal(broken, whole)


@pytest.mark.parametrize("form", FORMS)
def test_older_averages_stay_as_they_were(form):
    """What a state remembers never changes under its holder: not with later steps, nor with the module's memory."""
    model = make("batchnorm")
    step_fn = FORMS[form](ft.supervised_step(model, square_loss, ADAMW))
    kept, bits = [], []
    for state in ft.states(
        step_fn, [ft.hooks.ema()], state=ft.init_state(model, ADAMW), data=batches("batchnorm", 4), max_steps=4
    ):
        kept.append(state.hooks)
        bits.append(ft.core.tree.fingerprint(state.hooks))
    assert [ft.core.tree.fingerprint(hooks) for hooks in kept] == bits
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    assert own.isdisjoint(t.untyped_storage().data_ptr() for t in ft.core.tree.tensors(kept[-1]))


def test_training_is_the_same_with_and_without_it():
    """The averages are beside the run, not in it."""
    without = trained("dropout", [])
    assert trained("dropout", [ft.hooks.ema()]).replace(hooks={}) == without


def test_half_precision_is_averaged_in_float32():
    """A thousand small steps in bfloat16 would be lost in its 8 bits; the average comes back in the weights' dtype."""
    first = start(params={"w": torch.full((2,), 100.0, dtype=torch.bfloat16)}, buffers={"h": torch.zeros(1).half()})
    final = ft.fit(count, [ft.hooks.ema(0.99)], state=first, data=[1.0] * 3)
    memory = final.hooks["ema"]
    assert memory["params"]["w"].dtype == memory["buffers"]["h"].dtype == torch.float32
    scan = [first, *ft.states(count, state=first, data=[1.0] * 3)]
    assert torch.equal(memory["params"]["w"], by_hand([state.params["w"].float() for state in scan], 0.99))
    assert ft.hooks.averaged(final).params["w"].dtype == torch.bfloat16


def test_a_skipped_update_counts():
    """A step that changed nothing pulls the average towards the weights, as in a loop that does not look."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, square_loss, SGD)
    first, second = batches("mlp", 2)
    data = [first, second * float("nan"), second]
    scan = [
        ft.init_state(model, SGD),
        *ft.states(step_fn, [ft.hooks.ema(0.5, warmup=False)], state=ft.init_state(model, SGD), data=data, max_steps=3),
    ]
    assert [state.metrics["skipped_steps"] for state in scan[1:]] == [0, 1, 0]
    expected = by_hand([state.params["0.bias"] for state in scan], 0.5, warmup=False)
    assert torch.equal(scan[-1].hooks["ema"]["params"]["0.bias"], expected)


def test_names_and_shapes_that_come_and_go_begin_anew():
    """A parameter that is new, or of a new shape, starts as itself; one that is gone is dropped; nests are followed."""

    def grow(state, batch):
        return state.advance(params=batch)

    one, two, three = torch.ones(1), torch.full((2,), 2.0), torch.full((1,), 3.0)
    data = [{"g": {"a": one}, "d": one}, {"g": {"a": two, "b": three}}]
    final = ft.fit(grow, [ft.hooks.ema(0.5, warmup=False)], state=start(params=data[0]), data=data)
    assert ft.core.tree.bitwise_equal(dict(final.hooks["ema"]["params"]), data[1])
    assert ft.hooks.averaged(final).params["g"]["b"] is final.hooks["ema"]["params"]["g"]["b"]


def test_names_decide_not_the_order():
    """Memory whose mapping comes in another order is found by name."""
    state = start(params={"a": torch.zeros(1), "b": torch.ones(1)})
    hook = ft.hooks.ema(0.5, warmup=False)
    memory = hook.init(state)
    turned = {**memory, "params": dict(reversed(memory["params"].items()))}
    one, other = (hook.after_step(state.replace(hooks={"ema": kept})) for kept in (memory, turned))
    assert one == other
    assert same(ft.hooks.averaged(one).params, state.params)


def test_averaged_goes_wherever_a_state_does(tmp_path):
    """bound, evaluation, export and going on in place take the averages as they take weights; the state stays."""
    final = trained("batchnorm", [ft.hooks.ema(0.9)])
    bits, averaged = ft.digest(final), ft.hooks.averaged(final)
    assert not torch.equal(averaged.params["0.weight"], final.params["0.weight"])
    model = make("batchnorm")
    ft.load_params(ft.export(averaged, tmp_path / "ema.safetensors"), model)
    assert same(model.state_dict(), {**averaged.params, **averaged.buffers})
    other = make("batchnorm")
    with ft.bound(other, averaged):
        assert same(other.state_dict(), model.state_dict())
    step_fn = ft.supervised_step(other, square_loss, ADAMW)
    batch = batches("batchnorm", 1)[0]
    pure = step_fn(averaged, batch)
    assert_states_equal(ft.shell.in_place(step_fn)(averaged, batch), pure)
    assert ft.digest(final) == bits


def test_evaluate_takes_the_averages_by_name():
    """evaluate(weights=...) measures the averages, at its steps and at the end, under the prefix it is given."""
    model = make("mlp")
    measured = ft.evaluation(model, lambda m, b: {"x": m(b).square().mean()}, batches("mlp", 1)[0])
    hooks = [
        ft.hooks.ema(0.9),
        ft.hooks.evaluate(measured, every=2),
        ft.hooks.evaluate(measured, every=2, weights="ema", prefix="ema/", name="of_average"),
    ]
    final = trained("mlp", hooks)
    assert final.metrics["eval/x"] == measured(final)["x"]
    assert final.metrics["ema/x"] == measured(ft.hooks.averaged(final))["x"] != final.metrics["eval/x"]


@pytest.mark.parametrize(
    ("hooks", "message"),
    [
        (lambda evaluate, ema: [evaluate], r"'evaluate' reads the memory of 'ema'.*listed before it, only \[\]"),
        (lambda evaluate, ema: [evaluate, ema], r"'evaluate' reads the memory of 'ema'"),
        (lambda evaluate, ema: [ft.hooks.ema(name="slow"), evaluate], r"only \['slow'\]"),
        (lambda evaluate, ema: [ft.stateful("ema", 0), evaluate], r"no averages named 'ema', only those named \[\]"),
    ],
)
def test_averages_that_are_not_there_are_named(hooks, message):
    """Evaluating averages of no hook, or of one listed later, is an error when the run starts, not at its end."""
    evaluate = ft.hooks.evaluate(lambda state: {"x": 1}, every=1, weights="ema")
    with pytest.raises(ValueError, match=message):
        ft.fit(count, hooks(evaluate, ft.hooks.ema()), state=start(), data=[1])


def test_averaged_names_what_there_is():
    """Another name lists the averages there are; averages of another model are refused."""
    final = ft.fit(count, [ft.hooks.ema(name="slow")], state=start(), data=[1])
    with pytest.raises(ValueError, match=r"no averages named 'ema', only those named \['slow'\]"):
        ft.hooks.averaged(final)
    for params in ({"v": torch.zeros(2)}, {"w": torch.zeros(3)}):
        with pytest.raises(ValueError, match=r"\['slow'\]: averages of another model than state.params"):
            ft.hooks.averaged(final.replace(params=params), "slow")


def test_two_keep_their_own_memory_and_one_name_is_refused():
    """Each name has its averages; the same name twice is an error."""
    final = ft.fit(count, [ft.hooks.ema(0.5), ft.hooks.ema(0.9, warmup=False, name="slow")], state=start(), data=[1, 1])
    fast, slow = (ft.hooks.averaged(final, name).params["w"][0].item() for name in ("ema", "slow"))
    assert fast > slow > 0
    with pytest.raises(ValueError, match="two hooks are named ema"):
        ft.fit(count, [ft.hooks.ema(), ft.hooks.ema(0.5)], state=start(), data=[1])


def test_hooks_are_values():
    """Equal, printable, and alike after pickle and copy."""
    hook = ft.hooks.ema(0.9, every=2)
    assert hook == ft.hooks.ema(0.9, every=2) != ft.hooks.ema(0.9)
    assert pickle.loads(pickle.dumps(hook)) == copy.deepcopy(hook) == hook
    assert repr(ft.hooks.ema(0.9)) == "hook('ema', after_step=Ema(name='ema', decay=0.9, warmup=True))"


@pytest.mark.parametrize("decay", [1, 1.5, -0.1, float("nan"), "0.9", True])
def test_a_decay_that_averages_nothing_is_refused(decay):
    """Only [0, 1) makes an average."""
    with pytest.raises(ValueError, match="decay: got"):
        ft.hooks.ema(decay)


@pytest.mark.gpu
def test_on_a_gpu_it_is_the_same_hook():
    """cuda_step, with graphs: the averages of the eager step; memory resumed on the host follows the weights."""
    finals = []
    for graph in ("never", "auto"):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Linear(8, 3)).cuda()
        step_fn = ft.shell.cuda_step(ft.supervised_step(model, square_loss, SGD), graph=graph)
        state = ft.init_state(model, SGD)
        hooks = [ft.hooks.ema(0.9)]
        half = ft.fit(step_fn, hooks, state=state, data=batches("mlp", 8), max_steps=8)
        half = half.replace(hooks=ft.core.tree.map_tensors(torch.Tensor.cpu, half.hooks))
        finals.append(ft.fit(step_fn, hooks, state=half, data=iter(batches("mlp", 2)), max_steps=10))
    assert finals[0] == finals[1]
    assert finals[0].hooks["ema"]["params"]["0.weight"].is_cuda
