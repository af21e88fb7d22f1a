"""Ranks for the tests of several processes."""

from pathlib import Path

import pytest
from pool import Pool

_pools = {}


def pytest_collection_modifyitems(items):
    """Processes start slowly where others share the machine: a limit against hangs, not on speed."""
    here = Path(__file__).parent
    for item in items:
        of_ranks = item.path.parent in (here / "distributed", here / "launching")
        if of_ranks and item.get_closest_marker("timeout") is None:
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
