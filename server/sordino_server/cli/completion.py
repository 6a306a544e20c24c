"""`sordino completion SHELL`, `sordino-sim completion SHELL`."""

from __future__ import annotations

from collections.abc import Callable
from enum import StrEnum
from typing import Annotated

import typer

from sordino_common.manual.completion import script
from sordino_common.manual.tree import Command
from sordino_server.cli.output import say


class Shell(StrEnum):
    """The shells that we write for."""

    bash = "bash"
    zsh = "zsh"
    fish = "fish"


def completion_command(program: Callable[[], Command]) -> Callable[[Shell], None]:
    """The command of `program`, whose tree is asked for when the command runs: then all commands are there."""

    def completion(shell: Annotated[Shell, typer.Argument(help="The shell.", show_default=False)]) -> None:
        """Print a completion script for a shell. For bash: eval "$(PROGRAM completion bash)" in ~/.bashrc, or a file in
        /usr/share/bash-completion/completions; for zsh a file in a folder of $fpath; for fish one in
        ~/.config/fish/completions."""
        say(script(program(), shell.value).rstrip("\n"))

    return completion
