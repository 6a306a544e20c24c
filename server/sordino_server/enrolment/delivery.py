"""What goes between the desk and the broker: requests in, grants and the roster out, and the list of revoked
certificates to where the broker reads it.

The broker's word counts for nothing here: what it gives us proves itself at the desk, what we give it proves itself on
the device. It may withhold, repeat and invent; it can fill nothing but its own memory.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

import msgspec
from cryptography import x509

from sordino_common.channel.boot import skip_to
from sordino_common.channel.enrolment import MAX_REQUEST_BYTES
from sordino_common.channel.files import write_atomically
from sordino_common.channel.packets import read_packet, roster_packet
from sordino_common.channel.presence import read_presence
from sordino_common.channel.roster import Roster
from sordino_common.errors import CodecError, ConfigError, RemoteError
from sordino_common.transport.mailbox import read_all, visit, visitor_settings
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.topics import (
    grant_topic,
    request_topic,
    requester_of,
    requests_filter,
    roster_topic,
    status_topic,
)
from sordino_server.enrolment.broker_config import CRL_FILE, PID_FILE, broker_place
from sordino_server.enrolment.ca import fleet_authority
from sordino_server.enrolment.desk import EnrolmentDesk, Filed
from sordino_server.enrolment.store import CertificateRecord, EnrolmentStore
from sordino_server.home import Home

_KEPT_S: Final = 86_400.0


@dataclass(slots=True)
class Collected:
    """What lay at the broker: filed, and refused with its reason."""

    filed: list[Filed] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)


def collect(home: Home, desk: EnrolmentDesk, *, now_s: float) -> Collected:
    """Fetch all requests from the broker, file them, and take them away there. Raises `FleetUnavailable`."""
    settings = _settings(home)
    # The broker drops what is larger than we take; a request that large is none.
    reading = msgspec.structs.replace(settings, max_inbound_bytes=MAX_REQUEST_BYTES + 1024)
    mine = request_topic(home.spec.fleet, home.spec.server)
    found = Collected()
    seen: list[str] = []
    for topic, packet in read_all(reading, [requests_filter(home.spec.fleet)], marker_topic=mine):
        try:
            who = requester_of(topic, fleet=home.spec.fleet)
        except CodecError as error:
            found.refused.append(str(error))
            continue
        seen.append(topic)
        try:
            found.filed.append(desk.receive(packet, who=who, now_s=now_s))
        except RemoteError as error:
            found.refused.append(f"{who}: {error}")
    if seen:
        visit(settings, leave=[(topic, b"") for topic in seen])
    return found


def deliver(home: Home, desk: EnrolmentDesk, *, now_s: float) -> list[str]:
    """Publish the signed roster and new grants, take old ones away; returns the names of those who have a new one.

    A grant is as large as the roster, so it lies at the broker for a day. Who comes later asks again, and
    `EnrolmentDesk.receive` has it delivered once more. Raises `FleetUnavailable`."""
    signed = home.roster_book(wall_s=lambda: 0.0).signed
    if signed is None:
        raise ConfigError(f"{home.folder}: the roster is not signed yet; do: sordino roster sign --fleet {home.folder}")
    fresh = desk.grants("granted")
    taken = {item.place for item in fresh}
    old = [item for item in desk.grants("delivered") if now_s > item.granted_s + _KEPT_S]
    packets = [(roster_topic(home.spec.fleet, home.spec.server), roster_packet(signed))]
    packets += [(grant_topic(home.spec.fleet, item.place), b"") for item in old if item.place not in taken]
    packets += [(grant_topic(home.spec.fleet, item.place), item.packet) for item in fresh]
    visit(_settings(home), leave=packets)
    desk.note_delivery(delivered=fresh, cleared=old)
    return [item.request.name for item in fresh]


@dataclass(slots=True)
class Kept:
    """What the broker keeps of the server: its last status, and the signed roster. Neither is verified."""

    roster: bytes | None = None
    status: bytes | None = None


def fetch(home: Home) -> Kept:
    """Raises `FleetUnavailable`."""
    found = Kept()
    fleet, server = home.spec.fleet, home.spec.server
    mine = request_topic(fleet, server)
    topics = [roster_topic(fleet, server), status_topic(fleet, server), mine]
    for _, packet in read_all(_settings(home), topics, marker_topic=mine):
        try:
            kind, parts = read_packet(packet)
        except CodecError:
            continue
        if kind == "roster":
            found.roster = parts[0]
        elif kind in ("birth", "death"):
            found.status = packet
    return found


def count_boots(home: Home, kept: Kept, roster: Roster) -> None:
    """Have the server's boot counter go on where it was last heard: agents refuse a smaller one as a replay."""
    if kept.status is None:
        return
    status = read_presence(kept.status, roster)
    if status.name == home.spec.server:
        skip_to(home.folder / "boot", status.boot)


