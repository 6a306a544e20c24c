"""A contribution to a secure sum, paid from the ledger of this device."""

from __future__ import annotations

from sordino_agent.aggregate.tasks import SumFacts
from sordino_agent.costs import expected_costs
from sordino_agent.ledger import LOST, Charge, Ledger, Split
from sordino_common.errors import LocalError
from sordino_common.messages import SumGradient, SumStatistics, SumUpdate
from sordino_common.privacy.mechanism import Mechanism


class Metered:
    """Without noise nothing leaves about rows that have a budget. With it, every unit that is protected is charged."""

    def __init__(self, ledger: Ledger, command: SumUpdate | SumGradient | SumStatistics) -> None:
        self._ledger = ledger
        self._command = command
        self._dataset: str
        self._split: Split
        if isinstance(command, SumStatistics):
            self._dataset, self._split = command.dataset, "train"
        else:
            self._dataset, self._split = command.data.dataset, command.data.split
        self.expected = expected_costs(command)

    def afford(self) -> None:
        """At what is known before the work."""
        if self.expected:
            self._ledger.afford([self._charge(mechanism) for mechanism in self.expected])
        else:
            self._require_exact()

    def charge(self, facts: SumFacts) -> None:
        """What was done; each unit that was expected has its price, or nothing leaves."""
        if [mechanism.unit for mechanism in facts.mechanisms] != [mechanism.unit for mechanism in self.expected]:
            raise LocalError(f"{self._command.kind}: the work has no price, or one that was not asked for")
        if facts.mechanisms:
            self._ledger.charge([self._charge(mechanism) for mechanism in facts.mechanisms])
        else:
            self._require_exact()

    def lose(self) -> None:
        """The work began and came to nothing; it costs what was expected of it, which is never less."""
        if self.expected:
            self._ledger.lose([self._charge(mechanism, LOST) for mechanism in self.expected])

    def _require_exact(self) -> None:
        self._ledger.require_exact(self._dataset, f"{self._command.kind} without noise")

    def _charge(self, mechanism: Mechanism, how: str = "") -> Charge:
        command = self._command
        return Charge(
            dataset=self._dataset,
            split=self._split,
            run=command.terms.run,
            round=command.round,
            what=f"{command.kind}{how}",
            mechanism=mechanism,
        )
