"""Who a device is: an Ed25519 key that signs and an X25519 key that opens boxes, both made on the device.

Every signature is over  "sordino/" purpose 0x00 data,  so that what was signed as one thing can't be shown as another.

Ed25519 as RFC 8032, verified without the cofactor (OpenSSL): S must be below the group order L, and the point R is
recomputed and compared as bytes. What the library leaves open is closed here: public keys of small order, for which one
signature can hold for many messages, and keys in a second encoding of the same point.
Sources: RFC 8032 section 5.1; Chalkias, Garillot, Nikolaenko, "Taming the many EdDSAs", SSR 2020, table 1.
"""

from __future__ import annotations

import binascii
import hashlib
import os
import re
import stat
from pathlib import Path
from typing import Final, NoReturn

from cryptography.exceptions import InvalidSignature, InvalidTag
from cryptography.hazmat.primitives import hpke
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey

from sordino_common.channel.credentials import seen_by_others
from sordino_common.channel.files import write_new
from sordino_common.errors import ConfigError, LocalError, SessionError, SignatureError

KEY_BYTES: Final = 32
SIGNATURE_BYTES: Final = 64

_P: Final = (1 << 255) - 19
_L: Final = (1 << 252) + 27742317777372353535851937790883648493  # order of the Ed25519 base point
_MAX_KEY_FILE: Final = 4096

# PKCS #8 (RFC 8410 section 7) before the 32 bytes of a private key; OpenSSL's keys have the same. By hand, for the
# module of `cryptography` that reads every format there is takes half a megabyte of a daemon that reads this one.
_PKCS8: Final = "302e020100300506032b65{}04220420"
_BEFORE_ED25519: Final = bytes.fromhex(_PKCS8.format("70"))
_BEFORE_X25519: Final = bytes.fromhex(_PKCS8.format("6e"))
_PEM_BEGIN: Final = b"-----BEGIN PRIVATE KEY-----\n"
_PEM_END: Final = b"-----END PRIVATE KEY-----\n"

# y of the points whose order divides 8: 1 has order 1, -1 order 2, 0 order 4, the last two order 8.
_SMALL_ORDER_Y: Final = frozenset(
    {
        0,
        1,
        _P - 1,
        int.from_bytes(bytes.fromhex("c7176a703d4dd84fba3c0b760d10670f2a2053fa2c39ccc64ec7fd7792ac037a"), "little"),
        int.from_bytes(bytes.fromhex("26e8958fc2b227b045c3f489f2ef98f0d5dfac05d3c63339b13802886d53fc05"), "little"),
    }
)
# u of the Montgomery points of small order (RFC 7748 section 6.1 asks to check for the all-zero result they give).
_SMALL_ORDER_U: Final = frozenset(
    {
        0,
        1,
        _P - 1,
        int.from_bytes(bytes.fromhex("e0eb7a7c3b41b8ae1656e3faf19fc46ada098deb9c32b1fd866205165f49b800"), "little"),
        int.from_bytes(bytes.fromhex("5f9c95bca3508c24b1d0b1559c83ef5b04445cc4581c8e86d8224eddd09f1157"), "little"),
    }
)

_BOX_SUITE: Final = hpke.Suite(hpke.KEM.X25519, hpke.KDF.HKDF_SHA256, hpke.AEAD.CHACHA20_POLY1305)
BOX_OVERHEAD: Final = 32 + 16  # encapsulated key and tag


def check_sign_key(key: bytes) -> str | None:
    """Why `key` is no acceptable Ed25519 public key, or None: 32 bytes, y canonical, not of small order."""
    if len(key) != KEY_BYTES:
        return f"a signing key has {KEY_BYTES} bytes, got {len(key)}"
    y = int.from_bytes(key, "little") & ((1 << 255) - 1)
    if y >= _P:
        return "the signing key is not canonical (y >= 2^255 - 19)"
    if y in _SMALL_ORDER_Y:
        return "the signing key has small order"
    return None


def check_box_key(key: bytes) -> str | None:
    """Why `key` is no acceptable X25519 public key, or None: 32 bytes, u canonical, not of small order."""
    if len(key) != KEY_BYTES:
        return f"an X25519 key has {KEY_BYTES} bytes, got {len(key)}"
    u = int.from_bytes(key, "little")
    if u >= _P:
        return "the X25519 key is not canonical (u >= 2^255 - 19)"
    if u in _SMALL_ORDER_U:
        return "the X25519 key has small order"
    return None


def _statement(purpose: str, data: bytes) -> bytes:
    if not re.fullmatch(r"[a-z][a-z0-9-]{0,31}", purpose):
        raise LocalError(f"sign: the purpose {purpose!r} must be a short lower-case word")
    return b"sordino/" + purpose.encode("ascii") + b"\0" + data


