"""Keys, files, signatures: what verifies, what must not, and what a key file has to look like."""

from __future__ import annotations

import base64
import copy
import os
import pickle
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed448 import Ed448PrivateKey
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    NoEncryption,
    PrivateFormat,
)

from helpers_channel import KEYS, OPERATOR, seeded
from sordino_common.channel.boot import next_boot
from sordino_common.channel.identity import (
    DeviceKey,
    OperatorKey,
    PublicKeys,
    check_box_key,
    check_sign_key,
    fingerprint_of,
    seal_to,
    verify,
)
from sordino_common.errors import ConfigError, LimitExceeded, LocalError, SessionError, SignatureError

P = 2**255 - 19
L = 2**252 + 27742317777372353535851937790883648493
D = -121665 * pow(121666, -1, P) % P
ALTO, BASS = KEYS["alto"], KEYS["bass"]


# --- an oracle: Edwards25519 in Python integers (RFC 8032 section 5.1.4) ---------------------------------------------


def add(a: tuple[int, int], b: tuple[int, int]) -> tuple[int, int]:
    (x1, y1), (x2, y2) = a, b
    t = D * x1 * x2 * y1 * y2 % P
    return (
        (x1 * y2 + x2 * y1) * pow(1 + t, -1, P) % P,
        (y1 * y2 + x1 * x2) * pow(1 - t, -1, P) % P,
    )


def times(k: int, point: tuple[int, int]) -> tuple[int, int]:
    result = (0, 1)
    while k:
        if k & 1:
            result = add(result, point)
        point, k = add(point, point), k >> 1
    return result


