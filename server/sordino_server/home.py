"""The fleet directory: what the server's host keeps of a fleet.

fleet.yaml      names, broker
operator.key    signs rosters; belongs offline, on another machine, once the fleet stands
server.key      the server's own keys
roster.yaml     the draft that a person edits and `sordino roster` changes
roster.cbor     the signed roster, as it is published
ca/             the fleet's own certificate authority, if it has one (`enrolment/ca.py`)
server.pem      the server's certificate and key for the broker
boot            how often a server process has started here
format          the number of this layout; absent: 1
runs.sqlite, runs/   run records and checkpoints
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pwd
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec
import yaml
from msgspec.structs import replace

from sordino_common.channel.credentials import located
from sordino_common.channel.files import write_atomically
from sordino_common.channel.identity import DeviceKey, OperatorKey, PublicKeys, fingerprint_of
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry, sign_roster
from sordino_common.config import load_config
from sordino_common.errors import ConfigError, RosterError
from sordino_common.messages.base import NAME_PATTERN

Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
HexKey = Annotated[str, msgspec.Meta(pattern=r"^[0-9a-f]{64}\Z")]
Role = Literal["data", "compute", "helper", "server", "dealer"]
ROLES: Final = ("data", "compute", "helper", "server", "dealer")


FORMAT: Final = 1


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class TlsSpec(_Strict, frozen=True, kw_only=True):
    """Paths are relative to the fleet directory. `certificate` and `key`: the server's own, if the broker asks."""

    ca: str | None = None
    certificate: str | None = None
    key: str | None = None
    server_name: str | None = None


class BrokerSpec(_Strict, frozen=True, kw_only=True):
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1883
    username: str | None = None
    password_file: str | None = None
    keepalive_s: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 30
    connect_timeout_s: Annotated[float, msgspec.Meta(gt=0.0, le=3600.0)] = 10.0
    tls: TlsSpec | None = None


class FleetSpec(_Strict, frozen=True, kw_only=True):
    """fleet.yaml. `server_key`: where the server's own keys are; absent: server.key in the fleet directory. Any path
    here may be `credential:NAME` (`channel/credentials`). `database`: where run records are, if not in runs.sqlite
    (postgresql://...)."""

    fleet: Name
    server: Name = "server"
    server_key: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] | None = None
    broker: BrokerSpec
    database: Annotated[str, msgspec.Meta(min_length=1, max_length=2048)] | None = None


class DraftEntry(_Strict, frozen=True, kw_only=True):
    name: Name
    sign_key: HexKey
    box_key: HexKey
    roles: Annotated[tuple[Role, ...], msgspec.Meta(min_length=1)] = ("data",)
    zone: Name = "default"
    not_after_s: int | None = None

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(bytes.fromhex(self.sign_key), bytes.fromhex(self.box_key))


class Draft(_Strict, frozen=True, kw_only=True):
    """roster.yaml. `epoch`: of the last signed roster, 0 before the first."""

    epoch: Annotated[int, msgspec.Meta(ge=0)] = 0
    valid_days: Annotated[int, msgspec.Meta(ge=1, le=3650)] = 365
    entries: tuple[DraftEntry, ...] = ()


class EnrolmentRequest(msgspec.Struct, frozen=True, kw_only=True):
    """What `sordino-agent init` writes: public keys and a wish. Other fields are for people."""

    name: Name
    sign_key: HexKey
    box_key: HexKey
    fleet: Name | None = None
    roles: tuple[Role, ...] = ("data",)
    zone: Name = "default"


_DRAFT_HEAD: Final = (
    "# The roster as it is meant to be. Edit it, or use `sordino roster add|remove`; it counts once it is signed:\n"
    "#   sordino roster sign\n"
)


