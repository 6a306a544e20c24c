"""What is found and said: each finding's text, remedy and exit code, from values; nothing here needs a broker."""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Iterable
from contextlib import closing
from datetime import UTC, datetime, timedelta
from importlib import metadata
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from helpers_channel import FLEET, KEYS, OPERATOR, STRANGER_OPERATOR, WALL_S, entry, roster, signed
from sordino_common.channel.packets import roster_packet
from sordino_common.channel.presence import make_birth, make_death
from sordino_common.channel.roster import sign_roster
from sordino_common.diagnosis import broker, certificates, files, machine, standing
from sordino_common.diagnosis.finding import Finding, count_line, error, exit_code, ok, warning
from sordino_common.messages.protocol import PROTOCOL, ProtocolVersion
from sordino_common.transport.mqtt_settings import MqttSettings
from sordino_common.transport.probe import Granted, Visit
from sordino_common.transport.settings import KIB, MIB, LinkSettings

SETTINGS = MqttSettings(host="broker.example", port=8883, client_id="x")


def told(findings: Iterable[Finding] | Finding) -> str:
    """All that is not well, a line each; what is well if nothing else is."""
    every = [findings] if isinstance(findings, Finding) else list(findings)
    for finding in every:
        assert bool(finding.remedy) == (finding.level != "ok"), finding
        assert (finding.exit_code in (2, 3, 4)) == (finding.level == "error"), finding
    bad = [finding for finding in every if finding.level != "ok"]
    return "\n".join(f"{f.level} {f.exit_code} {f.what}: {f.text} -> {f.remedy}" for f in bad or every)


def test_the_exit_code_is_that_of_the_worst() -> None:
    well, odd = ok("a", "b"), warning("a", "b", "c")
    assert exit_code([well, odd]) == 0
    assert exit_code([odd, error("a", "b", "c", exit_code=3)]) == 3
    assert exit_code([error("a", "b", "c", exit_code=3), error("a", "b", "c", exit_code=4)]) == 4
    assert exit_code([error("a", "b", "c", exit_code=4), error("a", "b", "c")]) == 2
    assert count_line([well, odd, odd]) == "3 things looked at: 0 errors, 2 warnings"


# --- files ----------------------------------------------------------------------------------------------------------


def test_private_files(tmp_path: Path) -> None:
    key = tmp_path / "a.key"
    assert told(files.private_file(key, "key")).startswith(f"error 2 key: {key}: No such file")
    key.write_bytes(b"x")
    key.chmod(0o640)
    assert told(files.private_file(key, "key")) == (
        f"error 4 key: {key} has mode 0640: others may read it -> chmod 600 {key}"
    )
    key.chmod(0o600)
    assert "only its owner may read it" in told(files.private_file(key, "key"))


def test_folders_that_others_can_write_or_replace(tmp_path: Path) -> None:
    folder = tmp_path / "above" / "state"
    assert "is not a folder that this user can write -> mkdir -p" in told(files.own_folder(folder, "state"))
    folder.mkdir(parents=True)
    folder.chmod(0o700)
    assert told(files.own_folder(folder, "state")).startswith("ok 0 state")
    folder.chmod(0o770)
    assert told(files.own_folder(folder, "state")) == (
        f"error 4 state: {folder} can be written by others -> chmod go-w {folder}"
    )
    folder.chmod(0o700)
    folder.parent.chmod(0o777)
    text = told(files.own_folder(folder, "state"))
    assert text.startswith(f"error 4 state: {folder.parent}, above {folder}, can be written by others")
    folder.parent.chmod(0o755)
    (folder / "a.sqlite").write_bytes(b"")
    (folder / "a.sqlite").chmod(0o666)
    assert "error 4 state: others can write a.sqlite in" in told(files.loose_files(folder, "state"))


@pytest.mark.parametrize(
    ("free", "inodes", "words"),
    [
        (200 * MIB, 10**6, "ok 0 disk: 200 MiB are free at /x; for state, 100 MiB are asked for"),
        (50 * MIB, 10**6, "warning 0 disk: 50 MiB are free at /x; for state, 100 MiB"),
        (5 * MIB, 10**6, "error 2 disk: 5 MiB are free at /x; for state, 100 MiB"),
        (200 * MIB, 7, "warning 0 disk: 7 inodes are free at /x"),
    ],
)
def test_room_on_the_disk(free: int, inodes: int, words: str) -> None:
    found = files.disk_findings(
        Path("/x"), free_bytes=free, inodes=inodes, total_inodes=10**7, wanted_bytes=100 * MIB, why="state"
    )
    assert words in told(found)


