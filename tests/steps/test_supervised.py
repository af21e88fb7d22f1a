"""supervised_step: bitwise the raw loop, pure, exact under accumulation, safe on inf and nan."""

import math

import broken
import pytest
import torch
import torch.nn.functional as F
from cases import MODELS, batches, classification, cross_entropy, make, raw_loop, same, square_loss, token_loss
from torch import nn

import fntrain as ft
from fntrain.core import tree
from fntrain.testing import assert_pure

ADAMW = ft.optimizer(torch.optim.AdamW, lr=ft.schedules.linear(0.1, 0.01, total_steps=5), fused=True)
SGD = ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)


def run(model, step_fn, data, seed=0):
    """All states of a run, the first included."""
    state = ft.init_state(model, step_fn.optimizer, seed=seed)
    states = [state]
    for batch in data:
        states.append(step_fn(states[-1], batch))
    return states


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("name", MODELS)
def test_one_micro_batch_is_bitwise_the_raw_loop(name, clip, precision):
    """Parameters and buffers after five steps have the bits of a loop written by hand."""
    data = batches(name, 5)
    model, twin = make(name), make(name)
    step_fn = ft.supervised_step(model, square_loss, ADAMW, clip_grad_norm=clip, precision=precision)
    final = run(model, step_fn, data)[-1]
    by_hand = torch.optim.AdamW(twin.parameters(), lr=0.1, fused=True)
    raw_loop(twin, square_loss, by_hand, data, clip=clip, schedule=ADAMW.lr, precision=precision)
    assert same(final.params, {key: value.detach() for key, value in twin.named_parameters()})
    assert same(final.buffers, {key: twin.state_dict()[key] for key in final.buffers})


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_pure(name):
    """The old state keeps its bits, and the same state and batch give the same bits whatever came before."""
    model = make(name)
    batch, *_ = data = batches(name, 3)
    step_fn = ft.supervised_step(model, square_loss, SGD, clip_grad_norm=0.1)
    for state in run(model, step_fn, data):
        assert_pure(step_fn, state, batch)


