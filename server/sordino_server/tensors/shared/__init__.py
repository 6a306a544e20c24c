"""Links on secret shares: tensors that a committee of agents keeps, as m there and as masks λ here.

links       `FixedPrecisionTensor`, `MPCTensor`: what a user holds
local       fixed point in this process, with a table of its own ops
kept        what is known here of a value that a committee keeps
recorder    a committee's steps, as for pointers; what no shares can compute is refused at the user's line
program     steps -> Plan -> circuit, and how large masks get from circuit to circuit
session     a circuit that stays open: one step a flush
committee   who keeps, computes and opens: sharing, flushing, fetching
committees  all committees of a fleet, modules
functions   polynomial sigmoid and tanh, for eager code
"""
