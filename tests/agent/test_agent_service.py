"""The daemon: start, serve, reload, drain, status; in this process over memory, and as a process over mosquitto."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from helpers_agent import TRAIN_PLAN, train_command
from helpers_daemon import AGENT, LIMIT_S, Daemon, Home, Stage, make_home, stage_of
from helpers_mosquitto import Mosquitto
from sordino_agent.config import load_agent_config
from sordino_agent.enrol import enrol
from sordino_agent.policy import Limits
from sordino_agent.service import Service
from sordino_agent.status import is_alive, read_status
from sordino_common import messages as m
from sordino_common.channel.identity import DeviceKey, OperatorKey
from sordino_common.errors import ConfigError
from sordino_common.transport.memory import MemoryBroker, MemoryTransport
from sordino_common.transport.mqtt import MqttTransport
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.reactor import Reactor

IDLE_BYTES = 45_000_000  # the budget of the idle, connected daemon


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


# --- in this process ---------------------------------------------------------------------------------------------


@pytest.fixture
def memory(home: Home) -> Iterator[tuple[Stage, Callable[[], Service]]]:
    with Reactor() as reactor:
        broker = MemoryBroker(reactor)
        stage = stage_of(reactor, home, MemoryTransport(broker, reactor, "server"))
        services: list[Service] = []

        def start() -> Service:
            loaded = load_agent_config(home.folder / "agent.yaml")
            name = f"pi-01-{len(services)}"
            service = Service(loaded, reactor, transport=MemoryTransport(broker, reactor, name))
            services.append(service)
            service.open()
            stage.until(lambda: stage.server.endpoint.online("pi-01"))
            return service

        yield stage, start
        for service in services:
            service.finish()


Memory = tuple[Stage, Callable[[], Service]]


def test_serves_and_drains(memory: Memory, home: Home) -> None:
    stage, start = memory
    service = start()
    described = stage.ask(m.Describe())
    assert isinstance(described, m.Described)
    assert [(info.name, info.train_rows) for info in described.datasets] == [("toy", 30)]
    assert isinstance(stage.ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
    under_way = stage.server.endpoint.send("pi-01", train_command())
    stage.until(lambda: service.core.running)
    service.stop("test")
    assert isinstance(stage.answer(under_way), m.Trained)  # what ran was finished
    stage.until(lambda: service.closed and not stage.server.endpoint.online("pi-01"))
    service.finish()
    status = read_status(home.state / "status.json")
    assert (status.state, status.boot, status.tasks_done, status.roster_epoch) == ("stopped", 1, 2, 1)
    assert not is_alive(status)


def test_drain_cancels_what_takes_too_long(memory: Memory, home: Home) -> None:
    home.edit("drain_s: 10 ", "drain_s: 0.1 ")
    stage, start = memory
    service = start()
    stage.ask(m.PlanPut(plan=TRAIN_PLAN))
    under_way = stage.server.endpoint.send("pi-01", train_command(steps=1 << 30))
    stage.until(lambda: service.core.running)
    service.stop("test")
    service.stop("again")
    answer = stage.answer(under_way)
    assert isinstance(answer, m.Refused)
    assert answer.code == "cancelled"
    stage.until(lambda: service.closed)


def test_reload_takes_policy_and_datasets_and_survives_a_broken_file(memory: Memory, home: Home) -> None:
    stage, start = memory
    service = start()
    assert isinstance(stage.ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
    home.edit("  plans: any", "  plans: some")
    service.reload()
    assert isinstance(stage.ask(train_command()), m.Trained)
    home.edit("  plans: some", "  plans: any")
    home.edit("jobs: [describe, moments, train, evaluate, aggregate]", "jobs: [describe]")
    home.edit("{name: toy, path: toy.csv, test_rows: 10}", "{name: toy, path: toy.csv, test_rows: 20}")
    service.reload()
    refused = stage.ask(train_command(round=2))
    assert isinstance(refused, m.Refused)
    assert refused.code == "policy"
    described = stage.ask(m.Describe())
    assert isinstance(described, m.Described)
    assert described.datasets[0].train_rows == 20


def test_every_start_is_another_boot(memory: Memory, home: Home) -> None:
    stage, start = memory
    first = start()
    first.stop("test")
    stage.until(lambda: first.closed)
    start()
    assert (home.state / "boot").read_text() == "2\n"
    stage.until(lambda: ("pi-01", False) in stage.server.online)
    assert isinstance(stage.ask(m.Health()), m.HealthReport)


def test_a_full_disk_does_not_end_the_daemon(memory: Memory, home: Home, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, start = memory
    service = start()

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sordino_agent.service.write_status", full)
    service._write_status()
    assert isinstance(stage.ask(m.Health()), m.HealthReport)


def test_status_says_what_the_daemon_does(memory: Memory, home: Home) -> None:
    stage, start = memory
    service = start()
    stage.ask(m.Describe())
    status = service.status()
    assert (status.name, status.connected, status.server_online, status.state) == ("pi-01", True, True, "running")
    assert status.datasets is not None
    assert status.datasets[0].train_rows == 30
    assert status.worker_pid is not None
    assert status.resident_bytes > 0


def test_figures_for_prometheus_are_written_beside_the_status(
    memory: Memory, home: Home, caplog: pytest.LogCaptureFixture
) -> None:
    home.edit("roster: fleet.roster", "roster: fleet.roster\nmetrics_file: sordino.prom")
    stage, start = memory
    service = start()
    file = home.folder / "sordino.prom"
    stage.until(
        lambda: file.exists() and 'sordino_agent_dataset_rows{dataset="toy",split="train"} 30' in file.read_text()
    )
    file.unlink()
    file.mkdir()  # a folder in the file's place: said, and nothing ends
    service.finish()
    assert "event=metrics-not-written" in caplog.text
    file.rmdir()


# --- imports -----------------------------------------------------------------------------------------------------


def test_the_daemon_imports_no_numpy() -> None:
    code = """