@pytest.mark.parametrize(
    "breaks",
    [
        broken.step_that_writes_to_the_old_state,
        broken.step_that_draws_from_the_outside,
        broken.step_with_hidden_memory,
    ],
)
def test_the_purity_law_fails_for_impure_steps(breaks):
    """Steps that write to the old state, draw from outside or remember are found out."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, square_loss, SGD)
    state = ft.snapshot(ft.init_state(model, SGD))
    with pytest.raises(AssertionError, match="wrote to the old state|other result"):
        assert_pure(breaks(step_fn), state, batches("mlp", 1)[0])


@pytest.mark.parametrize("name", MODELS)
def test_the_module_is_as_before_after_a_step(name):
    """Weights, buffers, gradients, flags and hooks of the module are what they were, also after an error."""
    model = make(name)
    objects = [id(tensor) for tensor in [*model.parameters(), *model.buffers()]]
    before = tree.fingerprint(dict(model.state_dict()))
    step_fn = ft.supervised_step(model, square_loss, SGD)
    run(model, step_fn, batches(name, 2))

    def failing(model, batch):
        square_loss(model, batch)
        raise KeyError("from the loss")

    with pytest.raises(KeyError):
        run(model, ft.supervised_step(model, failing, SGD), batches(name, 1))
    assert tree.fingerprint(dict(model.state_dict())) == before
    assert [id(tensor) for tensor in [*model.parameters(), *model.buffers()]] == objects
    assert all(param.grad is None for param in model.parameters())


@pytest.mark.parametrize("loss_fn", [square_loss, token_loss])
@pytest.mark.parametrize(("size", "num"), [(8, 2), (8, 8), (7, 2), (7, 3), (5, 4), (3, 8)])
def test_accumulation_is_exact_for_ragged_micro_batches(size, num, loss_fn):
    """Any split of a batch gives the gradient and the metrics of the whole one, to 1e-12 in float64."""
    results = []
    for accumulate in (1, num):
        model = make("mlp").double()
        step_fn = ft.supervised_step(model, loss_fn, SGD, accumulate=accumulate)
        results.append(run(model, step_fn, [batch.double() for batch in batches("mlp", 2, size)])[-1])
    for key, whole in results[0].params.items():
        torch.testing.assert_close(results[1].params[key], whole, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(results[1].metrics["loss"], results[0].metrics["loss"], rtol=1e-12, atol=0)


def test_the_accumulation_law_fails_for_a_mean_of_means():
    """Averaging the losses of ragged micro-batches is noticed."""
    model = make("mlp").double()
    whole = ft.supervised_step(model, square_loss, SGD)
    batch = batches("mlp", 1, 7)[0].double()
    state = ft.init_state(model, SGD)
    right, wrong = whole(state, batch), broken.accumulate_mean_of_means(whole, 3)(state, batch)
    assert not torch.allclose(right.params["0.weight"], wrong.params["0.weight"], rtol=1e-6)


def test_metrics_of_micro_batches_weigh_like_the_loss():
    """A reported mean over ragged micro-batches is the mean over the batch."""
    results = []
    for accumulate in (1, 3):
        model = make("mlp").double()
        step_fn = ft.supervised_step(model, square_loss, SGD, accumulate=accumulate)
        results.append(run(model, step_fn, [batches("mlp", 1, 7)[0].double()])[-1].metrics["out"].item())
    assert results[1] == pytest.approx(results[0], rel=1e-12)


def test_terms_with_denominators_of_their_own_are_exact():
    """With weights= two terms counted differently give the gradient of the whole batch (3.5% off under one weight)."""

    def weights(batch):
        return {"a": (batch[:, 0] > 0).sum(), "b": len(batch)}

    def sums(model, batch):
        out = model(batch).square().mean(1)
        return {"a": (out * (batch[:, 0] > 0)).sum(), "b": out.sqrt().sum()}

    results = []
    for accumulate in (1, 2, 5):
        model = make("mlp").double()
        step_fn = ft.supervised_step(model, sums, SGD, accumulate=accumulate, weights=weights)
        results.append(run(model, step_fn, [batches("mlp", 1, 7)[0].double()])[-1])
    for other in results[1:]:
        for key, value in results[0].params.items():
            torch.testing.assert_close(other.params[key], value, rtol=1e-12, atol=1e-14)
        assert other.metrics["a"].item() == pytest.approx(results[0].metrics["a"].item())


def test_a_dict_of_losses_is_summed_and_reported():
    """The terms add up to the loss and are all in the metrics."""
    model = make("mlp")
    both = {"a": 1.0, "b": 0.5}
    step_fn = ft.supervised_step(model, lambda m, b: {k: w * cross_entropy(m, b) for k, w in both.items()}, SGD)
    metrics = step_fn(ft.init_state(model, SGD), classification()).metrics
    assert metrics["loss"].item() == pytest.approx(metrics["a"].item() + metrics["b"].item())


def test_an_all_masked_batch_is_a_skipped_step():
    """A total weight of 0 keeps parameters and optimizer state, counts the step and says so."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, token_loss, ADAMW, accumulate=2)
    good, masked = batches("mlp", 1)[0], -batches("mlp", 1)[0].abs()
    states = run(model, step_fn, [good, masked])
    assert states[2].metrics["skipped_steps"] == 1
    assert (states[2].step, states[2].position) == (2, 2)
    assert same(states[1].params, states[2].params)
    assert same(states[1].opt_state, states[2].opt_state)


