"""What a device asks the operator for, and takes home: to be enrolled, a new certificate, new keys.

An errand survives the process: the keys that it is about, and the request as it was first sent, lie in the state
directory until the grant is there. A request is sent again byte for byte, so that a token is used once. In the state
directory:

    next-agent.key     new identity (to rotate)          PURPOSE.request    what was asked
    next-broker.pem    new key for the broker            enrolment.token    until the token has done its work
    broker.pem         key and certificate in force      enrolment.pem      the token's key and certificate

A grant is checked against everything that the device knows by itself before any file changes
(`sordino_common.channel.enrolment` lists what could come instead). Files are replaced one by one, each as a whole; an
interruption in between is made good when the command is given again.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Final, cast

from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

from sordino_agent.config import IDENTITY_FILE, KEY_FILE, LoadedConfig
from sordino_agent.service import roster_book
from sordino_common.channel.certificates import (
    TlsKey,
    check_certificate,
    make_csr,
    new_tls_key,
    read_certificate,
    read_identity,
    write_identity,
)
from sordino_common.channel.enrolment import (
    EnrolmentRefused,
    Purpose,
    Request,
    Roles,
    SignedRequest,
    Token,
    from_text,
    make_request,
    read_grant_packet,
    read_request_packet,
    read_token,
    to_text,
    token_key,
    token_tls_key,
)
from sordino_common.channel.files import sync_folder, write_atomically
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.roster import read_roster
from sordino_common.errors import ConfigError, RemoteError, RosterError, StaleEpoch
from sordino_common.transport.mailbox import visit, visitor_settings
from sordino_common.transport.mqtt_settings import MqttSettings, TlsSettings
from sordino_common.transport.topics import grant_topic, request_topic, token_user

CA_FILE: Final = "broker-ca.pem"
NEXT_IDENTITY_FILE: Final = "next-broker.pem"
NEXT_KEY_FILE: Final = "next-agent.key"
TOKEN_FILE: Final = "enrolment.token"  # noqa: S105  a file name
TOKEN_IDENTITY_FILE: Final = "enrolment.pem"  # noqa: S105


class Errand:
    """One purpose of one device. `wall_s`: the clock. Raises `ConfigError` for files that can't be read or written."""

    def __init__(self, loaded: LoadedConfig, purpose: Purpose, *, wall_s: Callable[[], float]) -> None:
        self._loaded = loaded
        self._purpose: Purpose = purpose
        self._wall_s = wall_s
        self._state = loaded.state_dir
        self._section = loaded.config.agent

    # --- asking ----------------------------------------------------------------------------------------------------

    def begin(self) -> SignedRequest:
        """The request: the one under way, or a new one with new keys, on disk when this returns."""
        path = self._request_path
        if path.exists():
            return read_request_packet(from_text(_read(path), "request"))
        try:
            return self._make()
        except OSError as error:
            raise ConfigError(f"{error.filename or self._state}: can't be written: {error.strerror}") from None

    def _make(self) -> SignedRequest:
        now = self._loaded.device_key()
        identity, prover, token = now, None, None
        if self._purpose == "enrol":
            token = self.token()
            prover = token_key(token.secret)
        elif self._purpose == "rotate":
            if self._loaded.config.device_key is not None:
                raise ConfigError(
                    f"{self._loaded.path}: device_key names a file elsewhere, which is not replaced from here. For the "
                    f"rotation put the key into {self._state / KEY_FILE}, without device_key; then back"
                )
            path = self._state / NEXT_KEY_FILE
            if not path.exists():
                DeviceKey.generate().save(path)
            identity, prover = DeviceKey.load(path), now
        if token is not None:
            roles, zone = token.roles, token.zone
        else:
            entry = roster_book(self._loaded, wall_s=self._wall_s, persist=False).party(self._section.name)
            roles, zone = cast("Roles", tuple(entry.roles)), entry.zone  # the roster has checked their names
        tls_path = self._state / NEXT_IDENTITY_FILE
        if not tls_path.exists():
            write_identity(tls_path, new_tls_key())
        key, _ = read_identity(tls_path)
        request = Request(
            purpose=self._purpose,
            fleet=self._section.fleet,
            name=self._section.name,
            token=token.id if token is not None else b"",
            previous=now.public.sign_key if self._purpose == "rotate" else b"",
            sign_key=identity.public.sign_key,
            box_key=identity.public.box_key,
            roles=roles,
            zone=zone,
            csr=make_csr(key, self._section.name),
            made_s=max(0, int(self._wall_s())),
        )
        packet = make_request(request, identity=identity, prover=prover)
        write_atomically(self._request_path, to_text(packet, "request").encode(), mode=0o600)
        return read_request_packet(packet)

    def token(self) -> Token:
        """The token that `enroll` has put aside. Raises `ConfigError`."""
        path = self._state / TOKEN_FILE
        if not path.exists():
            raise ConfigError(
                f"{path}: there is no enrolment under way here; begin one with: sordino-agent enroll 'TOKEN' --dir "
                f"{self._loaded.folder}"
            )
        return read_token(_read(path))

    # --- the broker ------------------------------------------------------------------------------------------------

    def ask(self, signed: SignedRequest, *, wait_s: float, complain: Callable[[str], None]) -> bool:
        """Leave the request at the broker and wait for the grant; whether it came, and is in force.

        Grants that do not fit are told to `complain`, and the waiting goes on: anybody at the broker could send one.
        Raises `FleetUnavailable`, and `ConfigError` for files."""
        who, settings = self._place(signed.request)
        fleet = signed.request.fleet

        def take(_topic: str, packet: bytes) -> bool:
            if not packet:
                return False
            try:
                if read_grant_packet(packet).request != signed.digest:
                    return False  # of an earlier request: what is retained stays until the next one
                self.settle(packet)
            except RemoteError as error:
                complain(f"{error} [{error.code}]")
                return False
            return True

        return visit(
            settings,
            leave=[(request_topic(fleet, who), signed.packet)],
            filters=[grant_topic(fleet, who)],
            take=take,
            wait_s=wait_s,
            clear=[request_topic(fleet, who)],  # answered: nobody needs to read it again
        )

    def _place(self, request: Request) -> tuple[str, MqttSettings]:
        broker = self._loaded.broker()
        if self._purpose != "enrol":
            if broker.tls is None or broker.tls.certificate is None:
                raise ConfigError(
                    f"{self._loaded.path}: broker.tls has no certificate, so there is none to renew; keys and "
                    "certificates of brokers that are not the fleet's own are their operator's affair"
                )
            return request.name, visitor_settings(broker, self._purpose)
        token = self.token()
        who = token_user(token.id)
        pem = token_tls_key(token.secret).private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
        pem += read_certificate(token.certificate).public_bytes(Encoding.PEM)
        path = self._state / TOKEN_IDENTITY_FILE
        try:
            write_atomically(path, pem, mode=0o600)
        except OSError as error:
            raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
        settings = MqttSettings(
            host=token.host,
            port=token.enrol_port,
            client_id=who,
            connect_timeout_s=broker.connect_timeout_s,
            tls=TlsSettings(ca=str(self._state / CA_FILE), certificate=str(path)),
        )
        return who, settings

    # --- what comes back -------------------------------------------------------------------------------------------

    def settle(self, packet: bytes) -> None:
        """Put the grant into force, or raise and change nothing: `RemoteError`s, `ConfigError`."""
        signed = self.begin()
        request = signed.request
        grant = read_grant_packet(packet)
        if grant.request != signed.digest:
            raise EnrolmentRefused(f"grant: it answers another request than the one that {request.name} has made")
        roster = read_roster(grant.signed_roster, operator_key=self._loaded.operator_key())
        entry = roster.entry(request.name)
        if (entry.sign_key, entry.box_key) != (request.sign_key, request.box_key):
            raise RosterError(
                f"grant: the roster lists other keys for {request.name} than this device has made. Somebody between "
                "here and the operator has put theirs there: tell the operator, who compares fingerprints"
            )
        if roster.server.name != self._section.server:
            raise RosterError(f"grant: the roster's server is {roster.server.name}, not {self._section.server}")
        tls_path = self._state / NEXT_IDENTITY_FILE
        key, _ = read_identity(tls_path if tls_path.exists() else self._state / IDENTITY_FILE)
        certificate = read_certificate(grant.certificate)
        check_certificate(certificate, ca=self.ca(), name=request.name, key=key.public_key(), now_s=self._wall_s())
        book = roster_book(self._loaded, wall_s=self._wall_s)
        try:
            book.accept(grant.signed_roster)
        except StaleEpoch:  # a newer one is in force here, and stays so; then that has to list the keys
            entry = book.party(request.name)
            if (entry.sign_key, entry.box_key) != (request.sign_key, request.box_key):
                raise
        try:
            self._install(request, key, certificate)
        except OSError as error:
            raise ConfigError(f"{error.filename or self._state}: can't be written: {error.strerror}") from None

    def ca(self) -> x509.Certificate:
        """The authority that this device was given with its token. Raises `ConfigError`."""
        path = self._state / CA_FILE
        try:
            return x509.load_pem_x509_certificate(path.read_bytes())
        except OSError as error:
            raise ConfigError(f"{path}: the fleet's authority can't be read: {error.strerror}") from None
        except ValueError:
            raise ConfigError(f"{path}: expected a certificate in PEM") from None

    def _install(self, request: Request, key: TlsKey, certificate: x509.Certificate) -> None:
        fresh = self._state / NEXT_KEY_FILE
        if self._purpose == "rotate" and fresh.exists():
            if DeviceKey.load(fresh).public.sign_key != request.sign_key:
                raise ConfigError(f"{fresh}: not the key that was granted; remove it, and rotate again")
            fresh.replace(self._state / KEY_FILE)
            sync_folder(self._state)
        write_identity(self._state / IDENTITY_FILE, key, certificate)
        names = [NEXT_IDENTITY_FILE, self._request_path.name]
        if self._purpose == "enrol":
            names += [TOKEN_FILE, TOKEN_IDENTITY_FILE]
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                (self._state / name).unlink()
        sync_folder(self._state)

    @property
    def _request_path(self) -> Path:
        return self._state / f"{self._purpose}.request"


def _read(path: Path) -> str:
    try:
        return path.read_bytes()[: 1 << 20].decode("ascii", "replace")
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
