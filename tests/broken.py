"""Deliberately broken implementations: each law is run against one, to show that it can fail."""

import torch

import fntrain as ft
from fntrain.shell.steps.in_place import InPlace


def step_that_writes_to_the_old_state(step_fn):
    def broken(state, batch):
        new = step_fn(state, batch)
        with torch.no_grad():
            next(iter(state.params.values())).add_(1e-3)
        return new

    return broken


def step_that_draws_from_the_outside(step_fn):
    def broken(state, batch):
        noise = torch.rand(())
        new = step_fn(state, batch)
        return new.replace(params={name: value + noise for name, value in new.params.items()})

    return broken


def step_with_hidden_memory(step_fn):
    calls = []

    def broken(state, batch):
        calls.append(None)
        new = step_fn(state, batch)
        return new.replace(params={name: value * (1 + len(calls) / 100) for name, value in new.params.items()})

    return broken


def accumulate_mean_of_means(step_fn, num):
    """Averages micro-batch losses without their sizes."""

    def broken(state, batch):
        parts = ft.split_batch(batch, num)

        def loss_fn(model, _):
            return sum(step_fn.loss_fn(model, part) for part in parts) / len(parts)

        return ft.supervised_step(step_fn.model, loss_fn, step_fn.optimizer)(state, batch)

    return broken


def update_by_position(optimizer, params, grads, opt_state, step):
    """Gives every parameter the optimizer state of its neighbour, as state kept by position does after a reorder."""
    names = list(opt_state)
    shifted = dict(zip(names, [opt_state[name] for name in names[1:] + names[:1]], strict=True))
    return optimizer.update(params, grads, shifted, step=step)


def at_most_every(n, hook):
    """A gate that counts its own calls instead of looking at the step."""
    calls = []

    def after_step(state):
        calls.append(None)
        return hook.after_step(state) if len(calls) % n == 0 else None

    return ft.hook(after_step=after_step)


class InPlaceThatKeepsBuffers(InPlace):
    """Forgets to put back what the forward of a skipped step wrote to buffers."""

    def end(self, before, **how):
        super().end(before, **{**how, "keep_buffers": True})


class InPlaceThatIgnoresOtherStates(InPlace):
    """Goes on from its own memory whatever state it is given."""

    def own(self, state):
        return state


class InPlaceThatKeepsGradients(InPlace):
    """Adds the gradients of every step to those of the one before."""

    def begin(self):
        kept = {name: param.grad for name, param in self.step.slots.params.items()}
        before = super().begin()
        for name, param in self.step.slots.params.items():
            param.grad = kept[name]
        return before

    def end(self, before, **how):
        kept = {name: param.grad for name, param in self.step.slots.params.items()}
        super().end(before, **how)
        for name, param in self.step.slots.params.items():
            param.grad = kept[name]


class InPlaceThatKeepsItsLease(InPlace):
    """Hands out states whose memory is written to without a word."""

    def __call__(self, state, batch):
        new = super().__call__(state, batch)
        return new.replace(params=self.params, buffers=self.buffers, opt_state=self.opt_state)


class StepThatClipsScaledGradients(ft.SupervisedStep):
    """Clips before the loss scale is divided out."""

    def _reduced_leaves(self, parts, scale=None, totals=None):
        torch.nn.utils.clip_grad_norm_(list(self.slots.params.values()), self.clip_grad_norm)
        return super()._reduced_leaves(parts, scale, totals)
