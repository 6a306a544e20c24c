"""Our roster against the one that the broker keeps, and the other side's version, from retained packets."""

from __future__ import annotations

import time
from collections.abc import Iterator

from sordino_common.channel.packets import read_packet
from sordino_common.channel.presence import Birth, read_presence
from sordino_common.channel.roster import Roster, read_roster
from sordino_common.diagnosis.finding import CONFIGURATION, SECURITY, Finding, error, ok, warning
from sordino_common.errors import ProtocolMismatch, RemoteError, RosterError

WARN_DAYS = 30
_DAY_S = 86_400


def roster_ends(roster: Roster, *, now_s: float) -> Iterator[Finding]:
    """How long the roster is valid, and entries that end before it."""
    days = (roster.expires_s - now_s) / _DAY_S
    until = time.strftime("%Y-%m-%d", time.gmtime(roster.expires_s))
    sign = "sordino roster sign (on the machine that has the operator's key)"
    if days <= 0:
        text = f"epoch {roster.epoch} has expired on {until}: nobody can talk to anybody"
        yield error("roster", text, sign, exit_code=SECURITY)
    elif days <= WARN_DAYS:
        yield warning("roster", f"epoch {roster.epoch} expires on {until}, in {days:.0f} days", sign)
    else:
        yield ok("roster", f"epoch {roster.epoch}, {len(roster.entries)} parties, valid until {until}, {days:.0f} days")
    soon = [
        entry.name
        for entry in roster.entries
        if entry.not_after_s is not None and entry.not_after_s < min(now_s + WARN_DAYS * _DAY_S, roster.expires_s)
    ]
    if soon:
        text = f"entries that end within {WARN_DAYS} days, or have ended: {', '.join(soon[:8])}"
        yield warning("roster", text, f"renew them in roster.yaml, then: {sign}")


def retained_roster(packet: bytes | None, ours: Roster | None, *, operator_key: bytes, owner: str) -> Iterator[Finding]:
    """`packet`: what the broker keeps on the roster topic, if anything. `owner`: "agent" or "server"."""
    what = "roster"
    if not packet:
        yield warning(
            what, "the broker keeps no roster", "start the server once: sordino agents --fleet DIR publishes it"
        )
        return
    try:
        kind, parts = read_packet(packet)
        if kind != "roster":
            raise RosterError(f"a packet of kind {kind} stands on the roster topic")
        kept = read_roster(parts[0], operator_key=operator_key)
    except RemoteError as problem:
        yield error(
            what,
            f"what the broker keeps as the roster is not one of this operator: {problem}",
            "whoever published it may write on the server's topic: see access rules; sordino agents --fleet DIR "
            "publishes the right one",
            exit_code=SECURITY,
        )
        return
    if ours is None:
        yield ok(what, f"the broker keeps epoch {kept.epoch}; this {owner} takes it when it runs")
    elif kept.epoch == ours.epoch and kept.digest != ours.digest:
        text = f"the broker keeps another roster of epoch {kept.epoch} than ours: the operator signed two"
        yield error(what, text, f"sign epoch {kept.epoch + 1} for all: sordino roster sign", exit_code=SECURITY)
    elif kept.epoch > ours.epoch:
        remedy = "start the agent: it takes the newer one" if owner == "agent" else "put the newest roster.cbor here"
        yield warning(what, f"the broker keeps epoch {kept.epoch}, ours is {ours.epoch}", remedy)
    elif kept.epoch < ours.epoch:
        remedy = (
            "sordino agents --fleet DIR publishes ours"
            if owner == "server"
            else "tell the operator: his server is behind"
        )
        yield warning(what, f"the broker keeps epoch {kept.epoch}, older than ours, {ours.epoch}", remedy)
    else:
        yield ok(what, f"the broker keeps the same: epoch {kept.epoch}")


def server_birth(packet: bytes | None, roster: Roster | None, *, ours: str) -> Iterator[Finding]:
    """The server's retained birth: is it there, and of a version that works with ours? `ours`: our software."""
    if not packet or roster is None:
        yield warning("server", "the broker knows of no birth of the server", "is it running, and enrolled?")
        return
    try:
        presence = read_presence(packet, roster)
    except ProtocolMismatch as problem:
        yield error("versions", str(problem), "pip install --upgrade sordino, or the package, on the older side",
                    exit_code=CONFIGURATION)  # fmt: skip
        return
    except RemoteError as problem:
        yield error(
            "server", f"its retained birth is not the server's: {problem}", "see access rules", exit_code=SECURITY
        )
        return
    if isinstance(presence, Birth):
        differs = "" if presence.version == ours else f" (ours {ours}: they work together)"
        yield ok("server", f"online, version {presence.version}, protocol {presence.protocol}{differs}")
    else:
        yield ok("server", "not online now; it was, and its version works with ours")
