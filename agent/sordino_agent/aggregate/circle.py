"""Which message of a secure sum is for which part of this device, after policy and roster.

sum-update, -metrics, -gradient, -statistics   contribute.py: the rows' owner
sum-seeds, sum-cut                              helping.py: the helper
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Final

from sordino_agent.aggregate.contribute import Allowance, Contributor, Unmetered
from sordino_agent.aggregate.helping import HelperDesk
from sordino_agent.aggregate.journal import SumJournal
from sordino_agent.aggregate.tasks import SumGradientTask, SumMetricsTask, SumStatisticsTask, SumUpdateTask
from sordino_agent.desk import Asker, Desk
from sordino_agent.tasks import Task
from sordino_common import messages as m
from sordino_common.clock import Loop
from sordino_common.errors import LocalError, RosterError

if TYPE_CHECKING:
    from sordino_agent.policy import Limits, Policy
    from sordino_common.channel.identity import DeviceKey
    from sordino_common.channel.roster import Roster

Contributed = m.SumUpdate | m.SumMetrics | m.SumGradient | m.SumStatistics
KINDS: Final = (m.SumUpdate, m.SumMetrics, m.SumGradient, m.SumStatistics, m.SumSeeds, m.SumCut)


class Circle:
    """This device in secure sums. `identity` seals and opens boxes; without it nothing is contributed. `plan_of` gives
    a Plan that was put here, or raises. `allowance_of` says from which budget a command is paid."""

    def __init__(
        self,
        *,
        name: str,
        identity: DeviceKey | None,
        limits: Limits,
        journal: SumJournal,
        desk: Desk,
        loop: Loop,
        plan_of: Callable[[bytes], bytes],
        answer: Callable[[Asker, m.Message], None],
        allowance_of: Callable[[Contributed], Allowance] = lambda command: Unmetered(),
    ) -> None:
        self.roster: Roster | None = None
        self._name = name
        self._plan_of = plan_of
        self._allowance_of = allowance_of
        self._contributor: Contributor | None = None
        self._helper: HelperDesk | None = None
        if identity is not None:
            self._contributor = Contributor(name=name, identity=identity, limits=limits, desk=desk)
            self._helper = HelperDesk(
                name=name,
                identity=identity,
                limits=limits,
                journal=journal,
                desk=desk,
                wall_s=loop.wall_s,
                answer=answer,
            )

    @property
    def running(self) -> tuple[str, ...]:
        return self._helper.running if self._helper is not None else ()

    def cancel(self, run: str) -> None:
        if self._helper is not None:
            self._helper.cancel(run)

    def on_message(self, message: m.Message, asker: Asker, *, policy: Policy) -> None:
        """Raises for what is refused; the caller answers."""
        if self._helper is None or self._contributor is None:
            raise LocalError("secure sums need this device's key, and the agent was started without it")
        match message:
            case m.SumUpdate() | m.SumMetrics() | m.SumGradient() | m.SumStatistics():
                if isinstance(message, m.SumStatistics):
                    policy.require_dataset(message.dataset, "statistics")
                else:
                    policy.require_dataset(message.data.dataset, "aggregate")
                    policy.require_plan(message.plan_id)
                if isinstance(message, m.SumUpdate) and message.privacy is not None:
                    policy.require_plan(message.privacy.apply_plan)

                self._contributor.contribute(
                    lambda: self._task(message, min_rows=policy.min_rows),
                    asker,
                    command=message.kind,
                    terms=message.terms,
                    round=message.round,
                    allowance=self._allowance_of(message),
                    policy=policy,
                    roster=self._require_roster,
                )
            case m.SumSeeds():
                self._helper.on_seeds(message, asker, policy=policy, roster=self._require_roster())
            case m.SumCut():
                self._helper.on_cut(message, asker, policy=policy, roster=self._require_roster())
            case _:
                raise LocalError(f"{message.kind} in the circle of sums")

    def _task(self, message: Contributed, *, min_rows: int) -> Task:
        if isinstance(message, m.SumStatistics):
            return SumStatisticsTask(command=message, agent=self._name, min_rows=min_rows)
        plan = self._plan_of(message.plan_id)
        match message:
            case m.SumUpdate(privacy=privacy):
                apply = None if privacy is None else self._plan_of(privacy.apply_plan)
                return SumUpdateTask(command=message, plan=plan, agent=self._name, min_rows=min_rows, apply=apply)
            case m.SumGradient():
                return SumGradientTask(command=message, plan=plan, agent=self._name, min_rows=min_rows)
            case m.SumMetrics():
                return SumMetricsTask(command=message, plan=plan, agent=self._name, min_rows=min_rows)

    def _require_roster(self) -> Roster:
        if self.roster is None:
            raise RosterError("no roster was received yet: nothing is sealed or opened without one")
        return self.roster
