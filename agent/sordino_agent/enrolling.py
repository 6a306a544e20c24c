"""`sordino-agent enroll`, `renew`, `rotate`: from a token to a member, and to stay one.

Each command may be given again until it is done: it goes on with the keys and the request that it has made.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from sordino_agent.config import IDENTITY_FILE, LoadedConfig, is_enrolled, load_agent_config
from sordino_agent.enrol import CONFIG_FILE, STATE_FOLDER, enrol
from sordino_agent.errand import CA_FILE, TOKEN_FILE, Errand
from sordino_common.channel.certificates import begins_s, ends_s, read_certificate, read_identity
from sordino_common.channel.enrolment import SignedRequest, Token, from_text, read_token, to_text
from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError, FleetUnavailable, RemoteError
from sordino_common.transport.mqtt_settings import TlsSettings

RENEW_BELOW: Final = 1 / 3  # of a certificate's life that is left: months for a sleeping operator
REQUEST_FILE: Final = "enrolment.request"

Say = Callable[[str], None]


def enroll(
    folder: Path,
    *,
    token: str | None,
    name: str | None,
    wait_s: float,
    offline: bool,
    grant: Path | None,
    say: Say,
    state_dir: str = STATE_FOLDER,
) -> None:
    """Make the device's folder from a token, ask, and take the answer. Without a token: go on where it stood.
    `state_dir`: for keys and state, if a configuration is made; relative to the folder.

    Raises `ConfigError`, `FleetUnavailable` (broker; not approved in time) and, for grants that don't fit,
    `RemoteError`s."""
    if token is not None:
        loaded = _prepare(folder, read_token(token), token, name, state_dir)
    else:
        loaded = load_agent_config(folder / CONFIG_FILE)
    errand = Errand(loaded, "enrol", wall_s=time.time)
    done = (loaded.state_dir / IDENTITY_FILE).exists() and not (loaded.state_dir / TOKEN_FILE).exists()
    if done:
        say(f"{loaded.config.agent.name} is enrolled already: sordino-agent check {loaded.path}")
        return
    if grant is not None:
        _settle(errand, grant)
        _enrolled(loaded, say)
        return
    signed = errand.begin()
    say(
        f"name          {signed.request.name}\n"
        f"fingerprint   {signed.fingerprint}\n"
        "The operator has to see this very fingerprint before approving."
    )
    if offline:
        path = folder / REQUEST_FILE
        _write(path, to_text(signed.packet, "request"))
        say(f"carry {path} to the operator: sordino roster receive; and back: sordino-agent enroll --grant FILE")
        return
    if _ask(errand, signed, wait_s=wait_s, say=say, again=f"sordino-agent enroll --dir {folder}"):
        _enrolled(loaded, say)


def renew(loaded: LoadedConfig, *, wait_s: float, if_due: bool, say: Say) -> None:
    """A new key and certificate for the broker; the identity stays. `if_due`: only if little of the old one is left."""
    _, certificate = read_identity(_identity_path(loaded))
    if certificate is None:
        raise ConfigError(f"{_identity_path(loaded)}: no certificate in it; enrol this device first")
    left_s = ends_s(certificate) - time.time()
    if if_due and left_s > RENEW_BELOW * (ends_s(certificate) - begins_s(certificate)):
        say(f"the certificate holds for {left_s / 86_400:.0f} more days; nothing to do")
        return
    errand = Errand(loaded, "renew", wall_s=time.time)
    if _ask(errand, errand.begin(), wait_s=wait_s, say=say, again="sordino-agent renew"):
        _, fresh = read_identity(_identity_path(loaded))
        assert fresh is not None
        say(f"renewed: valid until {fresh.not_valid_after_utc:%Y-%m-%d}; the agent takes it when it next connects")


def rotate(loaded: LoadedConfig, *, wait_s: float, say: Say) -> None:
    """New identity keys, vouched for by the old ones; the old ones end when the operator's new roster is in force."""
    errand = Errand(loaded, "rotate", wall_s=time.time)
    signed = errand.begin()
    old = loaded.device_key().fingerprint
    say(
        f"name          {signed.request.name}\n"
        f"fingerprint   {signed.fingerprint}\n"
        f"replaces      {old}\n"
        "The operator has to see these very fingerprints before approving."
    )
    if _ask(errand, signed, wait_s=wait_s, say=say, again="sordino-agent rotate"):
        say("rotated: the old key is gone. Restart the agent: systemctl restart sordino-agent")


