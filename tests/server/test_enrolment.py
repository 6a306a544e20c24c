"""From a token to a member, without a broker; tokens as text."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

import pytest

from helpers_office import NOW_S, Office, packet_of
from sordino_common.channel.certificates import check_certificate, read_identity
from sordino_common.channel.enrolment import read_token
from sordino_common.channel.identity import DeviceKey
from sordino_common.errors import ConfigError
from sordino_common.transport.topics import token_user
from sordino_server.enrolment.ca import fleet_authority
from sordino_server.enrolment.tokens import make_tokens, read_names


def test_from_token_to_member(office: Office) -> None:
    token = office.token(name="pi-01", roles=("data", "compute"), zone="ward-7")
    errand = office.device("pi-01", token)
    signed = errand.begin()
    filed = office.desk.receive(signed.packet, who=token_user(token.id), now_s=NOW_S)
    assert (filed.news, filed.fingerprint, filed.old_fingerprint) == (True, signed.fingerprint, None)
    assert [item.request.name for item in office.desk.pending()] == ["pi-01"]
    assert "pi-01" not in [entry.name for entry in office.home.draft().entries]  # proposed, not in
    office.desk.approve(filed)
    assert office.desk.certify(now_s=NOW_S) == []  # approved, and not signed yet
    office.home.sign(now_s=NOW_S)
    assert office.desk.certify(now_s=NOW_S) == ["pi-01"]
    errand.settle(office.grant_for("pi-01"))
    state = office.folder / "pi-01" / "state"
    key, certificate = read_identity(state / "broker.pem")
    assert certificate is not None
    ca = fleet_authority(office.home.folder).certificate
    check_certificate(certificate, ca=ca, name="pi-01", key=key.public_key(), now_s=NOW_S)
    book = office.home.roster_book(wall_s=time.time)
    assert book.current is not None
    entry = book.current.entry("pi-01")
    assert (entry.roles, entry.zone) == (("compute", "data"), "ward-7")
    assert entry.sign_key == DeviceKey.load(state / "agent.key").public.sign_key
    left = {path.name for path in state.iterdir()}
    assert left == {"agent.key", "broker.pem", "broker-ca.pem", "roster.cbor"}  # neither token nor request
    for path in state.iterdir():
        if path.name in ("agent.key", "broker.pem"):
            assert path.stat().st_mode & 0o777 == 0o600


def test_no_secret_of_a_token_is_kept(office: Office) -> None:
    token = office.token()
    assert token.secret.hex() not in repr(token) and str(token.secret) not in repr(token)
    for path in office.home.folder.rglob("*"):
        if path.is_file():
            data = path.read_bytes()
            assert token.secret not in data
            assert token.secret.hex().encode() not in data
            assert token.text().encode() not in data


# --- tokens as text ----------------------------------------------------------------------------------------------


def test_tokens_survive_mail_programs_and_nothing_else(shared: Office) -> None:
    token = shared.token(name="pi-01")
    text = token.text()
    assert len(text) < 1400
    assert read_token(text) == token
    assert read_token("\n".join(text[at : at + 60] for at in range(0, len(text), 60)) + "\n") == token
    for damaged in (text[:-1], text[:-8], text + "A", text.replace(".", ":"), text[:40] + "A" + text[41:], "", "x"):
        with pytest.raises(ConfigError, match="token"):
            read_token(damaged)
    flipped = text[:200] + ("A" if text[200] != "A" else "B") + text[201:]
    with pytest.raises(ConfigError, match="copy it again, whole"):
        read_token(flipped)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"hours": 0.0}, "--hours 0"),
        ({"hours": 1e6}, "at most 720"),
        ({"hours": float("nan")}, "--hours nan"),
        ({"roles": ("server",)}, "Invalid enum value 'server'"),
        ({"roles": ()}, "length >= 1"),
        ({"zone": "Ward 7"}, "matching regex"),
        ({"name": "server"}, "this is the server's name"),
    ],
)
def test_tokens_that_are_not_made(changes: dict[str, Any], words: str, shared: Office) -> None:
    before = len(shared.store.tokens())
    with pytest.raises(ConfigError, match=words):
        shared.token(**changes)
    assert len(shared.store.tokens()) == before


def test_many_tokens_or_none(office: Office, monkeypatch: pytest.MonkeyPatch) -> None:
    fields: dict[str, Any] = {"roles": ("data",), "zone": "default", "hours": 1.0, "enrol_port": 8884, "now_s": NOW_S}
    made = make_tokens(office.home, office.store, ["pi-01", "pi-02", None, None], **fields)
    assert [token.name for token in made] == ["pi-01", "pi-02", None, None]
    assert len({token.secret for token in made}) == len({token.id for token in made}) == 4
    assert [record.name for record in office.store.tokens()].count(None) == 2
    for token, name in zip(made, ("pi-01", "pi-02", "pi-03", "pi-04"), strict=True):
        office.let_in(packet_of(token, name=name), sign=False)  # each is a token like any other
    for names, words in ((["pi-05", "Pi 6"], "matching regex"), (["pi-05", "server"], "this is the server's name")):
        with pytest.raises(ConfigError, match=words):
            make_tokens(office.home, office.store, names, **fields)
    office.store.add_token(dataclasses.replace(office.store.tokens()[0], id=bytes(16), state="open"))
    monkeypatch.setattr("sordino_server.enrolment.tokens.MOST_OPEN", 2)
    words = "1 tokens are open, and 2 may be; let some of them be used, or withdraw them"
    with pytest.raises(ConfigError, match=words):
        make_tokens(office.home, office.store, ["pi-07", "pi-08"], **fields)
    assert len(office.store.tokens()) == 5


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "there is no name in it"),
        ("# none\n\n", "there is no name in it"),
        ("pi-01\nPi_02\n", "line 2: 'Pi_02' is no name: small letters, digits and hyphens"),
        ("pi-01\n\npi-02\npi-01", "line 4: pi-01 stands in line 1 already"),
        ("pi-01,pi-02", "line 1: 'pi-01,pi-02' is no name"),
    ],
)
def test_lists_of_names_that_are_none(text: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"^names.txt(, |: ){words}"):
        read_names(text, source="names.txt")
    assert read_names("# ward 7\n pi-01 \r\n\npi-02", source="names.txt") == ["pi-01", "pi-02"]
