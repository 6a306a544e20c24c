"""Commands on the tensors that a server keeps on this device: put, run a Plan on them, load rows, get, renew, drop.

Which Plans lie between rows and a tensor is written down with it (`lineage`), and asked for before it leaves.
"""

from __future__ import annotations

from collections.abc import Callable

from sordino_agent.desk import Asker, Desk
from sordino_agent.errors import BadCommand
from sordino_agent.ledger import Ledger
from sordino_agent.policy import Policy
from sordino_agent.store import TensorStore
from sordino_agent.tasks import Facts, LoadTask, RunFacts, RunTask
from sordino_common import messages as m
from sordino_common.clock import Loop
from sordino_common.errors import SordinoError


class Tensors:
    """`policy`: the owner's, as it is now. `plan_of` gives a Plan that was put here, or raises. `answer`, `refuse`: to
    the asker; a refusal with command, code and reason."""

    def __init__(
        self,
        *,
        policy: Callable[[], Policy],
        store: TensorStore,
        ledger: Ledger,
        desk: Desk,
        loop: Loop,
        plan_of: Callable[[bytes], bytes],
        answer: Callable[[Asker, m.Message], None],
        refuse: Callable[[str, Asker, str, str], None],
    ) -> None:
        self._policy = policy
        self._store = store
        self._ledger = ledger
        self._desk = desk
        self._loop = loop
        self._plan_of = plan_of
        self._answer = answer
        self._refuse = refuse

    def put(self, message: m.TensorPut, asker: Asker) -> None:
        self._policy().require_job("tensors")
        now_s = self._loop.now_s()
        self._store.put([(message.tensor_id, message.value)], made_by=None, lease_s=message.lease_s, now_s=now_s)
        self._answer(asker, self._stored((message.tensor_id,)))

    def renew(self, message: m.TensorRenew, asker: Asker) -> None:
        self._policy().require_keeping()
        there = self._store.renew(message.tensor_ids, lease_s=message.lease_s, now_s=self._loop.now_s())
        self._answer(asker, self._stored(there))

    def run(self, message: m.TensorRun, asker: Asker) -> None:
        policy = self._policy()
        policy.require_job("tensors")
        policy.require_plan(message.plan_id)
        now_s = self._loop.now_s()
        stored = tuple(self._store.get(tensor_id, now_s=now_s) for tensor_id in message.inputs)
        inputs = (*(tensor.value for tensor in stored), *message.values)

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, RunFacts)
            if len(facts.outputs) != len(message.outputs):
                raise BadCommand(
                    f"the Plan gives {len(facts.outputs)} tensors, the command names {len(message.outputs)}"
                )
            self._store.drop(message.drops)
            rows_in = [tensor.lineage for tensor in stored if tensor.lineage is not None]
            self._store.put(
                list(zip(message.outputs, facts.outputs, strict=True)),
                made_by=message.plan_id,
                lineage=frozenset({message.plan_id}).union(*rows_in) if rows_in else None,
                datasets=frozenset().union(*(tensor.datasets for tensor in stored)),
                lease_s=message.lease_s,
                now_s=self._loop.now_s(),
            )
            return self._stored(message.outputs)

        task = RunTask(plan=self._plan_of(message.plan_id), inputs=inputs)
        label = f"tensors {message.plan_id.hex()[:12]}"
        run = m.task_of(message.outputs[0]) if message.outputs else None
        self._desk.submit(task, asker, command=message.kind, label=label, answer=answer, run=run)

    def load(self, message: m.TensorLoad, asker: Asker) -> None:
        policy = self._policy()
        policy.require_dataset(message.dataset, "tensors")
        self._ledger.require_exact(message.dataset, message.kind)

        def answer(facts: Facts, _seconds: float) -> m.Message:
            assert isinstance(facts, RunFacts)
            (columns,) = facts.outputs
            self._store.put(
                [(message.tensor_id, columns)],
                made_by=None,
                lineage=frozenset(),
                datasets=frozenset({message.dataset}),
                lease_s=message.lease_s,
                now_s=self._loop.now_s(),
            )
            return self._stored((message.tensor_id,))

        task = LoadTask(command=message, min_rows=policy.min_rows)
        label, run = f"load {message.dataset}", m.task_of(message.tensor_id)
        self._desk.submit(task, asker, command=message.kind, label=label, answer=answer, run=run)

    def get(self, message: m.TensorGet, asker: Asker) -> None:
        """Hand the tensor out; one that a task is about to make, when that is over."""
        self._policy().require_job("tensors")

        def answer() -> None:
            try:
                tensor = self._store.get(message.tensor_id, now_s=self._loop.now_s())
                self._policy().require_fetch(tensor.made_by, tensor.lineage)
            except SordinoError as error:
                self._refuse(message.kind, asker, error.code, str(error))
            else:
                self._answer(asker, m.TensorValue(tensor_id=message.tensor_id, value=tensor.value))

        self._desk.after((m.task_of(message.tensor_id),), answer)

    def drop(self, message: m.TensorDrop, asker: Asker) -> None:
        """Forget the tensors; those that a task is about to make, when it is over: else it would make them later."""
        self._policy().require_keeping()
        ids = message.tensor_ids
        self._desk.after(
            frozenset(map(m.task_of, ids)),
            lambda: self._answer(asker, m.TensorDropped(dropped=self._store.drop(ids))),
        )

    def _stored(self, tensor_ids: tuple[bytes, ...]) -> m.TensorStored:
        return m.TensorStored(
            tensor_ids=tensor_ids, used_bytes=self._store.used_bytes, budget_bytes=self._store.budget_bytes
        )
