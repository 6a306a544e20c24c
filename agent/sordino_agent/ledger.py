"""The privacy ledger: what this device has released about its rows. It only grows, and it is on disk before a release.

    afford(charges)   before the work: refuse what the budget can't pay
    charge(charges)   after the work, before anything leaves: durable (fsync) when it returns, or it raises
    lose(charges)     work that began and has no result: written down whatever the budget says, before anybody is told

An entry is a `Mechanism` as the code made it that sampled, clipped and added noise: the server's word is not in it.
Between `charge` and the release a crash only leaves an entry too many. Every computation with fresh noise is charged;
an answer that is given again byte for byte is not computed again and costs nothing.

On disk: SQLite, WAL, synchronous=FULL; triggers forbid changing and removing entries; each entry carries the SHA-256
over itself and the one before. Beside it lies a mark (`*.mark`): the ledger's id, a count of entries, and the digest of
the last of these. So a ledger that is missing, was replaced, cut short or edited is refused by name, and so is one
restored from an old copy. NOT detected: removing or restoring ledger and mark together (a whole disk image), the last
entry alone cut off after a crash (the mark follows one entry behind), and an owner who rewrites both; the ledger
protects the owner from the server and from accidents, not from himself.

Two processes may use one ledger: `charge` looks at the budget again inside its transaction.
"""

from __future__ import annotations

import hashlib
import logging
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, Literal

from sordino_agent.budget import BudgetSpec, Spent
from sordino_agent.errors import LedgerError
from sordino_agent.ledger_mark import Mark, give_up, mark_path, read_mark, write_mark
from sordino_common.database import Schema, open_database, transaction
from sordino_common.errors import BudgetRefused, LocalError, SordinoError
from sordino_common.messages import encode
from sordino_common.privacy.mechanism import Mechanism, Unit

Split = Literal["train", "test"]
Account = tuple[str, Split, Unit]
LOST: Final = ", without a result"  # of a charge's `what`
ALL_DATASETS: Final = "*"  # no dataset has this name

log = logging.getLogger("sordino.agent")

MOST_ENTRIES: Final = 1_000_000  # about 300 MB; each is read when the ledger is opened
_RESTORE: Final = "Nothing is released under it; put the right file back from where you keep it"
_COLUMNS: Final = (
    "id, dataset, split, run, round, what, unit, sensitivity_squared, sigma_squared, sampling_threshold, count, wall_s"
)
_TABLES: Final = (
    # Whole numbers of any size as decimal text: Δ² and σ² in grid units pass 64 bits.
    """CREATE TABLE entries (
    id INTEGER PRIMARY KEY, dataset TEXT NOT NULL, split TEXT NOT NULL, run TEXT NOT NULL, round INTEGER NOT NULL,
    what TEXT NOT NULL, unit TEXT NOT NULL, sensitivity_squared TEXT NOT NULL, sigma_squared TEXT NOT NULL,
    sampling_threshold INTEGER NOT NULL, count INTEGER NOT NULL, wall_s REAL NOT NULL, digest BLOB NOT NULL) STRICT""",
    "CREATE TABLE ledger (id BLOB NOT NULL) STRICT",
    "INSERT INTO ledger VALUES (randomblob(16))",  # a name, no secret
    # INSERT OR REPLACE would remove a row without asking the trigger on DELETE: so ids are given one after the other.
    """CREATE TRIGGER in_order BEFORE INSERT ON entries
    WHEN NEW.id IS NOT (SELECT coalesce(max(id), 0) + 1 FROM entries)
    BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END""",
    *(
        f"CREATE TRIGGER {table}_no_{verb} BEFORE {verb} ON {table}"
        " BEGIN SELECT RAISE(ABORT, 'the ledger only grows'); END"
        for table in ("entries", "ledger")
        for verb in ("UPDATE", "DELETE")
    ),
)
SCHEMA: Final = Schema(
    what="the privacy ledger", program="sordino-agent", create=_TABLES, error=LedgerError, advice=_RESTORE
)


