"""A whole fleet in one process: operator, roster, server and N agents, each the very object of the real programs.

What is simulated is what lies around them: the clock (a `VirtualLoop`, in which nobody waits), the wire (`wires.py`:
memory with a network model, or a real broker), keys (from the seed), and the time that computing takes (a device
profile; the results are computed for real). An agent's boot is an object of its own: `die` stops its loop, forgets it
and cuts its connection, `come_back` builds a new one with a greater boot number, as a restarted device.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from typing import Final, Protocol

from msgspec.structs import replace

from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.budget import BudgetSpec
from sordino_agent.core import AgentCore
from sordino_agent.data.catalogue import MemoryCatalogue
from sordino_agent.data.models import MemoryModels
from sordino_agent.data.table import Table
from sordino_agent.executor import InlineExecutor
from sordino_agent.ledger import Ledger
from sordino_agent.policy import Limits, Policy
from sordino_agent.spdz.bench import Bench, Lower
from sordino_agent.spdz.journal import BurnJournal
from sordino_agent.spdz.policy import OWNERS, SpdzPolicy
from sordino_agent.spdz.seat import MakeParty
from sordino_agent.status import resident_bytes
from sordino_agent.store import TensorStore
from sordino_agent.tasks import TaskCost
from sordino_agent.workshop import Programs, Workshop, plan_limits
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.roster import Roster, RosterBook, RosterEntry, sign_roster
from sordino_common.clock import Loop
from sordino_common.errors import LocalError
from sordino_common.messages import SpdzNumber
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion
from sordino_common.plan.values import Plan
from sordino_common.spdz.circuit import Circuit
from sordino_common.spdz.lowering import Settings, lower
from sordino_common.spdz.opening import numbers_of
from sordino_common.spdz.party import Party
from sordino_common.transport.endpoint import Endpoint
from sordino_common.transport.settings import LinkSettings
from sordino_server.conductor import Conductor
from sordino_server.dealer.masks import MaskStore
from sordino_server.dealer.service import DealerService
from sordino_server.fleet import others_of
from sordino_server.rounds.spdz import World
from sordino_server.run import RunnableLoop
from sordino_sim.flood import Flood
from sordino_sim.keys import simulation_device_key, simulation_operator_key, simulation_random
from sordino_sim.mortal import MortalLoop
from sordino_sim.network import SimulatedNetwork
from sordino_sim.profiles import DEFAULT_PROFILE, DeviceProfile, profile
from sordino_sim.wires import Wire

FLEET: Final = "simulated"
SERVER: Final = "server"
VERSION: Final = "simulated"
_VALID_S: Final = 10 * 365 * 86_400  # a simulation's roster outlives any virtual clock
_DRAIN_S: Final = 5.0  # as long as the real agent takes to say goodbye, at most

# The simulated owners allow everything that a job can ask for: policies are tested on the agent itself, and a fleet of
# a thousand may have one row each.
_POLICY: Final = Policy(  # and that what the job opens to an agent by name opens to it
    jobs=(
        *("describe", "moments", "train", "evaluate", "aggregate", "statistics", "help"),
        *("spdz-compute", "spdz-data", "spdz-model"),
    ),
    plans="any",
    models="any",
    min_rows=1,
    exact_evaluation=True,
    min_cohort=2,
    spdz=SpdzPolicy(
        outputs=dict.fromkeys(("model", "loss", "prediction"), (SERVER, OWNERS)),
        security="passive",  # the least that is accepted
    ),
)

log = logging.getLogger("sordino.sim")


class _SharedRosterBook(RosterBook):
    """A roster book that shares the parsed roster with the other parties of this process: a thousand agents would
    otherwise parse, and hold, a thousand rosters of a thousand entries. Every check of `accept` is still made."""

    def __init__(self, parsed: dict[bytes, Roster], *, operator_key: bytes, wall_s: Callable[[], float]) -> None:
        self._parsed = parsed
        super().__init__(fleet=FLEET, operator_key=operator_key, wall_s=wall_s)

    def _read(self, signed: bytes) -> Roster:
        roster = self._parsed.get(signed)
        if roster is None:
            roster = self._parsed[signed] = super()._read(signed)
        return roster


def shared_lower() -> Lower:
    """Lowers each Plan once for all agents of this process; they compare digests all the same."""
    known: dict[tuple[bytes, tuple[SpdzNumber, ...]], tuple[Circuit, bytes]] = {}

    def lower_once(plan: Plan, *, plan_id: bytes, settings: Settings) -> tuple[Circuit, bytes]:
        key = (plan_id, numbers_of(settings))
        if key not in known:
            lowered = lower(plan, plan_id=plan_id, settings=settings)
            known[key] = (lowered.circuit, lowered.digest)
        return known[key]

    return lower_once


class SimulatedAgent:
    """One device: what survives its restarts (key, rows, boot counter), and the boot that is running, if any."""

    __slots__ = (
        *("board", "boot", "core", "endpoint", "identity", "journal", "ledger", "loop", "models", "name", "provides"),
        *("slowdown", "sums", "table", "wall_offset_s"),
    )

    def __init__(
        self,
        *,
        name: str,
        identity: DeviceKey,
        board: DeviceProfile,
        table: Table | None,
        provides: Mapping[str, bytes],
        budget: BudgetSpec | None = None,
    ) -> None:
        self.name = name
        self.identity = identity
        self.board = board
        self.table = table
        self.boot = 0
        self.journal = BurnJournal(None)  # on the device's disk: it survives restarts
        # as well
        self.ledger = Ledger(None, budgets={} if table is None or budget is None else {table.name: budget})
        self.sums = SumJournal(None)
        self.models: dict[str, bytes] = {}  # that opened to it
        self.provides = provides  # that it may input: name -> file
        self.slowdown = 1.0
        self.wall_offset_s = 0.0  # of its clock from the true time
        self.loop: MortalLoop | None = None
        self.core: AgentCore | None = None
        self.endpoint: Endpoint | None = None

    @property
    def running(self) -> bool:
        return self.loop is not None

    def seconds_of(self, cost: TaskCost) -> float:
        """The time that this device takes for a task."""
        return self.board.plan_seconds(flops=cost.flops, nodes=cost.nodes, runs=cost.runs, slowdown=self.slowdown)


class Cast(Protocol):
    """Who takes part: a job's `Scenario`, or agents without a job."""

    @property
    def seed(self) -> int: ...
    @property
    def boards(self) -> Mapping[str, DeviceProfile]: ...
    @property
    def dealer(self) -> str | None: ...
    @property
    def zones(self) -> Mapping[str, str]: ...
    @property
    def helpers(self) -> Mapping[str, str]: ...
    @property
    def budgets(self) -> Mapping[str, BudgetSpec]: ...
    @property
    def receivers(self) -> tuple[str, ...]: ...
    def models(self) -> Mapping[str, Mapping[str, bytes]]: ...
    def tables(self) -> Mapping[str, Table | None]: ...


