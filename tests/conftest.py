"""Guards around every test: what it leaves behind in the process is a failure."""

import multiprocessing
import os
import threading

import pytest
import torch


@pytest.fixture(autouse=True)
def _leaves_nothing_behind():
    environment, threads = dict(os.environ), set(threading.enumerate())
    yield
    changed = {k for k in environment.keys() | os.environ.keys() if environment.get(k) != os.environ.get(k)}
    assert changed <= {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # torch sets the latter when it loads dynamo
    assert [t for t in threading.enumerate() if t not in threads and not t.daemon and t.is_alive()] == []
    assert multiprocessing.active_children() == []
    assert not torch.distributed.is_initialized()
