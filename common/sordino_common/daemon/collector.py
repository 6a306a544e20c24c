"""Python's cycle collector, kept away from what is there for good.

Whatever was imported stays until the process ends; with PyTorch that is a few hundred thousand objects, and each full
collection walks over all of them, 100 ms and more in which nothing is sent. `gc.freeze` sets them aside (they are still
freed when nothing refers to them; only cycles among them stay). For processes whose first objects are their last ones:
not for the simulator, whose agents come and go.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def old_set_aside() -> Iterator[None]:
    """What is there now is not looked at inside; afterwards it is again. No news if somebody else has set it aside."""
    if gc.get_freeze_count():
        yield
        return
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
