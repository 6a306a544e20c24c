"""The agent on a device: memory idle and in a training step, start until ready, how often an idle one wakes.

A real `sordino-agent run` process beside a mosquitto of our own, told to a service manager of our own. The start is
given as a ratio to `python -c 'import numpy'`, which every program that computes on the device pays. Wakings are the
kernel's count of voluntary context switches (/proc/PID/status) while nothing is asked of the agent.

The agent runs as a package and `pip` install it: from compiled code, in an environment that holds the packages of
packaging/agent.lock and no others. Where Python may not keep what it compiled (PYTHONDONTWRITEBYTECODE, a tree that is
read-only), each start compiles again, and keeps a megabyte of that in memory; where `typing_extensions` is installed,
msgspec takes it instead of `typing`, which is 0.7 MB in the two processes.
"""

from __future__ import annotations

import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import venv
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

import sordino_agent
import sordino_common
from sordino_agent.status import Status, read_status
from sordino_common.errors import ConfigError
from sordino_server.job import load_job
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

ROOT = Path(__file__).parent.parent
JOB = ROOT / "examples" / "boston-fedavg.yaml"
LOCK = ROOT / "packaging" / "agent.lock"
IDLE_BYTES = 45 * 1000 * 1000
STEP_BYTES = 70 * 1000 * 1000
KEEPALIVE_S = 10  # six times as often as by default, so that a window has enough of them
WATCHDOG_S = 10.0
WINDOW_S = 30.0
POLL_S = 0.01
DEADLINE_S = 120.0


def run_seconds(python: str, code: str) -> float:
    """Wall time of `python -c code`, best of five."""
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        subprocess.run([python, "-c", code], check=True, env=alone())
        best = min(best, time.perf_counter() - start)
    return best


def modules_of(python: str, code: str) -> set[str]:
    listing = f"{code}\nimport sys; print(*sys.modules)"
    done = subprocess.run([python, "-c", listing], check=True, capture_output=True, text=True, env=alone())
    return set(done.stdout.split())


def wait_until(done: Callable[[], object], what: str) -> float:
    """Seconds until `done()`; a benchmark may look again every 10 ms, a test may not."""
    start = time.perf_counter()
    while not done():
        if time.perf_counter() - start > DEADLINE_S:
            raise SystemExit(f"{what} did not happen within {DEADLINE_S:.0f} s")
        time.sleep(POLL_S)
    return time.perf_counter() - start


def as_installed(folder: Path) -> str:
    """The Python of an environment in `folder` that holds what a device has. Agent and common are copied and compiled;
    the packages that they need are those installed here."""
    venv.create(folder, with_pip=False, symlinks=True)
    (site,) = (folder / "lib").glob("python*/site-packages")
    for package in (sordino_agent, sordino_common):
        source = Path(str(package.__file__)).parent
        shutil.copytree(source, site / source.name, ignore=shutil.ignore_patterns("__pycache__"))
    subprocess.run([sys.executable, "-m", "compileall", "-q", str(site)], check=True)
    for project in re.findall(r"(?m)^(\S+)==\S+ \\$", LOCK.read_text("utf-8")):
        distribution = metadata.distribution(project)
        for top in {file.parts[0] for file in distribution.files or ()} - {"..", "__pycache__"}:
            (site / top).symlink_to(Path(str(distribution.locate_file(top))).absolute())
    return str(folder / "bin" / "python")


