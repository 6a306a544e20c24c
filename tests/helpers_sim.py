"""Small jobs for the simulator's tests: Boston Housing, few rounds, quick to trace."""

from __future__ import annotations

from pathlib import Path

from sordino_server.job import Job, load_job

EXAMPLES = Path(__file__).parents[1] / "examples"

# Short waits: virtual time costs nothing, but a test that waits for a deadline should say which.
QUICK = (
    "train.rounds=4",
    "train.local_epochs=1",
    "model.args.hidden=[8]",
    "train.round_deadline_s=30",
    "train.straggler_s=5",
    "train.join_s=5",
)


def boston(*overrides: str) -> Job:
    """A quick Boston job with `overrides` on top."""
    return load_job(EXAMPLES / "boston-fedavg.yaml", overrides=(*QUICK, *overrides))


QUICK_SHARES = (
    "train.rounds=2",
    "train.local_epochs=null",
    "train.local_steps=6",
    "train.batch_rows=8",
    "model.args.hidden=[4]",
    "train.round_deadline_s=30",
    "train.join_s=5",
    "spdz.check_every=2",
    "spdz.silence_s=20",
    "simulation.agents=4",
)


def boston_shares(*overrides: str) -> Job:
    """A quick Boston job on secret shares with `overrides` on top."""
    return load_job(EXAMPLES / "boston-spdz.yaml", overrides=(*QUICK_SHARES, *overrides))


def write_faults(folder: Path, *lines: str) -> Path:
    """A fault file of flow mappings, one a line."""
    path = folder / "faults.yaml"
    path.write_text("faults:\n" + "".join(f"  - {{{line}}}\n" for line in lines))
    return path


QUICK_SECURE = (*QUICK, "train.rounds=2", "simulation.agents=8")


def boston_secure(*overrides: str) -> Job:
    """A quick Boston job over secure sums with `overrides` on top."""
    return load_job(EXAMPLES / "boston-secure.yaml", overrides=(*QUICK_SECURE, *overrides))
