"""The pure update against the class itself, over every optimizer of torch that steps without a closure."""

import copy
import inspect

import broken
import pytest
import torch
from cases import same

import fntrain as ft

PARAMS = {"w": (4, 3), "b": (3,), "g": (5, 2)}
SHAPES = {**PARAMS, "c": (3,)}
CLASSES = {
    name: cls
    for name, cls in vars(torch.optim).items()
    if isinstance(cls, type)
    and issubclass(cls, torch.optim.Optimizer)
    and cls not in (torch.optim.Optimizer, torch.optim.LBFGS, torch.optim.SparseAdam)
}
FUSED = {"Adam", "AdamW", "SGD", "Adagrad"}
ONLY_MATRICES = {"Muon"}
EXTRA = {
    "SGD": [{}, {"momentum": 0.9, "dampening": 0.3}],
    "RMSprop": [{"momentum": 0.9, "centered": True}],
    "Adam": [{"amsgrad": True}],
    "AdamW": [{"amsgrad": True}],
}


def options(name):
    """Every way to run a class: its variants, and single, foreach or fused arithmetic."""
    accepted = inspect.signature(CLASSES[name]).parameters
    modes = [{}]
    if "foreach" in accepted:
        modes += [{"foreach": False}, {"foreach": True}]
    if name in FUSED:
        modes.append({"fused": True})
    return [{**variant, **mode} for variant in [{}, *EXTRA.get(name, [])] for mode in modes]


CASES = [(name, kwargs) for name in CLASSES for kwargs in options(name)]


def tensors(seed, names):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(SHAPES[name], generator=generator) for name in names}


def names_for(name):
    return ["w", "g"] if name in ONLY_MATRICES else list(PARAMS)


def by_class(cls, params, steps, make_groups, lr_at=None):
    leaves = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
    instance = make_groups(cls, leaves)
    for step in range(steps):
        for name, grad in tensors(100 + step, params).items():
            leaves[name].grad = grad.clone()
        if lr_at is not None:
            for group in instance.param_groups:
                group["lr"] = lr_at(step)
        instance.step()
    state = {name: dict(instance.state[leaf]) for name, leaf in leaves.items() if instance.state.get(leaf)}
    return {name: leaf.detach() for name, leaf in leaves.items()}, state


def by_update(optimizer, params, steps, update=None):
    opt_state = optimizer.init(params)
    for step in range(steps):
        call = update or (lambda o, p, g, s, n: o.update(p, g, s, step=n))
        params, opt_state = call(optimizer, params, tensors(100 + step, params), opt_state, step)
    return params, opt_state


@pytest.mark.parametrize(("name", "kwargs"), CASES, ids=lambda value: str(value))
def test_update_is_bitwise_the_class(name, kwargs):
    """Four updates with a schedule give the bits of the class, parameters and optimizer state."""
    schedule = ft.schedules.linear(0.1, 0.01, total_steps=4)
    params = tensors(0, names_for(name))
    ours = by_update(ft.optimizer(CLASSES[name], lr=schedule, **kwargs), params, 4)
    theirs = by_class(CLASSES[name], params, 4, lambda c, p: c(list(p.values()), lr=0.1, **kwargs), schedule)
    assert same(ours[0], theirs[0])
    assert same(ours[1], theirs[1])


@pytest.mark.parametrize("name", CLASSES)
def test_groups_are_bitwise_the_class_with_groups(name):
    """A group of its own learning rate factor and options gives what torch's parameter groups give."""
    params = tensors(0, names_for(name))
    has_decay = "weight_decay" in inspect.signature(CLASSES[name]).parameters
    extra = {"weight_decay": 0.2} if has_decay else {}
    optimizer = ft.optimizer(CLASSES[name], lr=0.1, groups=[ft.group("g", lr_scale=0.5, **extra)])

    def make(cls, leaves):
        rest = [leaf for key, leaf in leaves.items() if key != "g"]
        return cls([{"params": rest}, {"params": [leaves["g"]], "lr": 0.05, **extra}], lr=0.1)

    ours, theirs = by_update(optimizer, params, 3), by_class(CLASSES[name], params, 3, make)
    assert same(ours[0], theirs[0])
    assert same(ours[1], theirs[1])


