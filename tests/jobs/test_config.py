"""Config: settings as a record, to plain values and back."""

import enum
import json
import pathlib
from typing import Literal

import attrs
import pytest
from hypothesis import given
from hypothesis import strategies as st

import fntrain as ft
from fntrain.jobs.config import from_dict, to_dict
from fntrain.shell.setup import differences


class Kind(enum.Enum):
    RELU = "relu"
    TANH = "tanh"


@attrs.frozen(kw_only=True)
class Model:
    width: int = 16
    kind: Kind = Kind.RELU


@attrs.frozen(kw_only=True)
class Config(ft.Config):
    model: Model = Model()
    mode: Literal["a", "b"] = "a"
    sizes: tuple[int, ...] = (1, 2)
    pair: tuple[Kind, float] = (Kind.RELU, 2.0)
    path: pathlib.Path = pathlib.Path("x/y")
    cache: pathlib.Path | None = None
    other: Kind | None = None
    layers: tuple[Model, ...] = ()
    head: Model | None = None


configs = st.builds(
    Config,
    lr=st.floats(allow_nan=False, allow_infinity=False),
    model=st.builds(Model, width=st.integers(), kind=st.sampled_from(Kind)),
    mode=st.sampled_from(["a", "b"]),
    sizes=st.lists(st.integers()).map(tuple),
    pair=st.tuples(st.sampled_from(Kind), st.floats(allow_nan=False)),
    path=st.sampled_from([pathlib.Path("a"), pathlib.Path("/b/c")]),
    cache=st.none() | st.just(pathlib.Path("c")),
    other=st.none() | st.sampled_from(Kind),
    layers=st.lists(st.builds(Model, kind=st.sampled_from(Kind)), max_size=2).map(tuple),
    head=st.none() | st.builds(Model, width=st.integers()),
    clip_grad_norm=st.none() | st.floats(min_value=0.5, max_value=2),
)


def comes_back(config, back=from_dict):
    """Whether a config is the same after a journey through JSON."""
    return back(Config(), json.loads(json.dumps(to_dict(config)))) == config


@given(configs)
def test_a_config_comes_back_from_json_as_it_was(config):
    """Law: enums, paths, tuples, None and nested records are themselves again, whatever the defaults were."""
    assert comes_back(config)


def test_that_law_can_fail():
    """A way back that goes by values alone leaves text where an enum was."""
    assert not comes_back(Config(other=Kind.TANH), lambda like, plain: attrs.evolve(like, other=plain["other"]))


def test_a_setting_of_another_config_is_named():
    """A file of another recipe is refused, with what there is."""
    with pytest.raises(ft.ConfigError, match="Config: has no field architectures; it has output_dir, seed"):
        from_dict(ft.Config(), {"architectures": ["Bert"]})


@pytest.mark.parametrize(
    ("name", "value", "low"),
    [
        ("max_steps", 0, 1),
        ("batch_size", -3, 1),
        ("accumulate", 0, 1),
        ("num_workers", -1, 0),
        ("warmup_steps", 1.5, 0),
        ("log_every", 0, 1),
        ("eval_every", True, 1),
        ("checkpoint_every", "10", 1),
        ("keep_last", 0, 1),
    ],
)
def test_a_count_that_can_not_be_is_named(name, value, low):
    """At once, where the record is made, by the name of its field; also in a derived one and by evolve."""
    for make in (ft.Config, Config, lambda **changed: attrs.evolve(Config(), **changed)):
        with pytest.raises(ft.ConfigError, match=rf"{name}: got {value!r}, expected a whole number >= {low}"):
            make(**{name: value})


def test_a_value_that_is_no_setting_is_named():
    """What JSON can't hold is told."""
    with pytest.raises(TypeError, match="config: got object"):
        to_dict(attrs.evolve(Config(), mode=object()))


def test_differences_are_told_by_the_names_of_flags():
    """New, lost and changed settings, nested ones by dots."""
    old = to_dict(Config()) | {"gone": 1}
    new = to_dict(Config(lr=0.5, model=Model(kind=Kind.TANH)))
    assert differences(old, new) == ["lr: 0.001 -> 0.5", "model.kind: 'RELU' -> 'TANH'", "gone: 1 -> None"]
    assert differences(new, new) == []


def test_scaling_keeps_samples_and_periods():
    """Twice the processes: twice batch and rate, half the steps; a second time nothing; back again the same."""
    config = ft.Config(batch_size=8, lr=0.1, max_steps=100, warmup_steps=10, log_every=1, reference_world_size=2)
    scaled = ft.scale_config(config, 4)
    assert (scaled.batch_size, scaled.lr, scaled.max_steps, scaled.warmup_steps, scaled.log_every) == (
        16,
        0.2,
        50,
        5,
        1,
    )
    assert ft.scale_config(scaled, 4) == scaled
    assert attrs.evolve(ft.scale_config(scaled, 2), log_every=1) == config
    assert ft.scale_config(ft.Config(), 8) == ft.Config()
    with pytest.raises(ft.ConfigError, match="batch_size: 1 for 2 processes"):
        ft.scale_config(ft.Config(batch_size=1, reference_world_size=2), 3)
