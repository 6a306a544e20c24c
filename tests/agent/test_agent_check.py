"""`sordino-agent check`: an agent's folder with everything that can be wrong with it."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import msgspec
import pytest

from helpers_daemon import Home, make_home
from helpers_mosquitto import Mosquitto
from sordino_agent.budget_report import AccountReport
from sordino_agent.check import check, exit_code
from sordino_agent.check_offer import budget_findings
from sordino_agent.spdz.journal import BurnJournal
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.roster import Roster, RosterEntry, read_roster, sign_roster
from sordino_common.diagnosis.finding import Finding
from sordino_server.enrolment.broker_config import members_acl


@pytest.fixture
def home(tmp_path: Path) -> Home:
    return make_home(tmp_path)


def text_of(findings: list[Finding], what: str) -> str:
    return "\n".join(f"{f.level}: {f.text} -> {f.remedy}" for f in findings if f.what == what)


def test_offline_it_says_what_it_has_not_tried(home: Home) -> None:
    findings = check(home.folder / "agent.yaml", offline=True)
    assert exit_code(findings) == 0
    assert text_of(findings, "broker").startswith("warning: not tried: reach, limits, access rules")
    assert "it lists this device, with its key, as data in zone default" in text_of(findings, "roster")
    assert "MiB are free at" in text_of(findings, "disk")


def test_without_a_network_the_rest_is_still_looked_at(home: Home) -> None:
    findings = check(home.folder / "agent.yaml", offline=False)
    assert exit_code(findings) == 3
    text = text_of(findings, "broker")
    assert "error: 127.0.0.1:1: no connection: Connection refused -> is the broker running" in text
    assert "not tried: limits, access rules, the roster that the broker keeps, the server's version" in text
    assert "rows to train on" in text_of(findings, "datasets")


def test_a_key_that_only_the_unit_is_given_is_said_to_be_untried(home: Home) -> None:
    home.edit("executor: numpy", "device_key: credential:agent.key\nexecutor: numpy")
    findings = check(home.folder / "agent.yaml", offline=True)
    assert "warning: not tried: " in text_of(findings, "key") and "credential:agent.key" in text_of(findings, "key")
    assert exit_code(findings) == 0


def meddle(home: Home, statement: str) -> None:
    BurnJournal(home.state / "journal.sqlite").close()
    with closing(sqlite3.connect(home.state / "journal.sqlite")) as db:
        db.execute(statement)


def cut_short(home: Home) -> None:
    journal = BurnJournal(home.state / "journal.sqlite")
    for k in range(2):
        journal.burn_session(bytes([k]) * 16, run="r1", wall_s=0.0)
    journal.close()
    with closing(sqlite3.connect(home.state / "journal.sqlite")) as db:
        db.execute("DELETE FROM sessions WHERE session = ?", (bytes(16),))
        db.commit()


def sign_again(home: Home, **changes: object) -> None:
    """A roster of the next epoch in which pi-01 is another."""
    old = read_roster(home.signed, operator_key=home.operator.public)
    mine = old.entry("pi-01")
    fields = {name: getattr(mine, name) for name in RosterEntry.__slots__}
    entry = RosterEntry(**{**fields, **changes})
    now = int(time.time())
    entries = (entry, old.server)
    new = Roster(fleet="demo", epoch=2, issued_s=now, expires_s=now + 10 * 86_400, entries=entries)
    (home.folder / "fleet.roster").write_bytes(sign_roster(new, home.operator))


def other_keys(home: Home) -> None:
    keys = DeviceKey.generate().public
    sign_again(home, sign_key=keys.sign_key, box_key=keys.box_key)


@pytest.mark.parametrize(
    ("damage", "code", "what", "words"),
    [
        (lambda h: (h.state / "agent.key").chmod(0o640), 4, "key", "mode 0640: others may read it -> chmod 600"),
        (lambda h: (h.state / "agent.key").write_text("x"), 2, "key", "no device key"),
        (lambda h: h.state.chmod(0o777), 4, "state", "can be written by others -> chmod go-w"),
        (other_keys, 4, "roster", "the roster lists other keys for pi-01"),
        (lambda h: sign_again(h, name="pi-99"), 4, "roster", "'pi-01' is not in epoch 2"),
        (
            lambda h: sign_again(h, not_after_s=int(time.time()) + 86_400),
            0,
            "roster",
            "entries that end within 30 days",
        ),
        (lambda h: meddle(h, "PRAGMA user_version=7"), 2, "database", "schema 7, of a newer sordino-agent"),
        (lambda h: (h.state / "journal.mark").write_text("3\n"), 2, "database", "is missing, but"),
        (cut_short, 2, "database", "1 entries, but it has had 2: cut short, or an old copy"),
        (lambda h: (h.state / "sums.sqlite").write_bytes(b"x" * 999), 2, "database", "file is not a database"),
        (
            lambda h: h.edit('host: "127.0.0.1"', 'host: "x"\n  tls: {ca: nowhere.pem}'),
            2,
            "certificates",
            "No such file",
        ),
    ],
)
def test_each_damage_has_its_name_code_and_remedy(
    home: Home, damage: Callable[[Home], object], code: int, what: str, words: str
) -> None:
    damage(home)
    findings = check(home.folder / "agent.yaml", offline=True)
    assert exit_code(findings) == code, findings
    text = text_of([finding for finding in findings if finding.level != "ok"], what)
    assert words in text
    assert all(finding.remedy for finding in findings if finding.level != "ok")


ACCOUNT = AccountReport(
    dataset="toy",
    split="train",
    unit="record",
    budget="epsilon 3",
    delta=1e-5,
    epsilon=1.0,
    epsilon_limit=3.0,
    rho=None,
    runs=(),
    last_noise_multiplier=1.0,
    last_sampling_rate=1.0,
    rounds_left=12,
)


@pytest.mark.parametrize(
    ("changes", "level", "words"),
    [
        (
            {},
            "ok",
            "toy, train rows, unit record: epsilon 2 of 3 is left at delta 1e-05, 12 more answers like the last",
        ),
        ({"epsilon": 2.9}, "warning", "epsilon 0.1 of 3 is left"),
        ({"rounds_left": 0}, "warning", "0 more answers like the last"),
        ({"epsilon": 3.5, "rounds_left": None}, "warning", "epsilon 0 of 3 is left at delta 1e-05"),
    ],
)
def test_what_is_left_of_a_budget(changes: dict[str, object], level: str, words: str) -> None:
    (finding,) = budget_findings(msgspec.structs.replace(ACCOUNT, **changes))  # type: ignore[type-var]
    assert (finding.level, words in finding.text) == (level, True)
    assert list(budget_findings(msgspec.structs.replace(ACCOUNT, epsilon_limit=None))) == []


@pytest.mark.mqtt
def test_at_a_broker_with_the_fleets_rules(
    home: Home, start_mosquitto: Callable[..., Mosquitto], tmp_path: Path
) -> None:
    rules = tmp_path / "rules.acl"
    rules.write_text(members_acl("demo", "server"))
    broker = start_mosquitto(f"acl_file {rules}", "max_packet_size 100000")
    home.edit("  port: 1\n", f"  port: {broker.port}\n  username: pi-01\n")
    before = sorted(path.name for path in home.state.iterdir())
    findings = check(home.folder / "agent.yaml", offline=False)
    assert exit_code(findings) == 0, findings
    assert "4 things that this party needs are allowed" in text_of(findings, "access rules")
    assert "packets of 100000 bytes: large messages go in parts of" in text_of(findings, "packet size")
    assert "the broker keeps no roster" in text_of(findings, "roster")
    assert "knows of no birth of the server" in text_of(findings, "server")
    assert sorted(path.name for path in home.state.iterdir()) == before  # a check writes nothing
