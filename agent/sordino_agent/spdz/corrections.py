"""The dealer's corrections of one session, put together from their parts; bounded by what was agreed, whatever comes.

Of each step of the window there is one correction under the current attempt, and perhaps one under the next: a dealer
hears of a restart before the parties may. What is of an older attempt or of a confirmed step is late.
"""

from __future__ import annotations

from typing import Final

from sordino_common.messages import SpdzCorrection
from sordino_common.messages.spdz import CORRECTION_PART_BYTES
from sordino_common.spdz.errors import CorrectionError


class Corrections:
    """Of a session that begins at step `first`, deals `ahead` steps ahead, and takes `nbytes` for a step."""

    def __init__(self, *, first: int, ahead: int, nbytes: int) -> None:
        self._confirmed = first
        self._ahead: Final = ahead
        self._parts_each: Final = max(1, -(-nbytes // CORRECTION_PART_BYTES))
        self._attempt = 0
        self._parts: dict[tuple[int, int], dict[int, bytes]] = {}
        self._whole: set[tuple[int, int]] = set()

    def take(self, message: SpdzCorrection) -> bytes | None:
        """The correction, if this was its last part. Raises `CorrectionError` on what no honest dealer sends."""
        step, attempt = at = message.step, message.attempt
        if step >= self._confirmed + 2 * self._ahead:
            raise CorrectionError(
                f"a correction of step {step}, with {self._confirmed} steps confirmed and {self._ahead} agreed to be "
                "dealt ahead"
            )
        if attempt > self._attempt + 1:
            raise CorrectionError(
                f"a correction of step {step} under attempt {attempt}, this session is at attempt {self._attempt}"
            )
        if message.parts != self._parts_each:
            raise CorrectionError(
                f"a correction of step {step} in {message.parts} parts, the circuit's has {self._parts_each}"
            )
        if step < self._confirmed or attempt < self._attempt:
            return None
        if at in self._whole:
            raise CorrectionError(f"the correction of step {step} attempt {attempt} came twice")
        parts = self._parts.setdefault(at, {})
        if parts.setdefault(message.part, message.data) != message.data:
            raise CorrectionError(f"two different parts {message.part} of the correction of step {step}")
        if len(parts) < message.parts:
            return None
        del self._parts[at]
        self._whole.add(at)
        return b"".join(parts[k] for k in range(message.parts)) if message.parts > 1 else message.data

    def confirm(self, step: int) -> None:
        """Steps before `step` are over."""
        if step > self._confirmed:
            self._confirmed = step
            self._forget()

    def restart(self, attempt: int) -> None:
        """Everything runs under `attempt` from now on."""
        self._attempt = attempt
        self._forget()

    def clear(self) -> None:
        self._parts.clear()
        self._whole.clear()

    def _forget(self) -> None:
        """What is late."""
        self._parts = {at: parts for at, parts in self._parts.items() if self._is_due(at)}
        self._whole = {at for at in self._whole if self._is_due(at)}

    def _is_due(self, at: tuple[int, int]) -> bool:
        return at[0] >= self._confirmed and at[1] >= self._attempt
