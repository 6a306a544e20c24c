"""Support bundles: planted secrets, in every place and encoding, are in none of them; what helps is."""

from __future__ import annotations

import base64
import io
import json
import os
import re
import tarfile
import urllib.parse
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ec import SECP256R1, generate_private_key
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)

from sordino_agent import cli
from sordino_agent.enrol import enrol
from sordino_agent.support import make_bundle
from sordino_common.channel.identity import OperatorKey
from sordino_common.daemon.bundle import KEEP, SET, Bundle, select
from sordino_common.daemon.scrub import REMOVED, Scrubber, secrets_in, secrets_of_environment, secrets_of_yaml
from sordino_common.errors import ConfigError
from sordino_server.cli import app, run_cli
from sordino_server.home import create_home
from sordino_server.store import RunStore
from sordino_server.support import make_bundle as make_server_bundle

Planted = tuple[Path, list[bytes], Path]  # an agent's folder, its secrets, a log with all of them

PASSWORD = "correct horse/battery+staple=9"
WEAK = "1883"  # also the broker's port
TOKEN = "tok-7Hq2vXnRk3mZp9wLs4Ybd8Jf"


def encodings(secret: bytes, *, core: bool = False) -> Iterator[str]:
    """Ways in which a text may carry it; `core`: what must not be left of it."""
    try:
        text = secret.decode()
        yield from (text, urllib.parse.quote(text), urllib.parse.quote(text, safe=""), urllib.parse.quote_plus(text))
        yield json.dumps(text)[1:-1]
    except UnicodeDecodeError:
        pass
    yield from (secret.hex(), secret.hex().upper(), ":".join(f"{byte:02x}" for byte in secret))
    for before, after in ((b"", b""), (b"\xff", b"\xff"), (b"\xff\xff", b"")):
        coded = base64.b64encode(before + secret + after).decode()
        if core:  # the letters that are the secret's own, whatever stands beside it
            coded = coded[-(-8 * len(before) // 6) : 8 * (len(before) + len(secret)) // 6]
        yield from (coded, coded.replace("+", "-").replace("/", "_"))
    yield base64.b32encode(secret).decode().rstrip("=")


def seeds(pem: bytes) -> list[bytes]:
    blocks = re.findall(rb"-----BEGIN PRIVATE KEY-----.*?-----END PRIVATE KEY-----\n", pem, re.DOTALL)
    return [
        load_pem_private_key(block, None).private_bytes(Encoding.Raw, PrivateFormat.Raw, NoEncryption())  # type: ignore[union-attr]
        for block in blocks
    ]


def tls_key() -> tuple[bytes, bytes]:
    """(PEM, DER) of a broker certificate's key."""
    key = generate_private_key(SECP256R1())
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    return pem, key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption())


def planted_log(folder: Path, secrets: list[bytes], pem: bytes) -> Path:
    """Lines as our programs write them, into whose texts every secret has got, and lines of others."""
    path = folder / "agent.log"
    lines = [f"level=WARNING logger=x event=odd reason={form!r}" for secret in secrets for form in encodings(secret)]
    lines += [f"level=INFO logger=x event=odd n=1 {line}" for line in pem.decode().splitlines()]
    lines += [
        'level=INFO logger=x event=url reason="postgresql://ada:geheim77@db/x Authorization: Bearer abcd1234"',
        "level=INFO logger=x event=odd password: hunter22, next=1",
        "level=INFO logger=sordino event=start boot=3",
        '{"level":"INFO","event":"odd","api_key":"sesame-open"}',
        "somebody else's line with secret-of-theirs",
    ]
    path.write_text("\n".join(lines) + "\n")
    return path


UNKNOWN = ("geheim77", "hunter22", "abcd1234", "sesame-open", "secret-of-theirs")  # found by what stands around them


def texts(data: bytes) -> dict[str, str]:
    with tarfile.open(fileobj=io.BytesIO(data)) as tar:
        assert all(member.isfile() and member.mode == 0o600 and not member.name.startswith("/") for member in tar)
        return {m.name.split("/", 1)[1]: tar.extractfile(m).read().decode() for m in tar}  # type: ignore[union-attr]


def assert_clean(data: bytes, secrets: list[bytes]) -> dict[str, str]:
    found = texts(data)
    whole = "\n".join(found.values())
    joined = re.sub(r"\s|\\n", "", whole)  # a key may be broken over lines
    for secret in secrets:
        for form in encodings(secret, core=True):
            assert form not in whole, f"{form[:12]}... is in the bundle"
            assert len(form) < 16 or form not in joined
    for word in UNKNOWN:
        assert word not in whole, word
    assert "PRIVATE KEY" not in whole
    return found


@pytest.fixture
def agent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Planted:
    folder = tmp_path / "agent"
    enrol(folder, name="pi-01", fleet="demo", operator_key=OperatorKey.generate().public.hex(), broker="127.0.0.1:1883")
    pem, der = tls_key()
    (folder / "broker-key.pem").write_bytes(pem)
    (folder / "broker.password").write_text(PASSWORD + "\n")
    (folder / "broker.password").chmod(0o600)
    text = (folder / "agent.yaml").read_text()
    text = re.sub(r"^broker:\n(?:  .*\n)*", "broker: {host: 127.0.0.1, port: 1883, username: pi-01, "
                  "tls: {key: broker-key.pem}}\nbroker_password_file: broker.password\n", text, flags=re.M)  # fmt: skip
    (folder / "agent.yaml").write_text(text)
    monkeypatch.setenv("SORDINO_WEB_TOKEN", TOKEN)
    keys = seeds((folder / "state" / "agent.key").read_bytes())
    assert len(keys) == 2
    secrets = [*keys, der, PASSWORD.encode(), TOKEN.encode()]
    log = planted_log(tmp_path, secrets, (folder / "state" / "agent.key").read_bytes() + pem)
    monkeypatch.setenv("PATH", str(fake_journal(tmp_path, log)) + os.pathsep + os.environ["PATH"])
    return folder, secrets, log


def fake_journal(tmp_path: Path, log: Path) -> Path:
    """A `journalctl` whose lines carry the same secrets, and fields that nobody asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    entries = tmp_path / "journal"
    more = {"PRIORITY": "6", "_CMDLINE": "x --password hunter22"}
    lines = [json.dumps({"MESSAGE": line, **more}) for line in log.read_text().splitlines()]
    lines += [json.dumps({"MESSAGE": "x", "SORDINO_EVENT": "odd", "SORDINO_REASON": PASSWORD, **more})]
    lines += [json.dumps({"MESSAGE": "Main process exited, code=killed", "SYSLOG_IDENTIFIER": "systemd", **more})]
    entries.write_text("\n".join(lines) + "\n")
    program = folder / "journalctl"
    program.write_text(f"#!/bin/sh\ncat {entries}\n")
    program.chmod(0o755)
    return folder


def test_an_agents_bundle_holds_what_helps_and_no_secret(
    agent: Planted, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, secrets, log = agent
    out = tmp_path / "out.tar.gz"
    assert cli.main(["support-bundle", str(folder), "-o", str(out), "--log", str(log)]) == 0
    assert out.stat().st_mode & 0o777 == 0o600
    found = assert_clean(out.read_bytes(), secrets)
    assert json.loads(found["config.json"])["broker"] == {
        "host": "127.0.0.1", "port": 1883, "username": "(set)", "password": None, "client_id": "(set)",
        **{k: v for k, v in json.loads(found["config.json"])["broker"].items() if k.endswith("_s") or "_bytes" in k},
        "window": 16, "tls": {"ca": None, "certificate": None, "key": "(set)", "server_name": None},
    }  # fmt: skip
    assert "numpy" in json.loads(found["versions.json"]) and "MemTotal" in found["system.json"]
    assert {finding["what"] for finding in json.loads(found["check.json"])} >= {"configuration", "state", "key"}
    assert "event=start boot=3" in found["log-1.txt"] and REMOVED in found["log-1.txt"]
    assert "Main process exited" in found["journal.jsonl"] and '"SORDINO_EVENT": "odd"' in found["journal.jsonl"]
    assert "_CMDLINE" not in found["journal.jsonl"] and '"PRIORITY": "6"' in found["journal.jsonl"]
    assert any(entry["name"] == "agent.key" for entry in json.loads(found["files.json"]))
    assert "status.json" in found["README.txt"].split("Left out:")[1]  # it has never run
    said = capsys.readouterr().out
    for name in found:
        assert name in said
    assert "not sent to anybody" in said
    assert cli.main(["support-bundle", str(folder), "-o", str(out)]) == 2  # never overwritten
    assert "there is a file of this name" in capsys.readouterr().err


def test_list_writes_nothing(
    agent: Planted,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    before = set(tmp_path.iterdir())
    assert cli.main(["support-bundle", str(agent[0]), "--list"]) == 0
    assert set(tmp_path.iterdir()) == before and "config.json" in capsys.readouterr().out


BROKEN = {
    "not YAML": "agent: [\nbroker_password: 'correct horse/battery+staple=9'\n",
    "a password in the file": "agent: {name: pi-01, fleet: demo}\nbroker: {password: '%s', prot: 1}\n",
    "gone": None,
}


@pytest.mark.parametrize("what", BROKEN)
def test_a_broken_configuration_still_gives_a_bundle(what: str, agent: Planted, tmp_path: Path) -> None:
    folder, secrets, log = agent
    text = BROKEN[what]
    if text is None:
        (folder / "agent.yaml").unlink()
        secrets = []
    else:
        (folder / "agent.yaml").write_text(text.replace("%s", PASSWORD))
    bundle = make_bundle(folder / "agent.yaml", logs=[log] if text is not None else [])
    bundle.write(tmp_path / "b.tar.gz")
    found = assert_clean((tmp_path / "b.tar.gz").read_bytes(), [s for s in secrets if len(s) < 100])
    assert "config.json" not in found and "Left out:\n  config.json" in found["README.txt"]


def test_a_weak_password_goes_too_and_takes_some_numbers_along(agent: Planted, tmp_path: Path) -> None:
    folder, _, _ = agent
    (folder / "broker.password").write_text(WEAK + "\n")
    make_bundle(folder / "agent.yaml").write(tmp_path / "b.tar.gz")
    assert WEAK not in "".join(texts((tmp_path / "b.tar.gz").read_bytes()).values())


def test_a_servers_bundle_holds_what_helps_and_no_secret(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "lab"
    home = create_home(folder, fleet="lab", server="server", broker="broker.example:1884")
    home.sign(now_s=1.7e9)
    pem, der = tls_key()
    (folder / "server-key.pem").write_bytes(pem)
    (folder / "web.token").write_text(TOKEN + "\n")
    (folder / "broker.password").write_text(PASSWORD + "\n")
    (folder / "fleet.yaml").write_text(
        "fleet: lab\nbroker: {host: broker.example, port: 1884, username: u, password_file: broker.password, "
        "tls: {key: server-key.pem}}\n"
    )
    monkeypatch.setenv("PGPASSWORD", "db-geheim-4711")
    keys = [*seeds((folder / "server.key").read_bytes()), *seeds((folder / "operator.key").read_bytes())]
    assert len(keys) == 3
    secrets = [*keys, der, PASSWORD.encode(), TOKEN.encode(), b"db-geheim-4711"]
    log = planted_log(tmp_path, secrets, pem + (folder / "operator.key").read_bytes())
    with RunStore(folder, wall_s=lambda: 1.7e9) as store:
        for number, secret in enumerate((PASSWORD, TOKEN, keys[0].hex())):
            run = f"ward-model-20231114-221320-{number:04d}"
            store.create(run, job="j", mode="federated", job_path="/x", job_json="{}", model_sha256="", names=())
            store.finish(run, "failed", error=f"no quorum, and {secret} besides")
    out = tmp_path / "out.tar.gz"
    arguments = ["support-bundle", "--fleet", str(folder), "-o", str(out), "--log", str(log), "--json"]
    assert run_cli(app, arguments, program="sordino") == 0
    told = json.loads(capsys.readouterr().out)
    found = assert_clean(out.read_bytes(), secrets)
    assert {part["name"] for part in told["parts"]} == set(found)
    assert json.loads(found["fleet.json"])["broker"]["tls"]["key"] == "(set)"
    assert {finding["what"] for finding in json.loads(found["doctor.json"])} >= {"roster"}
    runs = json.loads(found["runs.json"])
    assert [run["run"] for run in runs] == [f"ward-model-20231114-221320-{k:04d}" for k in range(3)]
    assert all(run["error"].startswith("no quorum, and (removed)") for run in runs)
    assert json.loads(found["roster.json"])["entries"][0]["fingerprint"] == home.server_key().fingerprint
    assert any(entry["name"] == "operator.key" for entry in json.loads(found["files.json"]))
    make_server_bundle(tmp_path / "nowhere", version="1").write(tmp_path / "n.tar.gz")
    assert "no fleet.yaml" in texts((tmp_path / "n.tar.gz").read_bytes())["README.txt"]


# --- pieces --------------------------------------------------------------------------------------------------------


def test_names_of_runs_and_files_and_fingerprints_stay() -> None:
    scrubber = Scrubber()
    for text in (
        "ward-model-20231114-221320-ab12",
        "/var/lib/prometheus/node-exporter/sordino.prom",
        "0a1b-2c3d-4e5f-6071-8293-a4b5-c6d7-e8f9",
        "agents 9/10, 1.2 MB, epsilon 0.4999 at delta 1e-05",
        "event=connection connected=False reason='Connection refused'",
        "2026-11-28T03:15:10Z",
    ):
        assert scrubber.clean(text) == text
    assert scrubber.removed == 0


@pytest.mark.parametrize(
    "make",
    [
        lambda: os.urandom(16).hex(),
        lambda: os.urandom(32).hex().upper(),
        lambda: ":".join(["a0"] * 32),
        lambda: base64.b64encode(b"\x9bA1z" * 8).decode(),
        lambda: base64.urlsafe_b64encode(b"\x9bA1z" * 4).decode(),
        lambda: base64.b32encode(bytes(range(20))).decode(),
    ],
)
def test_what_looks_like_a_key_goes(make: Callable[[], str]) -> None:
    secret = make()
    assert secret not in Scrubber().clean(f"before {secret} after")
    assert Scrubber().clean(f"before {secret} after").startswith("before (removed)")


def test_where_secrets_are_looked_for() -> None:
    environment = {"PGPASSWORD": "a1", "HOME": "/root", "X": "http://u:pw9@h/", "KEYFILE": "/k"}
    assert set(secrets_of_environment(environment)) == {b"a1", b"pw9"}
    text = "broker:\n  password: 'o p'\n  password_file: x\nopen: {api_token: t1, key: k.pem}\nurl: pg://u:w2@h/d\n"
    assert set(secrets_of_yaml(text)) == {b"o p", b"t1", b"k.pem", b"w2"}
    assert b"line one" in set(secrets_in(b"line one\nabc\n"))


def test_only_what_the_shape_names_is_selected() -> None:
    value = {"a": 1, "b": {"c": 2, "d": 3}, "e": [{"f": 4, "g": 5}], "h": "x", "i": None, "j": 7}
    shape = {"a": KEEP, "b": {"c": KEEP}, "e": [{"f": SET}], "h": lambda text: text * 2, "i": SET, "missing": KEEP}
    assert select(value, shape) == {"a": 1, "b": {"c": 2}, "e": [{"f": "(set)"}], "h": "xx", "i": None}


def test_nothing_is_written_over(tmp_path: Path) -> None:
    bundle = Bundle("b", Scrubber([b"sesame-open"]))
    bundle.add("a.json", "x", {"sesame-open": ["it is sesame-open", b"12"]})
    assert b"sesame-open" not in bundle.parts[1].data and b"(2 bytes)" in bundle.parts[1].data
    (tmp_path / "x").write_text("kept")
    with pytest.raises(ConfigError, match="there is a file of this name"):
        bundle.write(tmp_path / "x")
    with pytest.raises(ConfigError, match="can't be written: No such file"):
        bundle.write(tmp_path / "no" / "x")
    assert (tmp_path / "x").read_text() == "kept"
