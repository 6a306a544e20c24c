"""This device's part in secure sums: it contributes masked vectors, and it may hold others' masks as a helper.

`circle.py` which message is for whom, `contribute.py` and `helping.py` the two parts (no NumPy: they are the daemon's),
`policy.py` what the owner allows, `journal.py` what was answered, `work.py` the arithmetic (in the worker).
"""
