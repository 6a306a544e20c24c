"""How a device asks to be a member: the token that it is given, the request that it makes, the grant that it gets.

A *token* is a text that the operator hands to whoever sets up the device: where the broker is, whose certificate and
whose roster to believe, and a secret. A *request* is the canonical CBOR of

    ["enrol-request", body, signature of the device's key over body for "enrol-request", proof]

The body names fleet, name, the device's public keys and a certificate request. The proof says why it should be heard:

    purpose   proof: a signature over the body
    enrol     of the key that follows from the token's secret, for "enrol-token"
    rotate    of the key that the roster lists until now, for "enrol-rotate"
    renew     none: the roster lists the very key that has signed the request

A signature instead of a MAC under the secret, so that what the server keeps of a token (its public key) can't make a
request. Whoever carries the request can't change a bit of it, nor put his own keys there. A *grant* is

    ["enrol-grant", SHA-256 of the request, certificate, signed roster]

and needs no signature of its own: the roster has the operator's, which the token pins, and has to list the device's own
keys; the certificate has the authority's, which the token pins too, and has to be for the device's own TLS key.

    somebody sends instead                                  and gets
    ------------------------------------------------------  ------------------------------------------------------
    not canonical, cut, too long, a field out of bounds     CodecError
    keys of small order, or not canonical                   SignatureError
    a body with other keys, name, request than was signed   SignatureError
    a request under another token's, or no token's, secret  SignatureError
    a certificate request for another name, of another      CertificateError
    sort of key, not signed by its key
    a grant for another request                             EnrolmentRefused
    a grant with a roster of another operator, fleet, or    SignatureError, RosterError
    with other keys for the device
    a grant with an older roster than the device has        the newer stays in force; if it lists other keys: StaleEpoch
    a grant with a certificate of another authority, name,  CertificateError
    key or time
"""

from __future__ import annotations

import base64
import binascii
import hashlib
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, Literal

import msgspec
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from sordino_common.channel.certificates import MAX_CERTIFICATE_BYTES, MAX_CSR_BYTES, read_certificate, read_csr
from sordino_common.channel.identity import DeviceKey, check_box_key, check_sign_key, fingerprint_of, verify
from sordino_common.channel.packets import Body, Key32, read_body
from sordino_common.channel.roster import MAX_ROSTER_BYTES
from sordino_common.errors import CodecError, ConfigError, LocalError, RemoteError, SignatureError
from sordino_common.messages.base import Count, Name
from sordino_common.messages.codec import Limits, decode, encode

MAX_REQUEST_BYTES: Final = 8192  # one of ours has about 700
SECRET_BYTES: Final = 32
TOKEN_BYTES: Final = 8
_TOKEN_PREFIX: Final = "sordino-token-1."  # noqa: S105  what every token begins with
_FILE_PREFIX: Final = "sordino-"
_CHECK_BYTES: Final = 4
_MOST_TOKEN_TEXT: Final = 16_384
_REQUEST_LIMITS: Final = Limits(payload_bytes=MAX_REQUEST_BYTES, depth=1, items=5, text_bytes=32)
_GRANT_LIMITS: Final = Limits(
    payload_bytes=MAX_ROSTER_BYTES + MAX_CERTIFICATE_BYTES + 1024, depth=1, items=5, text_bytes=32
)

Purpose = Literal["enrol", "renew", "rotate"]
RoleName = Literal["data", "compute", "helper", "dealer"]  # the server is not enrolled, it was there first
Roles = Annotated[tuple[RoleName, ...], msgspec.Meta(min_length=1, max_length=4)]
_PROOF: Final = {"enrol": "enrol-token", "rotate": "enrol-rotate"}


class EnrolmentRefused(RemoteError):
    """A request to be enrolled, renewed or rotated that is not taken, or a grant that does not fit."""

    code = "enrolment"


