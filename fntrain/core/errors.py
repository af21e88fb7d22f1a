"""Errors of fntrain that a caller may want to catch by kind; wrong values and kinds raise ValueError and TypeError."""


class FntrainError(Exception):
    """Base of the errors below."""


class ConfigError(FntrainError, ValueError):
    """A setting that can't be, or does not go with another one or with this machine; the message names it."""


class DataExhaustedError(FntrainError):
    """The data ended before `max_steps`; the message says how many batches it gave."""


class CheckpointError(FntrainError):
    """A checkpoint is missing, damaged, of another model, or cannot be written; the message names file and leaf."""


class NonFiniteError(FntrainError, FloatingPointError):
    """Loss or gradients were inf or nan under `on_nonfinite="raise"`; the message names them and the step."""


class GraphError(FntrainError, RuntimeError):
    """A step can't be captured as a CUDA graph; the message says why and what to do."""


class StateConsumedError(FntrainError, RuntimeError):
    """A state was used after a step run in place wrote to its memory; the message names both steps."""


class MissingExtraError(FntrainError, ImportError):
    """A feature needs a package of an optional extra; the message names the extra."""


class LaunchError(FntrainError, RuntimeError):
    """A process of a launched job failed; the message has its rank, its traceback, and what the others said."""


class ReplicaError(FntrainError, RuntimeError):
    """Ranks that should hold the same state do not; the message names the leaf and the rank."""


for _error in [FntrainError, *FntrainError.__subclasses__()]:
    _error.__module__ = "fntrain"  # tracebacks show the name under which a caller imports and catches it
