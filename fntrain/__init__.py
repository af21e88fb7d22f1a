"""fntrain: a functional minimal-core training library for PyTorch.

Training is a pure fold, state_n = reduce(step_fn, batches, state_0), over a step function
`(TrainState, batch) -> TrainState` on immutable records; everything else is built around that line.
"""

from typing import TYPE_CHECKING

from fntrain import data, events, hooks, schedules, shell, writers
from fntrain.core.errors import (
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
from fntrain.core.fold import fit, states
from fntrain.core.gates import at_end, between, every, first, on_main, when
from fntrain.core.hook import Hook, Needs, compose, hook, identity, resource, stateful
from fntrain.core.rng import fold_in, preserved_generators, seed_generators
from fntrain.core.state import Run, StepFn, Stop, TrainState, digest, named_leaves, remember, snapshot, stop
from fntrain.core.wrapping import wrap
from fntrain.evaluation import Evaluation, evaluation
from fntrain.events import name_scope, put_histogram, put_image, put_scalar, put_scalars, put_text
from fntrain.lazy import exported_later
from fntrain.shell.checkpoints.resume import resume_or
from fntrain.shell.checkpoints.save_load import latest, load, save
from fntrain.steps.batch import num_samples, split_batch
from fntrain.steps.loss import weighted
from fntrain.steps.module import bound, init_state, load_into
from fntrain.steps.optim import Optimizer, group, optimizer
from fntrain.steps.supervised import SupervisedStep, supervised_step
from fntrain.writers.history import History

if TYPE_CHECKING:
    from fntrain.jobs.cli import main
    from fntrain.jobs.config import Config, scale_config, to_dict
    from fntrain.jobs.defaults import default_hooks
    from fntrain.jobs.job import Job, Result
    from fntrain.jobs.predictor import Predictor, predictor
    from fntrain.jobs.recipe import Recipe, build, run
    from fntrain.shell.weights.export import export
    from fntrain.shell.weights.load import load_params

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
    "Needs",
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
    "wrap",
    "writers",
]

__getattr__ = exported_later(
    globals(),
    {
        "Config": "fntrain.jobs.config",
        "Job": "fntrain.jobs.job",
        "Predictor": "fntrain.jobs.predictor",
        "Recipe": "fntrain.jobs.recipe",
        "Result": "fntrain.jobs.job",
        "build": "fntrain.jobs.recipe",
        "default_hooks": "fntrain.jobs.defaults",
        "export": "fntrain.shell.weights.export",
        "load_params": "fntrain.shell.weights.load",
        "jobs": "fntrain.jobs",
        "main": "fntrain.jobs.cli",
        "predictor": "fntrain.jobs.predictor",
        "run": "fntrain.jobs.recipe",
        "scale_config": "fntrain.jobs.config",
        "to_dict": "fntrain.jobs.config",
    },
)


def __dir__() -> list[str]:
    return __all__
