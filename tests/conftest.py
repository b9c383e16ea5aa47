"""What all tests share: one thread, a fixed seed, the modules of the book's pages, and a few fixtures."""

import sys
from pathlib import Path

import pytest
import torch
from common import without_classifier

from svae_lib import data

sys.path.insert(0, str(Path(__file__).parent.parent / "book" / "_ext"))
torch.set_num_threads(1)  # the tests' nets are too small to share


@pytest.fixture(autouse=True)
def seeded():
    """A test draws the same numbers alone and after others."""
    torch.manual_seed(0)


@pytest.fixture
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture
def no_classifier(monkeypatch):
    without_classifier(monkeypatch)


@pytest.fixture(scope="session")
def ring():
    return data.load("ring8")
