"""`Message`: a frozen, typed, bounded value with a registered kind. The registry is closed when the package is loaded.

On the wire a message is the canonical CBOR of `[kind, {field: value}]`. The kind is looked up in a table of ours; data
never names a class, a module or a function.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cache, lru_cache
from typing import Annotated, Any, ClassVar, Final, TypeVar

import msgspec
import msgspec.inspect

from sordino_common.errors import CodecError, LocalError
from sordino_common.messages.array import Array
from sordino_common.messages.codec import DEFAULT_LIMITS, Limits, decode, encode
from sordino_common.messages.heads import LIST, TEXT
from sordino_common.messages.protocol import PROTOCOL

# Bounded field types that several messages share.
NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9-]{0,62}\Z"  # agents, datasets, fleets: safe in topics and file names
Name = Annotated[str, msgspec.Meta(pattern=NAME_PATTERN)]
Label = Annotated[str, msgspec.Meta(max_length=200)]  # column names, versions, metric names
Text = Annotated[str, msgspec.Meta(max_length=4000)]  # a reason that a person reads
Digest = Annotated[bytes, msgspec.Meta(min_length=32, max_length=32)]  # SHA-256
RunId = Annotated[str, msgspec.Meta(pattern=r"^[a-z0-9][a-z0-9-]{0,79}\Z")]
Count = Annotated[int, msgspec.Meta(ge=0, le=(1 << 63) - 1)]
Bytes = Annotated[int, msgspec.Meta(ge=0, le=1 << 50)]


class Message(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Base of all commands and events. Fields are validated where they enter: by `decode_message`, and by
    `encode_message`, which refuses to write what the other side would refuse to read."""

    kind: ClassVar[str] = ""
    # Minor versions of the protocol: of the message, and of fields that came later (each of these has a default).
    since: ClassVar[int] = 0
    added: ClassVar[Mapping[str, int]] = {}


M = TypeVar("M", bound=type[Message])
N = TypeVar("N", bound=Message)
S = TypeVar("S", bound=msgspec.Struct)
_REGISTRY: dict[str, type[Message]] = {}
_WRITTEN_BY_HAND: dict[type[Message], Callable[[Any], bytes | None]] = {}
_READ_BY_HAND: dict[bytes, Callable[[bytes], Message | None]] = {}
_PAIR: Final = LIST + 2  # the head of a list of two


def register(kind: str, *, since: int = 0) -> Callable[[M], M]:
    """Class decorator: give a message its kind on the wire. `since`: the minor version that brings it."""

    def put(cls: M) -> M:
        if kind in _REGISTRY:
            raise LocalError(f"message kind {kind!r} is registered twice")
        cls.kind = kind
        cls.since = since
        _REGISTRY[kind] = cls
        return cls

    return put


def by_hand(cls: type[N], *, write: Callable[[N], bytes | None], read: Callable[[bytes], N | None]) -> None:
    """Give a message a faster way to the very same bytes and from them; where it gives None the general way goes on."""
    _WRITTEN_BY_HAND[cls] = write
    _READ_BY_HAND[cls.kind.encode()] = read


def message_types() -> dict[str, type[Message]]:
    """A copy of the registry: kind -> type."""
    return dict(_REGISTRY)


def encode_message(message: Message, *, minor: int = PROTOCOL.minor) -> bytes:
    """Canonical CBOR of `[kind, fields]`, as a peer of that minor version of the protocol reads it. Raises `LocalError`
    if a field breaks its own bound, or such a peer knows nothing of it."""
    cls = type(message)
    kind = cls.kind
    if _REGISTRY.get(kind) is not cls:
        raise LocalError(f"{cls.__name__} is not a registered message")
    if cls.since > minor:
        raise LocalError(_too_new(f"message {kind}", cls.since, minor))
    write = _WRITTEN_BY_HAND.get(cls)
    written = write(message) if write is not None else None
    if written is not None:
        return written
    try:
        fields = to_plain(message, minor=minor)
        checked = from_plain(fields, cls)
        if not _has_one_form(cls):
            fields = to_plain(checked, minor=minor)  # 60 in a float field becomes 60.0
    except msgspec.ValidationError as error:
        raise LocalError(f"message {kind}: {error}") from None
    return encode([kind, fields])


def decode_message(data: bytes, limits: Limits = DEFAULT_LIMITS, *, minor: int = PROTOCOL.minor) -> Message:
    """The message that `data`, of a peer of that minor version, encodes. Raises `CodecError` naming kind and field;
    never anything else."""
    if 2 < len(data) <= limits.payload_bytes and data[0] == _PAIR:
        read = _READ_BY_HAND.get(data[2 : 2 + data[1] - TEXT])
        message = read(data) if read is not None else None
        if message is not None:
            return message
    outer = decode(data, limits)
    if not (isinstance(outer, list) and len(outer) == 2 and isinstance(outer[0], str) and isinstance(outer[1], dict)):
        raise CodecError("message: expected [kind, fields]")
    kind, fields = outer
    cls = _REGISTRY.get(kind)
    if cls is None:
        raise CodecError(f"message: unknown kind {kind[:80]!r}")
    if cls.since > minor:
        raise CodecError(_too_new(f"message {kind}", cls.since, minor))
    try:
        message = from_plain(fields, cls)
    except msgspec.ValidationError as error:
        raise CodecError(f"message {kind}: {error}") from None
    except CodecError as error:  # from a message's own __post_init__
        raise CodecError(f"message {kind}: {error}") from None
    # A field with a default that is spelled out and one that is left out must not be two encodings of one message.
    expected = _fields_of(cls, minor)
    if len(fields) != len(expected):
        missing = sorted(expected - set(fields))
        if missing:
            raise CodecError(f"message {kind}: missing fields {', '.join(missing)}")
        later = sorted(set(fields) - expected)
        raise CodecError(_too_new(f"message {kind}: {', '.join(later)}", cls.added[later[0]], minor))
    # A nested default left out, or a whole number for a float: where there are neither, there is but one way.
    if not _has_one_form(cls) and not _same(to_plain(message, minor=minor), fields):
        raise CodecError(f"message {kind}: not its one encoding: every field is written out, floats as floats")
    return message


