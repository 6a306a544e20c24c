"""Small Plans for tests: one op over drawn operands, and a case generator for every op of the table."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from hypothesis import strategies as st

from sordino_common.messages.array import Array
from sordino_common.plan.arrays import NdArray, from_numpy
from sordino_common.plan.ops import infer_outs
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Node, Output, Plan, Ref

FLOATS = ("float32", "float64")
NUMBERS = (*FLOATS, "int64", "int32", "uint8")
ALL = (*NUMBERS, "bool")


def spec_of(array: NdArray) -> TensorSpec:
    return TensorSpec(array.dtype.name, array.shape)


def one_op(op: str, *args: Any) -> tuple[Plan, list[NdArray]]:
    """A Plan of the one node `op(*args)`; ndarrays among the arguments (also in lists) become its inputs."""
    arrays: list[NdArray] = []

    def lift(arg: Any) -> Any:
        if isinstance(arg, np.ndarray):
            arrays.append(arg)
            return Ref(len(arrays) - 1)
        return tuple(lift(item) for item in arg) if isinstance(arg, list | tuple) else arg

    lifted = tuple(lift(arg) for arg in args)
    specs = [spec_of(array) for array in arrays]
    outs = infer_outs(op, lifted, specs)
    plan = Plan(
        name=op,
        inputs=tuple(Input(f"in{number}", "value", spec) for number, spec in enumerate(specs)),
        constants=(),
        nodes=(Node(op, lifted, outs),),
        outputs=tuple(Output(f"out{number}", "value", len(specs) + number) for number in range(len(outs))),
    )
    return plan, arrays


class Gen:
    """Draws shapes by Hypothesis and fills arrays from a generator that Hypothesis seeds: small examples shrink, and
    values stay in a range where float32 rounding is benign."""

    def __init__(self, data: st.DataObject) -> None:
        self.data = data
        self.rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))

    def pick(self, *choices: Any) -> Any:
        return self.data.draw(st.sampled_from(choices))

    def int(self, low: int, high: int) -> int:
        return self.data.draw(st.integers(low, high))

    def shape(self, low: int = 0, high: int = 4, least: int = 0) -> tuple[int, ...]:
        return tuple(self.data.draw(st.lists(st.integers(least, 5), min_size=low, max_size=high)))

    def permutation(self, count: int) -> tuple[int, ...]:
        return tuple(self.data.draw(st.permutations(range(count))))

    def array(self, shape: tuple[int, ...], dtype: str = "float32", scale: float = 2.0) -> NdArray:
        """Normal numbers with ties and zeros among them; sometimes not contiguous."""
        if dtype == "bool":
            return np.asarray(self.rng.random(shape) < 0.5)
        values = self.rng.standard_normal(shape) * scale
        values = np.where(self.rng.random(shape) < 0.2, np.round(values), values)
        if dtype not in FLOATS:
            values = np.round(values * 2) + (20 if dtype == "uint8" else 0)
        result = np.asarray(values).astype(dtype)
        return np.array(result, order="F") if self.rng.random() < 0.3 else result

    def positive(self, shape: tuple[int, ...], dtype: str = "float32") -> NdArray:
        return np.asarray(np.abs(self.array(shape, "float64")) + 0.05, dtype)

    def pair(self, dtypes: tuple[str, ...] = ALL) -> tuple[Any, Any]:
        """Two operands: broadcastable tensors of any dtypes, or a tensor and a scalar in either order."""
        dtype = self.pick(*dtypes)
        shape = self.shape(0, 3)
        x = self.array(shape, dtype)
        kind = self.pick("tensor", "tensor", "scalar", "rank 0")
        if kind == "rank 0":
            y: Any = self.array((), self.pick(*dtypes))
        elif kind == "tensor":
            cut = self.int(0, len(shape))
            other = tuple(1 if self.pick(True, False, False) else size for size in shape[cut:])
            y = self.array(other, self.pick(*dtypes))
        else:
            y = self.pick(1, 2, 3) if dtype not in FLOATS or self.pick(True, False) else self.pick(0.5, -1.25, 3.0)
        return (x, y) if self.pick(True, True, False) else (y, x)

    def dims(self, rank: int, least: int = 0) -> tuple[int, ...]:
        if rank == 0:
            return ()
        order = self.permutation(rank)
        chosen = order[: self.int(min(least, rank), rank)]
        return tuple(dim - rank if self.pick(True, False) else dim for dim in chosen)

    def indices(self, shape: tuple[int, ...], size: int, *, negative: bool = False) -> NdArray:
        return np.asarray(self.rng.integers(-size if negative else 0, max(size, 1), shape), np.int64)


class Dice(Gen):
    """The same draws from a generator alone: nothing shrinks, and thousands of draws cost no more than their runs."""

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def pick(self, *choices: Any) -> Any:
        return choices[self.int(0, len(choices) - 1)]

    def int(self, low: int, high: int) -> int:
        return int(self.rng.integers(low, high + 1))

    def shape(self, low: int = 0, high: int = 4, least: int = 0) -> tuple[int, ...]:
        return tuple(self.int(least, 5) for _ in range(self.int(low, high)))

    def permutation(self, count: int) -> tuple[int, ...]:
        return tuple(int(place) for place in self.rng.permutation(count))


Case = Callable[[Gen], tuple[Any, ...]]


def _pair(*dtypes: str) -> Case:
    return lambda gen: gen.pair(dtypes or ALL)


def _scaled(*dtypes: str) -> Case:
    return lambda gen: (*gen.pair(dtypes), gen.pick(1, 1, 2, 3))


def _unary(*dtypes: str) -> Case:
    return lambda gen: (gen.array(gen.shape(), gen.pick(*dtypes)),)


def _positive(gen: Gen) -> tuple[Any, ...]:
    return (gen.positive(gen.shape(), gen.pick(*FLOATS)),)


def _pow(gen: Gen) -> tuple[Any, ...]:
    kind = gen.int(0, 3)
    if kind == 0:
        return gen.array(gen.shape(), gen.pick(*FLOATS)), gen.pick(2, 2.0, 3, 3.0, 1, 0)
    if kind == 1:
        return gen.positive(gen.shape(), "float32"), gen.pick(0.5, -1, -1.0, 1.7)
    if kind == 2:
        return gen.pick(0.9, 2, 2.5), gen.array(gen.shape(), "float32")
    return gen.array(gen.shape(), "int64"), gen.pick(0, 1, 2, 3)


def _where(gen: Gen) -> tuple[Any, ...]:
    x, y = gen.pair()
    if gen.int(0, 5) == 0:
        x, y = gen.pick((1.0, 0.0), (1, 0), (2, 0.5))
    shape = np.broadcast_shapes(np.shape(x), np.shape(y))
    return gen.array(shape[gen.int(0, len(shape)) :], "bool"), x, y


def _clamp(gen: Gen) -> tuple[Any, ...]:
    return gen.array(gen.shape(), gen.pick(*NUMBERS)), *gen.pick((0, None), (None, 1), (0, 2), (0.5, 1.5), (3, 1))


def _reduce(*dtypes: str, empty: bool = True) -> Case:
    def case(gen: Gen) -> tuple[Any, ...]:
        shape = gen.shape(least=0 if empty else 1)
        return gen.array(shape, gen.pick(*dtypes)), gen.dims(len(shape)), gen.pick(True, False)

    return case


def _var(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(least=2)
    return gen.array(shape), gen.dims(len(shape)), gen.pick(0, 1) if shape else 0, gen.pick(True, False)


def _norm(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(least=1)
    return gen.array(shape), gen.pick(1, 2, 2.0, float("inf")), gen.dims(len(shape)), gen.pick(True, False)


def _arg(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(least=1)
    x = gen.rng.permutation(int(np.prod(shape))).reshape(shape).astype(gen.pick("float32", "int64"))  # no ties
    return x, gen.pick(None, gen.int(-max(len(shape), 1), max(len(shape), 1) - 1)), gen.pick(True, False)


def _mm(gen: Gen) -> tuple[Any, ...]:
    n, k, m = gen.shape(3, 3)
    dtype = gen.pick("float32", "float32", "float64", "int64")
    return gen.array((n, k), dtype), gen.array((k, m), dtype)


def _addmm(gen: Gen) -> tuple[Any, ...]:
    x, y = _mm(gen)
    n, m = x.shape[0], y.shape[1]
    bias = gen.array(gen.pick((m,), (1, m), (n, 1), (n, m), ()), x.dtype.name)
    return bias, x, y, *gen.pick((1, 1), (1, 1), (0, 1), (2, 3))


def _bmm(gen: Gen) -> tuple[Any, ...]:
    b, n, k, m = gen.shape(4, 4)
    return gen.array((b, n, k)), gen.array((b, k, m))


def _view(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape()
    size = [*shape, 1]
    gen.rng.shuffle(size)
    return gen.array(shape), gen.pick(tuple(size), (int(np.prod(shape)),))


def _permute(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape()
    return gen.array(shape, gen.pick(*ALL)), gen.permutation(len(shape))


def _expand(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(0, 3)
    x = gen.array(tuple(1 if gen.pick(True, False) else size for size in shape), gen.pick(*ALL))
    return x, (*gen.shape(0, 2), *(have if have != 1 else size for have, size in zip(x.shape, shape, strict=True)))


def _cut(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(1)
    ends = (None, -7, -2, 0, 1, 3, 9)
    return (
        gen.array(shape),
        gen.int(-len(shape), len(shape) - 1),
        gen.pick(*ends),
        gen.pick(*ends),
        gen.pick(1, 1, 2, 3),
    )


def _select(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(1, least=1)
    dim = gen.int(-len(shape), len(shape) - 1)
    return gen.array(shape), dim, gen.int(-shape[dim], shape[dim] - 1)


def _cat(gen: Gen) -> tuple[Any, ...]:
    shape = list(gen.shape(1, 3))
    dim = gen.int(-len(shape), len(shape) - 1)
    parts = []
    for _ in range(gen.int(1, 4)):
        shape[dim] = gen.int(0, 3)
        # torch's old rule lets [0] be cat with anything; a one-dimensional empty part is the same for both.
        parts.append(gen.array(tuple(shape), gen.pick("float32", "float32", "int64", "bool")))
    return parts, dim


def _pad(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape()
    return gen.array(shape), [gen.int(0, 2) for _ in range(2 * gen.int(0, len(shape)))], gen.pick(0, 1.5, -1)


def _flip(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape()
    return gen.array(shape), gen.dims(len(shape))


def _repeat(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(0, 3)
    return gen.array(shape), [gen.int(0, 3) for _ in range(len(shape) + gen.int(0, 1))]


def _slice_scatter(gen: Gen) -> tuple[Any, ...]:
    x, dim, start, end, step = _cut(gen)
    view: list[Any] = [slice(None)] * x.ndim
    first, last, _ = slice(start, end).indices(x.shape[dim])
    view[dim] = slice(first, max(first, last), step)
    return x, gen.array(x[tuple(view)].shape), dim, start, end, step


def _select_scatter(gen: Gen) -> tuple[Any, ...]:
    x, dim, index = _select(gen)
    return x, gen.array((*x.shape[: dim % x.ndim], *x.shape[dim % x.ndim + 1 :])), dim, index


def _softmax(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape()
    return gen.array(shape, gen.pick(*FLOATS), 5.0), gen.int(-max(len(shape), 1), max(len(shape), 1) - 1)


def _gather(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(0, 3, least=1)
    dim = gen.int(-max(len(shape), 1), max(len(shape), 1) - 1)
    part = [gen.int(0, size) for size in shape]
    if part:
        part[dim] = gen.int(0, 4)
    return gen.array(shape), dim, gen.indices(tuple(part), shape[dim] if shape else 1)


def _scatter(gen: Gen) -> tuple[Any, ...]:
    """Every place at most once: torch leaves the order of writes open."""
    x, dim, index = _gather(gen)
    if x.ndim:
        part = list(index.shape)
        part[dim] = gen.int(0, x.shape[dim])
        order = np.argsort(
            gen.rng.random([*part[:dim], x.shape[dim], *(part[dim + 1 :] if dim != -1 else [])]), axis=dim
        )
        index = np.take(order, np.arange(part[dim]), axis=dim).astype(np.int64)
    return (
        x,
        dim,
        index,
        gen.array(tuple(size + gen.int(0, 1) for size in index.shape)) if gen.pick(True, False) else 2.5,
    )


def _scatter_add(gen: Gen) -> tuple[Any, ...]:
    x, dim, index = _gather(gen)
    return x, dim, index, gen.array(tuple(size + gen.int(0, 1) for size in index.shape))


def _index(gen: Gen) -> tuple[Any, ...]:
    shape = gen.shape(1, 4, least=1)
    common = gen.shape(0, 2)
    count = gen.int(1, len(shape))
    used = [gen.pick(True, False) for _ in range(count)]
    used[gen.int(0, count - 1)] = True
    index: list[Any] = [None] * count
    for place in range(count):
        if used[place]:
            cut = common[gen.int(0, len(common)) :]
            index[place] = gen.indices(cut, shape[place], negative=True)
    return gen.array(shape), index


def _index_put(gen: Gen) -> tuple[Any, ...]:
    x, index = _index(gen)
    places = x[tuple(slice(None) if entry is None else entry for entry in index)].shape
    shape = gen.pick(places, places[gen.int(0, len(places)) :], ())
    return x, index, gen.array(shape) if gen.pick(True, False) else np.ones(shape, np.float32), True


def _embedding(gen: Gen) -> tuple[Any, ...]:
    weight = gen.array((gen.int(1, 6), gen.int(0, 4)))
    return weight, gen.indices(gen.shape(0, 3), weight.shape[0])


def _convolution(gen: Gen) -> tuple[Any, ...]:
    one = gen.pick(True, False, False)
    groups = gen.pick(1, 1, 2, 3)
    inner, outer = gen.int(1, 3), gen.int(1, 3)
    kernel = [gen.int(1, 3) for _ in range(1 if one else 2)]
    dilation = [gen.pick(1, 1, 2) for _ in kernel]
    padding = [gen.int(0, 2) for _ in kernel]
    image = [d * (k - 1) + 1 + gen.int(0, 5) for k, d in zip(kernel, dilation, strict=True)]
    x = gen.array((gen.int(0, 4), inner * groups, *image))
    weight = gen.array((outer * groups, inner, *kernel))
    bias = gen.pick(None, gen.array((outer * groups,)))
    stride = [gen.int(1, 3) for _ in kernel]
    return x, weight, bias, stride, padding, dilation, False, [0] * len(kernel), groups


def _convolution_backward(gen: Gen) -> tuple[Any, ...]:
    x, weight, _, *rest = _convolution(gen)
    plan, _ = one_op("convolution", x, weight, None, *rest)
    mask = gen.pick([True, True, True], [False, True, False], [True, False, False], [False, True, True])
    return gen.array(plan.nodes[0].outs[0].shape), x, weight, [weight.shape[0]], *rest, mask


def _pool_geometry(gen: Gen) -> tuple[NdArray, list[int], list[int], list[int]]:
    kernel = [gen.int(1, 3), gen.int(1, 3)]
    padding = [gen.int(0, size // 2) for size in kernel]
    lead = gen.pick((), (gen.int(0, 3),))
    x = gen.array((*lead, gen.int(1, 3), gen.int(kernel[0], 8), gen.int(kernel[1], 8)))
    return x, kernel, gen.pick([gen.int(1, 3), gen.int(1, 3)], [2], []), padding


def _max_pool(gen: Gen) -> tuple[Any, ...]:
    x, kernel, stride, padding = _pool_geometry(gen)
    dilation = [2, 1] if x.shape[-2] + 2 * padding[0] >= 2 * kernel[0] - 1 and gen.pick(True, False) else [1, 1]
    return x, kernel, stride, padding, dilation, gen.pick(True, False)


def _max_pool_backward(gen: Gen) -> tuple[Any, ...]:
    x, *rest = _max_pool(gen)
    plan, _ = one_op("max_pool2d_with_indices", x, *rest)
    shape = plan.nodes[0].outs[0].shape
    return gen.array(shape), x, *rest, gen.indices(shape, x.shape[-1] * x.shape[-2])


def _avg_pool(gen: Gen) -> tuple[Any, ...]:
    x, kernel, stride, padding = _pool_geometry(gen)
    return x, kernel, stride, padding, gen.pick(True, False), gen.pick(True, False), gen.pick(None, None, 3)


def _avg_pool_backward(gen: Gen) -> tuple[Any, ...]:
    x, *rest = _avg_pool(gen)
    plan, _ = one_op("avg_pool2d", x, *rest)
    return gen.array(plan.nodes[0].outs[0].shape), x, *rest


def _adaptive(gen: Gen) -> tuple[Any, ...]:
    return gen.array((*gen.shape(0, 1), *gen.shape(3, 3, least=1))), [gen.int(1, 6), gen.int(1, 6)]


def _adaptive_backward(gen: Gen) -> tuple[Any, ...]:
    x, size = _adaptive(gen)
    return gen.array((*x.shape[:-2], *size)), x


def _full(gen: Gen) -> tuple[Any, ...]:
    return gen.shape(), *gen.pick((1, "float32"), (0.5, "float64"), (7, "int64"), (True, "bool"), (-1.0, "float32"))


def _arange(gen: Gen) -> tuple[Any, ...]:
    if gen.pick(True, False):
        return gen.int(-5, 5), gen.int(5, 9), gen.pick(1, 2, 3), gen.pick("int64", "float32")
    return gen.pick(0.5, -1.0), gen.pick(2.0, 3.3), gen.pick(0.25, 0.7, 1), "float32"


CASES: dict[str, Case] = {
    "add": _scaled(*NUMBERS),
    "sub": _scaled(*NUMBERS),
    "mul": _pair(),
    "div": _pair(),
    "pow": _pow,
    "maximum": _pair(),
    "minimum": _pair(),
    "eq": _pair(),
    "ne": _pair(),
    "lt": _pair(),
    "le": _pair(),
    "gt": _pair(),
    "ge": _pair(),
    "logical_and": _pair(),
    "logical_or": _pair(),
    "bitwise_and": _pair("bool", "int64", "uint8"),
    "bitwise_or": _pair("bool", "int64", "uint8"),
    "bitwise_xor": _pair("bool", "int64", "uint8"),
    "where": _where,
    "clamp": _clamp,
    "exp": _unary(*ALL),
    "expm1": _unary(*ALL),
    "log": _positive,
    "log1p": _positive,
    "sqrt": _positive,
    "rsqrt": _positive,
    "reciprocal": _positive,
    "sin": _unary(*ALL),
    "cos": _unary(*ALL),
    "tanh": _unary(*ALL),
    "sigmoid": _unary(*ALL),
    "erf": _unary(*ALL),
    "neg": _unary(*NUMBERS),
    "abs": _unary(*NUMBERS),
    "sign": _unary(*NUMBERS),
    "floor": _unary(*FLOATS),
    "ceil": _unary(*FLOATS),
    "round": _unary(*FLOATS),
    "trunc": _unary(*FLOATS),
    "relu": _unary(*NUMBERS),
    "bitwise_not": _unary("bool", "int64", "uint8"),
    "logical_not": _unary(*ALL),
    "gelu": lambda gen: (gen.array(gen.shape()), gen.pick("none", "tanh")),
    "leaky_relu": lambda gen: (gen.array(gen.shape()), gen.pick(0.01, 0.3)),
    "elu": lambda gen: (gen.array(gen.shape()), gen.pick(1.0, 0.5), gen.pick(1.0, 1.05), gen.pick(1, 2.0)),
    "hardtanh": lambda gen: (gen.array(gen.shape()), -1.0, gen.pick(1, 0.5)),
    "to": lambda gen: (
        gen.array(gen.shape(), gen.pick(*ALL)),
        gen.pick("float32", "float64", "int64", "int32", "bool"),
    ),
    "clone": _unary(*ALL),
    "full": _full,
    "arange": _arange,
    "sum": _reduce(*ALL),
    "mean": _reduce(*FLOATS),
    "amax": _reduce(*ALL, empty=False),
    "amin": _reduce(*ALL, empty=False),
    "var": _var,
    "vector_norm": _norm,
    "argmax": _arg,
    "argmin": _arg,
    "mm": _mm,
    "bmm": _bmm,
    "addmm": _addmm,
    "view": _view,
    "permute": _permute,
    "expand": _expand,
    "slice": _cut,
    "select": _select,
    "cat": _cat,
    "pad": _pad,
    "flip": _flip,
    "repeat": _repeat,
    "slice_scatter": _slice_scatter,
    "select_scatter": _select_scatter,
    "softmax": _softmax,
    "log_softmax": _softmax,
    "gather": _gather,
    "scatter": _scatter,
    "scatter_add": _scatter_add,
    "index": _index,
    "index_put": _index_put,
    "embedding": _embedding,
    "convolution": _convolution,
    "convolution_backward": _convolution_backward,
    "max_pool2d_with_indices": _max_pool,
    "max_pool2d_with_indices_backward": _max_pool_backward,
    "avg_pool2d": _avg_pool,
    "avg_pool2d_backward": _avg_pool_backward,
    "adaptive_avg_pool2d": _adaptive,
    "adaptive_avg_pool2d_backward": _adaptive_backward,
}


# --- whole Plans by hand -----------------------------------------------------------------------------------------


class Builder:
    """Writes a Plan node by node, without a tracer."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.inputs: list[Input] = []
        self.constants: list[Array] = []
        self.nodes: list[Node] = []
        self.outputs: list[Output] = []
        self.specs: list[TensorSpec] = []

    def input(self, name: str, role: str, dtype: str, *shape: int) -> Ref:
        assert not self.constants and not self.nodes
        self.inputs.append(Input(name, role, TensorSpec(dtype, shape)))
        return self._value(TensorSpec(dtype, shape))

    def constant(self, array: NdArray) -> Ref:
        assert not self.nodes
        self.constants.append(from_numpy(array))
        return self._value(spec_of(array))

    def node(self, op: str, *args: Any) -> Any:
        outs = infer_outs(op, args, self.specs)
        self.nodes.append(Node(op, args, outs))
        refs = tuple(self._value(out) for out in outs)
        return refs[0] if len(refs) == 1 else refs

    def output(self, name: str, role: str, value: Ref) -> None:
        self.outputs.append(Output(name, role, value.value))

    def build(self) -> Plan:
        return Plan(self.name, tuple(self.inputs), tuple(self.constants), tuple(self.nodes), tuple(self.outputs))

    def _value(self, spec: TensorSpec) -> Ref:
        self.specs.append(spec)
        return Ref(len(self.specs) - 1)


