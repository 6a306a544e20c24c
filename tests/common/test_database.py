"""State files: made whole, opened, migrated with a copy, or refused by name and left as they are."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from sordino_agent.aggregate.journal import SCHEMA as SUMS
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.ledger import SCHEMA as LEDGER
from sordino_agent.ledger import Ledger
from sordino_agent.ledger_mark import Mark, mark_path, read_mark, write_mark
from sordino_agent.spdz.journal import SCHEMA as BURNT
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.status import read_status
from sordino_common.channel.identity import OperatorKey
from sordino_common.channel.roster import RosterBook
from sordino_common.database import Schema, backup_path, integrity, open_database, schema_version
from sordino_common.errors import ConfigError, RosterVersion, SordinoError
from sordino_common.messages import encode
from sordino_server.dealer.masks import MaskStore
from sordino_server.home import Home, create_home
from sordino_server.store import SCHEMA as RUNS
from sordino_server.store import RunStore

FIRST = Schema(what="the book", program="prog", create=("CREATE TABLE a (x INTEGER) STRICT",))
THIRD = Schema(
    what="the book",
    program="prog",
    create=("CREATE TABLE a (x INTEGER, y TEXT) STRICT", "CREATE TABLE b (z INTEGER) STRICT"),
    steps=(("ALTER TABLE a ADD COLUMN y TEXT",), ("CREATE TABLE b (z INTEGER) STRICT", "INSERT INTO b VALUES (3)")),
    advice="Look for it",
)


def filled(path: Path, schema: Schema = FIRST) -> bytes:
    with closing(open_database(path, schema)) as db:
        db.execute("INSERT INTO a (x) VALUES (7)")
    return path.read_bytes()


def listed(folder: Path) -> list[str]:
    """Without what SQLite leaves beside a file that was read only."""
    return sorted(path.name for path in folder.iterdir() if not path.name.endswith(("-wal", "-shm")))


def test_a_file_is_made_whole_private_and_durable(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    with closing(open_database(path, THIRD)) as db:
        assert db.execute("PRAGMA synchronous").fetchone() == (2,)
        assert db.execute("PRAGMA journal_mode").fetchone() == ("wal",)
        assert path.stat().st_mode & 0o777 == 0o600
    assert schema_version(path) == 3
    assert integrity(path) == ""
    assert listed(tmp_path) == ["book.sqlite"]


def test_whoever_makes_it_first_wins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "book.sqlite"
    theirs, link = filled(tmp_path / "theirs.sqlite"), os.link

    def late(source: Path, target: Path) -> None:  # another process makes it between our look and our link
        path.write_bytes(theirs)
        link(source, target)

    monkeypatch.setattr(os, "link", late)
    with closing(open_database(path, FIRST)) as db:
        assert db.execute("SELECT x FROM a").fetchall() == [(7,)]
    assert listed(tmp_path) == ["book.sqlite", "theirs.sqlite"]


def test_an_older_file_is_migrated_with_a_copy(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    filled(path)
    with closing(open_database(path, THIRD)) as db:
        assert db.execute("SELECT x, y FROM a").fetchall() == [(7, None)]
        assert db.execute("SELECT z FROM b").fetchall() == [(3,)]
    copy = backup_path(path, 1)
    assert listed(tmp_path) == ["book.sqlite", copy.name]
    assert (schema_version(path), schema_version(copy)) == (3, 1)
    assert copy.stat().st_mode & 0o777 == 0o600
    with closing(open_database(copy, FIRST)) as db:
        assert db.execute("SELECT x FROM a").fetchall() == [(7,)]


def test_a_migration_that_fails_changes_nothing(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    filled(path)
    broken = Schema(what="the book", program="prog", create=(), steps=(("CREATE TABLE c (x INTEGER)", "NONSENSE"),))
    with pytest.raises(ConfigError, match=r"book\.sqlite: the book can't be used: near .NONSENSE."):
        open_database(path, broken)
    assert schema_version(path) == 1
    with closing(open_database(path, FIRST)) as db:
        assert db.execute("SELECT name FROM sqlite_master").fetchall() == [("a",)]


@pytest.mark.parametrize("read_only", [False, True])
def test_what_is_refused_is_left_as_it_is(tmp_path: Path, read_only: bool) -> None:
    path = tmp_path / "book.sqlite"
    whole = filled(path, THIRD)
    newer = r"the book has schema 3, written by a newer prog; this one knows up to 1\. Upgrade prog"
    other = sqlite3.connect(tmp_path / "other.sqlite")
    other.execute("CREATE TABLE theirs (x)")
    other.close()
    cases = [
        (FIRST, whole, newer),
        (THIRD, b"", "empty, so the book was lost.*Look for it"),
        (THIRD, b"no database, but long enough for one" * 300, "can't be used: file is not a database. Look for it"),
        (THIRD, whole[: len(whole) // 2], "can't be used: database disk image is malformed. Look for it"),
        (THIRD, whole[:4096] + b"\xff" * (len(whole) - 4096), "the book is damaged|malformed"),
        (THIRD, (tmp_path / "other.sqlite").read_bytes(), "a database, but not the book: its schema has the number 0"),
    ]
    for schema, content, words in cases:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words) as caught:
            open_database(path, schema, read_only=read_only)
        assert str(caught.value).startswith(f"{path}: ")
        assert path.read_bytes() == content
        assert caught.value.exit_code == 2


def test_reading_makes_and_migrates_nothing(tmp_path: Path) -> None:
    path = tmp_path / "book.sqlite"
    with pytest.raises(ConfigError, match=r"unable to open|No such file"):
        open_database(path, THIRD, read_only=True)
    filled(path)
    with pytest.raises(ConfigError, match=r"has schema 1, this prog writes 3. Start it once"):
        open_database(path, THIRD, read_only=True)
    assert listed(tmp_path) == ["book.sqlite"]


# --- the files of agent and server -----------------------------------------------------------------------------------

OURS: list[tuple[str, Schema, Callable[[Path], object]]] = [
    ("journal.sqlite", BURNT, BurnJournal),
    ("sums.sqlite", SUMS, SumJournal),
    ("ledger.sqlite", LEDGER, Ledger),
    ("runs.sqlite", RUNS, lambda path: RunStore(path.parent, wall_s=lambda: 0.0)),
]


@pytest.mark.parametrize(("name", "schema", "opened"), OURS, ids=[name for name, *_ in OURS])
def test_each_file_of_ours_refuses_a_newer_one_and_a_ruined_one(
    tmp_path: Path, name: str, schema: Schema, opened: Callable[[Path], object]
) -> None:
    path = tmp_path / name
    opened(path).close()  # type: ignore[attr-defined]
    assert schema_version(path) == schema.version
    whole = path.read_bytes()
    with closing(sqlite3.connect(path)) as db:
        db.execute(f"PRAGMA user_version={schema.version + 1}")
    future = path.read_bytes()
    words = f"{schema.what} has schema {schema.version + 1}, written by a newer {schema.program}"
    for content, found in [(future, words), (b"", "empty"), (b"gibberish" * 999, ""), (whole[:-4096], "")]:
        path.write_bytes(content)
        with pytest.raises(SordinoError, match=f"{name}: .*{found}") as caught:
            opened(path)
        assert caught.value.exit_code == 2
        assert path.read_bytes() == content


def test_run_records_of_both_earlier_schemas_are_migrated(tmp_path: Path) -> None:
    for version, dropped in [(1, ("releases", "sums")), (2, ("sums",)), (2, ())]:
        folder = tmp_path / f"from-{version}-{len(dropped)}"
        store = RunStore(folder, wall_s=lambda: 0.0)
        store.create("r1", job="j", mode="federated", job_path="", job_json="{}", model_sha256="", names=())
        store.close()
        with closing(sqlite3.connect(folder / "runs.sqlite")) as db:
            for table in dropped:
                db.execute(f"DROP TABLE {table}")
            db.execute(f"PRAGMA user_version={version}")
            db.commit()
        with RunStore(folder, wall_s=lambda: 0.0) as store:
            assert [row.run for row in store.runs()] == ["r1"]
            assert store.next_sum("r1") == 1
            store.begin("r1", 4)
            assert store.begun("r1") == 4
        assert backup_path(folder / "runs.sqlite", version).exists()


def test_the_mark_of_the_form_before_is_read_and_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    mark = Mark(ledger=b"\1" * 16, count=2, digest=b"\2" * 32)
    mark_path(path).write_text(f"{mark.ledger.hex()} 2 {mark.digest.hex()}\n")
    assert read_mark(path) == mark
    write_mark(path, mark)
    assert mark_path(path).read_text().startswith("2 0101")
    assert read_mark(path) == mark
    mark_path(path).write_text("3 whatever comes then\n")
    with pytest.raises(SordinoError, match=r"mark of form 3, written by a newer sordino-agent.*Upgrade") as caught:
        read_mark(path)
    assert caught.value.exit_code == 2


# --- files that are no databases -------------------------------------------------------------------------------------


def test_a_roster_of_a_later_form_is_refused_by_name(tmp_path: Path) -> None:
    operator = OperatorKey.generate()
    path = tmp_path / "roster.cbor"
    for fields in (["sordino-roster", 2, "whatever", "comes"], ["sordino-roster", 2]):
        body = encode(fields)
        path.write_bytes(encode([body, operator.sign("roster", body)]))
        with pytest.raises(RosterVersion, match=r"roster.cbor: roster: of form 2, this .* knows form 1") as caught:
            RosterBook(fleet="toy", operator_key=operator.public, wall_s=lambda: 0.0, path=path)
        assert caught.value.exit_code == 2
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(SordinoError, match=r"roster.cbor: .*CBOR"):
        RosterBook(fleet="toy", operator_key=operator.public, wall_s=lambda: 0.0, path=path)


def test_a_fleet_directory_of_a_later_layout_is_refused_by_name(tmp_path: Path) -> None:
    home = create_home(tmp_path / "home", fleet="toy", server="server", broker="localhost")
    marker = home.folder / "format"
    assert marker.read_text() == "1\n"
    for text, words in [("2\n", "layout 2, this sordino knows up to 1"), ("", "expected the number"), ("x", "number")]:
        marker.write_text(text)
        with pytest.raises(ConfigError, match=f"format: .*{words}"):
            Home(home.folder)
    marker.unlink()  # made before there was such a file
    assert Home(home.folder).spec.fleet == "toy"


def test_a_status_of_a_later_form_is_refused_by_name(tmp_path: Path) -> None:
    path = tmp_path / "status.json"
    for content, words in [
        (b'{"form": 2, "else": 1}', "form 2, written by a newer sordino-agent; this one knows up to 1"),
        (b"{}", "not a status file of this version.*writes it anew"),
        (b'{"name": "dev', "not a status file"),
    ]:
        path.write_bytes(content)
        with pytest.raises(ConfigError, match=words):
            read_status(path)


def test_a_dealers_masks_of_a_later_form_are_refused_by_name(tmp_path: Path) -> None:
    store = MaskStore(tmp_path)
    store.save("run-1", bytes(16), 3, {"w": np.arange(3)})
    (path,) = (tmp_path / "run-1").iterdir()
    assert list(store.load("run-1", bytes(16), 3)["w"]) == [0, 1, 2]
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"form":"1"', b'"form":"2"'))
    with pytest.raises(ConfigError, match=r"masks of form 2, this sordino knows form 1. Upgrade"):
        store.load("run-1", bytes(16), 3)
    path.write_bytes(whole[:-5])
    with pytest.raises(SordinoError, match="damaged"):
        store.load("run-1", bytes(16), 3)
