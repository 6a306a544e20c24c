"""The user's own line: the innermost frame that is neither PyTorch's nor this package's.

It is noted at every operation and seldom read, so a place in the code is found again by identity, and its line number
is worked out when somebody asks.
"""

from __future__ import annotations

import sys
from functools import cached_property
from pathlib import Path
from types import CodeType, FrameType
from typing import Final

import torch

from sordino_server.trace.origins import UNKNOWN, Origin

_HERE: Final = Path(__file__).parent
_NOT_THE_USERS: Final = (str(Path(torch.__file__).parent), str(_HERE), str(_HERE.parent / "trace"), "<")
# Code without a file is somebody's machinery (dataclasses, fx, importlib), but for what is typed at a prompt.
_PROMPTS: Final = ("<stdin>", "<python-input", "<ipython-input")


# File name -> whether it is the user's.
_USERS: Final[dict[str, bool]] = {}


def _is_users(filename: str) -> bool:
    found = filename.startswith(_PROMPTS) or not filename.startswith(_NOT_THE_USERS)
    _USERS[filename] = found
    return found


class Line:
    """A place in the user's code: an instruction of a code object. There is one object for each place."""

    def __init__(self, code: CodeType | None, instruction: int) -> None:
        self._code, self._instruction = code, instruction

    @cached_property
    def origin(self) -> Origin:
        code = self._code
        if code is None:
            return UNKNOWN
        for start, end, line in code.co_lines():
            if start <= self._instruction < end and line is not None:
                return Origin(file=code.co_filename, line=line)
        return Origin(file=code.co_filename, line=code.co_firstlineno)

    @cached_property
    def text(self) -> str:
        return str(self.origin)

    def __str__(self) -> str:
        return self.text


NOWHERE: Final = Line(None, 0)
# A line holds its code object, so an id in here is never given again.
_LINES: Final[dict[tuple[int, int], Line]] = {}


def user_line() -> Line:
    """Where the user's program stands now. In a backward pass: the line that called `backward`."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        code = frame.f_code
        try:
            users = _USERS[code.co_filename]
        except KeyError:
            users = _is_users(code.co_filename)
        if users:
            key = (id(code), frame.f_lasti)
            line = _LINES.get(key)
            if line is None:
                line = _LINES[key] = Line(code, frame.f_lasti)
            return line
        frame = frame.f_back
    return NOWHERE
