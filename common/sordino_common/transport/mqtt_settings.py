"""Where the broker is and how to speak to it, as it stands in a configuration file. Knows nothing of paho."""

from __future__ import annotations

import ssl
from pathlib import Path
from typing import Annotated, Final

import msgspec

from sordino_common.errors import ConfigError

Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1024)]


class TlsSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """TLS 1.2 or newer; the broker's certificate is always checked, its name too.

    `ca`: file with the certificates that may sign the broker's (none: those of the system). `certificate` and `key`:
    ours, if the broker asks for one (`key` may stand in the same file). `server_name`: the name in the broker's
    certificate, if it is not `host`. All in PEM."""

    ca: Text | None = None
    certificate: Text | None = None
    key: Text | None = None
    server_name: Text | None = None


class MqttSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Times in seconds. `client_id` must be one's own at the broker; who embeds these settings may fill it in later.

    `window`: packets unacknowledged at a time; the broker's receive maximum counts if it is smaller.
    `max_packet_bytes`: largest payload sent; the broker's maximum packet size counts if it is smaller.
    `max_inbound_bytes`: largest packet that the broker may send us; it drops what is larger."""

    host: Text
    port: Annotated[int, msgspec.Meta(ge=1, le=65535)] = 1883
    client_id: Annotated[str, msgspec.Meta(max_length=1024)] = ""
    username: Text | None = None
    password: Text | None = None
    keepalive_s: Annotated[int, msgspec.Meta(ge=1, le=3600)] = 60
    connect_timeout_s: Annotated[float, msgspec.Meta(gt=0, le=300)] = 10.0
    reconnect_least_s: Annotated[float, msgspec.Meta(gt=0, le=3600)] = 1.0
    reconnect_most_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 60.0
    refused_s: Annotated[float, msgspec.Meta(gt=0, le=86400)] = 30.0
    window: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 16
    max_packet_bytes: Annotated[int, msgspec.Meta(ge=1024, le=16_000_000)] = 1_000_000
    max_inbound_bytes: Annotated[int, msgspec.Meta(ge=4096, le=16_000_000)] = 2_000_000
    tls: TlsSettings | None = None

    def __repr__(self) -> str:
        user = f"{self.username}@" if self.username else ""
        tls = " tls" if self.tls is not None else ""
        return f"<MqttSettings {user}{self.host}:{self.port}{tls} client_id={self.client_id!r}>"


_CIPHERS: Final = "ECDHE+AESGCM:ECDHE+CHACHA20"  # of TLS 1.2; forward secret and authenticated, RFC 9325 section 4.2


def tls_context(tls: TlsSettings) -> ssl.SSLContext:
    """The client's side of TLS. Raises `ConfigError` that names the file which can't be used."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.set_ciphers(_CIPHERS)
    if tls.ca is None:
        context.load_default_certs(ssl.Purpose.SERVER_AUTH)
    else:
        _readable("tls.ca", tls.ca)
        try:
            context.load_verify_locations(cafile=tls.ca)
        except ssl.SSLError as error:
            raise ConfigError(f"tls.ca: {tls.ca}: expected certificates in PEM: {error.reason}") from None
    if tls.certificate is None:
        if tls.key is not None:
            raise ConfigError("tls.key is given, but no tls.certificate that it belongs to")
        return context
    _readable("tls.certificate", tls.certificate)
    if tls.key is not None:
        _readable("tls.key", tls.key)
    try:
        # An empty password: a key that is encrypted is an error here, not a question on the terminal.
        context.load_cert_chain(tls.certificate, tls.key, password="")
    except (ssl.SSLError, ValueError) as error:
        key = tls.key or tls.certificate
        reason = getattr(error, "reason", None) or error
        raise ConfigError(
            f"tls: certificate {tls.certificate} with key {key}: expected an unencrypted key and its certificate "
            f"in PEM: {reason}"
        ) from None
    return context


def _readable(name: str, path: str) -> None:
    try:
        with Path(path).open("rb"):
            pass
    except OSError as error:
        raise ConfigError(f"{name}: {path}: {error.strerror}") from None
