"""A contributor's glue in the daemon: policy, budget, task, charge, seal, answer.

    policy -> allowance.afford -> task (masks the vector where it is computed) -> allowance.charge, durable -> seal
                                  cancelled, killed or failed after it began   -> allowance.lose, durable -> refused

A session is contributed to once: a repeated command is refused, whatever became of the first. (A second answer would
hurt nobody, its masks are fresh and helpers take one seed of each; but it would be charged again.)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Final, Protocol

from sordino_agent.aggregate.policy import helpers_of, require_contribution
from sordino_agent.aggregate.tasks import SumFacts
from sordino_agent.desk import Asker, Desk, coarse
from sordino_agent.errors import Conflict
from sordino_agent.tasks import Facts, Task
from sordino_common import messages as m
from sordino_common.aggregate.seeds import BOX_KIND, seed_plaintext
from sordino_common.channel.sealed_box import seal_box

if TYPE_CHECKING:
    from sordino_agent.policy import Limits, Policy
    from sordino_common.channel.identity import DeviceKey
    from sordino_common.channel.roster import Roster

_REMEMBERED: Final = 4096  # sessions


class Allowance(Protocol):
    """The budget that a contribution is paid from."""

    def afford(self) -> None:
        """Before the task: raise `BudgetRefused` if it can't be paid, whatever it turns out to be."""
        ...

    def charge(self, facts: SumFacts) -> None:
        """After the task and before anything leaves: write down what it really costs. Durable when it returns. Raises
        `BudgetRefused` or `LedgerError`; then nothing leaves."""
        ...

    def lose(self) -> None:
        """The task began and has no result: write down what it would have cost, for the server sees that, and when, and
        could have stopped it because of its sample. Durable when it returns. Raises `LedgerError`."""
        ...


class Unmetered:
    """No budget was set for these rows: nothing to pay from, nothing to write down."""

    def afford(self) -> None:
        return

    def charge(self, facts: SumFacts) -> None:
        return

    def lose(self) -> None:
        return


class Contributor:
    """See the module's text."""

    def __init__(self, *, name: str, identity: DeviceKey, limits: Limits, desk: Desk) -> None:
        self._name: Final = name
        self._identity: Final = identity
        self._limits: Final = limits
        self._desk: Final = desk
        self._sessions: OrderedDict[bytes, None] = OrderedDict()

    def contribute(
        self,
        task: Callable[[], Task],
        asker: Asker,
        *,
        command: str,
        terms: m.SumTerms,
        round: int,
        allowance: Allowance,
        policy: Policy,
        roster: Callable[[], Roster],
    ) -> None:
        """Have `task` (of `SumFacts`) done and its contribution sent. Raises what policy, roster, budget and desk
        raise; then nothing has changed."""
        require_contribution(policy, self._limits, terms, roster=roster())
        if terms.session in self._sessions:
            raise Conflict(f"{command}: this device was asked to contribute to this session before; begin a new one")
        allowance.afford()

        def answer(facts: Facts, seconds: float) -> m.Message:
            assert isinstance(facts, SumFacts)
            allowance.charge(facts)
            boxes = self._seal(facts, terms, roster())
            told_s = coarse(seconds) if facts.mechanisms else seconds
            return m.Contribution(session=terms.session, masked=facts.masked, boxes=boxes, seconds=told_s)

        label = f"{command} {terms.run} round {round}"
        self._desk.submit(
            task(),
            asker,
            command=command,
            label=label,
            answer=answer,
            run=terms.run,
            round=round,
            lost=allowance.lose,
        )
        self._sessions[terms.session] = None
        if len(self._sessions) > _REMEMBERED:
            self._sessions.popitem(last=False)

    def _seal(self, facts: SumFacts, terms: m.SumTerms, roster: Roster) -> tuple[bytes, ...]:
        """A box for every helper, under the roster of now: who has lost role or zone meanwhile gets no seed."""
        sender = roster.entry(self._name)
        return tuple(
            seal_box(
                seed_plaintext(seed, terms),
                identity=self._identity,
                sender=sender,
                receiver=helper,
                session=terms.session,
                round=terms.index,
                kind=BOX_KIND,
            )
            for helper, seed in zip(helpers_of(roster, terms), facts.seeds, strict=True)
        )
