"""TrainState: immutable, equal exactly when bitwise equal, and what binds it to a module."""

import copy
import pickle

import pytest
import torch
from cases import MODELS, batches, make, same, square_loss
from hypothesis import given
from strategies import TREES
from torch import nn

import fntrain as ft
from fntrain.core import tree

SGD = ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9)


def state(**fields):
    base = {
        "step": 1,
        "position": 1,
        "seed": 0,
        "params": {"w": torch.ones(2)},
        "extra": {"ema": [torch.zeros(2), 0.5]},
    }
    return ft.TrainState(**base | fields)


@given(TREES, TREES)
def test_equality_and_fingerprint_agree(a, b):
    """Two trees have one fingerprint exactly when they are bitwise equal; a copy is equal."""
    assert tree.bitwise_equal(a, b) == (tree.fingerprint(a) == tree.fingerprint(b))
    assert tree.bitwise_equal(a, tree.clone(a))


@pytest.mark.parametrize(
    ("a", "b"),
    [
        (0.0, -0.0),
        (1, 1.0),
        (1, True),
        ([1], (1,)),
        ([], {}),
        ({"a": []}, {}),
        (None, 0),
        ("1", 1),
        (torch.zeros(2), torch.zeros(2, dtype=torch.float64)),
        (torch.zeros(2, 1), torch.zeros(1, 2)),
        (torch.tensor([0.0]), torch.tensor([-0.0])),
        ({"a": 1, "b": 2}, {"a": 2, "b": 1}),
    ],
)
def test_what_differs_in_bits_or_kind_is_not_equal(a, b):
    """== of Python is too kind: sign of zero, int and float, list and tuple, dtype and shape all count."""
    assert not tree.bitwise_equal(a, b)
    assert tree.fingerprint(a) != tree.fingerprint(b)


def test_what_has_the_same_bits_is_equal():
    """nan equals itself; the order of keys and the strides do not count."""
    assert tree.bitwise_equal({"a": float("nan"), "b": 1}, {"b": 1, "a": float("nan")})
    image = torch.rand(2, 3, 4, 4)
    assert tree.bitwise_equal(image, image.to(memory_format=torch.channels_last))


def test_equality_covers_the_saved_fields_only():
    """Metrics and the run record do not count; every saved field does."""
    assert state() == state(metrics={"loss": 1.0}, run=ft.Run(max_steps=3))
    changes = {"step": 2, "position": 2, "seed": 1, "params": {}, "buffers": {"b": torch.ones(1)}}
    changes |= {"opt_state": {"w": {"n": 1}}, "hooks": {"h": 1}, "extra": {}}
    for field, value in changes.items():
        assert state() != state(**{field: value}), field
        assert ft.digest(state()) != ft.digest(state(**{field: value})), field


def test_a_state_is_immutable():
    """Fields and mappings can't be assigned to; a dict given to it may change without it."""
    given_params = {"w": torch.ones(2)}
    made = state(params=given_params)
    given_params["v"] = torch.ones(1)
    assert list(made.params) == ["w"]
    with pytest.raises(AttributeError):
        made.step = 3
    with pytest.raises(TypeError):
        made.metrics["loss"] = 1.0
    with pytest.raises(TypeError):
        hash(made)


def test_replace_changes_only_what_is_named():
    """replace keeps every other field by identity, and refuses unknown names."""
    made = state()
    new = made.replace(step=5)
    assert (new.step, made.step) == (5, 1)
    assert new.params is made.params
    with pytest.raises(TypeError, match="momentum"):
        made.replace(momentum=1)


def test_states_pickle_and_copy():
    """Processes may send states to each other."""
    made = state(metrics={"loss": torch.ones(())})
    for other in (pickle.loads(pickle.dumps(made)), copy.deepcopy(made)):
        assert other == made
        assert other.metrics == made.metrics


def test_repr_is_a_short_table():
    """No tensor is dumped, and names tell what is there."""
    model = make("batchnorm")
    text = repr(ft.init_state(model, SGD))
    assert "6 tensors" in text and "tensor(" not in text
    assert len(text.splitlines()) <= 8


def test_leaves_have_dotted_paths():
    """The walk names every saved leaf."""
    paths = dict(ft.named_leaves(state(opt_state={"w": {"exp_avg": torch.ones(2)}})))
    assert {"params.w", "opt_state.w.exp_avg", "extra.ema.0", "extra.ema.1"} <= paths.keys()
    with pytest.raises(TypeError, match=r"extra\.bad: got set, expected a tensor, number"):
        dict(ft.named_leaves(state(extra={"bad": {1}})))
    with pytest.raises(TypeError, match="extra: got key 3, expected a string"):
        dict(ft.named_leaves(state(extra={3: 1})))


