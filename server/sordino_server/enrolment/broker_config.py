"""The folder of a mosquitto that serves one fleet: mutual TLS, a topic tree per certificate, nobody anonymous.

    mosquitto.conf              two listeners: members, and holders of a token
    members.acl, tokens.acl     who may publish and read what
    ca.pem, tokens-ca.pem       whose certificates each listener takes
    broker.pem, broker.key      the broker's own
    crl.pem                     revoked members; read again on SIGHUP
    data/                       retained messages, over a restart
    service.conf                drop-in for mosquitto.service

The ACL is the topic tree of `sordino_common.transport.topics`, turned round: %u is the common name of the client's
certificate, which the fleet's authority gives to one party each. mosquitto 2.0 grants every subscription and asks the
ACL for each message, so what is refused is not delivered.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from sordino_common.channel.certificates import new_tls_key, write_identity
from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_common.transport.topics import ROOT
from sordino_server.enrolment.ca import create_authorities, fleet_authority, token_authority
from sordino_server.home import Home

MIB: Final = 1024 * 1024
CONFIG_FILE: Final = "mosquitto.conf"
CRL_FILE: Final = "crl.pem"
SERVER_IDENTITY: Final = "server.pem"
PID_FILE: Final = "mosquitto.pid"
PLACE_FILE: Final = "broker.json"
DROP_IN_FILE: Final = "service.conf"


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerLimits:
    """What the broker takes at most. Payloads of ours have at most 1,000,000 bytes, chunks of messages 256 KiB."""

    packet_bytes: int = 2_000_000  # that of a large roster; mosquitto >= 2.1 has this as its own default
    inflight_messages: int = 20
    queued_messages: int = 10_000  # per client: 8 packets of 1,000 agents, for the server
    queued_bytes: int = 128 * MIB  # per client
    memory_bytes: int = 1024 * MIB  # of the whole broker: the only bound on retained messages that mosquitto has
    members: int = 12_000  # connections
    tokens: int = 512  # connections: a shift that sets up a ward's devices at once, each waiting for its answer


@dataclass(frozen=True, slots=True, kw_only=True)
class BrokerPlan:
    """Where the broker listens. `hosts`: the names and addresses under which clients look for it."""

    hosts: tuple[str, ...]
    port: int
    enrol_port: int
    bind: str | None = None
    tie_client_ids: bool = False
    limits: BrokerLimits = BrokerLimits()


class BrokerPlace(msgspec.Struct, frozen=True, kw_only=True):
    """What the fleet directory remembers of its broker."""

    folder: str
    enrol_port: int


def broker_place(home: Home) -> BrokerPlace | None:
    """Where `sordino broker-config` has put the broker; None if it has not. Raises `ConfigError`."""
    path = home.folder / "ca" / PLACE_FILE
    try:
        return msgspec.json.decode(path.read_bytes(), type=BrokerPlace)
    except FileNotFoundError:
        return None
    except (OSError, msgspec.DecodeError) as error:
        raise ConfigError(f"{path}: can't be read: {error}") from None


def write_broker(home: Home, folder: Path, plan: BrokerPlan, *, now_s: float, again: bool = False) -> None:
    """Make the folder; the fleet's authorities and the server's certificate too, if there are none.

    Raises `ConfigError`: a folder that is configured already (unless `again`), a host that is none, no key."""
    config = folder / CONFIG_FILE
    if config.exists() and not again:
        raise ConfigError(f"{config}: is there already; --again writes it, and the broker's certificate, once more")
    if plan.port == plan.enrol_port:
        raise ConfigError(f"--port and --enrol-port are both {plan.port}; they are two listeners")
    for text in (str(folder.resolve()), plan.bind or ""):
        if any(ch.isspace() and ch != " " for ch in text):
            raise ConfigError(f"{text!r}: a line break in a path can't be written into {CONFIG_FILE}")
    key = new_tls_key()
    create_authorities(home.folder, fleet=home.spec.fleet, now_s=now_s)
    members, tokens = fleet_authority(home.folder), token_authority(home.folder)
    certificate = members.issue_broker(plan.hosts, key.public_key(), now_s=now_s)
    issue_server_identity(home, now_s=now_s)
    crl = home.folder / "ca" / CRL_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "data").mkdir(mode=0o700, exist_ok=True)
        if not crl.exists():
            write_atomically(crl, members.crl((), number=1, now_s=now_s))
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        write_atomically(folder / "broker.key", pem, mode=0o600)
        write_atomically(folder / "broker.pem", certificate.public_bytes(Encoding.PEM))
        write_atomically(folder / "ca.pem", members.certificate.public_bytes(Encoding.PEM))
        write_atomically(folder / "tokens-ca.pem", tokens.certificate.public_bytes(Encoding.PEM))
        write_atomically(folder / CRL_FILE, crl.read_bytes())
        write_atomically(folder / "members.acl", members_acl(home.spec.fleet, home.spec.server).encode(), mode=0o600)
        write_atomically(folder / "tokens.acl", tokens_acl(home.spec.fleet).encode(), mode=0o600)
        write_atomically(config, mosquitto_conf(folder.resolve(), plan).encode())
        write_atomically(folder / DROP_IN_FILE, drop_in(folder.resolve()).encode())
        place = BrokerPlace(folder=str(folder.resolve()), enrol_port=plan.enrol_port)
        write_atomically(home.folder / "ca" / PLACE_FILE, msgspec.json.encode(place) + b"\n")
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: can't be written: {error.strerror}") from None


def issue_server_identity(home: Home, *, now_s: float, again: bool = False) -> None:
    """The certificate with which the fleet's server comes to the broker, with its key in one file."""
    path = home.folder / SERVER_IDENTITY
    if path.exists() and not again:
        return
    key = new_tls_key()
    authority = fleet_authority(home.folder)
    try:
        write_identity(path, key, authority.issue_member(home.spec.server, key.public_key(), now_s=now_s))
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None


