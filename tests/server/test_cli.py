"""The command line without a broker: fleets and rosters, runs, exit codes, what goes to which stream."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from helpers_postgres import Postgres
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.roster import read_roster
from sordino_common.errors import BudgetRefused, ConfigError, FleetUnavailable, SignatureError
from sordino_server.cli import app, run_cli
from sordino_server.cli.manual import tree_of
from sordino_server.cli.output import print_table, table_of
from sordino_server.home import Home, parse_broker
from sordino_server.rounds.effects import Checkpoint, Scaling
from sordino_server.rounds.events import RoundRecord, Share
from sordino_server.store import RunStore

EXAMPLES = Path(__file__).parents[2] / "examples"


def call(*arguments: str | Path) -> int:
    return run_cli(app, [str(argument) for argument in arguments], program="sordino")


def request(folder: Path, device: str, **fields: object) -> Path:
    key = DeviceKey.generate().public
    path = folder / f"{device}.json"
    path.write_text(
        json.dumps(
            {"name": device, "fleet": "lab", "roles": ["data"], "sign_key": key.sign_key.hex(),
             "box_key": key.box_key.hex(), "fingerprint": key.fingerprint, **fields}
        )
    )  # fmt: skip
    return path


@pytest.fixture
def fleet(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Path:
    assert call("init", tmp_path / "lab", "--fleet", "lab", "--broker", "broker.example:1884") == 0
    said = capsys.readouterr().out
    assert Home(tmp_path / "lab").operator_public().hex() in said
    assert "PRIVATE" not in said
    return tmp_path / "lab"


def test_run_records_in_a_database(
    fleet: Path, postgres: Postgres, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The option, the environment and fleet.yaml, in this order; and what is said of an address that is none."""
    urls = [postgres.url() for _ in range(3)]
    for url, run in zip(urls, ("by-option", "by-environment", "by-file"), strict=True):
        with RunStore(fleet, wall_s=lambda: 1.7e9, database=url) as store:
            store.create(run, job="j", mode="federated", job_path="", job_json="{}", model_sha256="", names=())
    with (fleet / "fleet.yaml").open("a") as file:
        file.write(f"database: {urls[2]}\n")

    def listed(*more: str) -> list[str]:
        assert call("runs", "--fleet", fleet, "--json", *more) == 0
        return [row["run"] for row in json.loads(capsys.readouterr().out)["runs"]]

    assert listed() == ["by-file"]
    monkeypatch.setenv("SORDINO_DATABASE", urls[1])
    assert listed() == ["by-environment"]
    assert listed("--database", urls[0]) == ["by-option"]
    assert call("show", "by-option", "--fleet", fleet) == 2
    assert "no run by-option in PostgreSQL database" in capsys.readouterr().err
    assert call("show", "by-option", "--fleet", fleet, "--database", urls[0]) == 0
    for address, words in (
        ("mysql://h/x", "expected postgresql://USER@HOST/NAME, found 'mysql'"),
        ("postgresql://u:secret@[h/x", "expected postgresql://USER@HOST/NAME"),
    ):
        assert call("runs", "--fleet", fleet, "--database", address) == 2
        said = capsys.readouterr().err
        assert words in said and "secret" not in said
    gone = f"postgresql://u:secret@/x?host={fleet}"
    assert call("runs", "--fleet", fleet, "--database", gone) == 3
    said = capsys.readouterr().err
    assert "no connection" in said and "Is the server running" in said and "secret" not in said


def test_without_psycopg_the_remedy_is_named(
    fleet: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "psycopg", None)
    monkeypatch.delitem(sys.modules, "sordino_server.database.postgres", raising=False)
    assert call("runs", "--fleet", fleet, "--database", "postgresql://h/x") == 2
    assert "pip install 'sordino[postgres]'" in capsys.readouterr().err


