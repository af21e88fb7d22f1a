"""in_place: leaf by leaf bitwise the pure step, whatever model, optimizer, data and hooks; states that are over say so."""

import copy
import gc
import json
import pickle
import warnings
import weakref
from functools import partial

import broken
import pytest
import torch
from cases import MODELS, batches, make, raw_loop, same, square_loss, token_loss
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import fntrain as ft
from fntrain.core import tree
from fntrain.core.ranks import ALONE
from fntrain.shell.steps.kernels import FusedAdam
from fntrain.testing import assert_resume_exact, assert_states_equal

# Many tests let a device decide about optimizers that count on the host; one test looks at the warning itself.
pytestmark = pytest.mark.filterwarnings("ignore:in_place. waits for the device at every step")
O = torch.optim  # noqa: E741  # rows of a table
ADAMW = ft.optimizer(O.AdamW, lr=ft.schedules.linear(0.1, 0.01, total_steps=5), fused=True)
SGD = ft.optimizer(O.SGD, lr=0.1, momentum=0.9, fused=True)


class Lion(O.Optimizer):
    """A class that torch does not have, with tensors as its only memory."""

    def __init__(self, params, lr=0.1, beta=0.9):
        super().__init__(params, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    memory = self.state[param].setdefault("m", torch.zeros_like(param))
                    param.sub_(group["lr"] * memory.lerp(param.grad, 0.1).sign())
                    memory.lerp_(param.grad, 1 - group["beta"])


class CountsInGroups(O.Optimizer):
    """Memory in param_groups: a number and a tensor."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0, "sum": None})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for param in group["params"]:
                if param.grad is not None:
                    norm = param.grad.norm()
                    group["sum"] = norm if group["sum"] is None else group["sum"] + norm
                    param.sub_(group["lr"] / group["k"] * param.grad / (1 + group["sum"]))


class AssignsData(O.Optimizer):
    """Puts another tensor in the place of every parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        for group in self.param_groups:
            for param in group["params"]:
                if param.grad is not None:
                    param.data = param.data - group["lr"] * param.grad


def decay(step):
    return 0.3 / (1 + step)


OPTIMIZERS = {
    "adamw_fused": (O.AdamW, {"fused": True}),
    "adamw_foreach": (O.AdamW, {"foreach": True}),
    "adamw_single": (O.AdamW, {"foreach": False}),
    "adamw_amsgrad": (O.AdamW, {"fused": True, "amsgrad": True}),
    "adamw_maximize": (O.AdamW, {"fused": True, "maximize": True, "weight_decay": 0.2}),
    "adamw_tensor_lr": (O.AdamW, {"fused": True, "lr": torch.tensor(0.1)}),
    "adamw_schedules": (O.AdamW, {"fused": True, "weight_decay": decay, "betas": lambda step: (0.9 - step / 10, 0.99)}),
    "adam_fused": (O.Adam, {"fused": True, "weight_decay": 0.2}),
    "adam_decoupled": (O.Adam, {"fused": True, "weight_decay": 0.2, "decoupled_weight_decay": True}),
    "adam_capturable": (O.Adam, {"foreach": True}),
    "sgd": (O.SGD, {}),
    "sgd_fused": (O.SGD, {"fused": True}),
    "momentum": (O.SGD, {"momentum": 0.9}),
    "momentum_fused": (O.SGD, {"momentum": 0.9, "fused": True}),
    "nesterov_fused": (O.SGD, {"momentum": 0.9, "nesterov": True, "fused": True}),
    "dampening": (O.SGD, {"momentum": 0.9, "dampening": 0.5}),
    "dampening_fused": (O.SGD, {"momentum": 0.9, "dampening": 0.5, "fused": True}),
    "adagrad": (O.Adagrad, {}),
    "adagrad_fused": (O.Adagrad, {"fused": True}),
    "rmsprop": (O.RMSprop, {"momentum": 0.5, "centered": True}),
    "adadelta": (O.Adadelta, {}),
    "nadam": (O.NAdam, {}),
    "radam": (O.RAdam, {}),
    "asgd": (O.ASGD, {"t0": 1}),
    "adafactor": (O.Adafactor, {}),
    "lion": (Lion, {}),
    "counts_in_groups": (CountsInGroups, {}),
    "assigns_data": (AssignsData, {}),
}
GROUPS = {
    "no_decay": [ft.group("*bias", weight_decay=0.0)],
    "lr_scale": [ft.group("0.*", lr_scale=0.1), ft.group("*bias", lr_scale=2.0)],
    "frozen": [ft.group("0.*", frozen=True)],
    "scheduled": [ft.group("2.*", lr=decay, weight_decay=decay)],
}


def optimizer_of(name, groups=None):
    cls, options = OPTIMIZERS[name]
    return ft.optimizer(cls, groups=groups, **{"lr": ft.schedules.linear(0.1, 0.02, total_steps=5), **options})


def law(build, optimizer, data, loss_fn=square_loss, *, between=None, make_in_place=ft.shell.in_place, **step):
    """Run the pure step and the one in place side by side; everything must have the same bits after every step."""
    model, twin = build(), build()
    pure = ft.supervised_step(model, loss_fn, optimizer, **step)
    cheap = make_in_place(ft.supervised_step(twin, loss_fn, optimizer, **step))
    flags = [param.requires_grad for param in twin.parameters()]
    expected, got = ft.init_state(model, optimizer, seed=4), ft.init_state(twin, optimizer, seed=4)
    for number, batch in enumerate(data):
        expected, got = pure(expected, batch), cheap(got, batch)
        assert_states_equal(got, expected)
        assert tree.bitwise_equal(dict(got.metrics), dict(expected.metrics))
        assert same(got.params, {name: param.detach() for name, param in twin.named_parameters()})
        assert same(got.buffers, {name: twin.state_dict()[name] for name in got.buffers})
        assert all(param.grad is None for param in twin.parameters())
        assert [param.requires_grad for param in twin.parameters()] == flags
        if between is not None:
            expected, got = between(expected, number), between(got, number)
    return got


def start(model, optimizer=ADAMW, loss_fn=square_loss, **step):
    """A step in place and its first state."""
    step_fn = ft.supervised_step(model, loss_fn, optimizer, **step)
    return ft.shell.in_place(step_fn), ft.init_state(model, optimizer, seed=4)


def poisoned(name, num, *bad, size=8):
    """Batches, some of them nan."""
    return [batch * float("nan") if i in bad else batch for i, batch in enumerate(batches(name, num, size))]


SETTINGS = {
    "plain": {},
    "clip_norm": {"clip_grad_norm": 0.05},
    "clip_value": {"clip_grad_value": 0.01},
    "ragged": {"accumulate": 3, "clip_grad_norm": 0.5},
    "weighted": {"accumulate": 2, "loss_fn": token_loss},
    "bf16": {"precision": "bf16", "accumulate": 2},
    "fp16": {"precision": "fp16", "clip_grad_norm": 0.05},
    "allow": {"on_nonfinite": "allow"},
    "raise": {"on_nonfinite": "raise"},
}


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("name", MODELS)
def test_every_model_is_bitwise_the_pure_step(name, setting):
    """State, metrics and the module itself have the bits of the pure run after each of five steps."""
    if (name, setting) == ("lstm", "fp16"):
        pytest.skip("torch has no fp16 LSTM on the CPU")
    law(lambda: make(name), ADAMW, batches(name, 5, size=7), **SETTINGS[setting])


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("bad", [(0,), (2, 3)])
@pytest.mark.parametrize("name", MODELS)
def test_every_model_skips_bad_steps_like_the_pure_step(name, bad, device_decides, monkeypatch):
    """Steps with nan leave parameters, buffers and optimizer state, at the first step and later, host or device."""
    if device_decides:  # the branch of a GPU, taken on the CPU
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    for optimizer in (ADAMW, SGD):
        final = law(lambda: make(name), optimizer, poisoned(name, 5, *bad), clip_grad_norm=0.5)
        assert all(leaf.isfinite().all() for leaf in final.params.values())


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("bad", [(), (0, 2)])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_optimizer_is_bitwise_the_pure_step(optimizer, bad, device_decides, monkeypatch):
    """Every class and its variants, with a schedule, with and without bad steps."""
    if device_decides:
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    law(lambda: make("batchnorm"), optimizer_of(optimizer), poisoned("batchnorm", 6, *bad), clip_grad_norm=1.0)


@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_foreach", "adamw_amsgrad", "counts_in_groups"])
@pytest.mark.parametrize("groups", GROUPS)
def test_groups_are_bitwise_the_pure_step(groups, optimizer):
    """Groups without decay, with a factor, frozen or with schedules of their own."""
    if optimizer == "counts_in_groups" and groups in ("no_decay", "scheduled"):
        pytest.skip("the class has no weight decay")
    law(lambda: make("mlp"), optimizer_of(optimizer, GROUPS[groups]), poisoned("mlp", 6, 2))


def weights_of(batch):
    return {"a": (batch[:, 0] > 0).sum(), "b": len(batch)}


def two_sums(model, batch):
    out = model(batch).square().mean(1)
    return {"a": (out * (batch[:, 0] > 0)).sum(), "b": out.sum()}


def random_loss(model, batch):
    return square_loss(model, batch) * torch.rand(())


@pytest.mark.parametrize(
    "step",
    [
        {"loss_fn": two_sums, "weights": weights_of, "accumulate": 3},
        {"loss_fn": random_loss},
        {"transform_grads": lambda grads: {name: grad * 2 for name, grad in grads.items()}},
        {"transform_grads": lambda grads: {name: grad for name, grad in grads.items() if "bias" in name}},
        {"transform_grads": dict, "clip_grad_norm": 0.1},
        {"split": lambda batch, num: (batch[i::num] for i in range(num)), "accumulate": 2},
    ],
    ids=["weights", "random", "transform", "dropped", "same", "split"],
)
@pytest.mark.parametrize("device_decides", [False, True])
def test_every_kind_of_step_is_bitwise_the_pure_step(step, device_decides, monkeypatch):
    """Denominators of their own, draws in the loss, transformed and dropped gradients, a lazy split."""
    if device_decides:
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    law(lambda: make("dropout"), ADAMW, poisoned("dropout", 6, 3), **step)


@pytest.mark.parametrize("device_decides", [False, True])
def test_parameters_that_sometimes_get_no_gradient(device_decides, monkeypatch):
    """A layer used in some steps only: its state comes late and waits in between."""
    if device_decides:
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)

    def loss_fn(model, batch):
        return square_loss(model, batch) if batch[0, 0] > 0 else model[2](torch.tanh(batch @ torch.ones(6, 8))).mean()

    data = [batch.abs() * sign for batch, sign in zip(poisoned("mlp", 7, 4), [-1, -1, 1, -1, 1, 1, -1], strict=True)]
    for name in ("adamw_fused", "adamw_amsgrad", "momentum", "adagrad", "nadam", "assigns_data"):
        law(lambda: make("mlp"), optimizer_of(name), data, loss_fn)