def test_a_masked_micro_batch_among_others_does_no_harm():
    """Cross entropy over an empty micro-batch is nan; a weighted sum over it is 0, and the step is right."""

    def loss_fn(model, batch):
        keep = batch["x"][:, 0] > 0
        return ft.weighted(F.cross_entropy(model(batch["x"])[keep], batch["y"][keep], reduction="sum"), keep.sum())

    batch = classification(8)
    batch["x"] = batch["x"].double()
    batch["x"][:4, 0] = -1.0
    batch["x"][4:, 0] = 1.0
    results = []
    for accumulate in (1, 2):
        model = make("mlp").double()
        step_fn = ft.supervised_step(model, loss_fn, SGD, accumulate=accumulate)
        results.append(run(model, step_fn, [batch])[-1])
    assert results[1].metrics["skipped_steps"] == 0
    torch.testing.assert_close(results[1].params["0.weight"], results[0].params["0.weight"], rtol=1e-12, atol=1e-14)


def poison(kind):
    """A loss that turns bad on batches whose first element is 99, in one of several ways."""

    def loss_fn(model, batch):
        bad = bool(batch[0, 0] == 99)
        out = model(torch.where(batch == 99, 0.0, batch))
        loss = out.square().mean()
        if bad and kind == "loss_inf_gradient_finite":
            return loss + torch.tensor(math.inf)
        if bad and kind == "gradient_nan_loss_finite":
            return loss + (out.sum() * 0).sqrt()
        return loss * math.nan if bad else loss

    return loss_fn


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("kind", ["nan", "loss_inf_gradient_finite", "gradient_nan_loss_finite"])
@pytest.mark.parametrize("bad_step", [0, 2])
def test_a_bad_step_changes_nothing_but_the_counters(kind, bad_step, device_decides, monkeypatch):
    """Parameters, buffers and optimizer state keep their bits; the next good step goes on from them."""
    if device_decides:  # the branch of a GPU, taken on the CPU: every tensor is chosen without a host decision
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    model = make("batchnorm")
    data = batches("batchnorm", 4)
    data[bad_step] = data[bad_step].clone()
    data[bad_step][0, 0] = 99
    states = run(model, ft.supervised_step(model, poison(kind), SGD, clip_grad_norm=1.0), data)
    before, after = states[bad_step], states[bad_step + 1]
    assert [float(state.metrics["skipped_steps"]) for state in states[1:]] == [float(i == bad_step) for i in range(4)]
    assert after.step == before.step + 1
    for field in ("params", "buffers", "opt_state"):
        assert same(getattr(before, field), getattr(after, field))
    assert all(leaf.isfinite().all() for leaf in states[-1].params.values())
    momentum = [entry["momentum_buffer"] for entry in states[-1].opt_state.values()]
    assert all(buffer.isfinite().all() for buffer in momentum)


def test_the_skip_law_fails_without_protection():
    """With on_nonfinite="allow" a nan does reach the parameters."""
    model = make("mlp")
    bad = torch.full((4, 6), 99.0)
    final = run(model, ft.supervised_step(model, poison("nan"), SGD, on_nonfinite="allow"), [bad])[-1]
    assert not final.params["0.weight"].isfinite().all()
    assert "skipped_steps" not in final.metrics


def test_raise_names_step_and_parameters():
    """on_nonfinite="raise" says at which step, and which gradients were not finite."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, poison("nan"), SGD, on_nonfinite="raise")
    state = step_fn(ft.init_state(model, SGD), batches("mlp", 1)[0])
    before = ft.digest(state)
    with pytest.raises(ft.NonFiniteError, match=r"step 2: loss is nan.*'0.weight'"):
        step_fn(state, torch.full((4, 6), 99.0))
    assert ft.digest(state) == before


def test_huge_finite_gradients_are_clipped_not_skipped():
    """Gradients whose squares overflow float32 are finite all the same."""
    model = nn.Linear(2, 1, bias=False)
    step_fn = ft.supervised_step(model, lambda m, b: (m(b) * 1e25).sum(), SGD, clip_grad_norm=1.0)
    state = step_fn(ft.init_state(model, SGD), torch.ones(1, 2))
    assert state.metrics["skipped_steps"] == 0
    assert (state.params["weight"] - model.weight).norm().item() == pytest.approx(0.1, rel=1e-4)


def test_bf16_accumulation_enters_autocast_for_each_micro_batch():
    """The second step uses the new weights: its loss is that of a fresh start from the first step's result."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, square_loss, SGD, accumulate=2, precision="bf16")
    data = batches("mlp", 2)
    states = run(model, step_fn, data)
    other = make("mlp", seed=5)
    again = ft.supervised_step(other, square_loss, SGD, accumulate=2, precision="bf16")(states[1], data[1])
    assert again == states[2]
    assert states[2].params["0.weight"].dtype == torch.float32


