"""Which line of the user's model an operation comes from.

While `make_fx` records a graph, `recorded_origins` notes for each new node the innermost Python frame that belongs
neither to PyTorch nor to this package, and the innermost `nn.Module` whose method is on the stack. A node that autograd
creates has no such frame: it takes the origin of the forward operation whose autograd node is being evaluated. Autograd
numbers its nodes in the order in which the forward operations made them, and that number ties the two together.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from sordino_common.errors import LocalError

META = "sordino_origin"  # key in an fx node's `meta`
_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parent)
# Frames of this file, and of the polynomials that stand in for the model's activations, are nobody's line.
_HERE = (__file__, str(Path(__file__).with_name("activations.py")))


@dataclass(frozen=True, slots=True, kw_only=True)
class Origin:
    """`file:line` of the operation, and the path and class of the module that was running ("" if none)."""

    file: str
    line: int
    module: str = ""
    kind: str = ""

    def __str__(self) -> str:
        place = f"{self.file}:{self.line}"
        where = f"module {self.module!r}" if self.module else "the model itself"
        return f"{place} ({where}, {self.kind})" if self.kind else place


UNKNOWN = Origin(file="<unknown>", line=0)


class ModulePaths:
    """Module object -> its path inside the model (`""` is the model itself)."""

    def __init__(self, model: nn.Module | None) -> None:
        # The modules are held, not only their ids: an id may be given again once its object is gone.
        self._paths: Mapping[nn.Module, str] = (
            {} if model is None else {module: path for path, module in model.named_modules()}
        )

    def of(self, frame: FrameType) -> tuple[str, nn.Module] | None:
        """The module of the model whose method `frame` runs, if it runs one."""
        code = frame.f_code
        if not code.co_argcount or code.co_varnames[0] != "self" or not self._paths:
            return None
        owner = frame.f_locals.get("self")
        if isinstance(owner, nn.Module) and owner in self._paths:
            return self._paths[owner], owner
        return None


def _is_ours(filename: str) -> bool:
    return filename.startswith(_PACKAGE)


def _from_frames(frames: Iterator[tuple[FrameType, int]], modules: ModulePaths) -> Origin | None:
    """The origin that a stack, innermost frame first, tells. None if it runs through PyTorch only.

    The first frame outside PyTorch is the user's line, or ours: then (the loss, the optimizer, or a model made of
    PyTorch's own modules) the line of PyTorch's module is the nearest that there is to a line of the model.
    """
    place: tuple[str, int] | None = None
    inside: tuple[str, nn.Module] | None = None
    nearest: tuple[str, int] | None = None  # the line in PyTorch's own module
    for frame, line in frames:
        filename = frame.f_code.co_filename
        if filename in _HERE:
            continue
        if inside is None:
            inside = modules.of(frame)
            if inside is not None and place is None:
                nearest = (filename, line)
        if place is None and not filename.startswith((_TORCH, "<")):
            place = (filename, line)
        if place is not None and (inside is not None or _is_ours(filename)):
            break
    if place is None or (nearest is not None and _is_ours(place[0])):
        place = nearest
    if place is None:
        return None
    if inside is None:
        return Origin(file=place[0], line=place[1])
    path, module = inside
    return Origin(file=place[0], line=place[1], module=path, kind=type(module).__name__)


def _stack(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def origin_of_traceback(traceback: TracebackType | None, modules: ModulePaths) -> Origin:
    """The user's line at which an exception was raised."""
    frames: list[tuple[FrameType, int]] = []
    while traceback is not None:
        frames.append((traceback.tb_frame, traceback.tb_lineno))
        traceback = traceback.tb_next
    return _from_frames(iter(reversed(frames)), modules) or UNKNOWN


# PyTorch's own tracers use this name; it is not part of its public interface, nor of its stubs.
_sequence_number: Callable[[], int] = getattr(torch.autograd, "_get_sequence_nr")  # noqa: B009  see above


@contextmanager
def recorded_origins(modules: ModulePaths, origin: Callable[[], Origin] | None = None) -> Iterator[None]:
    """While it is open, every node that `make_fx` records gets `meta[META]`. Enter it inside the traced function.

    `origin`: says where a node comes from, if that is not to be read from the stack."""
    mode = get_proxy_mode()
    if mode is None:
        raise LocalError("recorded_origins: no make_fx trace is under way here")
    graph: Any = mode.tracer.graph
    create: Callable[..., Any] = graph.create_node
    of_sequence: dict[int, Origin] = {}

    def create_node(*args: Any, **kwargs: Any) -> Any:
        node = create(*args, **kwargs)
        if origin is not None:
            node.meta[META] = origin()
            return node
        evaluated: Any = torch._C._current_autograd_node()  # None outside a backward pass, whatever its stub says
        if evaluated is None:
            here = _from_frames(_stack(sys._getframe()), modules) or UNKNOWN
            # An operation's autograd node is made just before the operation reaches the tracer. Operations that have
            # none (what follows the forward pass) see the number of the last one that had: the first to see it owns it.
            of_sequence.setdefault(_sequence_number() - 1, here)
        else:
            sequence = evaluated._sequence_nr()
            here = of_sequence.get(sequence) or _from_frames(_stack(sys._getframe()), modules) or UNKNOWN
        node.meta[META] = here
        return node

    graph.create_node = create_node
    try:
        yield
    finally:
        del graph.create_node
