"""What `sordino-agent check` finds in the state folder: key, databases, disk; and this device's place in the roster."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path

from sordino_agent.aggregate.journal import SCHEMA as SUMS_SCHEMA
from sordino_agent.config import JOURNAL_FILE, LEDGER_FILE, STATUS_FILE, SUMS_FILE, LoadedConfig
from sordino_agent.journal_mark import JournalMark
from sordino_agent.service import roster_book
from sordino_agent.spdz.journal import SCHEMA as JOURNAL_SCHEMA
from sordino_agent.status import is_alive, read_status
from sordino_common.channel.roster import Roster
from sordino_common.database import Schema, open_database, schema_version
from sordino_common.diagnosis import files
from sordino_common.diagnosis.finding import SECURITY, Finding, error, ok, untried, warning
from sordino_common.diagnosis.standing import roster_ends
from sordino_common.errors import ConfigError, RosterError, SordinoError

_MOST_LEDGER = 300 << 20  # bytes: the ledger with all the entries that it holds
_LEAST_ROOM = 64 << 20


def state_findings(loaded: LoadedConfig) -> Iterator[Finding]:
    """Folder, key, what is in the folder, and room for more."""
    folder = loaded.state_dir
    broken = False
    for finding in files.own_folder(folder, "state"):
        broken = broken or finding.exit_code == 2
        yield finding
    if broken:
        return
    yield from files.loose_files(folder, "state")
    try:
        key_findings = list(files.private_file(loaded.key_file, "key"))
    except ConfigError as problem:  # a credential, which only the unit is given
        key_findings = [untried("key", str(problem), "run the check as the unit does, or look at its log")]
    if all(finding.level == "ok" for finding in key_findings):
        try:
            yield ok("key", f"device key {loaded.device_key().fingerprint}")
        except ConfigError as problem:
            yield error("key", str(problem), "put it back from a backup, or make one: sordino-agent init")
    else:
        yield from key_findings
    yield from _databases(loaded)
    stores = loaded.config.limits.store_bytes + loaded.config.limits.results_bytes
    yield from files.disk_room(
        folder, wanted_bytes=max(_LEAST_ROOM, min(stores, _MOST_LEDGER)), why="the agent's state"
    )
    yield from _daemon(loaded)


def _databases(loaded: LoadedConfig) -> Iterator[Finding]:
    """The two journals; the ledger is read whole by `check_offer`."""
    for name, schema, table in ((JOURNAL_FILE, JOURNAL_SCHEMA, "sessions"), (SUMS_FILE, SUMS_SCHEMA, "answered")):
        path = loaded.state_file(name)
        try:
            mark = JournalMark(path, schema)
            mark.require_there()
        except ConfigError as problem:
            yield error("database", str(problem), schema.advice)
            continue
        if path.exists():
            yield from _database(path, schema, table=table, at_least=mark.count)
    path = loaded.state_file(LEDGER_FILE)
    if path.exists():
        remedy = "nothing is released under it: put it back from a backup, with its .mark"
        yield from files.whole_database(path, "the privacy ledger", remedy=remedy)


def _database(path: Path, schema: Schema, *, table: str, at_least: int) -> Iterator[Finding]:
    remedy = schema.advice[0].lower() + schema.advice[1:]
    damage = [finding for finding in files.whole_database(path, schema.what, remedy=remedy) if finding.level != "ok"]
    if damage:
        yield from damage
        return
    try:
        found = schema_version(path)
        count = 0
        if found == schema.version:
            with closing(open_database(path, schema, read_only=True)) as db:
                (count,) = db.execute(f"SELECT count(*) FROM {table}").fetchone()  # noqa: S608  # a name of ours
    except (sqlite3.DatabaseError, ConfigError) as problem:
        yield error("database", f"{path}, {schema.what}: {problem}", remedy)
        return
    if found > schema.version:
        text = f"{path}, {schema.what}: schema {found}, of a newer sordino-agent; this one knows up to {schema.version}"
        yield error("database", text, "upgrade sordino-agent, or put back the file from before the upgrade")
    elif found < schema.version:
        text = (
            f"{path}, {schema.what}: schema {found}; the next start migrates it to {schema.version}, and keeps a copy"
        )
        yield warning("database", text, "back it up before, if you like")
    elif count < at_least:
        text = f"{path}, {schema.what}: {count} entries, but it has had {at_least}: cut short, or an old copy"
        yield error("database", text, remedy)
    else:
        yield ok("database", f"{path}, {schema.what}: whole, schema {found}, {count} entries")


def _daemon(loaded: LoadedConfig) -> Iterator[Finding]:
    path = loaded.state_file(STATUS_FILE)
    if not path.exists():
        return
    try:
        status = read_status(path)
    except ConfigError as problem:
        yield warning("daemon", str(problem), "start the agent: it writes the file anew")
        return
    if not is_alive(status):
        yield warning("daemon", f"not running; last seen as process {status.pid}", "systemctl start sordino-agent")
    elif status.server_unlike:
        yield error("versions", status.server_unlike, "upgrade the older side")
    else:
        yield ok("daemon", f"process {status.pid} is {status.state}, version {status.version}")


@dataclass(slots=True, kw_only=True)
class Standing:
    """Our place in the roster, and that roster if there is one that can be used."""

    roster: Roster | None = None
    findings: list[Finding] = field(default_factory=list)


def standing(loaded: LoadedConfig, *, now_s: float) -> Standing:
    """The roster that this device has, verified; whether we are in it, with our keys, and our server."""
    found = Standing()
    section = loaded.config.agent
    try:
        book = roster_book(loaded, wall_s=time.time, persist=False)
    except ConfigError as problem:
        found.findings = [error("roster", str(problem), "put the key and roster there that the operator gave you")]
        return found
    except SordinoError as problem:
        remedy = (
            "ask the operator for the fleet's signed roster, and compare operator_key with what `sordino init` printed"
        )
        found.findings = [error("roster", str(problem), remedy, exit_code=problem.exit_code)]
        return found
    if book.current is None:
        text = "no roster yet"
        remedy = "the first one comes from the broker, once the operator has enrolled this device"
        found.findings = [warning("roster", text, remedy)]
        return found
    found.roster = book.current
    found.findings = list(roster_ends(book.current, now_s=now_s))
    if any(finding.level == "error" for finding in found.findings):
        return found
    try:
        entry = book.party(section.name)
    except RosterError as problem:
        remedy = (
            "send enrolment.json to the operator (sordino roster add, sordino roster sign); check this device's clock"
        )
        found.findings.append(error("roster", str(problem), remedy, exit_code=problem.exit_code))
        return found
    if book.current.server.name != section.server:
        text = f"the roster's server is {book.current.server.name!r}, agent.server is {section.server!r}"
        found.findings.append(error("roster", text, "set agent.server to the roster's"))
    try:
        key = loaded.device_key()
    except ConfigError:
        return found  # told already
    if entry.sign_key != key.public.sign_key or entry.box_key != key.public.box_key:
        text = f"the roster lists other keys for {section.name} than the one in {loaded.state_dir}"
        remedy = "have this device enrolled again with its enrolment.json"
        found.findings.append(error("roster", text, remedy, exit_code=SECURITY))
    else:
        text = f"it lists this device, with its key, as {', '.join(entry.roles)} in zone {entry.zone}"
        found.findings.append(ok("roster", text))
    return found
