"""What a device keeps of values on shares between the steps of stepwise sessions, and what its policy says of a step.

A masked value m lies in the tensor store like any tensor: under an id, with a lease, within the byte budget. It is
taken out only as an input of a session of the very committee, dealer and security under which it was kept, and only as
the output that it is (`Shared`). Like stored tensors it has a lineage: which rows of *this* device are in it, and what
Plans lie between. What others gave has none here; they are of the committee, and judge for themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

from sordino_agent.errors import BadCommand
from sordino_agent.store import ENTRY_BYTES, Shared, StoredTensor, TensorStore
from sordino_common import messages as m
from sordino_common.errors import PolicyRefusal
from sordino_common.messages import Array

if TYPE_CHECKING:
    from sordino_agent.policy import Policy
    from sordino_agent.spdz.tasks import SpdzOpenFacts

OUTPUTS: Final = "tensors"  # in policy.spdz.outputs: what a user asks for, whatever the Plan calls it


@dataclass(frozen=True, slots=True, kw_only=True)
class Source:
    """What is known of a value: as of a `StoredTensor`."""

    made_by: bytes | None
    lineage: frozenset[bytes] | None
    datasets: frozenset[str]


_NOT_OURS: Final = Source(made_by=None, lineage=None, datasets=frozenset())


@dataclass(frozen=True, slots=True, kw_only=True)
class Taken:
    """The inputs of a step that are here: m of what is kept, plain values of what this device gives; and the source of
    every output."""

    names: tuple[str, ...]
    values: tuple[Array, ...]
    outputs: Mapping[str, Source]


class Shelf:
    """See the module's text. `policy` is the one that counts now; `require_exact` refuses datasets with a budget."""

    def __init__(
        self,
        *,
        agent: str,
        server: str,
        store: TensorStore,
        policy: Callable[[], Policy],
        require_exact: Callable[[str, str], None],
    ) -> None:
        self._agent = agent
        self._server = server
        self._store = store
        self._policy = policy
        self._require_exact = require_exact

    def take(self, command: m.SpdzOpen, facts: SpdzOpenFacts, step: m.SpdzStep, *, now_s: float) -> Taken:
        """Check the step, and take what is here of its inputs. Changes nothing.

        Raises `BadCommand` for what the circuit does not have, `PolicyRefusal`, `UnknownTensor`, `Conflict` (another
        value than it is said to be, an id that is taken), and `LimitExceeded` if what is to be kept has no room."""
        given = [*(entry.name for entry in step.kept), *(entry.name for entry in step.given)]
        if sorted(given) != sorted(facts.inputs):
            raise BadCommand(f"the step gives the inputs {sorted(given)[:8]}, the circuit takes {facts.inputs[:8]}")
        sizes = dict(facts.outputs)
        stays = [(entry.name, entry.tensor_id) for entry in step.keep]
        stays += [(entry.name, entry.tensor_id) for entry in step.moved if entry.to == self._agent]
        for name in (*(name for name, _ in stays), *(entry.name for entry in step.moved), *step.opened):
            if name not in sizes:
                raise BadCommand(f"the circuit has no output {name!r}")
        names, values, sources = [], [], dict.fromkeys(given, _NOT_OURS)
        for kept in step.kept:
            tensor = self._store.get_shared(kept.tensor_id, shared_by(command, kept.origin), now_s=now_s)
            names.append(kept.name)
            values.append(tensor.value)
            sources[kept.name] = _source(tensor)
        for own in step.given:
            if own.owner not in (self._server, *command.parties) or (own.owner == self._server) != (
                own.tensor_id is None
            ):
                raise PolicyRefusal(
                    f"{own.owner} is to give {own.name}, but is no party of the session: an agent shares its tensors "
                    "with committees of which it is a member, so that its own policy judges all that becomes of them"
                )
            if own.owner == self._agent:
                assert own.tensor_id is not None
                tensor = self._give(own.tensor_id, now_s)
                names.append(own.name)
                values.append(tensor.value)
                sources[own.name] = _source(tensor)
        outputs = self._outputs(command, facts, sources)
        self._require_openings(step.opened, outputs)
        self._require_moves(command, step.moved, outputs)
        self._store.require_free([tensor_id for _, tensor_id in stays], now_s=now_s)
        self._store.require_room(sum(sizes[name] + ENTRY_BYTES for name, _ in stays))
        return Taken(names=tuple(names), values=tuple(values), outputs=outputs)

    def _give(self, tensor_id: bytes, now_s: float) -> StoredTensor:
        policy = self._policy()
        policy.require_job("spdz-data")
        tensor = self._store.get(tensor_id, now_s=now_s)
        for dataset in sorted(tensor.datasets):
            policy.require_dataset(dataset, "spdz-data")
            self._require_exact(dataset, "spdz-step")
        return tensor

    def _outputs(
        self, command: m.SpdzOpen, facts: SpdzOpenFacts, sources: Mapping[str, Source]
    ) -> Mapping[str, Source]:
        """An output that is an input is what that is; any other has the Plan behind it, and the rows of all inputs."""
        rows = [source.lineage for source in sources.values() if source.lineage is not None]
        computed = Source(
            made_by=command.plan_id,
            lineage=frozenset({command.plan_id}).union(*rows) if rows else None,
            datasets=frozenset().union(*(source.datasets for source in sources.values())),
        )
        copies = dict(facts.copies)
        return {name: sources[copies[name]] if name in copies else computed for name, _ in facts.outputs}

    def _require_openings(self, opened: Sequence[str], outputs: Mapping[str, Source]) -> None:
        policy = self._policy()
        if opened and self._server not in policy.spdz.outputs.get(OUTPUTS, ()):
            raise PolicyRefusal(
                f"shared tensors may not open to {self._server} here; the device's owner can allow it in "
                f"policy.spdz.outputs ({OUTPUTS}: [{self._server}])"
            )
        for name in opened:
            policy.require_fetch(outputs[name].made_by, outputs[name].lineage)

    def _require_moves(self, command: m.SpdzOpen, moved: Sequence[m.SpdzMoved], outputs: Mapping[str, Source]) -> None:
        """Every member judges what opens to one of them. To lend a value to another device is to trust that one's
        owner with it: from there its own policy says what leaves, of this device's rows, too."""
        policy = self._policy()
        for entry in moved:
            if entry.to not in command.parties:
                raise PolicyRefusal(
                    f"{entry.name} is to open to {entry.to}, which is no party of the session: what is shared opens to "
                    "members of its committee, which judge the step themselves"
                )
            if entry.to not in policy.spdz.outputs.get(OUTPUTS, ()):
                raise PolicyRefusal(
                    f"shared tensors may not open to {entry.to} here; the device's owner can allow it in "
                    f"policy.spdz.outputs ({OUTPUTS}: [{entry.to}])"
                )
            if entry.to != self._agent:
                policy.require_fetch(outputs[entry.name].made_by, outputs[entry.name].lineage)

    def keep(
        self,
        command: m.SpdzOpen,
        step: m.SpdzStep,
        taken: Taken,
        values: Mapping[str, tuple[Array, bytes]],
        *,
        now_s: float,
    ) -> None:
        """The step is checked: forget what it drops, keep what stays. `values`: output -> m, origin."""
        self._store.drop(step.drops)
        for entry in step.keep:
            value, origin = values[entry.name]
            source = taken.outputs[entry.name]
            self._store.put(
                [(entry.tensor_id, value)],
                made_by=source.made_by,
                lineage=source.lineage,
                datasets=source.datasets,
                shared=(shared_by(command, origin),),
                lease_s=step.lease_s,
                now_s=now_s,
            )

    def receive(
        self, command: m.SpdzOpen, step: m.SpdzStep, taken: Taken, values: Mapping[str, Array], *, now_s: float
    ) -> None:
        """What opened to this device: output -> value. Others' rows may be in it, of which nothing is known here: it
        counts as computed from rows, whatever our own part of it is."""
        for entry in step.moved:
            if entry.to != self._agent:
                continue
            source = taken.outputs[entry.name]
            rows = source.lineage is not None and not source.lineage  # our own, as they are
            self._store.put(
                [(entry.tensor_id, values[entry.name])],
                made_by=command.plan_id,
                lineage=frozenset() if rows else frozenset({command.plan_id}).union(source.lineage or ()),
                datasets=source.datasets,
                lease_s=step.lease_s,
                now_s=now_s,
            )

    def forget(self, command: m.SpdzOpen) -> None:
        """Somebody of this committee cheats: nothing that it keeps is of use any more."""
        self._store.drop_shared(command.parties)


def shared_by(command: m.SpdzOpen, origin: bytes) -> Shared:
    return Shared(parties=command.parties, dealer=command.dealer, security=command.security, origin=origin)


def _source(tensor: StoredTensor) -> Source:
    return Source(made_by=tensor.made_by, lineage=tensor.lineage, datasets=tensor.datasets)
