"""Deliberately broken implementations: each law is run against one, to show that it can fail."""

import torch

import fntrain as ft


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
