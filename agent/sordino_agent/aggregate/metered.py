"""An update to a secure sum, paid from the ledger of this device."""

from __future__ import annotations

from sordino_agent.aggregate.tasks import SumFacts
from sordino_agent.ledger import Charge, Ledger
from sordino_common.messages import SumUpdate
from sordino_common.privacy.mechanism import Mechanism


class Metered:
    """Without noise nothing leaves about rows that have a budget. With it, the cost is that of the noise of one
    aggregator: one of them is honest, and helpers open a seed only under the terms that it was sealed under."""

    def __init__(self, ledger: Ledger, command: SumUpdate) -> None:
        self._ledger = ledger
        self._command = command

    def afford(self) -> None:
        """At the least that it can cost: the exact sensitivity, which is a little larger, comes with the vector."""
        clip, noise = self._command.clip, self._command.terms.noise
        if clip is None or noise is None:
            self._require_exact()
            return
        least = Mechanism(unit="device", sensitivity_squared=1 << 2 * clip.grid_bits, sigma_squared=noise.sigma_squared)
        self._ledger.afford([self._charge(least)])

    def charge(self, facts: SumFacts) -> None:
        if facts.mechanism is None:
            self._require_exact()
        else:
            self._ledger.charge([self._charge(facts.mechanism)])

    def _require_exact(self) -> None:
        self._ledger.require_exact(self._command.data.dataset, f"{self._command.kind} without noise")

    def _charge(self, mechanism: Mechanism) -> Charge:
        command = self._command
        return Charge(
            dataset=command.data.dataset,
            split=command.data.split,
            run=command.terms.run,
            round=command.round,
            what=command.kind,
            mechanism=mechanism,
        )
