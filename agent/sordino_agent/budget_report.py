"""What `sordino-agent budget` shows: per dataset, split and unit the budget, what was spent of it, and by whom."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Final

import msgspec

from sordino_agent.budget import MOST_ROUNDS, BudgetSpec, Spent, rounds_left
from sordino_agent.ledger import ALL_DATASETS, Account, Entry, Ledger
from sordino_common.privacy.rdp import epsilon_of

DEFAULT_DELTA: Final = 1e-5  # where no budget says at which δ


class RunReport(msgspec.Struct, frozen=True, kw_only=True):
    """What one run was charged: `entries` answers, of `releases` noised releases in all."""

    run: str
    what: tuple[str, ...]
    entries: int
    releases: int
    first_round: int
    last_round: int
    last_s: float


class AccountReport(msgspec.Struct, frozen=True, kw_only=True):
    """One account. `epsilon` at `delta` and, if no rows were sampled, `rho` are spent; `epsilon_limit` is the budget's
    (None: no budget, nothing is refused). `rounds_left`: how many more answers like the last one are affordable."""

    dataset: str
    split: str
    unit: str
    budget: str | None
    delta: float
    epsilon: float
    epsilon_limit: float | None
    rho: float | None
    runs: tuple[RunReport, ...]
    last_noise_multiplier: float | None
    last_sampling_rate: float | None
    rounds_left: int | None


def report(ledger: Ledger | None, budgets: Mapping[str, BudgetSpec]) -> tuple[AccountReport, ...]:
    """Every account of the ledger, and one per budget that nothing was charged to; `ledger` None: nothing ever was."""
    spent = dict(ledger.spent()) if ledger is not None else {}
    entries: dict[Account, list[Entry]] = {}
    for entry in ledger.entries() if ledger is not None else ():
        charge = entry.charge
        entries.setdefault(charge.account, []).append(entry)
    for dataset in budgets:
        if all(key[0] != dataset for key in spent):
            spent[(dataset, "train", "record")] = Spent()
    return tuple(
        _account(key, spent[key], _budget_of(key, budgets, entries.get(key, [])), entries.get(key, []))
        for key in sorted(spent)
    )


def _budget_of(key: Account, budgets: Mapping[str, BudgetSpec], entries: list[Entry]) -> BudgetSpec | None:
    """The dataset's; of the account of the whole device, that of the dataset which was charged last: whoever asks for
    another one is held against its own."""
    return budgets.get(entries[-1].charge.dataset if key[0] == ALL_DATASETS and entries else key[0])


def _account(key: Account, spent: Spent, budget: BudgetSpec | None, entries: list[Entry]) -> AccountReport:
    last = entries[-1].charge.mechanism if entries else None
    delta = DEFAULT_DELTA if budget is None else budget.delta
    used = 0.0 if last is None else epsilon_of(spent.curve, delta)
    return AccountReport(
        dataset=key[0],
        split=key[1],
        unit=key[2],
        budget=None if budget is None else str(budget),
        delta=delta,
        epsilon=used if budget is None else budget.filter.epsilon_of(spent.curve),
        epsilon_limit=None if budget is None else budget.filter.epsilon,
        rho=spent.rho,
        runs=tuple(_runs(entries)),
        last_noise_multiplier=None if last is None else last.noise_multiplier,
        last_sampling_rate=None if last is None else last.sampling_rate,
        rounds_left=None if budget is None or last is None else rounds_left(budget, spent, last),
    )


def _runs(entries: Iterable[Entry]) -> Iterator[RunReport]:
    by_run: dict[str, list[Entry]] = {}
    for entry in entries:
        by_run.setdefault(entry.charge.run, []).append(entry)
    for run, mine in by_run.items():
        rounds = [entry.charge.round for entry in mine]
        yield RunReport(
            run=run,
            what=tuple(sorted({entry.charge.what for entry in mine})),
            entries=len(mine),
            releases=sum(entry.charge.mechanism.count for entry in mine),
            first_round=min(rounds),
            last_round=max(rounds),
            last_s=mine[-1].wall_s,
        )


def lines(reports: Iterable[AccountReport]) -> Iterator[str]:
    """The report for people."""
    empty = True
    for account in reports:
        empty = False
        one = account.dataset != ALL_DATASETS
        yield f"{account.dataset}, {account.split} rows, unit {account.unit}" if one else "all datasets, unit device"
        rho = "" if account.rho is None or not account.runs else f" (rho {account.rho:.4g})"
        limit = "no budget: nothing is refused" if account.budget is None else f"budget {account.budget}"
        if account.epsilon_limit is not None and "rho" in (account.budget or ""):
            limit += f", that is epsilon {account.epsilon_limit:.4g}"
        yield f"  spent     epsilon {account.epsilon:.4g}{rho} at delta {account.delta:g}; {limit}"
        if account.epsilon_limit is not None:
            yield f"  left      epsilon {max(0.0, account.epsilon_limit - account.epsilon):.4g}{_more(account)}"
        for run in account.runs:
            rounds = (
                f"round {run.first_round}"
                if run.first_round == run.last_round
                else (f"rounds {run.first_round} to {run.last_round}")
            )
            what = f"{run.entries} answers ({', '.join(run.what)}), {run.releases} noised releases"
            yield f"  run       {run.run}: {what}, {rounds}"
    if empty:
        yield "nothing was ever charged, and no dataset has a budget"


def _more(account: AccountReport) -> str:
    if account.rounds_left is None or account.last_noise_multiplier is None or account.last_sampling_rate is None:
        return ""
    count = "more than anybody asks for" if account.rounds_left >= MOST_ROUNDS // 2 else f"{account.rounds_left} more"
    sampled = "" if account.last_sampling_rate == 1.0 else f", sampling rate {account.last_sampling_rate:.4g}"
    return f"; {count} like the last (noise multiplier {account.last_noise_multiplier:.4g}{sampled})"
