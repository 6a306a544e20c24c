"""X.509 for the connection to the broker: keys, requests for certificates, and which certificate a party takes.

A certificate protects the broker and says under which topics a connection may speak; what parties believe of one
another rests on the roster alone. Keys are ECDSA P-256, which every broker knows. A request (PKCS #10) says a name and
a key and nothing else: whatever extensions it asks for, the authority gives its own.
"""

from __future__ import annotations

import datetime
import os
import stat
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import NameOID

from sordino_common.channel.credentials import seen_by_others
from sordino_common.channel.files import write_atomically
from sordino_common.errors import CertificateError, ConfigError

MAX_CSR_BYTES: Final = 2048  # one of ours has about 250
MAX_CERTIFICATE_BYTES: Final = 4096  # one of ours has about 450
_MAX_FILE_BYTES: Final = 16_384
_BAD: Final = (ValueError, TypeError, UnsupportedAlgorithm, InvalidSignature)

TlsKey = ec.EllipticCurvePrivateKey


def new_tls_key() -> TlsKey:
    """A P-256 key, for TLS only."""
    return ec.generate_private_key(ec.SECP256R1())


def common_name(name: str) -> x509.Name:
    """The subject whose only part is this common name: mosquitto's `use_identity_as_username` makes it the user."""
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


def make_csr(key: TlsKey, name: str) -> bytes:
    """A request (DER) for a certificate of `name`, signed by `key`."""
    request = x509.CertificateSigningRequestBuilder().subject_name(common_name(name)).sign(key, hashes.SHA256())
    return request.public_bytes(Encoding.DER)


def read_csr(der: bytes, *, name: str) -> ec.EllipticCurvePublicKey:
    """The key of the request, if it is well-formed, asks for `name` and is signed by that key.

    Raises `CertificateError`."""
    if len(der) > MAX_CSR_BYTES:
        raise CertificateError(f"certificate request of {name}: {len(der)} bytes, at most {MAX_CSR_BYTES} are taken")
    try:
        request = x509.load_der_x509_csr(der)
        subject, key, proven = request.subject, request.public_key(), request.is_signature_valid
        again = request.public_bytes(Encoding.DER)
    except _BAD as error:
        raise CertificateError(f"certificate request of {name}: malformed: {str(error)[:200]}") from None
    if subject != common_name(name) or again != der:
        raise CertificateError(f"certificate request of {name}: it asks for {subject.rfc4514_string()[:200]!r}")
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP256R1):
        raise CertificateError(f"certificate request of {name}: expected an ECDSA key on P-256")
    if not proven:
        raise CertificateError(f"certificate request of {name}: not signed by the key that it names")
    return key


def read_certificate(der: bytes) -> x509.Certificate:
    """Raises `CertificateError`; nothing but the form is checked."""
    if len(der) > MAX_CERTIFICATE_BYTES:
        raise CertificateError(f"certificate: {len(der)} bytes, at most {MAX_CERTIFICATE_BYTES} are taken")
    try:
        certificate = x509.load_der_x509_certificate(der)
        if certificate.public_bytes(Encoding.DER) != der:
            raise CertificateError("certificate: not in DER")
    except _BAD as error:
        raise CertificateError(f"certificate: malformed: {str(error)[:200]}") from None
    return certificate


def check_certificate(
    certificate: x509.Certificate, *, ca: x509.Certificate, name: str, key: ec.EllipticCurvePublicKey, now_s: float
) -> None:
    """Raises `CertificateError` unless `certificate` is one of `ca` for `name` and `key`, and valid at `now_s`."""
    where = f"certificate of {name}"
    try:
        certificate.verify_directly_issued_by(ca)
    except _BAD:
        raise CertificateError(f"{where}: not issued by the fleet's authority") from None
    if certificate.subject != common_name(name):
        raise CertificateError(f"{where}: it is one of {certificate.subject.rfc4514_string()[:200]!r}")
    try:
        theirs = certificate.public_key()
    except _BAD:
        theirs = None
    if not isinstance(theirs, ec.EllipticCurvePublicKey) or public_bytes(theirs) != public_bytes(key):
        raise CertificateError(f"{where}: it is for another key than this device's")
    if not begins_s(certificate) <= now_s < ends_s(certificate):
        raise CertificateError(
            f"{where}: valid from {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} to "
            f"{certificate.not_valid_after_utc:%Y-%m-%d %H:%M} UTC, not now. Check this machine's clock"
        )


def public_bytes(key: ec.EllipticCurvePublicKey) -> bytes:
    """The key as a point, 65 bytes."""
    return key.public_bytes(Encoding.X962, PublicFormat.UncompressedPoint)


def begins_s(certificate: x509.Certificate) -> float:
    return certificate.not_valid_before_utc.timestamp()


def ends_s(certificate: x509.Certificate) -> float:
    return certificate.not_valid_after_utc.timestamp()


def utc(seconds: float) -> datetime.datetime:
    """X.509 times have whole seconds."""
    return datetime.datetime.fromtimestamp(int(seconds), datetime.UTC)


def write_identity(path: Path, key: TlsKey, *certificates: x509.Certificate) -> None:
    """Key and certificates as one PEM file of mode 0600, replaced as one: they never disagree. Raises `OSError`."""
    pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    write_atomically(path, pem + b"".join(c.public_bytes(Encoding.PEM) for c in certificates), mode=0o600)


def read_identity(path: Path) -> tuple[TlsKey, x509.Certificate | None]:
    """What `write_identity` wrote: (key, the first certificate or None). Raises `ConfigError`, also for a file that
    others may read."""
    data = read_private(path)
    try:
        key = load_pem_private_key(data, None)
        certificates = x509.load_pem_x509_certificates(data) if b"BEGIN CERTIFICATE" in data else []
    except _BAD:
        raise ConfigError(f"{path}: expected a private key, and its certificate, in PEM") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise ConfigError(f"{path}: expected an ECDSA key")
    return key, certificates[0] if certificates else None


def read_private(path: Path) -> bytes:
    """A file of at most 16 KiB that only its owner may read. Raises `ConfigError`."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a regular file")
        if seen_by_others(path, status):
            raise ConfigError(
                f"{path}: has mode {stat.S_IMODE(status.st_mode):04o}, others may read it. Do: chmod 600 {path}"
            )
        return os.read(handle, _MAX_FILE_BYTES)
    finally:
        os.close(handle)
