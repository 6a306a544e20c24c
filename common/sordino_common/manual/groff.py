"""Manual pages in groff's man macros (man(7)), written from a program's `tree`, or from sections of text."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Final

from sordino_common.manual.tree import Argument, Command, Option

EXIT_CODES: Final = (
    ("0", "done"),
    ("1", "a bug of ours"),
    ("2", "the command line or a configuration is wrong; the text says where, and how to mend it"),
    ("3", "the fleet, the broker or the daemon can't be reached, or a deadline passed; trying again may help"),
    ("4", "stopped for security: a signature, a policy, a check of shares"),
    ("5", "a device's privacy budget can't afford it"),
    ("130", "interrupted by Ctrl-C or SIGTERM"),
)


def program_page(
    program: Command,
    *,
    version: str,
    examples: Sequence[tuple[str, str]],
    files: Sequence[tuple[str, str]],
    environment: Sequence[tuple[str, str]],
    see_also: Sequence[str],
) -> str:
    """Section 1. `examples`: (what it does, the command line)."""
    lines = [*_head(program.name, 1, version, program.summary), ".SH SYNOPSIS", f".B {escaped(program.name)}"]
    lines += [escaped(program.synopsis()), ".SH DESCRIPTION", *paragraphs(program.text or program.summary)]
    if program.options:
        lines += [".SH OPTIONS", *(line for option in program.options for line in _option(option))]
    lines.append(".SH COMMANDS")
    for words, command in program.walk():
        if words and not command.commands:
            lines += _command(" ".join((program.name, *words)), command)
    lines += _list("EXIT STATUS", EXIT_CODES)
    lines += _list("FILES", files)
    lines += _list("ENVIRONMENT", environment)
    if examples:
        lines.append(".SH EXAMPLES")
        for what, line in examples:
            lines += [".TP", escaped(what), ".EX", escaped(line), ".EE"]
    return _end(lines, see_also)


def text_page(
    name: str,
    section: int,
    *,
    version: str,
    summary: str,
    sections: Mapping[str, Sequence[str]],
    see_also: Sequence[str],
) -> str:
    """Any section; the lines of `sections` are groff already (`paragraphs`, `tagged`, `verbatim`)."""
    lines = _head(name, section, version, summary)
    for title, body in sections.items():
        lines += [f".SH {escaped(title)}", *body]
    return _end(lines, see_also)


def paragraphs(text: str) -> list[str]:
    """Plain text; an empty line begins a new paragraph."""
    lines: list[str] = []
    for block in text.strip().split("\n\n"):
        lines += [".PP", *(escaped(line.strip()) for line in block.splitlines())]
    return lines


def tagged(tag: str, text: str) -> list[str]:
    return [".TP", f"\\fB{escaped(tag)}\\fR", escaped(" ".join(text.split())) or "\\&"]


def verbatim(text: str) -> list[str]:
    return [".EX", *(escaped(line) for line in text.splitlines()), ".EE"]


def escaped(text: str) -> str:
    """Text as it is: no backslash, leading dot or quote means anything; a hyphen stays one that can be copied."""
    plain = text.replace("\\", "\\e").replace("-", "\\-")
    return f"\\&{plain}" if plain[:1] in (".", "'") else plain


def _head(name: str, section: int, version: str, summary: str) -> list[str]:
    title = escaped(name.upper())
    return [
        '.\\" Made by scripts/make-man from the program itself.',
        f'.TH "{title}" "{section}" "" "sordino {escaped(version)}" "Sordino"',
        ".SH NAME",
        f"{escaped(name)} \\- {escaped(summary.rstrip('.'))}",
    ]


def _command(words: str, command: Command) -> Iterator[str]:
    yield f'.SS "{escaped(f"{words} {command.synopsis()}".strip())}"'
    yield from paragraphs(command.text or command.summary)
    for argument in command.arguments:
        if argument.help:
            yield from tagged(argument.metavar, _with_choices(argument))
    for option in command.options:
        yield from _option(option)


def _option(option: Option) -> list[str]:
    names = ", ".join(option.names) + (f" {option.metavar}" if option.metavar else "")
    return tagged(names, _with_choices(option))


def _with_choices(what: Option | Argument) -> str:
    said = what.help if what.help.endswith((".", ")")) else f"{what.help}."
    return f"{said} One of: {', '.join(what.choices)}." if what.choices else what.help


def _list(title: str, entries: Sequence[tuple[str, str]]) -> list[str]:
    if not entries:
        return []
    return [f".SH {title}", *(line for tag, text in entries for line in tagged(tag, text))]


def _end(lines: list[str], see_also: Sequence[str]) -> str:
    if see_also:
        lines += [".SH SEE ALSO", escaped(", ".join(see_also))]
    return "\n".join(lines) + "\n"
