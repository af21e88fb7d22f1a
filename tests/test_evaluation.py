"""evaluation: weighs by samples, sees the state, leaves no trace."""

import pytest
import torch
from cases import batches, make, square_loss
from torch import nn

import fntrain as ft
from fntrain.core import tree

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


def test_a_forward_that_writes_to_weights_does_not_write_to_the_state():
    """An embedding with max_norm renormalises its weight in the forward; modules may override train()."""

    class Merging(nn.Module):
        def __init__(self):
            super().__init__()
            self.embed = nn.Embedding(4, 6, max_norm=0.5)

        def train(self, mode=True):
            self.embed.weight.data.mul_(2)
            return super().train(mode)

        def forward(self, index):
            return self.embed(index)

    model = Merging()
    state = ft.init_state(model, SGD)
    bits = ft.digest(state)
    ft.evaluation(model, lambda m, b: {"x": m(b).mean()}, torch.arange(4))(state)
    assert ft.digest(state) == bits


def test_sums_of_low_precision_results_are_exact():
    """Thousands of bfloat16 sums add up in float64."""
    evaluation = ft.evaluation(
        make("mlp"), lambda m, b: {"x": ft.weighted(torch.tensor(125.0).bfloat16(), 1000)}, range(3000), batch_size=1
    )
    assert evaluation(ft.init_state(make("mlp"), SGD)) == {"x": 0.125}


def test_results_that_are_no_numbers_are_named():
    """A vector or a dict in ft.weighted says which metric it was."""
    for value in (torch.ones(2), ft.weighted({"a": torch.ones(())}, 1)):
        with pytest.raises(ValueError, match="evaluation: 'x' is .* expected a number"):
            ft.evaluation(make("mlp"), lambda m, b, value=value: {"x": value}, range(2))(
                ft.init_state(make("mlp"), SGD)
            )


def test_evaluations_draw_the_same_every_time():
    """What an evaluation draws depends on (seed, step), not on what was drawn before."""
    evaluation = ft.evaluation(make("mlp"), lambda m, b: {"x": torch.rand(())}, range(2))
    state = ft.init_state(make("mlp"), SGD)
    first = evaluation(state)
    torch.rand(5)
    assert evaluation(state) == first != evaluation(state.replace(step=1))
