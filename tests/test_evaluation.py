"""evaluation: weighs by samples, sees the state, leaves no trace."""

import pytest
import torch
from cases import batches, make, square_loss
from torch import nn

import fntrain as ft
from fntrain import tree

SGD = ft.optimizer(torch.optim.SGD, lr=0.1)


def error(model, batch):
    out = model(batch)
    ft.put_scalar("from_the_model", 1.0)
    return {"square": out.square().mean(), "nested": {"max": ft.weighted(out.amax(1).sum(), len(out))}}


def trained(model, name):
    step_fn = ft.supervised_step(model, square_loss, SGD)
    state = ft.init_state(model, SGD)
    for batch in batches(name, 2):
        state = step_fn(state, batch)
    return state


@pytest.mark.parametrize("batch_size", [1, 3, 4, 11])
def test_results_are_means_over_samples_whatever_the_batches(batch_size):
    """A ragged last batch weighs its samples, and nested results are flattened."""
    model, samples = make("mlp"), batches("mlp", 1, 11)[0]
    state = trained(model, "mlp")
    results = ft.evaluation(model, error, samples, batch_size=batch_size)(state)
    with ft.bound(model, state), torch.no_grad():
        out = model(samples)
    assert results == pytest.approx({"square": out.square().mean().item(), "nested/max": out.amax(1).mean().item()})


def test_it_evaluates_the_state_not_the_module():
    """In pure mode the module keeps its first weights; a function closing over it sees those, evaluation does not."""
    model, samples = make("mlp"), batches("mlp", 1, 8)[0]
    state = trained(model, "mlp")
    stale = model(samples).square().mean().item()
    result = ft.evaluation(model, error, samples)(state)["square"]
    twin = make("mlp")
    ft.load_into(twin, state)
    assert result == pytest.approx(twin(samples).square().mean().item())
    assert result != pytest.approx(stale)


def test_it_leaves_no_trace():
    """Weights, buffers, gradients, the flag of every sub-module, generators and the state are bitwise as before."""
    model = nn.Sequential(make("batchnorm"), nn.Dropout(0.5))
    model[0][1].eval()  # frozen on purpose inside a model in train mode
    state = ft.init_state(model, SGD)
    flags = [module.training for module in model.modules()]
    bits, digest, draws = tree.fingerprint(dict(model.state_dict())), ft.digest(state), torch.get_rng_state()

    def noisy(model, batch):
        assert not any(module.training for module in model.modules())
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d):
                module.running_mean.add_(1)
        return {"x": model(batch).mean() + torch.rand(())}

    evaluation = ft.evaluation(model, noisy, batches("mlp", 1, 8)[0])
    assert evaluation(state) == evaluation(state)
    assert [module.training for module in model.modules()] == flags
    assert tree.fingerprint(dict(model.state_dict())) == bits
    assert ft.digest(state) == digest
    assert torch.equal(torch.get_rng_state(), draws)
    with pytest.raises(ZeroDivisionError):
        ft.evaluation(model, lambda m, b: 1 / 0, [1])(state)
    assert [module.training for module in model.modules()] == flags


def test_training_is_the_same_with_and_without_evaluation():
    """A run that evaluates every step ends with the bits of one that never does."""
    results = []
    for every in (1, 100):
        model = make("dropout")
        step_fn = ft.supervised_step(model, square_loss, SGD)
        hook = ft.hooks.evaluate(ft.evaluation(model, error, batches("mlp", 1, 8)[0]), every=every)
        data = ft.data.stream(batches("mlp", 1, 20)[0], 4, seed=0)
        results.append(ft.fit(step_fn, [hook], state=ft.init_state(model, SGD), data=data, max_steps=4))
    assert results[0] == results[1]


@pytest.mark.parametrize(
    ("call", "kind", "message"),
    [
        (lambda: ft.evaluation(make("mlp"), error, iter([1])), TypeError, "re-iterable"),
        (lambda: ft.evaluation(make("mlp"), error, torch.ones(0, 6))(ft.init_state(make("mlp"), SGD)), ValueError, "gave no batch"),
        (lambda: ft.evaluation(make("mlp"), error, 3), TypeError, "got int"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(call, kind, message):
    """Data that can't be read twice, or is empty, is an error that says so."""
    with pytest.raises(kind, match=message):
        call()
