"""The fleet's own certificate authority, and the small one whose certificates let a token's holder leave a request.

    ca/ca.key, ca.pem         signs certificates of members and of the broker, and the CRL; the key belongs offline
    ca/enrol.key, enrol.pem   signs certificates of tokens: they end within days, and the broker takes them on a
                              listener of their own, where one can leave a request and read the answer, no more
    ca/crl.pem                revoked certificates, as the broker is told

Two authorities, so that making a token needs no key with which a member could be made up.
"""

from __future__ import annotations

import ipaddress
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from cryptography import x509
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec, ed25519
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    load_pem_private_key,
)
from cryptography.x509.oid import ExtendedKeyUsageOID

from sordino_common.channel.certificates import common_name, new_tls_key, read_private, utc
from sordino_common.channel.files import write_atomically, write_new
from sordino_common.errors import ConfigError
from sordino_common.transport.topics import token_user

DAY_S: Final = 86_400
CA_DAYS: Final = 20 * 365
MEMBER_DAYS: Final = 365
BROKER_DAYS: Final = 825  # what TLS clients in general accept of a private authority
# Devices without a battery-backed clock are behind by what the last shutdown cost them.
BACKDATE_S: Final = 3600.0

_SignKey = ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey
_PublicKey = ec.EllipticCurvePublicKey | ed25519.Ed25519PublicKey
_HOST: Final = re.compile(r"(?=.{1,253}\Z)[A-Za-z0-9]([A-Za-z0-9-]{0,62})(\.[A-Za-z0-9]([A-Za-z0-9-]{0,62}))*\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Revoked:
    """A certificate that the broker must refuse, since `at_s`."""

    serial: int
    at_s: int


class Authority:
    """A certificate and its key in `folder`, as NAME.pem and NAME.key. The key is read when it is first needed."""

    def __init__(self, folder: Path, name: str) -> None:
        self._key_path = folder / f"{name}.key"
        self._path = folder / f"{name}.pem"
        self._key: _SignKey | None = None
        try:
            self.certificate = x509.load_pem_x509_certificate(self._path.read_bytes())
        except OSError as error:
            raise ConfigError(
                f"{self._path}: the fleet's authority can't be read: {error.strerror}. Make it with: "
                "sordino broker-config DIR"
            ) from None
        except ValueError:
            raise ConfigError(f"{self._path}: expected a certificate in PEM") from None

    @classmethod
    def create(cls, folder: Path, name: str, *, title: str, key: _SignKey, now_s: float) -> Authority:
        """Raises `ConfigError` if there is one."""
        certificate = _sign(
            _begin(common_name(title), common_name(title), key.public_key(), now_s, now_s + CA_DAYS * DAY_S)
            .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
            .add_extension(_usage(signs_certificates=True), critical=True)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False),
            key,
        )
        pem = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        try:
            folder.mkdir(mode=0o700, exist_ok=True)
            write_new(folder / f"{name}.key", pem, mode=0o600)
            write_atomically(folder / f"{name}.pem", certificate.public_bytes(Encoding.PEM))
        except FileExistsError:
            raise ConfigError(f"{folder / name}.key: there is a key already; it is not overwritten") from None
        except OSError as error:
            raise ConfigError(f"{folder}: the authority can't be written: {error.strerror}") from None
        return cls(folder, name)

    @property
    def has_key(self) -> bool:
        return self._key_path.exists()

    def issue_member(
        self, name: str, key: ec.EllipticCurvePublicKey, *, now_s: float, days: int = MEMBER_DAYS
    ) -> x509.Certificate:
        """For a party of the roster: a client of the broker, and nothing else."""
        return self._issue(name, key, now_s=now_s, ends_s=now_s + days * DAY_S, usage=ExtendedKeyUsageOID.CLIENT_AUTH)

    def issue_token(self, token: bytes, key: ed25519.Ed25519PublicKey, *, now_s: float, ends_s: float) -> bytes:
        """For the holder of a token, in DER. As short as can be: people paste it."""
        builder = _begin(self.certificate.subject, common_name(token_user(token)), key, now_s, ends_s)
        return _sign(builder, self._private()).public_bytes(Encoding.DER)

    def issue_broker(self, hosts: Sequence[str], key: ec.EllipticCurvePublicKey, *, now_s: float) -> x509.Certificate:
        """For the broker at `hosts`, names and addresses. Raises `ConfigError` for what is neither."""
        names = x509.SubjectAlternativeName([host_name(host) for host in hosts])
        ends_s = now_s + BROKER_DAYS * DAY_S
        return self._issue(
            hosts[0][:64], key, now_s=now_s, ends_s=ends_s, usage=ExtendedKeyUsageOID.SERVER_AUTH, names=names
        )

    def crl(self, revoked: Iterable[Revoked], *, number: int, now_s: float, after_s: float = 0.0) -> bytes:
        """The list of revoked certificates in PEM. `after_s`: when the last one was issued.

        OpenSSL takes the newer of two lists by their times, in whole seconds, and a broker that reads the list again
        has both: so each is issued a second after the last at the earliest. It does not end before the authority does:
        with a list that has ended, brokers refuse everybody."""
        issued_s = max(int(now_s - BACKDATE_S), int(after_s) + 1)
        builder = (
            x509.CertificateRevocationListBuilder()
            .issuer_name(self.certificate.subject)
            .last_update(utc(issued_s))
            .next_update(self.certificate.not_valid_after_utc)
            .add_extension(x509.CRLNumber(number), critical=False)
            .add_extension(
                x509.AuthorityKeyIdentifier.from_issuer_public_key(self._private().public_key()), critical=False
            )
        )
        for entry in sorted(revoked, key=lambda entry: entry.serial):
            builder = builder.add_revoked_certificate(
                x509.RevokedCertificateBuilder().serial_number(entry.serial).revocation_date(utc(entry.at_s)).build()
            )
        key = self._private()
        signed = builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())
        return signed.public_bytes(Encoding.PEM)

    def _issue(
        self,
        name: str,
        key: ec.EllipticCurvePublicKey,
        *,
        now_s: float,
        ends_s: float,
        usage: x509.ObjectIdentifier,
        names: x509.SubjectAlternativeName | None = None,
    ) -> x509.Certificate:
        authority = self._private()
        ends_s = min(ends_s, self.certificate.not_valid_after_utc.timestamp())
        builder = (
            _begin(self.certificate.subject, common_name(name), key, now_s, ends_s)
            .add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
            .add_extension(_usage(signs_certificates=False), critical=True)
            .add_extension(x509.ExtendedKeyUsage([usage]), critical=False)
            .add_extension(x509.SubjectKeyIdentifier.from_public_key(key), critical=False)
            .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(authority.public_key()), critical=False)
        )
        if names is not None:
            builder = builder.add_extension(names, critical=False)
        return _sign(builder, authority)

    def _private(self) -> _SignKey:
        if self._key is None:
            if not self.has_key:
                raise ConfigError(
                    f"{self._key_path}: the authority's key is not here. If it is kept on another machine, use "
                    "`sordino roster export`, sign there, and `sordino roster import`"
                )
            try:
                key = load_pem_private_key(read_private(self._key_path), None)
            except (ValueError, TypeError, UnsupportedAlgorithm):
                raise ConfigError(f"{self._key_path}: expected a private key in PEM") from None
            if not isinstance(key, ec.EllipticCurvePrivateKey | ed25519.Ed25519PrivateKey):
                raise ConfigError(f"{self._key_path}: expected a key on P-256, or of Ed25519")
            if key.public_key() != self.certificate.public_key():
                raise ConfigError(f"{self._key_path}: not the key of {self._path}")
            self._key = key
        return self._key