@pytest.mark.parametrize("name", CLASSES)
def test_a_tensor_learning_rate_is_passed_on(name):
    """A 0-d tensor as learning rate gives the bits of the class with the same tensor."""
    params = tensors(0, names_for(name))
    lr = torch.tensor(0.1)
    ours = by_update(ft.optimizer(CLASSES[name], lr=lr), params, 3)
    theirs = by_class(CLASSES[name], params, 3, lambda c, p: c(list(p.values()), lr=lr.clone()))
    assert same(ours[0], theirs[0])


@pytest.mark.parametrize("name", CLASSES)
def test_update_leaves_its_arguments_as_they_were(name):
    """Parameters, gradients and optimizer state given to update keep their bits."""
    optimizer = ft.optimizer(CLASSES[name], lr=0.1)
    params = tensors(0, names_for(name))
    params, opt_state = optimizer.update(params, tensors(1, params), optimizer.init(params), step=0)
    grads = tensors(2, params)
    before = ft.core.tree.fingerprint([params, grads, opt_state])
    optimizer.update(params, grads, opt_state, step=1)
    assert ft.core.tree.fingerprint([params, grads, opt_state]) == before


def test_the_law_fails_for_state_kept_by_position():
    """The comparison with the class notices optimizer state given to the wrong parameter."""
    params = {"b": torch.ones(3), "c": torch.zeros(3)}
    optimizer = ft.optimizer(torch.optim.Adam, lr=0.1)
    right = by_update(optimizer, params, 3)
    wrong = by_update(optimizer, params, 3, broken.update_by_position)
    assert not same(right[0], wrong[0])


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", sorted(FUSED))
def test_gradients_of_any_layout_update_right(name, fused):
    """Shared storage, stride 0 and foreign strides, as torch.autograd.grad returns them, change nothing."""
    shared = torch.randn(12)
    params = {
        "a": torch.ones(12),
        "b": torch.zeros(12),
        "c": torch.ones(5, 3),
        "d": torch.ones(96, 1).t().contiguous().t(),
    }
    odd = {"a": shared, "b": shared, "c": torch.ones(()).expand(5, 3), "d": torch.arange(96.0)[None].t()}
    plain = {name: grad.contiguous().clone() for name, grad in odd.items()}
    optimizer = ft.optimizer(CLASSES[name], lr=0.1, fused=fused)
    ours, _ = optimizer.update(params, odd, optimizer.init(params), step=0)
    assert same(ours, optimizer.update(params, plain, optimizer.init(params), step=0)[0])
    assert ft.core.tree.bitwise_equal(odd["a"], plain["a"])


def test_groups_merge_and_later_ones_win():
    """All matching groups apply, options of the later override, learning rate factors multiply."""
    groups = [
        ft.group("body.*", lr_scale=0.1),
        ft.group("*.bias", weight_decay=0.0),
        ft.group("body.0.*", lr_scale=0.5),
    ]
    optimizer = ft.optimizer(torch.optim.AdamW, lr=1.0, groups=groups, weight_decay=0.3)
    bound = optimizer.bind({"body.0.bias": torch.ones(2), "body.0.weight": torch.ones(2), "head.bias": torch.ones(2)})
    rates = {
        names: (now["lr"], group["weight_decay"])
        for names, now, group in zip(
            bound.names, bound.schedules.at(0).groups, bound.template.param_groups, strict=True
        )
    }
    assert rates == {("body.0.bias",): (0.05, 0.0), ("body.0.weight",): (0.05, 0.3), ("head.bias",): (1.0, 0.0)}


def test_frozen_parameters_keep_their_bits_and_get_no_state():
    """A frozen group is not updated, not decayed, and has no optimizer state."""
    optimizer = ft.optimizer(torch.optim.AdamW, lr=0.1, groups=[ft.group("w", frozen=True)], weight_decay=0.5)
    params = tensors(0, ["w", "b"])
    new, opt_state = optimizer.update(params, tensors(1, params), optimizer.init(params), step=0)
    assert ft.core.tree.bitwise_equal(new["w"], params["w"])
    assert list(opt_state) == ["b"]