def test_an_optimizer_that_counts_on_the_host_makes_it_wait_and_this_is_warned_of_once(monkeypatch):
    """The warning names the class and what to do, where the step is called; a fused class does not wait."""
    monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    monkeypatch.setattr("fntrain.steps.decision.can_choose", lambda *trees: False)  # counters are elsewhere
    for options, expected in [({}, [__file__]), ({"fused": True}, [])]:
        model, adam = make("mlp"), ft.optimizer(O.AdamW, lr=0.1, **options)
        step_fn = ft.shell.in_place(ft.supervised_step(model, square_loss, adam))
        state = ft.init_state(model, adam)
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            for batch in batches("mlp", 4):
                state = step_fn(state, batch)
        assert [one.filename for one in warned] == expected
        assert all("because AdamW keeps counters on the host; give it fused=True" in str(one.message) for one in warned)


def test_a_class_that_is_fused_by_its_group_only(monkeypatch):
    """torch gives such a class no `found_inf`: the device chooses between old and new, and the kernel follows."""
    monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    law(lambda: make("mlp"), ft.optimizer(O.AdamW, lr=0.1, groups=[ft.group("*", fused=True)]), poisoned("mlp", 7, 3))


def test_parameters_of_two_dtypes():
    """Float32 and float64 in one model, in one group and in two."""

    def build():
        model = make("mlp")
        model[2].double()
        return model

    def loss_fn(model, batch):
        return model[2](torch.tanh(model[0](batch)).double()).square().mean()

    for groups in (None, [ft.group("2.*", lr_scale=0.5)]):
        law(build, optimizer_of("adamw_fused", groups), batches("mlp", 5), loss_fn, clip_grad_norm=0.1)


# What hooks do between two steps.


def swap_average(state, number):
    """Train on with the averaged weights, the others kept in their place."""
    opt_state = {name: {**entry, "ax": state.params[name]} for name, entry in state.opt_state.items()}
    return state.replace(params={n: state.opt_state[n]["ax"] for n in state.params}, opt_state=opt_state)


def only(field):
    def change(state, number):
        return state.replace(**{field: {n: (t * 0.5).to(t.dtype) for n, t in getattr(state, field).items()}})

    return change


def scale_moments(state, number):
    return state.replace(
        opt_state={n: {k: v * 0.5 if k != "step" else v for k, v in e.items()} for n, e in state.opt_state.items()}
    )


def one_moment(state, number):
    first = next(iter(state.opt_state))
    entry = {**state.opt_state[first], "exp_avg": torch.zeros_like(state.opt_state[first]["exp_avg"])}
    return state.replace(opt_state={**state.opt_state, first: entry})


def swap_two(state, number):
    a, b = state.params["0.bias"], state.params["1.weight"]
    return state.replace(params={**state.params, "0.bias": b, "1.weight": a})


def view_of_own(state, number):
    return state.replace(params={**state.params, "0.bias": state.params["0.weight"][:, 1]})


BETWEEN = {
    "params": only("params"),
    "buffers": only("buffers"),
    "moments": scale_moments,
    "one_param": lambda s, n: s.replace(params={**s.params, "0.bias": torch.full((8,), 0.1)}),
    "one_buffer": lambda s, n: s.replace(buffers={**s.buffers, "1.running_mean": torch.ones(8)}),
    "one_moment": one_moment,
    "no_moments": lambda s, n: s.replace(opt_state={}) if n == 2 else s,
    "fewer_moments": lambda s, n: s.replace(opt_state=dict(list(s.opt_state.items())[:1])) if n == 2 else s,
    "swapped_params": swap_two,
    "swapped_average_and_params": swap_average,
    "view_of_own_memory": view_of_own,
    "one_tensor_for_two": lambda s, n: s.replace(params={**s.params, "1.bias": s.params["1.weight"]}),
    "buffer_of_param": lambda s, n: only("params")(
        s.replace(buffers={**s.buffers, "1.running_mean": s.params["0.bias"]}), n
    ),
    "moment_of_param": lambda s, n: s.replace(
        params={k: v + 1 for k, v in s.params.items()},
        opt_state={k: {**v, "exp_avg": s.params[k]} for k, v in s.opt_state.items()},
    ),
    "same_tensors_in_a_dict": lambda s, n: s.replace(params=dict(s.params), buffers=dict(s.buffers)),
    "snapshot": lambda s, n: ft.snapshot(s),
    "pickled": lambda s, n: pickle.loads(pickle.dumps(s)),
    "extra": lambda s, n: s.replace(extra={"n": n}),
    "kept_in_extra": lambda s, n: s.replace(
        extra={"before": [dict(s.params), s.buffers["1.running_mean"][2:]], "n": n}
    ),
    "kept_by_a_hook": lambda s, n: ft.remember(s, "moments", s.opt_state["0.weight"]) if n == 2 else s,
    "back": lambda s, n: s.replace(position=s.position - 1),
}


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("name", BETWEEN)
def test_what_hooks_do_between_steps_counts(name, device_decides, monkeypatch):
    """A state changed between two steps, as a whole or in part, from memory of its own or the step's, goes in."""
    if device_decides:
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    optimizer = optimizer_of("asgd" if "average" in name else "adamw_fused")
    law(lambda: make("batchnorm"), optimizer, poisoned("batchnorm", 6, 4), between=BETWEEN[name])


