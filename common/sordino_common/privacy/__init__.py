"""Differential privacy as arithmetic: exact noise, a grid for what is released, and what a release costs.

- `mechanism`: the frozen value that accounting is fed with, made by the code that drew sample and noise;
- `discrete_gaussian`: the exact sampler of N_Z(0, σ²), on integers only, from the table of `gaussian_cells`;
- `grid`: clipping real vectors to integer vectors of a computed L2 bound;
- `rdp`: Rényi curves at integer orders, and what (ε, δ) they give;
- `zcdp`: ρ of a Gaussian mechanism, and ρ <-> (ε, δ);
- `budget`: a budget as a filter over Rényi curves.

`mechanism`, `rdp`, `zcdp` and `budget` are plain Python: the agent's daemon, which has no NumPy, keeps its ledger by
them.
"""
