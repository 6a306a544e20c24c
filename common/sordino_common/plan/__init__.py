"""Plan: a PyTorch program as data. Values, codec, op table, analysis, and two executors that run it.

    spec.py             TensorSpec: dtype and shape
    values.py           Plan, Node, Input, Output, Ref, PlanLimits
    plan.py             encode_plan, decode_plan, plan_id (and the values again)
    validation.py       validate_plan: everything that must hold before a run
    analysis.py         analyse: liveness, peak memory, operations
    ops/                the closed op table, one family a file
    interpreter.py      NumpyProgram
    torch_executor.py   TorchProgram: the only module of common that imports torch
    executors.py        load_program: one of the two, by name
    separable.py        require_separable: row b of the outputs depends on row b of the data only
    row_rules.py        where each op leaves the rows;  index_bounds.py: integers that are in range for certain
    gradients.py        row_gradients, require_apply: what the two Plans of record-level privacy are
    arrays.py           messages.Array <-> ndarray

Nothing is re-exported here: who imports `plan.spec` should not load NumPy.
"""
