"""The Plans that a server has put on this device, checked once, by SHA-256, as far as `limits.plans_bytes` goes."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

from sordino_agent.desk import Asker, Desk
from sordino_agent.errors import UnknownPlan
from sordino_agent.policy import Limits, Policy
from sordino_agent.store import ByteCache
from sordino_agent.tasks import Facts, PlanFacts, PlanTask
from sordino_common import messages as m
from sordino_common.errors import LimitExceeded


class _KnownPlan:
    __slots__ = ("data", "facts")

    def __init__(self, data: bytes, facts: PlanFacts) -> None:
        self.data = data
        self.facts = facts


class Plans:
    """`policy`: the owner's, as it is now. `answer`: to the asker."""

    def __init__(
        self,
        *,
        policy: Callable[[], Policy],
        limits: Limits,
        desk: Desk,
        answer: Callable[[Asker, m.Message], None],
    ) -> None:
        self._policy = policy
        self._limits = limits
        self._desk = desk
        self._answer = answer
        self._known: ByteCache[bytes, _KnownPlan] = ByteCache(
            budget_bytes=limits.plans_bytes, size_of=lambda plan: len(plan.data)
        )

    def __len__(self) -> int:
        return len(self._known)

    def put(self, message: m.PlanPut, asker: Asker) -> None:
        plan_id = hashlib.sha256(message.plan).digest()
        self._policy().require_plan(plan_id)
        known = self._known.get(plan_id)
        if known is not None:
            self._answer(asker, _plan_ready(known.facts))
            return
        if len(message.plan) > self._limits.plans_bytes // 2:
            raise LimitExceeded(
                f"the Plan takes {len(message.plan)} bytes; a device whose limits.plans_bytes is "
                f"{self._limits.plans_bytes} takes at most half of that"
            )

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, PlanFacts)
            self._known.put(plan_id, _KnownPlan(message.plan, facts))
            return _plan_ready(facts)

        label = f"plan {plan_id.hex()[:12]}"
        self._desk.submit(PlanTask(plan=message.plan), asker, command=message.kind, label=label, answer=answer)

    def of(self, plan_id: bytes) -> bytes:
        """Raises `UnknownPlan`."""
        known = self._known.get(plan_id)
        if known is None:
            raise UnknownPlan(f"Plan {plan_id.hex()} is not here; put it, then repeat the command")
        return known.data


def _plan_ready(facts: PlanFacts) -> m.PlanReady:
    return m.PlanReady(plan_id=facts.plan_id, peak_bytes=facts.peak_bytes, flops=facts.flops)