def members_acl(fleet: str, server: str) -> str:
    """Of the members' listener. `pattern` lines count for everybody there, the server included."""
    base = f"{ROOT}/{fleet}"
    return f"""\
# Made by `sordino broker-config`. %u: the name in the client's certificate.

# The server
user {server}
topic read {base}/+/reply
topic read {base}/+/status
topic readwrite {base}/+/request
topic write {base}/+/cmd
topic write {base}/+/grant
topic write {base}/{server}/roster

# Everybody, in their own place
pattern write {base}/%u/status
pattern write {base}/%u/reply
pattern read {base}/%u/cmd
pattern write {base}/%u/request
pattern read {base}/%u/grant

# Agents among themselves: what is sent carries the sender's name, what is read is one's own
pattern write {base}/+/peer/%u
pattern read {base}/%u/peer/+

# What the server tells everybody
pattern read {base}/{server}/status
pattern read {base}/{server}/roster
"""


def tokens_acl(fleet: str) -> str:
    """Of the tokens' listener: one request, one answer."""
    base = f"{ROOT}/{fleet}"
    return f"""\
# Made by `sordino broker-config`. %u: the name in the certificate that came with a token.
pattern write {base}/%u/request
pattern read {base}/%u/grant
"""


def drop_in(folder: Path) -> str:
    """For the mosquitto.service of Debian and its relatives. `folder` is absolute.

    Its own configuration can't include ours: several lines may be there once only. And the service never has root: the
    folder is the broker's user's, who could else have root read another configuration at the next start."""
    path = str(folder / CONFIG_FILE).replace("%", "%%").replace("$", "$$").replace("\\", "\\\\").replace('"', '\\"')
    return f"""\
# Made by `sordino broker-config`: mosquitto.service runs this fleet's broker, as its own user from the start.
[Service]
User=mosquitto
Group=mosquitto
ExecStartPre=
ExecStart=
ExecStart=/usr/sbin/mosquitto -c "{path}"
"""


def mosquitto_conf(folder: Path, plan: BrokerPlan) -> str:
    """For mosquitto 2.0 and newer. `folder` is absolute."""
    limits = plan.limits
    bind = f" {plan.bind}" if plan.bind else ""
    tied = "true" if plan.tie_client_ids else "false"
    shared = f"""\
certfile {folder}/broker.pem
keyfile {folder}/broker.key
tls_version tlsv1.2
require_certificate true
use_identity_as_username true
use_username_as_clientid {tied}
allow_anonymous false
allow_zero_length_clientid false"""
    return f"""\
# Made by `sordino broker-config`: a broker for one fleet. Start it with: mosquitto -c {folder}/{CONFIG_FILE}
per_listener_settings true
pid_file {folder}/{PID_FILE}
persistence true
persistence_location {folder}/data/
autosave_interval 60
persistent_client_expiration 1h
log_dest stderr
log_type error
log_type warning
log_type notice
log_type information
set_tcp_nodelay true

# Bounds. Retained messages of one member are bounded by memory_limit alone.
max_packet_size {limits.packet_bytes}
max_inflight_messages {limits.inflight_messages}
max_queued_messages {limits.queued_messages}
max_queued_bytes {limits.queued_bytes}
memory_limit {limits.memory_bytes}
max_keepalive 3600

# Members: server, agents, dealer
listener {plan.port}{bind}
cafile {folder}/ca.pem
crlfile {folder}/{CRL_FILE}
acl_file {folder}/members.acl
max_connections {limits.members}
{shared}

# Holders of a token: leave a request, read its answer
listener {plan.enrol_port}{bind}
cafile {folder}/tokens-ca.pem
acl_file {folder}/tokens.acl
max_connections {limits.tokens}
{shared}
"""
