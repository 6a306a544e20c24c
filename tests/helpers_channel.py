"""A fleet with fixed keys, tables on it, a fake link that loses and shuffles, and a picture of a table's state."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import msgspec

from sordino_common.channel.effects import Effect, Established, Lost, Opened, Reply
from sordino_common.channel.handshake import SessionTable
from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.channel.packets import Accept, Body, Hello, Reject, read_body, read_packet, signed_packet
from sordino_common.channel.presence import Birth, Death
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry, sign_roster
from sordino_common.channel.session import Session
from sordino_common.errors import RemoteError

FLEET = "ward"
WALL_S = 1_700_000_000
ROLES = {"hub": ("server", "dealer"), "alto": ("data",), "bass": ("data", "compute"), "cello": ("compute",)}


def seeded(label: str) -> bytes:
    return hashlib.sha256(label.encode()).digest()


def device(name: str) -> DeviceKey:
    return DeviceKey.from_seeds(seeded(f"sign {name}"), seeded(f"box {name}"))


OPERATOR = OperatorKey.from_seed(seeded("operator"))
STRANGER_OPERATOR = OperatorKey.from_seed(seeded("another operator"))
KEYS = {name: device(name) for name in (*ROLES, "stranger")}


def entry(name: str, /, **changes: object) -> RosterEntry:
    keys = (KEYS.get(name) or device(name)).public
    fields: dict[str, object] = {
        "name": name,
        "sign_key": keys.sign_key,
        "box_key": keys.box_key,
        "roles": ROLES.get(name, ("data",)),
    }
    return RosterEntry(**{**fields, **changes})  # type: ignore[arg-type]


def roster(*, epoch: int = 1, entries: Iterable[RosterEntry] | None = None, **changes: object) -> Roster:
    fields: dict[str, object] = {
        "fleet": FLEET,
        "epoch": epoch,
        "issued_s": WALL_S,
        "expires_s": WALL_S + 86_400,
        "entries": tuple(entries if entries is not None else (entry(name) for name in ROLES)),
    }
    return Roster(**{**fields, **changes})  # type: ignore[arg-type]


def signed(epoch: int = 1, **changes: object) -> bytes:
    return sign_roster(roster(epoch=epoch, **changes), OPERATOR)  # type: ignore[arg-type]


@dataclass
class Wall:
    """A wall clock that a test sets."""

    now_s: float = WALL_S + 1.0

    def __call__(self) -> float:
        return self.now_s


def book(*, first: bytes | None = None, wall: Callable[[], float] | None = None) -> RosterBook:
    made = RosterBook(fleet=FLEET, operator_key=OPERATOR.public, wall_s=wall or Wall())
    made.accept(first if first is not None else signed())
    return made


def fixed_random(label: str) -> Callable[[int], bytes]:
    """A stream of bytes that depends on `label` only."""
    calls = iter(range(1 << 30))
    return lambda count: hashlib.shake_256(f"{label} {next(calls)}".encode()).digest(count)


def table(
    name: str,
    *,
    boot: int = 1,
    first: bytes | None = None,
    wall: Callable[[], float] | None = None,
    random: Callable[[int], bytes] | None = None,
    **changes: object,
) -> SessionTable:
    return SessionTable(
        name=name,
        identity=KEYS[name],
        roster=book(first=first, wall=wall),
        fleet=FLEET,
        boot=boot,
        random=random or fixed_random(f"{name} {boot}"),
        **changes,  # type: ignore[arg-type]
    )


def forged(body: Body, signer: str) -> bytes:
    """`body` as a packet with a valid signature of `signer`, whatever the body says."""
    return signed_packet(KEYS[signer], body)[0]


def replies(effects: Iterable[Effect]) -> list[bytes]:
    return [effect.packet for effect in effects if isinstance(effect, Reply)]


def only_reply(effects: list[Effect]) -> bytes:
    (effect,) = effects
    assert isinstance(effect, Reply)
    return effect.packet


def opened(effects: Iterable[Effect]) -> list[bytes]:
    return [effect.plaintext for effect in effects if isinstance(effect, Opened)]


def connect(initiator: SessionTable, responder: SessionTable, context: bytes = b"") -> tuple[Session, Session]:
    """Run the handshake on a perfect link. Returns both ends."""
    hello = initiator.initiate(responder.name, context, now_s=0)
    accept = only_reply(responder.receive(hello, now_s=0))
    (confirm,) = replies(initiator.receive(accept, now_s=0))
    responder.receive(confirm, now_s=0)
    return session(initiator, responder.name, context), session(responder, initiator.name, context)


def session(owner: SessionTable, peer: str, context: bytes = b"") -> Session:
    found = owner.established(peer, context)
    assert found is not None
    return found


def picture(owner: SessionTable) -> object:
    """Everything that a packet could change in `owner`, as a comparable value."""

    def of(value: object) -> object:
        if isinstance(value, Session):
            return ("session", value.id, value._next, value._highest, value._seen, value.peer_boot, value.initiated)
        if hasattr(value, "private_bytes_raw"):
            return value.private_bytes_raw()
        if isinstance(value, dict):
            return [(key, of(item)) for key, item in value.items()]
        if isinstance(value, list | tuple):
            return [of(item) for item in value]
        slots = getattr(type(value), "__slots__", None)
        if slots and type(value).__name__ in ("Slots", "Slot", "Pending", "HalfOpen"):
            return (type(value).__name__, [(slot, of(getattr(value, slot))) for slot in slots])
        return value

    names = ("_slots", "_sequence", "_owed", "_roster")
    return [(name, of(getattr(owner, name))) for name in names] + [owner._book.signed]


@dataclass
class FakeLink:
    """Tables joined by a broker that loses, repeats and reorders packets, driven by a seed."""

    tables: dict[str, SessionTable]
    rng: random.Random
    loss: float = 0.0
    repeat: float = 0.0
    flying: list[tuple[str, bytes]] = field(default_factory=list)
    past: list[tuple[str, bytes]] = field(default_factory=list)
    got: dict[str, list[bytes]] = field(default_factory=dict)
    established: list[tuple[str, str]] = field(default_factory=list)
    lost: list[tuple[str, str]] = field(default_factory=list)
    refusals: list[RemoteError] = field(default_factory=list)
    now_s: float = 0.0

    def send(self, to: str, packet: bytes) -> None:
        self.past.append((to, packet))
        if self.rng.random() >= self.loss:
            self.flying.append((to, packet))
        if self.rng.random() < self.repeat:
            self.flying.append((to, packet))

    def deliver(self) -> bool:
        """One packet in flight, whichever; False if there is none."""
        if not self.flying:
            return False
        to, packet = self.flying.pop(self.rng.randrange(len(self.flying)))
        self.give(to, packet)
        return True

    def give(self, to: str, packet: bytes) -> None:
        owner = self.tables[to]
        before = picture(owner)
        try:
            effects = owner.receive(packet, now_s=self.now_s)
        except RemoteError as error:
            self.refusals.append(error)
            effects = []
            changed = picture(owner) != before
        else:
            changed = False
        assert not changed, self.refusals[-1]
        for effect in effects:
            match effect:
                case Reply():
                    self.send(effect.to, effect.packet)
                case Opened():
                    self.got.setdefault(to, []).append(effect.plaintext)
                case Established():
                    self.established.append((to, effect.peer))
                    assert owner.established(effect.peer, effect.context) is effect.session
                case Lost():
                    self.lost.append((to, effect.peer))
                case _:
                    pass

    def settle(self) -> None:
        while self.deliver():
            pass


def altered(packet: bytes, signer: str, **changes: object) -> bytes:
    """The same Hello, Accept, Reject, Birth or Death with other fields, validly signed by `signer`."""
    return forged(msgspec.structs.replace(body_of(packet), **changes), signer)


def body_of(packet: bytes) -> Body:
    kind, parts = read_packet(packet)
    return read_body(BODIES[kind], parts[0])


BODIES: dict[str, type[Body]] = {body.kind: body for body in (Hello, Accept, Reject, Birth, Death)}