def fleet_authority(folder: Path) -> Authority:
    """The authority of members, from the fleet directory. Raises `ConfigError`."""
    return Authority(folder / "ca", "ca")


def token_authority(folder: Path) -> Authority:
    """The authority of tokens, from the fleet directory. Raises `ConfigError`."""
    return Authority(folder / "ca", "enrol")


def has_authority(folder: Path) -> bool:
    return (folder / "ca" / "ca.pem").exists()


def create_authorities(folder: Path, *, fleet: str, now_s: float) -> None:
    """Both, in the fleet directory, unless they are there."""
    if not (folder / "ca" / "ca.pem").exists():
        Authority.create(folder / "ca", "ca", title=f"Sordino fleet {fleet}"[:64], key=new_tls_key(), now_s=now_s)
    if not (folder / "ca" / "enrol.pem").exists():
        key = ed25519.Ed25519PrivateKey.generate()
        Authority.create(folder / "ca", "enrol", title=f"Sordino tokens {fleet}"[:64], key=key, now_s=now_s)


def host_name(text: str) -> x509.GeneralName:
    """The name or address under which clients look for the broker. Raises `ConfigError`."""
    try:
        return x509.IPAddress(ipaddress.ip_address(text))
    except ValueError:
        if not _HOST.match(text):
            raise ConfigError(f"--host {text[:80]!r}: expected a host name or an IP address") from None
        return x509.DNSName(text)


def _begin(
    issuer: x509.Name, subject: x509.Name, key: _PublicKey, now_s: float, ends_s: float
) -> x509.CertificateBuilder:
    return (
        x509.CertificateBuilder()
        .issuer_name(issuer)
        .subject_name(subject)
        .public_key(key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(utc(now_s - BACKDATE_S))
        .not_valid_after(utc(ends_s))
    )


def _sign(builder: x509.CertificateBuilder, key: _SignKey) -> x509.Certificate:
    return builder.sign(key, None if isinstance(key, ed25519.Ed25519PrivateKey) else hashes.SHA256())


def _usage(*, signs_certificates: bool) -> x509.KeyUsage:
    return x509.KeyUsage(
        digital_signature=not signs_certificates,
        key_cert_sign=signs_certificates,
        crl_sign=signs_certificates,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