@pytest.mark.parametrize("name", ["adamw_fused", "momentum_fused", "nadam", "counts_in_groups"])
def test_a_roll_back_goes_on_from_the_snapshot(name):
    """Going back to an old snapshot, with weights, buffers and optimizer state of then."""
    kept = []

    def between(state, number):
        if number == 1:
            kept.append(ft.snapshot(state))
        return kept.pop(0) if number == 3 else state

    law(lambda: make("batchnorm"), optimizer_of(name), batches("batchnorm", 7), between=between)
    assert not kept


def test_a_roll_back_to_the_start_forgets_the_optimizer():
    """The first state has no optimizer state; after going back to it none is left."""
    firsts = []

    def between(state, number):
        firsts.append(ft.snapshot(state).replace(opt_state={}))
        return firsts[len(firsts) % 2] if number == 3 else state

    law(lambda: make("mlp"), ADAMW, batches("mlp", 6), between=between)


@pytest.mark.parametrize("name", ["mlp", "batchnorm", "channels_last", "lstm", "tied"])
def test_a_checkpoint_resumes_in_place(name, tmp_path):
    """Saved from one step in place and resumed in another, a run has the bits of the pure one."""
    data = batches(name, 6)
    model = make(name)
    pure = ft.supervised_step(model, square_loss, ADAMW)
    expected = ft.init_state(model, ADAMW)
    for half in (data[:3], data[3:]):
        fresh = make(name)
        cheap = ft.shell.in_place(ft.supervised_step(fresh, square_loss, ADAMW))
        state = ft.resume_or(ft.init_state(fresh, ADAMW), tmp_path)
        for batch in half:
            expected, state = pure(expected, batch), cheap(state, batch)
        ft.save(state, tmp_path)
    assert_states_equal(state, expected)


class Buffers(nn.Module):
    """A forward that treats its buffers in one of several ways."""

    def __init__(self, way):
        super().__init__()
        torch.manual_seed(0)
        self.way, self.linear = way, nn.Linear(6, 3)
        base = torch.zeros(12)
        self.register_buffer("cur", base[:6].clone() if way != "views" else base[:6])
        self.register_buffer("prev", base[6:].clone() if way != "views" else base[3:9])
        self.register_buffer("count", torch.zeros(1).expand(3) if way == "expanded" else torch.zeros(3))
        self.register_buffer("scratch", torch.zeros(6), persistent=False)
        self.register_buffer("cache", None, persistent=False)

    def forward(self, x):
        mean = x.detach().mean(0)
        shift = self.prev.clone()
        if self.way == "shifted":
            self.prev = self.cur
            self.cur = mean
        elif self.way == "swapped":
            self.cur.add_(mean)
            self.cur, self.prev = self.prev, self.cur
        elif self.way == "view":
            self.prev = self.cur.flip(0)[:].flip(0)
            self.cur = self.prev[:]
            self.prev.add_(mean)
        elif self.way == "data":
            self.cur.data = self.cur + mean
        elif self.way == "grows":
            self.prev = torch.cat([self.prev, mean[:1]])
            shift = shift[-6:]
        elif self.way in ("expanded", "views"):
            self.count = self.count + 1
            self.cur = self.cur + mean
        elif self.way == "scratch":
            self.scratch += mean
            self.cache = mean
            self.cur.copy_(self.scratch)
        return self.linear(x - shift - self.cur - self.count.sum())


@pytest.mark.parametrize("device_decides", [False, True])
@pytest.mark.parametrize("way", ["shifted", "swapped", "view", "data", "grows", "expanded", "views", "scratch"])
def test_buffers_may_be_written_assigned_or_exchanged(way, device_decides, monkeypatch):
    """What a forward does to its buffers is in the next state, and undone when the step is skipped."""
    if device_decides:
        if way == "grows":
            pytest.skip("a buffer that changes its shape can't be chosen by a device")
        monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
    law(lambda: Buffers(way), ADAMW, poisoned("mlp", 6, 0, 3))


@pytest.mark.parametrize("place", ["a", "b"])
def test_a_shared_buffer_assigned_in_one_place(place):
    """A buffer registered twice and assigned through either place is one buffer still."""

    class Holder(nn.Module):
        def __init__(self, shared):
            super().__init__()
            self.register_buffer("n", shared)

    def build():
        shared, model = torch.zeros(1), make("mlp")
        model.a, model.b = Holder(shared), Holder(shared)
        return model

    def loss_fn(model, batch):
        holder = getattr(model, place)
        holder.n = holder.n + 1
        return model[2](torch.tanh(model[0](batch)) + model.a.n).square().mean()

    final = law(build, SGD, poisoned("mlp", 5, 1), loss_fn)
    assert final.buffers["a.n"] == 4


def test_a_forward_that_assigns_to_a_parameter():
    """`param.data = ...` in the forward is followed, and undone when the step is skipped."""

    def loss_fn(model, batch):
        model[0].weight.data = model[0].weight.data * 0.9
        return square_loss(model, batch)

    for name in ("adamw_fused", "momentum", "assigns_data"):
        law(lambda: make("mlp"), optimizer_of(name), poisoned("mlp", 6, 0, 3), loss_fn)
    model = make("mlp")
    model.register_buffer("late", None)
    cheap, state = start(model, ADAMW, lambda m, b: (setattr(m, "late", torch.ones(1)), loss_fn(m, b))[1])
    before = ft.digest(state)
    with pytest.raises(ValueError, match="buffer 'late' went from None to a tensor"):
        cheap(state, batches("mlp", 1)[0])
    assert ft.digest(state) == before
    assert same(state.params, {name: param.detach() for name, param in model.named_parameters()})


@pytest.mark.parametrize("strided", [lambda: torch.arange(12.0).view(2, 6)[:, ::2], lambda: torch.ones(1).expand(3)])
@pytest.mark.parametrize("optimizer", ["adamw_fused", "adamw_foreach", "momentum_fused"])
def test_parameters_with_gaps_or_expanded(optimizer, strided):
    """Kernels that run over a parameter's memory get memory that is all its own."""

    def build():
        model = make("mlp")
        model.register_parameter("odd", nn.Parameter(strided()))
        return model

    def loss_fn(model, batch):
        return model[2](torch.tanh(model[0](batch))).square().mean() + (model.odd**2).sum()

    law(build, optimizer_of(optimizer), batches("mlp", 5), loss_fn)


def test_a_parameter_that_shares_memory_is_refused():
    """Weights tied through `.data` would be trained apart by a step that keeps a state by name: an error."""
    tied = make("mlp")
    tied.other = nn.Linear(6, 8)
    tied.other.weight.data = tied[0].weight.data
    copy = make("mlp")
    copy.register_buffer("old", copy[0].weight.data[2:4])
    for model, names in ((tied, "'0.weight'.*'other.weight'"), (copy, "parameter '0.weight' and buffer 'old'")):
        with pytest.raises(ValueError, match=f"{names} share memory"):
            ft.supervised_step(model, square_loss, SGD)
    flat = torch.zeros(12)
    parts = make("mlp")
    parts.a, parts.b = nn.Parameter(flat[:6]), nn.Parameter(flat[6:])
    ft.supervised_step(parts, square_loss, SGD)


