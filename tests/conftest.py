"""Guards around every test: what it leaves behind in the process is a failure."""

import logging
import multiprocessing
import os
import threading

import pytest
import torch

BY_OTHERS = (
    "PYTEST_",
    "TORCHINDUCTOR_",
    "TRITON_",
    "KMP_",
)  # set by pytest, by torch when it loads dynamo, by scikit-learn


def pytest_collection_modifyitems(items):
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = {k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k)}
    assert {name for name in changed if not name.startswith(BY_OTHERS)} == set()
    assert [t for t in threading.enumerate() if t not in threads and not t.daemon and t.is_alive()] == []
    children = [one.name for one in multiprocessing.active_children()]
    assert [name for name in children if not name.startswith("ranks-of-tests")] == []  # those of tests/distributed
    assert not torch.distributed.is_initialized()


@pytest.fixture(autouse=True)
def _the_log_is_as_imported():
    """Tests, and docstring examples before them, call setup, which sets the level and the handlers of the log."""
    _reset_log()
    yield
    _reset_log()


def _reset_log():
    log = logging.getLogger("fntrain")
    log.setLevel(logging.NOTSET)
    log.propagate, log.disabled = True, False
    for handler in list(log.handlers):
        log.removeHandler(handler)
        handler.close()
