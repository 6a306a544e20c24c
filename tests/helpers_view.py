"""Views of fleets that are, for the tests of whatever shows them: quiet, busy, broken, hostile."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Final

import msgspec

from sordino_server.dashboard.live import Notice, Spending, WaitNow
from sordino_server.dashboard.view import AgentView, DatasetView, Point, RunView, State, Totals, View
from sordino_server.rounds.effects import Checkpoint, Scaling
from sordino_server.rounds.events import RoundRecord, Share
from sordino_server.store import RunStore

NOW_S: Final = 1_700_000_000.0
HOSTILE: Final = '<script>alert("x")</script>\x1b[2J\n<img src=x onerror=alert(1)>&amp;"\''
LONG: Final = "a" * 63


def point(number: int, *, agents: int = 10, missing: int = 1) -> Point:
    return Point(
        round=number,
        loss=2.0 / number,
        metrics={"test_mse": 60.0 / number} if number % 2 else {},
        answered=agents - missing,
        asked=agents,
        bytes_up=40_000 + 500 * number,
        bytes_down=90_000,
        seconds=1.5 + 0.1 * (number % 4),
    )


def run_view(status: str = "running", *, rounds: int = 12, agents: int = 10, **fields: object) -> RunView:
    wait = WaitNow(
        purpose=f"round {rounds + 1}: training", names=tuple(f"agent-{k:03d}" for k in range(min(agents, 3))),
        have=max(0, agents - 3), quorum=max(1, agents // 2), since_s=NOW_S - 4.0, deadline_s=NOW_S + 56.0,
    )  # fmt: skip
    values: dict[str, object] = {
        "run": "ward-model-20231114-221320-ab12", "job": "ward-model", "mode": "federated", "dataset": "ward",
        "security": "secure aggregation, sums over 5 devices or more", "status": status, "error": "",
        "created_s": NOW_S - 600.0, "changed_s": NOW_S - 2.0, "round": rounds + (status == "running"), "rounds": 30,
        "points": tuple(point(k, agents=agents) for k in range(1, rounds + 1)),
        "wait": wait if status == "running" else None, "bytes_up": 1_234_567, "bytes_down": 7_654_321,
        "connected": status == "running", "warnings": 2, "uncounted": False, "silent_s": None,
        "spent": (Spending(unit="record", epsilon=0.31, delta=1e-5, releases=rounds),),
    }  # fmt: skip
    return RunView(**{**values, **fields})  # type: ignore[arg-type]


def view(agents: int = 10, *, runs: tuple[RunView, ...] | None = None, **fields: object) -> View:
    """A fleet in mid-round: most have answered, some are awaited, one is gone, one refuses."""

    def state(k: int) -> State:
        return "awaited" if k < 3 else "refused" if k == 3 else "offline" if k == 4 else "answered"

    members = tuple(
        AgentView(
            name=f"agent-{k:03d}", state=state(k), roles=("data",), zone=f"ward-{k % 4}", answered=11, asked=12,
            note="policy: this Plan is not in policy.plans" if k == 3 else "went offline" if k == 4 else "",
            version="0.1.0",
        )
        for k in range(agents)
    )  # fmt: skip
    notices = (
        Notice(at_s=NOW_S - 5.0, level="warning", text="round 12: without agent-003: policy: not in policy.plans"),
        Notice(at_s=NOW_S - 9.0, level="info", text="agent-004 is offline"),
    )
    values: dict[str, object] = {
        "fleet": "lab", "server": "server", "version": "0.1.0", "at_s": NOW_S, "roster_epoch": 3,
        "roster_expires_s": NOW_S + 200 * 86_400, "births": "", "agents": members,
        "runs": (run_view(agents=agents),) if runs is None else runs, "runs_by_status": {"running": 1, "done": 4},
        "datasets": (
            DatasetView(
                dataset="ward", unit="record", epsilon=0.93, delta=3e-5, releases=72, runs=3, uncounted=0
            ),
        ),
        "totals": Totals(
            rounds=112, seconds=220.5, bytes_up=5_000_000, bytes_down=9_000_000,
            answers={"answered": 1000, "missing": 110, "refused": 10},
        ),
        "notices": notices, "trouble": (),
    }  # fmt: skip
    return View(**{**values, **fields})  # type: ignore[arg-type]


def hostile(agents: int = 4) -> View:
    """Every text that comes from outside tries to be more than text."""
    whole = view(agents)
    wait = WaitNow(purpose=HOSTILE, names=(HOSTILE, LONG), have=0, quorum=1, since_s=NOW_S, deadline_s=NOW_S + 9)
    run = msgspec.structs.replace(
        run_view(), run=HOSTILE, job=HOSTILE, mode=HOSTILE, security=HOSTILE, error=HOSTILE, dataset=HOSTILE, wait=wait,
        points=tuple(msgspec.structs.replace(p, metrics={HOSTILE: 1.0}) for p in run_view().points),
    )  # fmt: skip
    return msgspec.structs.replace(
        whole, fleet=HOSTILE, births=HOSTILE, trouble=(HOSTILE,),
        runs=(run, msgspec.structs.replace(run, status="failed")),
        notices=tuple(msgspec.structs.replace(n, text=HOSTILE) for n in whole.notices),
        datasets=tuple(msgspec.structs.replace(d, dataset=HOSTILE) for d in whole.datasets),
        agents=tuple(
            msgspec.structs.replace(
                a, name=HOSTILE if k else LONG, note=HOSTILE, zone=HOSTILE, version=HOSTILE, roles=(HOSTILE,)
            )
            for k, a in enumerate(whole.agents)
        ),
    )  # fmt: skip


def store_with_runs(folder: Path) -> RunStore:
    store = RunStore(folder, wall_s=lambda: NOW_S)
    job = json.dumps({"data": {"dataset": "ward"}, "train": {"rounds": 9}, "privacy": {"epsilon": 1.0}})
    for run in ("r-1", "r-2", "r-3"):
        store.create(run, job="toy", mode="federated", job_path="", job_json=job, model_sha256="", names=())
    return store


def record(number: int, *names: str) -> RoundRecord:
    shares = {name: Share(outcome="answered") for name in names} | {"gone": Share(outcome="missing", note="offline")}
    return RoundRecord(
        round=number, loss=1.0 / number, metrics={"test_mse": 3.0}, shares=shares, steps=1, attempts=1, bytes_up=10,
        bytes_down=20, seconds=0.5,
    )  # fmt: skip


def save(store: RunStore, run: str, number: int, *names: str) -> None:
    checkpoint = Checkpoint(params=(), scaling=Scaling(), steps=1, record=record(number, *names))
    store.save(run, checkpoint, elapsed_s=1.0)