def test_sparse_buffers_may_be_scratch_only():
    """A persistent one can't be in a state, and the error says so; a non-persistent one is the module's affair."""

    def build(persistent=False):
        model = Buffers("shifted")
        model.register_buffer("adjacency", torch.eye(3).to_sparse(), persistent=persistent)
        return model

    with pytest.raises(TypeError, match="'adjacency' is sparse.*persistent=False"):
        ft.supervised_step(build(True), square_loss, ADAMW)
    law(build, ADAMW, poisoned("mlp", 5, 2))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_parametrizations_and_recomputation_are_bitwise_the_pure_step(precision):
    """Spectral norm writes to buffers, weight norm makes weights anew, checkpointing runs the forward twice."""

    def build():
        torch.manual_seed(0)
        first, last = nn.Linear(6, 8), nn.Linear(8, 3)
        parts = nn.utils.parametrizations.spectral_norm(first), nn.utils.parametrizations.weight_norm(last)
        return nn.Sequential(parts[0], nn.Dropout(0.2), nn.Tanh(), parts[1])

    def loss_fn(model, batch):
        return checkpoint(model, batch, use_reentrant=False).square().mean()

    law(build, ADAMW, poisoned("mlp", 6, 3), loss_fn, precision=precision, accumulate=2, clip_grad_norm=0.2)


# The laws can fail.


@pytest.mark.parametrize(
    ("twin", "between"),
    [
        (broken.MemoryThatKeepsBuffers, None),
        (broken.MemoryThatIgnoresOtherStates, only("buffers")),
        (broken.MemoryThatKeepsGradients, None),
    ],
)
def test_the_law_fails_for_steps_that_forget(twin, between):
    """Buffers not put back, states not copied in and gradients left over are found out."""
    with pytest.raises(AssertionError):
        law(
            lambda: make("batchnorm"),
            SGD,
            poisoned("batchnorm", 5, 1),
            between=between,
            make_in_place=partial(broken.donated, twin),
        )


def test_the_law_fails_for_the_other_kernel(monkeypatch):
    """Adam's kernel in the place of AdamW's is found out."""
    of = FusedAdam.of

    def wrong(*args):
        fused = of(*args)
        for group in fused.groups:
            group.kernel = torch._fused_adam_
        return fused

    monkeypatch.setattr(FusedAdam, "of", wrong)
    with pytest.raises(AssertionError, match="leaves differ"):
        law(lambda: make("mlp"), ft.optimizer(O.AdamW, lr=0.1, weight_decay=0.3, fused=True), batches("mlp", 3))


# Steps that raise.


class BoomError(Exception):
    """What the tests raise."""


class RaisesInStep(O.AdamW):
    """Writes to parameters and then fails, when told to."""

    fails = False

    def step(self, closure=None):
        super().step()
        if RaisesInStep.fails:
            raise BoomError


def raising(where):
    """A model whose batchnorm has run, a step that raises in one place when the batch begins with 99, and its state."""
    model = make("batchnorm")

    def loss_fn(model, batch):
        bad = bool(batch[0, 0] == 99)
        out = model[:2](batch)
        if bad and where == "forward":
            model[1].running_mean = model[1].running_mean + 1
            raise BoomError
        loss = model[2:](out).square().mean()
        if bad and where == "loss":
            raise BoomError
        if bad and where == "backward":
            loss.register_hook(fail)
        return loss

    def fail(*_):
        raise BoomError

    def transform(grads):
        if where == "transform_grads" and model.bad:
            raise BoomError
        return grads

    model.bad = False
    optimizer = ft.optimizer(RaisesInStep, lr=0.1, groups=[ft.group("0.bias", frozen=True)])
    return model, loss_fn, optimizer, {"transform_grads": transform, "on_nonfinite": "raise"}


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("where", ["forward", "loss", "backward", "transform_grads", "nan", "optimizer"])
def test_a_step_that_raises_leaves_the_state_whole_or_consumed(where, first, monkeypatch):
    """Before the optimizer the state keeps its bits and the next step is the pure one's; in it, the state is over."""
    model, loss_fn, optimizer, options = raising(where)
    cheap, state = start(model, optimizer, loss_fn, **options)
    good, *others = batches("batchnorm", 3)
    bad = good.clone()
    bad[0, 0] = float("nan") if where == "nan" else 99
    if not first:
        state = cheap(state, good)
    kept = ft.snapshot(state)
    monkeypatch.setattr(RaisesInStep, "fails", where == "optimizer")
    model.bad = True
    with pytest.raises((BoomError, ft.NonFiniteError)):
        cheap(state, bad)
    model.bad = False
    monkeypatch.setattr(RaisesInStep, "fails", False)
    assert all(param.grad is None and param.requires_grad for param in model.parameters())
    if where == "optimizer":
        with pytest.raises(
            ft.StateConsumedError, match=f"the state of step {state.step} was consumed by step {state.step + 1},"
        ):
            cheap(state, good)
        state = kept
    assert_states_equal(state, kept)
    _, loss_fn, optimizer, options = raising(where)
    pure = ft.supervised_step(make("batchnorm"), loss_fn, optimizer, **options)
    for batch in others:
        state, kept = cheap(state, batch), pure(kept, batch)
        assert_states_equal(state, kept)


def test_the_law_of_raising_fails_for_a_step_that_forgets_buffers():
    """What the forward wrote to buffers before it raised is found in the state of a step that does not undo it."""
    model, loss_fn, optimizer, options = raising("loss")
    twin = broken.donated(broken.MemoryThatKeepsBuffers, ft.supervised_step(model, loss_fn, optimizer, **options))
    state = ft.init_state(model, optimizer)
    before = ft.digest(state)
    with pytest.raises(BoomError):
        twin(state, torch.full((4, 6), 99.0))
    assert ft.digest(state) != before


def test_a_state_with_a_consumed_part_is_refused_before_anything_is_written():
    """A snapshot with optimizer state of a dead state raises, and the live state stays alive."""
    cheap, first = start(make("mlp"))
    batch, *_ = batches("mlp", 1)
    kept = ft.snapshot(first)
    state = cheap(first, batch)
    dead = state.opt_state
    state = cheap(state, batch)
    before = ft.digest(state)
    for bad in (kept.replace(opt_state=dead), kept.replace(params=first.params), state.replace(buffers=first.buffers)):
        with pytest.raises(ft.StateConsumedError):
            cheap(bad, batch)
    assert ft.digest(state) == before
    assert cheap(state, batch).step == 3


def test_a_module_moved_between_steps_follows_the_state():
    """Weights put into other memory from outside: the state given is what counts, also when its step is skipped."""
    model = make("batchnorm")
    cheap, state = start(model)
    good, bad = poisoned("batchnorm", 2, 1)
    kept = ft.snapshot(cheap(state, good))
    for tensor in [*model.parameters(), *model.buffers()]:
        tensor.data = torch.zeros_like(tensor)
    state = cheap(kept, bad)
    assert same(state.params, kept.params) and same(state.buffers, kept.buffers)
    assert same(state.params, {name: param.detach() for name, param in model.named_parameters()})


# The lease.