def account_of(dataset: str, split: Split, unit: Unit) -> Account:
    """Records are disjoint by dataset and split, so each has an account. The device is one unit, whatever it shows of
    itself: there is one account for it."""
    return (ALL_DATASETS, "train", unit) if unit == "device" else (dataset, split, unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Charge:
    """One release about the rows of (dataset, split): `what` was answered in `round` of `run`, and what it costs."""

    dataset: str
    split: Split
    run: str
    round: int
    what: str
    mechanism: Mechanism

    @property
    def account(self) -> Account:
        """Where it is added up."""
        return account_of(self.dataset, self.split, self.mechanism.unit)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """A charge with its number and the time (seconds since 1970) at which it was written down."""

    number: int
    charge: Charge
    wall_s: float


class Ledger:
    """SQLite at `path`; None: in memory, for the simulator, whose devices keep the object over their restarts.

    `budgets`: by dataset, may be replaced. `wall_s`: the clock of the entries. `read_only`: to look at a ledger that a
    daemon may be writing. Raises `LedgerError` if it can't be used or is not the one that its mark speaks of."""

    def __init__(
        self,
        path: Path | None,
        *,
        budgets: Mapping[str, BudgetSpec] | None = None,
        wall_s: Callable[[], float] = lambda: 0.0,
        read_only: bool = False,
    ) -> None:
        self.budgets: Mapping[str, BudgetSpec] = budgets or {}
        self._wall_s = wall_s
        self._path = path
        self._read_only = read_only
        self._name = str(path) if path is not None else ":memory:"
        self._count = 0
        self._head = b""
        self._spent: dict[Account, Spent] = {}
        self._made: sqlite3.Connection | None = None
        if path is None:
            return  # made when first needed: a simulated fleet has thousands, of 80 KB each
        mark = read_mark(path)
        if mark is not None and not path.exists():
            raise LedgerError(
                f"{path}: the privacy ledger is missing, but {mark_path(path)} says that it had {mark.count} entries; "
                f"put it back. {give_up(path)}"
            )
        self._made = open_database(path, SCHEMA, read_only=read_only)
        try:
            if read_only:
                self._load(mark)
                return
            with transaction(self._db):
                self._load(mark)
                self._write_mark()
        except (sqlite3.DatabaseError, OSError) as error:
            self._db.close()
            raise LedgerError(f"{self._name}: the privacy ledger can't be used: {error}. {_RESTORE}") from None
        except SordinoError:
            self._db.close()
            raise

    def close(self) -> None:
        """Bring the mark up to date and close. Idempotent."""
        if self._made is None:
            return
        try:
            if not self._read_only:
                with transaction(self._db):
                    self._catch_up()
                    self._write_mark()
        except (sqlite3.DatabaseError, OSError) as error:  # closed already, or a full disk: the mark stays one behind
            log.debug("event=ledger-mark-behind reason=%r", str(error))
        self._db.close()

    # --- spending --------------------------------------------------------------------------------------------------

    def afford(self, charges: Sequence[Charge]) -> None:
        """Raises `BudgetRefused`, naming dataset, rows, unit and figures, unless the budgets allow all of `charges`."""
        with self._reading():
            self._catch_up()
        self._allow(charges)

    def charge(self, charges: Sequence[Charge]) -> None:
        """Write all of `charges` down, or none. Durable when it returns. Raises `BudgetRefused` or `LedgerError`."""
        self._write(charges, self._allow)

    def lose(self, charges: Sequence[Charge]) -> None:
        """As `charge`, but the budget is not asked: whoever sees that the work has ended without a result, and when,
        may have learnt something of its sample. Raises `LedgerError`."""
        self._write(charges, self._after)

    def _write(self, charges: Sequence[Charge], after: Callable[[Sequence[Charge]], Mapping[Account, Spent]]) -> None:
        if not charges:
            raise LocalError("Ledger.charge: nothing to charge; a release without a mechanism must not come here")
        try:
            with transaction(self._db):
                self._catch_up()
                spent = after(charges)
                if self._count + len(charges) > MOST_ENTRIES:
                    raise LedgerError(f"{self._count} entries are in the privacy ledger, as many as it holds")
                self._write_mark()  # of what is durable by now: under the lock, never ahead of the entries
                count, head = self._count, self._head
                for charge in charges:
                    count += 1
                    values = _values(count, charge, self._wall_s())
                    head = _digest(head or self._id, values)
                    self._db.execute(
                        f"INSERT INTO entries ({_COLUMNS}, digest) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?)",  # noqa: S608
                        (*values, head),
                    )
        except (sqlite3.DatabaseError, OSError) as error:  # a full disk: what can't be charged must not leave
            raise LedgerError(f"{self._name}: the privacy ledger can't be written: {error}; free some room") from None
        self._count, self._head = count, head
        self._spent.update(spent)

    def require_exact(self, dataset: str, what: str) -> None:
        """Raises `BudgetRefused` if `what`, which shows something of train rows without noise, meets a budget."""
        budget = self.budgets.get(dataset)
        if budget is not None:
            raise BudgetRefused(
                f"dataset {dataset!r} has a privacy budget ({budget}); `{what}` would show something of its rows "
                "without noise, which no budget can pay: ask with privacy, or have the owner remove datasets[].budget"
            )

    # --- looking ---------------------------------------------------------------------------------------------------

    def spent(self) -> Mapping[Account, Spent]:
        """What was spent, per account."""
        with self._reading():
            self._catch_up()
        return dict(self._spent)

    def entries(self) -> Iterator[Entry]:
        """All entries, oldest first. Raises `LedgerError` at one that was changed."""
        with self._reading():
            if self._made is not None:
                yield from map(_entry, self._rows(0, self._id))

    # --- inside a transaction --------------------------------------------------------------------------------------

    def _allow(self, charges: Sequence[Charge]) -> dict[Account, Spent]:
        """As `_after`. Raises `BudgetRefused`."""
        after = self._after(charges)
        for charge in charges:
            account = charge.account
            budget = self.budgets.get(charge.dataset)
            if budget is not None and not budget.allows(after[account]):
                raise BudgetRefused(_refusal(budget, charge, self._spent.get(account, Spent()), after[account]))
        return after

    def _after(self, charges: Sequence[Charge]) -> dict[Account, Spent]:
        """What will have been spent."""
        after: dict[Account, Spent] = {}
        for charge in charges:
            account = charge.account
            after[account] = after.get(account, self._spent.get(account, Spent())).plus(charge.mechanism)
        return after

    @property
    def _db(self) -> sqlite3.Connection:
        if self._made is None:
            self._made = open_database(None, SCHEMA)
            self._load(None)
        return self._made

    def _load(self, mark: Mark | None) -> None:
        """The id and all entries. Raises `LedgerError`."""
        ids = self._db.execute("SELECT id FROM ledger").fetchall()
        if len(ids) != 1:
            raise LedgerError(f"{self._name}: the privacy ledger has {len(ids)} ids, one is expected. {_RESTORE}")
        self._id = bytes(ids[0][0])
        if mark is not None and mark.ledger != self._id:
            raise LedgerError(
                f"{self._name}: the privacy ledger {self._id.hex()}, but {mark.ledger.hex()} was here. {_RESTORE}"
            )
        self._catch_up(mark)

    def _catch_up(self, mark: Mark | None = None) -> None:
        """Read the entries that are new since the last time, whoever wrote them. Raises `LedgerError`."""
        if self._made is None:
            return
        marked = mark is None or mark.count == 0
        # Equal prices are added at once: a job has one or two, and many entries.
        tally: dict[tuple[Any, ...], int] = {}
        try:
            for row in self._rows(self._count, self._head or self._id):
                price = (row[1], row[2], *row[6:11])
                tally[price] = tally.get(price, 0) + 1
                self._count, self._head = row[0], row[-1]
                marked = marked or (mark is not None and (mark.count, mark.digest) == (row[0], row[-1]))
        finally:  # what was read counts, also if the next entry is found to be wrong
            for (dataset, split, *figures), times in tally.items():
                mechanism = _mechanism(figures)
                key = account_of(dataset, split, mechanism.unit)
                self._spent[key] = self._spent.get(key, Spent()).plus(mechanism, times)
        if mark is not None and not marked:
            raise LedgerError(
                f"{self._name}: {self._count} entries, but there were {mark.count} before: this is an old copy of the "
                f"privacy ledger, or it was cut short or changed. {_RESTORE}"
            )

    def _rows(self, after: int, head: bytes) -> Iterator[tuple[Any, ...]]:
        """(*_COLUMNS, digest) of entries after number `after`, whose digest is `head`; each is checked."""
        number = after
        for row in self._db.execute(f"SELECT {_COLUMNS}, digest FROM entries WHERE id>? ORDER BY id", (after,)):  # noqa: S608
            number += 1
            head = _digest(head, row[:-1])
            if row[0] != number or row[-1] != head:
                raise LedgerError(
                    f"{self._name}: entry {number} of the privacy ledger was changed or removed. {_RESTORE}"
                )
            yield row

    def _write_mark(self) -> None:
        if self._path is not None:
            write_mark(self._path, Mark(ledger=self._id, count=self._count, digest=self._head))

    @contextmanager
    def _reading(self) -> Iterator[None]:
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise LedgerError(f"{self._name}: the privacy ledger can't be read: {error}. {_RESTORE}") from None


# --- rows ---------------------------------------------------------------------------------------------------------


def _values(number: int, charge: Charge, wall_s: float) -> tuple[Any, ...]:
    """In the order of `_COLUMNS`."""
    mechanism = charge.mechanism
    return (
        *(number, charge.dataset, charge.split, charge.run, charge.round, charge.what, mechanism.unit),
        *(str(mechanism.sensitivity_squared), str(mechanism.sigma_squared), mechanism.sampling_threshold),
        *(mechanism.count, float(wall_s)),
    )


def _digest(before: bytes, values: tuple[Any, ...]) -> bytes:
    return hashlib.sha256(encode(["sordino/ledger", before, list(values)])).digest()


def _mechanism(figures: Sequence[Any]) -> Mechanism:
    """From the columns unit to count."""
    unit, sensitivity, sigma, threshold, count = figures
    return Mechanism(
        unit=unit,
        sensitivity_squared=int(sensitivity),
        sigma_squared=int(sigma),
        sampling_threshold=threshold,
        count=count,
    )


def _entry(row: tuple[Any, ...]) -> Entry:
    number, dataset, split, run, round_, what, *figures, wall_s, _ = row
    charge = Charge(dataset=dataset, split=split, run=run, round=round_, what=what, mechanism=_mechanism(figures))
    return Entry(number=number, charge=charge, wall_s=wall_s)


def _refusal(budget: BudgetSpec, charge: Charge, before: Spent, after: Spent) -> str:
    limit = budget.filter
    was, would = limit.epsilon_of(before.curve), limit.epsilon_of(after.curve)
    every = " over all datasets of this device" if charge.mechanism.unit == "device" else ""
    worth = "" if budget.epsilon is not None else f", that is epsilon {limit.epsilon:.4g}"
    return (
        f"dataset {charge.dataset!r}, {charge.split} rows, unit {charge.mechanism.unit}: `{charge.what}` would bring "
        f"what was spent{every} from epsilon {was:.4g} to {would:.4g} at delta {limit.delta:g}; the owner's budget is "
        f"{budget}{worth}. `sordino-agent budget` shows it; more noise or fewer rounds cost less"
    )
