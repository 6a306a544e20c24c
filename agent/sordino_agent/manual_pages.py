"""The manual pages sordino-agent(1) and agent.yaml(5), from the parser and from the types of the configuration."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, Final

import msgspec
from msgspec import inspect as types

from sordino_agent import __version__
from sordino_agent.cli import DEFAULT_CONFIG, make_parser
from sordino_agent.config import AgentConfig
from sordino_agent.enrol import sample_config
from sordino_agent.manual import tree_of
from sordino_common.manual import groff
from sordino_common.messages.base import NAME_PATTERN

_EXAMPLES: Final = (
    ("a new device, with a token", "sordino-agent enroll TOKEN"),
    ("what could keep it from working", "sordino-agent check"),
    ("as a service", "systemctl enable --now sordino-agent"),
    ("new policy and datasets, without a restart", "systemctl reload sordino-agent"),
)
_FILES: Final = (
    (DEFAULT_CONFIG, "the configuration: agent.yaml(5)"),
    ("STATE/agent.key", "this device's own keys, mode 0600: they never leave it"),
    ("STATE/roster.cbor", "the newest signed roster that it has seen"),
    ("STATE/ledger.sqlite, STATE/ledger.mark", "what was released about its datasets; back them up together"),
    ("STATE/journal.sqlite, STATE/sums.sqlite", "what may be used once, and was"),
    ("STATE/boot", "how often it has started; it only grows"),
    ("STATE/status.json", "what `sordino-agent status` shows"),
)
_ENVIRONMENT: Final = (("SORDINO_AGENT_CONFIG", "the configuration, where none is named"),)


def pages() -> dict[str, str]:
    """By file name."""
    return {
        "sordino-agent.1": groff.program_page(
            tree_of(make_parser()),
            version=__version__,
            examples=_EXAMPLES,
            files=_FILES,
            environment=_ENVIRONMENT,
            see_also=("agent.yaml(5)", "sordino(1)", "sordino-sim(1)"),
        ),
        "agent.yaml.5": groff.text_page(
            "agent.yaml",
            5,
            version=__version__,
            summary="configuration of a sordino agent",
            sections={
                "DESCRIPTION": groff.paragraphs(
                    "YAML, read once at the start; SIGHUP reads `policy` and `datasets` again. Relative paths start at "
                    "the file's folder. A key that is not known, or a value that does not fit, is refused with line "
                    "and column (exit code 2); `sordino-agent check` looks at what it names.\n\n" + _doc(AgentConfig)
                ),
                "KEYS": list(_keys(AgentConfig, "")),
                "EXAMPLE": groff.verbatim(sample_config()),
            },
            see_also=("sordino-agent(1)",),
        ),
    }


def _keys(cls: type[msgspec.Struct], prefix: str) -> Iterator[str]:
    """Every key with its type and default, a heading for each part."""
    info = types.type_info(cls)
    assert isinstance(info, types.StructType)
    parts: list[tuple[str, type[msgspec.Struct]]] = []
    for field in info.fields:
        path = f"{prefix}{field.encode_name}"
        yield from groff.tagged(path, f"{_words(field.type)}. {_default(field)}")
        inner, many = _inner(field.type)
        if inner is not None:
            parts.append((f"{path}{'[]' if many else ''}.", inner))
    for path, inner in parts:
        yield f'.SS "{groff.escaped(path.rstrip("."))}"'
        yield from groff.paragraphs(_doc(inner))
        yield from _keys(inner, path)


def _inner(kind: types.Type) -> tuple[type[msgspec.Struct] | None, bool]:
    """The part that stands below a key, if one does; whether there may be several."""
    match kind:
        case types.StructType(cls=cls):
            return cls, False
        case types.VarTupleType(item_type=item) | types.DictType(value_type=item):
            return _inner(item)[0], True
        case types.UnionType(types=options):
            found = [_inner(option) for option in options]
            return next((one for one in found if one[0] is not None), (None, False))
        case _:
            return None, False


def _words(kind: types.Type) -> str:
    match kind:
        case types.BoolType():
            return "true or false"
        case types.IntType() | types.FloatType():
            what = "whole number" if isinstance(kind, types.IntType) else "number"
            return f"{what}{_range(kind)}"
        case types.LiteralType(values=values):
            return " or ".join(str(value) for value in values)
        case types.VarTupleType(item_type=item):
            return f"list of: {_words(item)}"
        case types.DictType(key_type=key, value_type=value):
            return f"map from {_words(key)} to {_words(value)}"
        case types.StructType():
            return "a part of its own, below"
        case types.UnionType(types=options):
            named = [_words(option) for option in options if not isinstance(option, types.NoneType)]
            return " or ".join(named)
        case types.StrType(pattern=pattern):
            if pattern == NAME_PATTERN:
                return "a name: lower-case letters, digits and -"
            return "text" if pattern is None else f"text like {pattern}"
        case _:
            return "a value"


def _range(kind: Any) -> str:
    least = kind.ge if kind.ge is not None else kind.gt
    most = kind.le if kind.le is not None else kind.lt
    if least is None and most is None:
        return ""
    above = "" if least is None else f" {'from' if kind.ge is not None else 'above'} {least}"
    return above + ("" if most is None else f" {'to' if kind.le is not None else 'below'} {most}")


def _default(field: types.Field) -> str:
    if field.required:
        return "Required."
    value = field.default_factory() if field.default is msgspec.NODEFAULT else field.default
    if value is None or value in ((), {}, ""):
        return "Default: none."
    return "" if isinstance(value, msgspec.Struct) else f"Default: {_shown(value)}."


def _shown(value: object) -> str:
    return (
        str(list(value)) if isinstance(value, tuple) else str(value).lower() if isinstance(value, bool) else str(value)
    )


def _doc(cls: type) -> str:
    return inspect.getdoc(cls) or ""
