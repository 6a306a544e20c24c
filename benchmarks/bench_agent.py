"""The agent on a device: resident memory idle and connected, start until connected, what it imports.

A real `sordino-agent run` process beside a mosquitto of our own. The start is given as a ratio to
`python -c 'import numpy'`, which every program that computes on the device pays.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
from pathlib import Path

from sordino_agent.status import read_status
from sordino_common.errors import ConfigError
from sordino_server.job import load_job
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

JOB = Path(__file__).parent.parent / "examples" / "boston-fedavg.yaml"
BUDGET_BYTES = 45 * 1000 * 1000
POLL_S = 0.01
DEADLINE_S = 60.0


def run_seconds(code: str) -> float:
    """Wall time of `python -c code`, best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([sys.executable, "-c", code], check=True)
        best = min(best, time.perf_counter() - start)
    return best


def modules_of(code: str) -> set[str]:
    listing = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", listing], check=True, capture_output=True, text=True)
    return set(done.stdout.split())


def wait_until(done, what: str) -> float:
    """Seconds until `done()`; a benchmark may look again every 10 ms, a test may not."""
    start = time.perf_counter()
    while not done():
        if time.perf_counter() - start > DEADLINE_S:
            raise SystemExit(f"{what} did not happen within {DEADLINE_S:.0f} s")
        time.sleep(POLL_S)
    return time.perf_counter() - start


def connected_agent() -> tuple[float, int]:
    """(seconds from start to connected, resident bytes of the daemon once it has described its datasets)"""
    job = load_job(JOB, overrides=["simulation.agents=1"])
    with tempfile.TemporaryDirectory() as scratch:
        folder = write_fleet(scenario_of(job), Path(scratch) / "fleet")
        (name,) = folder.agents
        state = folder.agents[name] / "state" / "status.json"
        log = folder.agents[name] / "agent.log"

        def status():
            try:
                return read_status(state)
            except ConfigError:
                return None

        with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
            agents.start(name)
            # The log, for the moment: the status file is written at most once a second.
            start_s = wait_until(lambda: b"event=connection connected=True" in log.read_bytes(), "the connection")
            wait_until(lambda: (seen := status()) is not None and seen.datasets is not None, "reading the datasets")
            return start_s, agents.resident_bytes()


def main() -> None:
    numpy_s = run_seconds("import numpy")
    import_s = run_seconds("import sordino_agent.service")
    loaded = modules_of("import sordino_agent.service")
    start_s, resident = connected_agent()
    print(f"import of the daemon:      {import_s / numpy_s:5.2f}x of `import numpy`, {len(loaded)} modules")
    print(f"start until connected:     {start_s / numpy_s:5.2f}x of `import numpy`")
    print(f"resident, idle, connected: {resident / 1e6:5.1f} MB of {BUDGET_BYTES / 1e6:.0f} MB")
    print(f"NumPy in the daemon:       {'yes' if 'numpy' in loaded else 'no'}")
    if resident > BUDGET_BYTES or "numpy" in loaded:
        raise SystemExit("over the budget of an idle agent")


if __name__ == "__main__":
    main()