class Token(Body, frozen=True, kw_only=True):
    """What a device is told. `name`, `roles`, `zone`: whom the token is for; without a name the device chooses it."""

    kind: ClassVar[str] = "enrol-token"
    format: Literal[1] = 1
    id: Annotated[bytes, msgspec.Meta(min_length=TOKEN_BYTES, max_length=TOKEN_BYTES)]
    secret: Annotated[bytes, msgspec.Meta(min_length=SECRET_BYTES, max_length=SECRET_BYTES)]
    expires_s: Count
    fleet: Name
    server: Name
    operator_key: Key32
    host: Annotated[str, msgspec.Meta(min_length=1, max_length=253)]
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    enrol_port: Annotated[int, msgspec.Meta(ge=1, le=65535)]
    ca: Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]
    certificate: Annotated[bytes, msgspec.Meta(max_length=MAX_CERTIFICATE_BYTES)]
    name: Name | None
    roles: Roles
    zone: Name

    def __repr__(self) -> str:
        return f"<Token {self.id.hex()} of fleet {self.fleet}>"

    def text(self) -> str:
        """One word of letters, digits, -, _ and a dot."""
        return _TOKEN_PREFIX + _armoured(self.encoded())


def read_token(text: str) -> Token:
    """The token in `text`. Raises `ConfigError`: it came from a person."""
    word = "".join(text.split())  # mail programs break long lines
    if not word.startswith(_TOKEN_PREFIX) or len(word) > _MOST_TOKEN_TEXT:
        raise ConfigError(f"token: expected one that begins with {_TOKEN_PREFIX}, as `sordino enroll-token` prints it")
    try:
        token = read_body(Token, _plain(word.removeprefix(_TOKEN_PREFIX)))
        read_certificate(token.ca)
        read_certificate(token.certificate)
    except RemoteError as error:
        raise ConfigError(f"token: it is damaged or cut short; copy it again, whole: {error}") from None
    fault = check_sign_key(token.operator_key)
    if fault is not None:
        raise ConfigError(f"token: {fault}")
    return token


def token_key(secret: bytes) -> DeviceKey:
    """The key that proves a request; the server keeps its public half."""
    return DeviceKey.from_seeds(_derived(secret, "proof"), _derived(secret, "box"))


def token_tls_key(secret: bytes) -> Ed25519PrivateKey:
    """The key of the token's certificate for the broker."""
    return Ed25519PrivateKey.from_private_bytes(_derived(secret, "tls"))


class Request(Body, frozen=True, kw_only=True):
    """`token`: the token's id, or empty. `previous`: the signing key that is replaced, or empty."""

    kind: ClassVar[str] = "enrol-request"
    format: Literal[1] = 1
    purpose: Purpose
    fleet: Name
    name: Name
    token: Annotated[bytes, msgspec.Meta(max_length=TOKEN_BYTES)]
    previous: Annotated[bytes, msgspec.Meta(max_length=32)]
    sign_key: Key32
    box_key: Key32
    roles: Roles
    zone: Name
    csr: Annotated[bytes, msgspec.Meta(max_length=MAX_CSR_BYTES)]
    made_s: Count


@dataclass(frozen=True, slots=True, kw_only=True)
class SignedRequest:
    """A request whose own signature and certificate request are good; its proof is still to be verified."""

    request: Request
    raw: bytes
    proof: bytes
    packet: bytes

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(self.packet).digest()

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.request.sign_key, self.request.box_key)

    def verify_proof(self, key: bytes) -> None:
        """Raises `SignatureError` unless the proof is one of `key`."""
        verify(key, _PROOF[self.request.purpose], self.raw, self.proof)


def make_request(request: Request, *, identity: DeviceKey, prover: DeviceKey | None) -> bytes:
    """The packet. `prover`: the token's key, or the one that is replaced; None to renew. Raises `LocalError`."""
    if request.sign_key != identity.public.sign_key or (prover is None) != (request.purpose == "renew"):
        raise LocalError(f"enrolment request: {request.purpose} with the wrong keys")
    raw = request.encoded()
    proof = prover.sign(_PROOF[request.purpose], raw) if prover is not None else b""
    return encode([request.kind, raw, identity.sign(request.kind, raw), proof])


