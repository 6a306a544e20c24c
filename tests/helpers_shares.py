"""Sessions on shares among `AgentCore`s on virtual time: a wire that a test may bend, a dealer's desk, no server."""

from __future__ import annotations

import hashlib
import itertools
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import msgspec
import numpy as np

from helpers_agent import SERVER, TRAIN_PLAN, data_ref, linear_training_plan, small_table
from helpers_channel import entry, roster
from sordino_agent.core import AgentCore
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.data.models import MemoryModels
from sordino_agent.data.table import Table
from sordino_agent.executor import InlineExecutor
from sordino_agent.policy import Limits, Policy
from sordino_agent.spdz.bench import Bench
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.spdz.policy import OWNERS, SpdzPolicy
from sordino_agent.spdz.seat import MakeParty
from sordino_agent.store import TensorStore
from sordino_agent.tasks import TaskCost
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common import messages as m
from sordino_common.channel.roster import Roster
from sordino_common.clock import VirtualLoop
from sordino_common.errors import RemoteError
from sordino_common.plan.plan import plan_id
from sordino_common.ring.fixed import encode_fixed
from sordino_common.spdz.lowering import Ranges, Settings, lower
from sordino_common.spdz.opening import numbers_of, spec_of
from sordino_common.spdz.party import Party
from sordino_common.spdz.spec import SessionSpec
from sordino_server.dealer.desk import DealerDesk, first_state

SETTINGS = Settings(ranges=Ranges(x=8.0, y=32.0, params=16.0, values=64.0))
LOWERED = lower(linear_training_plan(), plan_id=plan_id(TRAIN_PLAN), settings=SETTINGS)
OPEN = SpdzPolicy(outputs={"loss": (SERVER,), "model": (SERVER, "agent-00"), "prediction": (OWNERS,)})
SHARES_POLICY = Policy(
    jobs=("describe", "moments", "train", "evaluate", "spdz-compute", "spdz-data"), plans="any", min_rows=2, spdz=OPEN
)
NAMES = ("agent-00", "agent-01", "agent-02")
ROWS = {"agent-00": 20, "agent-01": 14, "agent-02": 9}


def fleet_roster(
    names: Sequence[str] = NAMES, *, zones: Sequence[str] = ("a", "b", "c", "d"), **roles: object
) -> Roster:
    """The server, who deals, and agents that own data and compute, each in a zone of its own; `roles` by name."""
    entries = [entry(SERVER, roles=roles.get("server", ("server", "dealer")))]
    for name, zone in zip(names, itertools.cycle(zones)):
        entries.append(entry(name, zone=zone, roles=roles.get(name.replace("-", "_"), ("data", "compute"))))
    return roster(entries=entries)


def open_command(**changes: object) -> m.SpdzOpen:
    """A session of three parties that own rows, with its digest; `digest` in `changes` stays as it is."""
    fields: dict[str, object] = {
        "run": "toy-1",
        "session": b"session-00000001",
        "plan_id": plan_id(TRAIN_PLAN),
        "circuit": LOWERED.digest,
        "digest": bytes(32),
        "settings": numbers_of(SETTINGS),
        "parties": NAMES,
        "dealer": SERVER,
        "security": "active",
        "first_step": 0,
        "steps": 6,
        "check_every": 2,
        "retries": 4,
        "rows": tuple(m.SpdzRows(owner=name, rows=count) for name, count in ROWS.items()),
        "batch_rows": 8,
        "seed": 3,
        "order": "shuffled",
        "outputs": (m.SpdzOutput(name="loss", receiver=SERVER), m.SpdzOutput(name="model", receiver=SERVER)),
        "data": data_ref(),
        "state_from": SERVER,
        "resume": None,
        "checkpoints": (4, 6),
        "ahead": 4,
        "report_every": 1,
        "silence_s": 30.0,
    }
    command = m.SpdzOpen(**{**fields, **changes})  # type: ignore[arg-type]
    if "digest" in changes:
        return command
    try:
        digest = spec_of(command, LOWERED.circuit, LOWERED.digest).digest
    except RemoteError:  # a command that is to be refused for its numbers
        return command
    return msgspec.structs.replace(command, digest=digest)


