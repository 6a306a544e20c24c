"""What a chain refuses, and what an agent reports. All are raised at the user's own line, and name it where it was
another one: steps are recorded at one line and sent at a later one."""

from __future__ import annotations

from sordino_common.errors import FleetUnavailable, RemoteError, SordinoError


class HiddenValue(SordinoError):
    """A program asks for the value of a tensor that is not here: `bool`, `item`, `tolist`, `numpy`, a format."""

    exit_code = 2
    code = "hidden-value"


class UnsupportedOperation(SordinoError):
    """An operation that has no meaning on this link of a chain."""

    exit_code = 2
    code = "unsupported-operation"


class WrongPlace(SordinoError):
    """The operands of one operation are in different places."""

    exit_code = 2
    code = "wrong-place"


class RemoteFailure(RemoteError):
    """An agent refused a command or failed at it. `agent`, `reason` (its words), `lines` (the user's)."""

    code = "remote-failure"

    def __init__(self, text: str, *, agent: str, reason: str, lines: tuple[str, ...] = ()) -> None:
        super().__init__(text)
        self.agent, self.reason, self.lines = agent, reason, lines


class AgentAway(FleetUnavailable):
    """An agent gave no answer. What was recorded for it is kept, and goes with the next attempt."""

    code = "agent-away"


class SharesLost(RemoteError):
    """What a committee kept is of no use any more: a member cheated, or a value left the range that was stated."""

    code = "shares-lost"
