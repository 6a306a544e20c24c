"""`sordino support-bundle`: what whoever is asked for help needs to know of a fleet's server, and no secret."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec

from sordino_common.channel.identity import fingerprint_of
from sordino_common.daemon.bundle import KEEP, SET, Bundle, add_logs, files_under, select, system, versions
from sordino_common.daemon.scrub import Scrubber, secrets_in, secrets_of_environment, secrets_of_yaml
from sordino_common.errors import ConfigError
from sordino_server.dashboard.source import Source
from sordino_server.doctor import examine
from sordino_server.home import Home
from sordino_server.store import RunStore

UNITS: Final = ("sordino-server", "sordino-dealer")
_RUNS: Final = 50
_ROUNDS: Final = 30
_SHAPE: Final[dict[str, Any]] = {
    "fleet": KEEP,
    "server": KEEP,
    "server_key": SET,
    "broker": {
        **dict.fromkeys(("host", "port", "keepalive_s", "connect_timeout_s"), KEEP),
        **dict.fromkeys(("username", "password_file"), SET),
        "tls": {"ca": SET, "certificate": SET, "key": SET, "server_name": KEEP},
    },
    "database": lambda address: str(address).partition(":")[0],
}
_RUN_SHAPE: Final = dict.fromkeys(
    ("run", "job", "mode", "status", "created_s", "changed_s", "error"), KEEP
)  # not the job file: its paths and settings are the user's
_SUMMARY_SHAPE: Final = dict.fromkeys(
    ("security", "agents", "rounds", "steps", "metrics", "baseline", "seconds", "bytes_up", "bytes_down", "dropouts",
     "privacy", "overhead_vs_torch", "round_seconds"),
    KEEP,
)  # fmt: skip
_SECRET_FILES: Final = ("*.key", "*.pem", "*.token", "*.password", "*password*", "*.pgpass")


def make_bundle(folder: Path, *, version: str, logs: Sequence[Path] = (), database: str | None = None) -> Bundle:
    """Of the fleet directory `folder`. What is broken is named in it; it is made all the same."""
    scrubber = Scrubber([*_secrets(folder), *secrets_of_environment(os.environ)])
    stamp = time.strftime("%Y%m%d-%H%M%S", time.gmtime())
    home, problem = None, ""
    try:
        home = Home(folder)
    except ConfigError as error:
        problem = str(error)
    bundle = Bundle(f"sordino-{home.spec.fleet if home is not None else 'server'}-{stamp}", scrubber)
    bundle.try_add("versions.json", "of Python and packages", versions)
    bundle.try_add("system.json", "machine, clock, memory, disk", lambda: system(folder))
    if home is None:
        bundle.leave_out("fleet.json", problem)
    else:
        spec = home.spec
        database = database or spec.database
        bundle.try_add(
            "fleet.json", "fleet.yaml, without its secrets", lambda: select(msgspec.to_builtins(spec), _SHAPE)
        )
        bundle.try_add("roster.json", "the signed roster: names, roles, fingerprints", lambda: _roster(home))
    bundle.try_add("view.json", "what sordino top shows", lambda: _view(folder, version, database))
    bundle.try_add("doctor.json", "findings of sordino doctor --offline", lambda: _findings(folder, version))
    bundle.try_add("runs.json", f"the last {_RUNS} runs and their last rounds", lambda: _runs(folder, database))
    bundle.try_add("files.json", "the fleet directory: names, sizes, modes", lambda: files_under(folder))
    add_logs(bundle, UNITS, logs)
    return bundle


def _roster(home: Home) -> Any:
    roster = home.roster_book(wall_s=time.time).current
    if roster is None:
        return None
    entries = [
        {
            "name": entry.name,
            "roles": list(entry.roles),
            "zone": entry.zone,
            "fingerprint": fingerprint_of(entry.sign_key, entry.box_key),
        }
        for entry in roster.entries
    ]
    return {"epoch": roster.epoch, "expires_s": roster.expires_s, "entries": entries}


def _findings(folder: Path, version: str) -> Any:
    return [msgspec.to_builtins(finding) for finding in examine(folder, offline=True, wait_s=1.0, version=version)]


def _view(folder: Path, version: str, database: str | None) -> Any:
    with Source(folder, version=version, database=database) as source:
        return msgspec.to_builtins(source.view())


def _runs(folder: Path, database: str | None) -> Any:
    with closing(RunStore(folder, wall_s=time.time, database=database, read_only=True)) as store:
        found = []
        for row in store.runs()[-_RUNS:]:
            rounds = store.outline(row.run).records
            last = store.records(row.run, after=rounds[-_ROUNDS].round - 1 if len(rounds) >= _ROUNDS else -1)
            values = {name: getattr(row, name) for name in _RUN_SHAPE}
            told = [msgspec.to_builtins(record) for record in last]
            found.append({**values, "summary": select(row.summary, _SUMMARY_SHAPE), "last_rounds": told})
        return found


def _secrets(folder: Path) -> Iterator[bytes]:
    """Everything secret that the fleet directory keeps: to be searched for, never to be shown."""
    named: set[Path] = set()
    try:
        text = (folder / "fleet.yaml").read_text("utf-8", "replace")
    except OSError:
        text = ""
    yield from secrets_of_yaml(text)
    try:
        spec = Home(folder).spec
    except ConfigError:
        spec = None
    if spec is not None:
        tls = spec.broker.tls
        paths = (spec.server_key, spec.broker.password_file, tls.key if tls is not None else None)
        named |= {folder / Path(path).expanduser() for path in paths if path is not None}
    for pattern in _SECRET_FILES:
        named |= set(folder.rglob(pattern))
    for path in sorted(named):
        try:
            if path.is_file():
                yield from secrets_in(path.read_bytes())
        except OSError:
            continue