class Home:
    """A fleet directory that exists."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        _require_own(folder)
        path = folder / "fleet.yaml"
        if not path.is_file():
            raise ConfigError(f"{folder}: no fleet.yaml in it; make a fleet with: sordino init DIR --fleet NAME")
        _require_known_format(folder / "format")
        self.spec = load_config(path, FleetSpec)

    # --- keys and roster -------------------------------------------------------------------------------------------

    def server_key(self) -> DeviceKey:
        return DeviceKey.load(located(self.spec.server_key or "server.key", self.folder))

    def operator_public(self) -> bytes:
        """The pinned public key: from operator.pub, which stays when operator.key is taken away."""
        path = self.folder / "operator.pub"
        try:
            return bytes.fromhex(path.read_text("ascii").strip())
        except (OSError, ValueError) as error:
            raise ConfigError(f"{path}: the operator's public key can't be read: {error}") from None

    def draft(self) -> Draft:
        return load_config(self.folder / "roster.yaml", Draft)

    def write_draft(self, draft: Draft) -> None:
        ordered = replace(draft, entries=tuple(sorted(draft.entries, key=lambda entry: entry.name)))
        text = yaml.safe_dump(msgspec.to_builtins(ordered), sort_keys=False, default_flow_style=None, width=200)
        write_atomically(self.folder / "roster.yaml", (_DRAFT_HEAD + text).encode())

    def add(
        self, request: EnrolmentRequest, *, roles: Sequence[str], zone: str | None, replaces: str | None = None
    ) -> DraftEntry:
        """Put the request's keys into the draft. `replaces`: the signing key (hex) that the name may have until now.

        Raises `ConfigError` for a name or key that is taken."""
        if request.fleet is not None and request.fleet != self.spec.fleet:
            raise ConfigError(f"the request is for fleet {request.fleet}, this is {self.spec.fleet}")
        fields = {
            "name": request.name,
            "sign_key": request.sign_key,
            "box_key": request.box_key,
            "roles": list(roles) or list(request.roles),
            "zone": zone or request.zone,
        }
        try:
            entry = msgspec.convert(fields, DraftEntry)
        except msgspec.ValidationError as error:
            raise ConfigError(f"roster entry {request.name}: {error}") from None
        PublicKeys(sign_key=bytes.fromhex(entry.sign_key), box_key=bytes.fromhex(entry.box_key))
        draft = self.draft()
        for other in draft.entries:
            if other.name == entry.name and (other.sign_key, other.box_key) == (entry.sign_key, entry.box_key):
                continue  # the same device with other roles: the entry is replaced
            if other.name == entry.name and other.sign_key == replaces:
                continue
            if other.name == entry.name:
                raise ConfigError(
                    f"{entry.name} is in the roster with other keys ({other.fingerprint}); if the device has new ones, "
                    f"do: sordino roster remove {entry.name}"
                )
            if other.sign_key == entry.sign_key or other.box_key == entry.box_key:
                raise ConfigError(f"{other.name} has these keys already; a device is in the roster once")
        kept = tuple(other for other in draft.entries if other.name != entry.name)
        self.write_draft(replace(draft, entries=(*kept, entry)))
        return entry

    def remove(self, name: str) -> None:
        draft = self.draft()
        kept = tuple(entry for entry in draft.entries if entry.name != name)
        if len(kept) == len(draft.entries):
            raise ConfigError(f"{name} is not in the roster")
        if name == self.spec.server:
            raise ConfigError(f"{name} is the server; a fleet without one has no roster")
        self.write_draft(replace(draft, entries=kept))

    def sign(self, *, now_s: float) -> Roster:
        """Sign the draft under the next epoch; the draft and roster.cbor are on disk when it returns."""
        key = OperatorKey.load(self.folder / "operator.key")
        if key.public != self.operator_public():
            raise ConfigError(f"{self.folder / 'operator.key'}: not the key that this fleet's agents have pinned")
        draft = self.draft()
        signed_epoch = self.roster_book(wall_s=lambda: now_s).current
        epoch = max(draft.epoch, signed_epoch.epoch if signed_epoch else 0) + 1
        where = str(self.folder / "roster.yaml")
        roster = draft_roster(draft, fleet=self.spec.fleet, epoch=epoch, now_s=now_s, where=where)
        write_atomically(self.folder / "roster.cbor", sign_roster(roster, key))
        self.follow(roster)
        return roster

    def follow(self, roster: Roster, *, entries: Sequence[RosterEntry] | None = None) -> None:
        """The draft notes the epoch that was signed and, if given, these entries instead of its own."""
        draft = replace(self.draft(), epoch=roster.epoch)
        if entries is not None:
            draft = replace(draft, entries=tuple(_draft_entry(entry) for entry in entries))
        self.write_draft(draft)

    def roster_book(self, *, wall_s: Callable[[], float]) -> RosterBook:
        """The signed roster, verified under the pinned key."""
        return RosterBook(
            fleet=self.spec.fleet,
            operator_key=self.operator_public(),
            wall_s=wall_s,
            path=self.folder / "roster.cbor",
        )

    # --- one server at a time --------------------------------------------------------------------------------------

    @contextmanager
    def occupied(self) -> Iterator[None]:
        """Be the fleet's server: two at once would throw each other off the broker."""
        with (self.folder / "server.lock").open("a+") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                lock.seek(0)
                holder = lock.read(20).strip() or "unknown"
                raise ConfigError(
                    f"{self.folder}: another sordino process (pid {holder}) speaks for this fleet; wait for its end"
                ) from None
            lock.truncate(0)
            lock.write(str(os.getpid()))
            lock.flush()
            yield


def create_home(folder: Path, *, fleet: str, server: str, broker: str) -> Home:
    """A new fleet directory: keys, fleet.yaml, a draft with the server in it. `broker` is HOST or HOST:PORT."""
    host, port = parse_broker(broker)
    fields = {"fleet": fleet, "server": server, "broker": {"host": host, "port": port}}
    for what, name in (("fleet", fleet), ("server", server)):
        try:
            msgspec.convert(name, Name)
        except msgspec.ValidationError:
            raise ConfigError(
                f"{what} {name!r}: expected 1 to 63 lower-case letters, digits and -, the first of them no -"
            ) from None
    spec = msgspec.convert(fields, FleetSpec)
    folder.mkdir(parents=True, exist_ok=True)
    if (folder / "fleet.yaml").exists():
        raise ConfigError(f"{folder}: there is a fleet in it already")
    operator, device = OperatorKey.generate(), DeviceKey.generate()
    operator.save(folder / "operator.key")
    device.save(folder / "server.key")
    write_atomically(folder / "operator.pub", (operator.public.hex() + "\n").encode())
    write_atomically(folder / "fleet.yaml", fleet_yaml(spec).encode())
    write_atomically(folder / "format", b"%d\n" % FORMAT)
    home = Home(folder)
    entry = DraftEntry(
        name=server,
        sign_key=device.public.sign_key.hex(),
        box_key=device.public.box_key.hex(),
        roles=("server", "dealer"),
    )
    home.write_draft(Draft(entries=(entry,)))
    return home


