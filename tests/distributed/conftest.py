"""Ranks for the tests of this directory."""

from pathlib import Path

import pytest
from pool import Pool

_pools = {}


def pytest_collection_modifyitems(items):
    """Processes start slowly where others share the machine: a limit against hangs, not on speed."""
    for item in items:
        if item.path.is_relative_to(Path(__file__).parent) and item.get_closest_marker("timeout") is None:
            item.add_marker(pytest.mark.timeout(600))


@pytest.fixture(scope="session")
def _ending():
    yield
    for pool in _pools.values():
        pool.close()


@pytest.fixture
def ranks(_ending):
    """ranks(n)(fn, *args): what fn gave in each of n processes that form a process group."""

    def of(size):
        if size not in _pools or not _pools[size].alive:
            _pools[size] = Pool(size)
        return _pools[size].run

    return of