def write_list(home: Home, store: EnrolmentStore, *, now_s: float) -> bool:
    """A new list of revoked certificates, in the fleet directory, if there is news; whether there was. Raises
    `ConfigError` if the key is not here.

    Whatever a list says that lies here or at the broker stays revoked, also if the records were restored from a backup
    that does not know it."""
    number, issued_s = _take_over(home, store)
    alive = [entry for entry in store.revoked() if _ends_s(store, entry.serial) > now_s]
    if {entry.serial for entry in alive} == _listed(home.folder / "ca" / CRL_FILE):
        return False  # no need to have the broker read it, and miss another that comes while it reads
    pem = fleet_authority(home.folder).crl(alive, number=number + 1, now_s=now_s, after_s=issued_s)
    take_list(home, store, pem, number=number + 1)
    return True


def _take_over(home: Home, store: EnrolmentStore) -> tuple[int, int]:
    """Revocations that the lists on disk know and the records do not. (number, time) of the last list of all."""
    authority, place = fleet_authority(home.folder).certificate, broker_place(home)
    number, issued_s = store.last_list()
    folders = [home.folder / "ca", *([Path(place.folder)] if place is not None else [])]
    for path in (folder / CRL_FILE for folder in folders):
        try:
            listed = x509.load_pem_x509_crl(path.read_bytes())
            if not listed.is_signature_valid(authority.public_key()):  # type: ignore[arg-type]
                continue  # of another fleet
            number = max(number, listed.extensions.get_extension_for_class(x509.CRLNumber).value.crl_number)
        except (OSError, ValueError, x509.ExtensionNotFound):
            continue  # another broker's, or none: it adds nothing
        issued_s = max(issued_s, int(listed.last_update_utc.timestamp()))
        known = {record.serial for record in store.certificates()}
        for entry in listed:
            at_s = entry.revocation_date_utc.timestamp()
            if entry.serial_number not in known:
                record = CertificateRecord(
                    serial=entry.serial_number,
                    name="",
                    made_s=at_s,
                    ends_s=authority.not_valid_after_utc.timestamp(),
                    revoked_s=int(at_s),
                )
                store.add_certificate(record)
            store.revoke_certificate(entry.serial_number, at_s=at_s)
    return number, issued_s


def _listed(path: Path) -> set[int] | None:
    """The serial numbers in the list; None if there is no list that can be read."""
    try:
        return {entry.serial_number for entry in x509.load_pem_x509_crl(path.read_bytes())}
    except (OSError, ValueError):
        return None


def take_list(home: Home, store: EnrolmentStore, pem: bytes, *, number: int) -> None:
    issued_s = int(x509.load_pem_x509_crl(pem).last_update_utc.timestamp())
    try:
        write_atomically(home.folder / "ca" / CRL_FILE, pem)
    except OSError as error:
        raise ConfigError(f"{home.folder / 'ca' / CRL_FILE}: can't be written: {error.strerror}") from None
    store.note_list(number, issued_s)


def tell_broker(home: Home, *, news: bool) -> list[str]:
    """Put the list where the broker reads it, and have it read: what is left to be done by hand, line by line. Without
    `news` a broker on another host has it already."""
    place = broker_place(home)
    if not news and (place is None or not Path(place.folder).is_dir()):
        return []
    if place is None:
        return [f"put {home.folder / 'ca' / CRL_FILE} where your broker reads it, and have it read it"]
    folder, source = Path(place.folder), home.folder / "ca" / CRL_FILE
    if not news and not os.access(folder, os.R_OK | os.X_OK):  # the broker's user's own: it has it already, too
        return []
    if not folder.is_dir():
        return [f"copy {source} to {folder / CRL_FILE} on the broker's host, and there: systemctl reload mosquitto"]
    try:
        there = (folder / CRL_FILE).read_bytes() if (folder / CRL_FILE).exists() else b""
        if there == source.read_bytes():
            return []
        write_atomically(folder / CRL_FILE, source.read_bytes())
    except OSError as error:
        return [f"{folder / CRL_FILE} can't be written ({error.strerror}): copy {source} there, then reload the broker"]
    return _reload(folder / PID_FILE)


def _reload(pid_file: Path) -> list[str]:
    by_hand = ["have the broker read it: systemctl reload mosquitto (SIGHUP)"]
    try:
        pid = int(pid_file.read_text("ascii"))
        name = Path(f"/proc/{pid}/comm").read_text("ascii").strip()
    except FileNotFoundError:
        return []  # it does not run; it reads the list when it starts
    except (OSError, ValueError):
        return by_hand
    if name != "mosquitto":
        return []  # left by a broker that is gone; the number is another process's by now
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGHUP)
        return []
    return by_hand


def _ends_s(store: EnrolmentStore, serial: int) -> float:
    return next(record.ends_s for record in store.certificates() if record.serial == serial)


def _settings(home: Home) -> MqttSettings:
    from sordino_server.fleet import mqtt_settings  # and with it the conductor: commands that stay at home do without

    return visitor_settings(mqtt_settings(home), "roster")


def notes_of(refused: Sequence[str]) -> list[str]:
    """For stderr."""
    return [f"refused: {text}" for text in refused]
