"""What a training process knows at this moment: a small file beside the run's checkpoints, replaced whole.

`runs/<run>/live.json` is for other processes to read. It is not fsynced: what must outlive a power cut is in the run
store, and this file is only about now. Names and texts in it came from devices; readers escape them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final, Literal

import msgspec

LIVE_FILE: Final = "live.json"
_MOST_BYTES: Final = 8 << 20  # 10,000 agents with a reason each
FORMAT: Final = 1

AgentState = Literal["offline", "idle", "awaited", "answered", "refused", "missing"]
Level = Literal["info", "warning"]


class Notice(msgspec.Struct, frozen=True, kw_only=True):
    """Something that a person wants to know. `at_s`: seconds since 1970."""

    at_s: float
    level: Level
    text: str


class AgentNow(msgspec.Struct, frozen=True, kw_only=True):
    """One agent as the training process sees it. `note`: why its last answer was none."""

    name: str
    state: AgentState
    note: str = ""


class WaitNow(msgspec.Struct, frozen=True, kw_only=True):
    """What is waited for, and for whom. Times in seconds since 1970."""

    purpose: str
    names: tuple[str, ...]
    have: int
    quorum: int
    since_s: float
    deadline_s: float


class Spending(msgspec.Struct, frozen=True, kw_only=True):
    """ε at `delta` of one `unit` by the `releases` that have begun."""

    unit: str
    epsilon: float
    delta: float
    releases: int


class Live(msgspec.Struct, frozen=True, kw_only=True):
    """A moment of a run. `state`: `running` in rounds, `comparing` with plain PyTorch after them, or how it ended.

    Bytes are of this process; those of finished rounds are in the run store. `warnings` counts all, `notices` has the
    last ones."""

    format: Literal[1] = FORMAT
    run: str
    job: str
    mode: str
    security: str
    dataset: str
    pid: int
    state: str
    error: str = ""
    started_s: float
    updated_s: float
    rounds: int
    round: int
    attempt: int
    connected: bool
    agents: tuple[AgentNow, ...]
    wait: WaitNow | None
    bytes_up: int
    bytes_down: int
    warnings: int
    notices: tuple[Notice, ...]
    spent: tuple[Spending, ...] = ()


def live_path(folder: Path, run: str) -> Path:
    """Of the run in the fleet directory `folder`."""
    return folder / "runs" / run / LIVE_FILE


def write_live(path: Path, live: Live) -> None:
    """Replace the file at once. Mode 0600, as the run records. Raises `OSError`."""
    draft = path.with_name(f".{path.name}.new")
    draft.unlink(missing_ok=True)
    draft.touch(mode=0o600)
    draft.write_bytes(msgspec.json.encode(live))
    draft.replace(path)


def read_live(path: Path) -> Live | None:
    """None if there is none: the run is older than this file, or of another version. Raises `OSError` otherwise."""
    try:
        with path.open("rb") as file:
            return msgspec.json.decode(file.read(_MOST_BYTES), type=Live)
    except FileNotFoundError:
        return None
    except msgspec.DecodeError:
        return None
