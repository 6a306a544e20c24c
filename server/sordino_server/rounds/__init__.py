"""Orchestration as generators: what a job does round by round, with no socket, clock or thread in it.

`effects.py` is what a generator may ask for, `events.py` what it reports, `roll.py` who takes part and is prepared,
`fedavg.py` federated averaging. `sordino_server.conductor` performs the effects.
"""
