"""Ranks for the tests of this directory."""

import pytest
from pool import Pool

_pools = {}


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
