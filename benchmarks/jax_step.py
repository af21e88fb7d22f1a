"""The MLP's training step in jax, for overhead.py: jax.jit of the whole of it, old state donated.

The same initial weights, batches, loss, schedule and AdamW as the other competitors. Dispatch is synchronous, or a
second thread would compute beside the first; batches are on jax's device before. XLA keeps its default threads: its own
switch for one thread, --xla_cpu_multi_thread_eigen=false, made this step 1.2 to 2.7 times slower where it was tried,
while `--pin 0`, which holds the whole process to one core, left it as fast as with two (44 against 46 us).
"""

import os
from importlib.util import find_spec
from itertools import cycle, islice
from typing import Any

import torch
from harness import OPTIONS, SCHEDULE, Case, Competitor, MissingError
from torch import Tensor


def jax_loop(case: Case) -> Competitor:
    if case.name != "mlp":
        raise MissingError("written for the MLP only")
    if find_spec("jax") is None:
        raise MissingError("not installed: pip install -e '.[bench]'")
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    import jax
    import jax.numpy as jnp
    import numpy as np

    jax.config.update("jax_cpu_enable_async_dispatch", False)
    decay, beta1, beta2, eps = OPTIONS["weight_decay"], 0.9, 0.999, 1e-8

    def loss_fn(params: Any, batch: Any) -> Any:
        (w1, b1, w2, b2), (inputs, targets) = params, batch
        logits = jnp.maximum(inputs @ w1.T + b1, 0) @ w2.T + b2
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[:, None], axis=1).mean()

    def step(state: Any, batch: Any, lr: Any) -> Any:
        count, params, first, second = state
        loss, grads = jax.value_and_grad(loss_fn)(params, batch)
        count = count + 1
        first = [beta1 * m + (1 - beta1) * g for m, g in zip(first, grads, strict=True)]
        second = [beta2 * v + (1 - beta2) * g * g for v, g in zip(second, grads, strict=True)]
        root = jnp.sqrt(1 - beta2**count)
        scale = lr / (1 - beta1**count)
        params = [
            p * (1 - lr * decay) - scale * m / (jnp.sqrt(v) / root + eps)
            for p, m, v in zip(params, first, second, strict=True)
        ]
        return (count, params, first, second), loss

    compiled = jax.jit(step, donate_argnums=0)
    params = [jnp.array(param.detach().numpy()) for param in case.model.parameters()]
    state: Any = (jnp.float32(0), params, [jnp.zeros_like(p) for p in params], [jnp.zeros_like(p) for p in params])
    batches = [(jnp.array(inputs.numpy()), jnp.array(targets.numpy())) for inputs, targets in case.batches]
    done = 0

    def run(steps: int) -> None:
        nonlocal state, done
        for batch in islice(cycle(batches), steps):
            state, _ = compiled(state, batch, SCHEDULE(done))
            done += 1
        jax.block_until_ready(state)

    def weights() -> list[Tensor]:
        return [torch.from_numpy(np.array(param)) for param in state[1]]

    return Competitor(run, weights)
