"""`sordino roster pending | approve | refuse | renew | revoke | deliver | receive | grant | export | import`."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

from sordino_common.channel.enrolment import from_text, to_text
from sordino_common.errors import ConfigError, FleetUnavailable, RemoteError, StaleEpoch
from sordino_server.cli.output import HERE, FleetOption, JsonOption, date, note, print_json, print_table, say, table_of
from sordino_server.enrolment import order as orders
from sordino_server.enrolment.ca import fleet_authority, has_authority
from sordino_server.enrolment.delivery import collect, count_boots, deliver, notes_of, tell_broker, write_list
from sordino_server.enrolment.delivery import fetch as fetch_kept
from sordino_server.enrolment.desk import EnrolmentDesk, Filed
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.home import Home

OfflineOption = Annotated[bool, typer.Option("--offline", help="Leave the broker alone.")]
YesOption = Annotated[bool, typer.Option("--yes", help="Ask nothing: for scripts that have compared fingerprints.")]
OutOption = Annotated[Path, typer.Option("-o", "--output", help="Write it there.")]


@contextmanager
def desk_of(fleet: Path) -> Iterator[tuple[Home, EnrolmentStore, EnrolmentDesk]]:
    home = Home(fleet)
    with EnrolmentStore(home.folder) as store:
        yield home, store, EnrolmentDesk(home, store)


def pending(fleet: FleetOption = HERE, offline: OfflineOption = False, as_json: JsonOption = False) -> None:
    """Fetch requests from the broker, and show what waits for you."""
    with desk_of(fleet) as (home, _, desk):
        if not offline:
            _collect(home, desk)
        filed = desk.pending()
    rows: list[dict[str, Any]] = [
        {
            "name": item.request.name,
            "purpose": item.request.purpose,
            "fingerprint": item.fingerprint,
            "roles": sorted(item.request.roles),
            "zone": item.request.zone,
            "filed_s": item.record.filed_s,
            "old_fingerprint": item.old_fingerprint,
            "warning": warning_of(item),
        }
        for item in filed
    ]
    if as_json:
        print_json({"pending": rows})
        return
    table = table_of("name", "asks to", "fingerprint", "roles", "zone", "since", "note")
    for row in rows:
        table.add_row(
            row["name"],
            row["purpose"],
            row["fingerprint"],
            ",".join(row["roles"]),
            row["zone"],
            date(row["filed_s"]),
            row["warning"],
        )
    print_table(table)
    say(f"{len(rows)} waiting")
    if rows:
        note("compare each fingerprint with what the device shows, then: sordino roster approve NAME")


def approve(
    names: Annotated[list[str], typer.Argument(help="The devices' names, or their fingerprints.")],
    roles: Annotated[str, typer.Option("--roles", help="Comma-separated; by default what the token says.")] = "",
    zone: Annotated[str | None, typer.Option("--zone", help="Where the device stands.")] = None,
    yes: YesOption = False,
    offline: OfflineOption = False,
    fleet: FleetOption = HERE,
) -> None:
    """Let devices in: into the draft and, if the keys are here, signed, certified and delivered, all at once."""
    with desk_of(fleet) as (home, store, desk):
        if not offline:
            _collect(home, desk)
        found = [desk.find(name, "pending") for name in dict.fromkeys(names)]
        for filed in found:
            say(described(filed))
            if not yes:
                _ask("Does the device show this very fingerprint?")
            desk.approve(filed, roles=[role.strip() for role in roles.split(",") if role.strip()], zone=zone)
        sign = any(filed.request.purpose != "renew" for filed in found)
        _finish(home, store, desk, offline=offline, fleet=fleet, sign=sign)


def refuse(
    names: Annotated[list[str], typer.Argument(help="The devices' names, or their fingerprints.")],
    fleet: FleetOption = HERE,
) -> None:
    """Drop requests that wait."""
    with desk_of(fleet) as (_, _, desk):
        for filed in [desk.find(name, "pending", "approved") for name in dict.fromkeys(names)]:
            desk.refuse(filed)
            say(f"refused: {filed.request.purpose} of {filed.request.name}, {filed.fingerprint}")


def renew(fleet: FleetOption = HERE, offline: OfflineOption = False) -> None:
    """Give new certificates to members that ask for one and have not changed. Asks nothing: for a timer."""
    with desk_of(fleet) as (home, store, desk):
        if not offline:
            _collect(home, desk)
        for filed in desk.pending():
            if filed.request.purpose == "renew":
                desk.approve(filed)
        if not (desk.approved() or fleet_authority(home.folder).has_key):
            say("no member waits for a certificate")
            return
        _finish(home, store, desk, offline=offline, fleet=fleet, sign=False)


def revoke(
    names: Annotated[list[str], typer.Argument(help="The devices' names.")],
    yes: YesOption = False,
    offline: OfflineOption = False,
    fleet: FleetOption = HERE,
) -> None:
    """Put members out: at once for their sessions, and at the broker as soon as that has read the new list."""
    now_s = time.time()
    with desk_of(fleet) as (home, store, desk):
        names = list(dict.fromkeys(names))
        for name in names:
            desk.require_member(name)  # a slip of the pen in the last name leaves the first one in
        if not yes:
            lose = (
                "loses its sessions, its certificates and its key"
                if len(names) == 1
                else (f"({len(names)}) lose their sessions, their certificates and their keys")
            )
            _ask(f"{', '.join(names)} {lose} for good. Go on?")
        for name in names:
            ended = desk.revoke(name, now_s=now_s)
            say(f"{name} is out of the draft; certificates revoked: {len(ended)}")
        _finish(home, store, desk, offline=offline, fleet=fleet, sign=True)


def deliver_all(fleet: FleetOption = HERE) -> None:
    """Publish the signed roster and the certificates that devices wait for."""
    with desk_of(fleet) as (home, _, desk):
        _deliver(home, desk)


def fetch(fleet: FleetOption = HERE) -> None:
    """After a restore: take the newest roster from the broker, and revoke again whom it leaves out."""
    now_s = time.time()
    with desk_of(fleet) as (home, store, desk):
        book = home.roster_book(wall_s=time.time)
        before = book.current.epoch if book.current is not None else 0
        kept = fetch_kept(home)
        signed = kept.roster
        if signed is None:
            raise ConfigError("the broker keeps no roster of this fleet; if it is new: sordino roster deliver")
        try:
            book.accept(signed)
        except StaleEpoch:
            say(f"the roster here, epoch {before}, is newer than the broker's: sordino roster deliver")
            return
        roster = book.current
        assert roster is not None
        count_boots(home, kept, roster)
        gone = desk.follow(roster, now_s=now_s)
        say(f"epoch {roster.epoch} is in force, here it was {before}; revoked with it: {', '.join(gone) or 'nobody'}")
        if has_authority(home.folder) and fleet_authority(home.folder).has_key:
            _certify(home, store, desk)
        elif gone:
            note(f"the authority's key is not here; now: sordino roster export -o order.txt --fleet {fleet}")


def receive(
    files: Annotated[list[Path], typer.Argument(help="Requests that were brought by hand.")], fleet: FleetOption = HERE
) -> None:
    """File requests that did not come over the broker: sordino-agent enroll --offline."""
    with desk_of(fleet) as (_, _, desk):
        for path in files:
            packet = from_text(read_text(path), "request")
            filed = desk.receive(packet, who=None, now_s=time.time())
            say(described(filed))
    note("compare each fingerprint with what the device shows, then: sordino roster approve NAME")


def grant(
    name: Annotated[str, typer.Argument(help="The device's name.")], output: OutOption, fleet: FleetOption = HERE
) -> None:
    """Write a device's certificate and roster into a file, to be carried there: sordino-agent enroll --grant FILE."""
    with desk_of(fleet) as (_, _, desk):
        found = [item.packet for item in desk.grants("granted", "delivered", "done") if item.request.name == name]
    if not found:
        raise ConfigError(f"nothing was granted to {name} yet: sordino roster approve {name}")
    write_text(output, to_text(found[-1], "grant"))
    say(f"{output}: for {name}")