def test_dropout_depends_on_seed_and_step_only():
    """Another seed or step draws another mask; the same ones draw the same, whatever was drawn between."""
    model = make("dropout")
    step_fn = ft.supervised_step(model, square_loss, SGD)
    state, batch = ft.init_state(model, SGD), batches("dropout", 1)[0]
    loss = step_fn(state, batch).metrics["loss"]
    torch.rand(10)
    assert step_fn(state, batch).metrics["loss"] == loss
    assert step_fn(state.replace(step=1), batch).metrics["loss"] != loss
    assert step_fn(state.replace(seed=1), batch).metrics["loss"] != loss


def test_value_clipping_is_that_of_torch():
    """clip_grad_value gives the bits of torch.nn.utils.clip_grad_value_."""
    model, twin = make("mlp"), make("mlp")
    data = batches("mlp", 3)
    final = run(model, ft.supervised_step(model, square_loss, SGD, clip_grad_value=0.01), data)[-1]
    by_hand = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, fused=True)
    for batch in data:
        by_hand.zero_grad()
        twin(batch).square().flatten(1).mean(1).mean().backward()
        torch.nn.utils.clip_grad_value_(twin.parameters(), 0.01)
        by_hand.step()
    assert same(final.params, {key: value.detach() for key, value in twin.named_parameters()})


def test_transform_grads_sees_names_and_may_drop_some():
    """Gradients are changed by name before clipping; a name left out is not updated."""
    model = make("mlp")

    def only_weights(grads):
        return {name: -grad for name, grad in grads.items() if name.endswith("weight")}

    plain = ft.supervised_step(model, square_loss, ft.optimizer(torch.optim.SGD, lr=0.1))
    negated = ft.supervised_step(model, square_loss, plain.optimizer, transform_grads=only_weights)
    start, batch = ft.init_state(model, plain.optimizer), batches("mlp", 1)[0]
    a, b = plain(start, batch), negated(start, batch)
    torch.testing.assert_close(a.params["0.weight"] + b.params["0.weight"], 2 * start.params["0.weight"])
    assert same({"bias": b.params["0.bias"]}, {"bias": start.params["0.bias"]})


def test_frozen_groups_get_no_gradient():
    """A frozen parameter costs no gradient and keeps its bits; its flag is as before afterwards."""
    model = make("mlp")
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.1, groups=[ft.group("0.*", frozen=True)])
    seen = []

    def loss_fn(model, batch):
        seen.append([param.requires_grad for param in model.parameters()])
        return square_loss(model, batch)

    state = ft.init_state(model, optimizer)
    final = ft.supervised_step(model, loss_fn, optimizer)(state, batches("mlp", 1)[0])
    assert seen == [[False, False, True, True]]
    assert all(param.requires_grad for param in model.parameters())
    assert same({"w": final.params["0.weight"]}, {"w": state.params["0.weight"]})
    assert sorted(final.opt_state) == ["2.bias", "2.weight"]


def test_reports_during_the_backward_are_ignored():
    """Activation checkpointing runs the forward again in the backward; it reports nothing twice."""
    model = make("mlp")

    def loss_fn(model, batch):
        def inner(x):
            ft.put_scalar("calls", 1.0, reduce="sum")
            return model(x)

        return torch.utils.checkpoint.checkpoint(inner, batch.requires_grad_(), use_reentrant=False).square().mean()

    state = ft.supervised_step(model, loss_fn, SGD)(ft.init_state(model, SGD), batches("mlp", 1)[0])
    assert state.metrics["calls"] == 1.0


