"""What a device's owner allows of sessions on shares. Deny by default; every refusal says which setting to change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Final, Literal

import msgspec

from sordino_common.channel.roster import Roster, RosterEntry
from sordino_common.errors import PolicyRefusal, RosterError
from sordino_common.messages import SpdzOpen
from sordino_common.messages.base import Label, Name
from sordino_common.messages.spdz import Receiver

OWNERS: Final = "*owners"
_DEALING: Final = frozenset({"server", "dealer"})


class SpdzPolicy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`outputs`: which output may open to whom: `{loss: [server], model: [server], prediction: ["*owners"]}`; an output
    that is not named, or to somebody who is not, is refused; `tensors` stands for whatever a program on shared tensors
    asks for, which `policy.fetch` has to allow as well. `min_committee`: fewest compute agents. `zones`: in how
    many different zones of the roster they must stand. `security`: the least that is accepted. `dealers`: who may deal
    (names; by default the fleet's server and whoever has the role dealer)."""

    outputs: dict[Label, tuple[Receiver, ...]] = {}
    min_committee: Annotated[int, msgspec.Meta(ge=2, le=4)] = 2
    zones: Annotated[int, msgspec.Meta(ge=1, le=4)] = 1
    security: Literal["active", "passive"] = "active"
    dealers: tuple[Name, ...] | None = None


def require_session(policy: SpdzPolicy, command: SpdzOpen, *, roster: Roster, agent: str, server: str) -> None:
    """Raise `PolicyRefusal` or `RosterError` unless `agent` may take part in this session."""
    owners = {entry.owner for entry in command.rows}
    provider = None if command.state_from in (None, server) else command.state_from
    readers = {output.receiver for output in command.outputs} - {OWNERS, server}
    if agent not in {*command.parties, *owners, *readers, provider}:
        raise PolicyRefusal(
            f"{agent} is neither a party nor an owner of rows or of the model in this session, nor does it read an "
            "output"
        )
    members = {name: _member(roster, name, "compute") for name in command.parties}
    for name in sorted(owners - members.keys()):
        _member(roster, name, "data")
    if provider is not None and provider not in owners:
        _member(roster, provider, "data")
    what = {
        **dict.fromkeys(sorted(readers), "reader of an output"),
        **({} if provider is None else {provider: "owner of the model"}),
        **dict.fromkeys(sorted(owners), "owner of rows"),
        **dict.fromkeys(command.parties, "party"),
    }
    _require_dealer(policy, command, roster=roster, server=server, members=what)
    _require_committee(policy, members)
    _require_outputs(policy, command)
    if command.security == "passive" and policy.security == "active":
        raise PolicyRefusal(
            "the session has security passive: a single cheating member could falsify results or learn rows; this "
            "device demands active (policy.spdz.security)"
        )
    if agent in owners and command.data is None:
        raise PolicyRefusal("the session wants rows of this device but does not say which columns")
    if agent == provider and command.model is None:
        raise PolicyRefusal("the session wants a model of this device but does not say which")


def _member(roster: Roster, name: str, role: str) -> RosterEntry:
    entry = _entry(roster, name)
    if role not in entry.roles:
        raise PolicyRefusal(f"{name} has the roles {', '.join(entry.roles)} in the roster, not {role}")
    return entry


def _entry(roster: Roster, name: str) -> RosterEntry:
    try:
        return roster.entry(name)
    except RosterError:
        raise RosterError(
            f"{name} has no key in the roster of epoch {roster.epoch}: nothing is shared with a stranger"
        ) from None


def _require_dealer(
    policy: SpdzPolicy, command: SpdzOpen, *, roster: Roster, server: str, members: Mapping[str, str]
) -> None:
    """Whoever knows the masks must never see a masked value: no dealer is among `members` (name -> what it is)."""
    dealer = command.dealer
    entry = roster.entry(dealer)
    for name, what in members.items():
        dealing = _DEALING & set(_entry(roster, name).roles)
        if name in (dealer, server) or dealing:
            why = "is the dealer" if name == dealer else f"has the role {min(dealing) if dealing else 'server'}"
            raise PolicyRefusal(
                f"{name} {why} and would be {_article(what)}: whoever deals the masks must not hold masked values"
            )
    if policy.dealers is not None and dealer not in policy.dealers:
        raise PolicyRefusal(f"{dealer} may not deal for this device (policy.spdz.dealers)")
    if not _DEALING & set(entry.roles):
        raise PolicyRefusal(f"{dealer} is to deal but has neither the role dealer nor server in the roster")


def _article(what: str) -> str:
    return f"an {what}" if what.startswith("owner") else f"a {what}"


def _require_committee(policy: SpdzPolicy, members: Mapping[str, RosterEntry]) -> None:
    if len(members) < policy.min_committee:
        raise PolicyRefusal(
            f"a committee of {len(members)} is too small: this device demands {policy.min_committee} compute agents "
            "(policy.spdz.min_committee)"
        )
    zones = sorted({entry.zone for entry in members.values()})
    if len(zones) < policy.zones:
        raise PolicyRefusal(
            f"the committee stands in {len(zones)} zone{'s' if len(zones) != 1 else ''} ({', '.join(zones)}): this "
            f"device demands {policy.zones} (policy.spdz.zones)"
        )


def _require_outputs(policy: SpdzPolicy, command: SpdzOpen) -> None:
    for output in command.outputs:
        if output.receiver not in policy.outputs.get(output.name, ()):
            raise PolicyRefusal(
                f"output {output.name!r} may not open to {output.receiver} here; the device's owner can allow it in "
                "policy.spdz.outputs"
            )