def verify(sign_key: bytes, purpose: str, data: bytes, signature: bytes) -> None:
    """Return if `signature` is one of `sign_key` over `data` for `purpose`. Raises `SignatureError` if not."""
    statement = _statement(purpose, data)
    fault = check_sign_key(sign_key)
    if fault is not None:
        raise SignatureError(f"{purpose}: {fault}")
    if len(signature) != SIGNATURE_BYTES:
        raise SignatureError(f"{purpose}: a signature has {SIGNATURE_BYTES} bytes, got {len(signature)}")
    if int.from_bytes(signature[32:], "little") >= _L:
        raise SignatureError(f"{purpose}: the signature is malleable (S >= L)")
    try:
        Ed25519PublicKey.from_public_bytes(sign_key).verify(signature, statement)
    except (InvalidSignature, ValueError):
        raise SignatureError(f"{purpose}: the signature does not verify under {fingerprint_of(sign_key)}") from None


def fingerprint_of(*keys: bytes) -> str:
    """The first 128 bits of SHA-256 over the keys, in groups of four hex digits: what people compare by eye."""
    digits = hashlib.sha256(b"sordino/fingerprint\0" + b"".join(keys)).hexdigest()[:32]
    return "-".join(digits[at : at + 4] for at in range(0, 32, 4))


class PublicKeys:
    """The public half of a `DeviceKey`: 32 bytes each."""

    __slots__ = ("box_key", "sign_key")

    def __init__(self, *, sign_key: bytes, box_key: bytes) -> None:
        for fault in (check_sign_key(sign_key), check_box_key(box_key)):
            if fault is not None:
                raise LocalError(f"public keys: {fault}")
        self.sign_key = sign_key
        self.box_key = box_key

    def __repr__(self) -> str:
        return f"PublicKeys({self.fingerprint})"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PublicKeys) and (self.sign_key, self.box_key) == (other.sign_key, other.box_key)

    def __hash__(self) -> int:
        return hash((self.sign_key, self.box_key))

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.sign_key, self.box_key)


class _Secret:
    """What every private key has in common: it is not copied, pickled or shown."""

    __slots__ = ()

    def __reduce__(self) -> NoReturn:
        raise LocalError(f"{type(self).__name__} is never serialized but by save()")

    def __copy__(self) -> NoReturn:
        raise LocalError(f"{type(self).__name__} is never copied")

    def __deepcopy__(self, memo: dict[int, object]) -> NoReturn:
        raise LocalError(f"{type(self).__name__} is never copied")


class DeviceKey(_Secret):
    """A device's two private keys. `repr` shows the fingerprint of the public ones."""

    __slots__ = ("_box", "_sign", "public")

    def __init__(self, *, sign: Ed25519PrivateKey, box: X25519PrivateKey) -> None:
        self._sign = sign
        self._box = box
        self.public = PublicKeys(
            sign_key=sign.public_key().public_bytes_raw(), box_key=box.public_key().public_bytes_raw()
        )

    def __repr__(self) -> str:
        return f"DeviceKey({self.fingerprint})"

    @classmethod
    def generate(cls) -> DeviceKey:
        return cls(sign=Ed25519PrivateKey.generate(), box=X25519PrivateKey.generate())

    @classmethod
    def from_seeds(cls, sign_seed: bytes, box_seed: bytes) -> DeviceKey:
        """The keys with these 32-byte private values: for reproducible simulations and golden vectors."""
        return cls(
            sign=Ed25519PrivateKey.from_private_bytes(sign_seed), box=X25519PrivateKey.from_private_bytes(box_seed)
        )

    @classmethod
    def load(cls, path: Path) -> DeviceKey:
        """The keys in `path`. Raises `ConfigError` if it is readable by others, or is not what `save` wrote."""
        sign, box = _load_pem(path, "device key", (Ed25519PrivateKey, X25519PrivateKey))
        assert isinstance(sign, Ed25519PrivateKey)
        assert isinstance(box, X25519PrivateKey)
        return cls(sign=sign, box=box)

    def save(self, path: Path) -> None:
        """Write both keys as PEM (PKCS #8), mode 0600. Raises `ConfigError` if the file exists or can't be written."""
        _save_pem(path, "device key", (self._sign, self._box))

    @property
    def fingerprint(self) -> str:
        return self.public.fingerprint

    def sign(self, purpose: str, data: bytes) -> bytes:
        """The 64-byte Ed25519 signature over "sordino/" purpose 0x00 data."""
        return self._sign.sign(_statement(purpose, data))

    def unseal(self, sealed: bytes, info: bytes) -> bytes:
        """What `seal_to` sealed to this device under the same `info`. Raises `SessionError` if it does not open."""
        try:
            return _BOX_SUITE.decrypt(sealed, self._box, info)
        except (InvalidTag, ValueError):  # ValueError: a truncated or low-order encapsulated key
            raise SessionError("sealed box: does not open with this device's key in this place") from None