import sys
import sordino_agent.cli, sordino_agent.service, sordino_agent.check, sordino_agent.enrol
heavy = [name for name in sys.modules if name in ("numpy", "torch") or name.startswith("sordino_common.plan")]
sys.exit(", ".join(heavy) or 0)
"""
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=False)
    assert result.returncode == 0, result.stderr


def test_the_daemon_loads_nothing_that_it_has_no_use_for(home: Home) -> None:
    """Until it opens its state: configuration, key and roster are read by then, and all that it imports is there."""
    (home.folder / "state" / "boot").write_text("no number")
    code = """
import sys
from sordino_agent import __main__ as agent
from sordino_common.lazy import is_loaded
sys.argv = ["sordino-agent", "run", sys.argv[1]]
assert agent.main() == 2
idle = (
    *agent._UNUSED, "_bz2", "_lzma", "cryptography.hazmat.primitives.serialization", "ctypes", "email", "http",
    "numpy", "tempfile", "unicodedata", "zipfile",
)
print(*(name for name in idle if is_loaded(name)))
"""
    command = [sys.executable, "-c", code, str(home.folder)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert "state/boot" in result.stderr
    assert (result.returncode, result.stdout) == (0, "\n"), result.stderr


# --- as a process ------------------------------------------------------------------------------------------------


@pytest.fixture
def fleet(home: Home, start_mosquitto: Callable[..., Mosquitto]) -> Iterator[tuple[Stage, Daemon, Mosquitto]]:
    broker = start_mosquitto()
    home.edit("port: 1\n", f"port: {broker.port}\n  reconnect_least_s: 0.05\n")
    home.edit("  # idle_s: 60", "  idle_s: 0")
    log = (home.folder / "log").open("w")
    process = subprocess.Popen([*AGENT, "run", str(home.folder)], stderr=log, text=True)
    with Reactor() as reactor:
        settings = MqttSettings(host="127.0.0.1", port=broker.port, client_id="server", reconnect_least_s=0.05)
        stage = stage_of(reactor, home, MqttTransport(settings, reactor))
        try:
            stage.until(lambda: process.poll() is not None or stage.server.endpoint.online("pi-01"))
            assert process.poll() is None, (home.folder / "log").read_text()
            yield stage, Daemon(process), broker
        finally:
            stage.server.endpoint.close()
            stage.until(lambda: stage.server.endpoint.closed)
            process.kill()
            process.wait()
            log.close()


Fleet = tuple[Stage, Daemon, Mosquitto]


def said(home: Home) -> str:
    return (home.folder / "log").read_text()


@pytest.mark.mqtt
def test_a_day_of_a_daemon(fleet: Fleet, home: Home) -> None:
    """Describe, train, broker restart, reload, status, SIGTERM: and nothing of the data in the log."""
    stage, daemon, broker = fleet
    assert isinstance(stage.ask(m.Describe()), m.Described)
    assert isinstance(stage.ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
    first = stage.ask(train_command())
    assert isinstance(first, m.Trained)
    broker.restart()
    assert stage.ask(train_command()) == first  # the same answer, from the cache, over a new connection
    daemon.process.send_signal(signal.SIGHUP)
    stage.until(lambda: "event=reloaded" in said(home))
    assert isinstance(stage.ask(m.Describe()), m.Described)  # answered when a worker has read the datasets again
    stage.until(lambda: read_status(home.state / "status.json").datasets)
    shown = subprocess.run(
        [*AGENT, "status", str(home.folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 0, shown.stderr
    assert "pi-01 of fleet demo" in shown.stdout
    assert "toy: 30 rows to train on" in shown.stdout
    checked = subprocess.run(
        [*AGENT, "check", str(home.folder), "--json"], capture_output=True, text=True, timeout=60, check=False
    )
    assert checked.returncode == 0, checked.stdout
    found: list[dict[str, Any]] = json.loads(checked.stdout)
    assert {one["what"] for one in found if one["level"] == "ok"} >= {"configuration", "key", "roster", "broker"}
    daemon.process.send_signal(signal.SIGTERM)
    assert daemon.process.wait(LIMIT_S) == 0
    stage.until(lambda: not stage.server.endpoint.online("pi-01"))
    text = said(home)
    assert "event=stopped" in text
    cells = {cell for line in (home.folder / "toy.csv").read_text().splitlines()[1:] for cell in line.split(",")}
    assert not any(cell in text for cell in cells)
    assert "level=ERROR" not in text
    shown = subprocess.run(
        [*AGENT, "status", str(home.folder)], capture_output=True, text=True, timeout=60, check=False
    )
    assert shown.returncode == 3
    assert "NOT RUNNING" in shown.stdout


@pytest.mark.mqtt
def test_a_killed_daemon_leaves_its_will(fleet: Fleet) -> None:
    stage, daemon, _ = fleet
    daemon.process.kill()
    stage.until(lambda: not stage.server.endpoint.online("pi-01"))


@pytest.mark.mqtt
def test_the_idle_daemon_is_small(fleet: Fleet, home: Home) -> None:
    """Connected, after a training task, with its worker gone."""
    stage, daemon, _ = fleet
    stage.ask(m.Describe())
    stage.ask(m.PlanPut(plan=TRAIN_PLAN))
    stage.ask(train_command())
    children = Path(f"/proc/{daemon.process.pid}/task/{daemon.process.pid}/children")
    stage.until(lambda: children.read_text() == "")
    resident = daemon.memory()["Rss"]
    assert resident <= IDLE_BYTES, f"{resident / 1e6:.1f} MB resident"


# --- the command line --------------------------------------------------------------------------------------------


def agent(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*AGENT, *arguments], capture_output=True, text=True, timeout=60, check=False)


def test_init_makes_key_configuration_and_request(tmp_path: Path) -> None:
    key = OperatorKey.generate().public.hex()
    asked = ("init", str(tmp_path / "a"), "--name", "pi-07", "--fleet", "demo", "--operator-key", key)
    made = agent(*asked, "--broker", "[::1]:1884")
    assert made.returncode == 0, made.stderr
    request = json.loads((tmp_path / "a/enrolment.json").read_text())
    identity = DeviceKey.load(tmp_path / "a/state/agent.key")
    assert request == {
        "name": "pi-07",
        "fleet": "demo",
        "roles": ["data"],
        "sign_key": identity.public.sign_key.hex(),
        "box_key": identity.public.box_key.hex(),
        "fingerprint": identity.fingerprint,
    }
    assert identity.fingerprint in made.stdout
    assert (tmp_path / "a/state/agent.key").stat().st_mode & 0o777 == 0o600
    loaded = load_agent_config(tmp_path / "a/agent.yaml")
    assert (loaded.config.broker.host, loaded.config.broker.port) == ("::1", 1884)
    assert loaded.config.policy.plans == ()
    written = (tmp_path / "a/agent.yaml").read_text()
    head, limits = written.split("limits:\n")
    (tmp_path / "a/limits.yaml").write_text(head + "limits:\n" + re.sub(r"(?m)^  # (?=\w+: )", "  ", limits))
    stated = load_agent_config(tmp_path / "a/limits.yaml")
    assert stated.config.limits == loaded.config.limits == Limits()
    assert all(f" {name}: " in limits for name in Limits.__struct_fields__)  # each is named, with its default
    again = agent(*asked, "--broker", "localhost")
    assert again.returncode == 2
    assert "is there already" in again.stderr
    (tmp_path / "a/agent.yaml").unlink()
    assert agent(*asked, "--broker", "localhost").returncode == 0
    assert DeviceKey.load(tmp_path / "a/state/agent.key").fingerprint == identity.fingerprint


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "Pi 7"}, "--name 'Pi 7'"),
        ({"fleet": "../x"}, "--fleet"),
        ({"name": "server"}, "the server's name"),
        ({"operator_key": "abc"}, "64 hex digits"),
        ({"operator_key": "00" * 32}, "small order"),
        ({"broker": "a:b"}, "HOST:PORT"),
        ({"broker": "a:99999"}, "HOST:PORT"),
    ],
)
def test_init_refuses(tmp_path: Path, change: dict[str, str], words: str) -> None:
    good = {"name": "a", "fleet": "demo", "operator_key": OperatorKey.generate().public.hex(), "broker": "h:1"}
    with pytest.raises(ConfigError, match=re.escape(words)):
        enrol(tmp_path / "a", **{**good, **change})
    assert not (tmp_path / "a").exists()


def test_check_names_each_problem_with_its_remedy(home: Home) -> None:
    (home.state / "agent.key").chmod(0o644)
    (home.folder / "toy.csv").write_text("f0,y\n1,x\n")
    done = agent("check", str(home.folder), "--offline", "--json")
    assert done.returncode == 2
    errors = {one["what"]: one for one in json.loads(done.stdout) if one["level"] == "error"}
    assert set(errors) == {"key", "datasets"}
    assert "toy.csv:2: column 2 (y)" in errors["datasets"]["text"]
    assert all(one["remedy"] for one in errors.values())
    before = sorted(path.name for path in home.state.iterdir())
    assert before == ["agent.key"]  # a check writes nothing


def test_check_looks_at_models(home: Home) -> None:
    np.savez(home.folder / "boiler.npz", w=np.zeros((3, 1), np.float32))
    (home.folder / "broken.npz").write_bytes(b"PK nothing")
    home.edit("models: []", "models: [{name: boiler, path: boiler.npz}, {name: broken, path: broken.npz}]")
    found = json.loads(agent("check", str(home.folder), "--offline", "--json").stdout)
    said = [(one["level"], one["text"], one["remedy"]) for one in found if one["what"] == "models"]
    assert [level for level, _, _ in said] == ["warning", "error"]
    assert said[0][1].startswith("boiler: 3 parameters in 1 tensors: sessions that ask for it will be refused")
    assert said[0][2] == "add spdz-model to policy.jobs, and boiler to policy.models"
    assert "broken.npz: not a readable NPZ file" in said[1][1]


def test_check_of_a_roster_by_another_operator_is_a_security_matter(home: Home) -> None:
    other = OperatorKey.generate().public.hex()
    home.edit(home.operator.public.hex(), other)
    done = agent("check", str(home.folder), "--offline")
    assert done.returncode == 4
    assert "does not verify" in done.stdout


def test_check_without_a_broker(home: Home) -> None:
    done = agent("check", str(home.folder))
    assert done.returncode == 3
    assert "Connection refused" in done.stdout
    assert "-> is the broker running" in done.stdout


def test_check_of_a_broken_file_names_the_place(home: Home) -> None:
    home.edit("min_rows: 10", "min_rows: ten")
    done = agent("check", str(home.folder))
    assert done.returncode == 2
    assert re.search(r"agent\.yaml:\d+:3: policy\.min_rows", done.stdout)


def test_check_of_a_place_without_a_configuration_says_how_to_get_one(tmp_path: Path) -> None:
    done = agent("check", str(tmp_path / "nowhere"))
    assert done.returncode == 2
    assert "No such file" in done.stdout
    assert "-> name its file or folder, or make one: `sordino-agent enroll TOKEN`, or by hand `sordino-agent init`" in (
        done.stdout
    )
    ran = agent("run", str(tmp_path / "nowhere"))
    assert ran.returncode == 2
    assert "nowhere: can't be read: No such file or directory; name its file or folder, or make one: " in ran.stderr


def test_run_with_a_bad_configuration_ends_with_2(home: Home) -> None:
    (home.state / "agent.key").chmod(0o644)
    done = agent("run", str(home.folder))
    assert done.returncode == 2
    assert "agent.key" in done.stderr
    assert "Traceback" not in done.stderr


def test_status_before_the_first_run(home: Home) -> None:
    done = agent("status", str(home.folder))
    assert done.returncode == 2
    assert "sordino-agent run" in done.stderr


def test_the_version_is_the_distributions() -> None:
    from importlib.metadata import version

    assert agent("--version").stdout.split() == ["sordino-agent", version("sordino")]