READS = {
    "getitem": lambda mapping: mapping["0.weight"],
    "get": lambda mapping: mapping.get("0.weight"),
    "in": lambda mapping: "0.weight" in mapping,
    "iter": iter,
    "list": list,
    "len": len,
    "keys": lambda mapping: mapping.keys(),
    "values": lambda mapping: mapping.values(),
    "items": lambda mapping: mapping.items(),
    "dict": dict,
    "unpack": lambda mapping: {**mapping},
    "bool": bool,
    "==": lambda mapping: mapping == {},
}
USES = {
    "==": lambda state: state == ft.TrainState(step=1, position=1, seed=4, params={}),
    "digest": ft.digest,
    "snapshot": ft.snapshot,
    "leaves": lambda state: list(ft.named_leaves(state)),
    "pickle": pickle.dumps,
}


@pytest.fixture(scope="module")
def consumed():
    """A module, a state that is over, and the live one after it."""
    model = make("batchnorm")
    cheap, first = start(model)
    over = cheap(first, batches("batchnorm", 1)[0])
    return model, over, cheap(over, batches("batchnorm", 1)[0]), cheap


@pytest.mark.parametrize("field", ["params", "buffers", "opt_state"])
@pytest.mark.parametrize("read", READS)
def test_no_way_to_read_a_consumed_state(read, field, consumed):
    """Every access to every field names both steps and the way out."""
    message = r"state of step 1 was consumed by step 2, which wrote to its memory; .*ft.snapshot\(state\)"
    with pytest.raises(ft.StateConsumedError, match=message):
        READS[read](getattr(consumed[1], field))


@pytest.mark.parametrize("use", USES)
def test_no_use_for_a_consumed_state(use, consumed, tmp_path):
    """Comparing, hashing, copying, saving, loading or binding one raises; printing does not."""
    model, over, live, _ = consumed
    for call in (
        USES[use],
        lambda s: ft.save(s, tmp_path),
        lambda s: ft.load_into(model, s),
        lambda s: ft.bound(model, s).__enter__(),
    ):
        with pytest.raises(ft.StateConsumedError):
            call(over)
    assert ft.latest(tmp_path) is None
    assert repr(over).count("<consumed by step 2>") == 3
    assert repr(over.params) == "<consumed by step 2>"
    assert "8 tensors" in repr(live) or "6 tensors" in repr(live)
    assert over.metrics["loss"].isfinite() and (over.step, over.position) == (1, 1)


def test_the_lease_law_fails_for_a_step_that_keeps_it():
    """A step that hands out bare tensors leaves old states readable, with other values."""
    model = make("mlp")
    twin = broken.donated(broken.MemoryThatKeepsItsLease, ft.supervised_step(model, square_loss, ADAMW))
    batch, *_ = batches("mlp", 1)
    state = twin(ft.init_state(model, ADAMW), batch)
    before = ft.digest(state)
    twin(state, batch)
    assert ft.digest(state) != before


def test_a_snapshot_survives(consumed):
    """A copy made in time keeps its bits over later steps."""
    model = make("batchnorm")
    cheap, state = start(model)
    batch, *_ = batches("batchnorm", 1)
    copies = []
    for _ in range(3):
        state = cheap(state, batch)
        copies.append((ft.snapshot(state), ft.digest(state)))
    assert [ft.digest(copy) for copy, _ in copies] == [digest for _, digest in copies]


def test_a_skipped_step_consumes_nothing():
    """Both states are alive after it, with the same bits; the next step ends both."""
    cheap, state = start(make("batchnorm"))
    good, bad = poisoned("batchnorm", 2, 1)
    state = cheap(state, good)
    skipped = cheap(state, bad)
    assert same(skipped.params, state.params) and same(skipped.opt_state, state.opt_state)
    cheap(skipped, good)
    for one in (state, skipped):
        with pytest.raises(ft.StateConsumedError):
            one.params["0.weight"]


def test_the_first_state_is_consumed_by_a_step_and_by_load_into():
    """What shares the module's memory is over once that is written to; a state of its own is not."""
    model, batch = make("batchnorm"), batches("batchnorm", 1)[0]
    other = ft.snapshot(ft.init_state(make("batchnorm", seed=1), ADAMW))
    first = ft.init_state(model, ADAMW)
    ft.load_into(model, first)
    assert len(first.params) == 6
    ft.load_into(model, other)
    with pytest.raises(ft.StateConsumedError, match="state of step 0 was consumed by ft.load_into"):
        first.params["0.weight"]
    cheap, first = start(model)
    cheap(first, batch)
    with pytest.raises(ft.StateConsumedError, match="state of step 0 was consumed by step 1"):
        first.buffers["1.running_mean"]
    assert len(other.params) == 6


def test_load_into_of_the_step_s_own_state_does_nothing(consumed):
    """The module holds that state already: no copy, no end of a lease."""
    model, _, live, _ = consumed
    pointers = [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]]
    versions = [param._version for param in model.parameters()]
    before = ft.digest(live)
    ft.load_into(model, live)
    assert ft.digest(live) == before
    assert [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]] == pointers
    assert [param._version for param in model.parameters()] == versions


def test_one_step_at_a_time_runs_in_place():
    """A second one on the module, or on one that shares a parameter, is refused until the first is gone."""
    model, optimizer = make("mlp"), SGD
    others = [model, nn.Sequential(nn.Linear(6, 8), model[2]), nn.Sequential(model[0]), nn.ModuleList([model])]
    cheap, state = start(model, optimizer)
    for other in others:
        with pytest.raises(ValueError, match="another step runs in place on this .*use that one, or `del` it first"):
            ft.shell.in_place(ft.supervised_step(other, square_loss, optimizer))
    ft.shell.in_place(ft.supervised_step(make("mlp"), square_loss, optimizer))
    del cheap
    for other in others:
        ft.shell.in_place(ft.supervised_step(other, square_loss, optimizer))
    assert len(state.params) == 4


def test_a_state_of_a_module_that_shares_a_part_is_not_one_s_own():
    """Two heads on one backbone: the state of the one is copied into the other, and neither is taken for the other."""
    backbone, batch = nn.Linear(6, 6), batches("mlp", 1)[0]
    a, b = (nn.Sequential(backbone, nn.Linear(6, 3)) for _ in range(2))
    first, second = ft.init_state(a, SGD), ft.init_state(b, SGD)
    ft.load_into(b, first)
    assert torch.equal(a[1].weight, b[1].weight)
    assert len(first.params) == 4  # nothing of it was written
    with pytest.raises(ft.StateConsumedError):
        len(second.params)
    second = ft.init_state(b, SGD)
    cheap, wrapped = start(a, SGD)[0], ft.init_state(nn.ModuleList([a]), SGD)
    with pytest.raises(ValueError, match="of another model"):
        cheap(wrapped, batch)
    cheap(first, batch)
    for state in (first, second, wrapped):
        with pytest.raises(ft.StateConsumedError, match="consumed by step 1"):
            len(state.params)


@pytest.mark.parametrize("optimizer", ["adamw_fused", "momentum_fused", "nadam", "sgd"])
def test_another_step_on_the_module_goes_on_without_copying(optimizer):
    """After `del` a new one takes over the module and the state: the same memory, and the pure step's bits."""
    model, twin, chosen = make("batchnorm"), make("batchnorm"), optimizer_of(optimizer)
    pure, expected = ft.supervised_step(twin, square_loss, chosen), ft.init_state(twin, chosen, seed=4)
    cheap, state = start(model, chosen)
    pointers = None
    for number, batch in enumerate(batches("batchnorm", 7)):
        if number in (2, 5):
            del cheap
            cheap = ft.shell.in_place(ft.supervised_step(model, square_loss, chosen))
        state, expected = cheap(state, batch), pure(expected, batch)
        assert_states_equal(state, expected)
        now = [
            leaf.data_ptr()
            for path, leaf in ft.named_leaves(state)
            if isinstance(leaf, torch.Tensor) and "step" not in path
        ]
        assert pointers is None or now == pointers
        pointers = now


