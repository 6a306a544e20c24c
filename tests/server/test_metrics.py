"""Figures for Prometheus, on both sides: what docs/metrics.md says is what is exported, and it parses."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from helpers_view import HOSTILE, hostile, run_view, save, store_with_runs, view
from sordino_agent import metrics as agent_metrics
from sordino_agent.budget import BudgetSpec, Spent
from sordino_agent.status import DatasetStatus, Status
from sordino_common.privacy.mechanism import Mechanism
from sordino_server.dashboard import metrics as server_metrics
from sordino_server.store import RunStore

DOCS = Path(__file__).parents[2] / "docs" / "metrics.md"
ROW = re.compile(r"^\| `(sordino_\w+)` \| (\w+) \| ([^|]*) \| ([^|]+) \|$", re.MULTILINE)

STATUS = Status(
    name="pi-01", fleet="lab", server="server", version="0.1.0", state="running", pid=7, boot=3, started_s=1.7e9,
    updated_s=1.7e9 + 5, connected=True, connection="", server_online=False, roster_epoch=4, executor="numpy",
    worker_pid=None, running=("train r-1 round 3",), tasks_done=12, tasks_failed=1, refusals=2, plans=3,
    store_used_bytes=100, resident_bytes=36_000_000, bytes_sent=10, bytes_received=20,
    datasets=(DatasetStatus(name="ward", train_rows=40, test_rows=10),), datasets_unreadable=("old",),
)  # fmt: skip
BUDGETS = {"ward": BudgetSpec(epsilon=2.0, delta=1e-6), "untouched": BudgetSpec(rho=0.5, delta=1e-5)}


def mechanism(**fields: int) -> Mechanism:
    return Mechanism(unit="record", sensitivity_squared=100, sigma_squared=40_000, count=1, **fields)


def agent_text() -> str:
    spent = {
        ("ward", "train", "record"): Spent().plus(mechanism(), 3),
        ("free", "train", "record"): Spent().plus(mechanism(sampling_threshold=1 << 30), 2),
    }
    return agent_metrics.exposition(STATUS, spent, BUDGETS)  # type: ignore[arg-type]


def documented(start: str) -> dict[str, tuple[str, frozenset[str], str]]:
    part = DOCS.read_text().split(f"## {start}")[1].split("\n## ")[0]
    rows = ROW.findall(part)
    return {name: (kind, frozenset(re.findall(r"`(\w+)`", labels)), text) for name, kind, labels, text in rows}


def exported(texts: Iterable[str]) -> dict[str, tuple[str, frozenset[str], str]]:
    found: dict[str, tuple[str, frozenset[str], str]] = {}
    for text in texts:
        for family in text_string_to_metric_families(text):
            name = family.name + "_total" * (family.type == "counter")
            labels = frozenset(label for sample in family.samples for label in sample.labels)
            found[name] = (
                family.type,
                labels | (found[name][1] if name in found else frozenset()),
                family.documentation,
            )
    return found


def test_the_servers_table_is_what_is_exported() -> None:
    heard = msgspec.structs.replace(view(), births="connected")
    assert exported([server_metrics.exposition(heard).decode()]) == documented("On the server")


def test_the_agents_table_is_what_is_exported() -> None:
    assert exported([agent_text()]) == documented("On a device")


def test_figures_of_the_server() -> None:
    lines = server_metrics.exposition(view(200)).decode().splitlines()
    for line in (
        'sordino_agents{state="answered"} 195.0',
        'sordino_agents{state="refused"} 1.0',
        'sordino_runs{status="done"} 4.0',
        "sordino_rounds_total 112.0",
        "sordino_round_seconds_sum 220.5",
        "sordino_round_seconds_count 112.0",
        'sordino_round_answers_total{outcome="missing"} 110.0',
        'sordino_round_bytes_total{direction="up"} 5e+06',
        'sordino_run_round{job="ward-model"} 13.0',
        'sordino_run_awaited_agents{job="ward-model"} 3.0',
        'sordino_privacy_epsilon_spent{dataset="ward",unit="record"} 0.93',
        'sordino_run_metric{job="ward-model",metric="test_mse"} 5.454545454545454',
    ):
        assert line in lines, line
    quiet = server_metrics.exposition(view(0, runs=(run_view("done"),), roster_epoch=None, roster_expires_s=None))
    assert b"sordino_run_" not in quiet and b"sordino_roster" not in quiet


def test_series_do_not_grow_with_the_fleet_and_hostile_text_stays_a_value() -> None:
    few, many = (server_metrics.exposition(view(n)).count(b"\n") for n in (10, 2000))
    assert few == many
    families = list(text_string_to_metric_families(server_metrics.exposition(hostile()).decode()))
    values = {value for family in families for sample in family.samples for value in sample.labels.values()}
    assert HOSTILE in values
    assert {family.name for family in families} <= {name.removesuffix("_total") for name in server_metrics.METRICS}


def test_totals_are_of_all_runs(tmp_path: Path) -> None:
    with store_with_runs(tmp_path) as store:
        assert store.totals()["rounds"] == 0
        save(store, "r-1", 1, "ada", "bob")
        save(store, "r-2", 1, "ada")
        assert store.totals() == {
            "rounds": 2, "seconds": 1.0, "bytes_up": 20, "bytes_down": 40, "answers": {"answered": 3, "missing": 2}
        }  # fmt: skip
    assert RunStore(tmp_path, wall_s=lambda: 1.0, read_only=True).totals()["rounds"] == 2


def test_figures_of_an_agent() -> None:
    lines = agent_text().splitlines()
    for line in (
        'sordino_agent_info{version="0.1.0",executor="numpy",fleet="lab"} 1.0',
        'sordino_agent_state{state="running"} 1.0',
        "sordino_agent_connected 1.0",
        "sordino_agent_server_online 0.0",
        "sordino_agent_roster_epoch 4.0",
        'sordino_agent_tasks_total{outcome="failed"} 1.0',
        'sordino_agent_dataset_rows{dataset="ward",split="test"} 10.0',
        'sordino_agent_budget_epsilon_limit{dataset="ward",split="train",unit="record"} 2.0',
        'sordino_agent_budget_rho_spent{dataset="untouched",split="train",unit="record"} 0.0',
    ):
        assert line in lines, line
    (rho,) = [line for line in lines if line.startswith('sordino_agent_budget_rho_spent{dataset="ward"')]
    assert float(rho.split()[-1]) == pytest.approx(3 * 100 / (2 * 40_000))
    assert not [line for line in lines if line.startswith('sordino_agent_budget_rho_spent{dataset="free"')]  # sampled


def test_an_agents_labels_are_escaped_and_the_file_is_whole(tmp_path: Path) -> None:
    odd = msgspec.structs.replace(STATUS, version='1"\\\n2', datasets=None)
    text = agent_metrics.exposition(odd, {}, {})
    (info,) = [f for f in text_string_to_metric_families(text) if f.name == "sordino_agent_info"]
    assert info.samples[0].labels["version"] == '1"\\\n2'
    path = tmp_path / "sordino.prom"
    for _ in range(2):
        agent_metrics.write_metrics(path, text)
        assert path.read_text() == text and path.stat().st_mode & 0o777 == 0o644
    assert [entry.name for entry in tmp_path.iterdir()] == ["sordino.prom"]
