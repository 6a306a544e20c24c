"""The privacy ledger: durable before a release, never under-counting, refusing by name what it can't vouch for."""

from __future__ import annotations

import os
import shutil
import signal
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sordino_agent.budget import BudgetSpec, Spent, rounds_left
from sordino_agent.errors import LedgerError
from sordino_agent.ledger import Charge, Ledger
from sordino_agent.ledger_mark import mark_path, read_mark
from sordino_common.errors import BudgetRefused, LocalError
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism
from sordino_common.privacy.rdp import ORDERS, curve

GAUSS = Mechanism(unit="record", sensitivity_squared=1 << 32, sigma_squared=50 << 32)  # rho 0.01
SAMPLED = Mechanism(
    unit="record", sensitivity_squared=1 << 32, sigma_squared=1 << 32, sampling_threshold=1 << 26, count=5
)
COLUMNS = (
    *("id", "dataset", "split", "run", "round", "what", "unit", "sensitivity_squared", "sigma_squared"),
    *("sampling_threshold", "count", "wall_s", "digest"),
)
EPSILON = BudgetSpec(epsilon=2.0, delta=1e-5)


def charge(mechanism: Mechanism = GAUSS, **changes: object) -> Charge:
    fields: dict[str, object] = {"dataset": "toy", "split": "train", "run": "run-1", "round": 1, "what": "train"}
    return Charge(mechanism=mechanism, **{**fields, **changes})  # type: ignore[arg-type]


def entries(ledger: Ledger) -> list[Charge]:
    return [entry.charge for entry in ledger.entries()]


# --- what is counted -----------------------------------------------------------------------------------------------


def test_what_is_charged_is_there_after_a_restart(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path, wall_s=lambda: 12.5)
    mine = [charge(round=k, mechanism=mechanism) for k, mechanism in enumerate([GAUSS, SAMPLED, GAUSS])]
    for one in mine:
        ledger.charge([one])
    before = ledger.spent()
    ledger.close()
    again = Ledger(path)
    assert entries(again) == mine
    assert {entry.wall_s for entry in again.entries()} == {12.5}
    (spent,), (reread,) = before.values(), again.spent().values()
    assert reread.curve == pytest.approx(spent.curve, rel=1e-13)
    assert reread.rho is spent.rho is None
    exact = [2 * a + b for a, b in zip(curve(GAUSS), curve(SAMPLED), strict=True)]
    assert all(e <= have <= e * (1 + 1e-12) for have, e in zip(spent.curve, exact, strict=True))
    assert path.stat().st_mode & 0o777 == 0o600
    assert mark_path(path).stat().st_mode & 0o777 == 0o600


def test_numbers_beyond_64_bits_survive(tmp_path: Path) -> None:
    big = Mechanism(unit="device", sensitivity_squared=(1 << 120) - 7, sigma_squared=1 << 80, count=1 << 40)
    ledger = Ledger(tmp_path / "ledger.sqlite")
    ledger.charge([charge(big)])
    ledger.close()
    assert entries(Ledger(tmp_path / "ledger.sqlite")) == [charge(big)]


def test_accounts_are_apart_by_dataset_split_and_unit() -> None:
    ledger = Ledger(None)
    device = Mechanism(unit="device", sensitivity_squared=4, sigma_squared=400)
    ledger.charge([charge(), charge(device), charge(split="test"), charge(dataset="other")])
    assert set(ledger.spent()) == {
        *(("toy", "train", "record"), ("*", "train", "device"), ("toy", "test", "record")),
        ("other", "train", "record"),
    }


