"""A program's commands as values: what a parser says of itself, whichever library it is of."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

Kind = Literal["flag", "value", "file", "folder"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """`names` as they are typed. `kind`: whether a value follows, and of what sort. `choices`: all values there are."""

    names: tuple[str, ...]
    help: str
    kind: Kind = "flag"
    metavar: str = ""
    choices: tuple[str, ...] = ()
    required: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Argument:
    """A word without a name; `many`: any number of them."""

    metavar: str
    help: str
    kind: Kind = "value"
    choices: tuple[str, ...] = ()
    required: bool = True
    many: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Command:
    """A command, or (with `commands`) a group of them. `name`: its own word. `summary`: one line; `text`: all of it."""

    name: str
    summary: str
    text: str = ""
    options: tuple[Option, ...] = ()
    arguments: tuple[Argument, ...] = ()
    commands: tuple[Command, ...] = ()

    def walk(self, *above: str) -> Iterator[tuple[tuple[str, ...], Command]]:
        """This command and all below, each with the words that lead to it (the program's name left out)."""
        yield above, self
        for command in self.commands:
            yield from command.walk(*above, command.name)

    def synopsis(self) -> str:
        """Its words behind the name: options that must be there, then arguments."""
        parts = ["[OPTIONS]"] if any(not option.required for option in self.options) else []
        parts += [f"{option.names[0]} {option.metavar}".strip() for option in self.options if option.required]
        if self.commands:
            parts.append("COMMAND ...")
        for argument in self.arguments:
            word = f"{argument.metavar}..." if argument.many else argument.metavar
            parts.append(word if argument.required else f"[{word}]")
        return " ".join(parts)