def read_request_packet(packet: bytes) -> SignedRequest:
    """Raises `CodecError`, `SignatureError` or `CertificateError`."""
    parts = _parts(decode(packet, _REQUEST_LIMITS), "enrol-request", 3)
    raw, signature, proof = parts
    request = read_body(Request, raw)
    for fault in (check_sign_key(request.sign_key), check_box_key(request.box_key)):
        if fault is not None:
            raise SignatureError(f"request of {request.name}: {fault}")
    if (len(request.token) == TOKEN_BYTES) != (request.purpose == "enrol"):
        raise CodecError(f"request of {request.name}: a token goes with the purpose enrol, and with it alone")
    if (len(request.previous) == 32) != (request.purpose == "rotate"):
        raise CodecError(f"request of {request.name}: a previous key goes with the purpose rotate, and with it alone")
    if (not proof) != (request.purpose == "renew"):
        raise CodecError(f"request of {request.name}: a proof goes with the purposes enrol and rotate")
    if len(set(request.roles)) != len(request.roles):
        raise CodecError(f"request of {request.name}: a role is there twice")
    verify(request.sign_key, "enrol-request", raw, signature)
    read_csr(request.csr, name=request.name)
    return SignedRequest(request=request, raw=raw, proof=proof, packet=packet)


@dataclass(frozen=True, slots=True, kw_only=True)
class Grant:
    """The answer to the request whose packet hashes to `request`. Nothing of it is verified yet."""

    request: bytes
    certificate: bytes
    signed_roster: bytes

    def packet(self) -> bytes:
        return encode(["enrol-grant", self.request, self.certificate, self.signed_roster])


def read_grant_packet(packet: bytes) -> Grant:
    """Raises `CodecError`."""
    request, certificate, roster = _parts(decode(packet, _GRANT_LIMITS), "enrol-grant", 3)
    if len(request) != 32:
        raise CodecError("enrol-grant: a digest has 32 bytes")
    return Grant(request=request, certificate=certificate, signed_roster=roster)


def to_text(packet: bytes, what: str) -> str:
    """A packet as a line of text, to be carried by hand. `what`: request or grant, order or signed."""
    return f"{_FILE_PREFIX}{what}-1.{_armoured(packet)}\n"


def from_text(text: str, what: str) -> bytes:
    """What `to_text` wrote. Raises `ConfigError`: a person has brought it."""
    prefix = f"{_FILE_PREFIX}{what}-1."
    word = "".join(text.split())
    if not word.startswith(prefix):
        raise ConfigError(f"expected a {what} that begins with {prefix}, found {word[:24]!r}")
    try:
        return _plain(word.removeprefix(prefix))
    except CodecError as error:
        raise ConfigError(f"the {what} is damaged or cut short; copy it again, whole: {error}") from None


def _armoured(data: bytes) -> str:
    """base64url without padding, over the data and the first bytes of its SHA-256: a slip of the hand is noticed."""
    return base64.urlsafe_b64encode(data + hashlib.sha256(data).digest()[:_CHECK_BYTES]).decode().rstrip("=")


def _plain(text: str) -> bytes:
    try:
        both = base64.b64decode(text + "=" * (-len(text) % 4), altchars=b"-_", validate=True)
    except (binascii.Error, ValueError):
        raise CodecError("not base64url") from None
    data, check = both[:-_CHECK_BYTES], both[-_CHECK_BYTES:]
    if hashlib.sha256(data).digest()[:_CHECK_BYTES] != check:
        raise CodecError("its checksum is wrong")
    return data


def _parts(items: Any, kind: str, count: int) -> list[bytes]:
    ok = isinstance(items, list) and len(items) == count + 1 and items[0] == kind
    if not ok or not all(isinstance(part, bytes) for part in items[1:]):
        raise CodecError(f"{kind}: expected [{kind}, {count} byte strings]")
    return list(items[1:])


def _derived(secret: bytes, what: str) -> bytes:
    return HKDF(hashes.SHA256(), 32, salt=None, info=b"sordino/enrolment/" + what.encode()).derive(secret)
