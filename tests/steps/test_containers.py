"""One law of what is a container, for each kind of container and each of its users."""

import collections
import dataclasses
from types import MappingProxyType

import attrs
import numpy as np
import pytest
import torch
from torch.nn.utils.rnn import pack_sequence

import fntrain as ft
from fntrain.shell.steps.flat import filler, flatten
from fntrain.steps.batch import map_batch, move_batch, signature
from fntrain.steps.containers import children, leaves, map_leaves

Named = collections.namedtuple("Named", ["x", "label"])


@dataclasses.dataclass
class Data:
    x: torch.Tensor
    label: str
    size: int = dataclasses.field(init=False)

    def __post_init__(self):
        self.size = len(self.x)


@attrs.frozen
class Record:
    _x: torch.Tensor
    label: str = attrs.field(kw_only=True)

    @property
    def x(self):
        return self._x


class Bag(collections.UserDict):
    pass


class Own(collections.abc.MutableMapping):
    """A mapping of a class of one's own: a shallow copy of it shares what it holds."""

    def __init__(self, items):
        self.items_ = dict(items)

    def __getitem__(self, key):
        return self.items_[key]

    def __setitem__(self, key, value):
        self.items_[key] = value

    def __delitem__(self, key):
        del self.items_[key]

    def __iter__(self):
        return iter(self.items_)

    def __len__(self):
        return len(self.items_)


KINDS = {
    "dict": lambda x: {"x": x, "label": "a"},
    "ordered": lambda x: collections.OrderedDict(x=x, label="a"),
    "default": lambda x: collections.defaultdict(list, x=x, label="a"),
    "user": lambda x: Bag(x=x, label="a"),
    "own": lambda x: Own({"x": x, "label": "a"}),
    "tuple": lambda x: (x, torch.arange(len(x))),
    "list": lambda x: [x, {"label": "a"}],
    "named": lambda x: Named(x, "a"),
    "dataclass": lambda x: Data(x, "a"),
    "attrs": lambda x: Record(x, label="a"),
    "return_types": lambda x: torch.return_types.sort((x, torch.arange(len(x)))),
    "nested": lambda x: {"in": [Named(Data(x, "a"), "b")]},
}
table = pytest.mark.parametrize("kind", KINDS)
X = torch.tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]])


def tensors(value):
    return [leaf for leaf in leaves(value) if isinstance(leaf, torch.Tensor)]


def same_kinds(a, b):
    one, other = children(a), children(b)
    if one is None or other is None:
        return one is other
    pairs = zip(one.values, other.values, strict=True)
    return type(a) is type(b) and list(one.keys) == list(other.keys) and all(same_kinds(*pair) for pair in pairs)


@table
def test_map_batch_rebuilds_the_container_and_keeps_the_old(kind):
    batch = KINDS[kind](X.clone())
    new = map_batch(torch.neg, batch)
    assert same_kinds(new, batch)
    assert torch.equal(tensors(new)[0], -X)
    assert torch.equal(tensors(batch)[0], X)
    assert [leaf for leaf in leaves(new) if isinstance(leaf, str)] == [x for x in leaves(batch) if isinstance(x, str)]


@table
def test_batches_move_to_a_device(kind):
    moved = move_batch(KINDS[kind](X), "meta")
    assert same_kinds(moved, KINDS[kind](X))
    assert {leaf.device.type for leaf in tensors(moved)} == {"meta"}


@table
def test_samples_are_counted_and_split(kind):
    batch = KINDS[kind](X)
    assert ft.num_samples(batch) == 3
    first, second = ft.split_batch(batch, 2)
    assert same_kinds(first, batch)
    assert [tensors(part)[0].tolist() for part in (first, second)] == [X[:2].tolist(), X[2:].tolist()]


@table
def test_signatures_see_shapes_and_other_leaves_but_no_values(kind):
    make = KINDS[kind]
    assert signature(make(X)) == signature(make(X + 1))
    assert signature(make(X)) != signature(make(X[:2]))
    assert hash(signature(make(X))) == hash(signature(make(X + 1)))