def test_a_file_system_that_counts_no_inodes_is_not_blamed_for_it() -> None:
    found = files.disk_findings(
        Path("/x"), free_bytes=200 * MIB, inodes=0, total_inodes=0, wanted_bytes=MIB, why="state"
    )
    assert told(found).startswith("ok")


def test_databases_that_are_whole_and_that_are_not(tmp_path: Path) -> None:
    path = tmp_path / "a.sqlite"
    assert list(files.whole_database(path, "the book", remedy="look for it")) == []
    with closing(sqlite3.connect(path)) as db:
        db.execute("CREATE TABLE a (x)")
        db.executemany("INSERT INTO a VALUES (?)", [("x" * 1000,)] * 50)
        db.commit()
    assert told(files.whole_database(path, "the book", remedy="look for it")).startswith("ok 0 database")
    path.write_bytes(path.read_bytes()[:-4096])
    text = told(files.whole_database(path, "the book", remedy="look for it"))
    assert text.startswith(f"error 2 database: {path}, the book: damaged: ") and text.endswith("-> look for it")


# --- the machine ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("available", "limit", "words"),
    [
        (900 * MIB, None, "ok 0 memory: s (256 MiB): 900 MiB are available"),
        (900 * MIB, 512 * MIB, "ok 0 memory: s (256 MiB): 900 MiB are available, MemoryMax is 512 MiB"),
        (None, None, "ok 0 memory: s (256 MiB): what is available can't be read here"),
        (100 * MIB, None, "warning 0 memory: s (256 MiB) does not fit into the 100 MiB available -> lower s"),
        (
            900 * MIB,
            300 * MIB,
            (
                "error 2 memory: s (256 MiB) and 64 MiB for the process pass MemoryMax (300 MiB): the kernel would "
                "kill it -> lower s; or: systemctl set-property u.service MemoryMax=320M"
            ),
        ),
    ],
)
def test_memory_against_what_there_is_and_what_is_allowed(available: int | None, limit: int | None, words: str) -> None:
    found = machine.memory_findings(
        wanted_bytes=256 * MIB,
        setting="s",
        available=available,
        limit=limit,
        base_bytes=64 * MIB,
        unit="u.service",
        remedy="lower s",
    )
    assert words == told(found).removesuffix(" -> ")


def test_the_smallest_limit_on_the_way_up_counts(tmp_path: Path) -> None:
    folder = tmp_path / "system.slice" / "u.service"
    folder.mkdir(parents=True)
    (folder / "memory.max").write_text("400\n")
    (folder.parent / "memory.max").write_text("300\n")
    assert machine.unit_limit_bytes("u.service", tmp_path) == 300
    (folder.parent / "memory.max").write_text("max\n")
    assert machine.unit_limit_bytes("u.service", tmp_path) == 400
    own = tmp_path / "cgroup"
    own.write_text("0::/system.slice/u.service\n")
    assert machine.cgroup_limit_bytes(tmp_path, own) == 400
    assert machine.cgroup_limit_bytes(tmp_path, tmp_path / "nowhere") is None
    assert machine.unit_limit_bytes("not-running.service", tmp_path) is None
    meminfo = tmp_path / "meminfo"
    meminfo.write_text("MemTotal: 9 kB\nMemAvailable:    5 kB\n")
    assert machine.available_bytes(meminfo) == 5 * KIB
    assert machine.available_bytes(tmp_path / "nowhere") is None


@pytest.mark.parametrize(
    ("behind_s", "synchronized", "words"),
    [
        (-10.0, True, "ok 0 clock: 2023-11-14 22:13:20 UTC, kept by a time service"),
        (100.0, None, "ok 0 clock: 2023-11-14 22:13:20 UTC, not behind anything that was signed"),
        (-10.0, False, "warning 0 clock: nothing keeps this clock"),
        (7200.0, True, "error 2 clock: this clock is at least 2 hours behind: the roster was signed later"),
        (40 * 86_400.0, False, "error 2 clock: this clock is at least 40 days behind"),
    ],
)
def test_a_clock_that_is_behind_what_was_signed(behind_s: float, synchronized: bool | None, words: str) -> None:
    found = machine.clock_findings(WALL_S, signed={"the roster": WALL_S + behind_s}, synchronized=synchronized)
    assert words in told(found)


