"""Names that every docstring example may use."""

import pytest
import torch

import fntrain as ft


@pytest.fixture(autouse=True)
def _doctest_names(doctest_namespace):
    doctest_namespace["torch"] = torch
    doctest_namespace["ft"] = ft