def linear_step(rows: int = 4, features: int = 3) -> Plan:
    """One SGD step of linear regression with the mean squared error, written out."""
    b = Builder("linear-step")
    w = b.input("weight", "param", "float32", 1, features)
    bias = b.input("bias", "param", "float32", 1)
    x = b.input("x", "x", "float32", rows, features)
    y = b.input("y", "y", "float32", rows, 1)
    error = b.node("sub", b.node("addmm", bias, x, b.node("permute", w, (1, 0)), 1, 1), y, 1)
    grad = b.node("mul", error, 2.0 / rows)
    b.output("weight", "param", b.node("sub", w, b.node("mm", b.node("permute", grad, (1, 0)), x), 0.125))
    b.output("bias", "param", b.node("sub", bias, b.node("sum", grad, (0,), False), 0.125))
    b.output("loss", "loss", b.node("mean", b.node("pow", error, 2), (), False))
    return b.build()


def image_step(rows: int = 2) -> Plan:
    """Convolution, ReLU, max and average pooling, log-softmax, gather, and back: most of the op families at once."""
    b = Builder("image-step")
    w = b.input("weight", "param", "float32", 3, 1, 3, 3)
    x = b.input("x", "x", "float32", rows, 1, 9, 9)
    y = b.input("y", "y", "int64", rows)
    shift = b.constant(np.array([0.5, -0.5, 0.25], np.float32))
    geometry = ((1, 1), (1, 1), (1, 1), False, (0, 0), 1)
    pre = b.node("convolution", x, w, shift, *geometry)
    active = b.node("relu", pre)
    best, where = b.node("max_pool2d_with_indices", active, (2, 2), (2, 2), (0, 0), (1, 1), False)
    average = ((2, 2), (2, 2), (0, 0), False, True, None)
    logits = b.node("sum", b.node("avg_pool2d", best, *average), (2, 3), False)
    scores = b.node("log_softmax", logits, 1)
    index = b.node("view", y, (rows, 1))
    b.output("loss", "row", b.node("neg", b.node("view", b.node("gather", scores, 1, index), (rows,))))
    chosen = b.node("scatter", b.node("full", (rows, 3), 0.0, "float32"), 1, index, 1.0)
    slope = b.node("sub", b.node("exp", scores), chosen, 1)
    wide = b.node("expand", b.node("view", slope, (rows, 3, 1, 1)), (rows, 3, 2, 2))
    back = b.node("avg_pool2d_backward", wide, best, *average)
    back = b.node("max_pool2d_with_indices_backward", back, active, (2, 2), (2, 2), (0, 0), (1, 1), False, where)
    back = b.node("where", b.node("le", active, 0), 0.0, back)
    grad = b.node("convolution_backward", back, x, w, None, *geometry, (False, True, False))
    b.output("weight", "param", b.node("sub", w, grad, 0.5))
    return b.build()


def fill(plan: Plan, seed: int = 0) -> list[NdArray]:
    """Inputs for a Plan: normal numbers; zeros and ones for integers."""
    rng = np.random.default_rng(seed)
    return [
        np.asarray(
            rng.standard_normal(entry.spec.shape)
            if entry.spec.dtype in FLOATS
            else rng.integers(0, 2, entry.spec.shape),
            entry.spec.dtype,
        )
        for entry in plan.inputs
    ]
