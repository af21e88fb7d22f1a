"""Deliberately broken implementations: each law is run against one, to show that it can fail."""

from types import SimpleNamespace

import attrs
import torch

import fntrain as ft
from fntrain.shell.steps.in_place import Donated, run
from fntrain.shell.steps.memory import Memory
from fntrain.shell.steps.writing import Writing
from fntrain.steps.body import Body


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


class MemoryThatKeepsBuffers(Memory):
    """Forgets to put back what the forward of a skipped step wrote to buffers."""

    def writing(self, **how):
        class Keeping(Writing):
            def end(self, *, keep_buffers):
                super().end(keep_buffers=True)

        return Keeping(self, **{"runs": True, **how})


class MemoryThatIgnoresOtherStates(Memory):
    """Goes on from its own memory whatever state it is given."""

    def adopt(self, state):
        return state


class MemoryThatKeepsGradients(Memory):
    """Adds the gradients of every step to those of the one before."""

    def writing(self, **how):
        params = self.body.slots.params

        def kept(change):
            grads = {name: param.grad for name, param in params.items()}
            change()
            for name, param in params.items():
                param.grad = grads[name]

        class Keeping(Writing):
            def begin(self):
                kept(super().begin)

            def end(self, **how):
                kept(lambda: super(Keeping, self).end(**how))

        return Keeping(self, **{"runs": True, **how})


class MemoryThatKeepsItsLease(Memory):
    """Hands out states whose memory is written to without a word."""

    def advanced(self, state, changes):
        new = super().advanced(state, changes)
        return new.replace(params=self.params, buffers=self.buffers, opt_state=self.opt_state)


class MemoryThatTrustsLeases(Memory):
    """Takes a state on lease for its own memory, wherever the module lies now."""

    def adopt(self, state):
        if all(self.home.leased(getattr(state, field), field) for field in ("params", "buffers")):
            self.follow_params()
            return state
        return super().adopt(state)


def donated(memory, step):
    """The donated form of a step on a memory of this kind."""
    return Donated(memory(step.body), run, step)


class BodyThatClipsScaledGradients(Body):
    """Clips before the loss scale is divided out."""

    def _reduced(self, totals, scale):
        torch.nn.utils.clip_grad_norm_(list(self.slots.params.values()), self.settings.clip_grad_norm)
        return super()._reduced(totals, scale)


def step_that_clips_scaled_gradients(*args, **options):
    """A supervised step with that body."""

    step = ft.supervised_step(*args, **options)
    parts = {field.name: getattr(step.body, field.name) for field in attrs.fields(Body)}
    made = BodyThatClipsScaledGradients(**parts)

    def broken(state, batch):
        return ft.SupervisedStep.__call__(SimpleNamespace(body=made), state, batch)

    return broken