def test_metrics_keep_no_graph_and_no_batch():
    """What a step reports is detached and has storage of its own."""
    model = make("mlp")

    def loss_fn(model, batch):
        out = model(batch)
        ft.put_scalar("first", out[0, 0])
        ft.put_scalar("count", model.count)
        model.count += 1
        return out.square().mean()

    model.count = torch.zeros(())
    metrics = ft.supervised_step(model, loss_fn, SGD)(ft.init_state(model, SGD), batches("mlp", 1)[0]).metrics
    assert all(not value.requires_grad for value in metrics.values() if isinstance(value, torch.Tensor))
    assert metrics["first"].untyped_storage().nbytes() == 4
    assert metrics["count"] == 0.0


def step_of(loss_fn, **kwargs):
    """Build a step and run it once on a small batch."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, loss_fn, SGD, **kwargs)
    return step_fn(ft.init_state(model, SGD), batches("mlp", 1)[0])


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: step_of(lambda m, b: m(b)), ValueError, r"has shape \(8, 3\), expected a scalar"),
        (lambda: step_of(lambda m, b: m(b).mean().detach()), ValueError, "has no gradient"),
        (lambda: step_of(lambda m, b: m(b).mean().item()), TypeError, "'loss' is float, expected a scalar tensor"),
        (lambda: step_of(lambda m, b: {}), ValueError, "empty dict"),
        (lambda: step_of(lambda m, b: {"loss": m(b).mean(), "x": m(b).mean()}), ValueError, "would hide their sum"),
        (lambda: step_of(lambda m, b: {"a": ft.weighted(m(b).sum(), 3)}), TypeError, "pass weights=fn"),
        (lambda: step_of(lambda m, b: (ft.put_scalar("lr", 1.0), m(b).mean())[1]), ValueError, r"\['lr'\] are reported by the step or the loss"),
        (lambda: step_of(lambda m, b: b.requires_grad_().mean()), ValueError, "no parameter got a gradient"),
        (lambda: step_of(square_loss, accumulate=True), ValueError, "accumulate: got True"),
        (lambda: step_of(square_loss, clip_grad_norm=0.0), ValueError, "clip_grad_norm: got 0.0"),
        (lambda: step_of(square_loss, clip_grad_norm=1.0, clip_grad_value=1.0), ValueError, "at most one"),
        (lambda: step_of(square_loss, precision="fp8"), ValueError, "precision: got 'fp8'"),
        (lambda: step_of(square_loss, on_nonfinite="hope"), ValueError, "on_nonfinite: got 'hope'"),
        (lambda: step_of(square_loss, transform_grads=lambda g: None), ValueError, "transform_grads: got None"),
        (lambda: step_of(lambda m, b: {"a": m(b).sum()}, weights=lambda b: {"b": 1}), ValueError, r"terms \['a'\], weights\(batch\) gave \['b'\]"),
        (lambda: ft.supervised_step(make("mlp"), square_loss, torch.optim.SGD), TypeError, "expected ft.optimizer"),
        (lambda: ft.supervised_step(nn.ReLU(), square_loss, SGD), ValueError, "ReLU has no parameters"),
        (lambda: ft.split_batch({"a": torch.ones(4), "b": torch.ones(3)}, 2), ValueError, r"batch\['b'\]: has 3 samples, batch\['a'\] has 4"),
        (lambda: ft.split_batch("abc", 2), ValueError, "without a tensor"),
        (lambda: ft.split_batch(torch.ones(0, 3), 2), ValueError, "got 0 samples"),
        (lambda: ft.put_scalar("x", 1.0), RuntimeError, "outside of a step"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(call, error, message):
    """Every wrong argument, loss or batch is an error that says where, what and what to do."""
    with pytest.raises(error, match=message):
        call()


def test_a_state_of_another_model_is_refused():
    """A step given the state of another model lists what is missing."""
    step_fn = ft.supervised_step(make("mlp"), square_loss, SGD)
    with pytest.raises(ValueError, match=r"state.params: missing \['0.bias', '0.weight'"):
        step_fn(ft.init_state(make("tied"), SGD), batches("mlp", 1)[0])


def test_batches_split_by_samples_whatever_their_containers():
    """Dicts, tuples, named tuples, strings and lists of samples are split alike; other things are shared."""
    batch = {"x": torch.arange(5), "pair": (torch.ones(5, 2), ["a", "b", "c", "d", "e"]), "scale": torch.tensor(2.0)}
    parts = ft.split_batch(batch, 2)
    assert [part["x"].tolist() for part in parts] == [[0, 1, 2], [3, 4]]
    assert [part["pair"][1] for part in parts] == [["a", "b", "c"], ["d", "e"]]
    assert all(part["scale"] == 2.0 for part in parts)
    samples = [{"boxes": torch.ones(i, 4)} for i in range(1, 4)]
    assert [len(part) for part in ft.split_batch(samples, 2)] == [2, 1]


def test_what_a_forward_or_an_optimizer_assigns_to_data_is_kept():
    """`p.data = ...` and `buffer.data = ...` replace the lent tensor; the new values are in the next state."""

    class Assigning(torch.optim.Optimizer):
        def __init__(self, params, lr=0.1):
            super().__init__(params, {"lr": lr})

        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.data = param.data - group["lr"] * param.grad

    model = make("batchnorm")

    def loss_fn(model, batch):
        model[1].running_mean.data = model[1].running_mean + 1
        return square_loss(model, batch)

    optimizer, batch = ft.optimizer(Assigning, lr=0.1), batches("batchnorm", 1)[0]
    plain = ft.optimizer(torch.optim.SGD, lr=0.1)
    state = ft.init_state(model, optimizer)
    new = assert_pure(ft.supervised_step(model, loss_fn, optimizer), state, batch)
    expected = ft.supervised_step(model, square_loss, plain)(state, batch)
    for name, value in expected.params.items():
        torch.testing.assert_close(new.params[name], value)
    assert not same({"m": new.buffers["1.running_mean"]}, {"m": expected.buffers["1.running_mean"]})


def test_scratch_buffers_leave_no_memory_and_late_ones_are_refused():
    """A non-persistent buffer is put back after a step; a persistent one that starts as None can't become a tensor."""

    class Scratch(nn.Module):
        def __init__(self, persistent):
            super().__init__()
            self.linear = nn.Linear(6, 3)
            self.register_buffer("seen", torch.zeros(()), persistent=False)
            self.register_buffer("cache", None, persistent=persistent)

        def forward(self, x):
            self.seen += 1
            self.cache = x.mean().detach()
            return self.linear(x) * self.seen

    batch, model = batches("mlp", 1)[0], Scratch(persistent=False)
    assert_pure(ft.supervised_step(model, square_loss, SGD), ft.init_state(model, SGD), batch)
    assert model.seen == 0 and model.cache is None
    model = Scratch(persistent=True)
    with pytest.raises(ValueError, match="buffer 'cache' went from None to a tensor in a step"):
        ft.supervised_step(model, square_loss, SGD)(ft.init_state(model, SGD), batch)
    assert model.cache is None


