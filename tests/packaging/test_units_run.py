"""Agent, server, dealer and dashboard inside their units' filters: keys as credentials, told to a service manager."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import pytest

from helpers_agent import TRAIN_PLAN, train_command
from helpers_daemon import AGENT, LIMIT_S, Home, make_home
from helpers_mosquitto import Mosquitto
from helpers_notify import Manager
from helpers_sandbox import boxed, require_sandbox
from helpers_sim import EXAMPLES, boston
from helpers_unit import started
from sordino_common import messages as m
from sordino_server.cli.commands import app
from sordino_server.cli.running import run_cli
from sordino_server.dealer.process import enrol_dealer
from sordino_server.store import RunStore
from sordino_sim.broker import LocalBroker
from sordino_sim.fleet_dir import FleetFolder, write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

SETTINGS = (
    "simulation.agents=2",
    "train.rounds=1",
    "train.local_epochs=null",
    "train.local_steps=5",
    "model.args.hidden=[4]",
    "train.join_s=60",
)
SORDINO = (sys.executable, "-m", "sordino_server.cli")


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


@pytest.fixture
def credentials(tmp_path: Path) -> Path:
    """As systemd leaves them where access control lists are: root's, the list's mask in the group's bits."""
    folder = tmp_path / "credentials"
    folder.mkdir()
    return folder


def hand_over(key: Path, folder: Path, name: str) -> None:
    key.rename(folder / name)
    (folder / name).chmod(0o440 if os.geteuid() == 0 else 0o400)


@pytest.mark.mqtt
def test_the_agent_serves_inside_its_unit(
    home: Home, start_mosquitto: Callable[..., Mosquitto], credentials: Path
) -> None:
    require_sandbox()
    hand_over(home.state / "agent.key", credentials, "sordino-agent.key")
    home.edit("roster: fleet.roster", "roster: fleet.roster\ndevice_key: credential:sordino-agent.key")
    broker = start_mosquitto()
    inside = {"command": boxed("sordino-agent", *AGENT), "environment": {"CREDENTIALS_DIRECTORY": str(credentials)}}
    with started(home, broker, **inside) as unit:
        stage = unit.stage
        unit.until(lambda: stage.server.endpoint.online("pi-01"))
        assert isinstance(stage.ask(m.PlanPut(plan=TRAIN_PLAN)), m.PlanReady)
        assert isinstance(stage.ask(train_command()), m.Trained)
        children = Path(f"/proc/{unit.process.pid}/task/{unit.process.pid}/children").read_text().split()
        (worker,) = children
        assert b"CREDENTIALS_DIRECTORY" not in Path(f"/proc/{worker}/environ").read_bytes()
        assert b"NOTIFY_SOCKET" not in Path(f"/proc/{worker}/environ").read_bytes()
        unit.until(lambda: unit.fed > 2)
        unit.process.send_signal(signal.SIGTERM)
        stage.until(lambda: unit.process.poll() is not None)
        assert unit.process.returncode == 0
        assert "level=ERROR" not in (home.folder / "log").read_text()


def test_a_credential_that_was_not_handed_over_is_named(home: Home, credentials: Path) -> None:
    home.edit("roster: fleet.roster", "roster: fleet.roster\ndevice_key: credential:sordino-agent.key")
    environment = {key: value for key, value in os.environ.items() if key != "CREDENTIALS_DIRECTORY"}

    def run() -> str:
        done = subprocess.run(
            [*AGENT, "run", str(home.folder)], capture_output=True, text=True, timeout=60, check=False, env=environment
        )
        assert done.returncode == 2
        return done.stderr

    assert "credential:sordino-agent.key: no credentials were handed over (CREDENTIALS_DIRECTORY is not set)" in run()
    environment["CREDENTIALS_DIRECTORY"] = str(credentials)
    assert re.search(r"sordino-agent\.key: the device key can't be read: No such file", run())
    hand_over(home.state / "agent.key", credentials, "sordino-agent.key")
    (credentials / "sordino-agent.key").chmod(0o444)
    assert "has mode 0444, others may read it" in run()
    (credentials / "sordino-agent.key").chmod(0o440)
    environment["CREDENTIALS_DIRECTORY"] = str(home.folder)  # a file elsewhere is no credential, whatever its mode
    home.edit("credential:sordino-agent.key", str(credentials / "sordino-agent.key"))
    assert "has mode 0440, others may read it" in run()


# --- server and dealer -------------------------------------------------------------------------------------------


class Service:
    """A process under a manager. Its output goes to a file."""

    def __init__(self, command: list[str], tmp_path: Path, credentials: Path) -> None:
        self.manager = Manager(tmp_path / "notify")
        self.log = tmp_path / "log"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                stdout=log,
                stderr=log,
                env={
                    **os.environ,
                    **self.manager.environment(watchdog_s=1.0),
                    "CREDENTIALS_DIRECTORY": str(credentials),
                    "OPENBLAS_NUM_THREADS": "1",
                },
            )

    def until(self, done: Callable[[], object]) -> None:
        """Read what it tells until `done`; it may not end before."""
        for _ in range(int(LIMIT_S / 0.05)):
            self.manager.read()
            if done():
                return
            try:
                self.process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
            self.manager.read()
            assert done(), self.log.read_text()
        raise AssertionError(f"too late; told: {self.manager.messages}; log: {self.log.read_text()}")

    def end(self) -> int:
        self.until(lambda: self.process.poll() is not None)
        return int(self.process.returncode)


