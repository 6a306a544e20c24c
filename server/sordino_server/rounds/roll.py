"""The roll of a run: which agents are there, which hold the columns, and which have the Plans under their current boot.

An agent that comes, or comes back under a new boot, is described and given the Plans before the next round: newcomers
join there. What doesn't answer in time is left alone for 1, 2, 4, ... rounds, so that one sick device can't slow down
every round.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field

from sordino_common.errors import BudgetRefused, ConfigError, FleetUnavailable, PolicyRefusal, RemoteError
from sordino_common.messages import DatasetInfo, Describe, Described, Message, PlanPut, PlanReady
from sordino_server.job import DataSpec, TrainSpec, quorum_of
from sordino_server.rounds.effects import (
    Answers,
    Ask,
    Effect,
    Gather,
    Present,
    Result,
    ask,
    gather,
    look,
    meter,
    report,
)
from sordino_server.rounds.events import Note

Names = tuple[str, ...]
Nobody: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class Program:
    """A Plan that every agent of the run must know."""

    plan: bytes
    plan_id: bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Able:
    """An agent that holds the columns and, under its boot `boot`, the Plans."""

    boot: int
    data: DatasetInfo


@dataclass(frozen=True, slots=True, kw_only=True)
class _Unfit:
    """Why an agent is left out until it boots again: its data don't fit, its policy forbids, or something else."""

    boot: int
    why: str
    mismatch: DataMismatch | None
    forbidden: bool


@dataclass(slots=True, kw_only=True)
class _Sick:
    boot: int
    until_round: int
    times: int


