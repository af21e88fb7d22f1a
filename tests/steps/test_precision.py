"""Precision: fp16's loss scale is torch's GradScaler as part of the state; autocast keeps no stale cast; tf32 is a GPU's."""

import math
from contextlib import nullcontext

import broken
import pytest
import torch
from cases import batches, make, same, square_loss, token_loss

import fntrain as ft
from fntrain.steps.precision import GROWTH_INTERVAL, INITIAL_SCALE, PRECISIONS, loss_scale, next_loss_scale, unscale_
from fntrain.testing import assert_pure, assert_resume_exact, assert_states_equal

ADAMW = ft.optimizer(torch.optim.AdamW, lr=ft.schedules.linear(0.1, 0.01, total_steps=5), fused=True)
SGD = ft.optimizer(torch.optim.SGD, lr=0.1, momentum=0.9, fused=True)
FORMS = pytest.mark.parametrize("form", [lambda step_fn: step_fn, ft.shell.in_place], ids=["pure", "in_place"])


def peaked_loss(model, batch):
    """A float32 loss that grows with the largest input, so that a batch can make scaled fp16 gradients overflow."""
    out = model(batch).float()
    ft.put_scalar("out", out.mean())
    return (out.square() * batch.abs().amax(1, keepdim=True)).mean()


def scaled(scale, good_steps=0):
    """The entry of a state's `extra`."""
    return {
        "loss_scale": {"scale": torch.tensor(float(scale)), "good_steps": torch.tensor(good_steps, dtype=torch.int32)}
    }


def start(form=lambda step_fn: step_fn, *, name="mlp", loss_fn=peaked_loss, optimizer=SGD, extra=None, **step):
    """A step in one form and its first state."""
    model = make(name)
    step_fn = form(ft.supervised_step(model, loss_fn, optimizer, **{"precision": "fp16", **step}))
    return step_fn, ft.init_state(model, optimizer, seed=0, extra=extra)


def entry(state):
    """Loss scale and number of good steps as numbers."""
    held = state.extra["loss_scale"]
    return held["scale"].item(), held["good_steps"].item()


def overflowing(num, *bad):
    """Batches, some of them so large that scaled fp16 gradients overflow while the loss is finite."""
    return [batch * 300.0 if i in bad else batch for i, batch in enumerate(batches("mlp", num))]


@FORMS
def test_an_overflow_halves_the_scale_and_skips_the_step(form):
    """Scaled gradients beyond 65504 change nothing but the counters and the scale; the loss itself is finite."""
    step_fn, state = start(form, extra={"mine": 1})
    good, bad = overflowing(2, 1)
    state = step_fn(state, good)
    assert entry(state) == (INITIAL_SCALE, 1)
    assert (state.metrics["skipped_steps"], state.metrics["loss_scale"]) == (0, INITIAL_SCALE)
    before = ft.snapshot(state)
    state = step_fn(state, bad)
    assert entry(state) == (INITIAL_SCALE / 2, 0)
    assert (state.metrics["skipped_steps"], state.metrics["loss_scale"]) == (1, INITIAL_SCALE)
    assert state.metrics["loss"].isfinite() and not math.isfinite(state.metrics["grad_norm"])
    for field in ("params", "buffers", "opt_state"):
        assert same(getattr(state, field), getattr(before, field))
    assert (state.step, state.position, state.extra["mine"]) == (2, 2, 1)
    state = step_fn(state, good)
    assert entry(state) == (INITIAL_SCALE / 2, 1) and state.metrics["loss_scale"] == INITIAL_SCALE / 2


@FORMS
def test_the_scale_doubles_after_2000_good_steps(form):
    """The counter is in the state: it starts anew after a doubling and after an overflow."""
    good, bad = overflowing(2, 1)
    step_fn, state = start(form, extra=scaled(1024.0, GROWTH_INTERVAL - 2))
    seen = []
    for batch in (good, good, good, bad * 100):
        state = step_fn(state, batch)
        seen.append(entry(state))
    assert seen == [(1024, 1999), (2048, 0), (2048, 1), (1024, 0)]


