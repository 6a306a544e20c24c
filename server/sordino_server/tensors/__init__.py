"""Chains of tensors: PyTorch on data that is elsewhere. Every operation becomes part of a Plan.

errors      what is refused here, and what failed there
chain       the links: `ChainTensor`, `LocalTensor`
pointer     `PointerTensor`, a tensor that lives on an agent
ops         what is known of each aten overload: its form without side effects, its numbers, its inverse view
values      a value on an agent: stored, or the result of a step that is still to be sent
recorder    an agent's steps, and the one Plan that they become
script      what comes next in a loop, if it goes as the last time
compile     steps -> Plan, through the tracer
fleet       `PointerFleet` and `RemoteAgent`: what a user holds
messages    what goes to the agents, as round generators
modules     a model's parameters, sent and fetched in place
"""