def test_the_kernel_can_be_asked_for_its_clock() -> None:
    assert machine.clock_synchronized() in (True, False, None)


@pytest.mark.parametrize(
    ("theirs_s", "words"),
    [
        (1000.0, "ok 0 clock: a's clock is 0.0 seconds behind this one (to 2.0 s)"),
        (1121.0, "ok 0 clock: a's clock is 2 minutes ahead of this one (to 2.0 s)"),
        (1123.0, "warning 0 clock: a's clock is 2 minutes ahead of this one -> on a, and here: timedatectl"),
        (1000.0 - 7200, "warning 0 clock: a's clock is 2 hours behind this one"),
    ],
)
def test_skew_is_told_beyond_the_doubt(theirs_s: float, words: str) -> None:
    assert words in told(machine.skew_finding("a", theirs_s=theirs_s, asked_s=998.0, answered_s=1002.0))


def test_versions_against_what_the_package_asks_for() -> None:
    there = {"sordino": "0.1.0", "cbor2": "6.1.3", "numpy": "2.4.6"}

    def installed(name: str) -> str:
        if name not in there:
            raise metadata.PackageNotFoundError(name)
        return there[name]

    text = told(
        machine.version_findings(
            requires=["cbor2>=6.1.4", "numpy>=1.26", "paho-mqtt>=2.1", 'torch>=2.6; extra == "torch"'],
            installed=installed,
            python=(3, 10),
        )
    )
    assert text.splitlines() == [
        "error 2 versions: Python 3.10, 3.11 or newer is needed -> install a newer Python",
        "error 2 versions: cbor2 6.1.3, 6.1.4 or newer is needed -> pip install 'cbor2>=6.1.4'",
        "error 2 versions: paho-mqtt is not installed -> pip install 'paho-mqtt>=2.1'",
    ]
    assert f"sordino 0.1.0, protocol {PROTOCOL}" in told(machine.version_findings(requires=[], installed=installed))
    assert "is not installed as a package" in told(machine.version_findings("never-heard-of"))


# --- certificates ---------------------------------------------------------------------------------------------------


def certificate(*, begins_days: float, ends_days: float) -> x509.Certificate:
    now = datetime.fromtimestamp(WALL_S, UTC)
    key, name = Ed25519PrivateKey.generate(), x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "a")])
    return (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(5)
        .not_valid_before(now + timedelta(days=begins_days))
        .not_valid_after(now + timedelta(days=ends_days))
        .sign(key, None)
    )


@pytest.mark.parametrize(
    ("begins", "ends", "words"),
    [
        (-1, 90, "ok 0 certificates: ours: valid until 2024-02-12, 90 days"),
        (-1, 29.5, "warning 0 certificates: ours: ends on 2023-12-14, in 30 days -> renew it"),
        (-9, -3, "error 2 certificates: ours: ended on 2023-11-11, 3 days ago -> renew it"),
        (1, 90, "error 2 certificates: ours: not valid before 2023-11-15 22:13 UTC -> is this clock right?"),
    ],
)
def test_certificates_end(begins: float, ends: float, words: str) -> None:
    made = certificate(begins_days=begins, ends_days=ends)
    assert words in told(certificates.dates(made, "ours", now_s=WALL_S, renew="renew it"))


def test_every_certificate_of_a_file_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "a.pem"
    text = told(certificates.certificate_files(path, "ours", now_s=WALL_S, renew="renew it"))
    assert text == f"error 2 certificates: ours {path}: No such file or directory -> renew it"
    path.write_text("nothing")
    assert "expected certificates in PEM" in told(
        certificates.certificate_files(path, "ours", now_s=WALL_S, renew="renew it")
    )
    pair = [certificate(begins_days=-1, ends_days=days).public_bytes(Encoding.PEM) for days in (90, 3)]
    path.write_bytes(b"".join(pair))
    found = list(certificates.certificate_files(path, "ours", now_s=WALL_S, renew="renew it"))
    assert [finding.level for finding in found] == ["ok", "warning"]
    der = certificate(begins_days=-1, ends_days=3).public_bytes(Encoding.DER)
    assert "the broker's: ends on" in told(certificates.broker_certificate(der, now_s=WALL_S))


