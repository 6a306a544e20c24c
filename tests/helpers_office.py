"""An enrolment desk with its fleet directory, devices that come to it, and packets by hand; without a broker."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from sordino_agent.config import load_agent_config
from sordino_agent.enrolling import enroll
from sordino_agent.errand import Errand
from sordino_common.channel.certificates import make_csr, new_tls_key
from sordino_common.channel.enrolment import EnrolmentRefused, Request, Token, make_request, token_key
from sordino_common.channel.identity import DeviceKey
from sordino_common.messages.codec import decode, encode
from sordino_server.enrolment.desk import EnrolmentDesk
from sordino_server.enrolment.store import EnrolmentStore
from sordino_server.enrolment.tokens import make_tokens
from sordino_server.home import Home

NOW_S = time.time()


class Office:
    """A fleet directory with its desk, and devices that come to it."""

    def __init__(self, folder: Path) -> None:
        """In `folder`, in which `make_fleet` has made a fleet."""
        self.folder = folder
        self.home = Home(folder / "fleet")
        self.store = EnrolmentStore(self.home.folder)
        self.desk = EnrolmentDesk(self.home, self.store)

    def token(self, **changes: Any) -> Token:
        fields: dict[str, Any] = {
            "name": None,
            "roles": ("data",),
            "zone": "default",
            "hours": 1.0,
            "now_s": NOW_S,
            **changes,
        }
        (made,) = make_tokens(self.home, self.store, [fields.pop("name")], enrol_port=8884, **fields)
        return made

    def device(self, name: str, token: Token) -> Errand:
        """A device's folder after `sordino-agent enroll --offline`."""
        folder = self.folder / name
        enroll(
            folder, token=token.text(), name=name, wait_s=0, offline=True, grant=None, say=lambda _text: None
        )  # fmt: skip
        return Errand(load_agent_config(folder / "agent.yaml"), "enrol", wall_s=time.time)

    def let_in(self, packet: bytes, *, now_s: float = NOW_S, sign: bool = True) -> None:
        filed = self.desk.receive(packet, who=None, now_s=now_s)
        self.desk.approve(filed)
        if sign:
            self.home.sign(now_s=now_s)
        self.desk.certify(now_s=now_s)

    def grant_for(self, name: str) -> bytes:
        found = self.desk.grants("granted", "delivered", "done")
        return next(item.packet for item in found if item.request.name == name)

    def member(self, name: str) -> Errand:
        errand = self.device(name, self.token(name=name))
        self.let_in(errand.begin().packet)
        errand.settle(self.grant_for(name))
        return errand

    def errand(self, name: str, purpose: Any) -> Errand:
        return Errand(load_agent_config(self.folder / name / "agent.yaml"), purpose, wall_s=time.time)


def request_of(of: Token, *, identity: DeviceKey, name: str = "pi-01", **changes: Any) -> Request:
    fields = {
        "purpose": "enrol", "fleet": of.fleet, "name": name, "token": of.id, "previous": b"",
        "sign_key": identity.public.sign_key, "box_key": identity.public.box_key, "roles": of.roles,
        "zone": of.zone, "csr": make_csr(new_tls_key(), name), "made_s": int(NOW_S),
    }  # fmt: skip
    return Request(**{**fields, **changes})


def packet_of(
    token: Token, *, identity: DeviceKey | None = None, prover: DeviceKey | None = None, **changes: Any
) -> bytes:
    identity = identity or DeviceKey.generate()
    request = request_of(token, identity=identity, **changes)
    return make_request(request, identity=identity, prover=prover or token_key(token.secret))


def swapped(packet: bytes, **changes: Any) -> bytes:
    """As a man in the middle would: the same signatures over another body."""
    kind, raw, signature, proof = decode(packet)
    fields = decode(raw)
    for name, value in changes.items():
        fields[Request.__struct_fields__.index(name)] = value
    return encode([kind, encode(fields), signature, proof])


def refused(office: Office, packet: bytes, words: str, *, who: str | None = None, now_s: float = NOW_S) -> None:
    before = (office.home.folder / "roster.yaml").read_bytes(), len(office.desk.pending())
    with pytest.raises(EnrolmentRefused, match=words):
        office.desk.receive(packet, who=who, now_s=now_s)
    assert ((office.home.folder / "roster.yaml").read_bytes(), len(office.desk.pending())) == before
