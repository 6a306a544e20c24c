"""A device's ledger and journals on a full disk, cut short, with flipped bits, put back from an old copy, gone: nothing
that was charged, burnt or answered is forgotten; or the agent does not start, and says why.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers_disk import fill, small_disk
from helpers_sums import sum_terms
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.errors import JournalError, LedgerError, SessionReused
from sordino_agent.ledger import Charge, Ledger
from sordino_agent.occupied import occupied
from sordino_agent.spdz.journal import BurnJournal
from sordino_common.aggregate.helper import SumAnswered
from sordino_common.errors import ConfigError, SordinoError
from sordino_common.privacy.mechanism import Mechanism


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A state file: how it is opened, what writes its entry `number`, and how to see that the entry is there."""

    file: str
    open: Callable[[Path], Any]
    write: Callable[[Any, int], None]
    has: Callable[[Any, int], bool]
    error: type[SordinoError]  # when it can't be written
    exit_code: int


def terms_of(number: int) -> Any:
    return sum_terms(session=number.to_bytes(32, "big"), index=number)


def answered(journal: SumJournal, number: int) -> bool:
    try:
        journal.require_unanswered(terms_of(number))
    except SumAnswered:
        return True
    return False


def charge(ledger: Ledger, number: int) -> None:
    mechanism = Mechanism(unit="record", sensitivity_squared=1, sigma_squared=100)
    ledger.charge([Charge(dataset="d", split="train", run="r", round=number, what="train", mechanism=mechanism)])


KINDS = [
    Kind(
        file="ledger.sqlite",
        open=Ledger,
        write=charge,
        has=lambda ledger, number: any(entry.charge.round == number for entry in ledger.entries()),
        error=LedgerError,
        exit_code=2,
    ),
    Kind(
        file="journal.sqlite",
        open=BurnJournal,
        write=lambda journal, number: journal.burn_session(number.to_bytes(32, "big"), run="r", wall_s=0.0),
        has=lambda journal, number: journal.is_burnt(number.to_bytes(32, "big")),
        error=JournalError,
        exit_code=3,
    ),
    Kind(
        file="sums.sqlite",
        open=SumJournal,
        write=lambda journal, number: journal.burn(terms_of(number), bytes(32), wall_s=0.0),
        has=answered,
        error=JournalError,
        exit_code=3,
    ),
]
each_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.file)


@each_kind
def test_on_a_full_disk_nothing_is_used_that_is_not_written_down(tmp_path: Path, kind: Kind) -> None:
    with small_disk(tmp_path / "small") as folder:
        path = folder / kind.file
        state = kind.open(path)
        kind.write(state, 1)
        ballast = fill(folder)
        written = [1]
        with pytest.raises(kind.error, match=r"can't be written: .*(full|No space).*free some room") as caught:  # noqa: PT012
            while True:
                kind.write(state, written[-1] + 1)
                written.append(written[-1] + 1)
        assert caught.value.exit_code == kind.exit_code
        state.close()
        ballast.unlink()
        state = kind.open(path)
        assert all(kind.has(state, number) for number in written), "what was written before the disk was full"
        kind.write(state, 1000)
        assert kind.has(state, 1000)
        state.close()


@each_kind
def test_damage_is_named_or_nothing_is_forgotten(tmp_path: Path, kind: Kind) -> None:
    """The file and its log, as a crash leaves them, cut at random places, and with bits flipped."""
    whole, kept = tmp_path / "whole", tmp_path / "kept"
    whole.mkdir()
    state = kind.open(whole / kind.file)
    for number in range(1, 21):
        kind.write(state, number)
    shutil.copytree(whole, kept)
    state.close()
    rng = np.random.default_rng(11)
    named = 0
    for trial in range(600 if os.environ.get("SORDINO_SOAK") else 48):
        folder = tmp_path / "hurt"
        shutil.copytree(kept, folder)
        path = folder / (kind.file if trial % 3 == 0 else f"{kind.file}-wal")
        data = bytearray(path.read_bytes())
        if trial % 2:
            del data[int(rng.integers(len(data))) :]
        else:
            for at in rng.integers(len(data), size=1 + trial % 40):
                data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            state = kind.open(folder / kind.file)
        except SordinoError as error:
            named += 1
            assert_named(error, kind)
        else:
            # At most the entry after the mark can be missing: what it allowed had not happened yet.
            lost = [number for number in range(1, 21) if not kind.has(state, number)]
            assert lost in ([], [20] if kind.file == "ledger.sqlite" else []), (trial, lost)
            state.close()
        shutil.rmtree(folder)
    assert named > 10


def assert_named(error: SordinoError, kind: Kind) -> None:
    assert kind.file in str(error) or "journal" in str(error), error
    assert error.exit_code in (2, 3), error


@each_kind
def test_an_old_copy_and_a_missing_file_are_refused(tmp_path: Path, kind: Kind) -> None:
    path = tmp_path / kind.file
    state = kind.open(path)
    kind.write(state, 1)
    state.close()
    old = path.read_bytes()
    state = kind.open(path)
    for number in (2, 3):
        kind.write(state, number)
    state.close()
    new = path.read_bytes()
    path.write_bytes(old)
    with pytest.raises(ConfigError if kind.exit_code == 3 else LedgerError, match=r"old copy"):
        kind.open(path)
    assert path.read_bytes() == old
    path.unlink()
    with pytest.raises((ConfigError, LedgerError), match=r"is missing, but .*\.mark says that it had 3 entries"):
        kind.open(path)
    assert not path.exists(), "a refusal makes nothing"
    path.write_bytes(new)
    state = kind.open(path)
    assert all(kind.has(state, number) for number in (1, 2, 3))
    state.close()


@pytest.mark.parametrize("text", ["", "x\n", "3", "-1\n", "9" * 40 + "\n"])
def test_a_mark_that_is_none_is_refused(tmp_path: Path, text: str) -> None:
    for kind in KINDS[1:]:
        kind.open(tmp_path / kind.file).close()
        path = (tmp_path / kind.file).with_suffix(".mark")
        path.write_text(text)
        with pytest.raises(ConfigError, match=rf"{path.name}: expected a number of entries"):
            kind.open(tmp_path / kind.file)


def test_an_entry_whose_mark_was_not_written_stays_burnt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the two a crash, or a disk that has just become full."""
    path = tmp_path / "journal.sqlite"
    state = BurnJournal(path)

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("sordino_agent.journal_mark.write_atomically", full)
        with pytest.raises(JournalError, match=r"journal\.mark: can't be written: No space"):
            state.burn_session(b"s" * 32, run="r", wall_s=0.0)
    with pytest.raises(SessionReused):
        state.burn_session(b"s" * 32, run="r", wall_s=0.0)
    state.close()
    state = BurnJournal(path)
    assert state.is_burnt(b"s" * 32)
    state.close()


def test_one_agent_per_state_directory(tmp_path: Path) -> None:
    script = (
        "from sordino_agent.occupied import occupied; from pathlib import Path\n"
        f"with occupied(Path({str(tmp_path)!r})): pass"
    )
    with occupied(tmp_path):
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
        assert f"another sordino-agent (process {os.getpid()}) uses this state directory" in done.stderr
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=False).returncode == 0
    with pytest.raises(ConfigError, match=r"lock: can't be opened: No such file"), occupied(tmp_path / "none"):
        pass
