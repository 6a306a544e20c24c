"""Run a PyTorch function once on fake tensors and keep what it did as a graph of core aten operations.

Nothing is computed (`FakeTensor` carries dtype and shape only), so a trace costs milliseconds whatever the model's
size, and a value that the program would have to know - a branch on a tensor, `.item()` - can't be known: it is refused,
with its line.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.func import functionalize
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx

from sordino_common.errors import PlanError, SordinoError
from sordino_server.trace.origins import ModulePaths, Origin, origin_of_traceback, recorded_origins

Function = Callable[..., Sequence[Tensor]]

_ATEN = torch.ops.aten
# Core aten keeps these whole; the op table has their parts.
_TAKEN_APART: Final = (
    _ATEN.native_layer_norm,
    _ATEN.native_group_norm,
    _ATEN.native_group_norm_backward,
    _ATEN._native_batch_norm_legit_no_training,
    _ATEN._native_batch_norm_legit,
    _ATEN.native_batch_norm,
    _ATEN.elu_backward,
    _ATEN.leaky_relu_backward,
    _ATEN.hardtanh_backward,
    _ATEN.embedding_dense_backward,
    _ATEN.index_select,
)


@cache
def decompositions() -> dict[Any, Any]:
    """PyTorch's own table for core aten, and its decompositions of what the op table has only in parts."""
    return {**core_aten_decompositions(), **get_decompositions(_TAKEN_APART)}


def capture(
    fn: Function,
    examples: Sequence[Tensor],
    *,
    modules: ModulePaths,
    name: str,
    origin: Callable[[], Origin] | None = None,
) -> GraphModule:
    """The graph of `fn(*examples)`: placeholders, core aten operations without side effects, and a list of results.

    `origin` says what line an operation comes from, if that is not to be read from the stack. Raises `PlanError` with
    the user's line for what has no static graph.
    """

    def recorded(*tensors: Tensor) -> list[Tensor]:
        with recorded_origins(modules, origin):
            return list(fn(*tensors))

    try:
        with warnings.catch_warnings():
            # PyTorch warns of `.item()` on a tensor that needs a gradient; the refusal that follows says more.
            warnings.simplefilter("ignore")
            return make_fx(
                functionalize(recorded),
                decomposition_table=decompositions(),
                tracing_mode="fake",
                # Buffers and tensors that the model makes from Python numbers are real; they become constants.
                _allow_non_fake_inputs=True,
            )(*examples)
    except SordinoError:
        raise
    except Exception as error:  # whatever the user's model raises is reported at its line
        place = origin_of_traceback(error.__traceback__, modules) if origin is None else origin()
        raise PlanError(f"{name}: {explain(error, place, modules)}") from error


_DATA_DEPENDENT: Final = (
    "data-dependent",
    "data dependent",
    "calling .item()",
    "dynamic shape",
    "unallocated storage",
    "Cannot access data pointer",
    "Can't call numpy()",
)
_CAPTURED: Final = (
    "would mutate a captured Tensor",
    "in-place arithmetic operations, over a Tensor that is not being vmapped",
)
_IN_PLACE: Final = "vmap: aten::"


def explain(error: Exception, origin: Origin, modules: ModulePaths) -> str:
    """What went wrong where, and what to do, for an exception that came out of a trace."""
    text = str(error)
    if any(phrase in text for phrase in _DATA_DEPENDENT) or "DataDependent" in type(error).__name__:
        return (
            f"{origin}: the program depends on the values of a tensor (a branch, .item(), .numpy(), indexing by a "
            f"mask), but a "
            f"Plan is the same list of operations for every input; write it with torch.where, torch.clamp, sums or "
            f"products"
        )
    if any(phrase in text for phrase in _CAPTURED) or text.startswith(_IN_PLACE):
        return changed_buffer(origin)
    first = text.strip().splitlines()[0] if text.strip() else "no text"
    return f"{origin}: the model can't be traced: {type(error).__name__}: {first}"


def changed_buffer(origin: Origin) -> str:
    """The refusal of a model that writes into its own buffers."""
    remedy = (
        "use nn.GroupNorm or nn.LayerNorm, or freeze its statistics with eval()"
        if "Norm" in origin.kind
        else "compute with values that are passed in and returned"
    )
    what = "the model changes a buffer (or another tensor of its own) in place, and a Plan has no such memory"
    return f"{origin}: {what}; {remedy}"


def buffers_of(model: nn.Module) -> dict[str, Tensor]:
    """Copies of the model's buffers, so that a trace can never write into the user's model."""
    with torch.no_grad():
        return {path: buffer.detach().clone() for path, buffer in model.named_buffers()}