def test_the_scale_stays_within_bounds():
    """It never becomes 0 or infinite, however many steps overflow or do not."""
    low, high = (scaled(scale, GROWTH_INTERVAL - 1)["loss_scale"] for scale in (2.0**-16, 2.0**24))
    assert next_loss_scale(low, healthy=False)["scale"] == 2.0**-16
    assert next_loss_scale(high, healthy=True)["scale"] == 2.0**24


@pytest.mark.parametrize("healthy", [True, False])
def test_a_decision_left_to_the_device_gives_the_same_scale(healthy):
    """A tensor decides like a bool, and dtypes stay as they are."""
    for good in (0, GROWTH_INTERVAL - 1):
        now = scaled(8.0, good)["loss_scale"]
        host, device = next_loss_scale(now, healthy), next_loss_scale(now, torch.tensor(healthy))
        assert ft.core.tree.bitwise_equal(host, device)
        assert [value.dtype for value in host.values()] == [torch.float32, torch.int32]
        assert now["good_steps"] == good  # the old state's


def by_grad_scaler(data, optimizer, *, clip=None, scale=INITIAL_SCALE, growth_interval=GROWTH_INTERVAL):
    """The loop that torch's documentation shows."""
    model = make("mlp")
    by_hand = optimizer.cls(model.parameters(), lr=0.1, **optimizer.options)
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=growth_interval)
    scales = []
    for step, batch in enumerate(data):
        ft.seed_generators(0, step, 0)
        with ft.events.collecting(), torch.autocast("cpu", torch.float16):
            loss = peaked_loss(model, batch)
        by_hand.zero_grad()
        scaler.scale(loss).backward()
        if clip is not None:
            scaler.unscale_(by_hand)
            torch.nn.utils.clip_grad_norm_(model.parameters(), clip)
        for group in by_hand.param_groups:
            group["lr"] = optimizer.lr(step) if callable(optimizer.lr) else optimizer.lr
        scaler.step(by_hand)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, scales


@FORMS
@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("fused", [False, True])
def test_the_step_is_the_loop_with_grad_scaler(fused, clip, form):
    """Weights and scales over overflows have the bits of torch.amp.GradScaler with an optimizer of either kind."""
    optimizer = ft.optimizer(torch.optim.AdamW, lr=ADAMW.lr, fused=fused)
    data = overflowing(7, 2, 3)
    twin, scales = by_grad_scaler(data, optimizer, clip=clip)
    step_fn, state = start(form, optimizer=optimizer, clip_grad_norm=clip)
    seen = []
    for batch in data:
        state = step_fn(state, batch)
        seen.append(entry(state)[0])
    assert seen == scales and min(scales) == INITIAL_SCALE / 4
    assert same(state.params, {name: param.detach() for name, param in twin.named_parameters()})


def test_schedules_go_on_while_the_optimizer_waits():
    """After a skipped step the learning rate is that of `state.step`, the optimizer's own count one behind."""
    step_fn, state = start(optimizer=ADAMW)
    rates = []
    for batch in overflowing(4, 1):
        state = step_fn(state, batch)
        rates.append(state.metrics["lr"])
    assert rates == [ADAMW.lr(step) for step in range(4)]
    assert {entry["step"].item() for entry in state.opt_state.values()} == {3.0}


@pytest.mark.parametrize("clip", [{"clip_grad_norm": 0.05}, {"clip_grad_value": 0.002}, {}])
@FORMS
def test_clipping_sees_gradients_without_the_scale(form, clip):
    """Any power of two as scale gives the same bits: norm, clipping and update see what an unscaled step would."""
    results = []
    for scale in (2.0**8, 2.0**12):
        step_fn, state = start(form, extra=scaled(scale), **clip)
        for batch in batches("mlp", 3):
            state = step_fn(state, batch)
        results.append(state)
    assert same(results[0].params, results[1].params)
    assert results[0].metrics["grad_norm"] == results[1].metrics["grad_norm"]
    plain, state = start(precision="fp32", **clip)
    for batch in batches("mlp", 3):
        state = plain(state, batch)
    for name, value in state.params.items():
        torch.testing.assert_close(results[0].params[name], value, rtol=0.01, atol=1e-3)