# --- the broker -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("visit", "words"),
    [
        (
            Visit(failed="resolve", reason="Name or service not known"),
            "the name can't be resolved: Name or",
        ),
        (Visit(failed="connect", reason="Connection refused"), "no connection: Connection refused -> is the broker"),
        (
            Visit(failed="tls", reason="certificate has expired"),
            "TLS fails: certificate has expired -> openssl",
        ),
        (
            Visit(failed="mqtt", reason="Not authorized"),
            "it does not let us in: Not authorized -> check",
        ),
        (
            Visit(failed="visit", reason="Packet too large"),
            "it ended the visit: Packet too large -> see",
        ),
    ],
)
def test_how_far_we_came(visit: Visit, words: str) -> None:
    text = told(broker.reach_findings(SETTINGS, visit))
    assert text.startswith("error 3 broker: broker.example:8883: ") and words in text


def test_without_tls_on_a_network() -> None:
    well = Visit(addresses=("192.0.2.1",), tls_version="TLSv1.3")
    assert told(broker.reach_findings(SETTINGS, well)) == (
        "ok 0 broker: broker.example:8883 (192.0.2.1) lets us in, TLSv1.3 -> "
    )
    assert "without TLS" in told(broker.reach_findings(SETTINGS, Visit(addresses=("192.0.2.1",))))
    local = MqttSettings(host="127.0.0.1", client_id="x")
    assert told(broker.reach_findings(local, Visit())).startswith("ok")


@pytest.mark.parametrize(
    ("granted", "roster_bytes", "words"),
    [
        (Granted(), 0, "ok 0 packet size: the broker takes packets of any size; ours have 262656 at most"),
        (
            Granted(max_packet_bytes=1100),
            0,
            "error 3 packet size: the broker takes packets of 1100 bytes; mess",
        ),
        (Granted(max_packet_bytes=1100), 0, "bytes need 1692 -> set max_packet_size 2000000"),
        (
            Granted(max_packet_bytes=100_000),
            0,
            "warning 0 packet size: the broker takes packets of 100000 bytes: large",
        ),
        (
            Granted(max_packet_bytes=500_000),
            600_000,
            "error 3 packet size: .*; the signed roster has 600000 -> set",
        ),
        (Granted(maximum_qos=0), 0, "error 3 broker limits: the broker takes QoS 0 only"),
        (Granted(retain_available=False), 0, "error 3 broker limits: the broker retains nothing"),
        (
            Granted(wildcards_available=False),
            0,
            "error 3 broker limits: the broker takes no subscription with",
        ),
        (Granted(receive_maximum=1), 0, "warning 0 broker limits: 1 packets may be unacknowledged, we would use 16"),
    ],
)
def test_limits_against_ours(granted: Granted, roster_bytes: int, words: str) -> None:
    text = told(broker.limit_findings(granted, SETTINGS, LinkSettings(), roster_bytes=roster_bytes))
    assert re.search(re.escape(words).replace(r"\.\*", ".*"), text), text


def test_access_rules_from_what_a_visit_found() -> None:
    rules = broker.agent_rules(FLEET, "alto", "hub")
    own = tuple(f"sordino/{FLEET}/{rest}" for rest in ("alto/cmd", "alto/peer/+", "hub/status", "hub/roster"))
    assert rules.subscribe[:4] == own
    granted = dict.fromkeys(rules.subscribe, "")
    refused = "Not authorized"
    published = {**dict.fromkeys((*rules.may, *rules.strangers), ""), **dict.fromkeys(rules.may_not, refused)}
    (echo,) = rules.echoes
    (stranger,) = rules.strangers
    right = Visit(subscribed=granted, published=published, delivered={echo: b""})
    assert told(broker.access_findings(rules, right, own=own)) == (
        "ok 0 access rules: 4 things that this party needs are allowed, 5 that it must not do are refused -> "
    )
    tight = Visit(
        subscribed={**granted, own[0]: refused}, published={**published, f"sordino/{FLEET}/alto/reply": refused}
    )
    text = told(broker.access_findings(rules, tight, own=own))
    assert text.startswith(
        "error 3 access rules: the broker does not let this party subscribe to sordino/ward/alto/cmd"
    )
    assert "answer the server (sordino/ward/alto/reply: Not authorized)" in text
    assert f"read what agents write to it ({echo})" in text
    loose = Visit(
        subscribed=granted,
        published={**published, f"sordino/{FLEET}/hub/roster": ""},
        delivered={echo: b"", stranger: b""},
    )
    text = told(broker.access_findings(rules, loose, own=own))
    assert text.startswith(
        "warning 0 access rules: the broker lets this party publish a roster; read what agents write"
    )


