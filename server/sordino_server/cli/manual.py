"""A typer application as a `tree`, from the signatures of its commands: for completion and manual pages.

Not through typer's own objects of commands, which differ from version to version.
"""

from __future__ import annotations

import inspect
import types
import typing
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from typer.models import ArgumentInfo, OptionInfo

from sordino_common.errors import LocalError
from sordino_common.manual.tree import Argument, Command, Kind, Option
from sordino_server.cli.version import VERSION_HELP

_FOLDERS = frozenset({"fleet", "folder", "store", "report", "keys"})  # parameters that are folders, where paths are


def tree_of(application: typer.Typer, name: str, *, summary: str) -> Command:
    """The whole program. Raises `LocalError` for a parameter without help: nobody can read its mind."""
    commands = [
        _command(info.name or _dashed(info.callback), info.callback) for info in application.registered_commands
    ]
    for group in application.registered_groups:
        instance = group.typer_instance
        if instance is None or not isinstance(group.name, str):
            raise LocalError("manual: a group without a name")
        commands.append(tree_of(instance, group.name, summary=str(instance.info.help)))
    # All that stands before a command, if anything does: see `version`.
    options = (Option(names=("--version",), help=VERSION_HELP),) if application.registered_callback else ()
    return Command(name=name, summary=summary, options=options, commands=tuple(commands))


def _command(name: str, callback: Any) -> Command:
    text = inspect.getdoc(callback) or ""
    summary = " ".join(text.split("\n\n")[0].split())
    options: list[Option] = []
    arguments: list[Argument] = []
    hints = typing.get_type_hints(callback, include_extras=True)
    for parameter in inspect.signature(callback).parameters.values():
        hint = hints[parameter.name]
        info = next((m for m in typing.get_args(hint)[1:] if isinstance(m, ArgumentInfo | OptionInfo)), None)
        if info is None or not info.help:
            raise LocalError(f"manual: {name}: the parameter {parameter.name} has no help")
        plain, many = _plain(typing.get_args(hint)[0])
        required = parameter.default is inspect.Parameter.empty
        kind = _kind(plain, parameter.name)
        metavar = info.metavar or parameter.name.upper()
        if isinstance(info, ArgumentInfo):
            arguments.append(
                Argument(
                    metavar=metavar, help=info.help, kind=kind, choices=_choices(plain), required=required, many=many
                )
            )
            continue
        names = [
            name for name in (info.default, *(info.param_decls or ())) if isinstance(name, str) and name[:1] == "-"
        ]
        if not names:
            names = [f"--{parameter.name.replace('_', '-')}"]
            if kind == "flag":
                names.append(f"--no-{parameter.name.replace('_', '-')}")
        options.append(
            Option(
                names=tuple(sorted(names, key=lambda word: (not word.startswith("--"), word.startswith("--no-")))),
                help=info.help + _default(parameter.default, kind, info),
                kind=kind,
                metavar="" if kind == "flag" else metavar.removesuffix("_S"),
                choices=_choices(plain),
                required=required,
            )
        )
    return Command(name=name, summary=summary, text=text, options=tuple(options), arguments=tuple(arguments))


def _plain(hint: Any) -> tuple[Any, bool]:
    """The type without `| None` and `list[...]`; whether there was a list."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        hint = next(part for part in typing.get_args(hint) if part is not type(None))
    many = typing.get_origin(hint) is list
    return (typing.get_args(hint)[0], True) if many else (hint, False)


def _kind(plain: Any, name: str) -> Kind:
    if plain is bool:
        return "flag"
    if plain is Path:
        return "folder" if name in _FOLDERS else "file"
    return "value"


def _choices(plain: Any) -> tuple[str, ...]:
    return tuple(str(item.value) for item in plain) if isinstance(plain, type) and issubclass(plain, Enum) else ()


def _default(value: Any, kind: Kind, info: ArgumentInfo | OptionInfo) -> str:
    """What holds without it, where that says something."""
    said = "" if not info.envvar else f" (environment: {info.envvar})"
    if kind == "flag" or value in (None, "", inspect.Parameter.empty) or isinstance(value, list):
        return said
    shown = value.value if isinstance(value, Enum) else value
    return f" (default: {shown}){said}"


def _dashed(callback: Any) -> str:
    return str(callback.__name__).replace("_", "-")