class Late(nn.Module):
    """The second parameter gets its first gradient in a later step."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(6, 3), nn.Linear(6, 3)

    def forward(self, x):
        return self.a(x) + (self.b(x) if x[0, 0] > 50 else 0)


@pytest.mark.parametrize("on_nonfinite", ["skip", "raise", "allow"])
def test_a_device_waits_only_where_it_must(on_nonfinite, monkeypatch):
    """State created in a bad step is not kept, raise does raise, and SGD without state never reads the decision."""
    monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    reads = []
    real = torch.Tensor.__bool__
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self: (reads.append(1), real(self))[1])
    plain = ft.optimizer(torch.optim.SGD, lr=0.1)
    model = make("mlp")
    step_fn = ft.supervised_step(model, square_loss, plain, on_nonfinite=on_nonfinite)
    states = run(model, step_fn, batches("mlp", 3))
    assert on_nonfinite != "skip" or not reads
    assert same(states[-1].params, run(make("mlp"), step_fn, batches("mlp", 3))[-1].params)
    late, bad = Late(), torch.full((4, 6), 99.0)
    step_fn = ft.supervised_step(late, poison("nan"), SGD, on_nonfinite=on_nonfinite)
    if on_nonfinite == "raise":
        with pytest.raises(ft.NonFiniteError, match="step 2: loss is nan"):
            run(late, step_fn, [batches("mlp", 1)[0], bad])
    if on_nonfinite == "skip":
        states = run(late, step_fn, [batches("mlp", 1)[0], bad])
        assert sorted(states[-1].opt_state) == ["a.bias", "a.weight"]
        assert same(states[1].opt_state, states[2].opt_state) and states[2].metrics["skipped_steps"] == 1


def test_a_masked_batch_is_skipped_also_when_bad_ones_raise():
    """Weight 0 is a skipped step, not a non-finite one."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, token_loss, SGD, on_nonfinite="raise")
    state = step_fn(ft.init_state(model, SGD), -batches("mlp", 1)[0].abs())
    assert (state.step, state.metrics["skipped_steps"]) == (1, 1)