def test_a_missing_gradient_is_not_updated():
    """A name left out of the gradients keeps its value and gets no state."""
    optimizer = ft.optimizer(torch.optim.Adam, lr=0.1)
    params = tensors(0, ["w", "b"])
    new, opt_state = optimizer.update(params, {"b": torch.ones(3)}, {}, step=0)
    assert ft.core.tree.bitwise_equal(new["w"], params["w"])
    assert list(opt_state) == ["b"]


class CountsInGroup(torch.optim.Optimizer):
    """A third party's optimizer whose memory is in its groups, as schedule-free ones have it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": 0})

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"] += 1
            for param in group["params"]:
                param.data.sub_(param.grad, alpha=group["lr"] * group["k"])


class CountsOnItself(torch.optim.Optimizer):
    """One that keeps training state in an attribute, where nothing finds it."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.calls = 0

    def step(self, closure=None):
        self.calls += 1


def test_memory_in_groups_is_kept_by_name():
    """What an optimizer changes in its groups is part of the optimizer state, stored with a parameter's name."""
    optimizer = ft.optimizer(CountsInGroup, lr=0.1)
    params, opt_state = {"w": torch.zeros(1)}, {}
    for step in range(3):
        params, opt_state = optimizer.update(params, {"w": torch.ones(1)}, opt_state, step=step)
    assert opt_state == {"w": {"group.k": 3}}
    assert params["w"].item() == pytest.approx(-0.6)


def test_a_schedule_may_be_any_option():
    """Momentum, say, may follow the step too."""
    optimizer = ft.optimizer(
        torch.optim.SGD, lr=1.0, momentum=ft.schedules.join((1, ft.schedules.constant(0.5)), ft.schedules.constant(0.0))
    )
    params, opt_state = {"w": torch.zeros(1)}, {}
    for step in range(2):
        params, opt_state = optimizer.update(params, {"w": torch.ones(1)}, opt_state, step=step)
    assert params["w"].item() == -2.0


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: ft.optimizer(torch.optim.LBFGS, lr=0.1), TypeError, "closure"),
        (lambda: ft.optimizer(torch.optim.SparseAdam, lr=0.1), TypeError, "sparse"),
        (lambda: ft.optimizer(torch.nn.Linear, lr=0.1), TypeError, "expected a class derived from torch.optim.Optimizer"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=0.1, groups=[{"params": []}]), TypeError, r"groups\[0\]: got dict"),
        (lambda: ft.group(3), TypeError, "select: got int"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=-1.0).init({"w": torch.ones(1)}), ValueError, "learning rate"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=0.1, groups=[ft.group("x*")]).init({"w": torch.ones(1)}), ValueError, r"groups\[0\]: 'x\*' selects no parameter; the model has w"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=0.1, groups=[ft.group("*", frozen=True)]).init({"w": torch.ones(1)}), ValueError, "every parameter is frozen"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=0.1).update({"w": torch.ones(1)}, {"v": torch.ones(1)}, {}, step=0), ValueError, r"grads: got \['v'\]"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=0.1).update({"w": torch.ones(1)}, {"w": torch.ones(2)}, {}, step=0), ValueError, r"grads\['w'\]: got shape \(2,\)"),
        (lambda: ft.optimizer(CountsOnItself, lr=0.1).update({"w": torch.ones(1)}, {"w": torch.ones(1)}, {}, step=0), TypeError, "attribute 'calls'"),
        (lambda: ft.optimizer(torch.optim.SGD, lr=0.1).update({"w": torch.ones(2, 2)}, {"w": torch.eye(2).to_sparse()}, {}, step=0), TypeError, "sparse gradient"),
    ],
)  # fmt: skip
def test_misuse_names_what_was_wrong(make, error, message):
    """Every wrong argument is an error that says which, what was given and what to do."""
    with pytest.raises(error, match=message):
        make()


