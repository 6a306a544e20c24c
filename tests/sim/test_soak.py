"""Memory over many rounds stays flat. `make soak` plays 100 agents and 1,000 rounds; `make test` a sample."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "soak.py"
FULL = os.environ.get("SORDINO_SOAK") == "1"


@pytest.mark.soak
@pytest.mark.timeout(7200)
@pytest.mark.parametrize("mode", ["plain", "secure"] if FULL else ["secure"])
def test_memory_is_flat(mode: str) -> None:
    """In a process of its own, so that nothing of other tests is in it. Objects are counted: what leaks one object per
    agent and round, as cancelled timers once did and answers of past rounds, is beyond the bound; resident memory also
    sees what is not of Python. Lifted deadlines are tidied up many at once, and agents restart one after the other: the
    second half of the rounds has to span both, or the line is laid through one tooth of a saw."""
    agents, rounds = (100, 1000) if FULL else (6, 240)
    command = [sys.executable, str(SCRIPT), "--agents", str(agents), "--rounds", str(rounds), "--json"]
    command += ["--secure"] if mode == "secure" else []
    done = subprocess.run(command, capture_output=True, text=True, timeout=7000, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["slope_objects_per_round"] < 0.5 * agents, found["points"]
    assert found["growth_of_second_half"] < (0.02 if FULL else 0.01), found["points"]
    assert len(found["points"]) >= 20
