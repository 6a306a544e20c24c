"""What `sordino-agent check` finds of what this device offers: datasets, privacy budgets, models, policy."""

from __future__ import annotations

from collections.abc import Iterator

from sordino_agent.budget_report import AccountReport, report
from sordino_agent.config import LEDGER_FILE, LoadedConfig
from sordino_agent.errors import LedgerError, ModelFileError
from sordino_agent.ledger import Ledger
from sordino_agent.ledger_mark import mark_path
from sordino_common.diagnosis.finding import Finding, error, ok, warning

_LITTLE = 0.1  # of a budget, that is left


def offer_findings(loaded: LoadedConfig) -> Iterator[Finding]:
    for part in (_datasets, _budgets, _models, _policy):
        yield from part(loaded)


def _datasets(loaded: LoadedConfig) -> Iterator[Finding]:
    from sordino_agent.data.catalogue import FileCatalogue  # NumPy: only here, not in the daemon

    config = loaded.config
    if not config.datasets:
        yield warning("datasets", "none is configured", "add the files that this device offers under `datasets`")
        return
    listed = FileCatalogue(loaded.datasets(), max_bytes=config.limits.memory_bytes // 2).describe()
    for problem in listed.problems:
        yield error("datasets", problem.detail, "mend the file or the entry")
    for info in listed.datasets:
        text = (
            f"{info.name}: {info.train_rows} rows to train on, {info.test_rows} to test on, {len(info.columns)} columns"
        )
        few = [str(rows) for rows in (info.train_rows, info.test_rows) if 0 < rows < config.policy.min_rows]
        if few or not info.train_rows:
            remedy = f"more rows, or a smaller policy.min_rows (now {config.policy.min_rows})"
            yield warning("datasets", f"{text}: commands over too few rows will be refused", remedy)
        else:
            yield ok("datasets", text)


def _budgets(loaded: LoadedConfig) -> Iterator[Finding]:
    """The ledger as far as it can be read, what is left, and rows that are offered under a budget and beside it."""
    path = loaded.state_file(LEDGER_FILE)
    there = path.exists() or mark_path(path).exists()
    try:
        ledger = Ledger(path, read_only=True) if there else None
        try:
            if ledger is not None:
                count = sum(1 for _ in ledger.entries())
                yield ok("ledger", f"{path}: {count} entries, none missing or changed")
            for account in report(ledger, loaded.budgets()):
                yield from budget_findings(account)
        finally:
            if ledger is not None:
                ledger.close()
    except LedgerError as problem:
        yield error("ledger", str(problem), "the agent does not start until this is settled")
    specs = loaded.datasets()
    for spec in specs:
        others = [other.name for other in specs if other.path == spec.path and other.name != spec.name]
        if spec.budget is not None and others:
            yield warning(
                "budget",
                f"the file of {spec.name} is also offered as {', '.join(others)}: its budget does not cover that",
                "offer the same rows under one name",
            )


def budget_findings(account: AccountReport) -> Iterator[Finding]:
    """What is left of one account; nothing for one without a budget."""
    if account.epsilon_limit is None:
        return
    left = max(0.0, account.epsilon_limit - account.epsilon)
    text = (
        f"{account.dataset}, {account.split} rows, unit {account.unit}: epsilon {left:.4g} of "
        f"{account.epsilon_limit:.4g} is left at delta {account.delta:g}"
    )
    if account.rounds_left is not None:
        text += f", {account.rounds_left} more answers like the last"
    if left <= 0.0 or account.rounds_left == 0:
        remedy = "it is spent; only its owner can decide to allow more: datasets[].budget. See: sordino-agent budget"
        yield warning("budget left", text, remedy)
    elif left < _LITTLE * account.epsilon_limit:
        yield warning("budget left", text, "more noise or fewer rounds cost less; see: sordino-agent budget")
    else:
        yield ok("budget left", text)


def _models(loaded: LoadedConfig) -> Iterator[Finding]:
    from sordino_agent.data.models import FileModels  # NumPy: only here, not in the daemon

    policy, specs = loaded.config.policy, loaded.models()
    models = FileModels(specs, max_bytes=loaded.config.limits.memory_bytes // 4)
    for spec in specs:
        try:
            tensors = models.tensors(spec.name)
        except ModelFileError as problem:
            yield error("models", str(problem), "mend the file or the entry")
            continue
        text = f"{spec.name}: {sum(tensor.size for tensor in tensors.values())} parameters in {len(tensors)} tensors"
        allowed = policy.models == "any" or spec.name in policy.models
        if allowed and "spdz-model" in policy.jobs:
            yield ok("models", text)
        else:
            remedy = f"add spdz-model to policy.jobs, and {spec.name} to policy.models"
            yield warning("models", f"{text}: sessions that ask for it will be refused", remedy)


def _policy(loaded: LoadedConfig) -> Iterator[Finding]:
    policy = loaded.config.policy
    wants_plans = {"train", "evaluate", "tensors", "aggregate"} & set(policy.jobs)
    if policy.plans == "any":
        yield warning(
            "policy",
            "any Plan may run here",
            "list the Plans (SHA-256) under policy.plans, or trust the server with it",
        )
    elif wants_plans and not policy.plans:
        remedy = "list the Plans (SHA-256) under policy.plans, or say: any"
        yield warning("policy", f"no Plan may run here, so {', '.join(sorted(wants_plans))} will be refused", remedy)
    else:
        yield ok("policy", f"jobs: {', '.join(policy.jobs) or 'none'}; Plans that may run: {len(policy.plans)}")
