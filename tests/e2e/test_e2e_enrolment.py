"""Enrolment over a real broker: the commands of both sides, real agents, and what others at the broker can't do."""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from helpers_enrol import FleetBroker, RawClient, make_fleet
from helpers_mosquitto import require_mosquitto
from sordino_agent.cli import main as agent_main
from sordino_agent.config import load_agent_config
from sordino_agent.errand import Errand
from sordino_common.channel.certificates import read_certificate
from sordino_common.channel.enrolment import from_text, read_grant_packet, read_token, token_tls_key
from sordino_common.channel.roster import RosterEntry
from sordino_common.transport.topics import grant_topic, request_topic, token_user
from sordino_server.cli import app, run_cli
from sordino_server.dealer.process import open_dealer
from sordino_server.enrolment.broker_config import BrokerPlan
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.enrolment.tokens import make_tokens
from sordino_server.fleet import open_fleet
from sordino_server.home import Home

pytestmark = [pytest.mark.mqtt, pytest.mark.timeout(180)]
PATIENCE_S = 60.0


class Town:
    """A fleet, its broker, and devices beside it."""

    def __init__(self, folder: Path, home: Home, plan: BrokerPlan, broker: FleetBroker) -> None:
        self.folder = folder
        self.fleet = home.folder
        self.plan = plan
        self.broker = broker
        self.running: list[subprocess.Popen[bytes]] = []

    def sordino(self, *arguments: object) -> int:
        return run_cli(app, [*map(str, arguments), "--fleet", str(self.fleet)], program="sordino")

    def agent(self, *arguments: object) -> int:
        return agent_main([str(argument) for argument in arguments])

    def device(self, name: str) -> Path:
        return self.folder / name

    def start(self, name: str) -> subprocess.Popen[bytes]:
        with (self.device(name) / "agent.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sordino_agent", "run", str(self.device(name))],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
            )
        self.running.append(process)
        return process

    def log_has(self, name: str, pattern: str) -> None:
        deadline_s = time.monotonic() + PATIENCE_S
        process = self.running[-1]
        while time.monotonic() < deadline_s:
            text = (self.device(name) / "agent.log").read_text()
            if re.search(pattern, text):
                return
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(0.02)
        raise AssertionError(f"no {pattern!r} in the log of {name}:\n{text}")

    def stop(self) -> None:
        for process in self.running:
            process.terminate()
        for process in self.running:
            process.wait(PATIENCE_S)


@pytest.fixture
def town(tmp_path: Path) -> Iterator[Town]:
    require_mosquitto()
    home, broker_folder, plan = make_fleet(tmp_path)
    with FleetBroker(broker_folder) as broker:
        made = Town(tmp_path, home, plan, broker)
        yield made
        made.stop()


def token_of(town: Town, capsys: pytest.CaptureFixture[str], *options: str) -> str:
    capsys.readouterr()
    assert town.sordino("enroll-token", "--json", *options) == 0
    return str(json.loads(capsys.readouterr().out)["token"])


def pending(town: Town, capsys: pytest.CaptureFixture[str]) -> list[dict[str, object]]:
    capsys.readouterr()
    assert town.sordino("roster", "pending", "--json") == 0
    found: list[dict[str, object]] = json.loads(capsys.readouterr().out)["pending"]
    return found