class RemembersInPlace(torch.optim.Optimizer):
    """One that creates per-parameter state where it is empty, and writes in place to a tensor of its group."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr, "k": torch.zeros(())})

    def step(self, closure=None):
        for group in self.param_groups:
            group["k"].add_(1)
            for param in group["params"]:
                if param.grad is not None:
                    if len(self.state[param]) == 0:
                        self.state[param]["m"] = torch.zeros_like(param)
                    self.state[param]["m"].add_(param.grad)
                    param.data.sub_(self.state[param]["m"], alpha=group["lr"])


class KeepsAList(torch.optim.Optimizer):
    """One whose memory is a list on itself."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.history = []

    def step(self, closure=None):
        self.history.append(1)


def test_group_memory_does_not_pass_for_a_parameters_own():
    """A first parameter without a gradient keeps an empty state of its own; tensors of groups are saved, not shared."""
    optimizer = ft.optimizer(RemembersInPlace, lr=0.1)
    params, opt_state = {"a": torch.zeros(1), "b": torch.zeros(1)}, {}
    bits = []
    for step, grads in enumerate([{"b": torch.ones(1)}, {"a": torch.ones(1), "b": torch.ones(1)}]):
        again = optimizer.update(params, grads, opt_state, step=step)
        params, opt_state = optimizer.update(params, grads, opt_state, step=step)
        bits.append(same(again[1], opt_state))
    assert bits == [True, True]
    assert opt_state["a"]["group.k"] == 2 and sorted(opt_state["a"]) == ["group.k", "m"]


def test_a_list_on_the_optimizer_is_found_out():
    """Memory outside of state and groups can't be carried: an error, whatever it is kept in."""
    with pytest.raises(TypeError, match="attribute 'history'"):
        ft.optimizer(KeepsAList, lr=0.1).update({"w": torch.ones(1)}, {"w": torch.ones(1)}, {}, step=0)


def test_freezing_keeps_the_optimizers_state_for_later():
    """A group frozen in a later run keeps what was remembered of it."""
    params = tensors(0, ["w", "b"])
    free = ft.optimizer(torch.optim.Adam, lr=0.1)
    _, opt_state = free.update(params, tensors(1, params), {}, step=0)
    frozen = ft.optimizer(torch.optim.Adam, lr=0.1, groups=[ft.group("b", frozen=True)])
    _, after = frozen.update(params, tensors(2, params), opt_state, step=1)
    assert same(after["b"], opt_state["b"])


def test_an_unknown_option_of_a_group_is_refused():
    """A misspelt option would be ignored by torch: it is an error that lists what there is."""
    with pytest.raises(ValueError, match=r"groups\[0\]: AdamW has no option \['weight_decai'\]"):
        ft.optimizer(torch.optim.AdamW, lr=0.1, groups=[ft.group("*", weight_decai=0.0)])


class KeepsUnderAName(torch.optim.Optimizer):
    """One whose state has an entry that is no parameter."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        self.state["all"]["n"] = self.state["all"].get("n", 0) + 1


class KeepsInADict(torch.optim.Optimizer):
    """One that counts in a dict of its own, and makes state when built."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, {"lr": lr})
        self.counts = {"n": 0}
        for param in self.param_groups[0]["params"]:
            self.state[param]["sum"] = torch.zeros_like(param)

    def step(self, closure=None):
        self.counts["n"] += 1


@pytest.mark.parametrize(("cls", "what"), [(KeepsUnderAName, "no parameter"), (KeepsInADict, "attribute 'counts'")])
def test_memory_that_can_not_be_carried_is_refused(cls, what):
    """State under another key, or in a container of the optimizer's own, is an error at the first update."""
    optimizer = ft.optimizer(cls, lr=0.1)
    params = {"w": torch.ones(1)}
    with pytest.raises(TypeError, match=what):
        optimizer.update(params, {"w": torch.ones(1)}, optimizer.init(params), step=0)