def export(output: OutOption, fleet: FleetOption = HERE) -> None:
    """Write an order of what is to be signed, for the machine that has the keys."""
    with desk_of(fleet) as (home, store, desk):
        made = orders.make_order(home, desk, store)
    write_text(output, orders.write_text(made))
    say(
        f"{output}: epoch {made.epoch}, {len(made.draft.entries)} parties, {len(made.requests)} certificates, "
        f"{len(made.revoked)} revoked"
    )
    note(f"on the machine with the keys: sordino roster sign --order {output} --keys DIR -o signed.txt")


def import_signed(
    file: Annotated[Path, typer.Argument(help="What `sordino roster sign --order` wrote.")],
    offline: OfflineOption = False,
    fleet: FleetOption = HERE,
) -> None:
    """Put into force what was signed on the other machine, and deliver it."""
    with desk_of(fleet) as (home, store, desk):
        names = orders.take(home, desk, store, orders.read_signed(read_text(file)), now_s=time.time())
        book = home.roster_book(wall_s=time.time)
        assert book.current is not None
        say(f"epoch {book.current.epoch} is in force; certificates for: {', '.join(names) or 'nobody'}")
        for line in tell_broker(home, news=True) if has_authority(home.folder) else []:
            note(line)
        if not offline:
            _deliver(home, desk)


