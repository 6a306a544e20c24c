"""How long certificates are valid still: those in our files, and the broker's own."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Final

from cryptography import x509

from sordino_common.diagnosis.finding import Finding, error, ok, warning

WARN_DAYS: Final = 30
_DAY_S: Final = 86_400


def certificate_files(path: Path, what: str, *, now_s: float, renew: str) -> Iterator[Finding]:
    """All certificates in a PEM file. `renew`: the command that makes new ones."""
    try:
        found = x509.load_pem_x509_certificates(path.read_bytes())
    except OSError as problem:
        yield error("certificates", f"{what} {path}: {problem.strerror}", renew)
        return
    except ValueError:
        yield error("certificates", f"{what} {path}: expected certificates in PEM", renew)
        return
    for certificate in found:
        yield dates(certificate, f"{what} {path}", now_s=now_s, renew=renew)


def broker_certificate(der: bytes, *, now_s: float) -> Finding:
    """The one that the broker has shown, and that was accepted."""
    return dates(
        x509.load_der_x509_certificate(der),
        "the broker's",
        now_s=now_s,
        renew="on the broker's host: sordino broker-config DIR --again, then restart the broker",
    )


def dates(certificate: x509.Certificate, what: str, *, now_s: float, renew: str) -> Finding:
    """Not valid yet, not any more, soon no more, or for so many days."""
    begins_s = certificate.not_valid_before_utc.timestamp()
    ends_s = certificate.not_valid_after_utc.timestamp()
    until = f"{certificate.not_valid_after_utc:%Y-%m-%d}"
    days = (ends_s - now_s) / _DAY_S
    if now_s < begins_s:
        text = f"{what}: not valid before {certificate.not_valid_before_utc:%Y-%m-%d %H:%M} UTC"
        return error("certificates", text, "is this clock right? timedatectl status")
    if days <= 0:
        return error("certificates", f"{what}: ended on {until}, {-days:.0f} days ago", renew)
    if days <= WARN_DAYS:
        return warning("certificates", f"{what}: ends on {until}, in {days:.0f} days", renew)
    return ok("certificates", f"{what}: valid until {until}, {days:.0f} days")