def test_a_snapshot_is_no_view():
    """Writing to the original's tensors leaves the snapshot as it was; an alias would not."""
    made = state(metrics={"loss": torch.ones(())}, hooks={"ema": torch.ones(1)})
    kept, alias = ft.snapshot(made), made.replace()
    for leaf in (made.params["w"], made.extra["ema"][0], made.metrics["loss"], made.hooks["ema"]):
        leaf.add_(1)
    assert alias.params["w"][0] == 2
    assert kept.params["w"][0] == 1 and kept.extra["ema"][0][0] == 0
    assert kept.metrics["loss"] == 1 and kept.hooks["ema"] == 1


def test_init_state_shares_memory_and_a_fresh_state_is_fresh():
    """Nothing is copied; after steps of another run a new state starts at 0 with the module's weights."""
    model = make("batchnorm")
    first = ft.init_state(model, SGD)
    assert all(first.params[name].data_ptr() == param.data_ptr() for name, param in model.named_parameters())
    step_fn = ft.supervised_step(model, square_loss, SGD)
    for batch in batches("batchnorm", 3):
        step_fn(first, batch)
    again = ft.init_state(model, SGD)
    assert again == first
    assert (again.step, again.opt_state) == (0, {})


@pytest.mark.parametrize("name", MODELS)
def test_bound_gives_the_states_values_and_puts_the_modules_back(name):
    """Inside, the module computes with the state; afterwards it has its own tensors, and the state kept its bits."""
    model, batch = make(name), batches(name, 1)[0]
    step_fn = ft.supervised_step(model, square_loss, SGD)
    after = step_fn(step_fn(ft.init_state(model, SGD), batch), batch)
    twin, own, bits = make(name), tree.fingerprint(dict(model.state_dict())), ft.digest(after)
    ft.load_into(twin, after)
    with ft.bound(model, after) as lent, ft.preserved_generators():
        ft.seed_generators(0)
        inside = lent(batch)
    ft.seed_generators(0)
    assert same({"out": inside.detach()}, {"out": twin(batch).detach()})
    assert tree.fingerprint(dict(model.state_dict())) == own
    assert ft.digest(after) == bits


def test_bound_and_load_into_refuse_another_model():
    """Names, shapes and dtypes must be the module's."""
    model = nn.Linear(3, 2)
    good = ft.init_state(model, SGD)
    for change, message in [
        ({"weight": good.params["weight"]}, r"missing \['bias'\]"),
        ({**good.params, "x": torch.ones(1)}, r"the module has no \['x'\]"),
        ({**good.params, "bias": torch.ones(3)}, r"\['bias'\]: got \(3,\)"),
        ({**good.params, "bias": torch.ones(2).double()}, "torch.float64, the module has"),
    ]:
        for call in (ft.load_into, lambda m, s: ft.bound(m, s).__enter__()):
            with pytest.raises(ValueError, match=message):
                call(model, good.replace(params=change))


def test_modules_moved_after_building_the_step_still_work():
    """Buffers are found when they are lent: .to() makes new buffer objects."""
    model = make("batchnorm")
    step_fn = ft.supervised_step(model, square_loss, SGD)
    model.to(torch.float64)
    new = step_fn(ft.init_state(model, SGD), batches("batchnorm", 1)[0].double())
    assert new.buffers["1.running_mean"].dtype == torch.float64
    assert new.buffers["1.num_batches_tracked"] == 1
    assert model[1].num_batches_tracked == 0


def test_lending_that_fails_half_way_leaves_the_module_as_it_was():
    """A tensor that can't be lent is an error, and what was lent before it is taken back."""
    model = make("mlp")
    own = [param.data_ptr() for param in model.parameters()]
    slots = ft.steps.module.Slots.of(model)
    params = {**{name: param.detach().clone() for name, param in slots.params.items()}, "2.bias": "no tensor"}
    with pytest.raises(TypeError):
        slots.lend(params, {})
    assert [param.data_ptr() for param in model.parameters()] == own


def test_a_step_refuses_a_state_with_other_names():
    """More, fewer or other parameters and buffers than the module's are named."""
    model = make("batchnorm")
    step_fn, state = ft.supervised_step(model, square_loss, SGD), ft.init_state(model, SGD)
    for change in ({"params": {**state.params, "x": torch.ones(1)}}, {"buffers": {}}):
        with pytest.raises(ValueError, match="of another model"):
            step_fn(state.replace(**change), batches("batchnorm", 1)[0])
