"""Generators of pytrees and hooks for the laws; a new leaf kind or gate goes in here."""

import torch
from hypothesis import strategies as st

import fntrain as ft

SCALARS = st.one_of(st.integers(-9, 9), st.floats(allow_nan=True), st.booleans(), st.none(), st.text(max_size=3))
TENSORS = st.builds(
    lambda values, dtype: torch.tensor(values).to(dtype),
    st.lists(st.floats(-4, 4, width=16), max_size=3),
    st.sampled_from([torch.float32, torch.float64, torch.bfloat16, torch.int64, torch.bool]),
)
TREES = st.recursive(
    st.one_of(SCALARS, TENSORS),
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.lists(inner, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
    ),
    max_leaves=6,
)


def note_a(state):
    return state.replace(extra={"log": (*state.extra["log"], f"a{state.step}")})


def note_b(state):
    return state.replace(extra={"log": (*state.extra["log"], f"b{state.step}")})


def even(state):
    return state.step % 2 == 0


A, B = ft.hook(after_step=note_a, name="a"), ft.hook(after_step=note_b, before_step=note_b, name="b")
COUNTS = st.integers(1, 12)
GATES = st.one_of(
    COUNTS.map(lambda n: lambda h: ft.every(n, h)),
    COUNTS.map(lambda n: lambda h: ft.first(n, h)),
    st.tuples(COUNTS, COUNTS).map(lambda ab: lambda h: ft.between(min(ab), max(ab), h)),
    st.just(lambda h: ft.when(even, h)),
    st.just(ft.on_main),
    st.just(ft.at_end),
)
LEAVES = st.sampled_from([A, B, ft.hook(before_train=note_a), ft.identity])
HOOKS = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3).map(lambda hooks: ft.compose(*hooks)),
        st.tuples(GATES, inner).map(lambda pair: pair[0](pair[1])),
    ),
    max_leaves=5,
)
