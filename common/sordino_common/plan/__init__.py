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
    arrays.py           messages.Array <-> ndarray

Nothing is re-exported here: who imports `plan.spec` should not load NumPy.
"""