def test_a_device_is_one_unit_over_all_its_datasets_and_splits(tmp_path: Path) -> None:
    """Else a server that asks for two datasets of a device in turns would get twice what its owner allows."""
    device = Mechanism(unit="device", sensitivity_squared=1, sigma_squared=50)
    budgets = {"toy": EPSILON, "other": EPSILON}
    ledger = Ledger(tmp_path / "ledger.sqlite", budgets=budgets)
    count = rounds_left(EPSILON, Spent(), device)
    for k in range(count):
        ledger.charge([charge(device, dataset=("toy", "other")[k % 2], round=k)])
    for dataset in budgets:
        with pytest.raises(BudgetRefused, match=r"unit device: .* what was spent over all datasets of this device fro"):
            ledger.afford([charge(device, dataset=dataset)])
    ledger.charge([charge(dataset="other")])  # records are disjoint: theirs is another account
    spent = ledger.spent()
    ledger.close()
    again = Ledger(tmp_path / "ledger.sqlite", budgets=budgets)
    with pytest.raises(BudgetRefused, match="unit device"):
        again.charge([charge(device, dataset="other", split="test")])
    assert again.spent()["*", "train", "device"].curve == pytest.approx(spent["*", "train", "device"].curve)


def test_two_datasets_in_one_charge_add_up() -> None:
    device = Mechanism(unit="device", sensitivity_squared=1, sigma_squared=50)
    ledger = Ledger(None, budgets={"toy": EPSILON, "other": EPSILON})
    most = rounds_left(EPSILON, Spent(), device)
    with pytest.raises(BudgetRefused):
        ledger.afford([charge(device, dataset=("toy", "other")[k % 2]) for k in range(most + 1)])
    ledger.afford([charge(device, dataset=("toy", "other")[k % 2]) for k in range(most)])


def test_what_came_to_nothing_is_written_down_beyond_the_budget() -> None:
    ledger = Ledger(None, budgets={"toy": EPSILON})
    count = rounds_left(EPSILON, Spent(), GAUSS)
    for _ in range(count + 1):
        ledger.lose([charge()])
    assert len(entries(ledger)) == count + 1
    with pytest.raises(BudgetRefused):
        ledger.afford([charge()])


@given(st.lists(st.sampled_from([GAUSS, SAMPLED]), min_size=1, max_size=12), st.integers(1, 9))
@settings(max_examples=50, deadline=None)
def test_totals_are_never_below_the_sum(mechanisms: list[Mechanism], times: int) -> None:
    from fractions import Fraction

    spent = Spent()
    for mechanism in mechanisms:
        spent = spent.plus(mechanism, times)
    for at in (0, len(ORDERS) // 2, len(ORDERS) - 1):
        assert Fraction(spent.curve[at]) >= sum(times * Fraction(curve(one)[at]) for one in mechanisms)
    assert (spent.rho is None) == (SAMPLED in mechanisms)


# --- the budget ----------------------------------------------------------------------------------------------------


def test_a_budget_is_refused_before_and_inside_the_charge_and_changes_nothing() -> None:
    ledger = Ledger(None, budgets={"toy": EPSILON})
    count = rounds_left(EPSILON, Spent(), GAUSS)
    assert count > 2
    for k in range(count):
        ledger.afford([charge(round=k)])
        ledger.charge([charge(round=k)])
    for refuse in (ledger.afford, ledger.charge):
        with pytest.raises(BudgetRefused) as caught:
            refuse([charge(dataset="free"), charge(round=count)])
        assert (caught.value.code, caught.value.exit_code) == ("budget", 5)
        for words in ("'toy'", "train rows", "unit record", "epsilon 2 at delta 1e-05", "`sordino-agent budget`"):
            assert words in str(caught.value)
    assert len(entries(ledger)) == count  # not even the one of the dataset without a budget
    ledger.charge([charge(split="test")])  # other rows, other account
    ledger.charge([charge(dataset="free")])


def test_several_charges_of_one_answer_add_up() -> None:
    ledger = Ledger(None, budgets={"toy": EPSILON})
    count = rounds_left(EPSILON, Spent(), GAUSS)
    with pytest.raises(BudgetRefused):
        ledger.afford([charge()] * (count + 1))
    ledger.afford([charge()] * count)


def test_a_rho_budget_holds_exactly_its_gaussians() -> None:
    budget = BudgetSpec(rho=0.1, delta=1e-5)
    assert rounds_left(budget, Spent(), GAUSS) == 10
    ledger = Ledger(None, budgets={"toy": budget})
    for _ in range(10):
        ledger.charge([charge()])
    with pytest.raises(BudgetRefused, match=r"rho 0\.1 at delta 1e-05, that is epsilon"):
        ledger.charge([charge()])
    assert rounds_left(budget, Spent(), SAMPLED) > 0  # sampled rows are held against the same curve


@given(st.integers(1, 200), st.sampled_from([GAUSS, SAMPLED]), st.sampled_from([0.3, 1.0, 8.0]))
@settings(max_examples=40, deadline=None)
def test_rounds_left_is_the_last_that_fits(before: int, mechanism: Mechanism, epsilon: float) -> None:
    budget = BudgetSpec(epsilon=epsilon, delta=1e-6)
    spent = Spent().plus(mechanism, before)
    left = rounds_left(budget, spent, mechanism)
    assert left == 0 or budget.allows(spent.plus(mechanism, left))
    assert not budget.allows(spent.plus(mechanism, left + 1))


def test_what_shows_rows_without_noise_is_refused_where_there_is_a_budget() -> None:
    ledger = Ledger(None, budgets={"toy": EPSILON})
    ledger.require_exact("other", "moments")
    with pytest.raises(BudgetRefused, match=r"'toy' has a privacy budget.*`moments`.*without noise"):
        ledger.require_exact("toy", "moments")


def test_charging_nothing_is_our_own_mistake() -> None:
    with pytest.raises(LocalError, match="nothing to charge"):
        Ledger(None).charge([])


# --- append-only ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE entries SET sigma_squared='1'",
        "DELETE FROM entries",
        "UPDATE ledger SET id=x'00'",
        "DELETE FROM ledger",
        "INSERT OR REPLACE INTO entries SELECT * FROM entries WHERE id=1",
        "INSERT INTO entries SELECT * FROM (SELECT id+2, " + ", ".join(COLUMNS[1:]) + " FROM entries)",
    ],
)
def test_the_file_itself_only_grows(tmp_path: Path, statement: str) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    ledger.charge([charge()])
    ledger.close()
    with sqlite3.connect(path) as db, pytest.raises(sqlite3.IntegrityError, match="only grows"):
        db.execute(statement)
    db.close()
    assert entries(Ledger(path)) == [charge()]