class SimulatedFleet:
    """See the module's text. `start_server`, then `start_agents`; `conductor` runs generators as the real server's."""

    def __init__(
        self,
        scenario: Cast,
        *,
        loop: RunnableLoop,
        wire: Wire,
        network: SimulatedNetwork | None,
        link: LinkSettings | None = None,
        protocols: Mapping[str, ProtocolVersion] | None = None,
        issued_s: int | None = None,
    ) -> None:
        """`network`: what `wire` asks for delays, if it is simulated; to be cut by faults. `protocols`: the version
        that a party says it speaks, where that is not ours. `issued_s`: of the roster, if several processes simulate
        parts of one fleet."""
        seed = scenario.seed
        self._scenario = scenario
        self._lower = shared_lower()
        self.make_party: MakeParty = Party
        self._seed = seed
        receivers = (SERVER, OWNERS, *scenario.receivers)
        opens = replace(_POLICY.spdz, outputs=dict.fromkeys(_POLICY.spdz.outputs, receivers))
        self.policy = replace(_POLICY, spdz=opens)
        self._loop = loop
        self._issued_s = issued_s
        self._wire = wire
        self._network = network
        self._link = link or LinkSettings()
        self.protocols: dict[str, ProtocolVersion] = dict(protocols or {})  # a party's next boot looks here
        self._programs = Programs(executor="numpy", limits=plan_limits(256 << 20))
        self._parsed: dict[bytes, Roster] = {}
        self._operator = simulation_operator_key(seed)
        self._dealer = scenario.dealer
        self._dealer_boot = 0
        self._dealer_loop: MortalLoop | None = None
        self._dealer_store = MaskStore(None)  # on its host's disk: it survives restarts
        self.dealer: DealerService | None = None
        self._server_identity = simulation_device_key(seed, SERVER)
        self._server_boot = 0
        self._server_loop: MortalLoop | None = None
        self._tables: Mapping[str, Table | None] = scenario.tables()
        provided = scenario.models()
        self.agents: Mapping[str, SimulatedAgent] = {
            name: SimulatedAgent(
                name=name,
                identity=simulation_device_key(seed, name),
                board=board,
                table=self._tables[name],
                budget=scenario.budgets.get(name),
                provides=provided.get(name, {}),
            )
            for name, board in scenario.boards.items()
        }
        self.helpers: Mapping[str, SimulatedAgent] = {
            name: SimulatedAgent(
                name=name,
                identity=simulation_device_key(seed, name),
                board=profile(DEFAULT_PROFILE),
                table=None,
                provides={},
            )
            for name in scenario.helpers
        }
        self._away: list[str] = []  # who died or left, in this order
        self._signed = self._sign_roster()
        self._server_book = self._book()
        self.conductor: Conductor | None = None
        self.server_endpoint: Endpoint | None = None

    @property
    def loop(self) -> RunnableLoop:
        return self._loop

    @property
    def members(self) -> tuple[str, ...]:
        return tuple(sorted(self.agents))

    @property
    def away(self) -> tuple[str, ...]:
        """Agents that died or left and did not return, first gone first."""
        return tuple(self._away)

    # --- the server ------------------------------------------------------------------------------------------------

    def start_server(self) -> Conductor:
        """A (new) boot of the server: endpoint and conductor."""
        if self._server_loop is not None:
            raise LocalError("start_server: the server runs already")
        self._server_boot += 1
        loop = self._server_loop = MortalLoop(self._loop)
        conductor = Conductor(loop=loop)
        book = self._book()
        book.accept(self._signed)
        endpoint = self._endpoint(SERVER, self._server_identity, book, self._server_boot, loop, conductor)
        counters = endpoint.counters.total
        conductor.attach(
            endpoint,
            members=lambda: self.members,
            traffic=lambda: (counters.packet_bytes_received, counters.packet_bytes_sent),
            others=lambda: others_of(book.require()),
        )
        self._server_book = book
        self.conductor, self.server_endpoint = conductor, endpoint
        endpoint.open()
        endpoint.publish_roster(self._signed)
        return conductor

    def world(self) -> World:
        """What a run on shares needs of it. Reproducible, hence not secret."""
        return World(
            server=SERVER,
            roster=self._server_book.require,
            random=simulation_random(self._seed, "dealer", self._server_boot),
            stopwatch=time.perf_counter,
        )

    def kill_server(self) -> None:
        """The server's process is gone, between two instructions."""
        if self._server_loop is not None:
            self._server_loop.kill()
            self._server_loop = None
            self.conductor = self.server_endpoint = None
            self._wire.kill(SERVER, noticed_after_s=0.0)

    # --- the dealer ------------------------------------------------------------------------------------------------

    def start_dealer(self) -> None:
        """A (new) boot of the job's own dealer, if it has one."""
        name = self._dealer
        if name is None or self._dealer_loop is not None:
            return
        self._dealer_boot += 1
        loop = self._dealer_loop = MortalLoop(self._loop)
        service = self.dealer = DealerService(
            name=name,
            server=SERVER,
            loop=loop,
            store=self._dealer_store,
            random=simulation_random(self._seed, name, self._dealer_boot),
            stopwatch=time.perf_counter,
        )
        book = self._book()
        book.accept(self._signed)
        service.on_roster(book.require())
        identity = simulation_device_key(self._seed, name)
        endpoint = self._endpoint(name, identity, book, self._dealer_boot, loop, service)
        service.attach(endpoint)
        endpoint.open()

    def kill_dealer(self) -> None:
        if self._dealer is not None and self._dealer_loop is not None:
            self._dealer_loop.kill()
            self._dealer_loop = self.dealer = None
            self._wire.kill(self._dealer, noticed_after_s=0.0)

    # --- agents ----------------------------------------------------------------------------------------------------

    def start_agents(self) -> None:
        """Start everybody who is not away, dealer and helpers too."""
        self.start_dealer()
        for agent in (*self.helpers.values(), *self.agents.values()):
            if not agent.running and agent.name not in self._away:
                self._start(agent)

    def die(self, name: str, *, noticed_after_s: float = 0.0) -> None:
        """The device, or the helper, stops in mid-word; the broker notices later. Nothing happens if it is not
        running."""
        agent = self._device(name)
        if agent.loop is None:
            return
        agent.loop.kill()
        agent.loop = agent.core = agent.endpoint = None
        self._wire.kill(name, noticed_after_s=noticed_after_s)
        self._away.append(name)

    def leave(self, name: str) -> None:
        """The device drains and says goodbye, as on SIGTERM."""
        agent = self._device(name)
        if agent.core is None or agent.endpoint is None or agent.loop is None:
            return
        core, endpoint, loop = agent.core, agent.endpoint, agent.loop
        self._away.append(name)

        def goodbye() -> None:
            if agent.endpoint is endpoint:
                endpoint.close(drain_s=_DRAIN_S)
                # What the closed endpoint still has to send, it sends; after that its loop has nothing to do.
                agent.loop = agent.core = agent.endpoint = None

        core.drain(goodbye)
        loop.call_at(loop.now_s() + _DRAIN_S, goodbye)

    def come_back(self, name: str) -> None:
        """A new boot of a device that is away."""
        agent = self._device(name)
        if agent.running:
            return
        if name in self._away:
            self._away.remove(name)
        self._start(agent)

    def slow_down(self, name: str, factor: float) -> None:
        """From its next task on, the device takes `factor` times its profile's time."""
        self._device(name).slowdown = factor

    def set_clock(self, name: str, *, by_s: float) -> None:
        """The device's clock on the wall is set forward, or back, while it runs; what measures time goes on."""
        agent = self._device(name)
        agent.wall_offset_s += by_s
        if agent.loop is not None:
            agent.loop.wall_offset_s = agent.wall_offset_s

    def flood(self, name: str, *, per_s: float, for_s: float) -> None:
        """A device whose firmware has gone mad, or bad: beside its work it sends the server all that it can."""
        agent = self._device(name)
        transport = self._wire.transport_of(name)
        if agent.endpoint is not None and agent.loop is not None and transport is not None:
            flooding = Flood(name, endpoint=agent.endpoint, transport=transport, fleet=FLEET, server=SERVER)
            flooding.begin(agent.loop, per_s=per_s, for_s=for_s)

    def cut(self, names: frozenset[str], for_s: float) -> None:
        """Nothing passes between the broker and `names` for so long."""
        if self._network is None:
            raise LocalError("SimulatedFleet.cut: the network is not simulated; faults.py refuses such a schedule")
        now_s = self._loop.now_s()
        self._network.cut(names, start_s=now_s, end_s=now_s + for_s)

    def restart_broker(self, *, down_s: float) -> None:
        self._wire.restart_broker(down_s=down_s)

    def resident_bytes(self) -> int:
        """What this process, all agents included, has in memory."""
        return resident_bytes()

    def close(self) -> None:
        """Stop everything that has a socket or a timer."""
        for name, agent in (*self.agents.items(), *self.helpers.items()):
            if agent.loop is not None:
                agent.loop.kill()
                agent.loop = agent.core = agent.endpoint = None
                self._wire.kill(name, noticed_after_s=0.0)
        self.kill_dealer()
        self.kill_server()

    def _start(self, agent: SimulatedAgent) -> None:
        agent.boot += 1
        loop = agent.loop = MortalLoop(self._loop, wall_offset_s=agent.wall_offset_s)
        limits = Limits(memory_bytes=agent.board.memory_bytes // 2)
        catalogue = MemoryCatalogue([] if agent.table is None else [agent.table])
        bench = Bench(
            catalogue=catalogue,
            models=MemoryModels(agent.provides),
            plan_of=lambda data: self._programs.load(data).plan,
            lower=self._lower,
            random=simulation_random(self._seed, f"{agent.name}-shares", agent.boot),
            make_party=self.make_party,
        )
        workshop = Workshop(
            catalogue=catalogue,
            programs=self._programs,
            memory_bytes=limits.memory_bytes,
            bench=bench,
            random=simulation_random(self._seed, f"{agent.name}-privacy", agent.boot),
        )
        executor = InlineExecutor(loop, workshop=workshop, seconds_of=agent.seconds_of, limit_s=limits.plan_seconds)
        core = agent.core = AgentCore(
            name=agent.name,
            server=SERVER,
            policy=self.policy,
            limits=limits,
            executor=executor,
            store=TensorStore(budget_bytes=limits.store_bytes),
            loop=loop,
            version=VERSION,
            journal=agent.journal,
            ledger=agent.ledger,
            sums=agent.sums,
            identity=agent.identity,
            keep_model=agent.models.__setitem__,
        )
        book = self._book(loop)
        book.accept(self._signed)
        core.on_roster(book.require())
        endpoint = agent.endpoint = self._endpoint(agent.name, agent.identity, book, agent.boot, loop, core)
        core.attach(endpoint)
        core.start()
        endpoint.open()

    def _device(self, name: str) -> SimulatedAgent:
        return self.helpers[name] if name in self.helpers else self.agents[name]

    # --- both ------------------------------------------------------------------------------------------------------

    def _endpoint(
        self,
        name: str,
        identity: DeviceKey,
        book: RosterBook,
        boot: int,
        loop: MortalLoop,
        handler: AgentCore | Conductor | DealerService,
    ) -> Endpoint:
        return Endpoint(
            name=name,
            identity=identity,
            roster=book,
            fleet=FLEET,
            server=SERVER,
            boot=boot,
            transport=self._wire.transport(name, loop),
            loop=loop,
            handler=handler,
            version=VERSION,
            settings=self._link,
            random=simulation_random(self._seed, name, boot),
            protocol=self.protocols.get(name, PROTOCOL),
        )

    def _book(self, loop: Loop | None = None) -> RosterBook:
        wall_s = (loop or self._loop).wall_s
        return _SharedRosterBook(self._parsed, operator_key=self._operator.public, wall_s=wall_s)

    def _sign_roster(self) -> bytes:
        issued_s = int(self._loop.wall_s()) if self._issued_s is None else self._issued_s
        parties: list[tuple[str, DeviceKey, tuple[str, ...]]] = [(SERVER, self._server_identity, ("server",))]
        parties += [(agent.name, agent.identity, ("data", "compute")) for agent in self.agents.values()]
        parties += [(helper.name, helper.identity, ("helper",)) for helper in self.helpers.values()]
        if self._dealer is not None:
            parties.append((self._dealer, simulation_device_key(self._seed, self._dealer), ("dealer",)))
        roster = Roster(
            fleet=FLEET,
            epoch=1,
            issued_s=issued_s,
            expires_s=issued_s + _VALID_S,
            entries=tuple(
                RosterEntry(
                    name=name,
                    sign_key=identity.public.sign_key,
                    box_key=identity.public.box_key,
                    roles=roles,
                    zone=self._scenario.helpers.get(name) or self._scenario.zones.get(name, "default"),
                )
                for name, identity, roles in parties
            ),
        )
        return sign_roster(roster, self._operator)
