"""What this device says of itself: version, limits, datasets. The datasets are read once, before anybody asks."""

from __future__ import annotations

import logging
from collections.abc import Callable

from sordino_agent.desk import Asker
from sordino_agent.errors import Busy
from sordino_agent.executor import Executor
from sordino_agent.policy import Limits, Policy
from sordino_agent.tasks import DatasetList, DescribeTask, Done, Outcome
from sordino_common import messages as m

log = logging.getLogger("sordino.agent")


class Description:
    """`policy`: the owner's, as it is now. `answer`, `refuse`: to the asker. `on_change`: the datasets have been
    read."""

    def __init__(
        self,
        *,
        version: str,
        executor_name: str,
        policy: Callable[[], Policy],
        limits: Limits,
        executor: Executor,
        answer: Callable[[Asker, m.Message], None],
        refuse: Callable[[str, Asker, str, str], None],
        on_change: Callable[[], None],
    ) -> None:
        self.datasets: DatasetList | None = None  # until the executor has read them
        self._version = version
        self._executor_name = executor_name
        self._policy = policy
        self._limits = limits
        self._executor = executor
        self._answer = answer
        self._refuse = refuse
        self._on_change = on_change
        self._describing = False
        self._waiting: list[Asker] = []

    def forget(self) -> None:
        """Read the datasets again."""
        self.datasets = None
        self.read()

    def ask(self, asker: Asker) -> None:
        """Answer now, or when the datasets have been read."""
        self._policy().require_job("describe")
        if len(self._waiting) >= self._limits.queue:
            raise Busy("the datasets are still being read")
        self._waiting.append(asker)
        self._tell()

    def read(self) -> None:
        if self._describing:
            return
        self._describing = True

        def done(outcome: Outcome) -> None:
            self._describing = False
            if isinstance(outcome, Done):
                assert isinstance(outcome.result, DatasetList)
                self.datasets = outcome.result
                for problem in outcome.result.problems:
                    log.error("event=dataset-unreadable dataset=%s reason=%r", problem.dataset, problem.detail)
                self._tell()
                self._on_change()
            else:
                askers, self._waiting = self._waiting, []
                for asker in askers:
                    self._refuse("describe", asker, outcome.code, outcome.reason)

        self._executor.submit(DescribeTask(), done)

    def _tell(self) -> None:
        if self.datasets is None:
            self.read()
            return
        askers, self._waiting = self._waiting, []
        policy = self._policy()
        described = m.Described(
            version=self._version,
            executor=self._executor_name,
            memory_bytes=self._limits.memory_bytes,
            store_bytes=self._limits.store_bytes,
            payload_bytes=self._limits.payload_bytes,
            plan_seconds=self._limits.plan_seconds,
            datasets=tuple(info for info in self.datasets.datasets if policy.shows_dataset(info.name)),
        )
        for asker in askers:
            self._answer(asker, described)