def enrol(town: Town, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    token = token_of(town, capsys, "--name", name)
    assert town.agent("enroll", token, "--dir", town.device(name), "--wait", "0") == 0
    assert town.sordino("roster", "approve", name, "--yes") == 0
    assert town.agent("enroll", "--dir", town.device(name), "--wait", "20") == 0


def test_from_token_to_a_fleet_and_out_again(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("pi-01", "pi-02"):
        enrol(town, name, capsys)
        town.start(name)
    town.log_has("pi-01", "connected=True")
    capsys.readouterr()
    assert town.sordino("agents", "--json", "--wait", "20") == 0
    agents = json.loads(capsys.readouterr().out)["agents"]
    assert [(row["name"], row["online"]) for row in agents] == [("pi-01", True), ("pi-02", True)]
    # The agents run on while one is renewed: it takes the new certificate when it connects again.
    assert town.agent("renew", town.device("pi-01"), "--wait", "0") == 0
    assert town.sordino("roster", "renew") == 0
    assert town.agent("renew", town.device("pi-01"), "--wait", "20") == 0
    # And one is revoked: at once for everybody's sessions, whatever connection it holds.
    assert town.sordino("roster", "revoke", "pi-02", "--yes") == 0
    said = capsys.readouterr().out
    assert "certificates revoked: 1" in said and "epoch 3 signed" in said
    town.log_has("pi-01", "event=roster epoch=3")
    assert town.sordino("agents", "--json", "--wait", "20") == 0
    agents = json.loads(capsys.readouterr().out)["agents"]
    assert [(row["name"], row["online"]) for row in agents] == [("pi-01", True)]
    town.broker.stop()
    town.broker.start()
    town.log_has("pi-02", "does not accept our client certificate")
    assert town.sordino("agents", "--json", "--wait", "20") == 0
    agents = json.loads(capsys.readouterr().out)["agents"]
    assert [(row["name"], row["online"]) for row in agents] == [("pi-01", True)]
    assert town.agent("check", town.device("pi-02")) == 4
    assert town.sordino("roster", "revoke", "pi-02", "--yes") == 2
    assert "pi-02 is not in the roster" in capsys.readouterr().err


def test_a_server_that_runs_follows_a_roster_that_another_process_has_signed(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("pi-01", "pi-02"):
        enrol(town, name, capsys)
    assert town.sordino("roster", "sign") == 0  # epoch 3; the broker has 2 until the server is there
    refusals: list[str] = []
    with open_fleet(Home(town.fleet), version="test") as connection:
        connection.conductor.on_refusal = lambda sender, error: refusals.append(f"{sender}: {error}")  # type: ignore[method-assign]
        assert town.sordino("roster", "revoke", "pi-02", "--yes") == 0
        book = connection.endpoint._book

        def followed() -> bool:
            return book.current is not None and book.current.epoch == 4

        assert connection.reactor.run_until(followed, deadline_s=connection.reactor.now_s() + PATIENCE_S)
        assert book.current is not None
        assert [entry.name for entry in book.current.entries] == ["pi-01", "server"]
    assert refusals == []


JOB = """\
job: wear
mode: spdz
model: {file: linear.py}
data: {dataset: boiler, features: [load, heat], target: wear, task: regression, standardize: given,
       offset: [0.5, 0.5], scale: [0.3, 0.3]}
loss: mse
optimizer: {name: sgd, lr: 0.03}
train: {rounds: 1, local_epochs: 1, batch_rows: 16, seed: 1}
spdz:
  compute_agents: 3
  ranges: {x: 4, y: 4, params: 4, preactivations: 8, values: 16, updates: 0.25}
  outputs: {model: server, loss: server}
"""
POLICY = """\
datasets: [{name: boiler, path: rows.csv, test_rows: 20}]
policy:
  jobs: [describe, evaluate, spdz-compute, spdz-data]
  plans: any
  spdz: {outputs: {model: [server], loss: [server], prediction: [server]}}
"""


@pytest.mark.slow
def test_members_speak_with_one_another_under_the_access_rules(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    """A session on shares: what agents send each other is all that it consists of."""
    names = ["pi-01", "pi-02", "pi-03"]
    for number, name in enumerate(names):
        token = token_of(town, capsys, "--name", name, "--roles", "data,compute")
        assert town.agent("enroll", token, "--dir", town.device(name), "--wait", "0") == 0
        rows = "".join(f"{k % 7 / 7},{k % 11 / 11},{(k + number) % 7 / 7}\n" for k in range(80))
        (town.device(name) / "rows.csv").write_text(f"load,heat,wear\n{rows}")
    assert town.sordino("roster", "approve", *names, "--yes") == 0
    for name in names:
        assert town.agent("enroll", "--dir", town.device(name), "--wait", "20") == 0
        config = town.device(name) / "agent.yaml"
        config.write_text(config.read_text().partition("\n# What this device offers")[0] + "\n" + POLICY)
        town.start(name)
    (town.folder / "linear.py").write_text(
        "from torch import nn\n\n\ndef make_model():\n    return nn.Linear(2, 1)\n"
    )  # fmt: skip
    (town.folder / "job.yaml").write_text(JOB)
    capsys.readouterr()
    assert town.sordino("train", town.folder / "job.yaml", "--no-baseline", "--quiet", "--json") == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["agents"], summary["security"]) == (3, "active")


def token_client(town: Town, text: str, *, client_id: str) -> RawClient:
    token = read_token(text)
    path = town.folder / f"{client_id}.pem"
    pem = token_tls_key(token.secret).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path.write_bytes(pem + read_certificate(token.certificate).public_bytes(Encoding.PEM))
    return RawClient(
        town.plan.enrol_port, ca=town.fleet / "ca" / "ca.pem", identity=path, client_id=client_id
    )  # fmt: skip


def test_what_is_thrown_into_the_box_is_refused_and_taken_out(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    """The holder of one token: rubbish, what is too large, another's request. Then its own still counts."""
    assert town.sordino("roster", "sign") == 0
    mine, other = token_of(town, capsys), token_of(town, capsys)
    assert town.agent("enroll", other, "--name", "pi-02", "--dir", town.device("pi-02"), "--offline") == 0
    stolen = Errand(load_agent_config(town.device("pi-02") / "agent.yaml"), "enrol", wall_s=time.time).begin().packet
    place = request_topic("lab", token_user(read_token(mine).id))
    client = token_client(town, mine, client_id="thief")
    assert client.connect()
    for payload, words in ((b"rubbish", "CBOR"), (stolen, "left in the place of"), (bytes(50_000), "")):
        assert client.may_publish(place, payload, retain=True)
        assert pending(town, capsys) == []
        if words:
            assert client.may_publish(place, payload, retain=True)
            assert town.sordino("roster", "pending") == 0
            assert words in capsys.readouterr().err
    client.close()
    assert town.agent("enroll", mine, "--name", "pi-01", "--dir", town.device("pi-01"), "--wait", "0") == 0
    assert [row["name"] for row in pending(town, capsys)] == ["pi-01"]


def test_the_second_device_with_a_token_is_refused(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    assert town.sordino("roster", "sign") == 0
    token = token_of(town, capsys)
    for name in ("pi-01", "pi-02"):
        assert town.agent("enroll", token, "--name", name, "--dir", town.device(name), "--wait", "0") == 0
        assert [row["name"] for row in pending(town, capsys)] == ["pi-01"]
    (row,) = pending(town, capsys)
    assert "its token was also used by other keys" in str(row["warning"])
    capsys.readouterr()
    assert town.sordino("roster", "approve", "pi-02", "--yes") == 2
    assert "there is no request of 'pi-02'" in capsys.readouterr().err
    # The first is approved; the second one sees an answer that is not for it, and takes nothing.
    assert town.sordino("roster", "approve", "pi-01", "--yes") == 0
    assert town.agent("enroll", "--dir", town.device("pi-02"), "--wait", "0.5") == 3
    assert "not approved within 0.5 s" in capsys.readouterr().err
    assert not (town.device("pi-02") / "state" / "broker.pem").exists()


def test_a_broker_that_gives_out_other_grants(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    """Whoever can write there (here: the server itself) puts a damaged grant in the place of the true one."""
    token = token_of(town, capsys, "--name", "pi-01")
    assert town.agent("enroll", token, "--dir", town.device("pi-01"), "--wait", "0") == 0
    assert town.sordino("roster", "approve", "pi-01", "--yes") == 0
    assert town.sordino("roster", "grant", "pi-01", "-o", town.folder / "grant.txt") == 0
    who = token_user(read_token(token).id)
    server = RawClient(
        town.plan.port, ca=town.fleet / "ca" / "ca.pem", identity=town.fleet / "server.pem", client_id="evil"
    )
    assert server.connect()
    errand = Errand(load_agent_config(town.device("pi-01") / "agent.yaml"), "enrol", wall_s=time.time)
    true = read_grant_packet(from_text((town.folder / "grant.txt").read_text(), "grant"))
    damaged = dataclasses.replace(true, certificate=true.certificate[:-1] + b"\0")
    assert server.may_publish(grant_topic("lab", who), damaged.packet(), retain=True)
    capsys.readouterr()
    assert town.agent("enroll", "--dir", town.device("pi-01"), "--wait", "0.5") == 4
    assert "not issued by the fleet's authority" in capsys.readouterr().err
    assert server.may_publish(grant_topic("lab", who), true.packet(), retain=True)
    server.close()
    assert errand.begin().digest == true.request
    assert town.agent("enroll", "--dir", town.device("pi-01"), "--wait", "20") == 0
    assert town.agent("enroll", "--dir", town.device("pi-01")) == 0
    assert "is enrolled already" in capsys.readouterr().out


def test_by_hand_without_the_broker(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    token = token_of(town, capsys)
    town.broker.stop()
    device = town.device("pi-01")
    assert town.agent("enroll", token, "--name", "pi-01", "--dir", device, "--offline") == 0
    shown = re.search(r"fingerprint +(\S+)", capsys.readouterr().out)
    assert town.sordino("roster", "receive", device / "enrolment.request") == 0
    assert shown is not None and shown.group(1) in capsys.readouterr().out
    assert town.sordino("roster", "pending") == 3
    assert "--offline" in capsys.readouterr().err
    assert town.sordino("roster", "approve", "pi-01", "--yes", "--offline") == 0
    assert town.sordino("roster", "grant", "pi-01", "-o", town.folder / "grant.txt") == 0
    assert town.agent("enroll", "--dir", device, "--grant", town.folder / "grant.txt") == 0
    town.broker.start()
    assert town.sordino("roster", "deliver") == 0
    assert town.agent("check", device) == 0


def test_rotation_with_keys_elsewhere(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    enrol(town, "pi-01", capsys)
    safe = town.folder / "safe"
    safe.mkdir()
    (town.fleet / "operator.key").rename(safe / "operator.key")
    (town.fleet / "ca" / "ca.key").rename(safe / "ca.key")
    (safe / "ca.pem").write_bytes((town.fleet / "ca" / "ca.pem").read_bytes())
    assert town.agent("rotate", town.device("pi-01"), "--wait", "0") == 0
    (row,) = pending(town, capsys)
    assert row["purpose"] == "rotate" and row["old_fingerprint"] != row["fingerprint"]
    assert town.sordino("roster", "approve", str(row["fingerprint"]), "--yes") == 0
    assert "sordino roster export" in capsys.readouterr().err
    order, signed = town.folder / "order.txt", town.folder / "signed.txt"
    assert town.sordino("roster", "export", "-o", order) == 0
    assert town.sordino("roster", "sign", "--order", order, "--keys", safe, "-o", signed) == 2
    assert "say --yes" in capsys.readouterr().err
    assert town.sordino("roster", "sign", "--order", order, "--keys", safe, "-o", signed, "--yes") == 0
    assert re.search(rf"new +pi-01 +{row['fingerprint']}", capsys.readouterr().out)
    assert town.sordino("roster", "import", signed) == 0
    assert town.agent("rotate", town.device("pi-01"), "--wait", "20") == 0
    assert town.agent("check", town.device("pi-01")) == 0
    assert str(row["fingerprint"]) in capsys.readouterr().out


def test_refusing_withdrawing_and_fetching(town: Town, capsys: pytest.CaptureFixture[str]) -> None:
    assert town.sordino("roster", "fetch") == 2
    assert "keeps no roster of this fleet" in capsys.readouterr().err
    assert town.sordino("roster", "sign") == 0
    assert town.sordino("roster", "deliver") == 0
    assert town.sordino("roster", "fetch") == 0
    assert "epoch 1 is in force, here it was 1; revoked with it: nobody" in capsys.readouterr().out
    assert town.sordino("roster", "sign") == 0
    assert town.sordino("roster", "fetch") == 0
    assert "the roster here, epoch 2, is newer than the broker's" in capsys.readouterr().out
    # A request that the operator does not want, and the token that it came with.
    token = token_of(town, capsys)
    device = town.device("pi-01")
    assert town.agent("enroll", token, "--name", "pi-01", "--dir", device, "--wait", "0") == 0
    assert [row["name"] for row in pending(town, capsys)] == ["pi-01"]
    assert town.sordino("roster", "refuse", "pi-01") == 0
    assert pending(town, capsys) == []
    assert town.agent("enroll", "--dir", device, "--wait", "0") == 0  # it may ask as often as it likes
    assert pending(town, capsys) == []
    other = token_of(town, capsys, "--name", "pi-02")
    number = read_token(other).id.hex()
    assert town.sordino("enroll-token", "--withdraw", number) == 0
    capsys.readouterr()
    assert town.sordino("enroll-token", "--list", "--json") == 0
    states = {row["id"]: row["state"] for row in json.loads(capsys.readouterr().out)["tokens"]}
    assert states == {read_token(token).id.hex(): "used", number: "withdrawn"}
    assert town.agent("enroll", other, "--dir", town.device("pi-02"), "--wait", "0") == 0
    assert town.sordino("roster", "pending") == 0
    assert f"token {number} was withdrawn" in capsys.readouterr().err
    # Another token in the same folder: the device begins anew, with the keys that it has.
    fresh = token_of(town, capsys, "--name", "pi-02")
    assert town.agent("enroll", fresh, "--dir", town.device("pi-02"), "--wait", "0") == 0
    assert [row["name"] for row in pending(town, capsys)] == ["pi-02"]


def test_many_at_once(town: Town, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Tokens in files, approved by the fingerprints that the devices have shown, and put out by one command."""
    names = [f"pi-{number:02}" for number in range(1, 5)]
    (tmp_path / "names").write_text("# ward 7\n" + "\n".join(names))
    folder = tmp_path / "tokens"
    bulk = ("enroll-token", "--names", tmp_path / "names", "-o", folder)
    assert town.sordino(*bulk) == 0
    said = capsys.readouterr().err
    assert "4 tokens (each for the device that it names), each once, until " in said
    assert f"In {folder}; on a device: sordino-agent enroll - <FILE" in said
    assert folder.stat().st_mode & 0o777 == 0o700
    assert {path.name: path.stat().st_mode & 0o777 for path in folder.iterdir()} == dict.fromkeys(
        [f"{name}.token" for name in names], 0o600
    )
    fingerprints = []
    for name in names:
        text = (folder / f"{name}.token").read_text()
        assert town.agent("enroll", text, "--dir", town.device(name), "--wait", "0") == 0
        fingerprints += re.findall(r"(?m)^fingerprint +(\S+)$", capsys.readouterr().out)
    assert town.sordino("roster", "approve", "--yes", *fingerprints[:3]) == 0  # one signature for all
    said = capsys.readouterr().out
    assert "epoch 1 signed: 4 parties" in said
    assert "delivered: the roster, and certificates for pi-01, pi-02, pi-03" in said
    # Files that are there stay, and of what was made for a list that can't be written nothing can be used.
    assert town.sordino(*bulk) == 2
    assert "pi-01.token: can't be written: File exists; it holds an earlier token" in capsys.readouterr().err
    assert town.sordino("enroll-token", "--list", "--json") == 0
    states = [row["state"] for row in json.loads(capsys.readouterr().out)["tokens"]]
    assert sorted(states) == ["used"] * 4 + ["withdrawn"] * 4
    # A name that is none leaves all in; then three of them go in one epoch.
    assert town.sordino("roster", "revoke", "pi-01", "pi-02", "pi-20", "--yes") == 2
    assert "pi-20 is not in the roster" in capsys.readouterr().err
    assert town.sordino("roster", "revoke", "pi-01", "pi-02", "pi-01", "--yes") == 0
    said = capsys.readouterr().out
    assert said.count("is out of the draft; certificates revoked: 1") == 2 and "epoch 2 signed: 2 parties" in said
    assert town.sordino("roster", "refuse", "pi-04", "pi-21") == 2
    assert [row["name"] for row in pending(town, capsys)] == ["pi-04"]
    assert town.sordino("roster", "refuse", "pi-04") == 0


def test_tokens_for_whoever_says_its_name(
    town: Town, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert town.sordino("enroll-token", "--count", "3") == 0
    shown = capsys.readouterr()
    assert len(re.findall(r"(?m)^sordino-agent enroll 'sordino-token-1\.[\w-]+'$", shown.out)) == 3
    assert "3 tokens (on each device, add --name NAME), each once, until" in shown.err
    monkeypatch.setattr("sys.stdin", io.StringIO("pi-01\npi-02\n"))
    assert town.sordino("enroll-token", "--names", "-") == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.partition("  # ")[2] for line in lines] == ["pi-01", "pi-02"]
    assert town.sordino("enroll-token", "--count", "2", "-o", tmp_path / "t", "--json") == 0
    rows = json.loads(capsys.readouterr().out)["tokens"]
    for row in rows:
        assert read_token(Path(row["file"]).read_text()).id.hex() == row["id"] and "token" not in row
    (tmp_path / "names").touch()
    identities = [row["id"] for row in rows]
    assert town.sordino("enroll-token", "--withdraw", identities[0], "--withdraw", "00" * 16) == 2
    assert town.sordino("enroll-token", *(part for one in identities for part in ("--withdraw", one))) == 0
    assert capsys.readouterr().out.count("is withdrawn") == 2
    for options, words in (
        (("--name", "pi-01", "--count", "2"), "a name is one device's. For several: --names FILE"),
        (("--names", "x", "--count", "2"), "neither --name nor --count goes with it"),
        (("--names", str(tmp_path / "none")), "none: can't be read: No such file"),
        (("-o", str(tmp_path / "names" / "x")), "x: can't be made: Not a directory"),
    ):
        assert town.sordino("enroll-token", *options) == 2
        assert words in capsys.readouterr().err


def test_errors_that_name_the_remedy(town: Town, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert town.sordino("roster", "approve", "pi-01", "--yes", "--offline") == 2
    assert "sordino roster pending" in capsys.readouterr().err
    assert town.agent("enroll", "nonsense", "--dir", tmp_path / "x") == 2
    assert "begins with sordino-token-1." in capsys.readouterr().err
    assert not (tmp_path / "x").exists()
    with EnrolmentStore(town.fleet) as store:
        (old,) = make_tokens(
            Home(town.fleet), store, [None], roles=("data",), zone="default", hours=1,
            enrol_port=town.plan.enrol_port, now_s=time.time() - 7200,
        )  # fmt: skip
    token = old.text()
    assert town.agent("enroll", token, "--dir", tmp_path / "x") == 2
    assert "--name is missing" in capsys.readouterr().err
    assert town.agent("enroll", "--dir", tmp_path / "x") == 2
    capsys.readouterr()
    assert town.agent("enroll", token, "--name", "pi-01", "--dir", tmp_path / "x", "--wait", "0") == 3
    assert "has the token expired?" in capsys.readouterr().err
    enrol(town, "pi-01", capsys)
    other = token_of(town, capsys)
    assert town.agent("enroll", other, "--name", "pi-09", "--dir", town.device("pi-01")) == 2
    assert "is the configuration of pi-01" in capsys.readouterr().err
    assert town.agent("renew", town.device("pi-01"), "--if-due") == 0
    assert "nothing to do" in capsys.readouterr().out
    (town.device("pi-01") / "state" / "broker.pem").chmod(0o644)
    assert town.agent("renew", town.device("pi-01")) == 2
    assert "chmod 600" in capsys.readouterr().err


def test_a_dealer_is_enrolled_as_a_device_and_connects_with_its_certificate(
    town: Town, capsys: pytest.CaptureFixture[str]
) -> None:
    member, folder = town.device("midas"), town.folder / "midas-dealer"
    token = token_of(town, capsys, "--name", "midas")
    assert town.agent("enroll", token, "--dir", member, "--wait", "0") == 0
    assert town.sordino("roster", "approve", "midas", "--roles", "dealer", "--yes") == 0
    assert town.agent("enroll", "--dir", member, "--wait", "20") == 0
    assert run_cli(app, ["dealer", "init", str(folder), "--member", str(member)], program="sordino") == 0
    assert "spdz: {dealer: midas}" in capsys.readouterr().out
    assert not (folder / "dealer.key").exists()  # one identity, in one place
    with open_dealer(folder, version="test") as (reactor, service):
        deadline_s = reactor.now_s() + PATIENCE_S
        done = reactor.run_until(lambda: service.connected and (folder / "roster.cbor").exists(), deadline_s=deadline_s)
        assert done, service.reason
    entry = next(entry for entry in town_roster(town) if entry.name == "midas")
    assert entry.roles == ("dealer",)


def town_roster(town: Town) -> tuple[RosterEntry, ...]:
    current = Home(town.fleet).roster_book(wall_s=time.time).current
    assert current is not None
    return tuple(current.entries)


def test_what_a_dealer_is_made_of_is_said_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def call(*options: str) -> str:
        assert run_cli(app, ["dealer", "init", str(tmp_path / "d"), *options], program="sordino") == 2
        return capsys.readouterr().err

    assert "give --name, --fleet, --operator-key and --broker, or --member" in call("--name", "midas")
    for option in ("--name", "--server"):
        text = "--member says name, fleet, operator's key, broker and server already"
        assert text in call("--member", "x", option, "midas")
    assert "agent.yaml: can't be read" in call("--member", str(tmp_path / "nobody"))
    assert not (tmp_path / "d").exists()