_LEAVES: Final = frozenset({bool, int, float, str, bytes, type(None), Array})  # most of what a message is made of


@lru_cache(maxsize=256)
def _fields_of(cls: type[Message], minor: int) -> frozenset[str]:
    return frozenset(name for name in cls.__struct_fields__ if cls.added.get(name, 0) <= minor)


def to_plain(value: Any, *, minor: int | None = None) -> Any:
    """Structs as maps, all the way down; everything else is left to the codec. With `minor`, without the fields that
    came later; raises `LocalError` if one of them says more than its default."""
    if type(value) in _LEAVES:
        return value
    if isinstance(value, (list, tuple)):
        if _LEAVES.issuperset(map(type, value)):
            return list(value)
        return [item if type(item) in _LEAVES else to_plain(item, minor=minor) for item in value]
    if isinstance(value, msgspec.Struct):
        names = value.__struct_fields__
        if minor is not None and (added := getattr(type(value), "added", None)):
            names = tuple(name for name in names if added.get(name, 0) <= minor or _says_something(value, name, minor))
        fields = {}
        for name in names:
            item = getattr(value, name)
            fields[name] = item if type(item) in _LEAVES else to_plain(item, minor=minor)
        return fields
    if isinstance(value, dict):
        return {key: to_plain(item, minor=minor) for key, item in value.items()}
    return value


def least_minor(value: Any) -> int:
    """The first minor version that can say `value`. What several parties hash, they write in this one: then they agree,
    whatever version each of them is."""
    least = 0
    if isinstance(value, msgspec.Struct):
        least = getattr(type(value), "since", 0)
        added: Mapping[str, int] = getattr(type(value), "added", {})
        defaults = _defaults(type(value)) if added else {}
        for name in value.__struct_fields__:
            item = getattr(value, name)
            if name in added and item != defaults[name]:
                least = max(least, added[name])
            least = max(least, least_minor(item))
    elif isinstance(value, list | tuple):
        least = max(map(least_minor, value), default=0)
    elif isinstance(value, dict):
        least = max(map(least_minor, value.values()), default=0)
    return least


def _says_something(value: msgspec.Struct, name: str, minor: int) -> bool:
    """False for a field that came later and has its default; raises `LocalError` if it has not."""
    cls = type(value)
    if getattr(value, name) == _defaults(cls)[name]:
        return False
    since = cls.added[name]  # type: ignore[attr-defined]  # whoever comes here has it
    raise LocalError(_too_new(f"{getattr(cls, 'kind', '') or cls.__name__}: {name}", since, minor))


@cache
def _defaults(cls: type[msgspec.Struct]) -> Mapping[str, Any]:
    return {
        field.name: field.default_factory() if field.default is msgspec.NODEFAULT else field.default
        for field in msgspec.structs.fields(cls)
        if field.default is not msgspec.NODEFAULT or field.default_factory is not msgspec.NODEFAULT
    }


def _too_new(what: str, since: int, minor: int) -> str:
    major = PROTOCOL.major
    return f"{what} is of protocol {major}.{since}, the session speaks {major}.{minor}: upgrade the older side"


def from_plain(fields: object, cls: type[S]) -> S:
    """The struct that `to_plain` took apart. Raises `msgspec.ValidationError`, naming the field, on anything else."""
    # bytes as a built-in type: otherwise msgspec would take base64 text for them, a second encoding.
    return msgspec.convert(fields, cls, dec_hook=_dec_hook, builtin_types=(bytes,))


@cache
def _has_one_form(cls: type[msgspec.Struct]) -> bool:
    """Whether what decodes as `cls` can have been written in one way only: no floats, no nested defaults."""
    pending: list[Any] = [msgspec.inspect.type_info(cls)]
    while pending:
        info = pending.pop()
        match info:
            case msgspec.inspect.StructType():
                if info.cls is not cls and any(not entry.required for entry in info.fields):
                    return False
                pending += [entry.type for entry in info.fields]
            case msgspec.inspect.UnionType():
                pending += info.types
            case msgspec.inspect.VarTupleType():
                pending.append(info.item_type)
            case (
                msgspec.inspect.IntType()
                | msgspec.inspect.StrType()
                | msgspec.inspect.BytesType()
                | msgspec.inspect.BoolType()
                | msgspec.inspect.NoneType()
                | msgspec.inspect.LiteralType()
            ):
                pass
            case msgspec.inspect.CustomType() if info.cls is Array:
                pass
            case _:
                return False
    return True


def _same(a: Any, b: Any) -> bool:
    """Equal, with equal types all the way down (1 is not 1.0); NaN equals NaN."""
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(_same(value, b[key]) for key, value in a.items())
    if isinstance(a, list):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or a == b or a != a


def _dec_hook(expected: type, value: object) -> object:
    if expected is Array and isinstance(value, Array):
        return value
    # msgspec turns a TypeError into a ValidationError that names the field.
    raise TypeError(f"Expected `{expected.__name__}`, got `{type(value).__name__}`")
