"""What a conductor waits for: answers to a question, parties to come, something to be said. No I/O, no timers.

Each is asked `review(...)` when something has changed or its time has come: None says that the wait is over, a number
says when it may be. Times are of the loop, passed in.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from sordino_common.errors import BudgetRefused, PolicyRefusal, RemoteError
from sordino_common.messages import Message, Refused
from sordino_server.rounds.effects import Answers, Ask, Gather, Hear, Present
from sordino_server.rounds.events import Outcome, Waiting

Settled = Callable[["Question", str, Outcome, str], None]  # the question, who, how, why


class Question:
    """An `Ask` under way: who is still awaited, who has answered what, who is gone and since when.

    `online`: who is there now, with boot numbers; the others are missing at once, for the reason in `unlike`, if there
    is one. An agent that goes offline has `gone_s` to come back; one that comes back under a new boot has forgotten the
    question. `settled` is told of every party, as soon as it is known whether it answers."""

    def __init__(
        self,
        ask: Ask,
        *,
        now_s: float,
        online: Mapping[str, int],
        gone_s: float,
        settled: Settled,
        unlike: Mapping[str, str] | None = None,
    ) -> None:
        self.ask = ask
        self.replies: dict[str, Message] = {}
        self._started_s = now_s
        self._gone_s = gone_s
        self._settled = settled
        self._refusals: dict[str, str] = {}
        self._forbidden: set[str] = set()
        self._unaffordable: set[str] = set()
        self._boots = {name: online[name] for name in sorted(ask.messages) if name in online}
        why = unlike or {}
        self._missing = {name: why.get(name, "offline") for name in sorted(ask.messages) if name not in online}
        self._waiting: dict[str, bytes | None] = dict.fromkeys(self._boots)  # name -> correlation
        self._waiting_behind: dict[str, bytes] = {}  # the same, of what was sent behind
        self._behind: dict[str, Message] = {}
        self._gone_since: dict[str, float] = {}
        self._quorum_at: float | None = None

    @property
    def waiting(self) -> tuple[str, ...]:
        """Who is still awaited."""
        return tuple(self._waiting)

    def sent(self, name: str, correlation: bytes) -> None:
        """The question has gone to `name`: what answers it carries `correlation`."""
        if name in self._waiting:
            self._waiting[name] = correlation

    def sent_behind(self, name: str, correlation: bytes) -> None:
        """As `sent`, of what goes behind the question."""
        if name in self._waiting:
            self._waiting_behind[name] = correlation

    def takes_behind(self, name: str) -> bool:
        """Whether something can go behind the question to `name`: it is not answered, and nothing has."""
        return self._waiting.get(name) is not None and name not in self._waiting_behind

    def awaits(self, name: str, correlation: bytes) -> bool:
        return self._waiting.get(name) == correlation or self._waiting_behind.get(name) == correlation

    def take(self, name: str, message: Message, correlation: bytes) -> None:
        """What `name`, which is awaited, answers, and to which of the two."""
        if self._waiting_behind.get(name) == correlation:
            del self._waiting_behind[name]
            self._behind[name] = message
            if self._has_answered(name):
                self._forget(name)
            return
        if name in self._waiting_behind:
            self._waiting[name] = None  # only for the answer to what is behind it
        else:
            self._forget(name)
        refusal = _refusal(self.ask, name, message)
        if refusal is None:
            self.replies[name] = message
            self._settled(self, name, "answered", "")
            return
        self._refusals[name] = refusal
        if isinstance(message, Refused) and message.code == PolicyRefusal.code:
            self._forbidden.add(name)
        if isinstance(message, Refused) and message.code == BudgetRefused.code:
            self._unaffordable.add(name)
        self._settled(self, name, "refused", refusal)

    def miss(self, name: str, why: str) -> None:
        """No answer will come from `name`; nothing changes if none is awaited."""
        if name not in self._waiting:
            return
        self._forget(name)
        if self._has_answered(name):
            return
        self._missing[name] = why = printable(why)
        self._settled(self, name, "missing", why)

    def presence(self, name: str, online: bool, boot: int, now_s: float) -> None:
        if name not in self._waiting:
            return
        if not online:
            self._gone_since.setdefault(name, now_s)
        elif self._boots.get(name) == boot:
            self._gone_since.pop(name, None)
        else:
            self.miss(name, "restarted")

    def reconnected(self, now_s: float) -> None:
        """While the server itself was cut off it could not see who came back: give everybody their time again."""
        self._gone_since = dict.fromkeys(self._gone_since, now_s)

    def review(self, now_s: float, connected: bool) -> float | None:
        dues = [self._deadline_s]
        if self._quorum_at is None and len(self.replies) >= self.ask.quorum:
            self._quorum_at = now_s
        if self._quorum_at is not None:
            dues.append(self._quorum_at + self.ask.straggler_s)
        lost_s = self._lost_at() if connected else None
        if lost_s is not None:
            dues.append(lost_s)
        return None if not self._waiting or now_s >= min(dues) else min(dues)

    def close(self, now_s: float) -> tuple[str, ...]:
        """The wait is over: who is still awaited is missing. Their names."""
        late = self.waiting
        for name in late:
            if name in self._gone_since:
                why = "went offline"
            elif now_s >= self._deadline_s:
                why = f"no answer within {self.ask.deadline_s:g} s"
            else:
                why = f"no answer within {self.ask.straggler_s:g} s of the quorum"
            self.miss(name, why)
        return late

    def answers(self) -> Answers:
        return Answers(
            replies=dict(sorted(self.replies.items())),
            refusals=dict(sorted(self._refusals.items())),
            missing=dict(sorted(self._missing.items())),
            forbidden=frozenset(self._forbidden),
            unaffordable=frozenset(self._unaffordable),
            behind=self._behind,
        )

    def told(self, now_s: float) -> Waiting:
        """The wait as an event."""
        return Waiting(
            purpose=self.ask.purpose,
            names=self.waiting,
            have=len(self.replies),
            quorum=self.ask.quorum,
            waited_s=now_s - self._started_s,
            left_s=self._deadline_s - now_s,
        )

    def _has_answered(self, name: str) -> bool:
        return name in self.replies or name in self._refusals

    def _forget(self, name: str) -> None:
        """`name` is awaited no more."""
        del self._waiting[name]
        self._waiting_behind.pop(name, None)
        self._gone_since.pop(name, None)

    @property
    def _deadline_s(self) -> float:
        return self._started_s + self.ask.deadline_s

    def _lost_at(self) -> float | None:
        """When everybody who is still awaited will have been gone for `gone_s`; None while somebody is there."""
        if any(name not in self._gone_since for name in self._waiting):
            return None
        return max((since + self._gone_s for since in self._gone_since.values()), default=None)


class Gathering:
    """A `Gather` under way."""

    def __init__(self, gather: Gather, *, now_s: float) -> None:
        self._gather = gather
        self._started_s = now_s

    def review(self, now_s: float, present: Present) -> float | None:
        gather = self._gather
        wanted = present.members - gather.without
        have = len(wanted & present.boots.keys())
        others = len(gather.others & present.everybody.keys())
        enough = have >= gather.quorum and others >= gather.quorum_others
        join_s, deadline_s = self._started_s + gather.join_s, self._started_s + gather.deadline_s
        complete = have == len(wanted) and others == len(gather.others)
        if complete or now_s >= deadline_s or (enough and now_s >= join_s):
            return None
        return join_s if enough else deadline_s

    def told(self, now_s: float, present: Present) -> Waiting:
        """The wait as an event."""
        wanted = present.members - self._gather.without
        return Waiting(
            purpose=self._gather.purpose,
            names=tuple(sorted(wanted - present.boots.keys())),
            have=len(wanted & present.boots.keys()),
            quorum=self._gather.quorum,
            waited_s=now_s - self._started_s,
            left_s=self._started_s + self._gather.deadline_s - now_s,
        )


class Hearing:
    """A `Hear` under way."""

    def __init__(self, hear: Hear, *, now_s: float) -> None:
        self._hear = hear
        self._started_s = now_s

    @property
    def delivered(self) -> bool:
        """Whether it is also over when all that was told has arrived."""
        return self._hear.delivered

    def review(self, now_s: float, heard: bool, away_s: float, under_way: int) -> float | None:
        """`heard`: whether something was said; `away_s`: when a party that is offline will count as gone; `under_way`:
        how many messages that were told have not arrived."""
        until_s = self._started_s + self._hear.wait_s
        over = heard or now_s >= until_s or (self._hear.delivered and not under_way)
        return None if over else min(until_s, away_s)

    def told(self, now_s: float) -> Waiting:
        """The wait as an event."""
        return Waiting(
            purpose=self._hear.purpose,
            names=self._hear.missing,
            have=0,
            quorum=len(self._hear.missing),
            waited_s=now_s - self._started_s,
            left_s=self._started_s + self._hear.wait_s - now_s,
        )


def printable(text: str) -> str:
    """A peer's words, without what would move a terminal's cursor or forge a line of a log."""
    return "".join(letter if letter.isprintable() else " " for letter in text)


def _refusal(ask: Ask, name: str, message: Message) -> str | None:
    """Why this reply doesn't count; None if it does."""
    if isinstance(message, Refused):
        return printable(f"{message.code}: {message.reason}")
    if type(message) is not ask.expects:
        return f"answered with {type(message).kind}, expected {ask.expects.kind}"
    if ask.check is not None:
        try:
            ask.check(name, message)
        except RemoteError as error:
            return printable(str(error))
    return None