@dataclass(slots=True, kw_only=True)
class Roll:
    data: DataSpec
    train: TrainSpec
    programs: Sequence[Program]
    least: int = 1  # whatever the job's quorum says
    able: dict[str, Able] = field(default_factory=dict)
    unfit: dict[str, _Unfit] = field(default_factory=dict)
    _sick: dict[str, _Sick] = field(default_factory=dict)
    _gathered: bool = False

    def assemble(self, round_: int, *, done: frozenset[str] = Nobody) -> Generator[Effect, Result, tuple[Names, int]]:
        """(names ready for the round, ascending; how many answers it needs yet), waiting as `TrainSpec` says.

        `done`: those who have answered this round already. Raises who is missing, and why: `FleetUnavailable`,
        `PolicyRefusal` if policies alone are the reason, `DataMismatch` if no agent has the job's data."""
        purpose = f"round {round_}: agents to take part"
        deadline_s = (yield from meter()).now_s + self.train.round_deadline_s
        while True:
            now_s = (yield from meter()).now_s
            need = self.quorum((yield from look())) - len(done)
            present = yield from gather(
                Gather(
                    purpose=purpose,
                    without=frozenset(self.unfit) | done,
                    quorum=need,
                    join_s=0.0 if self._gathered else self.train.join_s,
                    deadline_s=max(0.0, deadline_s - now_s),
                )
            )
            self._gathered = True  # from now on, who is missing joins when it comes
            self._forget_old_boots(present)
            short = len(self._ready(present, done)) < need
            yield from self._prepare(round_, self._newcomers(present, round_, even_sick=short))
            present = yield from look()
            ready, need = self._ready(present, done), max(1, self.quorum(present) - len(done))
            if len(ready) >= need:
                return ready, need
            now_s = (yield from meter()).now_s
            absent = present.members - done - frozenset(ready)
            if now_s >= deadline_s or absent <= self.unfit.keys():  # nobody is left who could still come
                self._blame_the_job(present, done)
                text = f"{purpose}: {len(ready)} are ready, {need} are needed; {self._why_missing(present, done)}"
                forbidden = {name for name, unfit in self.unfit.items() if unfit.forbidden}
                raise shortage(text, missing=absent, forbidden=forbidden)

    def quorum(self, present: Present) -> int:
        """Of the members that may hold the data, or of the number that the job draws."""
        fit = len(present.members - self.unfit.keys())
        return max(self.least, quorum_of(self.train, fit if self.train.agents == "all" else self.train.agents))

    def forget(self, name: str) -> None:
        """This agent refused: describe and prepare it anew before it is asked again."""
        self.able.pop(name, None)

    def _ready(self, present: Present, done: frozenset[str]) -> Names:
        return tuple(
            sorted(
                name
                for name, boot in present.boots.items()
                if name in self.able and self.able[name].boot == boot and name not in done
            )
        )

    def _newcomers(self, present: Present, round_: int, *, even_sick: bool) -> Names:
        names = []
        for name, boot in sorted(present.boots.items()):
            if name in self.able or name in self.unfit:
                continue
            sick = self._sick.get(name)
            if sick is None or sick.boot != boot or sick.until_round <= round_ or even_sick:
                names.append(name)
        return tuple(names)

    def _forget_old_boots(self, present: Present) -> None:
        for name, boot in present.boots.items():
            if name in self.able and self.able[name].boot != boot:
                del self.able[name]
            if name in self.unfit and self.unfit[name].boot != boot:
                del self.unfit[name]

    def _prepare(self, round_: int, names: Names) -> Generator[Effect, Result, None]:
        """Describe the newcomers and give those that hold the columns every Plan."""
        if not names:
            return
        boots = (yield from look()).boots
        answers = yield from self._ask_all(f"round {round_}: newcomers to describe themselves", names, Describe())
        found: dict[str, DatasetInfo] = {}
        for name in names:
            if name in answers.replies:
                described = answers.replies[name]
                assert isinstance(described, Described)
                try:
                    found[name] = find_data(self.data, described)
                except DataMismatch as mismatch:
                    yield from self._leave_out(name, boots.get(name), str(mismatch), mismatch=mismatch)
            elif name in answers.refusals:
                yield from self._refused(name, boots.get(name), answers)
            else:
                self._mark_sick(name, boots.get(name), round_)
        for program in self.programs:
            answers = yield from self._ask_all(
                f"round {round_}: newcomers to take the Plan", tuple(found), PlanPut(plan=program.plan), program.plan_id
            )
            for name in tuple(found):
                if name not in answers.replies:
                    del found[name]
                    if name in answers.refusals:
                        yield from self._refused(name, boots.get(name), answers)
                    else:
                        self._mark_sick(name, boots.get(name), round_)
        for name, info in found.items():
            if name in boots:
                self.able[name] = Able(boot=boots[name], data=info)
                self._sick.pop(name, None)

    def _ask_all(
        self, purpose: str, names: Names, message: Message, plan_id: bytes | None = None
    ) -> Generator[Effect, Result, Answers]:
        def check(_: str, reply: Message) -> None:
            if isinstance(reply, PlanReady) and reply.plan_id != plan_id:
                raise RemoteError("confirms another Plan than the one it was sent")

        # Nobody in particular is needed here: whoever is late joins a later round.
        return ask(
            Ask(
                purpose=purpose,
                messages=dict.fromkeys(names, message),
                expects=Described if plan_id is None else PlanReady,
                quorum=0,
                deadline_s=self.train.join_s,
                straggler_s=self.train.join_s,
                check=check,
            )
        )

    def _refused(self, name: str, boot: int | None, answers: Answers) -> Generator[Effect, Result, None]:
        return self._leave_out(name, boot, answers.refusals[name], forbidden=name in answers.forbidden)

    def _leave_out(
        self, name: str, boot: int | None, why: str, *, mismatch: DataMismatch | None = None, forbidden: bool = False
    ) -> Generator[Effect, Result, None]:
        if boot is not None:
            self.unfit[name] = _Unfit(boot=boot, why=why, mismatch=mismatch, forbidden=forbidden)
            yield from report(Note(text=f"{name} is left out: {why}"))

    def _mark_sick(self, name: str, boot: int | None, round_: int) -> None:
        if boot is None:
            return
        last = self._sick.get(name)
        times = last.times + 1 if last is not None and last.boot == boot else 0
        self._sick[name] = _Sick(boot=boot, until_round=round_ + 2 ** min(times, 10), times=times)

    def _blame_the_job(self, present: Present, done: frozenset[str]) -> None:
        """Raises `DataMismatch` if all that is known speaks against the job: no member ever fitted, for one reason."""
        if done or self.able or not present.members <= self.unfit.keys():
            return
        found = {str(mismatch): mismatch for name in present.members if (mismatch := self.unfit[name].mismatch)}
        if len(found) == 1 and all(self.unfit[name].mismatch for name in present.members):
            ((reason, mismatch),) = found.items()
            raise DataMismatch(mismatch.key, f"no agent has it: {reason}")

    def _why_missing(self, present: Present, done: frozenset[str]) -> str:
        reasons = []
        for name in sorted(present.members - done):
            if name in self.unfit:
                reasons.append(f"{name} ({self.unfit[name].why})")
            elif name not in present.boots:
                reasons.append(f"{name} ({present.absent(name)})")
            elif name not in self.able:
                reasons.append(f"{name} (online, does not answer)")
        return "missing: " + (", ".join(reasons) if reasons else "the roster lists no more agents that hold data")


