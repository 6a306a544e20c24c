"""Tracing: a PyTorch model, a loss and an optimizer become Plans. The only package, beside baselines, that needs torch.

steps.py        training_plan, evaluation_plan, scoring_plan, prediction_plan: what a job asks for
row_gradients.py  gradient_plan, apply_plan: a training step with a bound on every row
subject.py      a model as a function of its parameters; batches to trace with
losses.py       value, derivative and metrics per row
optimizers.py   Sgd, Adam as functions with explicit state
tracing.py      trace: any function of tensors -> TracedPlan
outer.py        gradients of rows as their two factors
capture.py      make_fx on fake tensors: function -> graph
origins.py      which line of the model an operation comes from
lowering.py     graph -> ops of the table;  overloads.py: which;  peephole.py: shorter
draft.py        the Plan while it is being written
"""
