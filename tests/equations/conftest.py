"""Hands what a proof observed to its report, where `svae verify` reads it."""

import proof
import pytest


@pytest.fixture(autouse=True)
def observed(record_property):
    proof.OBSERVED.clear()
    yield
    worst = {}
    for kind, error in proof.OBSERVED:
        worst[kind] = max(error, worst.get(kind, 0.0))
    record_property("observed", worst)
