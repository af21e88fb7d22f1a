"""ft.save of the state that ft.fit returned, by all ranks, as the README says."""

import jobs
import pytest

import fntrain as ft


def trained(strategy):
    step_fn, start, data = jobs.parts()
    return ft.fit(ft.shell.distribute(step_fn, strategy), [], state=start, data=data, max_steps=2)


def save_twice(strategy, directory):
    """Paths, and what each rank finds there as soon as its call returns; the second save replaces the first."""
    final = trained(strategy)
    return [(str(path), ft.digest(ft.load(path))) for path in (ft.save(final, directory) for _ in range(2))]


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_all_ranks_save_one_checkpoint(ranks, tmp_path, strategy):
    """None is refused because another holds the directory, and none returns before the checkpoint is on the disk."""
    first, other = ranks(2)(save_twice, strategy, tmp_path)
    assert first == other
    assert len(set(first)) == 1
    assert [path.name for path in tmp_path.glob("[!.]*")] == ["step_00000002"]


def refused(strategy, directory):
    try:
        ft.save(trained(strategy), directory)
    except ft.CheckpointError as error:
        return str(error)


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_save_that_fails_on_the_first_rank_is_an_error_on_all(ranks, tmp_path, strategy):
    """The directory's name is taken by a file."""
    (tmp_path / "file").touch()
    first, other = ranks(2)(refused, strategy, tmp_path / "file")
    assert first == other
    assert "rank 0: " in first
    assert "can't be written to" in first
