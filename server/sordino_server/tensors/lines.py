"""The user's own line: the innermost frame that is neither PyTorch's nor this package's."""

from __future__ import annotations

import sys
from functools import cache
from pathlib import Path
from types import FrameType

import torch

from sordino_server.trace.origins import UNKNOWN, Origin

_NOT_THE_USERS = (str(Path(torch.__file__).parent), str(Path(__file__).parent), "<")


@cache
def _is_users(filename: str) -> bool:
    return not filename.startswith(_NOT_THE_USERS)


def user_line() -> Origin:
    """Where the user's program stands now. In a backward pass: the line that called `backward`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        if _is_users(frame.f_code.co_filename):
            return Origin(file=frame.f_code.co_filename, line=frame.f_lineno)
        frame = frame.f_back
    return UNKNOWN