def x_of(y: int) -> int | None:
    square = (y * y - 1) * pow(D * y * y + 1, -1, P) % P
    root = pow(square, (P + 3) // 8, P)
    for candidate in (root, root * pow(2, (P - 1) // 4, P) % P):
        if candidate * candidate % P == square:
            return candidate
    return None


def torsion() -> set[tuple[int, int]]:
    """All eight points whose order divides 8: L times any point is one of them."""
    found: set[tuple[int, int]] = set()
    y = 2
    while len(found) < 8:
        x = x_of(y)
        if x is not None:
            base = times(L, (x, y))
            found |= {times(k, base) for k in range(8)}
        y += 1
    return found


def test_exactly_the_points_of_small_order_are_refused_as_signing_keys() -> None:
    points = torsion()
    assert len(points) == 8
    for x, y in points:
        assert times(8, (x, y)) == (0, 1)
        for sign in (0, 1):
            assert check_sign_key((y | sign << 255).to_bytes(32, "little")) == "the signing key has small order"
    base_y = 4 * pow(5, -1, P) % P
    assert check_sign_key(base_y.to_bytes(32, "little")) is None


def test_exactly_the_small_u_are_refused_as_box_keys() -> None:
    for _, y in torsion():
        u = (1 + y) * pow(1 - y, -1, P) % P if y != 1 else 0  # the birational map of RFC 7748 section 4.1
        assert check_box_key(u.to_bytes(32, "little")) == "the X25519 key has small order"
    assert check_box_key((1).to_bytes(32, "little")) == "the X25519 key has small order"  # on the twist
    assert check_box_key((9).to_bytes(32, "little")) is None


@pytest.mark.parametrize("extra", range(19))
def test_second_encodings_are_refused(extra: int) -> None:
    beyond = (P + extra).to_bytes(32, "little")
    assert check_sign_key(beyond) == "the signing key is not canonical (y >= 2^255 - 19)"
    assert check_box_key(beyond) == "the X25519 key is not canonical (u >= 2^255 - 19)"


def test_a_box_key_with_its_ignored_top_bit_set_is_refused() -> None:
    key = bytearray(ALTO.public.box_key)
    key[31] |= 0x80
    assert check_box_key(bytes(key)) == "the X25519 key is not canonical (u >= 2^255 - 19)"


@pytest.mark.parametrize("size", [0, 31, 33, 64])
def test_keys_of_a_wrong_length_are_refused(size: int) -> None:
    assert check_sign_key(bytes(size)) == f"a signing key has 32 bytes, got {size}"
    assert check_box_key(bytes(size)) == f"an X25519 key has 32 bytes, got {size}"
    with pytest.raises(LocalError, match="public keys: a signing key has 32 bytes"):
        PublicKeys(sign_key=bytes(size), box_key=ALTO.public.box_key)


# --- signatures ------------------------------------------------------------------------------------------------------


def test_a_signature_verifies_for_its_key_purpose_and_data_only() -> None:
    signature = ALTO.sign("hello", b"data")
    verify(ALTO.public.sign_key, "hello", b"data", signature)
    for key, purpose, data in (
        (BASS.public.sign_key, "hello", b"data"),
        (ALTO.public.sign_key, "accept", b"data"),
        (ALTO.public.sign_key, "hello", b"datb"),
        (ALTO.public.sign_key, "hello", b""),
    ):
        with pytest.raises(SignatureError, match=f"{purpose}: the signature does not verify under"):
            verify(key, purpose, data, signature)


def test_data_can_not_slide_into_the_purpose() -> None:
    signature = ALTO.sign("hello", b"x\0y")
    with pytest.raises(LocalError, match="purpose"):
        verify(ALTO.public.sign_key, "hello\0x", b"y", signature)
    for purpose in ("", "Hello", "hel lo", "1", "héllo", "a" * 33):
        with pytest.raises(LocalError, match="must be a short lower-case word"):
            ALTO.sign(purpose, b"")


def test_every_flipped_bit_of_a_signature_is_noticed() -> None:
    signature = ALTO.sign("hello", b"data")
    for bit in range(512):
        bad = bytearray(signature)
        bad[bit // 8] ^= 1 << bit % 8
        with pytest.raises(SignatureError):
            verify(ALTO.public.sign_key, "hello", b"data", bytes(bad))


@pytest.mark.parametrize("multiple", [1, 2, 7])
def test_s_plus_l_is_refused_as_malleable(multiple: int) -> None:
    signature = ALTO.sign("hello", b"data")
    s = int.from_bytes(signature[32:], "little") + multiple * L
    with pytest.raises(SignatureError, match="malleable"):
        verify(ALTO.public.sign_key, "hello", b"data", signature[:32] + s.to_bytes(32, "little"))


@pytest.mark.parametrize("size", [0, 63, 65, 128])
def test_signatures_of_a_wrong_length_are_refused(size: int) -> None:
    with pytest.raises(SignatureError, match=f"a signature has 64 bytes, got {size}"):
        verify(ALTO.public.sign_key, "hello", b"data", bytes(size))


def test_the_signature_that_holds_for_everything_under_a_small_key_is_refused() -> None:
    """A = R = the neutral element, S = 0: S·B = R + k·A whatever the message (the library accepts it)."""
    neutral = (1).to_bytes(32, "little")
    Ed25519PublicKey.from_public_bytes(neutral).verify(neutral + bytes(32), b"anything")
    with pytest.raises(SignatureError, match="small order"):
        verify(neutral, "hello", b"anything", neutral + bytes(32))


def test_a_key_that_is_no_point_is_refused() -> None:
    y = next(y for y in range(2, 100) if x_of(y) is None)
    with pytest.raises(SignatureError, match="does not verify"):
        verify(y.to_bytes(32, "little"), "hello", b"", bytes(64))


# --- secrecy ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("key", [ALTO, OPERATOR], ids=["device", "operator"])
def test_private_keys_are_not_shown_copied_or_pickled(key: DeviceKey | OperatorKey) -> None:
    shown = f"{key!r} {key} {key.fingerprint}"
    for label in ("sign alto", "box alto", "operator"):
        assert seeded(label).hex() not in shown
    assert key.fingerprint in repr(key)
    with pytest.raises(LocalError, match="never serialized"):
        pickle.dumps(key)
    for copier in (copy.copy, copy.deepcopy):
        with pytest.raises(LocalError, match="never copied"):
            copier(key)


def test_fingerprints_are_readable_and_differ() -> None:
    assert ALTO.fingerprint == fingerprint_of(ALTO.public.sign_key, ALTO.public.box_key)
    assert len(ALTO.fingerprint) == 39
    assert len({key.fingerprint for key in KEYS.values()}) == len(KEYS)
    assert ALTO.public == PublicKeys(sign_key=ALTO.public.sign_key, box_key=ALTO.public.box_key)
    assert ALTO.public != BASS.public


def test_sealing_opens_for_the_receiver_and_its_info_only() -> None:
    sealed = seal_to(ALTO.public.box_key, b"seed", b"info")
    assert ALTO.unseal(sealed, b"info") == b"seed"
    low_order = bytes(32) + sealed[32:]
    for who, blob, info in (
        (BASS, sealed, b"info"),
        (ALTO, sealed, b"other"),
        (ALTO, sealed[:-1], b"info"),
        (ALTO, sealed[:20], b"info"),
        (ALTO, b"", b"info"),
        (ALTO, low_order, b"info"),
    ):
        with pytest.raises(SessionError, match="does not open"):
            who.unseal(blob, info)
    with pytest.raises(LocalError, match="small order"):
        seal_to(bytes(32), b"seed", b"info")


# --- files -----------------------------------------------------------------------------------------------------------


def test_key_files_come_back_and_are_private(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    ALTO.save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    assert DeviceKey.load(path).public == ALTO.public
    OPERATOR.save(tmp_path / "operator.key")
    assert OperatorKey.load(tmp_path / "operator.key").public == OPERATOR.public


def test_key_files_are_what_every_tool_reads_and_writes(tmp_path: Path) -> None:
    """PKCS #8 in PEM, to the byte as OpenSSL has it: a key may be made, looked at or backed up with other tools."""
    keys = (Ed25519PrivateKey.generate(), X25519PrivateKey.generate())
    text = b"".join(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()) for key in keys)
    theirs = tmp_path / "theirs.key"
    theirs.touch(0o600)
    theirs.write_bytes(text)
    loaded = DeviceKey.load(theirs)
    assert loaded.public.sign_key == keys[0].public_key().public_bytes_raw()
    assert loaded.public.box_key == keys[1].public_key().public_bytes_raw()
    loaded.save(tmp_path / "ours.key")
    assert (tmp_path / "ours.key").read_bytes() == text


def pem_of(data: bytes, label: bytes = b"PRIVATE KEY") -> bytes:
    return b"-----BEGIN %b-----\n%b\n-----END %b-----\n" % (label, base64.b64encode(data), label)


BEFORE = bytes.fromhex("302e020100300506032b657004220420")  # the 32 bytes of an Ed25519 key
ONE_KEY = pem_of(BEFORE + bytes(range(32)))
OTHER_KEYS = {
    "another curve": pem_of(BEFORE.replace(b"\x70", b"\x71") + bytes(32)),
    "another version": pem_of(BEFORE.replace(b"\2\1\0", b"\2\1\1") + bytes(32)),
    "nothing": pem_of(b""),
    "no key": pem_of(BEFORE),
    "a short key": pem_of(BEFORE + bytes(31)),
    "a long key": pem_of(BEFORE + bytes(33)),
    "a bare key": pem_of(bytes(32)),
    "a character less": ONE_KEY.replace(b"AgME", b"AgM"),
    "a strange character": ONE_KEY.replace(b"AgME", b"A*gME"),
    "padded": ONE_KEY.replace(b"\n-----END", b"====\n-----END"),
    "lines of another system": ONE_KEY.replace(b"\n", b"\r\n"),
    "two lines": ONE_KEY.replace(b"AgME", b"Ag\nME"),
    "another label": pem_of(BEFORE + bytes(range(32)), b"EC PRIVATE KEY"),
}


@pytest.mark.parametrize("content", OTHER_KEYS.values(), ids=OTHER_KEYS)
def test_a_key_of_another_kind_or_spelling_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "operator.key"
    path.touch(0o600)
    path.write_bytes(ONE_KEY)
    assert OperatorKey.load(path).public == OperatorKey.from_seed(bytes(range(32))).public
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="no operator key: expected one Ed25519 key in PEM") as caught:
        OperatorKey.load(path)
    assert "MC4C" not in str(caught.value)
    assert "AgME" not in str(caught.value)  # of ONE_KEY


def test_keys_of_other_tools_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "operator.key"
    path.touch(0o600)
    key = Ed25519PrivateKey.generate()
    for text in (
        Ed448PrivateKey.generate().private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()),
        key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, BestAvailableEncryption(b"word")),
        key.private_bytes(Encoding.PEM, PrivateFormat.OpenSSH, NoEncryption()),
        key.private_bytes(Encoding.DER, PrivateFormat.PKCS8, NoEncryption()),
    ):
        path.write_bytes(text)
        with pytest.raises(ConfigError, match="no operator key"):
            OperatorKey.load(path)


def test_a_key_file_is_never_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "device.key"
    ALTO.save(path)
    with pytest.raises(ConfigError, match=r"there is a device key already"):
        BASS.save(path)
    assert DeviceKey.load(path).public == ALTO.public
    link = tmp_path / "link.key"
    link.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="already"):
        BASS.save(link)
    assert not (tmp_path / "elsewhere").exists()


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o644, 0o601, 0o777])
def test_a_key_file_that_others_may_read_is_refused_with_the_remedy(tmp_path: Path, mode: int) -> None:
    path = tmp_path / "device.key"
    ALTO.save(path)
    path.chmod(mode)
    with pytest.raises(ConfigError, match=f"has mode {mode:04o}, others may read it. Do: chmod 600 {path}"):
        DeviceKey.load(path)