# --- standing -------------------------------------------------------------------------------------------------------


def test_a_roster_ends() -> None:
    mine = roster(expires_s=WALL_S + 100 * 86_400)
    assert told(standing.roster_ends(mine, now_s=WALL_S)) == (
        "ok 0 roster: epoch 1, 4 parties, valid until 2024-02-22, 100 days -> "
    )
    soon = told(standing.roster_ends(roster(expires_s=WALL_S + 5 * 86_400), now_s=WALL_S))
    assert soon.startswith("warning 0 roster: epoch 1 expires on 2023-11-19, in 5 days -> sordino roster sign")
    over = told(standing.roster_ends(mine, now_s=WALL_S + 101 * 86_400))
    assert over.startswith("error 4 roster: epoch 1 has expired on 2024-02-22")
    entries = [entry("hub"), entry("alto", not_after_s=WALL_S + 86_400), entry("bass")]
    text = told(standing.roster_ends(roster(entries=entries, expires_s=WALL_S + 100 * 86_400), now_s=WALL_S))
    assert text.startswith("warning 0 roster: entries that end within 30 days, or have ended: alto -> renew them")


@pytest.mark.parametrize(
    ("kept", "owner", "words"),
    [
        (None, "agent", "warning 0 roster: the broker keeps no roster -> start the server once"),
        (b"junk", "agent", "error 4 roster: what the broker keeps as the roster is not one of this operator"),
        (roster_packet(sign_roster(roster(), STRANGER_OPERATOR)), "agent", "error 4 roster: what the broker keeps"),
        (roster_packet(signed(2)), "agent", "ok 0 roster: the broker keeps the same: epoch 2"),
        (roster_packet(signed(3)), "agent", "warning 0 roster: the broker keeps epoch 3, ours is 2 -> start the agent"),
        (roster_packet(signed(3)), "server", "warning 0 roster: .* ours is 2 -> put the newest roster.cbor here"),
        (
            roster_packet(signed(1)),
            "agent",
            "warning 0 roster: .* epoch 1, older than ours, 2 -> tell the",
        ),
        (roster_packet(signed(1)), "server", "warning 0 roster: .* 2 -> sordino agents --fleet DIR publishes ours"),
        (
            roster_packet(signed(2, expires_s=WALL_S + 9)),
            "agent",
            "error 4 roster: .*another roster of epoch 2 than",
        ),
    ],
)
def test_the_roster_that_the_broker_keeps(kept: bytes | None, owner: str, words: str) -> None:
    text = told(standing.retained_roster(kept, roster(epoch=2), operator_key=OPERATOR.public, owner=owner))
    assert re.search(words.replace("(", r"\("), text), text
    if kept == roster_packet(signed(3)):
        alone = told(standing.retained_roster(kept, None, operator_key=OPERATOR.public, owner=owner))
        assert alone.startswith("ok 0 roster: the broker keeps epoch 3; this")


def test_the_servers_birth() -> None:
    fields = {"fleet": FLEET, "name": "hub", "boot": 1, "connection": 1}
    birth = make_birth(KEYS["hub"], version="0.1.0", epoch=1, **fields)  # type: ignore[arg-type]
    assert "online, version 0.1.0, protocol" in told(standing.server_birth(birth, roster(), ours="0.1.0"))
    assert "(ours 0.2.0: they work together)" in told(standing.server_birth(birth, roster(), ours="0.2.0"))
    death = make_death(KEYS["hub"], **fields)  # type: ignore[arg-type]
    assert "not online now" in told(standing.server_birth(death, roster(), ours="0.1.0"))
    assert "knows of no birth of the server" in told(standing.server_birth(None, roster(), ours="0.1.0"))
    other = ProtocolVersion(PROTOCOL.major + 1, 0)
    newer = make_birth(KEYS["hub"], version="9", epoch=1, protocol=other, **fields)  # type: ignore[arg-type]
    text = told(standing.server_birth(newer, roster(), ours="0.1.0"))
    assert text.startswith(f"error 2 versions: hub speaks protocol {other}, this side {PROTOCOL}")
    forged = make_birth(KEYS["alto"], version="9", epoch=1, **fields)  # type: ignore[arg-type]
    assert told(standing.server_birth(forged, roster(), ours="0.1.0")).startswith(
        "error 4 server: its retained birth is"
    )