@pytest.fixture
def serve(tmp_path: Path, credentials: Path) -> Iterator[Callable[..., Service]]:
    services: list[Service] = []

    def start(unit: str, *arguments: str) -> Service:
        folder = tmp_path / f"service-{len(services)}"
        folder.mkdir()
        services.append(Service(boxed(unit, *SORDINO, *arguments), folder, credentials))
        return services[-1]

    yield start
    for service in services:
        service.process.kill()
        service.process.wait()
        service.manager.close()


@pytest.fixture
def fleet(tmp_path: Path) -> Iterator[FleetFolder]:
    folder = write_fleet(scenario_of(boston(*SETTINGS)), tmp_path / "fleet")
    with LocalBroker(folder.broker_folder, port=folder.port), AgentProcesses(folder) as agents:
        agents.start_all()
        yield folder


@pytest.mark.mqtt
@pytest.mark.slow
def test_a_run_as_a_service(
    fleet: FleetFolder,
    serve: Callable[..., Service],
    credentials: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    require_sandbox()
    hand_over(fleet.folder / "server.key", credentials, "sordino-server.key")
    with (fleet.folder / "fleet.yaml").open("a") as file:
        file.write("server_key: credential:sordino-server.key\n")
    changes = [part for item in SETTINGS for part in ("--set", item)]
    arguments = ["train", str(EXAMPLES / "boston-fedavg.yaml"), "--fleet", str(fleet.folder), "--run", "ward-1",
                 "--no-baseline", "--quiet", *changes]  # fmt: skip
    service = serve("sordino-server", *arguments)
    assert service.end() == 0, service.log.read_text()
    manager = service.manager
    assert manager.steps == ["READY=1", "STOPPING=1"]
    assert manager.count("WATCHDOG=1") >= 1
    told = [message[0] for message in manager.messages]
    assert any(re.match(r"STATUS=round 1/1: ", line) for line in told), told
    again = Manager(tmp_path / "notify")  # after a reboot: there is nothing to do, and that is no failure
    monkeypatch.setenv("NOTIFY_SOCKET", str(again.path))
    assert run_cli(app, arguments, program="sordino") == 0
    again.read()
    again.close()
    assert again.steps == ["READY=1"]


def test_a_job_that_is_wrong_says_so_in_the_status(serve: Callable[..., Service], tmp_path: Path) -> None:
    require_sandbox()
    service = serve("sordino-server", "train", str(tmp_path / "none.yaml"), "--fleet", str(tmp_path))
    assert service.end() == 2
    assert service.manager.steps == []


def test_the_dashboard_as_a_service(serve: Callable[..., Service], credentials: Path, tmp_path: Path) -> None:
    """Ready when it answers, fed while both of its threads turn; its token is a credential."""
    require_sandbox()
    RunStore(tmp_path, wall_s=lambda: 1.0).close()
    arguments = ("web", "--fleet", str(tmp_path), "--port", "0", "--token-file", "credential:sordino-web.token")
    service = serve("sordino-web", *arguments)
    assert service.end() == 2
    assert "sordino-web.token: can't be read: No such file" in service.manager.status
    (tmp_path / "token").write_text("0123456789abcdef" * 2)
    hand_over(tmp_path / "token", credentials, "sordino-web.token")
    service = serve("sordino-web", *arguments)
    manager = service.manager
    service.until(lambda: manager.count("WATCHDOG=1") >= 2)
    assert re.fullmatch(r"http://127\.0\.0\.1:\d+/", manager.status)
    with pytest.raises(HTTPError, match="401"):
        urlopen(manager.status, timeout=30)
    request = Request(manager.status, headers={"Authorization": "Bearer " + "0123456789abcdef" * 2})
    with urlopen(request, timeout=30) as answer:
        assert b"No run yet" in answer.read()
    service.process.send_signal(signal.SIGTERM)
    assert service.end() == 0, service.log.read_text()
    assert manager.steps == ["READY=1", "STOPPING=1"]


def test_the_dealer_as_a_service(serve: Callable[..., Service], credentials: Path, tmp_path: Path) -> None:
    """Its broker is not there yet: it is ready all the same, and says so."""
    require_sandbox()
    folder = tmp_path / "dealer"
    operator = make_home(tmp_path).operator.public.hex()
    enrol_dealer(folder, name="midas", fleet="demo", operator_key=operator, broker="127.0.0.1:1", server="server")
    hand_over(folder / "dealer.key", credentials, "sordino-dealer.key")
    config = folder / "dealer.yaml"
    config.write_text(config.read_text().replace("\nkey: null\n", "\nkey: credential:sordino-dealer.key\n"))
    service = serve("sordino-dealer", "dealer", "run", str(folder))
    manager = service.manager
    service.until(lambda: manager.count("WATCHDOG=1") >= 2)
    assert manager.status.startswith("midas; not connected: no connection to 127.0.0.1:1")
    (folder / "masks").rename(tmp_path / "aside")
    service.until(lambda: "UNWELL: state: " in manager.status)
    (tmp_path / "aside").rename(folder / "masks")
    service.until(lambda: "UNWELL" not in manager.status)
    service.process.send_signal(signal.SIGTERM)
    assert service.end() == 0, service.log.read_text()
    assert manager.steps == ["READY=1", "STOPPING=1"]