def _require_known_format(path: Path) -> None:
    """Raises `ConfigError` if a newer sordino has laid out the folder, or nobody can tell."""
    try:
        text = path.read_text("ascii").strip()
        found = int(text)
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: expected the number of the folder's layout, {FORMAT}: {error}") from None
    if not 1 <= found <= FORMAT:
        raise ConfigError(
            f"{path}: the fleet directory has layout {found}, this sordino knows up to {FORMAT}: it was written by a "
            "newer one. Upgrade sordino, or restore the directory from before the upgrade"
        )


def _require_own(folder: Path) -> None:
    """Root is refused in a folder of the service's user, who could not read what root leaves there."""
    if os.geteuid() != 0 or not folder.is_dir() or (owner := folder.stat().st_uid) == 0:
        return
    with contextlib.suppress(KeyError):  # a number without a name: a folder from outside of a container
        name = pwd.getpwuid(owner).pw_name
        raise ConfigError(
            f"{folder} belongs to {name}, who could not read what root writes there; do it as {name}: "
            f"runuser -u {name} -- sordino ..."
        )


def draft_roster(draft: Draft, *, fleet: str, epoch: int, now_s: float, where: str) -> Roster:
    """The roster that the draft stands for, to be signed. Raises `ConfigError`."""
    try:
        return Roster(
            fleet=fleet,
            epoch=epoch,
            issued_s=int(now_s),
            expires_s=int(now_s) + draft.valid_days * 86_400,
            entries=tuple(_entry(entry) for entry in draft.entries),
        )
    except RosterError as error:
        raise ConfigError(f"{where}: {error}") from None


def parse_broker(text: str) -> tuple[str, int]:
    """HOST, HOST:PORT, [V6]:PORT."""
    if text.startswith("["):
        host, bracket, rest = text[1:].partition("]")
        port = rest.removeprefix(":")
        if not bracket:
            raise ConfigError(f"broker {text!r}: expected [IPv6]:PORT")
    else:
        host, _, port = text.partition(":")
    if not host or (port and not port.isdigit()):
        raise ConfigError(f"broker {text!r}: expected HOST or HOST:PORT")
    number = int(port or 1883)
    if not 1 <= number <= 65_535:
        raise ConfigError(f"broker {text!r}: expected a port from 1 to 65535")
    return host, number


def read_request(path: Path) -> EnrolmentRequest:
    """The enrolment request that `sordino-agent init` wrote."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    try:
        return msgspec.json.decode(raw[: 1 << 16], type=EnrolmentRequest)
    except msgspec.DecodeError as error:
        raise ConfigError(f"{path}: no enrolment request: {error}") from None


def _draft_entry(entry: RosterEntry) -> DraftEntry:
    return DraftEntry(
        name=entry.name,
        sign_key=entry.sign_key.hex(),
        box_key=entry.box_key.hex(),
        roles=tuple(entry.roles),  # type: ignore[arg-type]  # the roster has checked them
        zone=entry.zone,
        not_after_s=entry.not_after_s,
    )


def _entry(entry: DraftEntry) -> RosterEntry:
    return RosterEntry(
        name=entry.name,
        sign_key=bytes.fromhex(entry.sign_key),
        box_key=bytes.fromhex(entry.box_key),
        roles=entry.roles,
        zone=entry.zone,
        not_after_s=entry.not_after_s,
    )


def fleet_yaml(spec: FleetSpec) -> str:
    """fleet.yaml as `sordino init` and `sordino broker-config` write it."""
    broker, tls = spec.broker, spec.broker.tls
    given = {} if tls is None else {key: value for key, value in msgspec.to_builtins(tls).items() if value is not None}
    example = "# tls: {ca: ca.pem, certificate: server.pem, key: server-key.pem}"
    line = f"tls: {json.dumps(given)}" if given else example
    elsewhere = "# database: postgresql://sordino@db.example/sordino    # run records there; the password in ~/.pgpass"
    records = elsewhere if spec.database is None else f"database: {json.dumps(spec.database)}"
    key = f"server_key: {json.dumps(spec.server_key)}\n" if spec.server_key is not None else ""
    return f"""\
fleet: {spec.fleet}
server: {spec.server}
broker:
  host: {json.dumps(broker.host)}
  port: {broker.port}
  # username: sordino
  # password_file: broker.password     # its first line; relative to this folder
  {line}
{records}
{key}"""
