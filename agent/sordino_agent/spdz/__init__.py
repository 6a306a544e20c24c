"""Sessions on secret shares, as an agent takes part in them.

room.py, session.py,              the daemon's side, without NumPy: who may say what, when it goes to the worker
mailbox.py, corrections.py
policy.py, journal.py             what the owner allows; what is burnt before its first use
tasks.py                          what passes between daemon and worker
bench.py, seat.py, reading.py     the worker's side: parties, owners, outputs
"""
