"""Shared fixtures: small adapters of every dialect, the corpus, hypothesis profiles."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50)
settings.register_profile("long", deadline=None, max_examples=2000)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))

CORPUS = Path(__file__).parent.parent.parent / "shared" / "corpus"


@pytest.fixture(scope="session")
def corpus() -> Path:
    """Real adapters beside the checkout; tests that need them skip where there are none."""
    if not CORPUS.is_dir():
        pytest.skip("no corpus of real adapters beside this checkout")
    return CORPUS
