"""`sordino doctor`: a fleet directory with everything that can be wrong with it, and a real, small fleet."""

from __future__ import annotations

import json
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from helpers_mosquitto import Mosquitto
from helpers_sim import boston
from sordino_common.channel.identity import OperatorKey
from sordino_common.database import schema_version
from sordino_server.cli import app, run_cli
from sordino_server.doctor.host import port_finding, torch_finding
from sordino_server.doctor.members import presence_findings, version_findings
from sordino_server.home import Home
from sordino_server.store import RunStore
from sordino_sim.fleet_dir import write_fleet
from sordino_sim.processes import AgentProcesses
from sordino_sim.scenario import scenario_of

Examine = Callable[..., tuple[int, list[dict[str, Any]]]]


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """A signed fleet of one agent; its broker is nowhere."""
    write_fleet(scenario_of(boston("simulation.agents=1")), tmp_path / "fleet", port=1)
    return tmp_path / "fleet"


@pytest.fixture
def examine(fleet: Path, capsys: pytest.CaptureFixture[str]) -> Examine:
    def run(*arguments: str) -> tuple[int, list[dict[str, Any]]]:
        capsys.readouterr()
        code = run_cli(app, ["doctor", "--fleet", str(fleet), "--json", *arguments], program="sordino")
        said = json.loads(capsys.readouterr().out)
        assert said["exit_code"] == code
        return code, said["findings"]

    return run


def text_of(findings: list[dict[str, Any]], what: str) -> str:
    return "\n".join(f"{f['level']}: {f['text']} -> {f['remedy']}" for f in findings if f["what"] == what)


def test_a_fleet_that_is_well_but_for_its_network(examine: Examine) -> None:
    code, findings = examine("--offline")
    assert code == 0
    assert not [finding for finding in findings if finding["level"] == "error"]
    assert "roster: epoch" not in text_of(findings, "roster") and "epoch 1, 2 parties" in text_of(findings, "roster")
    assert "decides who belongs to the fleet -> once the roster is signed, move it" in text_of(findings, "operator key")
    assert "not tried: the broker's reach" in text_of(findings, "broker")
    assert "on the processor" in text_of(findings, "torch") or "CUDA" in text_of(findings, "torch")


def test_without_a_broker_it_says_what_could_not_be_tried(examine: Examine) -> None:
    code, findings = examine()
    assert code == 3
    text = text_of(findings, "broker")
    assert "error: 127.0.0.1:1: no connection: Connection refused -> is the broker running" in text
    assert "not tried: limits, access rules, the roster that the broker keeps" in text
    assert "not tried: who answers, versions, clocks: the broker was not reached" in text_of(findings, "agents")


@pytest.mark.parametrize(
    ("damage", "code", "what", "words"),
    [
        (lambda f: (f / "server.key").chmod(0o644), 4, "server key", "mode 0644: others may read it -> chmod 600"),
        (lambda f: (f / "operator.key").chmod(0o640), 4, "operator key", "mode 0640: others may read it"),
        (lambda f: (f / "server.key").unlink(), 2, "server key", "No such file"),
        (lambda f: (f / "operator.pub").write_text("zz"), 2, "operator key", "can't be read"),
        (lambda f: (f / "roster.cbor").unlink(), 2, "roster", "it is not signed yet -> sordino roster sign --fleet"),
        (lambda f: (f / "roster.cbor").write_bytes(b"junk"), 4, "roster", "roster.cbor: "),
        (lambda f: f.chmod(0o777), 4, "folder", "can be written by others -> chmod go-w"),
        (lambda f: (f / "roster.yaml").chmod(0o666), 4, "folder", "others can write roster.yaml in"),
        (
            lambda f: (f / "runs.sqlite").write_bytes(b"no database at all" * 99),
            2,
            "database",
            "file is not a database",
        ),
        (lambda f: (f / "enrolment.sqlite").write_bytes(b""), 2, "database", "the enrolment records: damaged"),
        (lambda f: (f / "fleet.yaml").write_text("fleet: [\n"), 2, "fleet", "fleet.yaml:"),
        (lambda f: (f / "format").write_text("9\n"), 2, "fleet", "layout 9, this sordino knows up to 1"),
        (lambda f: shutil.rmtree(f), 2, "fleet", "no fleet.yaml in it"),
    ],
)
def test_each_damage_has_its_name_code_and_remedy(
    fleet: Path, examine: Examine, damage: Callable[[Path], object], code: int, what: str, words: str
) -> None:
    damage(fleet)
    found, findings = examine("--offline")
    assert found == code
    text = text_of([finding for finding in findings if finding["level"] == "error"], what)
    assert words in text
    assert " -> " in text and not text.endswith(" -> ")


