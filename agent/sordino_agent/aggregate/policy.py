"""What a device's owner allows of secure sums, as a contributor and as a helper. Every refusal says what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sordino_common.aggregate.terms import check_terms
from sordino_common.errors import LimitExceeded, PolicyRefusal, RosterError

if TYPE_CHECKING:
    from sordino_agent.policy import Limits, Policy
    from sordino_common.channel.roster import Roster, RosterEntry
    from sordino_common.messages import SumTerms


def require_contribution(policy: Policy, limits: Limits, terms: SumTerms, *, roster: Roster) -> None:
    """Raise `PolicyRefusal`, `RosterError`, `LimitExceeded` or `CodecError` unless this device contributes under these
    terms: a cohort that is large enough, helpers that are helpers, each in a zone of its own, words that can't wrap."""
    _require_cohort(policy, terms)
    if len(terms.helpers) < policy.min_helpers:
        raise PolicyRefusal(
            f"the sum has {len(terms.helpers)} helper{'s' if len(terms.helpers) != 1 else ''}; this device demands "
            f"{policy.min_helpers} (policy.min_helpers)"
        )
    helpers_of(roster, terms)
    _require_size(limits, terms)
    check_terms(terms)


def require_help(policy: Policy, limits: Limits, terms: SumTerms, *, roster: Roster, helper: str) -> None:
    """Raise as `require_contribution` unless this device helps under these terms; whether it is one of their helpers is
    `HelperSum`'s to see."""
    policy.require_job("help")
    _helper(roster, helper)
    helpers_of(roster, terms)
    _require_cohort(policy, terms)
    _require_size(limits, terms)


def helpers_of(roster: Roster, terms: SumTerms) -> tuple[RosterEntry, ...]:
    """The roster's entries of the sum's helpers, each in a zone of its own and none in the server's: one of them must
    be honest, and whoever holds a zone holds all that stands in it. Raises `RosterError` or `PolicyRefusal`."""
    server = roster.server
    zones: dict[str, str] = {}
    entries = tuple(_helper(roster, name) for name in terms.helpers)
    for entry in entries:
        if entry.zone == server.zone:
            raise PolicyRefusal(
                f"helper {entry.name} stands in the zone of the server {server.name}, {entry.zone}: whoever holds it "
                "could open single contributions; the operator can give the helper, or the server, another zone in the "
                "roster (roster.yaml, then `sordino roster sign`)"
            )
        if entry.zone in zones:
            raise PolicyRefusal(
                f"helpers {zones[entry.zone]} and {entry.name} stand in one zone, {entry.zone}: whoever holds it could "
                "open single contributions; the operator can give them different zones in the roster"
            )
        zones[entry.zone] = entry.name
    return entries


def _helper(roster: Roster, name: str) -> RosterEntry:
    """The roster's entry of a helper. Raises `RosterError` or `PolicyRefusal` if it is none."""
    try:
        entry = roster.entry(name)
    except RosterError:
        raise RosterError(
            f"{name} has no key in the roster of epoch {roster.epoch}: no seed is given to a stranger"
        ) from None
    if "helper" not in entry.roles or "server" in entry.roles:
        raise PolicyRefusal(
            f"{name} has the roles {', '.join(entry.roles)} in the roster; a helper has the role helper, and is not "
            "the server"
        )
    return entry


def owners_of(roster: Roster) -> frozenset[str]:
    """Who may contribute."""
    return frozenset(entry.name for entry in roster.entries if "data" in entry.roles)


def _require_cohort(policy: Policy, terms: SumTerms) -> None:
    if terms.minimum < policy.min_cohort:
        raise PolicyRefusal(
            f"the sum may be formed over {terms.minimum} contributors; this device demands {policy.min_cohort} "
            "(policy.min_cohort)"
        )


def _require_size(limits: Limits, terms: SumTerms) -> None:
    size = terms.length * terms.word_bytes
    if size > limits.payload_bytes:
        raise LimitExceeded(f"a vector of {size} bytes; limits.payload_bytes on the device is {limits.payload_bytes}")