def sign_order(file: Path, keys: Path, output: Path, *, yes: bool) -> None:
    """`sordino roster sign --order`: on the machine that has the keys."""
    made = orders.read_order(read_text(file))
    found = orders.changes(made, keys)
    say(f"fleet {made.fleet}, epoch {made.epoch}: {len(made.draft.entries)} parties")
    table = table_of("change", "name", "fingerprint", "roles")
    for change in found:
        table.add_row(change.what, change.name, change.fingerprint, change.roles)
    print_table(table)
    say(f"certificates: {len(made.requests)}; revoked: {len(made.revoked)}")
    if not yes:
        _ask("Are these the devices that were approved, with these fingerprints?")
    write_text(output, orders.write_text(orders.fulfil(made, keys, now_s=time.time())))
    say(f"{output}: signed; there: sordino roster import {output}")


def certify_here(home: Home) -> list[str]:
    """What `sordino roster sign` does besides: certificates for approved requests, and the list. Names, for people."""
    if not has_authority(home.folder):
        return []
    with EnrolmentStore(home.folder) as store:
        desk = EnrolmentDesk(home, store)
        if not fleet_authority(home.folder).has_key:
            waiting = [request.name for _, request in desk.to_certify()]
            if waiting:
                note(
                    f"{home.folder / 'ca' / 'ca.key'} is not here, so there is no certificate yet for "
                    f"{', '.join(waiting)}: sordino roster export"
                )
            return []
        return _certify(home, store, desk)


def described(filed: Filed) -> str:
    """A request as the operator has to see it."""
    request = filed.request
    lines = [
        f"{request.purpose:8} {request.name}, {','.join(sorted(request.roles))} in zone {request.zone}",
        f"shows    {filed.fingerprint}",
    ]
    if request.purpose == "rotate":
        lines.append(f"replaces {filed.old_fingerprint}")
    if warning_of(filed):
        lines.append(f"WARNING  {warning_of(filed)}")
    return "\n".join(lines)


def warning_of(filed: Filed) -> str:
    """What the operator should know before saying yes; empty if nothing."""
    if filed.others:
        return f"its token was also used by other keys ({filed.others} times refused): somebody else knows it"
    if filed.request.purpose == "enrol" and filed.old_fingerprint not in (None, filed.fingerprint):
        return f"the roster has a {filed.request.name} with other keys ({filed.old_fingerprint})"
    return ""


def read_text(path: Path) -> str:
    try:
        return path.read_bytes()[: 64 << 20].decode("ascii", "replace")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None


def write_text(path: Path, text: str) -> None:
    try:
        path.write_text(text, "ascii")
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None


def _collect(home: Home, desk: EnrolmentDesk) -> None:
    try:
        found = collect(home, desk, now_s=time.time())
    except FleetUnavailable as error:
        raise FleetUnavailable(f"{error}. With --offline the broker is left alone") from None
    for line in notes_of(found.refused):
        note(line)


def _finish(home: Home, store: EnrolmentStore, desk: EnrolmentDesk, *, offline: bool, fleet: Path, sign: bool) -> None:
    """Sign, certify, tell the broker, deliver: as far as the keys are here."""
    now_s = time.time()
    authority = fleet_authority(home.folder) if has_authority(home.folder) else None
    signs_here = (home.folder / "operator.key").exists() or not sign
    if not signs_here or (authority is not None and not authority.has_key):
        note(f"the keys are not here; now: sordino roster export -o order.txt --fleet {fleet}")
        return
    if sign:
        roster = home.sign(now_s=now_s)
        say(f"epoch {roster.epoch} signed: {len(roster.entries)} parties, valid until {date(roster.expires_s)}")
    if authority is not None:
        for name in _certify(home, store, desk):
            say(f"certificate for {name}")
    if not offline:
        _deliver(home, desk)
    else:
        note(f"not delivered; when the broker is there: sordino roster deliver --fleet {fleet}")


def _certify(home: Home, store: EnrolmentStore, desk: EnrolmentDesk) -> list[str]:
    now_s = time.time()
    names = desk.certify(now_s=now_s)
    desk.retire(now_s=now_s)
    news = write_list(home, store, now_s=now_s)
    for line in tell_broker(home, news=news):
        note(line)
    return names


def _deliver(home: Home, desk: EnrolmentDesk) -> None:
    try:
        names = deliver(home, desk, now_s=time.time())
    except (FleetUnavailable, RemoteError) as error:
        raise type(error)(f"{error}. Everything is done but the delivery; later: sordino roster deliver") from None
    say(f"delivered: the roster, and certificates for {', '.join(names) or 'nobody'}")


def _ask(question: str) -> None:
    if not sys.stdin.isatty():
        raise ConfigError("there is no terminal to ask on; compare the fingerprints and say --yes")
    typer.confirm(question, abort=True)