def filled(path: Path, count: int = 3) -> None:
    ledger = Ledger(path)
    for k in range(count):
        ledger.charge([charge(round=k)])
    ledger.close()


def meddle(path: Path, *statements: str) -> None:
    db = sqlite3.connect(path)
    for (name,) in db.execute("SELECT name FROM sqlite_master WHERE type='trigger'").fetchall():
        db.execute(f"DROP TRIGGER {name}")
    for statement in statements:
        db.execute(statement)
    db.commit()
    db.close()


@pytest.mark.parametrize(
    ("statement", "words"),
    [
        ("UPDATE entries SET sigma_squared='999999999999999' WHERE id=2", "entry 2 .* was changed or removed"),
        ("UPDATE entries SET count=0 WHERE id=3", "entry 3 .* was changed or removed"),
        ("DELETE FROM entries WHERE id=1", "entry 1 .* was changed or removed"),
        ("DELETE FROM entries WHERE id=3", "2 entries, but there were 3 before: this is an old copy"),
        ("DELETE FROM entries", "0 entries, but there were 3 before"),
        ("UPDATE ledger SET id=zeroblob(16)", "but .* was here"),
        ("DELETE FROM ledger", "0 ids, one is expected"),
        (
            "PRAGMA user_version=7",
            "has schema 7, written by a newer sordino-agent; this one knows up to 1",
        ),
    ],
)
def test_meddling_is_refused_by_name(tmp_path: Path, statement: str, words: str) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path)
    meddle(path, statement)
    for read_only in (False, True):
        with pytest.raises(LedgerError, match=words) as caught:
            Ledger(path, read_only=read_only)
        assert caught.value.code == "ledger"
        assert str(path) in str(caught.value)


