"""`sordino enroll-token`: a text with which one device, within hours, may ask to become a member."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from sordino_common.channel.enrolment import SECRET_BYTES, TOKEN_BYTES, Token, token_key, token_tls_key
from sordino_common.errors import ConfigError, LocalError
from sordino_server.enrolment.ca import fleet_authority, token_authority
from sordino_server.enrolment.store import EnrolmentStore, TokenRecord
from sordino_server.home import Home

MOST_HOURS: Final = 24.0 * 30
MOST_OPEN: Final = 10_000


def make_token(
    home: Home,
    store: EnrolmentStore,
    *,
    name: str | None,
    roles: Sequence[str],
    zone: str,
    hours: float,
    enrol_port: int,
    now_s: float,
    random: Callable[[int], bytes] = os.urandom,
) -> Token:
    """A new token; its public half is on disk when this returns. Raises `ConfigError`."""
    if not 0 < hours <= MOST_HOURS:
        raise ConfigError(f"--hours {hours:g}: more than 0 and at most {MOST_HOURS:g} are expected")
    if name == home.spec.server:
        raise ConfigError(f"--name {name}: this is the server's name")
    if home.spec.broker.tls is None:
        raise ConfigError(
            f"{home.folder / 'fleet.yaml'}: the broker there has no TLS, and a token leads to one that has. Make it "
            "with `sordino broker-config DIR`, or enrol by hand: sordino-agent init, sordino roster add"
        )
    open_ones = [record for record in store.tokens() if record.state == "open" and record.expires_s > now_s]
    if len(open_ones) >= MOST_OPEN:
        raise ConfigError(f"{len(open_ones)} tokens are open; let some of them be used, or withdraw them")
    secret, token = random(SECRET_BYTES), random(TOKEN_BYTES)
    expires_s = int(now_s + hours * 3600)
    certificate = token_authority(home.folder).issue_token(
        token, token_tls_key(secret).public_key(), now_s=now_s, ends_s=expires_s
    )
    made = Token(
        id=token,
        secret=secret,
        expires_s=expires_s,
        fleet=home.spec.fleet,
        server=home.spec.server,
        operator_key=home.operator_public(),
        host=home.spec.broker.host,
        port=home.spec.broker.port,
        enrol_port=enrol_port,
        ca=fleet_authority(home.folder).certificate.public_bytes(Encoding.DER),
        certificate=certificate,
        name=name,
        roles=tuple(roles),  # type: ignore[arg-type]  # validated below
        zone=zone,
    )
    _check(made)
    store.add_token(
        TokenRecord(
            id=token,
            proof_key=token_key(secret).public.sign_key,
            name=name,
            roles=made.roles,
            zone=zone,
            made_s=now_s,
            expires_s=expires_s,
            state="open",
            others=0,
        )
    )
    return made


def withdraw(store: EnrolmentStore, text: str) -> TokenRecord:
    """No request is taken with this token (its id, hexadecimal) any more. Raises `ConfigError`."""
    try:
        record = store.token(bytes.fromhex(text))
    except ValueError:
        record = None
    if record is None:
        raise ConfigError(f"there is no token {text[:40]}; `sordino enroll-token --list` shows them")
    if record.state == "used":
        raise ConfigError(f"token {text} is used already; `sordino roster refuse` or `revoke` is for its device")
    store.set_token_state(record.id, "withdrawn")
    return record


def _check(token: Token) -> None:
    try:
        token.encoded()
    except LocalError as error:
        raise ConfigError(f"sordino {error}") from None
