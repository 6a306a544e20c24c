"""`sordino enroll-token`: texts, each of which lets one device, within hours, ask to become a member."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Sequence
from typing import Final

from cryptography.hazmat.primitives.serialization import Encoding

from sordino_common.channel.enrolment import SECRET_BYTES, TOKEN_BYTES, Token, token_key, token_tls_key
from sordino_common.errors import ConfigError, LocalError
from sordino_common.messages.base import NAME_PATTERN
from sordino_server.enrolment.ca import fleet_authority, token_authority
from sordino_server.enrolment.store import EnrolmentStore, TokenRecord
from sordino_server.home import Home

MOST_HOURS: Final = 24.0 * 30
MOST_OPEN: Final = 10_000


def make_tokens(
    home: Home,
    store: EnrolmentStore,
    names: Sequence[str | None],
    *,
    roles: Sequence[str],
    zone: str,
    hours: float,
    enrol_port: int,
    now_s: float,
    random: Callable[[int], bytes] = os.urandom,
) -> list[Token]:
    """A token for each of `names`, in their order; None: the device says its name. All of them, or none and
    `ConfigError`. Their public halves are on disk when this returns."""
    if not 0 < hours <= MOST_HOURS:
        raise ConfigError(f"--hours {hours:g}: more than 0 and at most {MOST_HOURS:g} are expected")
    if home.spec.server in names:
        raise ConfigError(f"--name {home.spec.server}: this is the server's name")
    if home.spec.broker.tls is None:
        raise ConfigError(
            f"{home.folder / 'fleet.yaml'}: the broker there has no TLS, and a token leads to one that has. Make it "
            "with `sordino broker-config DIR`, or enrol by hand: sordino-agent init, sordino roster add"
        )
    expires_s = int(now_s + hours * 3600)
    operator_key, authority = home.operator_public(), token_authority(home.folder)
    ca = fleet_authority(home.folder).certificate.public_bytes(Encoding.DER)
    made: list[Token] = []
    for name in names:
        secret, number = random(SECRET_BYTES), random(TOKEN_BYTES)
        token = Token(
            id=number,
            secret=secret,
            expires_s=expires_s,
            fleet=home.spec.fleet,
            server=home.spec.server,
            operator_key=operator_key,
            host=home.spec.broker.host,
            port=home.spec.broker.port,
            enrol_port=enrol_port,
            ca=ca,
            certificate=authority.issue_token(
                number, token_tls_key(secret).public_key(), now_s=now_s, ends_s=expires_s
            ),
            name=name,
            roles=tuple(roles),  # type: ignore[arg-type]  # validated below
            zone=zone,
        )
        _check(token)
        made.append(token)
    with store.transaction():
        open_ones = sum(1 for record in store.tokens() if record.state == "open" and record.expires_s > now_s)
        if open_ones + len(made) > MOST_OPEN:
            raise ConfigError(
                f"{open_ones} tokens are open, and {MOST_OPEN} may be; let some of them be used, or withdraw them"
            )
        for token in made:
            store.add_token(
                TokenRecord(
                    id=token.id,
                    proof_key=token_key(token.secret).public.sign_key,
                    name=token.name,
                    roles=token.roles,
                    zone=zone,
                    made_s=now_s,
                    expires_s=expires_s,
                    state="open",
                    others=0,
                )
            )
    return made


def read_names(text: str, *, source: str) -> list[str]:
    """The names in `text`, one a line; empty lines and those that begin with # are left out. Raises `ConfigError`."""
    found: dict[str, int] = {}
    for number, line in enumerate(text.splitlines(), start=1):
        name = line.strip()
        if not name or name.startswith("#"):
            continue
        if not re.match(NAME_PATTERN, name):
            raise ConfigError(f"{source}, line {number}: {name[:80]!r} is no name: small letters, digits and hyphens")
        if name in found:
            raise ConfigError(f"{source}, line {number}: {name} stands in line {found[name]} already")
        found[name] = number
    if not found:
        raise ConfigError(f"{source}: there is no name in it; one a line is expected")
    return list(found)


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