def test_metrics_weigh_samples_also_under_weights():
    """With weights= a reported mean is that of the samples of the whole batch, also when ragged; 0 of a term is 0."""

    def loss_fn(model, batch):
        ft.put_scalar("first", batch[:, 0].mean())
        return {"a": model(batch).square().sum(), "b": model(batch).sum() * 0}

    batch, results = batches("mlp", 1, 7)[0].double(), []
    for accumulate in (1, 2):
        model = make("mlp").double()
        step_fn = ft.supervised_step(
            model, loss_fn, SGD, accumulate=accumulate, weights=lambda b: {"a": len(b), "b": 0}
        )
        results.append(run(model, step_fn, [batch])[-1].metrics)
    assert results[0]["first"].item() == pytest.approx(results[1]["first"].item())
    assert results[0]["b"] == 0 and results[0]["skipped_steps"] == 0


def test_several_reports_of_one_name_count_as_one():
    """A scalar reported three times in a micro-batch weighs no more than one reported once."""

    def loss_fn(model, batch):
        for _ in range(3 if len(batch) == 4 else 1):
            ft.put_scalar("size", len(batch))
        return square_loss(model, batch)

    model = make("mlp")
    step_fn = ft.supervised_step(model, loss_fn, SGD, accumulate=2)
    assert run(model, step_fn, batches("mlp", 1, 7))[-1].metrics["size"] == pytest.approx((4 * 4 + 3 * 3) / 7)


def test_gradients_of_the_module_are_put_back_and_of_a_transform_not_written():
    """What the caller left in .grad is there again; clipping does not write to what transform_grads returned."""
    model = make("mlp")
    mine = {name: torch.full_like(param, 7.0) for name, param in model.named_parameters()}
    for name, param in model.named_parameters():
        param.grad = mine[name]
    ones = {name: torch.ones_like(param) for name, param in model.named_parameters()}
    step_fn = ft.supervised_step(model, square_loss, SGD, clip_grad_norm=0.1, transform_grads=lambda grads: ones)
    run(model, step_fn, batches("mlp", 1))
    assert all(param.grad is mine[name] for name, param in model.named_parameters())
    assert all((one == 1).all() for one in ones.values())


def test_python_and_numpy_draws_depend_on_the_step_too():
    """LayerDrop and the like draw from random or NumPy: seeds="all" seeds those as well, without it a warning says so."""
    import random

    import numpy

    model = make("mlp")

    def loss_fn(model, batch):
        return square_loss(model, batch) * (random.random() + numpy.random.rand())

    state = ft.init_state(model, SGD)
    assert_pure(ft.supervised_step(model, loss_fn, SGD, seeds="all"), state, batches("mlp", 1)[0])
    with pytest.warns(UserWarning, match=r"draws from random and numpy\.random, which the step does not seed"):
        ft.supervised_step(model, loss_fn, SGD)(state, batches("mlp", 1)[0])


