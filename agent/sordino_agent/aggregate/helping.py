"""A helper's desk in the daemon: opens boxes, holds seeds in memory, answers one cut per sum.

Seeds are never written down: a helper that restarts has lost them, and the sum is void. What it has answered is on disk
before the share is computed.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.aggregate.policy import owners_of, require_help
from sordino_agent.aggregate.tasks import ShareFacts, ShareTask
from sordino_agent.desk import Asker, Desk
from sordino_agent.errors import UnknownSession
from sordino_agent.tasks import Facts
from sordino_common import messages as m
from sordino_common.aggregate.helper import HelperSum
from sordino_common.aggregate.seeds import BOX_KIND, read_seed
from sordino_common.channel.sealed_box import open_box
from sordino_common.errors import CodecError, RemoteError, RosterError
from sordino_common.messages.sums import members_digest

if TYPE_CHECKING:
    from sordino_agent.policy import Limits, Policy
    from sordino_common.channel.identity import DeviceKey
    from sordino_common.channel.roster import Roster

log = logging.getLogger("sordino.agent")

MOST_SUMS: Final = 8  # at a time; a leader that begins more loses the oldest
_REASON_CHARS: Final = 1000


class HelperDesk:
    """See the module's text. `answer` brings messages out."""

    def __init__(
        self,
        *,
        name: str,
        identity: DeviceKey,
        limits: Limits,
        journal: SumJournal,
        desk: Desk,
        wall_s: Callable[[], float],
        answer: Callable[[Asker, m.Message], None],
    ) -> None:
        self._name: Final = name
        self._identity: Final = identity
        self._limits: Final = limits
        self._journal: Final = journal
        self._desk: Final = desk
        self._wall_s: Final = wall_s
        self._answer: Final = answer
        self._sums: OrderedDict[bytes, HelperSum] = OrderedDict()

    @property
    def running(self) -> tuple[str, ...]:
        """Sums whose seeds are held, oldest first, for people."""
        return tuple(f"helps {one.terms.run} sum {one.terms.index}" for one in self._sums.values() if not one.answered)

    def cancel(self, run: str) -> None:
        """The leader gives the run up: its seeds are forgotten."""
        for session in [session for session, one in self._sums.items() if one.terms.run == run]:
            del self._sums[session]

    def on_seeds(self, message: m.SumSeeds, asker: Asker, *, policy: Policy, roster: Roster) -> None:
        """Open the boxes, keep the good ones, say which. Raises for terms under which this device does not help."""
        terms = message.terms
        one = self._sums.get(terms.session)
        if one is None:
            require_help(policy, self._limits, terms, roster=roster, helper=self._name)
            self._journal.require_unanswered(terms)
            if any((held.terms.run, held.terms.index) == (terms.run, terms.index) for held in self._sums.values()):
                raise CodecError(f"sum {terms.index} of run {terms.run} has a session already; take the next index")
            one = HelperSum(terms, helper=self._name)
            self._sums[terms.session] = one
            while len(self._sums) > MOST_SUMS:
                _, oldest = self._sums.popitem(last=False)
                log.info("event=sum-forgotten run=%s index=%d", oldest.terms.run, oldest.terms.index)
        else:
            one.require_same(terms)
        owners = owners_of(roster)
        accepted, rejected = [], []
        for entry in message.seeds:
            try:
                self._take(one, entry, roster=roster, owners=owners)
                accepted.append(entry.name)
            except RemoteError as error:
                rejected.append(m.RejectedSeed(name=entry.name, reason=str(error)[:_REASON_CHARS]))
        reply = m.SumSeedsChecked(session=terms.session, accepted=tuple(accepted), rejected=tuple(rejected))
        self._answer(asker, reply)

    def on_cut(self, message: m.SumCut, asker: Asker, *, policy: Policy, roster: Roster) -> None:
        """Check the cut, burn it on disk, and have the share computed and sent. Raises for a cut that is refused; then
        nothing has changed."""
        policy.require_job("help")
        one = self._sums.get(message.session)
        if one is None:
            raise UnknownSession("sum-cut: no seeds are held here for this session; this helper may have restarted")
        at_least, owners = policy.min_cohort, owners_of(roster)
        one.check_cut(message.members, at_least=at_least, roster=owners)
        self._desk.require_place()
        digest = members_digest(message.members)
        self._journal.burn(one.terms, digest, wall_s=self._wall_s())
        seeds = one.cut(message.members, at_least=at_least, roster=owners)

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, ShareFacts)
            return m.SumShare(session=message.session, members=digest, share=facts.share)

        task = ShareTask(
            terms=one.terms,
            helper=self._name,
            members=message.members,
            seeds=tuple(seed.expose() for seed in seeds),
        )
        label = f"share of {one.terms.run} sum {one.terms.index}"
        self._desk.submit(task, asker, command=message.kind, label=label, answer=answer, run=one.terms.run)

    def _take(self, one: HelperSum, entry: m.SealedSeed, *, roster: Roster, owners: frozenset[str]) -> None:
        one.require_open(entry.name)
        if entry.name not in owners:
            raise RosterError(f"{entry.name} is no owner of data in the roster of epoch {roster.epoch}")
        plaintext = open_box(
            entry.box,
            identity=self._identity,
            roster=roster,
            sender=entry.name,
            receiver=self._name,
            session=one.terms.session,
            round=one.terms.index,
            kind=BOX_KIND,
        )
        one.accept(entry.name, read_seed(plaintext, one.digest))