def seal_to(box_key: bytes, plaintext: bytes, info: bytes) -> bytes:
    """HPKE (RFC 9180), base mode, X25519-HKDF-SHA256-ChaCha20Poly1305: encapsulated key, ciphertext, tag.

    `info` enters the key schedule, so a box opens under the very same `info` only."""
    fault = check_box_key(box_key)
    if fault is not None:
        raise LocalError(f"sealed box: {fault}")
    return _BOX_SUITE.encrypt(plaintext, X25519PublicKey.from_public_bytes(box_key), info)


class OperatorKey(_Secret):
    """The offline key that signs rosters. Agents pin `public`, 32 bytes."""

    __slots__ = ("_sign", "public")

    def __init__(self, *, sign: Ed25519PrivateKey) -> None:
        self._sign = sign
        self.public = sign.public_key().public_bytes_raw()

    def __repr__(self) -> str:
        return f"OperatorKey({self.fingerprint})"

    @classmethod
    def generate(cls) -> OperatorKey:
        return cls(sign=Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> OperatorKey:
        """The key with this 32-byte private value: for reproducible simulations and golden vectors."""
        return cls(sign=Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: Path) -> OperatorKey:
        """The key in `path`. Raises `ConfigError` if it is readable by others, or is not what `save` wrote."""
        (sign,) = _load_pem(path, "operator key", (Ed25519PrivateKey,))
        assert isinstance(sign, Ed25519PrivateKey)
        return cls(sign=sign)

    def save(self, path: Path) -> None:
        """Write the key as PEM (PKCS #8), mode 0600. Raises `ConfigError` if the file exists or can't be written."""
        _save_pem(path, "operator key", (self._sign,))

    @property
    def fingerprint(self) -> str:
        return fingerprint_of(self.public)

    def sign(self, purpose: str, data: bytes) -> bytes:
        return self._sign.sign(_statement(purpose, data))


_PrivateKey = Ed25519PrivateKey | X25519PrivateKey


def _pem(keys: tuple[_PrivateKey, ...]) -> bytes:
    """PKCS #8 in PEM, unencrypted; its 48 bytes are one line."""
    text = b""
    for key in keys:
        before = _BEFORE_ED25519 if isinstance(key, Ed25519PrivateKey) else _BEFORE_X25519
        text += _PEM_BEGIN + binascii.b2a_base64(before + key.private_bytes_raw()) + _PEM_END
    return text


def _of_pem(line: bytes) -> _PrivateKey:
    """Raises `ValueError`."""
    data = binascii.a2b_base64(line)
    before, private = data[:-KEY_BYTES], data[-KEY_BYTES:]
    if before == _BEFORE_ED25519:
        return Ed25519PrivateKey.from_private_bytes(private)
    if before == _BEFORE_X25519:
        return X25519PrivateKey.from_private_bytes(private)
    raise ValueError("neither an Ed25519 nor an X25519 key")


def _save_pem(path: Path, what: str, keys: tuple[_PrivateKey, ...]) -> None:
    try:
        write_new(path, _pem(keys), mode=0o600)
    except FileExistsError:
        raise ConfigError(f"{path}: there is a {what} already; it is not overwritten. Move it away first") from None
    except OSError as error:
        raise ConfigError(f"{path}: the {what} can't be written: {error.strerror}") from None


def _load_pem(path: Path, what: str, types: tuple[type[_PrivateKey], ...]) -> list[_PrivateKey]:
    data = _read_private(path, what)
    lines = re.findall(_PEM_BEGIN + rb"(\S+\n)" + _PEM_END, data)
    keys: list[_PrivateKey] = []
    for line, expected in zip(lines, types, strict=False):
        try:
            key = _of_pem(line)
        except ValueError:
            break
        if not isinstance(key, expected):
            break
        keys.append(key)
    if len(keys) != len(types) or _pem(tuple(keys)) != data:
        names = " and one ".join(kind.__name__.removesuffix("PrivateKey") for kind in types)
        raise ConfigError(
            f"{path}: no {what}: expected one {names} key in PEM. Restore it from a backup, or make a new one"
        )
    return keys


def _read_private(path: Path, what: str) -> bytes:
    """The file's bytes; its mode is read from the open file, so that it can't be swapped in between."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)  # a FIFO must not block us
    except OSError as error:
        raise ConfigError(f"{path}: the {what} can't be read: {error.strerror}") from None
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"{path}: not a regular file, so no {what}")
        mode = stat.S_IMODE(status.st_mode)
        if seen_by_others(path, status):
            raise ConfigError(f"{path}: the {what} has mode {mode:04o}, others may read it. Do: chmod 600 {path}")
        return os.read(handle, _MAX_KEY_FILE)  # one read takes a regular file of this size whole
    finally:
        os.close(handle)
