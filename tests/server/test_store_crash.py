"""What crashes leave of run records, on SQLite and on PostgreSQL: kill -9 between any two statements, at any moment, of
the process and of the database; a full disk; a database that goes away in mid-run.

The law: what a method has returned is there afterwards; a number that was given is given to nobody again; a round is
there whole or not at all.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from helpers_disk import fill, small_disk
from helpers_postgres import Postgres, require_postgres
from sordino_common.errors import ConfigError
from sordino_server.database import StoreUnavailable
from sordino_server.rounds.effects import Checkpoint, Scaling
from sordino_server.rounds.events import RoundRecord, Share
from sordino_server.store import RunStore

_CHILD = """
import os, signal, sys, time
from pathlib import Path
import numpy as np
from sordino_server.store import RunStore
from sordino_server.rounds.effects import Checkpoint, Scaling
from sordino_server.rounds.events import RoundRecord, Share

def checkpoint(number):
    shares = {f"agent-{k}": Share(outcome="answered", rows=number, steps=1, loss=0.0) for k in range(5)}
    record = RoundRecord(round=number, loss=0.0, metrics={}, shares=shares, steps=1, attempts=1,
                         bytes_up=0, bytes_down=0, seconds=0.0)
    params = (np.full(20_000, number, np.float32),)
    return Checkpoint(params=params, scaling=Scaling(), steps=number, record=record)

def opened():
    return RunStore(Path(sys.argv[1]), wall_s=time.time, database=sys.argv[2] or None)

def created(store):
    store.create("r", job="toy", mode="federated", job_path="", job_json="", model_sha256="", names=("w",))
