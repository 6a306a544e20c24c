"""What outlives the process: runs, rounds and who took part (SQLite), parameters (safetensors). One writer per run.

Order of a checkpoint: the parameters' file is written under another name, fsynced, renamed, its folder fsynced; then
one SQLite transaction (WAL, synchronous=FULL) makes the round count. A crash in between leaves a file that no row
names. So the last row always has its file, and a run goes on from there, after kill -9 too.
"""

from __future__ import annotations

import fcntl
import json
import sqlite3
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sordino_common.channel.files import write_atomically
from sordino_common.database import Schema, open_database, transaction
from sordino_common.errors import ConfigError
from sordino_server.rounds.effects import Checkpoint, PrivateState, Scaling, SharedState
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
_KEEP_FILES: Final = 2  # the last checkpoint, and the one before for whoever is reading it now

Tensors = Mapping[str, NDArray[np.generic]]


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


class RunStore:
    """Runs under `folder` (`runs.sqlite`, `runs/<run>/`). `wall_s` dates the records. `read_only`: to look at records
    that others write; they have to be there."""

    def __init__(self, folder: Path, *, wall_s: Any, read_only: bool = False) -> None:
        self.folder = folder
        self._wall_s = wall_s
        if not read_only:
            folder.mkdir(parents=True, exist_ok=True)
        self._db = open_database(folder / RUNS_FILE, SCHEMA, read_only=read_only)
        self._db.execute("PRAGMA foreign_keys=ON")

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
            self._db.execute(
                "INSERT INTO runs (run, job, mode, status, created_s, changed_s, job_path, job_json, model_sha256,"
                " names_json) VALUES (?,?,?,?,?,?,?,?,?,?)",
                row,
            )
        except sqlite3.IntegrityError:
            raise ConfigError(f"there is already a run {run} in {self.folder}") from None

    def save(self, run: str, checkpoint: Checkpoint, *, elapsed_s: float) -> None:
        """Durable when it returns."""
        record = checkpoint.record
        names = self.row(run).names
        home = self.folder / "runs" / run
        home.mkdir(parents=True, exist_ok=True)
        file = f"round-{record.round:06d}.safetensors"
        # safetensors writes the memory as it lies, whatever the strides say.
        ordered = (np.asarray(param, order="C") for param in checkpoint.params)
        # A state on shares has no parameters here, until they open.
        tensors = dict(zip(names, ordered, strict=True)) if checkpoint.params or checkpoint.shared is None else {}
        if checkpoint.shared is not None:
            write_atomically(home / _masks_file(file), _save_masks(checkpoint.shared), mode=0o600)
        if checkpoint.private is not None:
            states = {f"{k:04d}": np.asarray(v, order="C") for k, v in enumerate(checkpoint.private.optimizer)}
            write_atomically(home / _private_file(file), save_tensors(states))
        if checkpoint.findings is not None:
            write_atomically(home / _findings_file(file), json.dumps(dict(checkpoint.findings)).encode())
        write_atomically(home / file, save_tensors(tensors, {"run": run, "round": str(record.round)}))
        with transaction(self._db):
            self._db.execute(
                "INSERT OR REPLACE INTO rounds VALUES (?,?,?,?,?,?,?,?,?,?,?,?,?,?)",
                (
                    *(run, record.round, record.loss, json.dumps(dict(record.metrics)), record.steps, record.attempts),
                    *(record.bytes_up, record.bytes_down, record.seconds, checkpoint.steps, elapsed_s),
                    *(json.dumps(asdict(checkpoint.scaling)), file, record.test_rows),
                ),
            )
            self._db.executemany(
                "INSERT OR REPLACE INTO shares VALUES (?,?,?,?,?,?,?,?,?)",
                [
                    (run, record.round, agent, s.outcome, s.rows, s.steps, s.loss, s.seconds, s.note)
                    for agent, s in record.shares.items()
                ],
            )
            self._db.execute("UPDATE runs SET changed_s=? WHERE run=?", (self._wall_s(), run))
        for old in sorted(home.glob("round-*.safetensors"))[:-_KEEP_FILES]:
            if old.name < file:
                old.unlink(missing_ok=True)
                (home / _masks_file(old.name)).unlink(missing_ok=True)
                (home / _private_file(old.name)).unlink(missing_ok=True)
                (home / _findings_file(old.name)).unlink(missing_ok=True)

    def begin(self, run: str, releases: int) -> None:
        """Durable when it returns: so many noised releases of the run have begun. The number only grows."""
        self._db.execute(
            "INSERT INTO releases VALUES (?,?) ON CONFLICT (run) DO UPDATE SET begun=max(begun, excluded.begun)",
            (run, releases),
        )

    def begun(self, run: str) -> int:
        """How many noised releases of the run have begun, after a crash as well."""
        row = self._db.execute("SELECT begun FROM releases WHERE run=?", (run,)).fetchone()
        return 0 if row is None else int(row[0])

    def next_sum(self, run: str) -> int:
        """A number for a secure sum of the run, one above the last. Durable when it returns: never given twice."""
        row = self._db.execute(
            "INSERT INTO sums VALUES (?,1) ON CONFLICT (run) DO UPDATE SET next=next+1 RETURNING next", (run,)
        ).fetchone()
        return int(row[0])

    def finish(
        self, run: str, status: str, *, summary: Mapping[str, object] | None = None, error: str | None = None
    ) -> None:
        self._db.execute(
            "UPDATE runs SET status=?, summary_json=?, error=?, changed_s=? WHERE run=?",
            (status, None if summary is None else json.dumps(summary), error, self._wall_s(), run),
        )

    @contextmanager
    def hold(self, run: str) -> Iterator[None]:
        """Be the one process that writes this run. The system lets go of it when the process ends, however it ends."""
        home = self.folder / "runs" / run
        home.mkdir(parents=True, exist_ok=True)
        with (home / "lock").open("w") as lock:
            give_up_s = time.monotonic() + _PEEK_S
            while True:
                try:
                    fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except OSError:
                    if time.monotonic() > give_up_s:
                        raise ConfigError(f"run {run} is being trained by another process") from None
                    time.sleep(_PEEK_S / 20)
            yield

    # --- reading ---------------------------------------------------------------------------------------------------

    def runs(self) -> tuple[RunRow, ...]:
        """All runs, the oldest first."""
        rows = self._db.execute(f"SELECT {_RUN_COLUMNS} FROM runs ORDER BY created_s, run").fetchall()  # noqa: S608
        return tuple(self._as_it_is(_run_row(row)) for row in rows)

    def row(self, run: str) -> RunRow:
        row = self._db.execute(f"SELECT {_RUN_COLUMNS} FROM runs WHERE run=?", (run,)).fetchone()  # noqa: S608
        if row is None:
            known = ", ".join(entry.run for entry in self.runs()[-5:]) or "none yet"
            raise ConfigError(f"there is no run {run} in {self.folder}; the latest: {known}")
        return self._as_it_is(_run_row(row))

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
        return replace(row, status="stopped")

    def records(self, run: str, *, after: int = 0) -> tuple[RoundRecord, ...]:
        """The finished rounds above number `after`, in order, with who took part."""
        shares: dict[int, dict[str, Share]] = {}
        for number, agent, outcome, rows, steps, loss, seconds, note in self._db.execute(
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
            for number, loss, metrics, steps, attempts, up, down, seconds, test_rows in self._db.execute(
                "SELECT round, loss, metrics_json, steps, attempts, bytes_up, bytes_down, seconds, test_rows"
                " FROM rounds WHERE run=? AND round>? ORDER BY round",
                (run, after),
            )
        )

    def elapsed_s(self, run: str) -> float:
        """Seconds that the run had taken when its last round was saved."""
        row = self._db.execute("SELECT max(elapsed_s) FROM rounds WHERE run=?", (run,)).fetchone()
        return float(row[0] or 0.0)

    def checkpoint(self, run: str) -> Checkpoint | None:
        """Where the run stands; None before its first round. Raises `ConfigError` if the file is damaged."""
        row = self._db.execute(
            "SELECT total_steps, scaling_json, file FROM rounds WHERE run=? ORDER BY round DESC LIMIT 1", (run,)
        ).fetchone()
        if row is None:
            return None
        steps, scaling, file = row
        fields = json.loads(scaling)
        fields |= {"offset": tuple(fields["offset"]), "scale": tuple(fields["scale"])}
        home = self.folder / "runs" / run
        tensors = _read(home / file)
        masks = home / _masks_file(file)
        shared = _read_masks(masks) if masks.exists() else None
        kept = home / _private_file(file)
        private = _read_private(kept, self.begun(run)) if kept.exists() else None
        found = home / _findings_file(file)
        findings = json.loads(found.read_bytes()) if found.exists() else None
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