def test_clipping_under_allow_spreads_nan_as_torch_does():
    """Without protection a nan norm makes every gradient nan, as torch.nn.utils.clip_grad_norm_ does."""
    model, twin, bad = Late(), Late(), torch.full((4, 6), 99.0)
    twin.load_state_dict(model.state_dict())
    final = run(model, ft.supervised_step(model, poison("nan"), SGD, on_nonfinite="allow", clip_grad_norm=1.0), [bad])[
        -1
    ]
    poison("nan")(twin, bad).backward()
    torch.nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
    expected = {n: bool(p.grad is not None and p.grad.isnan().all()) for n, p in twin.named_parameters()}
    assert {n: bool(p.isnan().all()) for n, p in final.params.items()} == expected


def test_a_model_changed_after_the_step_was_made_is_refused():
    """A layer put in later would never be trained: an error, not silence."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, square_loss, SGD)
    model[2] = nn.Linear(8, 3)
    with pytest.raises(ValueError, match="has other parameters than when the step was made"):
        step_fn(ft.init_state(model, SGD), batches("mlp", 1)[0])


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch.compile's own imports
def test_a_compiled_model_keeps_its_plain_names():
    """torch.compile's wrapper leaves no trace in names, so checkpoints load into the plain model."""
    model = make("batchnorm")
    state = ft.init_state(torch.compile(model), SGD)
    assert {*state.params, *state.buffers} == set(model.state_dict())


def test_all_terms_without_samples_are_a_skipped_step():
    """With weights= a batch in which every denominator is 0 changes nothing."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, lambda m, b: {"a": m(b).sum() * 0}, ADAMW, weights=lambda b: {"a": 0})
    state = ft.init_state(model, ADAMW)
    new = step_fn(state, batches("mlp", 1)[0])
    assert new.metrics["skipped_steps"] == 1 and same(new.params, state.params)
    with pytest.raises(ValueError, match="weight: got -1"):
        ft.weighted(torch.ones(()), -1)


def test_a_term_that_is_a_parameter_is_reported_as_it_was():
    """A learned loss weight in the metrics is the value in the loss, not the one after the update."""
    model = make("mlp")
    model.log_var = nn.Parameter(torch.zeros(()))

    def loss_fn(model, batch):
        return {"mse": square_loss(model, batch) * (-model.log_var).exp(), "log_var": model.log_var}

    new = ft.supervised_step(model, loss_fn, SGD)(ft.init_state(model, SGD), batches("mlp", 1)[0])
    assert new.metrics["log_var"] == 0 and new.params["log_var"] != 0


def test_arrays_and_lists_of_numbers_are_split_too():
    """A NumPy array or a list of labels beside tensors goes to the micro-batches in parts, or is refused."""
    import numpy

    parts = ft.split_batch({"x": torch.ones(4, 2), "y": numpy.arange(4), "z": [1, 2, 3, 4]}, 2)
    assert [(part["y"].tolist(), part["z"]) for part in parts] == [([0, 1], [1, 2]), ([2, 3], [3, 4])]
    with pytest.raises(ValueError, match=r"batch\['z'\]: has 3 samples"):
        ft.split_batch({"x": torch.ones(4, 2), "z": [1, 2, 3]}, 2)


def test_a_shared_buffer_assigned_in_one_place_is_kept():
    """A buffer registered twice and assigned through either place is in the next state."""

    class Holder(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.register_buffer("n", shared)

    for place in ("a", "b"):
        shared, model = torch.zeros(1), make("mlp")
        model.a, model.b = Holder(shared), Holder(shared)

        def loss_fn(model, batch, place=place):
            holder = getattr(model, place)
            holder.n = holder.n + 1
            return model[2](torch.tanh(model[0](batch))).square().mean()

        step_fn = ft.supervised_step(model, loss_fn, SGD)
        assert run(model, step_fn, batches("mlp", 3))[-1].buffers["a.n"] == 3
