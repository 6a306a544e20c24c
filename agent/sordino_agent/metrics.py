"""The agent's figures for Prometheus, as a file for node_exporter's textfile collector (`metrics_file`).

A file, not a port: the agent listens nowhere, needs no package more and wakes for nobody. It is written beside the
status file, at the same moments, whole under another name and then renamed. docs/metrics.md has the table of all names.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Final, Literal

from sordino_agent.budget import BudgetSpec, Spent
from sordino_agent.ledger import Account
from sordino_agent.status import Status
from sordino_common.privacy.rdp import epsilon_of

DEFAULT_DELTA: Final = 1e-5  # where no budget says at which δ
_MOST_SERIES: Final = 100  # of one name: datasets come from the owner's file, but a file may be long

Kind = Literal["gauge", "counter"]
Labels = Mapping[str, str]
Sample = tuple[Labels, float]

# name -> (kind, help). What is exported, and nothing else.
METRICS: Final[dict[str, tuple[Kind, str]]] = {
    "sordino_agent_info": ("gauge", "1; the software that runs."),
    "sordino_agent_state": ("gauge", "1 for the state the daemon is in, 0 for the others."),
    "sordino_agent_start_time_seconds": ("gauge", "When the daemon started, in seconds since 1970."),
    "sordino_agent_updated_timestamp_seconds": ("gauge", "When these figures were taken, in seconds since 1970."),
    "sordino_agent_boots_total": ("counter", "How often the daemon has started with this key."),
    "sordino_agent_connected": ("gauge", "1 while the broker is there."),
    "sordino_agent_server_online": ("gauge", "1 while the fleet's server is online."),
    "sordino_agent_roster_epoch": ("gauge", "Epoch of the roster in force; absent before the first."),
    "sordino_agent_tasks_total": ("counter", "Tasks since the start, by how they ended."),
    "sordino_agent_tasks_running": ("gauge", "Tasks that run or wait."),
    "sordino_agent_commands_refused_total": ("counter", "Commands refused since the start: policy, budget, limits."),
    "sordino_agent_plans": ("gauge", "Plans that are held."),
    "sordino_agent_store_bytes": ("gauge", "Bytes of tensors that are held for others."),
    "sordino_agent_resident_memory_bytes": ("gauge", "The daemon's resident memory, its worker's not counted."),
    "sordino_agent_bytes_total": ("counter", "Payload bytes since the start, by direction."),
    "sordino_agent_dataset_rows": ("gauge", "Rows that are offered, by dataset and split."),
    "sordino_agent_datasets_unreadable": ("gauge", "Datasets of the configuration that can't be read."),
    "sordino_agent_budget_epsilon_spent": ("gauge", "Epsilon spent, at the budget's delta (1e-5 without a budget)."),
    "sordino_agent_budget_epsilon_limit": ("gauge", "Epsilon that the owner allows; absent without a budget."),
    "sordino_agent_budget_rho_spent": ("gauge", "Rho of zero-concentrated privacy spent; absent if rows were sampled."),
}
STATES: Final = ("starting", "running", "draining", "stopped")


def exposition(status: Status, spent: Mapping[Account, Spent], budgets: Mapping[str, BudgetSpec]) -> str:
    """Prometheus' text format 0.0.4, ended by a newline."""
    found: dict[str, list[Sample]] = {}
    for name, labels, value in (*_of_status(status), *_of_budgets(spent, budgets)):
        found.setdefault(name, []).append((labels, value))
    lines = []
    for name, (kind, text) in METRICS.items():
        if name in found:
            lines += [f"# HELP {name} {text}", f"# TYPE {name} {kind}"]
            lines += [f"{name}{_labels(labels)} {value!r}" for labels, value in found[name][:_MOST_SERIES]]
    return "\n".join(lines) + "\n"


def write_metrics(path: Path, text: str) -> None:
    """Replace the file at once. Raises `OSError`. Everybody may read it: node_exporter is another user."""
    draft = path.with_name(f".{path.name}.new")
    draft.write_text(text, "utf-8")
    draft.chmod(0o644)
    draft.replace(path)


def _of_status(status: Status) -> Iterator[tuple[str, Labels, float]]:
    yield "sordino_agent_info", {"version": status.version, "executor": status.executor, "fleet": status.fleet}, 1.0
    for state in STATES:
        yield "sordino_agent_state", {"state": state}, float(status.state == state)
    yield "sordino_agent_start_time_seconds", {}, status.started_s
    yield "sordino_agent_updated_timestamp_seconds", {}, status.updated_s
    yield "sordino_agent_boots_total", {}, float(status.boot)
    yield "sordino_agent_connected", {}, float(status.connected)
    yield "sordino_agent_server_online", {}, float(status.server_online)
    if status.roster_epoch is not None:
        yield "sordino_agent_roster_epoch", {}, float(status.roster_epoch)
    yield "sordino_agent_tasks_total", {"outcome": "done"}, float(status.tasks_done)
    yield "sordino_agent_tasks_total", {"outcome": "failed"}, float(status.tasks_failed)
    yield "sordino_agent_tasks_running", {}, float(len(status.running))
    yield "sordino_agent_commands_refused_total", {}, float(status.refusals)
    yield "sordino_agent_plans", {}, float(status.plans)
    yield "sordino_agent_store_bytes", {}, float(status.store_used_bytes)
    yield "sordino_agent_resident_memory_bytes", {}, float(status.resident_bytes)
    yield "sordino_agent_bytes_total", {"direction": "sent"}, float(status.bytes_sent)
    yield "sordino_agent_bytes_total", {"direction": "received"}, float(status.bytes_received)
    for dataset in status.datasets or ():
        yield "sordino_agent_dataset_rows", {"dataset": dataset.name, "split": "train"}, float(dataset.train_rows)
        yield "sordino_agent_dataset_rows", {"dataset": dataset.name, "split": "test"}, float(dataset.test_rows)
    yield "sordino_agent_datasets_unreadable", {}, float(len(status.datasets_unreadable))


def _of_budgets(
    spent: Mapping[Account, Spent], budgets: Mapping[str, BudgetSpec]
) -> Iterable[tuple[str, Labels, float]]:
    accounts: dict[Account, Spent] = dict(spent)
    for dataset in budgets:
        if all(account[0] != dataset for account in accounts):
            accounts[dataset, "train", "record"] = Spent()
    for (dataset, split, unit), used in sorted(accounts.items()):
        labels = {"dataset": dataset, "split": split, "unit": unit}
        budget = budgets.get(dataset)
        if budget is not None:
            yield "sordino_agent_budget_epsilon_spent", labels, budget.filter.epsilon_of(used.curve)
            yield "sordino_agent_budget_epsilon_limit", labels, budget.filter.epsilon
        elif used != Spent():
            yield "sordino_agent_budget_epsilon_spent", labels, epsilon_of(used.curve, DEFAULT_DELTA)
        if used.rho is not None:
            yield "sordino_agent_budget_rho_spent", labels, used.rho


def _labels(labels: Labels) -> str:
    if not labels:
        return ""
    return "{" + ",".join(f'{name}="{_escaped(value)}"' for name, value in labels.items()) + "}"


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
