"""`sordino-agent`'s parser as a `tree`, for completion and its manual pages."""

from __future__ import annotations

import argparse
from pathlib import Path

from sordino_common.manual.tree import Argument, Command, Kind, Option


def tree_of(parser: argparse.ArgumentParser) -> Command:
    """The whole program, as argparse knows it."""
    return _command(parser.prog, parser, summary=(parser.description or "").split("\n")[0])


def _command(name: str, parser: argparse.ArgumentParser, *, summary: str) -> Command:
    options: list[Option] = []
    arguments: list[Argument] = []
    commands: list[Command] = []
    for action in parser._actions:  # the only way to ask argparse; its names are as old as argparse
        if isinstance(action, argparse._SubParsersAction):
            helps = {choice.dest: choice.help or "" for choice in action._choices_actions}
            commands += [_command(word, below, summary=helps[word]) for word, below in action.choices.items()]
        elif isinstance(action, argparse._HelpAction):
            continue
        elif action.option_strings:
            options.append(
                Option(
                    names=tuple(reversed(action.option_strings)),
                    help=_help(action),
                    kind=_kind(action),
                    metavar="" if action.nargs == 0 else _metavar(action),
                    choices=tuple(map(str, action.choices or ())),
                    required=action.required,
                )
            )
        else:
            arguments.append(
                Argument(
                    metavar=_metavar(action),
                    help=_help(action),
                    kind=_kind(action),
                    choices=tuple(map(str, action.choices or ())),
                    required=action.nargs != "?",
                )
            )
    text = parser.description or summary
    return Command(
        name=name,
        summary=summary,
        text=text,
        options=tuple(options),
        arguments=tuple(arguments),
        commands=tuple(commands),
    )


def _help(action: argparse.Action) -> str:
    return (action.help or "").replace("%%", "%")


def _metavar(action: argparse.Action) -> str:
    return action.metavar if isinstance(action.metavar, str) else action.dest.upper()


def _kind(action: argparse.Action) -> Kind:
    if action.nargs == 0:
        return "flag"
    if action.type is not Path:
        return "value"
    return "folder" if _metavar(action) in ("DIR", "FOLDER") else "file"
