"""What outlives the process: runs, rounds and who took part (a database), parameters (safetensors). One writer per run.

Order of a checkpoint: the parameters' file is written under another name, fsynced, renamed, its folder fsynced; then
one transaction of the database makes the round count. A crash in between leaves a file that no row names. So the last
row always has its file, and a run goes on from there, after kill -9 too.

The database is SQLite in the fleet directory, or PostgreSQL (`database`). The files stay in the fleet directory.
"""

from __future__ import annotations

import fcntl
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import IO, Any, Final

from safetensors.numpy import save as save_tensors

from sordino_common.channel.files import write_atomically
from sordino_common.database import Schema
from sordino_common.errors import ConfigError
from sordino_server.checkpoint_files import (
    Tensors,
    findings_file,
    masks_file,
    private_file,
    read_findings,
    read_masks,
    read_private,
    read_tensors,
    write_findings,
    write_masks,
    write_private,
    write_tensors,
)
from sordino_server.database import Database, Duplicate, Held, StoreUnavailable, open_records
from sordino_server.rounds.effects import Checkpoint, Scaling
from sordino_server.rounds.events import RoundRecord, Share

_NUMBERS: Final = (
    "CREATE TABLE IF NOT EXISTS sums (run TEXT PRIMARY KEY, next INTEGER NOT NULL) STRICT, WITHOUT ROWID",
    "CREATE TABLE IF NOT EXISTS releases (run TEXT PRIMARY KEY, begun INTEGER NOT NULL) STRICT, WITHOUT ROWID",
)
SCHEMA: Final = Schema(
    what="the run records",
    program="sordino",
    create=(
        """CREATE TABLE runs (
    run TEXT PRIMARY KEY, job TEXT NOT NULL, mode TEXT NOT NULL, status TEXT NOT NULL, created_s REAL NOT NULL,
    changed_s REAL NOT NULL, job_path TEXT NOT NULL, job_json TEXT NOT NULL, model_sha256 TEXT NOT NULL,
    names_json TEXT NOT NULL, summary_json TEXT, error TEXT
) STRICT""",
        """CREATE TABLE rounds (
    run TEXT NOT NULL REFERENCES runs(run), round INTEGER NOT NULL, loss REAL, metrics_json TEXT NOT NULL,
    steps INTEGER NOT NULL, attempts INTEGER NOT NULL, bytes_up INTEGER NOT NULL, bytes_down INTEGER NOT NULL,
    seconds REAL NOT NULL, total_steps INTEGER NOT NULL, elapsed_s REAL NOT NULL, scaling_json TEXT NOT NULL,
    file TEXT NOT NULL, test_rows INTEGER NOT NULL, PRIMARY KEY (run, round)
) STRICT, WITHOUT ROWID""",
        """CREATE TABLE shares (
    run TEXT NOT NULL, round INTEGER NOT NULL, agent TEXT NOT NULL, outcome TEXT NOT NULL, rows INTEGER NOT NULL,
    steps INTEGER NOT NULL, loss REAL, seconds REAL NOT NULL, note TEXT NOT NULL, PRIMARY KEY (run, round, agent)
) STRICT, WITHOUT ROWID""",
        *_NUMBERS,
    ),
    steps=(_NUMBERS, _NUMBERS),  # 2 was written with and without the table of sums
    advice="Put it back from a backup, together with the folder runs beside it",
)
RUNS_FILE: Final = "runs.sqlite"
_PEEK_S: Final = 0.4  # whoever only looks whether a run is held (`_as_it_is`) has its lock for some microseconds
_SAVE_ROUND: Final = """
INSERT INTO rounds (run, round, loss, metrics_json, steps, attempts, bytes_up, bytes_down, seconds, total_steps,
    elapsed_s, scaling_json, file, test_rows) VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)
ON CONFLICT (run, round) DO UPDATE SET loss=excluded.loss, metrics_json=excluded.metrics_json, steps=excluded.steps,
    attempts=excluded.attempts, bytes_up=excluded.bytes_up, bytes_down=excluded.bytes_down, seconds=excluded.seconds,
    total_steps=excluded.total_steps, elapsed_s=excluded.elapsed_s, scaling_json=excluded.scaling_json,
    file=excluded.file, test_rows=excluded.test_rows
"""
_SAVE_SHARE: Final = """
INSERT INTO shares (run, round, agent, outcome, rows, steps, loss, seconds, note) VALUES (?,?,?,?,?,?,?,?,?)
ON CONFLICT (run, round, agent) DO UPDATE SET outcome=excluded.outcome, rows=excluded.rows, steps=excluded.steps,
    loss=excluded.loss, seconds=excluded.seconds, note=excluded.note
"""
_KEEP_FILES: Final = 2  # the last checkpoint, and the one before for whoever is reading it now


