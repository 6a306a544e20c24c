"""YAML files into typed, frozen structs, with errors that name file, line and column.

A configuration is a `msgspec.Struct` with `forbid_unknown_fields=True`; bounds are `msgspec.Meta`. What YAML would
guess is not guessed: `yes`, `on`, dates and octal numbers stay text (YAML 1.2's core schema, as far as we need it).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import yaml

from sordino_common.errors import ConfigError

T = TypeVar("T")

_MAX_FILE_BYTES = 1 << 20  # a configuration is written by hand; more than this is the wrong file


class _Loader(yaml.SafeLoader):
    """SafeLoader with the core schema's scalars only, no aliases and no duplicate keys."""

    yaml_implicit_resolvers: dict[str, list[tuple[str, re.Pattern[str]]]] = {}  # noqa: RUF012  PyYAML's own protocol

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):  # a few aliases can stand for 10^9 nodes
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases (*name) are not taken; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


for _tag, _pattern, _first in (
    ("tag:yaml.org,2002:bool", r"^(?:true|false)$", "tf"),
    ("tag:yaml.org,2002:null", r"^(?:null|~|)$", "n~"),
    ("tag:yaml.org,2002:int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("tag:yaml.org,2002:float", r"^[-+]?(?:[0-9]+\.[0-9]*|\.[0-9]+|[0-9]+)(?:[eE][-+]?[0-9]+)?$", "-+0123456789."),
):
    _Loader.add_implicit_resolver(_tag, re.compile(_pattern), [*_first, ""] if _tag.endswith("null") else [*_first])


Marks = dict[tuple[str | int, ...], tuple[int, int]]


def load_config(path: Path, expected: type[T], *, overrides: Sequence[str] = ()) -> T:
    """The file at `path` as `expected`, after `overrides` of the form `key.path=value` (a value is YAML).

    Raises `ConfigError` whose text starts with `FILE:LINE:COLUMN:` (1-based), names what was expected and found."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    if len(raw) > _MAX_FILE_BYTES:
        raise ConfigError(f"{path}: {len(raw)} bytes; a configuration has at most {_MAX_FILE_BYTES}. Is this the file?")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path}: not UTF-8 at byte {error.start}") from None
    return parse_config(text, expected, where=str(path), overrides=overrides)


def parse_config(text: str, expected: type[T], *, where: str, overrides: Sequence[str] = ()) -> T:
    """As `load_config`, for text that came from `where`."""
    value, marks = _compose(text, where)
    for override in overrides:
        key, path = _apply_override(value, override)
        # The override, and no place in the file, is to blame for this key and all below it.
        for known in [known for known in marks if known[: len(path)] == path]:
            del marks[known]
        _mark_override(marks, path, key)
    try:
        return msgspec.convert(value, expected)
    except msgspec.ValidationError as error:
        raise ConfigError(_locate(str(error), expected, where, marks)) from None


def error_at(where: str, marks: Marks, path: tuple[str | int, ...], text: str) -> ConfigError:
    """A `ConfigError` at the mark of `path`, or of its nearest ancestor that has one."""
    return ConfigError(f"{_place(where, marks, path)}: {text}")


def load_config_with_marks(path: Path, expected: type[T], *, overrides: Sequence[str] = ()) -> tuple[T, Marks]:
    """`load_config`, and where each key stands: for checks that come later (a column that the dataset lacks)."""
    config = load_config(path, expected, overrides=overrides)
    _, marks = _compose(path.read_text("utf-8"), str(path))
    return config, marks


def _compose(text: str, where: str) -> tuple[Any, Marks]:
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        marks: Marks = {}
        value = _build(loader, node, (), marks, where) if node is not None else {}
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        line, column = (mark.line + 1, mark.column + 1) if mark else (1, 1)
        raise ConfigError(f"{where}:{line}:{column}: {error.problem or 'not valid YAML'}") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: not valid YAML: {error}") from None
    finally:
        loader.dispose()
    if not isinstance(value, dict):
        raise ConfigError(f"{where}:1:1: expected a mapping of keys to values, got {type(value).__name__}")
    return value, marks


def _build(loader: _Loader, node: yaml.Node, path: tuple[str | int, ...], marks: Marks, where: str) -> Any:
    marks[path] = (node.start_mark.line + 1, node.start_mark.column + 1)
    if len(path) > 32:
        raise ConfigError(f"{where}:{marks[path][0]}:{marks[path][1]}: nested deeper than 32")
    if isinstance(node, yaml.MappingNode):
        result: dict[str, Any] = {}
        for key_node, value_node in node.value:
            line, column = key_node.start_mark.line + 1, key_node.start_mark.column + 1
            if not isinstance(key_node, yaml.ScalarNode):
                raise ConfigError(f"{where}:{line}:{column}: a key must be plain text")
            key = str(key_node.value)
            if key in result:
                raise ConfigError(f"{where}:{line}:{column}: `{key}` is given twice")
            result[key] = _build(loader, value_node, (*path, key), marks, where)
            marks[(*path, key)] = (line, column)
        return result
    if isinstance(node, yaml.SequenceNode):
        return [_build(loader, item, (*path, index), marks, where) for index, item in enumerate(node.value)]
    return _scalar(node, marks[path], where)


def _scalar(node: yaml.Node, at: tuple[int, int], where: str) -> Any:
    text = str(node.value)
    match node.tag:
        case "tag:yaml.org,2002:null":
            return None
        case "tag:yaml.org,2002:bool":
            return text == "true"
        case "tag:yaml.org,2002:int":
            return int(text)
        case "tag:yaml.org,2002:float":
            return float(text)
        case "tag:yaml.org,2002:str":
            return text
        case _:
            raise ConfigError(f"{where}:{at[0]}:{at[1]}: the YAML tag {node.tag} is not taken; write a plain value")


def _apply_override(value: dict[str, Any], override: str) -> tuple[str, tuple[str | int, ...]]:
    key, equals, text = override.partition("=")
    if not equals or not key or not all(key.split(".")):
        raise ConfigError(f"--set {override}: expected key.path=value")
    where = f"--set {key}"
    node = _Loader(text)
    try:
        composed = node.get_single_node()
        new = _build(node, composed, (), {}, where) if composed is not None else None
    except yaml.YAMLError as error:
        raise ConfigError(f"{where}: the value is not valid YAML: {error}") from None
    finally:
        node.dispose()
    path = tuple(key.split("."))
    target = value
    for part in path[:-1]:
        inner = target.setdefault(part, {})
        if not isinstance(inner, dict):
            raise ConfigError(f"--set {override}: `{part}` is not a mapping")
        target = inner
    target[path[-1]] = new
    return key, path


_OVERRIDE_LINE = -1  # no file has this line; the index of the override stands where the column would


def _mark_override(marks: Marks, path: tuple[str | int, ...], key: str) -> None:
    marks[path] = (_OVERRIDE_LINE, len(key))


def _place(where: str, marks: Marks, path: tuple[str | int, ...]) -> str:
    known = path
    while known and known not in marks:
        known = known[:-1]
    line, column = marks.get(known, (1, 1))
    if line == _OVERRIDE_LINE:
        return f"--set {'.'.join(str(part) for part in known)}"
    return f"{where}:{line}:{column}"


def _locate(text: str, expected: type, where: str, marks: Marks) -> str:
    """msgspec says `... - at `$.a.b[0]`` (or `... - at `key` in `$.a``); put the place in the file in front."""
    match = re.search(r" - at `(?:key in )?(\$[^`]*)`$", text)
    path: tuple[str | int, ...] = ()
    if match:
        text = text[: match.start()]
        path = tuple(
            int(index) if index else name for name, index in re.findall(r"\.([^.\[\]]+)|\[(\d+)\]", match.group(1))
        )
    unknown = re.search(r"unknown field `([^`]+)`", text)
    if unknown:
        path = (*path, unknown.group(1))
    shown = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path).lstrip(".")
    return f"{_place(where, marks, path)}: {shown + ': ' if shown else ''}{text}{_instead(expected, path, text)}"


def _instead(expected: type, path: tuple[str | int, ...], text: str) -> str:
    """What could stand at `path`, by the types; nothing if they don't say."""
    if not path or not text.startswith(("Invalid", "Object contains unknown field")):
        return ""
    from difflib import get_close_matches  # only who has made a mistake waits for these

    from msgspec import inspect

    kinds = _plain([inspect.type_info(expected)])
    for part in path[:-1]:
        kinds = _plain([inner for kind in kinds for inner in _inside(kind, part)])
    if not text.startswith("Invalid"):
        names = [field.encode_name for kind in kinds if isinstance(kind, inspect.StructType) for field in kind.fields]
        close = get_close_matches(str(path[-1]), names, n=1)
        return f"; did you mean `{close[0]}`?" if close else ""
    found = [kind.tag for kind in kinds if isinstance(kind, inspect.StructType) and kind.tag_field == path[-1]]
    for leaf in _plain([inner for kind in kinds for inner in _inside(kind, path[-1])]):
        found += list(leaf.values) if isinstance(leaf, inspect.LiteralType) else []
    return f"; expected one of {', '.join(map(str, dict.fromkeys(found)))}" if found else ""


def _plain(kinds: list[Any]) -> list[Any]:
    """Without unions and annotations around them."""
    from msgspec import inspect

    found: list[Any] = []
    for kind in kinds:
        if isinstance(kind, inspect.UnionType):
            found += _plain(list(kind.types))
        elif isinstance(kind, inspect.Metadata):
            found += _plain([kind.type])
        else:
            found.append(kind)
    return found


def _inside(kind: Any, part: str | int) -> list[Any]:
    """The types that may stand at `part` of such a value."""
    from msgspec import inspect

    match kind:
        case inspect.StructType():
            return [field.type for field in kind.fields if field.encode_name == part]
        case inspect.ListType() | inspect.VarTupleType():
            return [kind.item_type]
        case _:
            return []