def _masks_file(file: str) -> str:
    return file.replace("round-", "masks-")


def _private_file(file: str) -> str:
    return file.replace("round-", "private-")


def _findings_file(file: str) -> str:
    return file.replace("round-", "findings-").replace(".safetensors", ".json")


def _read_private(path: Path, begun: int) -> PrivateState:
    """`begun`: by the table, which also counts what began after the checkpoint."""
    states = _read(path)
    return PrivateState(optimizer=tuple(np.asarray(states[name]) for name in sorted(states)), begun=begun)


def _save_masks(shared: SharedState) -> bytes:
    """The server's half of a state on shares: a secret, as the other half is with the parties."""
    about = {
        "session": shared.session.hex(),
        "steps": str(shared.steps),
        "parties": json.dumps(shared.parties),
        "rows": json.dumps(shared.rows),
        "counters": json.dumps(dict(shared.counters)),
    }
    return save_tensors({name: np.asarray(value, order="C") for name, value in shared.masks.items()}, about)


def _read_masks(path: Path) -> SharedState:
    masks = _read(path)
    try:
        with safe_open(path, framework="numpy") as file:
            about = file.metadata()
        return SharedState(
            session=bytes.fromhex(about["session"]),
            steps=int(about["steps"]),
            masks={name: np.asarray(value, dtype=np.int64) for name, value in masks.items()},
            parties=tuple(json.loads(about["parties"])),
            rows=tuple((name, count) for name, count in json.loads(about["rows"])),
            counters=json.loads(about["counters"]),
        )
    except (KeyError, ValueError, SafetensorError) as error:
        raise ConfigError(f"{path}: damaged: {error}") from None


def _read(path: Path) -> Tensors:
    try:
        return load_tensors(path.read_bytes())
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except SafetensorError as error:
        raise ConfigError(f"{path}: damaged: {error}") from None
