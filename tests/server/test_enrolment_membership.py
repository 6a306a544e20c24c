"""To stay a member: renewal, rotation, revocation, lists of what is revoked, restored backups."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509

from helpers_office import NOW_S, Office, packet_of, refused, request_of
from sordino_common.channel.certificates import make_csr, new_tls_key, read_identity
from sordino_common.channel.enrolment import Request, make_request
from sordino_common.channel.identity import DeviceKey
from sordino_common.errors import ConfigError, SignatureError
from sordino_server.cli import app, run_cli
from sordino_server.doctor.house import house_findings
from sordino_server.enrolment.broker_config import broker_place
from sordino_server.enrolment.ca import fleet_authority
from sordino_server.enrolment.delivery import write_list
from sordino_server.enrolment.desk import RETIRE_AFTER_S
from sordino_server.enrolment.store import CertificateRecord
from sordino_server.home import Home


def rotate_packet(old: DeviceKey, prover: DeviceKey, **changes: Any) -> bytes:
    new = DeviceKey.generate()
    fields = {
        "purpose": "rotate", "fleet": "lab", "name": "pi-01", "token": b"", "previous": old.public.sign_key,
        "sign_key": new.public.sign_key, "box_key": new.public.box_key, "roles": ("data",), "zone": "default",
        "csr": make_csr(new_tls_key(), "pi-01"), "made_s": 1,
    }  # fmt: skip
    return make_request(Request(**{**fields, **changes}), identity=new, prover=prover)


def test_renewal_changes_the_certificate_and_nothing_else(office: Office) -> None:
    office.member("pi-01")
    state = office.folder / "pi-01" / "state"
    before, epoch = (state / "agent.key").read_bytes(), office.home.draft().epoch
    _, old = read_identity(state / "broker.pem")
    errand = office.errand("pi-01", "renew")
    packet = errand.begin().packet
    assert errand.begin().packet == packet  # given again, it is the same request
    office.let_in(packet, sign=False)
    assert not office.desk.receive(packet, who="pi-01", now_s=NOW_S).news  # a replay gets no second certificate
    errand.settle(office.grant_for("pi-01"))
    _, new = read_identity(state / "broker.pem")
    assert old is not None and new is not None
    assert new.public_key() != old.public_key()
    assert ((state / "agent.key").read_bytes(), office.home.draft().epoch) == (before, epoch)
    assert len(office.store.certificates("pi-01")) == 2


def test_a_member_whose_certificate_has_ended_comes_back_with_a_token(office: Office) -> None:
    office.member("pi-01")
    before = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key").fingerprint
    errand = office.device("pi-01", office.token(name="pi-01"))
    signed = errand.begin()
    assert signed.fingerprint == before
    office.let_in(signed.packet)
    errand.settle(office.grant_for("pi-01"))
    assert len(office.store.certificates("pi-01")) == 2
    assert not (office.folder / "pi-01" / "state" / "enrolment.token").exists()


def test_the_doctor_tells_of_certificates_that_end(office: Office) -> None:
    def findings(after_days: float) -> list[str]:
        roster = office.home.roster_book(wall_s=lambda: NOW_S).current
        found = house_findings(office.home, roster, now_s=NOW_S + 86_400 * after_days)
        return [
            f"{f.level}: {f.text} -> {f.remedy}" for f in found if f.what == "certificates" and "/ca/" not in f.text
        ]

    office.member("pi-01")
    office.member("pi-02")
    assert findings(300) == []
    (said,) = findings(340)
    assert said.startswith("warning: they end within 30 days, and nobody has asked for new ones: pi-01, pi-02 -> ")
    # One asks, and the timer of a server that has the authority's key would answer.
    office.desk.receive(office.errand("pi-01", "renew").begin().packet, who="pi-01", now_s=NOW_S)
    assert findings(300) == ["warning: 1 wait for new ones: pi-01 -> sordino roster renew, daily (sordino-renew.timer)"]
    # Without the key nobody here can sign: at first there is time, then there is none.
    key = office.home.folder / "ca" / "ca.key"
    key.rename(key.with_suffix(".away"))
    elsewhere = " -> sordino roster export -o order.txt, and sign it where the keys are"
    assert findings(300) == [f"warning: 1 wait for new ones: pi-01{elsewhere}"]
    assert findings(340)[0] == (
        f"error: 1 wait for new ones: pi-01; pi-01 can't connect any more within 30 days{elsewhere}"
    )
    key.with_suffix(".away").rename(key)
    (filed,) = office.desk.pending()
    office.desk.approve(filed)
    office.desk.certify(now_s=NOW_S + 86_400 * 340)
    assert [said.partition(":")[0] for said in findings(340)] == ["warning"]  # pi-02, still
    assert "pi-01" not in findings(340)[0]


def test_renew_without_keys_says_whether_anybody_waits(office: Office, capsys: pytest.CaptureFixture[str]) -> None:
    office.member("pi-01")
    (office.home.folder / "ca" / "ca.key").unlink()
    renew = ["roster", "renew", "--offline", "--fleet", str(office.home.folder)]
    assert run_cli(app, renew, program="sordino") == 0
    assert capsys.readouterr().out == "no member waits for a certificate\n"
    office.desk.receive(office.errand("pi-01", "renew").begin().packet, who="pi-01", now_s=NOW_S)
    assert run_cli(app, renew, program="sordino") == 0
    assert "the keys are not here; now: sordino roster export -o order.txt" in capsys.readouterr().err


def test_root_leaves_nothing_in_the_folder_of_the_services_user(office: Office) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can give files to others")
    os.chown(office.home.folder, 65_534, 65_534)
    with pytest.raises(
        ConfigError, match=r"belongs to nobody, who could not read .* as nobody: runuser -u nobody -- s"
    ):
        Home(office.home.folder)
    os.chown(office.home.folder, 4_000_123, 0)  # nobody of this machine: a folder from outside of a container
    Home(office.home.folder)


def test_rotation_ends_the_old_key(office: Office) -> None:
    office.member("pi-01")
    state = office.folder / "pi-01" / "state"
    old = DeviceKey.load(state / "agent.key")
    errand = office.errand("pi-01", "rotate")
    signed = errand.begin()
    assert DeviceKey.load(state / "agent.key").fingerprint == old.fingerprint  # in force until the grant is there
    filed = office.desk.receive(signed.packet, who="pi-01", now_s=NOW_S)
    assert (filed.fingerprint, filed.old_fingerprint) == (signed.fingerprint, old.fingerprint)
    office.let_in(signed.packet, now_s=NOW_S + 1)
    errand.settle(office.grant_for("pi-01"))
    new = DeviceKey.load(state / "agent.key")
    assert new.fingerprint == signed.fingerprint != old.fingerprint
    book = office.home.roster_book(wall_s=time.time)
    assert book.current is not None and book.current.entry("pi-01").sign_key == new.public.sign_key
    # The old key asks for itself again, by rotation, by a token, by renewal.
    token = office.token()
    refused(office, packet_of(token, identity=old, name="pi-07"), "revoked or replaced in this fleet")
    refused(office, rotate_packet(old, old), "a key that the roster does not list")
    # Its certificates end a week later: the device has fetched the new one by then.
    office.desk.retire(now_s=NOW_S + 60)
    assert office.store.revoked() == []
    office.desk.retire(now_s=NOW_S + RETIRE_AFTER_S + 60)
    assert len(office.store.revoked()) == 1


def test_who_may_not_rotate_or_renew(office: Office) -> None:
    office.member("pi-01")
    key = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key")
    stranger = DeviceKey.generate()
    with pytest.raises(SignatureError, match="enrol-rotate"):
        office.desk.receive(rotate_packet(key, stranger), who="pi-01", now_s=NOW_S)
    refused(office, rotate_packet(stranger, stranger), "a key that the roster does not list")
    nobody = rotate_packet(key, key, name="pi-09", csr=make_csr(new_tls_key(), "pi-09"))
    refused(office, nobody, "the signed roster lacks it")
    refused(office, rotate_packet(key, key), "left in the place of pi-02", who="pi-02")
    renewal = {"purpose": "renew", "token": b""}
    token = office.token()
    stolen = make_request(request_of(token, identity=stranger, **renewal), identity=stranger, prover=None)
    refused(office, stolen, "with other keys than the roster lists")
    mixed = request_of(token, identity=key, box_key=stranger.public.box_key, **renewal)
    refused(office, make_request(mixed, identity=key, prover=None), "with other keys than the roster lists")


def test_revocation_is_for_good(office: Office) -> None:
    office.member("pi-01")
    office.member("pi-02")
    key = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key")
    late = office.errand("pi-01", "renew").begin().packet
    office.desk.receive(late, who="pi-01", now_s=NOW_S)
    ended = office.desk.revoke("pi-01", now_s=NOW_S)
    roster = office.home.sign(now_s=NOW_S)
    write_list(office.home, office.store, now_s=NOW_S)
    assert [entry.name for entry in roster.entries] == ["pi-02", "server"]
    crl = x509.load_pem_x509_crl((office.home.folder / "ca" / "crl.pem").read_bytes())
    assert [entry.serial_number for entry in crl] == [record.serial for record in ended]
    assert office.desk.pending() == []  # what it had asked for before is refused along with it
    assert [item.request.name for item in office.desk.grants("granted")] == ["pi-02"]
    assert not office.desk.receive(late, who="pi-01", now_s=NOW_S).news
    refused(office, packet_of(office.token(), identity=key), "revoked or replaced in this fleet")
    office.let_in(packet_of(office.token()))  # another device under the old name is welcome
    for name, words in (("server", "is the server"), ("pi-09", "is not in the roster")):
        with pytest.raises(ConfigError, match=words):
            office.desk.revoke(name, now_s=NOW_S)


def test_lists_are_newer_than_the_last_one_and_never_end(shared: Office) -> None:
    issued = []
    for serial in range(1, 4):
        shared.store.add_certificate(
            CertificateRecord(serial=serial, name="pi-77", made_s=NOW_S, ends_s=NOW_S + 9e6, revoked_s=int(NOW_S))
        )
        write_list(shared.home, shared.store, now_s=NOW_S)
        before = (shared.home.folder / "ca" / "crl.pem").read_bytes()
        write_list(shared.home, shared.store, now_s=NOW_S)  # no news, no list
        assert (shared.home.folder / "ca" / "crl.pem").read_bytes() == before
        write_list(shared.home, shared.store, now_s=NOW_S)
        crl = x509.load_pem_x509_crl((shared.home.folder / "ca" / "crl.pem").read_bytes())
        issued.append(crl.last_update_utc)
        assert crl.next_update_utc == fleet_authority(shared.home.folder).certificate.not_valid_after_utc
    assert issued == sorted(set(issued))


def test_a_restored_backup_lets_nobody_in_again(office: Office) -> None:
    office.member("pi-01")
    office.member("pi-02")
    write_list(office.home, office.store, now_s=NOW_S)
    office.store.close()
    backup = shutil.copytree(office.home.folder, office.folder / "backup")
    now = Office(office.folder)
    ended = now.desk.revoke("pi-01", now_s=NOW_S)
    newest = now.home.sign(now_s=NOW_S)
    signed = now.home.roster_book(wall_s=time.time).signed
    write_list(now.home, now.store, now_s=NOW_S)
    broker = Path(broker_place(now.home).folder)  # type: ignore[union-attr]
    shutil.copy(now.home.folder / "ca" / "crl.pem", broker / "crl.pem")
    now.store.close()
    shutil.rmtree(now.home.folder)
    backup.rename(now.home.folder)
    # The records know nothing of it; the list at the broker does, and what is there stays.
    restored = Office(office.folder)
    assert restored.store.revoked() == []
    write_list(restored.home, restored.store, now_s=NOW_S)
    old, new = (x509.load_pem_x509_crl((f / "crl.pem").read_bytes()) for f in (broker, restored.home.folder / "ca"))
    assert [e.serial_number for e in new] == [e.serial_number for e in old] == [r.serial for r in ended]
    assert new.last_update_utc > old.last_update_utc
    # And the roster that the broker keeps says who is out: it comes back before anything is signed.
    assert signed is not None
    assert "pi-01" in [entry.name for entry in restored.home.draft().entries]
    restored.home.roster_book(wall_s=time.time).accept(signed)
    assert restored.desk.follow(newest, now_s=NOW_S) == ["pi-01"]
    assert [entry.name for entry in restored.home.draft().entries] == ["pi-02", "server"]
    assert restored.home.sign(now_s=NOW_S).epoch == newest.epoch + 1
    key = DeviceKey.load(office.folder / "pi-01" / "state" / "agent.key")
    refused(restored, packet_of(restored.token(), identity=key), "revoked or replaced in this fleet")
    restored.store.close()
