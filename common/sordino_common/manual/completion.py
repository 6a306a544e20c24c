"""Completion scripts for bash, zsh and fish, written from a program's `tree`.

They are static: pressing TAB starts no Python, which on a Raspberry Pi would take a second. Nothing is sourced but what
stands here, and no word of a command line is ever evaluated.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from typing import Final

from sordino_common.errors import LocalError
from sordino_common.manual.tree import Argument, Command, Option

_WORD: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def script(program: Command, shell: str) -> str:
    """The script of `shell` (one of `SHELLS`)."""
    for words, command in program.walk():
        names = [name for option in command.options for name in option.names]
        texts = [*words, *names, *(value for option in command.options for value in option.choices)]
        for text in texts:
            if _WORD.fullmatch(text.lstrip("-")) is None:
                raise LocalError(f"completion: {text!r} can't stand in a script as it is")
    return _WRITERS[shell](program)


# --- bash -----------------------------------------------------------------------------------------------------------


def _bash(program: Command) -> str:
    return "\n".join(_bash_lines(program)) + "\n"


def _bash_lines(program: Command) -> Iterator[str]:
    function = "_" + re.sub(r"\W", "_", program.name)
    yield f'# bash completion of {program.name}: eval "$({program.name} completion bash)", or a file in'
    yield "# /usr/share/bash-completion/completions/"
    yield f"{function}() {{"
    yield "    local cur=${COMP_WORDS[COMP_CWORD]} prev=${COMP_WORDS[COMP_CWORD-1]}"
    yield "    local command= commands= options= files= word i"
    yield "    COMPREPLY=()"
    yield "    # readline splits --option=value into three words"
    yield "    if [[ $cur == = ]]; then cur=; elif [[ $prev == = ]]; then prev=${COMP_WORDS[COMP_CWORD-2]}; fi"
    yield "    for ((i = 1; i < COMP_CWORD; i++)); do"
    yield "        word=${COMP_WORDS[i]}"
    yield '        case "$command/$word" in'
    for words, command in program.walk():
        below = "|".join(f'"{" ".join(words)}/{child.name}"' for child in command.commands)
        if below:
            yield f'            {below}) command="${{command:+$command }}$word" ;;'
    yield "        esac"
    yield "    done"
    yield '    case "$command:$prev" in'
    for words, command in program.walk():
        for option in command.options:
            if option.kind != "flag":
                pattern = "|".join(f'"{" ".join(words)}:{name}"' for name in option.names)
                yield f"        {pattern}) {_bash_value(option)}; return ;;"
    yield "    esac"
    yield '    case "$command" in'
    for words, command in program.walk():
        children = " ".join(child.name for child in command.commands)
        choices = " ".join(choice for argument in command.arguments for choice in argument.choices)
        names = " ".join(name for option in command.options for name in option.names)
        files = next((argument.kind for argument in command.arguments if argument.kind in ("file", "folder")), "")
        yield f'        "{" ".join(words)}")'
        yield f'            commands="{children or choices}" options="{names} --help" files="{files}" ;;'
    yield "    esac"
    yield "    if [[ $cur == -* ]]; then"
    yield '        COMPREPLY=($(compgen -W "$options" -- "$cur"))'
    yield "    elif [[ -n $commands ]]; then"
    yield '        COMPREPLY=($(compgen -W "$commands" -- "$cur"))'
    yield "    elif [[ -n $files ]]; then"
    yield f"        {_bash_files('$files')}"
    yield "    fi"
    yield "}"
    yield f"complete -F {function} {program.name}"


def _bash_value(option: Option) -> str:
    if option.choices:
        return f'COMPREPLY=($(compgen -W "{" ".join(option.choices)}" -- "$cur"))'
    return _bash_files(option.kind) if option.kind in ("file", "folder") else ":"


def _bash_files(kind: str) -> str:
    """Names may hold blanks: `mapfile` takes lines as they are, and readline quotes them."""
    how = {"file": "-f", "folder": "-d"}.get(kind)
    if how is not None:
        return f'compopt -o filenames 2>/dev/null; mapfile -t COMPREPLY < <(compgen {how} -- "$cur")'
    return (
        "compopt -o filenames 2>/dev/null; "
        f'if [[ {kind} == folder ]]; then mapfile -t COMPREPLY < <(compgen -d -- "$cur"); '
        'else mapfile -t COMPREPLY < <(compgen -f -- "$cur"); fi'
    )


# --- zsh ------------------------------------------------------------------------------------------------------------


def _zsh(program: Command) -> str:
    return "\n".join(_zsh_lines(program)) + "\n"


def _zsh_lines(program: Command) -> Iterator[str]:
    function = "_" + re.sub(r"\W", "_", program.name)
    yield f"#compdef {program.name}"
    yield f"# zsh completion of {program.name}: a file named {function} in a folder of $fpath"
    yield f"{function}() {{"
    yield "    local curcontext=$curcontext command= i"
    yield "    local -a commands"
    yield "    for ((i = 2; i < CURRENT; i++)); do"
    yield '        case "$command/${words[i]}" in'
    for words, command in program.walk():
        below = "|".join(f'"{" ".join(words)}/{child.name}"' for child in command.commands)
        if below:
            yield f'            {below}) command="${{command:+$command }}${{words[i]}}" ;;'
    yield "        esac"
    yield "    done"
    yield '    case "$command" in'
    for words, command in program.walk():
        yield f'        "{" ".join(words)}")'
        if command.commands:
            listed = " ".join(_quoted(f"{_colons(child.name)}:{child.summary}") for child in command.commands)
            yield f"            commands=({listed})"
            yield "            [[ $PREFIX == -* ]] || { _describe -t commands command commands; return }"
        specs = [spec for option in command.options for spec in _zsh_option(option)]
        specs += [_quoted(f"{'*' if argument.many else ''}:{_zsh_word(argument)}") for argument in command.arguments]
        # The words of the command itself are arguments to _arguments.
        leading = [_quoted(f":{word}:") for word in words]
        yield f"            _arguments {' '.join([*leading, _quoted('--help[say how it is used]'), *specs])} ;;"
    yield "    esac"
    yield "}"
    yield f'{function} "$@"'


def _zsh_option(option: Option) -> Iterator[str]:
    for name in option.names:
        text = re.sub(r"([\[\]:])", r"\\\1", option.help)
        value = "" if option.kind == "flag" else f":{_colons(option.metavar or 'value')}:{_zsh_action(option)}"
        yield _quoted(f"{name}[{text}]{value}")


def _zsh_word(argument: Argument) -> str:
    return f"{_colons(argument.metavar)}:{_zsh_action(argument)}"


def _zsh_action(what: Option | Argument) -> str:
    if what.choices:
        return f"({' '.join(what.choices)})"
    return {"file": "_files", "folder": "_files -/"}.get(what.kind, " ")


def _colons(text: str) -> str:
    return text.replace(":", "\\:")


# --- fish -----------------------------------------------------------------------------------------------------------


def _fish(program: Command) -> str:
    return "\n".join(_fish_lines(program)) + "\n"


def _fish_lines(program: Command) -> Iterator[str]:
    yield f"# fish completion of {program.name}: a file in ~/.config/fish/completions/"
    yield f"complete -c {program.name} -f"
    for words, command in program.walk():
        here = "; and ".join(f"__fish_seen_subcommand_from {word}" for word in words)
        children = " ".join(child.name for child in command.commands)
        where = here
        if children:
            none = f"not __fish_seen_subcommand_from {children}"
            where = f"{here}; and {none}" if here else none
        for child in command.commands:
            yield f"complete -c {program.name} -n {_quoted(where)} -a {child.name} -d {_quoted(child.summary)}"
        condition = f" -n {_quoted(where)}" if where else ""
        for option in command.options:
            yield f"complete -c {program.name}{condition}{_fish_option(option)}"
        for argument in command.arguments:
            if argument.choices:
                yield f"complete -c {program.name}{condition} -a {_quoted(' '.join(argument.choices))}"
            elif argument.kind in ("file", "folder"):
                yield f"complete -c {program.name}{condition} -F"


def _fish_option(option: Option) -> str:
    names = "".join(
        f" -l {name.removeprefix('--')}" if name.startswith("--") else f" -s {name.removeprefix('-')}"
        for name in option.names
    )
    value = ""
    if option.choices:
        value = f" -x -a {_quoted(' '.join(option.choices))}"
    elif option.kind in ("file", "folder"):
        value = " -r -F"
    elif option.kind == "value":
        value = " -x"
    return f"{names}{value} -d {_quoted(option.help)}"


def _quoted(text: str) -> str:
    """For all three shells: single quotes, inside which nothing is expanded; fish alone reads backslashes there."""
    return "'" + text.replace("\\'", "'").replace("'", "’") + "'"


_WRITERS: Final[dict[str, Callable[[Command], str]]] = {"bash": _bash, "zsh": _zsh, "fish": _fish}
SHELLS: Final = tuple(_WRITERS)