@dataclass(frozen=True, kw_only=True)
class Packet:
    """A message on its way; as `Incoming` to its receiver."""

    sender: str
    to: str
    message: m.Message
    correlation: bytes
    context: bytes


@dataclass
class Port:
    """One agent's `Sender`: puts packets on the wire."""

    name: str
    wire: Wire

    def send(
        self,
        to: str,
        message: m.Message,
        *,
        correlation: bytes | None = None,
        context: bytes = b"",
        expires_s: float | None = None,
        on_outcome: Callable[[bool, str], None] | None = None,
    ) -> bytes:
        decoded = m.decode_message(m.encode_message(message))
        packet = Packet(sender=self.name, to=to, message=decoded, correlation=correlation or bytes(16), context=context)
        self.wire.put(packet)
        return packet.correlation

    def end_context(self, peer: str, context: bytes) -> None:
        self.wire.ended.append((self.name, peer, context))


@dataclass
class Wire:
    """Brings packets to agents after a moment; what is for the server is kept. `bend` may change, double or drop."""

    loop: VirtualLoop
    cores: dict[str, AgentCore] = field(default_factory=dict)
    to_server: list[Packet] = field(default_factory=list)
    sent: list[Packet] = field(default_factory=list)
    ended: list[tuple[str, str, bytes]] = field(default_factory=list)
    bend: Callable[[Packet], Sequence[Packet]] = lambda packet: (packet,)

    def put(self, packet: Packet) -> None:
        for bent in self.bend(packet):
            self.sent.append(bent)
            self.loop.call_at(self.loop.now_s() + 0.001, lambda bent=bent: self.bring(bent))  # type: ignore[misc]

    def bring(self, packet: Packet) -> None:
        if packet.to == SERVER:
            self.to_server.append(packet)
        elif packet.to in self.cores:
            self.cores[packet.to].on_message(packet)  # type: ignore[arg-type]


@dataclass
class Committee:
    """Agents, and the server's side done by hand."""

    loop: VirtualLoop
    wire: Wire
    journals: dict[str, BurnJournal]
    models: dict[str, dict[str, bytes]]

    def tell(self, to: str, message: m.Message, *, sender: str = SERVER, context: bytes = b"") -> None:
        self.wire.put(Packet(sender=sender, to=to, message=message, correlation=bytes(16), context=context))

    def settle(self) -> None:
        """Run what is due soon; not the deadlines."""
        self.loop.advance(3.0)

    def said(self, kind: type[m.Message], sender: str | None = None) -> list[m.Message]:
        """What came to the server."""
        return [p.message for p in self.wire.to_server if isinstance(p.message, kind) and sender in (None, p.sender)]

    def refusal(self, name: str) -> m.Refused:
        (found,) = self.said(m.Refused, name)
        assert isinstance(found, m.Refused)
        return found

    def abort(self, sender: str | None = None) -> m.SpdzAbort:
        found = self.said(m.SpdzAbort, sender)
        assert found, [p.message for p in self.wire.to_server]
        assert isinstance(found[0], m.SpdzAbort)
        return found[0]

    def open(self, command: m.SpdzOpen, *, names: Sequence[str] | None = None) -> None:
        for name in names or self.wire.cores:
            self.tell(name, command)
        self.settle()

    def ready(self) -> set[str]:
        return {p.sender for p in self.wire.to_server if isinstance(p.message, m.SpdzReady)}