@table
def test_programs_take_the_container_apart_and_together_again(kind):
    batch, found, others = KINDS[kind](X), [], []
    key = flatten(batch, found)
    assert key == flatten(KINDS[kind](X + 1), others)
    assert key != flatten(KINDS[kind](X[:2]), [])
    rebuilt = filler(batch)(iter(others))
    assert same_kinds(rebuilt, batch)
    assert torch.equal(tensors(rebuilt)[0], X + 1)


@table
def test_the_predictor_gives_every_sample_its_own_row(kind):
    recipe = ft.Recipe(
        build_model=lambda config: torch.nn.Linear(2, 1),
        build_data=lambda config: [],
        loss_fn=lambda model, batch: model(batch).mean(),
        predict_fn=lambda model, batch: KINDS[kind](batch),
    )
    state = ft.init_state(torch.nn.Linear(2, 1), ft.optimizer(torch.optim.SGD, lr=0.1))
    results = ft.predictor(recipe, state).batch(list(X), batch_size=2)
    assert [tensors(result)[0].tolist() for result in results] == X.tolist()


def test_the_predictor_checks_named_outputs_and_indexes_arrays():
    """Fault of before: outputs in a named tuple, and arrays, were given whole to every sample, whatever their length."""

    def predictor(fn):
        recipe = ft.Recipe(
            build_model=lambda config: torch.nn.Linear(2, 1),
            build_data=lambda config: [],
            loss_fn=lambda model, batch: model(batch).mean(),
            predict_fn=lambda model, batch: fn(batch),
        )
        return ft.predictor(recipe, ft.init_state(torch.nn.Linear(2, 1), ft.optimizer(torch.optim.SGD, lr=0.1)))

    results = predictor(lambda batch: Named(batch.numpy(), np.float64(0.5))).batch(list(X))
    assert [(result.x.tolist(), result.label) for result in results] == [(row, 0.5) for row in X.tolist()]
    with pytest.raises(ValueError, match=r"predict_fn: gave an output of shape \(2, 2\) for 3 samples"):
        predictor(lambda batch: Named(batch[:2], "a")).batch(list(X))


def test_what_can_move_moves_itself():
    """The lengths in a PackedSequence must stay on the CPU, which it knows; a class of one's own may have `to` too."""

    class Boxes:
        def __init__(self, device):
            self.device = device

        def to(self, device):
            return Boxes(device)

    packed = pack_sequence([torch.ones(2), torch.ones(1)])
    moved, boxes, path = move_batch((packed, Boxes("cpu"), {"to": torch.ones(1)}), "meta")
    assert (moved.data.device.type, moved.batch_sizes.device.type) == ("meta", "cpu")
    assert (boxes.device, path["to"].device.type) == ("meta", "meta")
    Edge = collections.namedtuple("Edge", ["at", "to"])
    assert move_batch(Edge(torch.ones(1), torch.ones(1)), "meta").to.device.type == "meta"


def test_a_rebuilt_container_shares_no_storage_and_keeps_no_values():
    """Neither the original nor the function that rebuilds it is changed by what the new one gets."""
    own, counts = Own({"x": 1}), collections.Counter(a=2)
    assert (map_leaves(lambda x: x + 1, own)["x"], own["x"]) == (2, 1)
    assert map_leaves(lambda x: x + 1, counts) == collections.Counter(a=3)
    assert type(map_leaves(str, MappingProxyType({"x": 1}))) is dict
    bag = Bag(x=torch.ones(1))
    rebuild = children(bag).rebuild
    assert (rebuild([1]), rebuild([2]), list(bag)) == ({"x": 1}, {"x": 2}, ["x"])
    assert not any(isinstance(value, torch.Tensor) for value in leaves(rebuild.args[0]))


def test_arrays_texts_and_classes_are_leaves():
    for leaf in (np.zeros(3), "text", b"bytes", 1, None, Data, Record, object(), range(3), {1, 2}):
        assert children(leaf) is None
        assert map_batch(torch.neg, leaf) is leaf
