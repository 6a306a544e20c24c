"""Private training in tests: hand-written gradient and apply Plans of linear regression, and the commands for them."""

from __future__ import annotations

from helpers_agent import data_ref, zero_params
from sordino_common import messages as m
from sordino_common.plan.plan import encode_plan, plan_id
from sordino_common.plan.spec import TensorSpec
from sordino_common.plan.values import Input, Node, Output, Plan, Ref


def _f32(*shape: int) -> TensorSpec:
    return TensorSpec("float32", shape)


def linear_gradient_plan(*, features: int = 3, batch_rows: int = 8) -> Plan:
    """Per row the gradient of (x w + b - y)²: w as an outer product, b whole."""
    nodes = (
        Node("addmm", (Ref(1), Ref(2), Ref(0), 1, 1), (_f32(batch_rows, 1),)),  # 4: prediction
        Node("sub", (Ref(4), Ref(3), 1), (_f32(batch_rows, 1),)),  # 5: error
        Node("mul", (Ref(5), 2.0), (_f32(batch_rows, 1),)),  # 6
        Node("mul", (Ref(5), Ref(5)), (_f32(batch_rows, 1),)),  # 7
        Node("view", (Ref(7), (batch_rows,)), (_f32(batch_rows),)),  # 8
    )
    return Plan(
        name="gradients linear",
        inputs=(
            Input("w", "param", _f32(features, 1)),
            Input("b", "param", _f32(1)),
            Input("x", "x", _f32(batch_rows, features)),
            Input("y", "y", _f32(batch_rows, 1)),
        ),
        constants=(),
        nodes=nodes,
        outputs=(
            Output("w", "row-left", 2),
            Output("w", "row-right", 6),
            Output("b", "row-gradient", 6),
            Output("loss", "row", 8),
        ),
    )


def mixing_plan(*, features: int = 3, batch_rows: int = 8) -> Plan:
    """A hostile gradient Plan: every "row" of b is the sum over the batch, so that a row counts more than once."""
    good = linear_gradient_plan(features=features, batch_rows=batch_rows)
    nodes = (
        *good.nodes,
        Node("sum", (Ref(6), (0,), True), (_f32(1, 1),)),  # 9
        Node("expand", (Ref(9), (batch_rows, 1)), (_f32(batch_rows, 1),)),  # 10
    )
    outputs = tuple(Output("b", "row-gradient", 10) if entry.name == "b" else entry for entry in good.outputs)
    return Plan(name="mixing", inputs=good.inputs, constants=(), nodes=nodes, outputs=outputs)


def linear_apply_plan(*, features: int = 3, lr: float = 0.1, momentum: float = 0.0) -> Plan:
    """SGD: v = momentum v + g, p = p - lr v; the state v is kept for w only (b is plain)."""
    nodes = (
        Node("mul", (Ref(2), momentum), (_f32(features, 1),)),  # 5
        Node("add", (Ref(5), Ref(3), 1), (_f32(features, 1),)),  # 6: v
        Node("mul", (Ref(6), lr), (_f32(features, 1),)),  # 7
        Node("sub", (Ref(0), Ref(7), 1), (_f32(features, 1),)),  # 8: w
        Node("mul", (Ref(4), lr), (_f32(1),)),  # 9
        Node("sub", (Ref(1), Ref(9), 1), (_f32(1),)),  # 10: b
    )
    return Plan(
        name="apply linear",
        inputs=(
            Input("w", "param", _f32(features, 1)),
            Input("b", "param", _f32(1)),
            Input("w.momentum", "state", _f32(features, 1)),
            Input("w", "gradient", _f32(features, 1)),
            Input("b", "gradient", _f32(1)),
        ),
        constants=(),
        nodes=nodes,
        outputs=(Output("w", "param", 8), Output("b", "param", 10), Output("w.momentum", "state", 6)),
    )


GRADIENT_PLAN = encode_plan(linear_gradient_plan())
APPLY_PLAN = encode_plan(linear_apply_plan())
TERMS = m.RecordTerms(
    clip_norm=1.0, grid_bits=16, sampling_threshold=1 << 30, sigma_squared=1 << 34, apply_plan=plan_id(APPLY_PLAN)
)


def private_command(terms: m.RecordTerms = TERMS, **changes: object) -> m.Train:
    fields: dict[str, object] = {
        "run": "run-1",
        "round": 1,
        "attempt": 0,
        "plan_id": plan_id(GRADIENT_PLAN),
        "data": data_ref(),
        "params": zero_params(),
        "batch_rows": 8,
        "steps": 5,
        "epochs": 0.0,
        "seed": 11,
        "privacy": terms,
    }
    return m.Train(**{**fields, **changes})  # type: ignore[arg-type]