@dataclass(frozen=True, slots=True, kw_only=True)
class RunRow:
    """One run as `sordino runs` lists it."""

    run: str
    job: str
    mode: str
    status: str  # running | stopped (by kill -9 or a power cut) | interrupted (in order) | failed | done
    created_s: float
    changed_s: float
    job_path: str
    job_json: str
    model_sha256: str
    names: tuple[str, ...]
    summary: Mapping[str, Any] | None
    error: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Outline:
    """Rounds of a run without who took part; (answered, asked) by round, and by agent over all these rounds."""

    records: Sequence[RoundRecord]
    rounds: Mapping[int, tuple[int, int]]
    agents: Mapping[str, tuple[int, int]]


class RunStore:
    """Runs under `folder` (`runs.sqlite`, `runs/<run>/`). `wall_s` dates the records. `database`: where the records are
    instead of `runs.sqlite` (postgresql://...). `read_only`: to look at records of others; they have to be there.

    Raises `ConfigError` (address, damage, another version) and `StoreUnavailable` (away, full), its methods do too."""

    def __init__(self, folder: Path, *, wall_s: Any, database: str | None = None, read_only: bool = False) -> None:
        self.folder = folder
        self._wall_s = wall_s
        if not read_only:
            with _disk(folder):
                folder.mkdir(parents=True, exist_ok=True)
        self._db: Database = open_records(folder / RUNS_FILE, database, schema=SCHEMA, read_only=read_only)

    def close(self) -> None:
        self._db.close()

    def __enter__(self) -> RunStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # --- writing ---------------------------------------------------------------------------------------------------

    def create(
        self, run: str, *, job: str, mode: str, job_path: str, job_json: str, model_sha256: str, names: tuple[str, ...]
    ) -> None:
        now_s = self._wall_s()
        row = (run, job, mode, "running", now_s, now_s, job_path, job_json, model_sha256, json.dumps(names))
        try:
            self._db.write(
                "INSERT INTO runs (run, job, mode, status, created_s, changed_s, job_path, job_json, model_sha256,"
                " names_json) VALUES (?,?,?,?,?,?,?,?,?,?)",
                row,
            )
        except Duplicate:
            raise ConfigError(f"there is already a run {run} in {self._where}") from None

    def save(self, run: str, checkpoint: Checkpoint, *, elapsed_s: float) -> None:
        """Durable when it returns."""
        record = checkpoint.record
        names = self.row(run).names
        home = self._home(run)
        file = f"round-{record.round:06d}.safetensors"
        # A state on shares has no parameters here, until they open.
        hidden = checkpoint.shared is not None and not checkpoint.params
        tensors = {} if hidden else dict(zip(names, checkpoint.params, strict=True))
        with _disk(home / file):
            if checkpoint.shared is not None:
                write_masks(home / masks_file(file), checkpoint.shared)
            if checkpoint.private is not None:
                write_private(home / private_file(file), checkpoint.private)
            if checkpoint.findings is not None:
                write_findings(home / findings_file(file), checkpoint.findings)
            write_tensors(home / file, tensors, {"run": run, "round": str(record.round)})
        with self._db.transaction():
            self._db.write(
                _SAVE_ROUND,
                (
                    *(run, record.round, record.loss, json.dumps(dict(record.metrics)), record.steps, record.attempts),
                    *(record.bytes_up, record.bytes_down, record.seconds, checkpoint.steps, elapsed_s),
                    *(json.dumps(asdict(checkpoint.scaling)), file, record.test_rows),
                ),
            )
            self._db.write_all(
                _SAVE_SHARE,
                [
                    (run, record.round, agent, s.outcome, s.rows, s.steps, s.loss, s.seconds, s.note)
                    for agent, s in record.shares.items()
                ],
            )
            self._db.write("UPDATE runs SET changed_s=? WHERE run=?", (self._wall_s(), run))
        for old in sorted(home.glob("round-*.safetensors"))[:-_KEEP_FILES]:
            if old.name < file:
                old.unlink(missing_ok=True)
                (home / masks_file(old.name)).unlink(missing_ok=True)
                (home / private_file(old.name)).unlink(missing_ok=True)
                (home / findings_file(old.name)).unlink(missing_ok=True)

    def begin(self, run: str, releases: int) -> None:
        """Durable when it returns: so many noised releases of the run have begun. The number only grows."""
        self._db.write(
            "INSERT INTO releases (run, begun) VALUES (?,?) ON CONFLICT (run) DO UPDATE SET begun="
            "CASE WHEN excluded.begun > releases.begun THEN excluded.begun ELSE releases.begun END",
            (run, releases),
        )

    def begun(self, run: str) -> int:
        """How many noised releases of the run have begun, after a crash as well."""
        found = self._db.rows("SELECT begun FROM releases WHERE run=?", (run,))
        return int(found[0][0]) if found else 0

    def next_sum(self, run: str) -> int:
        """A number for a secure sum of the run, one above the last. Durable when it returns: never given twice."""
        ((number,),) = self._db.rows(
            "INSERT INTO sums (run, next) VALUES (?,1) ON CONFLICT (run) DO UPDATE SET next=sums.next+1 RETURNING next",
            (run,),
        )
        return int(number)

    def finish(
        self, run: str, status: str, *, summary: Mapping[str, object] | None = None, error: str | None = None
    ) -> None:
        self._db.write(
            "UPDATE runs SET status=?, summary_json=?, error=?, changed_s=? WHERE run=?",
            (status, None if summary is None else json.dumps(summary), error, self._wall_s(), run),
        )

    @contextmanager
    def hold(self, run: str) -> Iterator[None]:
        """Be the one process that writes this run. The system lets go of it when the process ends, however it ends."""
        path = self._home(run) / "lock"
        with _disk(path):
            opened = path.open("w")
        with opened as lock:
            if not _locked(lock):
                raise ConfigError(f"run {run} is being trained by another process")
            try:
                with self._db.hold(run):  # on other hosts as well, if the records are not only here
                    yield
            except Held:
                raise ConfigError(f"run {run} is being trained by another process, on another host") from None

    # --- reading ---------------------------------------------------------------------------------------------------

    def runs(self) -> tuple[RunRow, ...]:
        """All runs, the oldest first."""
        rows = self._db.rows(f"SELECT {_RUN_COLUMNS} FROM runs ORDER BY created_s, run")  # noqa: S608
        return tuple(self._as_it_is(_run_row(row)) for row in rows)

    def row(self, run: str) -> RunRow:
        found = self._db.rows(f"SELECT {_RUN_COLUMNS} FROM runs WHERE run=?", (run,))  # noqa: S608
        if not found:
            known = ", ".join(entry.run for entry in self.runs()[-5:]) or "none yet"
            raise ConfigError(f"there is no run {run} in {self._where}; the latest: {known}")
        return self._as_it_is(_run_row(found[0]))

    def _as_it_is(self, row: RunRow) -> RunRow:
        """A run that is `running` by its record, but that no process holds, has been killed."""
        if row.status != "running":
            return row
        try:
            with (self.folder / "runs" / row.run / "lock").open("r") as lock:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            pass
        except OSError:
            return row
        return row if self._db.held(row.run) else replace(row, status="stopped")

    def records(self, run: str, *, after: int = -1) -> tuple[RoundRecord, ...]:
        """The finished rounds above number `after`, in order, with who took part."""
        shares: dict[int, dict[str, Share]] = {}
        for number, agent, outcome, rows, steps, loss, seconds, note in self._db.rows(
            "SELECT round, agent, outcome, rows, steps, loss, seconds, note FROM shares WHERE run=? AND round>?"
            " ORDER BY agent",
            (run, after),
        ):
            shares.setdefault(number, {})[agent] = Share(
                outcome=outcome, rows=rows, steps=steps, loss=loss, seconds=seconds, note=note
            )
        return tuple(
            RoundRecord(
                round=number,
                loss=loss,
                metrics=json.loads(metrics),
                shares=shares.get(number, {}),
                steps=steps,
                attempts=attempts,
                bytes_up=up,
                bytes_down=down,
                seconds=seconds,
                test_rows=test_rows,
            )
            for number, loss, metrics, steps, attempts, up, down, seconds, test_rows in self._db.rows(
                "SELECT round, loss, metrics_json, steps, attempts, bytes_up, bytes_down, seconds, test_rows"
                " FROM rounds WHERE run=? AND round>? ORDER BY round",
                (run, after),
            )
        )

    def outline(self, run: str, *, after: int = -1) -> Outline:
        """The finished rounds above number `after`, with `shares` counted by the database: that costs a hundredth."""
        rows = self._db.rows(
            "SELECT round, loss, metrics_json, steps, attempts, bytes_up, bytes_down, seconds, test_rows FROM rounds"
            " WHERE run=? AND round>? ORDER BY round",
            (run, after),
        )
        until = rows[-1][0] if rows else after  # a round that is saved meanwhile is for the next time
        counted = "sum(CASE WHEN outcome='answered' THEN 1 ELSE 0 END), count(*) FROM shares"
        where = "WHERE run=? AND round>? AND round<=? GROUP BY"
        by_round = self._db.rows(f"SELECT round, {counted} {where} round", (run, after, until))
        by_agent = self._db.rows(f"SELECT agent, {counted} {where} agent", (run, after, until))
        records = [
            RoundRecord(
                round=number,
                loss=loss,
                metrics=json.loads(metrics),
                shares={},
                steps=steps,
                attempts=attempts,
                bytes_up=up,
                bytes_down=down,
                seconds=seconds,
                test_rows=test_rows,
            )
            for number, loss, metrics, steps, attempts, up, down, seconds, test_rows in rows
        ]
        return Outline(
            records=records,
            rounds={int(number): (int(answered), int(asked)) for number, answered, asked in by_round},
            agents={str(agent): (int(answered), int(asked)) for agent, answered, asked in by_agent},
        )

    def totals(self) -> dict[str, Any]:
        """Of all finished rounds: `rounds`, `seconds`, `bytes_up`, `bytes_down`, and `answers` by outcome."""
        (row,) = self._db.rows("SELECT count(*), sum(seconds), sum(bytes_up), sum(bytes_down) FROM rounds")
        answers = self._db.rows("SELECT outcome, count(*) FROM shares GROUP BY outcome")
        return {
            "rounds": int(row[0]),
            "seconds": float(row[1] or 0.0),
            "bytes_up": int(row[2] or 0),
            "bytes_down": int(row[3] or 0),
            "answers": {str(outcome): int(many) for outcome, many in answers},
        }

    def elapsed_s(self, run: str) -> float:
        """Seconds that the run had taken when its last round was saved."""
        ((most,),) = self._db.rows("SELECT max(elapsed_s) FROM rounds WHERE run=?", (run,))
        return float(most or 0.0)

    def checkpoint(self, run: str) -> Checkpoint | None:
        """Where the run stands; None before its first round. Raises `ConfigError` if the file is damaged."""
        found = self._db.rows(
            "SELECT total_steps, scaling_json, file FROM rounds WHERE run=? ORDER BY round DESC LIMIT 1", (run,)
        )
        if not found:
            return None
        ((steps, scaling, file),) = found
        fields = json.loads(scaling)
        fields |= {"offset": tuple(fields["offset"]), "scale": tuple(fields["scale"])}
        home = self.folder / "runs" / run
        tensors, _ = read_tensors(home / file)
        masks = home / masks_file(file)
        shared = read_masks(masks) if masks.exists() else None
        kept = home / private_file(file)
        private = read_private(kept, self.begun(run)) if kept.exists() else None
        told = home / findings_file(file)
        findings = read_findings(told) if told.exists() else None
        # Masks are written before the row: what is newer is durable with the parties, too.
        steps = steps if shared is None else shared.steps
        try:
            params = tuple(tensors[name] for name in self.row(run).names) if tensors or shared is None else ()
        except KeyError as error:
            raise ConfigError(f"{file} of run {run} lacks the parameter {error}") from None
        return Checkpoint(
            params=params,
            scaling=Scaling(**fields),
            steps=steps,
            record=self.records(run)[-1],
            shared=shared,
            private=private,
            findings=findings,
        )

    def tensors(self, run: str) -> Tensors:
        """The last checkpoint's parameters by their names in the state dict."""
        names = self.row(run).names
        checkpoint = self.checkpoint(run)
        if checkpoint is None:
            raise ConfigError(f"run {run} has no finished round yet: there is nothing to export")
        if checkpoint.shared is not None and not checkpoint.params:
            raise ConfigError(f"the parameters of run {run} have not opened to the server: there is nothing to export")
        return dict(zip(names, checkpoint.params, strict=True))

    @property
    def _where(self) -> str:
        return self._db.name if self._db.name != str(self.folder / RUNS_FILE) else str(self.folder)

    def _home(self, run: str) -> Path:
        """The folder of the run's files, made if it is not there."""
        home = self.folder / "runs" / run
        with _disk(home):
            home.mkdir(parents=True, exist_ok=True)
        return home


