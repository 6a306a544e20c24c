"""What the agent needs of an `Endpoint` (`sordino_common.transport.endpoint`)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from sordino_common import messages as m


class Sender(Protocol):
    """Sends messages to members of the fleet."""

    def send(
        self,
        to: str,
        message: m.Message,
        *,
        correlation: bytes | None = None,
        context: bytes = b"",
        expires_s: float | None = None,
        on_outcome: Callable[[bool, str], None] | None = None,
    ) -> bytes: ...

    def end_context(self, peer: str, context: bytes) -> None: ...