def test_init_makes_keys_that_nobody_else_reads(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("operator.key", "server.key"):
        assert (fleet / name).stat().st_mode & 0o777 == 0o600
    home = Home(fleet)
    assert (home.spec.fleet, home.spec.broker.host, home.spec.broker.port) == ("lab", "broker.example", 1884)
    assert call("init", fleet, "--fleet", "lab", "--broker", "b") == 2
    assert "there is a fleet in it already" in capsys.readouterr().err


def test_a_roster_grows_by_epochs(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    requests = [request(tmp_path, f"agent-{k}") for k in range(3)]
    assert call("roster", "add", *requests, "--fleet", fleet, "--zone", "ward-7") == 0
    capsys.readouterr()
    assert call("roster", "list", "--fleet", fleet, "--json") == 0
    listed = json.loads(capsys.readouterr().out)
    assert (listed["epoch"], [e["state"] for e in listed["entries"]]) == (0, ["not signed yet"] * 4)
    assert call("roster", "sign", "--fleet", fleet) == 0
    home = Home(fleet)
    roster = read_roster((fleet / "roster.cbor").read_bytes(), operator_key=home.operator_public())
    assert (roster.epoch, len(roster.entries), roster.server.name) == (1, 4, "server")
    assert roster.entry("agent-1").zone == "ward-7"
    assert call("roster", "remove", "agent-1", "--fleet", fleet) == 0
    capsys.readouterr()
    assert call("roster", "list", "--fleet", fleet, "--json") == 0
    states = {e["name"]: e["state"] for e in json.loads(capsys.readouterr().out)["entries"]}
    assert states["agent-1"] == "removed, not signed yet"
    assert call("roster", "sign", "--fleet", fleet) == 0
    assert home.roster_book(wall_s=lambda: 1.7e9).current.epoch == 2  # type: ignore[union-attr]
    assert call("roster", "add", requests[0], "--roles", "data,compute", "--fleet", fleet) == 0
    assert next(e for e in home.draft().entries if e.name == "agent-0").roles == ("data", "compute")
    assert home.draft().epoch == 2
    # A draft that was put back can't take the epoch back with it.
    (fleet / "roster.yaml").write_text((fleet / "roster.yaml").read_text().replace("epoch: 2", "epoch: 0"))
    assert call("roster", "sign", "--fleet", fleet) == 0
    assert home.roster_book(wall_s=lambda: 1.7e9).current.epoch == 3  # type: ignore[union-attr]


REFUSED = {
    "another fleet": ({"fleet": "plant"}, "the request is for fleet plant, this is lab"),
    "role": ({"roles": ["king"]}, "no enrolment request: Invalid enum value 'king'"),
    "short key": ({"sign_key": "00"}, "no enrolment request: Expected `str` matching regex"),
    "name": ({"name": "Agent 1"}, "no enrolment request: Expected `str` matching regex"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_requests_that_are_refused(what: str, fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fields, words = REFUSED[what]
    before = (fleet / "roster.yaml").read_bytes()
    assert call("roster", "add", request(tmp_path, "agent-1", **fields), "--fleet", fleet) == 2
    assert words in capsys.readouterr().err
    assert (fleet / "roster.yaml").read_bytes() == before


def test_a_name_or_key_is_in_the_roster_once(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    first = request(tmp_path, "agent-1")
    assert call("roster", "add", first, "--fleet", fleet) == 0
    (tmp_path / "other").mkdir()
    assert call("roster", "add", request(tmp_path / "other", "agent-1"), "--fleet", fleet) == 2
    assert "agent-1 is in the roster with other keys" in capsys.readouterr().err
    first.write_text(first.read_text().replace("agent-1", "agent-2"))
    assert call("roster", "add", first, "--fleet", fleet) == 2
    assert "agent-1 has these keys already" in capsys.readouterr().err
    assert call("roster", "remove", "server", "--fleet", fleet) == 2
    assert call("roster", "remove", "agent-9", "--fleet", fleet) == 2


def test_one_process_speaks_for_a_fleet(fleet: Path) -> None:
    home = Home(fleet)
    with home.occupied(), pytest.raises(ConfigError, match=r"another sordino process \(pid \d+\)"), home.occupied():
        pass
    with home.occupied():
        pass


def test_training_needs_a_signed_roster_and_a_broker(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    job = EXAMPLES / "boston-fedavg.yaml"
    assert call("train", job, "--fleet", fleet) == 2
    assert "the roster is not signed yet; do: sordino roster sign" in capsys.readouterr().err
    assert call("roster", "sign", "--fleet", fleet) == 0
    (fleet / "fleet.yaml").write_text("fleet: lab\nbroker: {host: 127.0.0.1, port: 1, connect_timeout_s: 0.3}\n")
    capsys.readouterr()
    assert call("train", job, "--fleet", fleet, "--json", "--quiet") == 3
    caught = capsys.readouterr()
    assert caught.out == ""
    assert "sordino: the broker 127.0.0.1:1 gave no connection" in caught.err.splitlines()[-1]
    assert f"is the address in {fleet / 'fleet.yaml'} right?" in caught.err.splitlines()[-1]
    assert call("runs", "--fleet", fleet, "--json") == 0
    assert json.loads(capsys.readouterr().out) == {"runs": []}


def test_what_train_refuses_before_it_connects(fleet: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert call("train", "--fleet", fleet) == 2
    assert "name a job file, or a run with --resume" in capsys.readouterr().err
    assert call("train", EXAMPLES / "boston-fedavg.yaml", "--fleet", fleet, "--set", "mode=quantum") == 2
    assert "there is no mode 'quantum'" in capsys.readouterr().err
    assert call("train", "--resume", "x", "--seed", "1", "--fleet", fleet) == 2
    assert call("train", "--resume", "x", "--fleet", fleet) == 2
    assert "there is no run x" in capsys.readouterr().err


def test_runs_show_and_export(fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    record = RoundRecord(
        round=1,
        loss=0.5,
        metrics={"test_mse": 9.25},
        shares={"agent-0": Share(outcome="answered", rows=3, steps=1), "agent-1": Share(outcome="missing", note="off")},
        steps=1,
        attempts=1,
        bytes_up=1500,
        bytes_down=2_000_000,
        seconds=1.0,
    )
    with RunStore(fleet, wall_s=lambda: 1.7e9) as store:
        store.create("r-1", job="toy", mode="federated", job_path="", job_json="{}", model_sha256="", names=("w",))
        store.save(
            "r-1",
            Checkpoint(params=(np.ones(3, np.float32),), scaling=Scaling(), steps=1, record=record),
            elapsed_s=1,
        )
        store.finish("r-1", "interrupted", error="stopped by SIGINT")
    assert call("runs", "--fleet", fleet) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("r-1 ")]
    assert "test_mse 9.250" in line and "UTC" in line  # not folded: a script reads it
    assert call("show", "r-1", "--fleet", fleet) == 0
    shown = capsys.readouterr().out
    for words in ("interrupted", "1.5 kB", "2.0 MB", "1/2", "stopped by SIGINT", "--resume r-1"):
        assert words in shown
    assert call("show", "r-1", "--fleet", fleet, "--json") == 0
    value = json.loads(capsys.readouterr().out)
    assert value["records"][0]["shares"]["agent-1"]["note"] == "off"
    assert call("export", "r-1", "-o", tmp_path / "m.safetensors", "--fleet", fleet) == 0
    assert (tmp_path / "m.safetensors").stat().st_size > 0
    assert call("show", "r-2", "--fleet", fleet) == 2


def test_plans_prints_what_an_owner_allows(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("plans", EXAMPLES / "boston-fedavg.yaml", "--json") == 0
    first = json.loads(capsys.readouterr().out)
    assert first["parameters"] == 13 * 64 + 64 + 64 + 1
    assert call("plans", EXAMPLES / "boston-fedavg.yaml", "--json", "--set", "train.seed=9") == 0
    assert json.loads(capsys.readouterr().out) == first  # a Plan holds no parameters
    assert call("plans", EXAMPLES / "boston-fedavg.yaml", "--json", "--set", "train.batch_rows=8") == 0
    assert json.loads(capsys.readouterr().out)["plans"]["train"] != first["plans"]["train"]


CODES = [
    (ConfigError("a\nb"), 2, "sordino: a b"),
    (FleetUnavailable("nobody"), 3, "sordino: nobody"),
    (SignatureError("forged"), 4, "sordino: forged"),
    (BudgetRefused("spent"), 5, "sordino: spent"),
    (ValueError("oops"), 1, "a bug in sordino: ValueError: oops"),
]


@pytest.mark.parametrize(("error", "code", "words"), CODES, ids=lambda value: type(value).__name__)
def test_exit_codes(error: BaseException, code: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    application = typer.Typer()

    @application.command()
    def fail() -> None:
        raise error

    assert run_cli(application, [], program="sordino") == code
    caught = capsys.readouterr()
    assert caught.out == ""
    assert words in caught.err
    assert len(caught.err.splitlines()) == 1


@pytest.mark.parametrize("arguments", [["bogus"], ["train", "--rounds"], ["agents", "--wait", "soon"], []])
def test_usage_errors_end_with_2(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert call(*arguments) == 2
    assert capsys.readouterr().out == ""


def test_broker_addresses() -> None:
    assert parse_broker("broker") == ("broker", 1883)
    assert parse_broker("broker:8883") == ("broker", 8883)
    assert parse_broker("[::1]:1884") == ("::1", 1884)
    for text in ("", ":1883", "broker:x", "[::1", "broker:0", "broker:65536"):
        with pytest.raises(ConfigError, match="expected"):
            parse_broker(text)


def test_names_of_a_new_fleet_are_names(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, words in (
        (("--fleet", "Lab"), "fleet 'Lab': expected 1 to 63 lower-case letters, digits and -, the first of them no -"),
        (("--fleet", "lab", "--server", "-x"), "server '-x': expected 1 to 63 lower-case letters"),
    ):
        assert call("init", str(tmp_path / "new"), "--broker", "broker", *arguments) == 2
        assert words in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_tables_for_scripts_have_a_line_for_each_row_and_no_blanks_at_its_end(
    capsys: pytest.CaptureFixture[str],
) -> None:
    table = table_of("name", "found")
    table.add_row("a", "x" * 200)
    table.add_row("b", "y")
    print_table(table)
    assert capsys.readouterr().out == f"name  found\na     {'x' * 200}\nb     y\n"


def test_the_version_needs_no_command(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("--version") == 0
    assert capsys.readouterr().out == "sordino 0.1.0\n"
    assert any(option.names == ("--version",) for option in tree_of(app, "sordino", summary="x").options)