"""


def child(script: str, folder: Path, url: str | None) -> subprocess.Popen[str]:
    code = _CHILD + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", code, str(folder), url or ""], stdout=subprocess.PIPE, text=True)


@pytest.fixture(params=["sqlite", "postgres"])
def url(request: pytest.FixtureRequest) -> str | None:
    if request.param == "sqlite":
        return None
    cluster: Postgres = request.getfixturevalue("postgres")
    return cluster.url()


def opened(folder: Path, url: str | None) -> RunStore:
    return RunStore(folder, wall_s=lambda: 1_700_000_000.0, database=url)


def checkpoint(number: int) -> Checkpoint:
    shares = {f"agent-{k}": Share(outcome="answered", rows=number, steps=1, loss=0.0) for k in range(5)}
    record = RoundRecord(
        round=number, loss=0.0, metrics={}, shares=shares, steps=1, attempts=1, bytes_up=0, bytes_down=0, seconds=0.0
    )
    params = (np.full(20_000, number, np.float32),)
    return Checkpoint(params=params, scaling=Scaling(), steps=number, record=record)


def created(store: RunStore) -> None:
    store.create("r", job="toy", mode="federated", job_path="", job_json="", model_sha256="", names=("w",))


def require_whole(store: RunStore, number: int) -> None:
    """The run stands after round `number`, and all of that round is there."""
    found = store.checkpoint("r")
    assert found is not None and found.record.round == found.steps == number
    assert (found.params[0] == number).all() and found.params[0].shape == (20_000,)
    assert {share.rows for share in found.record.shares.values()} == {number} and len(found.record.shares) == 5


def test_kill_9_in_mid_save_leaves_the_last_round_whole(tmp_path: Path, url: str | None) -> None:
    """A child saves rounds and takes numbers as fast as it can, and is killed; the next goes on where it was."""
    script = """
    store = opened()
    if not store.runs():
        created(store)
    with store.hold("r"):
        found = store.checkpoint("r")
        for number in range(1 if found is None else found.steps + 1, 100000):
            index = store.next_sum("r")
            store.begin("r", number)
            store.save("r", checkpoint(number), elapsed_s=0)
            print(number, index, flush=True)
    """
    given: list[int] = []
    reached = 0
    for enough in (7, 3):
        process = child(script, tmp_path, url)
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            lines.append(line.split())
            if len(lines) == enough:
                os.kill(process.pid, signal.SIGKILL)
        process.stdout.close()
        process.wait()
        numbers = [int(number) for number, _ in lines]
        assert numbers == list(range(numbers[0], numbers[0] + len(numbers))) and numbers[0] in (
            reached + 1,
            reached + 2,
        )
        given += [int(index) for _, index in lines]
        reached = numbers[-1]
    with opened(tmp_path, url) as store, store.hold("r"):
        found = store.checkpoint("r")
        assert found is not None and found.record.round in (reached, reached + 1)  # saved, and killed before it said so
        require_whole(store, found.record.round)
        assert store.begun("r") in (found.record.round, found.record.round + 1)
        given.append(store.next_sum("r"))
    assert given == sorted(set(given)), "a number twice"


def test_killed_before_any_statement_of_a_save_it_is_the_old_round_or_the_new(tmp_path: Path, url: str | None) -> None:
    """A child for each k, which dies before its k-th statement to the database, or k-th step of writing files."""
    script = """
    import sordino_server.store as module

    class Mortal:
        def __init__(self, wrapped): self._wrapped = wrapped
        def __getattr__(self, name):
            found = getattr(self._wrapped, name)
            if name in ("rows", "write", "write_all", "transaction"):
                tick()
            return found

    def tick():
        global left
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)

    write = module.write_atomically
    def write_atomically(*arguments, **more):
        tick()
        write(*arguments, **more)
        tick()
    module.write_atomically = write_atomically

    number, ended, left = 1, False, 10**9
    store = opened()
    created(store)
    store.save("r", checkpoint(1), elapsed_s=0)
    store.close()
    for moment in range(1, 40):
        pid = os.fork()
        if pid == 0:
            store = opened()
            with store.hold("r"):
                store._db = Mortal(store._db)
                left = moment
                store.save("r", checkpoint(store.checkpoint("r").steps + 1), elapsed_s=0)
                store.next_sum("r")
            os._exit(0)
        _, status = os.waitpid(pid, 0)
        store = opened()
        with store.hold("r"):
            found = store.checkpoint("r")
            rows = {share.rows for share in found.record.shares.values()}
            assert found.steps in (number, number + 1) and rows == {found.steps} and len(found.record.shares) == 5
            assert (found.params[0] == found.steps).all()
            number = found.steps
        store.close()
        if os.WIFEXITED(status):
            assert os.WEXITSTATUS(status) == 0
            ended = True
            break
        assert os.WTERMSIG(status) == signal.SIGKILL
    store = opened()
    print(moment, number, store.next_sum("r"), ended, flush=True)
    """
    process = child(script, tmp_path, url)
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    moments, rounds, sums, ended = out.split()
    assert ended == "True" and int(moments) > 8
    assert 2 <= int(rounds) <= 4 and int(sums) >= 2  # the last child saved, and one or two before it were killed later


def test_two_processes_never_get_the_same_number(tmp_path: Path, url: str | None) -> None:
    with opened(tmp_path, url) as store:
        created(store)
    script = """
    store = opened()
    print(*(store.next_sum("r") for _ in range(50)))
    """
    processes = [child(script, tmp_path, url) for _ in range(2)]
    numbers: list[int] = []
    for process in processes:
        out, _ = process.communicate(timeout=60)
        assert process.returncode == 0
        taken = [int(word) for word in out.split()]
        assert taken == sorted(taken)
        numbers += taken
    assert sorted(numbers) == list(range(1, 101))


# --- a full disk ------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_named_and_the_last_round_stays(tmp_path: Path) -> None:
    with small_disk(tmp_path / "small") as folder, opened(folder, None) as store:
        created(store)
        number = 0
        with store.hold("r"), pytest.raises(StoreUnavailable) as caught:  # noqa: PT012
            while True:
                number += 1
                store.save("r", checkpoint(number), elapsed_s=0.0)
                (folder / f"ballast-{number}").write_bytes(bytes(64 << 10))
        assert caught.value.exit_code == 3
        for word in (str(folder), "free some room", "--resume"):
            assert word in str(caught.value)
        assert number > 1
        require_whole(store, number - 1)
        fill(folder)
        for attempt in (lambda: store.next_sum("r"), lambda: store.begin("r", 1)):
            with pytest.raises(StoreUnavailable, match=r"runs.sqlite: the run records can't be used: .*disk is full"):
                attempt()
        require_whole(store, number - 1)
        for path in folder.glob("ballast*"):
            path.unlink()
        assert store.next_sum("r") == 1
        store.save("r", checkpoint(number), elapsed_s=0.0)
        require_whole(store, number)


def test_a_lock_that_cant_be_opened_is_named(tmp_path: Path) -> None:
    with opened(tmp_path, None) as store:
        created(store)
        (tmp_path / "runs" / "r" / "lock").mkdir(parents=True)
        with pytest.raises(StoreUnavailable, match=r"lock: can't be written: Is a directory"), store.hold("r"):
            pass


# --- damage -----------------------------------------------------------------------------------------------------------


def test_damaged_records_are_named_or_cut_at_a_round(tmp_path: Path) -> None:
    """Bits flipped in, and pieces cut off, the file and its log. Not promised: SQLite's log ends at its first damaged
    transaction and does not say so, and its file has no checksum for a figure. What holds then is on the devices: a
    helper answers no number twice, a ledger counts for itself (docs/failures.md)."""
    kept = tmp_path / "kept"
    with opened(tmp_path / "whole", None) as store:
        created(store)
        for number in range(1, 8):
            store.save("r", checkpoint(number), elapsed_s=0.0)
            if number == 4:
                with contextlib.closing(sqlite3.connect(tmp_path / "whole" / "runs.sqlite")) as db:
                    db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        shutil.copytree(tmp_path / "whole", kept)  # with its log, as a crash leaves it
    rng = np.random.default_rng(5)
    named, short = 0, 0
    for trial in range(400 if os.environ.get("SORDINO_SOAK") else 40):
        folder = tmp_path / "hurt"
        shutil.copytree(kept, folder)
        path = folder / ("runs.sqlite-wal" if trial % 4 < 2 else "runs.sqlite")
        data = bytearray(path.read_bytes())
        if trial % 2:
            del data[int(rng.integers(len(data))) :]
        else:
            for at in rng.integers(len(data), size=40):
                data[at] ^= 1 << int(rng.integers(8))
        path.write_bytes(data)
        try:
            with opened(folder, None) as store:
                rounds = [record.round for record in store.records("r")]
        except (ConfigError, StoreUnavailable) as error:
            said = str(error)
            named += 1
        else:
            said = "runs.sqlite"
            short += len(rounds) < 7
            if "wal" in path.name:
                assert rounds == list(range(1, len(rounds) + 1)) and len(rounds) >= 4
        assert "runs.sqlite" in said or "there is no run r" in said, said
        shutil.rmtree(folder)
    assert named > 0 < short


@pytest.mark.parametrize("file", ["round", "masks", "private", "findings"])
def test_a_flipped_bit_or_a_lost_tail_of_a_checkpoints_file_is_named(tmp_path: Path, file: str) -> None:
    """Parameters with one wrong bit would train on to another model without a word."""
    from sordino_server.rounds.effects import PrivateState, SharedState

    masks = {"w": np.arange(100)}
    shared = SharedState(session=b"s" * 32, steps=1, masks=masks, parties=("a", "b"), rows=(("a", 3),))
    private = PrivateState(optimizer=(np.arange(50.0),), begun=1)
    with opened(tmp_path, None) as store:
        created(store)
        state = replace(checkpoint(1), shared=shared, private=private, findings={"mean": [1.0, 2.0], "of": "x"})
        store.save("r", state, elapsed_s=0.0)
        require_whole(store, 1)
        (path,) = (tmp_path / "runs" / "r").glob(f"{file}-*")
        data = path.read_bytes()
        rng = np.random.default_rng(6)
        for trial in range(30):
            hurt = bytearray(data)
            if trial % 3:
                hurt[int(rng.integers(len(data)))] ^= 1 << int(rng.integers(8))
            else:
                del hurt[int(rng.integers(len(data))) :]
            path.write_bytes(hurt)
            with pytest.raises(ConfigError, match=rf"{path.name}: damaged"):
                store.checkpoint("r")
        path.write_bytes(data)
        require_whole(store, 1)


def test_what_is_no_database_is_named(tmp_path: Path) -> None:
    (tmp_path / "runs.sqlite").write_bytes(b"this is no database, but it is long enough to be looked at" * 9)
    with pytest.raises(ConfigError, match=r"runs.sqlite: the run records can't be used"):
        opened(tmp_path, None)


def test_tables_of_another_version_are_left_alone(tmp_path: Path, url: str | None) -> None:
    opened(tmp_path, url).close()
    if url is None:
        db = sqlite3.connect(tmp_path / "runs.sqlite")
        db.execute("PRAGMA user_version=99")
    else:
        import psycopg

        db = psycopg.connect(url)
        db.execute("UPDATE sordino_schema SET version=99")
    db.commit()
    db.close()
    with pytest.raises(ConfigError, match=r"has schema 99, written by a newer sordino; this one knows up to"):
        opened(tmp_path, url)


# --- the database itself ----------------------------------------------------------------------------------------------


@pytest.fixture
def own_postgres() -> Iterator[Postgres]:
    """A cluster that the test may stop."""
    cluster = Postgres(require_postgres())
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.remove()


def test_the_database_crashes_in_mid_run(tmp_path: Path, own_postgres: Postgres) -> None:
    url = own_postgres.url()
    with opened(tmp_path, url) as store:
        created(store)
        with pytest.raises(StoreUnavailable) as caught, store.hold("r"):  # noqa: PT012
            for number in range(1, 4):
                store.save("r", checkpoint(number), elapsed_s=0.0)
                assert store.next_sum("r") == number
            own_postgres.crash()
            store.next_sum("r")
        assert caught.value.exit_code == 3
        assert "PostgreSQL database runs0" in str(caught.value) and "--resume" in str(caught.value)
        with pytest.raises(StoreUnavailable, match=r"no connection: .*Is the server running"):
            opened(tmp_path, url)
        own_postgres.start()
        with pytest.raises(StoreUnavailable):  # who held the run has lost it, and must not write any more
            store.save("r", checkpoint(4), elapsed_s=0.0)
    with opened(tmp_path, url) as store, store.hold("r"):
        require_whole(store, 3)
        assert store.next_sum("r") in (4, 5)
    own_postgres.crash()
    own_postgres.start("fsync=off")
    with pytest.raises(ConfigError, match=r"fsync = off"):
        opened(tmp_path, url)


def test_older_tables_are_migrated_in_the_database_too(tmp_path: Path, postgres: Postgres) -> None:
    """Two processes begin at the same moment; a viewer before them is told to wait for one."""
    import psycopg

    url = postgres.url()
    with pytest.raises(ConfigError, match=r"no run records are in it yet"):
        RunStore(tmp_path, wall_s=lambda: 0.0, database=url, read_only=True)
    with opened(tmp_path, url) as store:
        created(store)
    with psycopg.connect(url) as db:
        db.execute("DROP TABLE sums")
        db.execute("UPDATE sordino_schema SET version=1")
    with pytest.raises(ConfigError, match=r"has schema 1, this sordino writes \d+\. Start"):
        RunStore(tmp_path, wall_s=lambda: 0.0, database=url, read_only=True)
    with ThreadPoolExecutor(2) as pool:
        stores = list(pool.map(lambda _: opened(tmp_path, url), range(2)))
    assert sorted(store.next_sum("r") for store in stores) == [1, 2]
    for store in stores:
        store.close()
    with RunStore(tmp_path, wall_s=lambda: 0.0, database=url, read_only=True) as viewer:
        assert [row.run for row in viewer.runs()] == ["r"]
        with pytest.raises(ConfigError, match=r"read-only transaction"):
            viewer.next_sum("r")
