"""What a round generator may ask of the world, and what it gets back.

A generator yields an effect and is sent the answer:

    Ask     -> Answers    messages to agents; ends by the rules below
    Gather  -> Present    wait for agents to be online
    Look    -> Present    who is online now
    Meter   -> Metered    bytes and time so far
    Listen  -> None       from now on, keep what these parties say unasked, for Hear
    Tell    -> Sent       a message; what answers it, if anything, comes to who listens, with the same correlation
    Hear    -> Heard      what was said since, or a while of silence
    NextSum -> Numbered   the next number of a secure sum of this run, never used before: on disk by then
    Begin   -> None       something is about to be released: when the generator goes on, that is on disk
    Save    -> None       a durable checkpoint: when the generator goes on, it is on disk
    Report  -> None       tell the observers

The helper functions of the same names in lower case do it with types: `answers = yield from ask(Ask(...))`.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sordino_common.errors import LocalError
from sordino_common.messages import Message
from sordino_server.rounds.events import Event, RoundRecord

Params = tuple[NDArray[np.generic], ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """Send `messages` and wait until

    - all have answered, refused, or are lost for good (restarted, or offline for a while), or
    - `quorum` have answered and `straggler_s` have passed since, or
    - `deadline_s` have passed.

    A reply counts if it is of type `expects` and `check(name, reply)` doesn't raise `RemoteError`; what doesn't count
    is a refusal. Those whose answer is still due at the end are sent `cancel`.

    `behind`: what some are sent right behind their message, without waiting for its answer in between. Who is sent one
    is waited for until both are answered; what answers it, a refusal too, is in `Answers.behind`."""

    purpose: str
    messages: Mapping[str, Message]
    expects: type[Message]
    quorum: int
    deadline_s: float
    straggler_s: float
    check: Callable[[str, Message], None] | None = None
    cancel: Message | None = None
    behind: Mapping[str, Message] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Answers:
    """`replies` passed the check. Why the others are not there: `refusals` and `missing`, name -> reason.

    `forbidden`: those of `refusals` whose device's own policy does not allow it; `unaffordable`: those whose privacy
    budget can't pay for it. `behind`: what came for the messages of `Ask.behind`, as it came."""

    replies: Mapping[str, Message]
    refusals: Mapping[str, str]
    missing: Mapping[str, str]
    forbidden: frozenset[str] = frozenset()
    unaffordable: frozenset[str] = frozenset()
    behind: Mapping[str, Message] = field(default_factory=dict)


@dataclass(frozen=True, slots=True, kw_only=True)
class Gather:
    """Wait until all members but `without` are online; after `join_s`, until `quorum` are; at most `deadline_s`."""

    purpose: str
    without: frozenset[str]
    quorum: int
    join_s: float
    deadline_s: float
    others: frozenset[str] = frozenset()  # compute agents that hold no data: `quorum_others` of them, too
    quorum_others: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """Who is there, at once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Present:
    """`boots`: the members online, each with its boot number. `members`: all data agents of the roster. `others`: as
    `boots`, of parties of the roster that are no data agents. `unlike`: why, of those that can't be talked to."""

    boots: Mapping[str, int]
    members: frozenset[str]
    others: Mapping[str, int] = field(default_factory=dict)
    unlike: Mapping[str, str] = field(default_factory=dict)

    def absent(self, name: str) -> str:
        """Why `name`, which is not online, is not."""
        return self.unlike.get(name, "offline")

    @property
    def everybody(self) -> Mapping[str, int]:
        return {**self.boots, **self.others}


