"""The agent: what runs on a device that owns data.

core.py, desk.py       commands to answers: policy first, then the executor; each thing once
policy.py, config.py   what the owner allows; the YAML file
tasks.py, executor.py  what is computed, and who computes: inline (simulator) or
process.py, worker.py  in a process that can be killed
workshop.py, compute.py, batches.py, data/   the worker's side, with NumPy
service.py, status.py, check.py, enrol.py, cli.py   the daemon and its command line
__main__.py, start_worker.py   where the two processes begin
"""

__version__ = "0.1.0"