def _prepare(folder: Path, token: Token, text: str, name: str | None, state_dir: str) -> LoadedConfig:
    """The folder, its keys, and the token put aside."""
    if name is not None and token.name is not None and name != token.name:
        raise ConfigError(f"--name {name}: the token is for {token.name}")
    name = name or token.name
    if name is None:
        raise ConfigError("--name is missing: the token is for any name")
    config = folder / CONFIG_FILE
    if config.exists():
        loaded = load_agent_config(config)
        _same_fleet(loaded, token, name)
    else:
        tls = TlsSettings(ca=f"{state_dir}/{CA_FILE}", certificate=f"{state_dir}/{IDENTITY_FILE}")
        where = f"[{token.host}]:{token.port}" if ":" in token.host else f"{token.host}:{token.port}"
        enrol(
            folder,
            name=name,
            fleet=token.fleet,
            operator_key=token.operator_key.hex(),
            broker=where,
            server=token.server,
            tls=tls,
            state_dir=state_dir,
        )
        loaded = load_agent_config(config)
    state = loaded.state_dir
    kept = state / TOKEN_FILE
    word = "".join(text.split())
    if kept.exists() and kept.read_text("ascii").strip() != word:
        (state / "enrol.request").unlink(missing_ok=True)  # it was for the token before, which is given up
    _write(kept, word + "\n", mode=0o600)
    _write(state / CA_FILE, read_certificate(token.ca).public_bytes(Encoding.PEM).decode())
    return loaded


def _same_fleet(loaded: LoadedConfig, token: Token, name: str) -> None:
    section = loaded.config.agent
    found = (section.name, section.fleet, section.server, loaded.operator_key())
    if found != (name, token.fleet, token.server, token.operator_key):
        raise ConfigError(
            f"{loaded.path}: is the configuration of {section.name} in fleet {section.fleet} already, with its own "
            f"operator's key; the token is for {name} in fleet {token.fleet}. Choose another --dir"
        )


def _ask(errand: Errand, signed: SignedRequest, *, wait_s: float, say: Say, again: str) -> bool:
    complaints: list[str] = []

    def complain(text: str) -> None:
        complaints.append(text)
        sys.stderr.write(f"sordino-agent: an answer was refused: {text}\n")

    try:
        if errand.ask(signed, wait_s=wait_s, complain=complain):
            return True
    except FleetUnavailable as error:
        hint = "; has the token expired?" if signed.request.purpose == "enrol" and "CERTIFICATE" in str(error) else ""
        raise FleetUnavailable(f"{error}{hint}. The keys and the request are kept; again with: {again}") from None
    if complaints:
        raise RemoteError(f"no answer that fits, the last one: {complaints[-1]}")
    if wait_s > 0:
        raise FleetUnavailable(
            f"not approved within {wait_s:g} s; the request waits at the broker. Go on with: {again}"
        )
    say(f"The request waits at the broker. When it is approved: {again}")
    return False


def _settle(errand: Errand, file: Path) -> None:
    try:
        text = file.read_bytes()[: 16 << 20].decode("ascii", "replace")
    except OSError as error:
        raise ConfigError(f"{file}: can't be read: {error.strerror}") from None
    errand.settle(from_text(text, "grant"))


def _enrolled(loaded: LoadedConfig, say: Say) -> None:
    say(
        f"enrolled: {loaded.config.agent.name} is a member of fleet {loaded.config.agent.fleet}.\n"
        f"Next: name your datasets in {loaded.path}, then sordino-agent check {loaded.path}"
    )


def _identity_path(loaded: LoadedConfig) -> Path:
    path = loaded.state_file(IDENTITY_FILE)
    if not is_enrolled(loaded):
        raise ConfigError(
            f"{loaded.path}: broker.tls.certificate is not {path}, so this device's certificate did not come by "
            "`sordino-agent enroll`, and is renewed where it came from"
        )
    return path


def _write(path: Path, text: str, *, mode: int = 0o644) -> None:
    try:
        write_atomically(path, text.encode(), mode=mode)
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