def _locked(file: IO[str]) -> bool:
    """Whether `file` is ours now."""
    give_up_s = time.monotonic() + _PEEK_S
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            if time.monotonic() > give_up_s:
                return False
            time.sleep(_PEEK_S / 20)
        else:
            return True


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    """An error of the file system is told with its place and what helps."""
    try:
        yield
    except OSError as error:
        raise StoreUnavailable(
            f"{path}: can't be written: {error.strerror}. Mend that (if the disk is full, free some room); a run goes "
            "on from its last checkpoint with: sordino train --resume RUN"
        ) from None


_RUN_COLUMNS: Final = (
    "run, job, mode, status, created_s, changed_s, job_path, job_json, model_sha256, names_json, summary_json, error"
)


def _run_row(row: tuple[Any, ...]) -> RunRow:
    run, job, mode, status, created_s, changed_s, job_path, job_json, digest, names, summary, error = row
    return RunRow(
        run=run,
        job=job,
        mode=mode,
        status=status,
        created_s=created_s,
        changed_s=changed_s,
        job_path=job_path,
        job_json=job_json,
        model_sha256=digest,
        names=tuple(json.loads(names)),
        summary=None if summary is None else json.loads(summary),
        error=error,
    )


def export(tensors: Tensors, path: Path, *, run: str, scaling: Scaling | None = None) -> None:
    """A state dict as safetensors: `model.load_state_dict(safetensors.torch.load_file(path))` takes it.

    `scaling`, if any, goes into the file's metadata as JSON: the model was trained on (x - offset) / scale and gives
    (y - target_offset) / target_scale."""
    metadata = {"format": "pt", "run": run}
    if scaling is not None and scaling != Scaling():
        metadata["scaling"] = json.dumps(asdict(scaling))
    try:
        write_atomically(path, save_tensors(dict(tensors), metadata))
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
