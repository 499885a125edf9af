"""Shared fixtures: small adapters of every dialect, the corpus, hypothesis profiles."""

from __future__ import annotations

import fcntl
import os
import subprocess
import sys
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


@pytest.fixture(scope="session")
def smollm2(tmp_path_factory) -> Path:
    """The examples' base model as a bfloat16 checkpoint, made once for all workers."""
    folder = tmp_path_factory.getbasetemp()
    folder = folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder
    made, draft = folder / "smollm2", folder / "smollm2-draft"
    with (folder / "smollm2.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not made.exists():
            script = Path(__file__).parent.parent / "examples" / "smollm2.py"
            command = [sys.executable, "-W", "ignore", script, draft, "bfloat16"]
            subprocess.run(command, check=True, capture_output=True)
            draft.rename(made)
    return made
