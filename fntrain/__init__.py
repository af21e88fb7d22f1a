"""fntrain: a functional minimal-core training library for PyTorch.

Training is a pure fold, state_n = reduce(step_fn, batches, state_0), over a step function
`(TrainState, batch) -> TrainState` on immutable records; everything else is built around that line.
"""

from fntrain import data, events, hooks, schedules, shell, writers
from fntrain.batch import num_samples, split_batch
from fntrain.errors import (
    CheckpointError,
    DataExhaustedError,
    FntrainError,
    GraphError,
    MissingExtraError,
    NonFiniteError,
    StateConsumedError,
)
from fntrain.evaluation import Evaluation, evaluation
from fntrain.events import name_scope, put_histogram, put_image, put_scalar, put_scalars, put_text
from fntrain.fold import fit, states
from fntrain.gates import at_end, between, every, first, on_main, when
from fntrain.history import History
from fntrain.hook import Hook, compose, hook, identity, resource, stateful
from fntrain.loss import weighted
from fntrain.module import bound, init_state, load_into
from fntrain.optim import Optimizer, group, optimizer
from fntrain.rng import fold_in, preserved_generators, seed_generators
from fntrain.shell.checkpoint import latest, load, resume_or, save
from fntrain.shell.params import export, load_params
from fntrain.state import Run, StepFn, Stop, TrainState, digest, named_leaves, remember, snapshot, stop
from fntrain.step import SupervisedStep, supervised_step

__all__ = [
    "CheckpointError",
    "DataExhaustedError",
    "Evaluation",
    "FntrainError",
    "GraphError",
    "History",
    "Hook",
    "MissingExtraError",
    "NonFiniteError",
    "Optimizer",
    "Run",
    "StateConsumedError",
    "StepFn",
    "Stop",
    "SupervisedStep",
    "TrainState",
    "at_end",
    "between",
    "bound",
    "compose",
    "data",
    "digest",
    "evaluation",
    "events",
    "every",
    "export",
    "first",
    "fit",
    "fold_in",
    "group",
    "hook",
    "hooks",
    "identity",
    "init_state",
    "latest",
    "load",
    "load_into",
    "load_params",
    "name_scope",
    "named_leaves",
    "num_samples",
    "on_main",
    "optimizer",
    "preserved_generators",
    "put_histogram",
    "put_image",
    "put_scalar",
    "put_scalars",
    "put_text",
    "remember",
    "resource",
    "resume_or",
    "save",
    "schedules",
    "seed_generators",
    "shell",
    "snapshot",
    "split_batch",
    "stateful",
    "states",
    "stop",
    "supervised_step",
    "weighted",
    "when",
    "writers",
]
