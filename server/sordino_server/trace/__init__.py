"""Tracing: a PyTorch model, a loss and an optimizer become Plans. The only package, beside baselines, that needs torch.

steps.py        training_plan, dp_training_plan, evaluation_plan: what a job asks for
losses.py       value, derivative and metrics per row
optimizers.py   Sgd, Adam as functions with explicit state
tracing.py      trace: any function of tensors -> TracedPlan
capture.py      make_fx on fake tensors: function -> graph
origins.py      which line of the model an operation comes from
lowering.py     graph -> ops of the table;  overloads.py: which;  peephole.py: shorter
draft.py        the Plan while it is being written
"""