def test_what_is_no_key_file_is_refused(tmp_path: Path) -> None:
    device, operator = tmp_path / "device.key", tmp_path / "operator.key"
    ALTO.save(device)
    OPERATOR.save(operator)
    with pytest.raises(ConfigError, match="no device key: expected one Ed25519 and one X25519 key"):
        DeviceKey.load(operator)
    with pytest.raises(ConfigError, match="no operator key: expected one Ed25519 key"):
        OperatorKey.load(device)
    good = device.read_bytes()
    halves = good.split(b"-----END PRIVATE KEY-----\n")
    swapped = halves[1] + b"-----END PRIVATE KEY-----\n" + halves[0] + b"-----END PRIVATE KEY-----\n"
    for content in (b"", good[:-1], good + b"\n", good[:90], swapped, b"# key\n" + good, good + good, b"x" * 10_000):
        device.write_bytes(content)
        with pytest.raises(ConfigError, match="no device key: expected"):
            DeviceKey.load(device)
    with pytest.raises(ConfigError, match="can't be read: No such file"):
        DeviceKey.load(tmp_path / "none.key")
    with pytest.raises(ConfigError, match="not a regular file"):
        DeviceKey.load(tmp_path)
    pipe = tmp_path / "pipe.key"
    os.mkfifo(pipe, 0o600)
    with pytest.raises(ConfigError, match="not a regular file"):
        DeviceKey.load(pipe)
    with pytest.raises(ConfigError, match="can't be written"):
        ALTO.save(tmp_path / "no-folder" / "device.key")


def test_boots_count_up_and_are_on_disk_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "boot"
    assert [next_boot(path) for _ in range(3)] == [1, 2, 3]
    assert path.read_text() == "3\n"
    (tmp_path / ".boot.new").write_text("left by a power cut")
    assert next_boot(path) == 4
    assert sorted(item.name for item in tmp_path.iterdir()) == ["boot"]

    def full_disk(handle: int) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full_disk)
        # No configuration error, after which a service is not tried again: this one passes.
        with pytest.raises(LimitExceeded, match="no room for the boot counter: No space left on device; free some"):
            next_boot(path)
    assert LimitExceeded.exit_code == 3
    assert path.read_text() == "4\n"
    assert next_boot(path) == 5


@pytest.mark.parametrize("text", ["", "\n", "x\n", "-1\n", "3", "03\n", "3\n3\n", "1e3\n", "9" * 16 + "\n", "٣\n"])
def test_a_boot_file_that_is_not_a_number_is_refused(tmp_path: Path, text: str) -> None:
    path = tmp_path / "boot"
    path.write_text(text, "utf-8")
    with pytest.raises(ConfigError, match="Write a number greater than every earlier boot into it"):
        next_boot(path)
    assert path.read_text("utf-8") == text
