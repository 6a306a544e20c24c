"""What `sordino doctor` finds in the fleet directory: keys, roster, authorities, run records, disk."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from sordino_common.channel.credentials import located
from sordino_common.channel.identity import OperatorKey
from sordino_common.channel.roster import Roster
from sordino_common.database import Schema, schema_version
from sordino_common.diagnosis import certificates, files
from sordino_common.diagnosis.finding import SECURITY, Finding, error, ok, untried, warning
from sordino_common.diagnosis.standing import roster_ends
from sordino_common.errors import ConfigError, SordinoError
from sordino_server.enrolment.ca import fleet_authority, has_authority
from sordino_server.enrolment.store import FILE as ENROLMENT_FILE
from sordino_server.enrolment.store import SCHEMA as ENROLMENT
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.home import Home
from sordino_server.store import RUNS_FILE
from sordino_server.store import SCHEMA as RUNS

_ROOM = 1 << 30  # checkpoints of a few large runs
_SOON_S = 30 * 86_400.0  # devices ask when a third of a year is left


def signed_roster(home: Home) -> Roster | None:
    """The signed roster if there is one that verifies; `house_findings` says why not."""
    try:
        return home.roster_book(wall_s=time.time).current
    except SordinoError:
        return None


def house_findings(home: Home, roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    yield ok("fleet", f"{home.spec.fleet} in {home.folder}, its server is {home.spec.server}")
    yield from files.own_folder(home.folder, "folder")
    yield from files.loose_files(home.folder, "folder")
    yield from _keys(home, roster)
    yield from _roster(home, roster, now_s=now_s)
    yield from _authority(home, now_s=now_s)
    yield from _records(home)
    enrolment = list(_database(home.folder / ENROLMENT_FILE, ENROLMENT))
    yield from enrolment
    if enrolment and all(finding.level == "ok" for finding in enrolment):
        yield from _members(home, roster, now_s=now_s)
    yield from files.disk_room(home.folder, wanted_bytes=_ROOM, why="checkpoints")


def _keys(home: Home, roster: Roster | None) -> Iterator[Finding]:
    try:
        path = located(home.spec.server_key or "server.key", home.folder)
    except ConfigError as problem:  # a credential, which only the unit is given
        yield untried("server key", str(problem), "run the doctor as the unit does")
        yield from _operator(home)
        return
    found = list(files.private_file(path, "server key"))
    yield from (finding for finding in found if finding.level != "ok")
    if all(finding.level == "ok" for finding in found):
        try:
            key = home.server_key()
        except ConfigError as problem:
            yield error("server key", str(problem), "put it back from a backup")
        else:
            text = f"{key.fingerprint}"
            if roster is not None and roster.server.sign_key != key.public.sign_key:
                text = f"{path}: not the key that the signed roster lists for {roster.server.name}"
                remedy = "put the right one back, or sign a roster with this one: sordino roster sign"
                yield error("server key", text, remedy, exit_code=SECURITY)
            else:
                yield ok("server key", text)
    yield from _operator(home)


def _operator(home: Home) -> Iterator[Finding]:
    try:
        public = home.operator_public()
    except ConfigError as problem:
        yield error("operator key", str(problem), "put operator.pub back: agents have pinned this key")
        return
    path = home.folder / "operator.key"
    if not path.exists():
        yield ok("operator key", "not here, as it should be; operator.pub is")
        return
    loose = [finding for finding in files.private_file(path, "operator key") if finding.level != "ok"]
    yield from loose
    if not loose:
        try:
            ours = OperatorKey.load(path).public
        except ConfigError as problem:
            yield error("operator key", str(problem), "put it back from a backup")
            return
        if ours != public:
            text = f"{path}: not the key of operator.pub, which agents have pinned"
            yield error("operator key", text, "put the right pair back", exit_code=SECURITY)
            return
    text = f"{path} is on this host: whoever gets it decides who belongs to the fleet"
    yield warning("operator key", text, "once the roster is signed, move it to a machine without a network")


def _roster(home: Home, roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    sign = f"sordino roster sign --fleet {home.folder}"
    path = home.folder / "roster.cbor"
    if roster is None:
        if not path.exists():
            yield error("roster", "it is not signed yet", sign)
            return
        try:
            home.roster_book(wall_s=time.time)
        except SordinoError as problem:
            yield error("roster", str(problem), f"put it back from a backup, or: {sign}", exit_code=problem.exit_code)
        return
    yield from roster_ends(roster, now_s=now_s)
    if roster.server.name != home.spec.server:
        text = f"its server is {roster.server.name}, fleet.yaml says {home.spec.server}"
        yield error("roster", text, "set `server` in fleet.yaml to the roster's")
    try:
        draft = home.draft()
    except ConfigError as problem:
        yield error("roster", f"the draft: {problem}", "mend roster.yaml at this place")
        return
    meant = {
        (entry.name, entry.sign_key, entry.box_key, tuple(sorted(entry.roles)), entry.zone) for entry in draft.entries
    }
    signed = {(e.name, e.sign_key.hex(), e.box_key.hex(), tuple(e.roles), e.zone) for e in roster.entries}
    if meant != signed:
        names = sorted({entry[0] for entry in meant ^ signed})
        text = f"the draft differs from what is signed: {', '.join(names[:8])}"
        yield warning("roster", text, f"sordino roster list, then: {sign}")
    if not any("data" in entry.roles for entry in roster.entries):
        yield warning("roster", "no data agent is in it", "sordino roster add enrolment.json, or sordino enroll-token")


def _authority(home: Home, *, now_s: float) -> Iterator[Finding]:
    folder = home.folder / "ca"
    for name, what in (("ca", "the fleet's authority"), ("enrol", "the authority of tokens")):
        if (folder / f"{name}.pem").exists():
            renew = "make a new authority with broker-config, and new certificates for all (docs/operations.md)"
            yield from certificates.certificate_files(folder / f"{name}.pem", what, now_s=now_s, renew=renew)
        if (folder / f"{name}.key").exists():
            yield from files.private_file(folder / f"{name}.key", "authority key")


def _members(home: Home, roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    """Certificates of members that end soon, and requests for new ones that wait for keys which are elsewhere."""
    names = set() if roster is None else {entry.name for entry in roster.entries}
    ends_s: dict[str, float] = {}
    with EnrolmentStore(home.folder, read_only=True) as store:
        waiting = {record.name for record in store.requests("pending", "approved") if record.purpose == "renew"} & names
        for record in store.certificates():
            if record.name in names and record.revoked_s is None:
                ends_s[record.name] = max(ends_s.get(record.name, 0.0), record.ends_s)
    soon = {name for name, end_s in ends_s.items() if end_s < now_s + _SOON_S}
    if waiting:
        text = f"{len(waiting)} wait for new ones: {_some(waiting)}"
        if has_authority(home.folder) and fleet_authority(home.folder).has_key:
            yield warning("certificates", text, "sordino roster renew, daily (sordino-renew.timer)")
        elif waiting & soon:
            text += f"; {_some(waiting & soon)} can't connect any more within {_SOON_S / 86_400:g} days"
            yield error("certificates", text, "sordino roster export -o order.txt, and sign it where the keys are")
        else:
            yield warning("certificates", text, "sordino roster export -o order.txt, and sign it where the keys are")
    if soon - waiting:
        text = f"they end within {_SOON_S / 86_400:g} days, and nobody has asked for new ones: {_some(soon - waiting)}"
        remedy = "is it running? sordino-agent renew there; once they have ended: sordino enroll-token --name NAME"
        yield warning("certificates", text, remedy)


def _some(names: Iterable[str]) -> str:
    ordered = sorted(names)
    return ", ".join(ordered[:8]) + (f" and {len(ordered) - 8} more" if len(ordered) > 8 else "")


def _records(home: Home) -> Iterator[Finding]:
    if home.spec.database is not None:
        from sordino_server.database import open_records

        try:
            open_records(home.folder / RUNS_FILE, home.spec.database, schema=RUNS, read_only=True).close()
        except SordinoError as problem:
            yield error("run records", str(problem), "see `database` in fleet.yaml", exit_code=problem.exit_code)
        else:
            yield ok("run records", "the database of fleet.yaml answers")
        return
    path = home.folder / RUNS_FILE
    if path.exists():
        yield from _database(path, RUNS)
    else:
        yield ok("run records", "none yet")


def _database(path: Path, schema: Schema) -> Iterator[Finding]:
    """Nothing if there is no file."""
    remedy = schema.advice[0].lower() + schema.advice[1:]
    found = list(files.whole_database(path, schema.what, remedy=remedy))
    if any(finding.level != "ok" for finding in found) or not found:
        yield from found
        return
    try:
        version = schema_version(path)
    except sqlite3.DatabaseError as problem:
        yield error("database", f"{path}: {problem}", remedy)
        return
    if version > schema.version:
        text = f"{path}: schema {version}, of a newer sordino; this one knows up to {schema.version}"
        yield error("database", text, "upgrade sordino, or put back the file from before the upgrade")
    elif version < schema.version:
        text = f"{path}: schema {version}; the next command makes it {schema.version}, and keeps a copy"
        yield warning("database", text, "back it up before, if you like")
    else:
        yield from found