def alone() -> dict[str, str]:
    """This environment, without what would lead an installed agent to code elsewhere."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}


@contextmanager
def variables(given: dict[str, str]) -> Iterator[None]:
    """What is started inside has these environment variables."""
    before = dict(os.environ)
    os.environ.clear()
    os.environ.update(given)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


@dataclass(frozen=True, slots=True, kw_only=True)
class Device:
    """One agent that is connected and has described its data."""

    pid: int
    fleet: Path
    state: Path
    ready_s: float  # from start to READY=1

    def status(self) -> Status | None:
        try:
            return read_status(self.state / "status.json")
        except ConfigError:
            return None


@contextmanager
def connected_agent(python: str) -> Iterator[Device]:
    job = load_job(JOB, overrides=["simulation.agents=1"])
    with tempfile.TemporaryDirectory() as scratch, socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        folder = write_fleet(scenario_of(job), Path(scratch) / "fleet")
        (name,) = folder.agents
        config = folder.agents[name] / "agent.yaml"
        text, count = re.subn(r"(?m)^( *)port: \d+$", rf"\g<0>\n\1keepalive_s: {KEEPALIVE_S}", config.read_text())
        assert count == 1, text
        config.write_text(text)
        manager.bind(f"{scratch}/notify")
        manager.setblocking(False)
        told: list[bytes] = []

        def heard(word: bytes) -> bool:
            while True:
                try:
                    told.append(manager.recv(4096))
                except BlockingIOError:
                    return any(message.startswith(word) for message in told)

        told_to = {"NOTIFY_SOCKET": f"{scratch}/notify", "WATCHDOG_USEC": str(int(WATCHDOG_S * 1e6))}
        with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder, python=python) as agents:
            with variables(alone() | told_to):
                agents.start(name)
            ready_s = wait_until(lambda: heard(b"READY=1"), "READY=1")
            state = folder.agents[name] / "state"
            wait_until(lambda: (state / "status.json").exists(), "the first status")
            pid = read_status(state / "status.json").pid
            device = Device(pid=pid, fleet=folder.folder, state=state, ready_s=ready_s)
            wait_until(lambda: (seen := device.status()) and seen.datasets is not None, "reading the datasets")
            yield device
            heard(b"")


def figures(pid: int, file: str) -> dict[str, int]:
    """Numbers by name from a file of /proc/PID; kB become bytes."""
    found = re.findall(r"(?m)^(\w+):\s+(\d+)( kB)?$", Path(f"/proc/{pid}/{file}").read_text("ascii"))
    return {name: int(value) * (1024 if unit else 1) for name, value, unit in found}


def workers(pid: int) -> list[int]:
    """The daemon's children. Not one that has only just begun: until its program is loaded it is the daemon once
    more, in the same memory."""
    own = Path(f"/proc/{pid}/cmdline").read_bytes()
    found = []
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text("ascii").split():
        with suppress(OSError):  # it has just ended
            if Path(f"/proc/{child}/cmdline").read_bytes() != own:
                found.append(int(child))
    return found


def resident_together(*pids: int) -> int:
    """Bytes that the processes have in memory together: what they share of a file counts once."""
    files: dict[str, int] = {}
    own = 0
    for pid in pids:
        name = ""
        for line in Path(f"/proc/{pid}/smaps").read_text("utf-8", "replace").splitlines():
            place = re.match(r"[0-9a-f]+-[0-9a-f]+ \S+ (\S+) (\S+) (\d+)", line)
            if place is not None:
                name = "" if place.group(3) == "0" else " ".join(place.groups())  # offset, device, inode
                sizes: dict[str, int] = {}
            elif (size := re.match(r"(Rss|Private_Dirty): +(\d+) kB", line)) is not None:
                sizes[size.group(1)] = int(size.group(2)) * 1024
                if len(sizes) == 2:
                    own += sizes["Private_Dirty"] if name else sizes["Rss"]
                    if name:
                        files[name] = max(files.get(name, 0), sizes["Rss"] - sizes["Private_Dirty"])
    return own + sum(files.values())


def step_bytes(device: Device) -> tuple[int, int, int]:
    """(daemon, worker, both together) in memory at their most while the agent trains."""
    settings = ["simulation.agents=1", "train.rounds=1", "train.join_s=60"]
    command = [
        sys.executable,
        "-m",
        "sordino_server.cli",
        "train",
        str(JOB),
        "--fleet",
        str(device.fleet),
        "--no-baseline",
    ]
    with subprocess.Popen(
        [*command, "--no-baseline", "--quiet", *(part for item in settings for part in ("--set", item))],
        stdout=subprocess.DEVNULL,
    ) as server:
        peaks = (0, 0, 0)
        while server.poll() is None:
            for worker in workers(device.pid):
                try:
                    now = (
                        figures(device.pid, "status")["VmRSS"],
                        figures(worker, "status")["VmRSS"],
                        resident_together(device.pid, worker),
                    )
                except (OSError, KeyError):  # it has just ended
                    continue
                peaks = (max(peaks[0], now[0]), max(peaks[1], now[1]), max(peaks[2], now[2]))
            time.sleep(POLL_S)
        if server.returncode != 0 or not peaks[1]:
            raise SystemExit(f"the training ended with {server.returncode}, peaks {peaks}")
    return peaks


def wakings(device: Device) -> int:
    """How often the idle daemon went to sleep in `WINDOW_S`."""
    before = figures(device.pid, "status")["voluntary_ctxt_switches"]
    time.sleep(WINDOW_S)
    return figures(device.pid, "status")["voluntary_ctxt_switches"] - before


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        measure(as_installed(Path(folder)))


def measure(python: str) -> None:
    numpy_s = run_seconds(python, "import numpy")
    import_s = run_seconds(python, "import sordino_agent.service")
    loaded = modules_of(python, "import sordino_agent.service")
    with connected_agent(python) as device:
        wait_until(lambda: (seen := device.status()) and seen.worker_pid is None, "the end of the idle worker")
        idle = figures(device.pid, "status")["VmRSS"]
        woken = wakings(device)
        daemon, worker, both = step_bytes(device)
    # A third of the keep-alive is looked at; a ping, its answer; a beat is a timer and the byte that it sends itself.
    expected = WINDOW_S * (3 / KEEPALIVE_S + 1 / KEEPALIVE_S + 2 / WATCHDOG_S)
    print(f"import of the daemon:      {import_s / numpy_s:5.2f}x of `import numpy`, {len(loaded)} modules")
    print(f"start until ready:         {device.ready_s / numpy_s:5.2f}x of `import numpy` ({numpy_s:.2f} s here)")
    print(f"resident, idle, connected: {idle / 1e6:5.1f} MB of {IDLE_BYTES / 1e6:.0f} MB")
    print(f"in a step of the Boston MLP: daemon {daemon / 1e6:.1f} MB, worker {worker / 1e6:.1f} MB; "
          f"together {both / 1e6:.1f} MB of {STEP_BYTES / 1e6:.0f} MB, what they share counted once")  # fmt: skip
    print(f"wakings, idle:             {woken} in {WINDOW_S:.0f} s; keep-alive ({KEEPALIVE_S} s) and watchdog "
          f"({WATCHDOG_S:.0f} s) are {expected:.0f} at most")  # fmt: skip
    print(f"NumPy in the daemon:       {'yes' if 'numpy' in loaded else 'no'}")
    if idle > IDLE_BYTES or both > STEP_BYTES or "numpy" in loaded or woken > expected:
        raise SystemExit("over the budget of an agent")


if __name__ == "__main__":
    main()