def test_its_own_states_are_never_copied():
    """Every leaf keeps its address, from the second step on the optimizer's too."""
    model = make("batchnorm")
    addresses = [tensor.data_ptr() for tensor in [*model.parameters(), *model.buffers()]]
    cheap, state = start(model)
    seen = set()
    for batch in poisoned("batchnorm", 6, 2):
        state = cheap(state, batch)
        seen.add(tuple(leaf.data_ptr() for _, leaf in ft.named_leaves(state) if isinstance(leaf, torch.Tensor)))
    assert len(seen) == 1
    assert [tensor.data_ptr() for tensor in [*state.params.values(), *state.buffers.values()]] == addresses


def test_a_function_is_refused():
    """A step written by hand is not made in place; the message says what to do."""

    def my_step(state, batch):
        return state.advance()

    with pytest.raises(TypeError, match="got my_step, expected what ft.supervised_step returned; give a step written"):
        ft.shell.in_place(my_step)
    cheap, _ = start(make("mlp"))
    with pytest.raises(TypeError, match="runs in place already"):
        ft.shell.in_place(cheap)
    assert repr(cheap).startswith("in_place(SupervisedStep(") and cheap.ranks is ALONE


# The fold around it.


def job(make_step, directory, *, steps=7):
    """A run with evaluation, checkpoints and metrics in a file; its last state and the lines written."""
    model = make("batchnorm")
    test = ft.evaluation(model, lambda m, b: {"mse": m(b).square().mean()}, torch.ones(5, 6))
    hooks = [
        ft.stateful(
            "last_loss", lambda state: 0.0, after_step=lambda s: ft.remember(s, "last_loss", float(s.metrics["loss"]))
        ),
        ft.hooks.evaluate(test, every=2),
        ft.hooks.write_metrics(ft.writers.jsonl(directory / "metrics.jsonl"), every=1, window=1),
        ft.hooks.checkpoint(directory, every=3),
    ]
    final = ft.fit(
        make_step(ft.supervised_step(model, square_loss, ADAMW, accumulate=2, clip_grad_norm=0.3)),
        hooks,
        state=ft.resume_or(ft.init_state(model, ADAMW), directory),
        data=ft.data.stream(torch.cat(batches("batchnorm", 3)), 8, seed=0),
        max_steps=steps,
    )
    lines = [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("time", None)
    return final, lines


def test_fit_in_place_is_fit(tmp_path):
    """The same last state, evaluation, metrics and checkpoints, also when stopped and resumed in place."""
    expected, lines = job(lambda step_fn: step_fn, tmp_path / "pure")
    whole, got = job(ft.shell.in_place, tmp_path / "whole")
    assert_states_equal(whole, expected)
    assert got == lines and any("mse" in str(line) for line in lines)
    job(ft.shell.in_place, tmp_path / "parts", steps=4)
    parts, got = job(ft.shell.in_place, tmp_path / "parts")
    assert_states_equal(parts, expected)
    assert [line for line in got if line["step"] > 4] == [line for line in lines if line["step"] > 4]
    for name in ("step_00000003", "step_00000007"):
        assert_states_equal(ft.load(tmp_path / "whole" / name), ft.load(tmp_path / "pure" / name))


@pytest.mark.parametrize("name", ["dropout", "batchnorm"])
def test_a_run_in_place_resumes_at_any_step(name):
    """Saved at any step and resumed in a fresh job, a run in place ends with the bits of one never stopped."""

    def build():
        model = make(name)
        step_fn = ft.shell.in_place(ft.supervised_step(model, square_loss, ADAMW, precision="bf16"))
        data = ft.data.stream(torch.cat(batches(name, 3)), 4, seed=3)
        return {"step_fn": step_fn, "state": ft.init_state(model, ADAMW, seed=3), "data": data}

    assert_resume_exact(build, num_steps=4)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_what_a_state_keeps_of_the_first_weights_stays(precision):
    """Memory that begins as the first weights, of a hook or the user's own, is copied before they are written to."""

    def average(state):
        old = state.hooks["ema"]
        return ft.remember(state, "ema", {name: 0.9 * old[name] + 0.1 * param for name, param in state.params.items()})

    finals = []
    for form in (lambda step_fn: step_fn, ft.shell.in_place):
        model = make("mlp")
        step_fn = form(ft.supervised_step(model, square_loss, SGD, precision=precision))
        state = ft.init_state(model, SGD, extra={"first": dict(ft.init_state(model, SGD).params)})
        hooks = [ft.stateful("ema", lambda state: dict(state.params), after_step=average)]
        finals.append(ft.fit(step_fn, hooks, state=state, data=batches("mlp", 4), max_steps=4))
    assert_states_equal(*finals)
    assert not finals[0].extra["first"]["0.weight"].equal(finals[0].params["0.weight"])


def test_a_hook_that_keeps_an_old_state_is_named():
    """Reading the state of the step before raises, with a note that names the hook and the step."""
    kept = []

    def compare(state):
        kept.append(state)
        if len(kept) > 1:
            kept[-2].params["0.weight"]

    cheap, state = start(make("mlp"))
    with pytest.raises(ft.StateConsumedError) as caught:
        ft.fit(cheap, [ft.hook(after_step=compare, name="compare")], state=state, data=batches("mlp", 3), max_steps=3)
    assert any("of hook 'compare', at step 2" in note for note in caught.value.__notes__)


def test_a_run_that_dies_in_the_optimizer_saves_nothing(monkeypatch, tmp_path):
    """The checkpoint of the last whole state stays the newest; the first error is the one raised."""
    model, loss_fn, optimizer, options = raising("optimizer")
    cheap, state = start(model, optimizer, loss_fn, **options)

    def fail_late(state):
        monkeypatch.setattr(RaisesInStep, "fails", state.step == 2)

    hooks = [ft.hook(before_step=fail_late), ft.hooks.checkpoint(tmp_path, every=1)]
    with pytest.raises(BoomError):
        ft.fit(cheap, hooks, state=state, data=batches("batchnorm", 4), max_steps=4)
    assert ft.latest(tmp_path).name == "step_00000002"


# Kernels.


def step_calls(monkeypatch, cls):
    """Count calls of a class's step from here on."""
    calls, step = [], cls.step

    def counted(self, closure=None):
        calls.append(None)
        return step(self, closure)

    counted.hooked = False
    monkeypatch.setattr(cls, "step", counted)
    return calls


@pytest.mark.parametrize(
    ("name", "groups", "calls"),
    [
        ("adamw_fused", None, 1),
        ("adamw_amsgrad", None, 1),
        ("adamw_maximize", GROUPS["no_decay"], 1),
        ("adamw_schedules", GROUPS["lr_scale"], 1),
        ("adam_fused", GROUPS["frozen"], 1),
        ("adam_decoupled", None, 1),
        ("adamw_foreach", None, 5),
        ("adamw_tensor_lr", None, 5),
    ],
)
def test_the_kernel_is_called_without_the_class_where_it_can_be(name, groups, calls, monkeypatch):
    """Plain fused Adam and AdamW run their class's step once, to make the state; others at every step."""
    optimizer = optimizer_of(name, groups)
    counted = step_calls(monkeypatch, optimizer.cls)
    cheap, state = start(make("mlp"), optimizer)
    for batch in batches("mlp", 5):
        state = cheap(state, batch)
    assert len(counted) == calls
    assert isinstance(cheap.memory.fused, FusedAdam) == (calls == 1)


def test_hooks_on_all_optimizers_see_every_step():
    """While somebody watches all optimizers, the class's own step is called; the bits are the same."""
    seen = []
    cheap, state = start(make("mlp"))
    pure, expected = ft.supervised_step(make("mlp"), square_loss, ADAMW), ft.init_state(make("mlp"), ADAMW, seed=4)
    for number, batch in enumerate(batches("mlp", 6)):
        handle = register_optimizer_step_post_hook(lambda *_: seen.append(None)) if number in (2, 3) else None
        state = cheap(state, batch)
        if handle is not None:
            handle.remove()
        expected = pure(expected, batch)
        assert_states_equal(state, expected)
    assert len(seen) == 2


# Memory.


class Storages(TorchDispatchMode):
    """The largest number of bytes of tensors alive at once among those made while it is on."""

    def __init__(self, model):
        super().__init__()
        self.live, self.peak = {}, 0
        self.there = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for tensor in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(tensor, torch.Tensor):
                storage = tensor.untyped_storage()
                reference = torch.multiprocessing.reductions.StorageWeakRef(storage)
                if storage._cdata not in self.there:
                    self.live.setdefault(storage._cdata, (reference, storage.nbytes()))
        self.live = {key: entry for key, entry in self.live.items() if not entry[0].expired()}
        self.peak = max(self.peak, sum(size for _, size in self.live.values()))
        return out


def wide():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 300), nn.BatchNorm1d(300), nn.Tanh(), nn.Linear(300, 100), nn.Linear(100, 3))