def test_a_tensor_from_a_schedule_does_not_stick(monkeypatch):
    """A rate that is a tensor written to before (a table filled in place) is no memory of the class; nor is a clone."""
    table = torch.empty(100)
    table[:] = torch.linspace(1, 0.01, 100)
    optimizer, opt_state = ft.optimizer(torch.optim.SGD, lr=lambda step: table[step]), {}
    for step in (0, 30):
        params, opt_state = optimizer.update({"w": torch.zeros(1)}, {"w": torch.ones(1)}, opt_state, step=step)
        assert (params["w"].item(), opt_state) == (pytest.approx(-table[step].item()), {})
    monkeypatch.delattr(torch, "_foreach_clone", raising=False)  # as in torch 2.11
    constant = ft.optimizer(torch.optim.SGD, lr=torch.tensor(0.1))
    assert constant.update({"w": torch.zeros(1)}, {"w": torch.ones(1)}, {}, step=0)[1] == {}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize(
    ("cls", "options"),
    [
        (torch.optim.AdamW, {"fused": True}),
        (torch.optim.AdamW, {"amsgrad": True}),
        (torch.optim.SGD, {"momentum": 0.9}),
        (torch.optim.Adagrad, {}),
    ],
)
def test_master_weights_are_bitwise_the_loop_by_hand(cls, options, in_place):
    """bf16 parameters follow float32 copies that the class updates with float32 gradients."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.Tanh(), torch.nn.Linear(8, 1)).bfloat16()
    by_hand = copy.deepcopy(model)
    batches = [torch.randn(16, 8).bfloat16() for _ in range(5)]

    def loss_fn(model, batch):
        return model(batch).square().mean().float()

    optimizer = ft.optimizer(cls, lr=1e-3, master_weights=True, **options)
    step_fn = ft.supervised_step(model, loss_fn, optimizer)
    state = ft.init_state(model, optimizer)
    if in_place:
        step_fn = ft.shell.in_place(step_fn)

    masters = [param.detach().float() for param in by_hand.parameters()]
    reference = cls(masters, lr=1e-3, **options)
    for batch in batches:
        by_hand.zero_grad()
        loss_fn(by_hand, batch).backward()
        for master, param in zip(masters, by_hand.parameters(), strict=True):
            master.grad = param.grad.float()
        reference.step()
        with torch.no_grad():
            torch._foreach_copy_(list(by_hand.parameters()), masters)
        state = step_fn(state, batch)
    for (name, param), master, expected in zip(state.params.items(), masters, by_hand.parameters(), strict=True):
        assert param.dtype == torch.bfloat16
        assert torch.equal(param, expected)
        assert torch.equal(state.opt_state[name]["master_weight"], master)


def test_small_updates_round_away_without_master_weights():
    """What master weights are for: 1 + 0.001 is 1 in bf16, a hundred times over."""
    ends = {}
    for master_weights in (False, True):
        sgd = ft.optimizer(torch.optim.SGD, lr=0.001, master_weights=master_weights)
        params, opt_state = {"w": torch.ones(1).bfloat16()}, {}
        for step in range(100):
            params, opt_state = sgd.update(params, {"w": torch.ones(1).bfloat16()}, opt_state, step=step)
        ends[master_weights] = params["w"].item()
    assert ends[False] == 1.0
    assert ends[True] == pytest.approx(0.9, abs=0.004)


def test_memory_of_another_optimizer_is_told():
    """A class that does not find its own says what there is."""
    params, grads = {"w": torch.ones(2)}, {"w": torch.ones(2)}
    adam, rmsprop = ft.optimizer(torch.optim.Adam, lr=0.1), ft.optimizer(torch.optim.RMSprop, lr=0.1)
    _, kept = adam.update(params, grads, adam.init(params), step=0)
    with pytest.raises(KeyError, match="square_avg") as caught:
        rmsprop.update(params, grads, kept, step=1)
    assert caught.value.__notes__ == [
        "in RMSprop: opt_state has ['exp_avg', 'exp_avg_sq', 'step']; a resumed run keeps its optimizer"
    ]