def test_keys_that_are_others(fleet: Path, examine: Examine) -> None:
    (fleet / "operator.key").unlink()
    OperatorKey.generate().save(fleet / "operator.key")
    code, findings = examine("--offline")
    assert code == 4 and "not the key of operator.pub" in text_of(findings, "operator key")
    (fleet / "operator.key").unlink()
    shutil.copy(fleet / "agents" / "agent-00" / "state" / "agent.key", fleet / "server.key")
    code, findings = examine("--offline")
    assert code == 4 and "not the key that the signed roster lists for server" in text_of(findings, "server key")
    assert "not here, as it should be" in text_of(findings, "operator key")


def test_a_draft_that_differs_and_records_of_other_schemas(fleet: Path, examine: Examine) -> None:
    Home(fleet).remove("agent-00")
    RunStore(fleet, wall_s=lambda: 0.0).close()
    path = fleet / "runs.sqlite"
    newest = schema_version(path)
    _, findings = examine("--offline")
    assert "warning: the draft differs from what is signed: agent-00 -> sordino roster list" in text_of(
        findings, "roster"
    )
    assert "the run records: whole" in text_of(findings, "database")
    for version, code, words in [
        (newest - 1, 0, f"warning: {path}: schema {newest - 1}; the next command makes it {newest}, and keeps a copy"),
        (newest + 1, 2, f"error: {path}: schema {newest + 1}, of a newer sordino; this one knows up to {newest}"),
    ]:
        with closing(sqlite3.connect(path)) as db:
            db.execute(f"PRAGMA user_version={version}")
        found, findings = examine("--offline")
        assert found == code and words in text_of(findings, "database")
        assert schema_version(path) == version  # looking changes nothing


def test_a_table_for_people(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (fleet / "server.key").chmod(0o644)
    assert run_cli(app, ["doctor", "--fleet", str(fleet), "--offline", "--quiet"], program="sordino") == 4
    said = capsys.readouterr().out
    assert f"-> chmod 600 {fleet / 'server.key'}" in said
    assert "things looked at: 1 errors" in said
    assert "\nok" not in said


def test_what_agents_say_as_findings() -> None:
    def told(findings: Any) -> list[str]:
        return [f"{f.level} {f.exit_code}: {f.text}" for f in findings]

    assert told(presence_findings(("a", "b"), {})) == ["ok 0: all 2 answer"]
    assert told(presence_findings((), {})) == ["warning 0: the roster lists none that holds data"]
    assert told(presence_findings(("a",), {"b": "offline"})) == ["warning 0: 1 of 2 answer; not: b (offline)"]
    unlike = "c speaks protocol 2.0, this side 1.0; only neighbours"
    assert told(presence_findings(("a",), {"c": unlike})) == [f"error 2: {unlike}"]
    assert told(version_findings({"1.0": ["a"]}, ours="1.0")) == ["ok 0: all run 1.0, as this server"]
    assert told(version_findings({"1.0": ["a"], "1.1": ["c", "b"]}, ours="1.0")) == [
        "warning 0: not 1.0 as here, but working together: 1.1: b, c"
    ]


def test_torch_and_ports_as_findings() -> None:
    import socket

    assert torch_finding(version="2", built=None, devices=[]).text == "2, on the processor"
    assert torch_finding(version="2", built="12.8", devices=["H100"]).text == "2, CUDA 12.8: H100"
    idle = torch_finding(version="2", built="12.8", devices=[])
    assert (idle.level, "no GPU can be used" in idle.text) == ("warning", True)
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert port_finding("127.0.0.1", port, "sordino web").level == "warning"
    assert port_finding("127.0.0.1", port, "sordino web").level == "ok"


@pytest.mark.mqtt
def test_a_real_fleet_of_one(
    start_mosquitto: Callable[..., Mosquitto], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broker = start_mosquitto()
    folder = write_fleet(scenario_of(boston("simulation.agents=1")), tmp_path / "fleet", port=broker.port)
    arguments = ["doctor", "--fleet", str(folder.folder), "--json", "--wait", "30"]
    with AgentProcesses(folder) as agents:
        agents.start_all()
        assert run_cli(app, arguments, program="sordino") == 0
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert "all 1 answer" in text_of(findings, "agents")
        assert "agent-00's clock is 0.0 seconds" in text_of(findings, "clock")
        assert "the broker lets this party answer in an agent's place" in text_of(findings, "access rules")
        with Home(folder.folder).occupied():  # as while a training runs
            assert run_cli(app, arguments, program="sordino") == 0
        findings = json.loads(capsys.readouterr().out)["findings"]
        assert "not tried: who answers, versions, clocks: " in text_of(findings, "agents")
        assert "the broker keeps the same: epoch 1" in text_of(findings, "roster")