class Conduct:
    """The server's part of one session, step by step, as `rounds/spdz_session.py` plays it."""

    def __init__(self, committee: Committee, command: m.SpdzOpen, *, masks: dict[str, object] | None = None) -> None:
        self.committee = committee
        self.command = command
        self.spec: SessionSpec = spec_of(command, LOWERED.circuit, LOWERED.digest)
        rng = random.Random(command.session)
        self.desk = DealerDesk(
            command,
            self.spec,
            random=rng.randbytes,
            masks=masks,
            stopwatch=lambda: 0.0,  # type: ignore[arg-type]
        )
        self.attempt = 0
        self.first: dict[str, np.ndarray] = {}  # parameters, if the server provides them; zeros for the others
        self.heard = len(committee.wire.to_server)
        self.checked = dict.fromkeys(command.parties, command.first_step)
        self.losses: list[float] = []
        self.masks: dict[int, dict[str, np.ndarray]] = {}

    @property
    def members(self) -> list[str]:
        provider = {self.command.state_from or SERVER} - {SERVER}
        readers = {output.receiver for output in self.command.outputs} - {OWNERS, SERVER}
        return list(
            dict.fromkeys((*self.command.parties, *(row.owner for row in self.command.rows), *provider, *readers))
        )

    def begin(self) -> None:
        setups = self.desk.setups()
        for name in self.members:
            self.committee.tell(name, setups[name])
        if self.command.state_from == SERVER:
            seed = setups[SERVER].state_seed
            assert seed is not None
            values = {
                e.name: encode_fixed(np.asarray(self.first.get(e.name, np.zeros(e.wire.shape))))
                for e in self.spec.state_inputs
            }
            state = first_state(self.command, self.spec, seed, values)
            for name in self.command.parties:
                self.committee.tell(name, state)
        self.confirm(self.command.first_step)

    def confirm(self, done: int) -> None:
        self.desk.confirm(done)
        for name in self.members:
            self.committee.tell(name, m.SpdzConfirm(session=self.command.session, step=done))

    def deal(self) -> None:
        while self.desk.may_deal:
            name, parts = self.desk.deal()
            for part in parts:
                self.committee.tell(name, part)

    def run(self, *, until_s: float = 120.0) -> bool:
        """Whether all steps were checked; False if somebody aborted or nothing happens any more."""
        self.begin()
        loop, committee = self.committee.loop, self.committee
        deadline_s = loop.now_s() + until_s
        while loop.now_s() < deadline_s:
            self.deal()
            loop.advance(0.25)
            for packet in committee.wire.to_server[self.heard :]:
                if isinstance(packet.message, m.SpdzAbort):
                    return False
                if isinstance(packet.message, m.SpdzChecked):
                    self.checked[packet.sender] = packet.message.step
            self.heard = len(committee.wire.to_server)
            done = min(self.checked.values())
            if done > self.desk.confirmed:
                self.masks[done] = {name: np.array(value) for name, value in self.desk.state(done).items()}
                self.confirm(done)
            if done == self.command.steps:
                return True
        return False


def committee(
    names: Sequence[str] = NAMES,
    *,
    policy: Policy = SHARES_POLICY,
    known: Roster | None = None,
    limits: Limits | None = None,
    make_party: Callable[[str], MakeParty] = lambda name: Party,
    tables: dict[str, Table] | None = None,
    provides: dict[str, dict[str, bytes]] | None = None,
    journals: dict[str, BurnJournal] | None = None,
    seconds_of: Callable[[TaskCost], float] = lambda cost: 0.001,
) -> Committee:
    """Agents with rows as `ROWS` says, the Plan put, on one wire."""
    loop = VirtualLoop()
    wire = Wire(loop)
    made = Committee(loop, wire, journals or {}, {})
    programs = Programs(executor="numpy", limits=plan_limits(64 << 20))
    limits = limits or Limits(memory_bytes=64 << 20)
    for name in names:
        table = (tables or {}).get(name) or small_table(rows=ROWS.get(name, 10) + 5, test=5, seed=7)
        catalogue = MemoryCatalogue([table])
        seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        bench = Bench(
            catalogue=catalogue,
            models=MemoryModels((provides or {}).get(name, {})),
            plan_of=lambda data: programs.load(data).plan,
            random=random.Random(seed).randbytes,
            make_party=make_party(name),
        )
        workshop = Workshop(catalogue=catalogue, programs=programs, memory_bytes=64 << 20, bench=bench)
        models = made.models.setdefault(name, {})
        core = AgentCore(
            name=name,
            server=SERVER,
            policy=policy,
            limits=limits,
            executor=InlineExecutor(loop, workshop=workshop, seconds_of=seconds_of),
            store=TensorStore(budget_bytes=1 << 20),
            loop=loop,
            version="0.0-test",
            journal=made.journals.setdefault(name, BurnJournal(None)),
            keep_model=models.__setitem__,
        )
        core.attach(Port(name, wire))
        core.on_roster(known or fleet_roster(names))
        core.start()
        wire.cores[name] = core
        made.tell(name, m.PlanPut(plan=TRAIN_PLAN))
    made.settle()
    wire.to_server.clear()
    return made
