"""What an agent may read of a session: m from every party, the masks from the dealer, x = m - λ.

Every party's copy must be there and agree: one that lies is named by it, and nothing is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import numpy.typing as npt

from sordino_common.spdz.errors import EquivocationError, ProtocolError

I64 = npt.NDArray[np.int64]
Named = Mapping[str, I64]


_Key = tuple[int, tuple[str, ...]]  # step, names


class Reader:
    """Outputs that open to this agent, step by step. `most` steps may be incomplete at a time."""

    def __init__(self, parties: tuple[str, ...], *, most: int) -> None:
        self._parties = parties
        self._most = most
        self._copies: dict[_Key, dict[str, Named]] = {}
        self._masks: dict[_Key, Named] = {}
        self._read: set[_Key] = set()

    def on_copy(self, party: str, step: int, masked: Named) -> Named | None:
        """A party's m of `step`. The values, once everything is there."""
        key = (step, tuple(masked))
        if key in self._read:
            return None
        copies = self._copies.setdefault(key, {})
        if party in copies and not _equal(copies[party], masked):
            raise ProtocolError(f"{party} sent two different outputs of step {step}")
        copies[party] = masked
        return self._try(key)

    def on_masks(self, step: int, masks: Named) -> Named | None:
        """The dealer's masks of `step`. The values, once everything is there."""
        key = (step, tuple(masks))
        if key in self._read:
            return None
        if key in self._masks and not _equal(self._masks[key], masks):
            raise ProtocolError(f"the dealer sent two different masks of the outputs of step {step}")
        self._masks[key] = masks
        return self._try(key)

    def _try(self, key: _Key) -> Named | None:
        step, _ = key
        if len(self._copies) > self._most or len(self._masks) > self._most:
            raise ProtocolError(f"outputs of more than {self._most} steps wait for their other halves")
        copies, masks = self._copies.get(key, {}), self._masks.get(key)
        if masks is None or len(copies) < len(self._parties):
            return None
        first = copies[self._parties[0]]
        for party in self._parties[1:]:
            if not _equal(copies[party], first):
                raise EquivocationError(f"{party} and {self._parties[0]} tell different outputs of step {step}")
        if {name: value.shape for name, value in first.items()} != {name: v.shape for name, v in masks.items()}:
            raise ProtocolError(f"the masks of step {step} are not those of the outputs that the parties sent")
        del self._copies[key], self._masks[key]
        self._read.add(key)
        return {name: np.subtract(value, masks[name]) for name, value in first.items()}


def _equal(a: Named, b: Named) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)