@pytest.mark.parametrize("clip", [None, 0.1])
def test_peak_memory_is_the_raw_loop_s_and_one_copy_of_the_buffers(clip):
    """In place holds no second copy of parameters, gradients or optimizer state at any moment."""
    data = batches("mlp", 4, size=16)
    model, twin = wide(), wide()
    by_hand = O.AdamW(twin.parameters(), lr=0.1, fused=True)
    cheap, state = start(model, ft.optimizer(O.AdamW, lr=0.1, fused=True), clip_grad_norm=clip)
    with Storages(model) as ours:
        for batch in data:
            state = cheap(state, batch)
    with Storages(twin) as theirs:
        raw_loop(twin, square_loss, by_hand, data, clip=clip)
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert theirs.peak > 2.9 * sum(param.numel() * 4 for param in model.parameters()) > 300_000
    assert ours.peak <= theirs.peak + buffers + 1000  # scalars


def test_the_memory_law_fails_for_the_pure_step():
    """The count notices a second copy of parameters and optimizer state."""
    data, (model, twin) = batches("mlp", 4, size=16), (wide(), wide())
    optimizer = ft.optimizer(O.AdamW, lr=0.1, fused=True)
    pure, state = ft.supervised_step(twin, square_loss, optimizer), ft.init_state(twin, optimizer)
    cheap, own = start(model, optimizer)
    peaks = []
    for step_fn, now, step_model in ((cheap, own, model), (pure, state, twin)):
        with Storages(step_model) as storages:
            for batch in data:
                now = step_fn(now, batch)
        peaks.append(storages.peak)
    assert peaks[1] > 1.5 * peaks[0]


def test_nothing_is_left_behind():
    """No garbage cycles, no growth from step to step, and the model goes with its last name."""
    data = batches("batchnorm", 3)
    cheap, state = start(make("batchnorm"), clip_grad_norm=1.0)
    for batch in data:
        state = cheap(state, batch)
    gc.collect()
    gc.disable()
    try:
        counts = []
        for _ in range(5):
            for batch in data:
                state = cheap(state, batch)
            counts.append(sum(type(one) is torch.Tensor for one in gc.get_objects()))
        assert len(set(counts[1:])) == 1
        assert gc.collect() == 0
        model = weakref.ref(cheap.step.model)
        del cheap, state
        assert model() is None
    finally:
        gc.enable()


def test_micro_batches_are_taken_one_ahead_and_let_go():
    """A split that makes micro-batches as they are asked for is asked for one in advance, and none is kept."""
    alive, most, order = weakref.WeakSet(), [], []

    class Part:
        def __init__(self, x):
            self.x = x
            alive.add(self)
            most.append(len(alive))

        def __len__(self):
            return len(self.x)

    def split(batch, num):
        for i in range(num):
            order.append(f"take {i}")
            yield Part(batch[i::num])

    def loss_fn(model, part):
        order.append("forward")
        return ft.weighted(model(part.x).square().mean(1).sum(), len(part))

    cheap, state = start(make("mlp"), SGD, loss_fn, accumulate=4, split=split)
    cheap(state, batches("mlp", 1)[0])
    assert order == ["take 0", "take 1", "forward", "take 2", "forward", "take 3", "forward", "forward"]
    assert max(most) <= 3 and not alive


def debugged(hold):
    """Five steps in place with debug=True; `hold` sees every state."""
    model = make("batchnorm")
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.01, fused=True)
    step_fn = ft.shell.in_place(ft.supervised_step(model, square_loss, optimizer), debug=True)
    state = ft.init_state(model, optimizer)
    held = []
    for batch in batches("batchnorm", 5):
        held.append(hold(state))
        state = step_fn(state, batch)
    return ft.snapshot(state)


@pytest.mark.parametrize(
    ("hold", "path"),
    [
        (lambda state: next(iter(state.params.values())), "params"),
        (lambda state: dict(state.buffers), "buffers"),
        (lambda state: next(iter(state.params.values()))[:1].view(-1), "params"),
        (lambda state: [dict(entry) for entry in state.opt_state.values()], "opt_state"),
    ],
)
def test_debug_names_what_is_still_held(hold, path):
    """Bare tensors, dicts and views of the old state are found by their memory, whoever holds them."""
    with pytest.raises(ft.StateConsumedError, match=rf"somebody holds {path}\..* of the state of step [01]"):
        debugged(hold)


def test_debug_lets_states_and_snapshots_pass_and_changes_nothing():
    """States, snapshots and clones may be kept; the bits are those without debug."""
    expected = debugged(lambda state: None)
    kept = debugged(lambda state: (state, ft.snapshot(state), [value.clone() for value in state.params.values()]))
    assert kept == expected
    model = make("batchnorm")
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.01, fused=True)
    pure, state = ft.supervised_step(model, square_loss, optimizer), ft.init_state(model, optimizer)
    for batch in batches("batchnorm", 5):
        state = pure(state, batch)
    assert state == expected


def test_a_resumed_state_is_the_memory_of_the_run(tmp_path):
    """What was read from a checkpoint is what training writes to: no second copy, whoever holds the resumed state."""
    model = make("mlp")
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.01, fused=True)
    step_fn = ft.supervised_step(model, square_loss, optimizer)
    ft.save(step_fn(ft.init_state(model, optimizer), batches("mlp", 1)[0]), tmp_path)

    def places(state):
        tensors = ft.core.tree.tensors({"params": state.params, "buffers": state.buffers, "opt_state": state.opt_state})
        return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.dim()}

    resumed = ft.resume_or(ft.init_state(model, optimizer), tmp_path)
    read = places(resumed)
    assert read >= {param.untyped_storage().data_ptr() for param in model.parameters()}
    seen = []
    look = ft.hook(after_step=lambda state: seen.append(places(state)))
    ft.fit(ft.shell.in_place(step_fn), look, state=resumed, data=iter(batches("mlp", 3)), max_steps=4)
    assert seen == [read] * 3
    with pytest.raises(ft.StateConsumedError, match="step 2"):
        dict(resumed.params)