def test_the_clipping_law_fails_for_scaled_gradients():
    """A step that clips before the scale is divided out depends on the scale."""
    results = []
    for scale in (2.0**8, 2.0**12):
        model = make("mlp")
        step_fn = broken.step_that_clips_scaled_gradients(
            model, square_loss, SGD, precision="fp16", clip_grad_norm=0.05
        )
        results.append(step_fn(ft.init_state(model, SGD, extra=scaled(scale)), batches("mlp", 1)[0]))
    assert not same(results[0].params, results[1].params)


def test_transform_grads_sees_gradients_without_the_scale():
    """A function of the gradients gets the same bits at any scale."""
    seen = []

    def look(grads):
        seen.append(ft.core.tree.clone(dict(grads)))
        return grads

    for scale in (2.0**4, 2.0**10):
        step_fn, state = start(transform_grads=look, accumulate=2, extra=scaled(scale))
        step_fn(state, batches("mlp", 1, 7)[0])
    assert same(*seen)
    assert max(grad.abs().max() for grad in seen[0].values()) < 10


@pytest.mark.parametrize("loss_fn", [peaked_loss, square_loss, token_loss])
def test_accumulation_in_fp16_is_the_weighted_mean(loss_fn):
    """Ragged micro-batches give the step of the whole batch, to fp16's rounding; the metrics carry no scale."""
    results = []
    for accumulate in (1, 3):
        step_fn, state = start(loss_fn=loss_fn, accumulate=accumulate, extra=scaled(1024.0))
        results.append(step_fn(state, batches("mlp", 1, 7)[0]))
    whole, parts = results
    assert parts.metrics["loss"].item() == pytest.approx(whole.metrics["loss"].item(), rel=2e-3)
    assert parts.metrics["grad_norm"] == pytest.approx(whole.metrics["grad_norm"], rel=5e-3)
    for name, value in whole.params.items():
        torch.testing.assert_close(parts.params[name], value, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("accumulate", [1, 3])
def test_an_overflow_in_one_micro_batch_skips_the_whole_step(accumulate):
    """One overflow among micro-batches halves the scale once."""
    step_fn, state = start(accumulate=accumulate, name="batchnorm")
    batch = batches("batchnorm", 1, 7)[0].clone()
    batch[0] = float("inf")
    new = step_fn(state, batch)
    assert entry(new) == (INITIAL_SCALE / 2, 0)
    assert same(new.params, state.params) and same(new.buffers, state.buffers)


@pytest.mark.parametrize("optimizer", [ADAMW, SGD])
def test_fp16_steps_are_pure_and_in_place_is_the_same(optimizer, monkeypatch):
    """The scale is in the state: the same state and batch give the same bits, also where the device decides."""
    for device_decides in (False, True):
        if device_decides:
            monkeypatch.setattr(ft.steps.grads, "stalls", lambda tensor: True)
        pure, expected = start(optimizer=optimizer, clip_grad_norm=0.5)
        cheap, got = start(ft.shell.in_place, optimizer=optimizer, clip_grad_norm=0.5)
        for batch in overflowing(6, 0, 3):
            expected, got = assert_pure(pure, expected, batch), cheap(got, batch)
            assert_states_equal(got, expected)
            assert ft.core.tree.bitwise_equal(dict(got.metrics), dict(expected.metrics))
        assert entry(got) == (INITIAL_SCALE / 4, 2)


@FORMS
def test_the_scale_is_in_every_checkpoint(form):
    """A run with overflows resumed at any step is the run that was never stopped."""

    def build():
        step_fn, state = start(form, optimizer=ADAMW)
        return {"step_fn": step_fn, "state": state, "data": Replayed()}

    class Replayed:
        def at(self, position):
            return iter(overflowing(6, 1, 2)[position:])

    final = assert_resume_exact(build, num_steps=5)
    assert entry(final) == (INITIAL_SCALE / 4, 2)


def test_gradients_of_several_dtypes_are_unscaled():
    """Float32, float64 and half gradients are divided exactly by a power of two; inf and nan stay."""
    dtypes = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
    grads = [torch.tensor([8.0, -0.0, math.inf, math.nan], dtype=dtype) for dtype in dtypes]
    unscale_(grads, torch.tensor(4.0))
    for grad, dtype in zip(grads, dtypes, strict=True):
        assert grad.dtype == dtype
        assert ft.core.tree.bitwise_equal(grad.double(), torch.tensor([2.0, -0.0, math.inf, math.nan]).double())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_only_fp16_has_a_scale(precision):
    """Other precisions report none and leave `extra` alone."""
    step_fn, state = start(precision=precision, extra={"mine": 1})
    state = step_fn(state, batches("mlp", 1)[0])
    assert dict(state.extra) == {"mine": 1} and "loss_scale" not in state.metrics
    assert loss_scale({}, torch.device("cpu"))["scale"] == INITIAL_SCALE


@FORMS
@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_autocast_keeps_no_cast_of_old_weights(precision, accumulate, form):
    """Each step is that of a fresh start from its state: no cast weight outlives an update, in a caller's autocast too."""
    step_fn, state = start(form, precision=precision, accumulate=accumulate)
    data = batches("mlp", 3)
    for batch in data:
        fresh, _ = start(precision=precision, accumulate=accumulate)
        expected = fresh(ft.snapshot(state), batch)
        state = step_fn(state, batch)
        assert_states_equal(state, expected)
    assert {param.dtype for param in state.params.values()} == {torch.float32}
    assert not torch.is_autocast_enabled("cpu")


def under(form, precision, outer):
    """The state after three steps and what an evaluation between them saw, all in a caller's autocast."""
    step_fn, state = start(form, precision=precision)
    model = step_fn.step.model if hasattr(step_fn, "step") else step_fn.model
    seen = []
    with outer:
        for batch in batches("mlp", 3):
            state = step_fn(state, batch)
            with ft.bound(model, state), torch.autocast("cpu", torch.bfloat16):
                seen.append(model(batch).detach().float())
    return seen, ft.snapshot(state)


@FORMS
@pytest.mark.parametrize("enabled", [False, True])
def test_a_caller_s_autocast_keeps_no_cast_either(enabled, form, monkeypatch):
    """Steps and evaluations inside one context of the caller's, which alone would clear the cache, see the new weights."""
    outer = torch.autocast("cpu", torch.bfloat16, enabled=enabled)
    seen, state = under(form, "bf16", outer)
    expected, final = under(form, "bf16", nullcontext())
    assert_states_equal(state, final)
    assert ft.core.tree.bitwise_equal(seen, expected)
    monkeypatch.setattr(torch, "clear_autocast_cache", lambda: None)  # and the test notices
    stale, wrong = under(form, "bf16", outer)
    assert not ft.core.tree.bitwise_equal(stale, expected)
    assert not same(wrong.params, final.params)


@FORMS
def test_tf32_on_a_cpu_is_refused(form):
    """The error names the device and what to use instead, and nothing of torch or the state has changed."""
    step_fn, state = start(form, precision="tf32")
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, ft.digest(state)
    with pytest.raises(ValueError, match="'tf32' is a mode of NVIDIA GPUs, the model is on cpu; use 'fp32' or 'bf16'"):
        step_fn(state, batches("mlp", 1)[0])
    assert (torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32, ft.digest(state)) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"precision": "float16"}, r"precision: got 'float16', expected one of \('fp32', 'tf32', 'bf16', 'fp16'\)"),
        ({"precision": None}, "precision: got None"),
        ({"on_nonfinite": "allow"}, "on_nonfinite: got 'allow' with precision 'fp16', expected 'skip'"),
        ({"on_nonfinite": "raise"}, "on_nonfinite: got 'raise' with precision 'fp16', expected 'skip'"),
    ],
)
def test_what_can_t_be_is_refused(options, message):
    """A precision that is none, and fp16 without skipping, by which its scale is found."""
    with pytest.raises(ValueError, match=message):
        start(**options)
    assert set(PRECISIONS) == {"fp32", "tf32", "bf16", "fp16"}
