"""Hands what a proof observed to its report, where `svae verify` reads it."""

import proof
import pytest
from torch.distributions import Distribution

from svae_lib.verify import Proof


@pytest.hookimpl(wrapper=True)
def pytest_runtest_call(item):
    result = yield
    silent = Proof("", item.name).equations and not proof.OBSERVED
    assert not silent, "a proof of an equation makes at least one of the statements of proof.py: the ledger shows these"
    return result


@pytest.fixture(autouse=True, scope="module")
def quick():
    """Thousands of small Gaussians: their arguments need not be validated each time."""
    Distribution.set_default_validate_args(False)
    yield
    Distribution.set_default_validate_args(True)


@pytest.fixture(autouse=True)
def observed(record_property):
    proof.OBSERVED.clear()
    yield
    worst = {}
    for kind, error in proof.OBSERVED:
        worst[kind] = max(error, worst.get(kind, 0.0))
    record_property("observed", worst)
