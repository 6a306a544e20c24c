"""What a device does of a federated round with rows of its own, in the clear: moments, training, evaluation.

Policy and budget first, then a task at the desk, then what the answer costs, then the answer.
"""

from __future__ import annotations

from collections.abc import Callable

from sordino_agent.aggregate.circle import Contributed
from sordino_agent.aggregate.contribute import Allowance, Unmetered
from sordino_agent.aggregate.metered import Metered
from sordino_agent.costs import expected_cost
from sordino_agent.desk import Asker, Desk, coarse
from sordino_agent.ledger import LOST, Charge, Ledger
from sordino_agent.policy import Policy
from sordino_agent.tasks import EvaluateFacts, EvaluateTask, Facts, MomentsFacts, MomentsTask, TrainFacts, TrainTask
from sordino_common import messages as m
from sordino_common.errors import LocalError, PolicyRefusal
from sordino_common.privacy.mechanism import Mechanism


class Rounds:
    """`policy`: the owner's, as it is now. `plan_of` gives a Plan that was put here, or raises."""

    def __init__(
        self,
        *,
        name: str,
        policy: Callable[[], Policy],
        ledger: Ledger,
        desk: Desk,
        plan_of: Callable[[bytes], bytes],
    ) -> None:
        self._name = name
        self._policy = policy
        self._ledger = ledger
        self._desk = desk
        self._plan_of = plan_of

    def moments(self, message: m.Moments, asker: Asker) -> None:
        policy = self._policy()
        policy.require_dataset(message.dataset, "moments")
        self._ledger.require_exact(message.dataset, message.kind)
        task = MomentsTask(command=message, min_rows=policy.min_rows)
        label = f"moments {message.dataset}"
        self._desk.submit(task, asker, command=message.kind, label=label, answer=_moments_answer)

    def train(self, message: m.Train, asker: Asker) -> None:
        dataset, terms = message.data.dataset, message.privacy
        policy = self._policy()
        policy.require_dataset(dataset, "train")
        if terms is None:
            self._ledger.require_exact(dataset, message.kind)
        else:
            policy.require_noise(expected_cost(message, terms))
            policy.require_plan(terms.apply_plan)
        policy.require_plan(message.plan_id)

        def charge(mechanism: Mechanism, how: str = "") -> Charge:
            return Charge(
                dataset=dataset,
                split="train",
                run=message.run,
                round=message.round,
                what=f"{message.kind}{how}",
                mechanism=mechanism,
            )

        def lost() -> None:
            if terms is not None:
                self._ledger.lose([charge(expected_cost(message, terms), LOST)])

        def task() -> TrainTask:
            if terms is not None:
                self._ledger.afford([charge(expected_cost(message, terms))])
            return TrainTask(
                command=message,
                plan=self._plan_of(message.plan_id),
                agent=self._name,
                min_rows=self._policy().min_rows,
                apply=None if terms is None else self._plan_of(terms.apply_plan),
            )

        def answer(facts: Facts, seconds: float) -> m.Message:
            assert isinstance(facts, TrainFacts)
            if (facts.mechanism is None) != (terms is None):
                raise LocalError("train: the work has no price, or one that was not asked for")
            if facts.mechanism is not None:
                self._ledger.charge([charge(facts.mechanism)])  # on the disk before the answer leaves
            return m.Trained(
                run=message.run,
                round=message.round,
                attempt=message.attempt,
                rows=facts.rows,
                steps=facts.steps,
                update=facts.update,
                loss_sum=facts.loss_sum,
                seconds=seconds if terms is None else coarse(seconds),
            )

        label = f"train {message.run} round {message.round}"
        self._desk.submit_once(task, asker, command=message, label=label, answer=answer, lost=lost)

    def evaluate(self, message: m.Evaluate, asker: Asker) -> None:
        policy = self._policy()
        policy.require_dataset(message.data.dataset, "evaluate")
        self._require_evaluation(message.data, message.kind)
        policy.require_plan(message.plan_id)
        task = EvaluateTask(command=message, plan=self._plan_of(message.plan_id), min_rows=policy.min_rows)

        def answer(facts: Facts, seconds: float) -> m.Message:
            assert isinstance(facts, EvaluateFacts)
            return m.Evaluated(
                run=message.run,
                round=message.round,
                rows=facts.rows,
                names=facts.names,
                sums=facts.sums,
                seconds=seconds,
            )

        label = f"evaluate {message.run} round {message.round}"
        self._desk.submit(
            task, asker, command=message.kind, label=label, answer=answer, run=message.run, round=message.round
        )

    def allowance(self, command: Contributed) -> Allowance:
        """What a contribution to a secure sum costs. Raises what the policy says."""
        if isinstance(command, m.SumMetrics):
            self._require_evaluation(command.data, command.kind)
            return Unmetered()
        metered = Metered(self._ledger, command)
        for mechanism in metered.expected:
            self._policy().require_noise(mechanism)
        return metered

    def _require_evaluation(self, data: m.DataRef, what: str) -> None:
        """Sums without noise: of train rows under a budget never, of held-out rows if the policy says so."""
        if data.split == "train":
            self._ledger.require_exact(data.dataset, f"{what} of train rows")
        elif data.dataset in self._ledger.budgets and not self._policy().exact_evaluation:
            raise PolicyRefusal(
                f"dataset {data.dataset!r} has a privacy budget, and `{what}` gives sums over held-out rows without "
                "noise; its owner can allow that with policy.exact_evaluation: true"
            )


def _moments_answer(facts: Facts, _seconds: float) -> m.Message:
    assert isinstance(facts, MomentsFacts)
    return facts.result