def test_a_missing_ledger_is_refused_until_the_owner_gives_it_up(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path)
    path.unlink()
    with pytest.raises(LedgerError, match=r"missing, but .*ledger.mark says that it had 3 entries.*removing .*mark"):
        Ledger(path)
    assert not path.exists()
    mark_path(path).unlink()
    assert entries(Ledger(path)) == []


def test_an_old_copy_and_a_foreign_ledger_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path)
    shutil.copy(path, tmp_path / "copy.sqlite")
    ledger = Ledger(path)
    ledger.charge([charge(round=4)])
    ledger.close()
    shutil.copy(tmp_path / "copy.sqlite", path)
    with pytest.raises(LedgerError, match="3 entries, but there were 4 before: this is an old copy"):
        Ledger(path)
    filled(tmp_path / "foreign.sqlite", 9)
    shutil.copy(tmp_path / "foreign.sqlite", path)
    with pytest.raises(LedgerError, match="was here"):
        Ledger(path)


@pytest.mark.parametrize("content", [b"", b"not a database, but long enough to be taken for one" * 100])
def test_a_ruined_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path)
    path.write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger\.sqlite: (empty|the privacy ledger can't be)"):
        Ledger(path)


@pytest.mark.parametrize("content", [b"", b"gibberish", b"00 x -\n", b"aa 1 bb cc\n"])
def test_a_ruined_mark_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "ledger.sqlite"
    filled(path)
    mark_path(path).write_bytes(content)
    with pytest.raises(LedgerError, match=r"ledger.mark: not the mark of a privacy ledger.*removing"):
        Ledger(path)


def test_reading_makes_nothing_and_takes_no_lock(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    daemon = Ledger(path)
    daemon.charge([charge()])
    before = mark_path(path).read_bytes()
    reader = Ledger(path, read_only=True)
    assert entries(reader) == [charge()]
    daemon.charge([charge(round=2)])
    assert [one.round for one in entries(reader)] == [1, 2]
    reader.close()
    assert mark_path(path).read_bytes() != before  # the daemon's, one behind
    with pytest.raises(LedgerError, match="can't be written"):
        Ledger(path, read_only=True).charge([charge()])


# --- crashes -------------------------------------------------------------------------------------------------------


def test_a_kill_at_any_statement_never_under_counts(tmp_path: Path) -> None:
    """What a killed process leaves is what the files hold at that moment: copy them before every statement."""
    state = tmp_path / "state"
    state.mkdir()
    path = state / "ledger.sqlite"
    released = 0
    moments: list[tuple[Path, int]] = []

    def snapshot(_statement: str = "") -> None:
        copy = tmp_path / f"moment-{len(moments)}"
        shutil.copytree(state, copy)
        moments.append((copy / "ledger.sqlite", released))

    ledger = Ledger(path)
    snapshot()
    ledger._db.set_trace_callback(snapshot)
    for k in range(4):
        ledger.afford([charge(round=k)])
        snapshot()
        ledger.charge([charge(round=k), charge(round=k, split="test")])
        snapshot()
        released += 1
        snapshot()
    ledger.close()
    released_all = released
    moments.append((path, released_all))
    assert len(moments) > 40
    for file, count in moments:
        again = Ledger(file)
        for split in ("train", "test"):
            assert sum(one.split == split for one in entries(again)) >= count
        again.charge([charge(round=99)])  # and it goes on
        again.close()


def test_a_kill_while_it_is_made_leaves_one_that_can_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moments: list[Path] = []
    state = tmp_path / "state"
    state.mkdir()
    connect = sqlite3.connect

    def traced(*arguments: object, **more: object) -> sqlite3.Connection:
        db: sqlite3.Connection = connect(*arguments, **more)  # type: ignore[call-overload]

        def snapshot(_statement: str) -> None:
            copy = tmp_path / f"moment-{len(moments)}"
            shutil.copytree(state, copy)
            moments.append(copy)

        db.set_trace_callback(snapshot)
        return db

    with monkeypatch.context() as patch:
        patch.setattr(sqlite3, "connect", traced)
        Ledger(state / "ledger.sqlite").close()
    assert len(moments) > 10
    for folder in moments:
        again = Ledger(folder / "ledger.sqlite")
        again.charge([charge()])
        again.close()


_CHILD = """
import sys
from pathlib import Path
from sordino_agent.ledger import Charge, Ledger
from sordino_common.privacy.mechanism import Mechanism
ledger = Ledger(Path(sys.argv[1]))
k = int(sys.argv[2])
while True:
    mechanism = Mechanism(unit="record", sensitivity_squared=1, sigma_squared=10**6)
    ledger.charge([Charge(dataset="toy", split="train", run="r", round=k, what="train", mechanism=mechanism)])
    sys.stdout.write(f"{k}\\n")  # the release
    sys.stdout.flush()
    k += 1
"""


def test_kill_9_between_charge_and_release(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    seen = 0
    for reads in (1, 7, 2):
        process = subprocess.Popen([sys.executable, "-c", _CHILD, str(path), str(seen)], stdout=subprocess.PIPE)
        assert process.stdout is not None
        for _ in range(reads):
            assert process.stdout.readline()
        process.send_signal(signal.SIGKILL)
        rest = process.stdout.read().splitlines()
        process.stdout.close()
        process.wait()
        seen += reads + len([line for line in rest if line])
        ledger = Ledger(path)
        count = len(entries(ledger))
        ledger.close()
        assert count >= seen
        seen = count


def test_two_processes_cannot_both_spend_the_last_of_it(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    budgets = {"toy": EPSILON}
    one, two = Ledger(path, budgets=budgets), Ledger(path, budgets=budgets)
    count = rounds_left(EPSILON, Spent(), GAUSS)
    for k in range(count - 1):
        (one, two)[k % 2].charge([charge(round=k)])
    one.afford([charge()])
    two.afford([charge()])
    one.charge([charge()])
    with pytest.raises(BudgetRefused):
        two.charge([charge()])
    assert len(entries(one)) == len(entries(two)) == count
    (mine,), (theirs,) = one.spent().values(), two.spent().values()
    assert mine.curve == pytest.approx(theirs.curve, rel=1e-12)
    two.close()
    one.close()
    mark = read_mark(path)
    assert mark is not None
    assert mark.count == count


def test_a_lock_held_by_another_process_is_waited_for_and_then_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sordino_common.database.WAIT_S", 0.05)
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(LedgerError, match=r"can't be written: database is locked"):
        ledger.charge([charge()])
    other.execute("ROLLBACK")
    other.close()
    ledger.charge([charge()])
    assert len(entries(ledger)) == 1


def test_a_full_disk_refuses_and_leaves_the_ledger_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    ledger = Ledger(path)
    pages = ledger._db.execute("PRAGMA page_count").fetchone()[0]
    ledger._db.execute(f"PRAGMA max_page_count={pages + 1}")
    done = 0

    def fill() -> None:
        nonlocal done
        for done in range(1000):
            ledger.charge([charge(round=done, run="r" * 80)])

    with pytest.raises(LedgerError, match=r"can't be written: database or disk is full; free some room"):
        fill()
    assert 0 < done < 999
    assert len(entries(ledger)) == done
    ledger._db.execute(f"PRAGMA max_page_count={pages + 100}")
    ledger.charge([charge(round=done)])
    ledger.close()
    assert len(entries(Ledger(path))) == done + 1


def test_a_mark_that_cant_be_written_refuses_the_charge(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root writes everywhere")
    path = tmp_path / "state" / "ledger.sqlite"
    path.parent.mkdir()
    ledger = Ledger(path)
    ledger.charge([charge()])
    path.parent.chmod(0o500)
    try:
        with pytest.raises(LedgerError, match="can't be written"):
            ledger.charge([charge(round=2)])
    finally:
        path.parent.chmod(0o700)
    assert len(entries(ledger)) == 1


def test_full_sampling_is_a_plain_gaussian() -> None:
    assert not GAUSS.sampled
    assert GAUSS.sampling_threshold == FULL_SAMPLING