def shortage(
    text: str,
    *,
    missing: AbstractSet[str],
    forbidden: AbstractSet[str],
    unaffordable: AbstractSet[str] = Nobody,
    lacking: int = 1,
) -> FleetUnavailable | PolicyRefusal | BudgetRefused:
    """The error for too few answers, `lacking` of them: a matter of privacy budgets if those who could not afford it
    would have been enough, or are (with policies) why each of the `missing` is missing; of policy, if that alone is."""
    broke = missing & unaffordable
    if broke and (len(broke) >= lacking or missing <= forbidden | broke):
        return BudgetRefused(f"{text} The privacy budget of {', '.join(sorted(broke))} can't pay for it.")
    return PolicyRefusal(text) if missing and missing <= forbidden else FleetUnavailable(text)


class DataMismatch(ConfigError):
    """An agent's data are not what the job names under `key`. If no agent has it, the job is wrong, not the fleet."""

    def __init__(self, key: str, text: str) -> None:
        super().__init__(text)
        self.key = key


def find_data(spec: DataSpec, described: Described) -> DatasetInfo:
    """The dataset that fits the job. Raises `DataMismatch`."""
    offered = {info.name: info for info in described.datasets}
    info = offered.get(spec.dataset)
    if info is None:
        raise DataMismatch("data.dataset", f"no dataset {spec.dataset}; it offers {_listed(sorted(offered))}")
    columns = {column.name: column for column in info.columns}
    row_shape = spec.x_shape if len(spec.features) == 1 and spec.shape is not None else ()
    wanted = [(f"data.features.{index}", name, row_shape) for index, name in enumerate(spec.features)]
    for key, name, shape in (*wanted, ("data.target", spec.target, ())):
        if name not in columns:
            raise DataMismatch(key, f"dataset {spec.dataset} has no column {name}; it has {_listed(list(columns))}")
        found = columns[name].shape
        if found != shape and not (name in spec.features and shape == (1,) and found == ()):
            raise DataMismatch(
                key, f"column {name} of {spec.dataset} has entries of shape {list(found)}, expected {list(shape)}"
            )
    if info.train_rows == 0:
        raise DataMismatch("data.dataset", f"dataset {spec.dataset} has no rows to train on")
    return info


def _listed(names: Sequence[str], most: int = 30) -> str:
    """The names, at most `most` of them and without control characters: they come from a device."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    listed = ", ".join(names[:most]) + more if names else "none"
    return "".join(letter if letter.isprintable() else " " for letter in listed)