@dataclass(frozen=True, slots=True, kw_only=True)
class Meter:
    """How much has gone over the wire since the run (or its resumption) began, how many messages that were told since
    listening began have not arrived yet, and what time it is."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Metered:
    bytes_up: int
    bytes_down: int
    now_s: float
    under_way: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Listen:
    """Keep, in order, what `names` say that answers no question, and when one of them is gone; forget what was kept
    of others. No names: keep nothing."""

    names: frozenset[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tell:
    """Send `message`; an answer, if there is one, is heard by who listens. If it can't be delivered within `expires_s`,
    and its receiver is listened to, that is told as `Gone`."""

    to: str
    message: Message
    expires_s: float = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Sent:
    """`correlation`: that of an answer; empty if the message could not be sent."""

    correlation: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class NextSum:
    """A number for a secure sum. A helper answers one sum of each number, so none comes twice, after a crash either."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Numbered:
    index: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Hear:
    """Wait until somebody who is listened to says something, or is gone; at most `wait_s`. With `wait_s` 0 everybody
    else gets a turn of the loop, and whatever is there comes back. With `delivered` the wait is also over when all that
    was told since listening began has arrived. `purpose`, `missing`: for reports while waiting."""

    purpose: str
    wait_s: float
    missing: tuple[str, ...] = ()
    delivered: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Said:
    """`correlation`: of the message that this answers; empty or of nobody's if it answers none."""

    name: str
    message: Message
    correlation: bytes = b""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gone:
    """`name` went offline for good, came back under a new boot, or does not take what it is told."""

    name: str
    why: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Heard:
    """Everything since the last `Hear`, in order; empty if nothing came."""

    items: tuple[Said | Gone, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling:
    """x = (x - offset) / scale, y = (y - target_offset) / target_scale; empty vectors: x as it is."""

    offset: tuple[float, ...] = ()
    scale: tuple[float, ...] = ()
    target_offset: float = 0.0
    target_scale: float = 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class SharedState:
    """The server's half of a state on shares: masks λ (int64) by name. The other half, m, is with `parties`, who stored
    it as the state after `steps` steps of `session`. `rows`: owners and their row counts, which fix the schedule."""

    session: bytes
    steps: int
    masks: Mapping[str, NDArray[np.int64]]
    parties: tuple[str, ...]
    rows: tuple[tuple[str, int], ...]
    counters: Mapping[str, float] = field(default_factory=dict)  # of the sessions so far, for the summary

    def __repr__(self) -> str:
        return f"SharedState(after {self.steps} steps, hidden)"


@dataclass(frozen=True, slots=True, kw_only=True)
class PrivateState:
    """Of a private run. `optimizer`: the optimizer's state where the server takes the steps. `begun`: how many noised
    releases have begun so far, whatever came of them: what the accountant counts."""

    optimizer: Params = ()
    begun: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Checkpoint:
    """All that the rounds after `record.round` depend on, apart from the job. Seeds derive from job and round."""

    params: Params
    scaling: Scaling
    steps: int
    record: RoundRecord
    shared: SharedState | None = None  # of a run on shares; `params` is then empty unless they opened to the server
    private: PrivateState | None = None  # of a run with differential privacy
    findings: Mapping[str, Any] | None = None  # of a run of mode statistics: plain values for the summary


@dataclass(frozen=True, slots=True, kw_only=True)
class Begin:
    """`releases` of the run have begun, the one that comes next included. A crash can only leave one too many."""

    releases: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Save:
    checkpoint: Checkpoint


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    event: Event


Effect = Ask | Gather | Look | Meter | NextSum | Begin | Save | Report | Listen | Tell | Hear
Result = Answers | Present | Metered | Heard | Sent | Numbered | None


def ask(effect: Ask) -> Generator[Effect, Result, Answers]:
    result = yield effect
    if not isinstance(result, Answers):
        raise LocalError(f"an Ask was answered by {type(result).__name__}")
    return result


def gather(effect: Gather) -> Generator[Effect, Result, Present]:
    result = yield effect
    if not isinstance(result, Present):
        raise LocalError(f"a Gather was answered by {type(result).__name__}")
    return result


def look() -> Generator[Effect, Result, Present]:
    result = yield Look()
    if not isinstance(result, Present):
        raise LocalError(f"a Look was answered by {type(result).__name__}")
    return result


def meter() -> Generator[Effect, Result, Metered]:
    result = yield Meter()
    if not isinstance(result, Metered):
        raise LocalError(f"a Meter was answered by {type(result).__name__}")
    return result


def report(event: Event) -> Generator[Effect, Result, None]:
    yield Report(event=event)


def begin(releases: int) -> Generator[Effect, Result, None]:
    yield Begin(releases=releases)


def save(checkpoint: Checkpoint) -> Generator[Effect, Result, None]:
    yield Save(checkpoint=checkpoint)


def listen(names: frozenset[str]) -> Generator[Effect, Result, None]:
    yield Listen(names=names)


def tell(to: str, message: Message) -> Generator[Effect, Result, bytes]:
    """The correlation that an answer will have; empty if the message could not be sent."""
    result = yield Tell(to=to, message=message)
    return result.correlation if isinstance(result, Sent) else b""


def next_sum() -> Generator[Effect, Result, int]:
    result = yield NextSum()
    if not isinstance(result, Numbered):
        raise LocalError(f"a NextSum was answered by {type(result).__name__}")
    return result.index


def hear(effect: Hear) -> Generator[Effect, Result, tuple[Said | Gone, ...]]:
    result = yield effect
    if not isinstance(result, Heard):
        raise LocalError(f"a Hear was answered by {type(result).__name__}")
    return result.items
