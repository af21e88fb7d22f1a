"""fntrain: a functional minimal-core training library for PyTorch.

Training is a pure fold, state_n = reduce(step_fn, batches, state_0), over a step function
`(TrainState, batch) -> TrainState` on immutable records; everything else is built around that line.
"""

from fntrain import data, events, hooks, schedules, shell, writers
from fntrain.batch import num_samples, split_batch
from fntrain.cli import main
from fntrain.config import Config, scale_config, to_dict
from fntrain.errors import (
    CheckpointError,
    ConfigError,
    DataExhaustedError,
    FntrainError,
    GraphError,
    LaunchError,
    MissingExtraError,
    NonFiniteError,
    ReplicaError,
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
from fntrain.predictor import Predictor, predictor
from fntrain.recipe import Job, Recipe, Result, build, default_hooks, run
from fntrain.rng import fold_in, preserved_generators, seed_generators
from fntrain.shell.checkpoint import latest, load, resume_or, save
from fntrain.shell.params import export, load_params
from fntrain.state import Run, StepFn, Stop, TrainState, digest, named_leaves, remember, snapshot, stop
from fntrain.step import SupervisedStep, supervised_step

__all__ = [
    "CheckpointError",
    "Config",
    "ConfigError",
    "DataExhaustedError",
    "Evaluation",
    "FntrainError",
    "GraphError",
    "History",
    "Hook",
    "Job",
    "LaunchError",
    "MissingExtraError",
    "NonFiniteError",
    "Optimizer",
    "Predictor",
    "Recipe",
    "ReplicaError",
    "Result",
    "Run",
    "StateConsumedError",
    "StepFn",
    "Stop",
    "SupervisedStep",
    "TrainState",
    "at_end",
    "between",
    "bound",
    "build",
    "compose",
    "data",
    "default_hooks",
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
    "main",
    "name_scope",
    "named_leaves",
    "num_samples",
    "on_main",
    "optimizer",
    "predictor",
    "preserved_generators",
    "put_histogram",
    "put_image",
    "put_scalar",
    "put_scalars",
    "put_text",
    "remember",
    "resource",
    "resume_or",
    "run",
    "save",
    "scale_config",
    "schedules",
    "seed_generators",
    "shell",
    "snapshot",
    "split_batch",
    "stateful",
    "states",
    "stop",
    "supervised_step",
    "to_dict",
    "weighted",
    "when",
    "writers",
]
