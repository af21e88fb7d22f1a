"""hooks.precise_bn: BatchNorm's buffers hold the mean and variance of the population, and nothing else changes."""

import copy
import pickle
import sys

import pytest
import torch
from torch import nn

import fntrain as ft
from fntrain.hooks.precise_bn import PreciseBN
from fntrain.testing import assert_resume_exact, assert_states_equal

FORMS = {"pure": lambda step: step, "in_place": ft.shell.in_place}
SAMPLES = torch.randn(37, 3, 6, 6, generator=torch.Generator().manual_seed(5)) * 7 + 1000


def net():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Dropout(0.2), nn.Conv2d(4, 5, 3), nn.BatchNorm2d(5)
    )


def loss(model, batch):
    ft.put_scalar("mean", model(batch).mean())
    return model(batch).square().mean()


def job(form, hooks, model=None):
    model = model or net()
    optimizer = ft.optimizer(torch.optim.SGD, lr=0.01, momentum=0.9)
    step_fn = FORMS[form](ft.supervised_step(model, loss, optimizer))
    data = ft.data.stream(SAMPLES, 4, seed=0)
    return {"step_fn": step_fn, "hooks": hooks(model), "state": ft.init_state(model, optimizer), "data": data}


def reference(model, params, batches):
    """Mean and unbiased variance of all that each layer is given, at once, in float64, forwards in float32."""
    model = copy.deepcopy(model)
    model.load_state_dict(params, strict=False)
    inputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, nn.BatchNorm2d):
            layer.register_forward_pre_hook(lambda _, args, name=name: inputs.setdefault(name, []).append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(batch)
    found = {}
    for name, values in inputs.items():
        flat = torch.cat([value.double().transpose(0, 1).flatten(1) for value in values], 1)
        found[f"{name}.running_mean"], found[f"{name}.running_var"] = flat.mean(1), flat.var(1)
    return found


def law_population(state, model):
    """The buffers of a state are those of the whole population, to float32's rounding."""
    plain = copy.deepcopy(model)
    for layer in plain.modules():
        layer.train(not isinstance(layer, nn.Dropout))
    for name, value in reference(plain, dict(state.params), SAMPLES.split(8)).items():
        torch.testing.assert_close(state.buffers[name].double(), value, rtol=3e-6, atol=1e-6, msg=name)


@pytest.mark.parametrize("form", FORMS)
def test_buffers_hold_the_statistics_of_the_population(form):
    """Mean and unbiased variance over all elements of ragged batches, against a float64 reference."""
    model = net()
    model[3].eval()  # dropout would differ between the two
    hooks = lambda model: [ft.hooks.precise_bn(model, SAMPLES, every=3, batch_size=8)]  # noqa: E731
    law_population(ft.snapshot(ft.fit(**job(form, hooks, model), max_steps=4)), model)


def test_the_law_can_fail(monkeypatch):
    """The moving average of training, and a mean of the batches' own variances, are refused."""
    model = net()
    model[3].eval()
    with pytest.raises(AssertionError):
        law_population(ft.fit(**job("pure", lambda _: [], model), max_steps=4), model)

    def mean_of_variances(a, b):
        return a[0] + b[0], (a[1] * a[0] + b[1] * b[0]) / (a[0] + b[0]), a[2] + b[2]

    with monkeypatch.context() as patch:
        patch.setattr(sys.modules[PreciseBN.__module__], "_merged", mean_of_variances)
        hooks = lambda model: [ft.hooks.precise_bn(model, SAMPLES, every=3, batch_size=8)]  # noqa: E731
        with pytest.raises(AssertionError):
            law_population(ft.fit(**job("pure", hooks, model), max_steps=4), model)


@pytest.mark.parametrize("form", FORMS)
def test_nothing_else_changes(form):
    """Parameters, optimizer state and metrics of the run are those without it, and so are flags and generators."""
    model = net()
    hook = lambda model: [ft.hooks.precise_bn(model, SAMPLES, every=1, forward=loss)]  # noqa: E731
    with_it = ft.snapshot(ft.fit(**job(form, hook, model), max_steps=5))
    drawn = torch.default_generator.get_state()
    without = ft.snapshot(ft.fit(**job(form, lambda _: []), max_steps=5))
    assert torch.equal(drawn, torch.default_generator.get_state())
    assert_states_equal(with_it.replace(buffers={}), without.replace(buffers={}))
    assert with_it.metrics["loss"] == without.metrics["loss"]
    assert with_it.buffers["1.num_batches_tracked"] == without.buffers["1.num_batches_tracked"]
    assert all(layer.training for layer in model.modules())
    assert not any(layer._forward_pre_hooks for layer in model.modules())


@pytest.mark.parametrize("form", FORMS)
def test_a_resumed_run_is_the_same(form):
    """Dropout in these forwards draws from (seed, step) too."""
    hooks = lambda model: [ft.hooks.precise_bn(model, SAMPLES, every=2, batch_size=16)]  # noqa: E731
    assert_resume_exact(lambda: job(form, hooks), num_steps=4)


def test_frozen_layers_keep_theirs():
    """A layer in eval mode is left alone; if all are, nothing is read."""
    model = net()
    model[1].eval()
    hook = lambda model: [ft.hooks.precise_bn(model, SAMPLES, every=1)]  # noqa: E731
    final = ft.fit(**job("pure", hook, model), max_steps=1)
    assert torch.equal(final.buffers["1.running_mean"], torch.zeros(4))
    assert not torch.equal(final.buffers["5.running_mean"], torch.zeros(5))
    model = net()
    model[1].eval(), model[5].eval()
    unread = lambda model: [ft.hooks.precise_bn(model, [], every=1)]  # noqa: E731
    ft.fit(**job("pure", unread, model), max_steps=1)


def test_it_reads_as_many_batches_as_asked():
    """num_batches bounds the reading; evaluate after it sees the new statistics."""
    read = []
    model = nn.BatchNorm1d(2)
    samples = torch.arange(9.0).repeat_interleave(8).reshape(36, 2)
    hooks = [
        ft.hooks.precise_bn(
            model, samples, every=1, num_batches=3, batch_size=4, forward=lambda m, b: (read.append(1), m(b))
        ),
        ft.hooks.evaluate(lambda state: {"mean": state.buffers["running_mean"][0]}, every=1),
    ]
    optimizer = ft.optimizer(torch.optim.SGD, lr=0.0)
    step_fn = ft.supervised_step(model, lambda model, batch: model(batch).sum(), optimizer)
    final = ft.fit(step_fn, hooks, state=ft.init_state(model, optimizer), data=[samples[:4]], max_steps=1)
    assert len(read) == 3
    assert final.metrics["eval/mean"] == 1.0


def test_bad_arguments_are_refused():
    """No layer to measure, data that can be read only once, none at all, and numbers out of range."""
    model = nn.BatchNorm1d(2)
    with pytest.raises(ValueError, match="has no BatchNorm"):
        ft.hooks.precise_bn(nn.Linear(2, 2), [], every=1)
    with pytest.raises(TypeError, match="re-iterable"):
        ft.hooks.precise_bn(model, iter([]), every=1)
    with pytest.raises(ValueError, match="num_batches: got 0"):
        ft.hooks.precise_bn(model, [], every=1, num_batches=0)
    state = ft.init_state(model, ft.optimizer(torch.optim.SGD, lr=0.0))
    with pytest.raises(ValueError, match="gave no batch"):
        PreciseBN(model, [], 1, loss)(state)


def test_it_is_a_value():
    """Equal to itself, printed, and pickled where the model and the data do."""
    model = nn.BatchNorm1d(2)
    hook = ft.hooks.precise_bn(model, [torch.ones(2, 2)], every=3)
    assert "every(3" in repr(hook)
    assert pickle.loads(pickle.dumps(hook)).every == 3