@pytest.mark.parametrize("like", [lambda state: state, ft.snapshot], ids=["the module's", "a copy"])
def test_a_resumed_state_does_not_stay_in_memory(tmp_path, like):
    """What was read from a checkpoint is trained in, or copied in and gone after the first step: no second copy."""
    model = make("mlp")
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.01, fused=True)
    step_fn = ft.supervised_step(model, square_loss, optimizer)
    ft.save(step_fn(ft.init_state(model, optimizer), batches("mlp", 1)[0]), tmp_path)
    read = []

    def resumed():
        state = ft.resume_or(like(ft.init_state(model, optimizer)), tmp_path)
        read.extend(weakref.ref(leaf) for _, leaf in ft.named_leaves(state) if isinstance(leaf, torch.Tensor))
        return state

    alive = []

    def count_others(state):
        own = {leaf.data_ptr() for _, leaf in ft.named_leaves(state) if isinstance(leaf, torch.Tensor)}
        alive.append(sum(ref() is not None and ref().data_ptr() not in own for ref in read))

    look = ft.hook(after_step=count_others)
    in_place = ft.shell.in_place(step_fn)
    ft.fit(in_place, look, state=resumed(), data=iter(batches("mlp", 3)), max_steps=4)
    assert len(read) > 4
    assert alive == [0, 0, 0]


@pytest.mark.filterwarnings("ignore")  # torch.compile warns about itself
def test_compile_runs_model_and_loss_through_torch_compile(monkeypatch):
    """`compile=True` hands the loss to torch.compile; reports inside still arrive, the bits stay with its eager backend."""
    compiled = []

    def by_dynamo(fn):
        compiled.append(fn)
        return real(fn, backend="eager")

    real = torch.compile
    monkeypatch.setattr(torch, "compile", by_dynamo)

    def loss_fn(model, batch):
        loss = square_loss(model, batch)
        ft.put_scalar("twice", loss * 2)
        return loss

    ends = []
    for compile_ in (False, True):
        model = make("batchnorm")
        optimizer = ft.optimizer(torch.optim.AdamW, lr=0.01, fused=True)
        step_fn = ft.shell.in_place(ft.supervised_step(model, loss_fn, optimizer), compile=compile_)
        state = ft.init_state(model, optimizer)
        for batch in batches("batchnorm", 3):
            state = step_fn(state, batch)
        assert state.metrics["twice"] == 2 * state.metrics["loss"]
        ends.append(ft.snapshot(state))
    assert ends[0] == ends[1]
    assert compiled == [loss_fn]


def test_a_line_run_again_finds_the_same_step():
    """In a notebook a traceback keeps the first one alive: the same step in place is the same object."""
    model = make("mlp")
    step_fn = ft.supervised_step(model, square_loss, ft.optimizer(torch.optim.SGD, lr=0.1))
    first = ft.shell.in_place(step_fn)
    assert ft.shell.in_place(step_fn) is first
    with pytest.raises(TypeError, match="runs in place already"):
        ft.shell.in_place(first)
    with pytest.raises(TypeError, match="pickle the pure step"):
        pickle.dumps(first)


def test_a_copy_of_a_state_is_on_the_same_lease():
    """copy.copy does not turn a lease into bare tensors."""
    model = make("mlp")
    sgd = ft.optimizer(torch.optim.SGD, lr=0.1)
    state = ft.init_state(model, sgd)
    copied = copy.copy(state)
    ft.shell.in_place(ft.supervised_step(model, square_loss, sgd))(state, batches("mlp", 1)[0])
    with pytest.raises(ft.StateConsumedError):
        len(copied.params)


@pytest.mark.parametrize("wrap", [lambda step_fn: step_fn, ft.shell.in_place])
def test_a_layer_put_in_later_is_noticed(wrap):
    """It would never be trained: within 100 steps the step says so."""
    model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 1))
    sgd = ft.optimizer(torch.optim.SGD, lr=0.01)
    step_fn = wrap(ft.supervised_step(model, lambda m, b: m(b).square().mean(), sgd))
    state = step_fn(ft.init_state(model, sgd), torch.ones(2, 4))
    model[1] = torch.nn.Linear(4, 1)

    def go_on(state):
        for _ in range(100):
            state = step_fn(state, torch.ones(2, 4))

    with pytest.raises(ValueError, match="has other parameters than when the step was made"):
        go_on(state)


# A model that is moved.


def channels_last(model):
    model.to(memory_format=torch.channels_last)


def other_memory(model):
    """What `.to(device)` and `.half().float()` do: every parameter and buffer lies elsewhere."""
    for tensor in (*model.parameters(), *model.buffers()):
        tensor.data = tensor.data.clone()


def one_parameter(model):
    param = next(model.parameters())
    param.data = param.data.clone()


def moved_job(move, when, directory, donate):
    """Train to step 3 and save, then resume with a new model that is moved at some time, and go on to step 6."""
    model, data = make("channels_last"), batches("channels_last", 6)
    step_fn = donate(ft.supervised_step(model, square_loss, ADAMW))
    state = ft.fit(step_fn, state=ft.init_state(model, ADAMW), data=iter(data[:3]), max_steps=3)
    ft.save(state, directory)
    del model, step_fn, state
    torch.manual_seed(9)
    model = nn.Sequential(*make("channels_last"))
    for param in model.parameters():
        nn.init.constant_(param, 0.5)  # first weights that differ from those saved
    step_fn = ft.supervised_step(model, square_loss, ADAMW)
    state = ft.init_state(model, ADAMW)
    if when == "before the step is made":
        move(model)
    step_fn = donate(step_fn)
    if when == "before it is resumed":
        move(model)
    state = ft.resume_or(state, directory)
    if when == "before its first step":
        move(model)
    states = []
    for batch in data[3:]:
        state = step_fn(state, batch)
        states.append(ft.digest(state))
        if when == "between steps" and len(states) == 1:
            move(model)
    return states


WHEN = ["never", "before the step is made", "before it is resumed", "before its first step", "between steps"]


@pytest.mark.parametrize("when", WHEN)
@pytest.mark.parametrize("move", [channels_last, other_memory, one_parameter])
def test_a_resumed_run_goes_on_whenever_its_model_is_moved(tmp_path, move, when):
    """A state on lease may lie where the module no longer is: the step goes by addresses, not by the lease."""
    expected = moved_job(move, "never", tmp_path / "a", lambda step_fn: step_fn)
    assert moved_job(move, when, tmp_path / "b", ft.shell.in_place) == expected


def test_the_law_of_moved_models_fails_for_a_step_that_trusts_leases(tmp_path):
    """It trains the first weights, with the resumed step and optimizer state, without a word."""
    twin = partial(broken.donated, broken.MemoryThatTrustsLeases)
    when = "before the step is made"
    expected = moved_job(other_memory, "never", tmp_path / "a", ft.shell.in_place)
    assert moved_job(other_memory, when, tmp_path / "b", twin) != expected


def test_writing_to_a_moved_module_changes_no_state():
    """The state rules: values that somebody put into the module in the place of its own are written over."""
    cheap, state = start(make("mlp"))
    twin, expected = start(make("mlp"))
    first, second = batches("mlp", 2)
    state, expected = cheap(state, first), twin(expected, first)
    for param in cheap.step.model.parameters():
        param.data = torch.zeros_like(param)
    assert_states_equal(cheap(state, second), twin(expected, second))


FORMS = {
    "in_place": ft.shell.in_place,
    "in_place(compile=True)": partial(ft.shell.in_place, compile=True),
    "in_place(debug=True)": partial(ft.shell.in_place, debug=True),
    "compile_step": ft.shell.compile_step,
}


@pytest.mark.filterwarnings("ignore")  # what torch.compile imports warns of itself
@pytest.mark.parametrize("form", FORMS)
def test_the_same_call_gives_the_same_step(form):
    """A line run again in a notebook gives the step that runs on the model already; another form is refused."""
    step_fn = ft.supervised_step(make("mlp"), square_loss, ADAMW)
    first = FORMS[form](step_fn)
    assert FORMS[form](step_fn) is first
    for name, other in FORMS.items():
        if name != form:
            with pytest.raises(ValueError, match="another step runs in place"):
                other(step_fn)
