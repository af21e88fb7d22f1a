"""Reports from inside a step: names, weights, kinds, and no global storage."""

import math
import pickle
import threading

import pytest
import torch

import fntrain as ft
from fntrain.events import MetricName, collecting, merge


def collected(*calls, weight=1.0):
    with collecting() as collector:
        for call in calls:
            call()
    return collector, weight


@pytest.mark.parametrize(("reduce", "expected"), [("mean", 2.5), ("sum", 4.0), ("max", 3.0), ("min", 1.0)])
@pytest.mark.parametrize("kind", [float, torch.tensor])
def test_values_of_micro_batches_combine_as_declared(reduce, expected, kind):
    """Means weigh like the loss; sums, maxima and minima do not."""
    parts = [collected(lambda v=v: ft.put_scalar("x", kind(v), reduce=reduce), weight=v) for v in (1.0, 3.0)]
    assert float(merge(parts)["x"]) == expected


def test_one_value_keeps_its_bits():
    """Nothing is rescaled where there is nothing to combine."""
    value = torch.tensor(0.1)
    assert ft.core.tree.bitwise_equal(merge([collected(lambda: ft.put_scalar("x", value), weight=3)])["x"], value)


def test_scopes_nest_and_do_nothing_outside():
    """name_scope prefixes names inside a step and is harmless outside."""

    def report():
        with ft.name_scope("a"), ft.name_scope("b"):
            ft.put_scalars({"x": 1.0})
        ft.put_scalar("y", 2.0)

    assert sorted(merge([collected(report)])) == ["a/b/x", "y"]
    with ft.name_scope("a"):
        pass


def test_media_keep_the_last_and_are_checked():
    """Images, histograms and texts are kept as values of their own."""
    metrics = merge(
        [
            collected(
                lambda: ft.put_image("i", torch.zeros(3, 4, 4)),
                lambda: ft.put_histogram("h", torch.arange(4)),
                lambda: ft.put_text("t", "first"),
                lambda: ft.put_text("t", "last"),
            )
        ]
    )
    assert metrics["i"].tensor.shape == (3, 4, 4)
    assert metrics["t"].text == "last"
    with pytest.raises(ValueError, match=r"put_image\('i'\): got shape \(4, 4\)"):
        collected(lambda: ft.put_image("i", torch.zeros(4, 4)))


def test_collectors_of_threads_do_not_mix():
    """The collector is of the context, not of the process: another thread is outside of the step."""
    errors = []

    def elsewhere():
        try:
            ft.put_scalar("x", 1.0)
        except RuntimeError as error:
            errors.append(str(error))

    with collecting() as collector:
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
    assert collector.scalars == {}
    assert "outside of a step" in errors[0]


def test_metric_names_are_strings_that_remember():
    """A name equals the plain string, survives pickle and a merge of dicts, and keeps how it is shown."""
    name = MetricName("lr", smooth="latest")
    assert {name: 1.0}["lr"] == 1.0
    again = pickle.loads(pickle.dumps(name))
    assert (again, again.smooth, again.reduce) == ("lr", "latest", "mean")
    (kept,) = {name: 1.0, "lr": 2.0}
    assert kept.smooth == "latest"


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ft.put_scalar("x", torch.ones(2)), r"put_scalar\('x'\): got shape \(2,\), expected one element"),
        (lambda: ft.put_scalar("x", 1.0, reduce="median"), "got reduce='median'"),
    ],
)
def test_misuse_names_what_was_wrong(call, message):
    """Values that are no scalars are errors where they are reported."""
    with pytest.raises(ValueError, match=message):
        collected(call)


@pytest.mark.parametrize("weigh", [float, torch.tensor])
def test_micro_batches_without_weight_have_no_say_in_a_mean(weigh):
    """A mean over nothing is nan, and must not make that of the others nan."""
    parts = []
    for value, weight in ((math.nan, 0.0), (1.0, 1.0), (4.0, 3.0)):
        with collecting() as collector:
            ft.put_scalar("x", torch.tensor(value))
        parts.append((collector, weigh(weight)))
    assert float(merge(parts)["x"]) == 3.25
