"""Texts without secrets: the second line behind an allow-list. Whatever is known to be secret, and whatever looks so.

Known: the secrets of this host, in every encoding that a text might carry them in (as they are, hex, base32, base64 in
its three alignments, URL-safe too, percent-encoded, escaped as JSON or Python do). Looks so: PEM blocks, runs of hex
or base64 of 16 bytes and more, what stands after password=, token:, Bearer and the like, user and password in an
address.

NOT found: a secret that is nowhere on this host, short, and stands in a sentence without a word before it that tells.
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Final
from urllib.parse import quote, quote_plus

REMOVED: Final = "(removed)"
_LEAST: Final = 4  # characters; a shorter "secret" would blank half of every text
_LEAST_CODED: Final = 6
_TELLING: Final = (
    r"pass(?:word|wd|phrase)?|secret|token|credential|auth(?:orization)?|api[_-]?key|private[_-]?key|cookie"
)
_SECRET_NAME: Final = re.compile(rf"(?:{_TELLING}|key|pgpass)", re.IGNORECASE)
_PATTERNS: Final = (
    (re.compile(r"-----BEGIN [A-Z0-9 ]+-----.*?(?:-----END [A-Z0-9 ]+-----|\Z)", re.DOTALL), REMOVED),
    (re.compile(r"-----END [A-Z0-9 ]+-----"), REMOVED),
    (re.compile(r"(?<=://)[^\s/@]+@"), f"{REMOVED}@"),
    (re.compile(r"\b((?:bearer|basic|digest)\s+)[A-Za-z0-9._~+/=-]{4,}", re.IGNORECASE), rf"\1{REMOVED}"),
    (
        re.compile(
            rf"([\w.-]*(?:{_TELLING})[\w.-]*[\"']?\s*(?:=|:|=>|\bis\b)\s*)(?:\"[^\"\n]*\"|'[^'\n]*'|[^\s,;}}\]]+)",
            re.IGNORECASE,
        ),
        rf"\1{REMOVED}",
    ),
)
_HEX: Final = re.compile(r"(?<![0-9A-Za-z])(?:[0-9a-fA-F]{2}[:\s]?){15,}[0-9a-fA-F]{2}(?![0-9A-Za-z])")
_RUN: Final = re.compile(r"[A-Za-z0-9+/_=-]{22,}")


class Scrubber:
    """`secrets`: what this host keeps, as bytes: whole files, passwords, tokens."""

    def __init__(self, secrets: Iterable[bytes] = ()) -> None:
        needles = {needle for secret in secrets for needle in _needles(secret)}
        ordered = sorted(needles, key=lambda needle: (-len(needle), needle))
        self._known = re.compile("|".join(map(re.escape, ordered))) if ordered else None
        self.removed = 0

    def clean(self, text: str) -> str:
        """`text` without what is, or looks like, a secret."""
        text = self.clean_known(text)
        for pattern, instead in _PATTERNS:
            text = self._replace(pattern, instead, text)
        text = self._replace(_HEX, REMOVED, text)
        return _RUN.sub(self._run, text)

    def clean_known(self, text: str) -> str:
        """`text` without the secrets of this host; what only looks like one stays."""
        return text if self._known is None else self._replace(self._known, REMOVED, text)

    def holds(self, text: str) -> bool:
        """Whether a known secret is in it."""
        return self._known is not None and self._known.search(text) is not None

    def _replace(self, pattern: re.Pattern[str], instead: str, text: str) -> str:
        text, many = pattern.subn(instead, text)
        self.removed += many
        return text

    def _run(self, found: re.Match[str]) -> str:
        """A run of base64's letters: names of runs and files are of one case, 16 random bytes are not."""
        run = found[0]
        mixed = bool(re.search("[A-Z]", run)) and bool(re.search("[a-z]", run)) and bool(re.search("[0-9]", run))
        base32 = bool(re.fullmatch(r"[A-Z2-7]{24,}=*", run)) and bool(re.search("[2-7]", run))
        if not mixed and not base32:
            return run
        self.removed += 1
        return REMOVED


def secrets_in(data: bytes) -> Iterator[bytes]:
    """The secrets that a file of a host may hold: all of it, its lines, and what its words and PEM blocks stand for."""
    data = data[: 1 << 20]
    yield data.strip()
    text = data.decode("utf-8", "replace")
    for block in re.findall(r"-----BEGIN [A-Z0-9 ]*PRIVATE KEY-----(.*?)-----END", text, re.DOTALL):
        body = "".join(block.split())
        der = _decoded(body)
        yield body.encode()
        if der is not None:
            yield der
            yield der[-32:]  # the seed of an Ed25519 or X25519 key (RFC 8410)
    text = re.sub(r"-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", "", text, flags=re.DOTALL)
    for line in text.splitlines():
        word = line.strip()
        if word.startswith("-----") or len(word) < _LEAST:
            continue
        yield word.encode()
        raw = _decoded(word)
        if raw is not None and len(raw) >= 16:
            yield raw


def secrets_of_environment(environ: Mapping[str, str]) -> Iterator[bytes]:
    """Values of variables whose names tell."""
    for name, value in environ.items():
        if _SECRET_NAME.search(name) and not value.startswith(("/", ".")):
            yield value.encode()
        found = re.search(r"://[^/@\s:]+:([^/@\s]+)@", value)
        if found:
            yield found[1].encode()


def secrets_of_yaml(text: str) -> Iterator[bytes]:
    """Values in a configuration, even one that can't be read, whose keys tell; and passwords in addresses."""
    for key, value in re.findall(r"([\w-]+)[\"']?[ \t]*:[ \t]*(\"[^\"\n]*\"|'[^'\n]*'|[^\s,{}\[\]#][^,}\]#\n]*)", text):
        if _SECRET_NAME.search(key) and not key.endswith(("_file", "_key")):
            yield value.strip().strip("\"'").encode()
    for found in re.findall(r"://[^/@\s:]+:([^/@\s]+)@", text):
        yield found.encode()


def _needles(secret: bytes) -> Iterator[str]:
    text = secret.decode("utf-8", "replace")
    if len(text) >= _LEAST and "�" not in text:
        yield text
        yield from (quote(text), quote(text, safe=""), quote_plus(text), json.dumps(text)[1:-1])
        yield text.encode("unicode_escape").decode()
        yield repr(text)[1:-1]
    if len(secret) < _LEAST_CODED:
        return
    for data in (secret, secret + b"\n"):  # `openssl base64 < file` takes the end of the line along
        yield data.hex()
        yield data.hex().upper()
        yield data.hex(":")
        yield data.hex(" ")
        yield base64.b32encode(data).decode().rstrip("=")
        for shift in range(3):  # as a part of something longer, the first and last letters depend on the neighbours
            coded = base64.b64encode(b"\0" * shift + data).decode().rstrip("=")
            inner = coded[(0, 2, 3)[shift] : len(coded) - 1 if shift or len(data) % 3 else len(coded)]
            if len(inner) >= _LEAST_CODED:
                yield inner
                yield inner.replace("+", "-").replace("/", "_")


def _decoded(text: str) -> bytes | None:
    """What hex or base64 stands for."""
    try:
        return bytes.fromhex(text)
    except ValueError:
        pass
    try:
        return base64.b64decode(text.replace("-", "+").replace("_", "/") + "=" * (-len(text) % 4), validate=True)
    except (binascii.Error, ValueError):
        return None
