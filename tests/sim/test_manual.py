"""Help, completion and manual pages of all three programs: nothing without words, and bash really completes."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from sordino_agent import cli as agent_cli
from sordino_agent import manual_pages
from sordino_agent.manual import tree_of as agent_tree
from sordino_common.errors import LocalError
from sordino_common.manual import groff
from sordino_common.manual.completion import SHELLS, script
from sordino_common.manual.tree import Argument, Command, Option
from sordino_server.cli import app, run_cli
from sordino_server.cli import man as server_man
from sordino_server.cli.manual import tree_of
from sordino_server.cli.words import EXAMPLES, SIM_EXAMPLES, SIM_SUMMARY, SUMMARY
from sordino_sim import man as sim_man
from sordino_sim.cli import app as sim_app

PROGRAMS = {
    "sordino": tree_of(app, "sordino", summary=SUMMARY),
    "sordino-agent": agent_tree(agent_cli.make_parser()),
    "sordino-sim": tree_of(sim_app, "sordino-sim", summary=SIM_SUMMARY),
}
PAGES = {**manual_pages.pages(), **server_man.pages(), **sim_man.pages()}


# --- help -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_nothing_is_without_words(program: Command) -> None:
    for words, command in program.walk():
        assert command.summary and "\n" not in command.summary, words
        for thing in (*command.options, *command.arguments):
            assert thing.help, (words, thing)


def test_examples_are_of_commands_and_options_that_exist() -> None:
    """A line of an example parses as far as its options go."""
    for examples, program in ((EXAMPLES, PROGRAMS["sordino"]), (SIM_EXAMPLES, PROGRAMS["sordino-sim"])):
        known = {" ".join(words): command for words, command in program.walk()}
        for name, shown in examples.items():
            if name == "support-bundle" and name not in known:
                continue  # of another part of the program
            options = {word for option in known[name].options for word in option.names}
            for _, line in shown:
                first = line.split(" && ")[0]
                assert f"{program.name} {name}" in first
                for path in re.findall(r"examples/\S+", first):
                    assert (Path(__file__).parents[2] / path).is_file(), line
                assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", first)) <= options, line


@pytest.mark.parametrize("words", [["train"], ["roster", "sign"], ["doctor"], []])
def test_help_ends_with_examples_and_exit_codes(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(app, [*words, "--help"], program="sordino") == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "Exit codes: 0 done, 1 a bug of ours, 2 command line or configuration, 3 fleet or broker unavailable" in said
    for _, line in EXAMPLES.get(" ".join(words), ()):
        assert line in said


def test_the_lists_of_commands_are_not_cut_short(capsys: pytest.CaptureFixture[str]) -> None:
    for application, words in ((app, []), (app, ["roster"]), (sim_app, [])):
        assert run_cli(application, [*words, "--help"], program="p") == 0
        listed = capsys.readouterr().out.split("Commands:")[1]
        assert "..." not in listed


@pytest.mark.parametrize("words", [[], ["init"], ["check"], ["run"], ["completion"]])
def test_the_agents_help_ends_with_them_too(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        agent_cli.main([*words, "--help"])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    assert "exit codes: 0 done, 1 a bug of ours" in said
    assert not words or f"  sordino-agent {words[0]}" in said or "$(sordino-agent" in said


# --- completion -----------------------------------------------------------------------------------------------------


def completed(program: str, *words: str, cwd: Path | None = None) -> list[str]:
    """What bash offers for the last of `words`: the script is sourced, and its function is called as bash would."""
    line = " ".join(f"'{word}'" for word in (program, *words))
    code = (
        f"source /dev/stdin <<'END'\n{script(PROGRAMS[program], 'bash')}END\n"
        f"COMP_WORDS=({line}); COMP_CWORD={len(words)}\n"
        f"$(complete -p {program} | sed -E 's/.*-F ([^ ]+).*/\\1/')\n"
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )
    done = subprocess.run(
        ["bash", "--norc", "--noprofile", "-c", code], capture_output=True, text=True, check=True, timeout=30, cwd=cwd
    )
    assert done.stderr == ""
    return [word for word in done.stdout.split("\n") if word]


def test_bash_completes_commands_options_and_choices() -> None:
    assert completed("sordino", "ro") == ["roster"]
    assert completed("sordino", "roster", "s") == ["sign"]
    assert "--resume" in completed("sordino", "train", "--")
    assert completed("sordino", "train", "--res") == ["--resume"]
    assert completed("sordino", "train", "--log-format", "j") == ["json", "journal"]
    assert completed("sordino", "train", "--resume", "x") == []
    assert completed("sordino", "train", "--log-format", "=", "te") == ["text"]
    assert completed("sordino", "train", "--log-format", "=") == ["auto", "text", "json", "journal"]
    assert completed("sordino", "completion", "") == ["bash", "zsh", "fish"]
    assert completed("sordino-agent", "") == [command.name for command in PROGRAMS["sordino-agent"].commands]
    assert completed("sordino-agent", "run", "--verbose", "--log-") == ["--log-format"]
    assert completed("sordino-agent", "run", "--log-format", "te") == ["text"]
    assert completed("sordino-agent", "completion", "z") == ["zsh"]
    assert completed("sordino-sim", "run", "--transport", "m") == ["memory", "mqtt"]


def test_bash_completes_files_and_folders_with_blanks_in_them(tmp_path: Path) -> None:
    (tmp_path / "my job.yaml").write_text("")
    (tmp_path / "my lab").mkdir()
    assert sorted(completed("sordino", "train", "my", cwd=tmp_path)) == ["my job.yaml", "my lab"]
    assert completed("sordino", "train", "--fleet", "my", cwd=tmp_path) == ["my lab"]
    assert sorted(completed("sordino-agent", "check", "my", cwd=tmp_path)) == ["my job.yaml", "my lab"]


@pytest.mark.parametrize("shell", SHELLS)
@pytest.mark.parametrize("program", PROGRAMS)
def test_scripts_are_valid_where_the_shell_is_there(shell: str, program: str) -> None:
    text = script(PROGRAMS[program], shell)
    for words, command in PROGRAMS[program].walk():
        for option in command.options:
            for name in option.names:
                assert (name.lstrip("-") if shell == "fish" else name) in text, (words, name)
    if (
        shutil.which(shell) is not None
    ):  # zsh and fish are not everywhere; their scripts hold the same words all the same
        subprocess.run([shell, "-n"], input=text, text=True, check=True, timeout=30)


def test_what_can_not_stand_in_a_script_is_refused() -> None:
    for word in ("a b", "$(x)", "a;b", "`x`", ""):
        option = Option(names=("--x",), help="h", kind="value", choices=(word,))
        with pytest.raises(LocalError, match="can't stand in a script"):
            script(Command(name="p", summary="s", options=(option,)), "bash")
    texts = Command(name="p", summary="it's $(x) `y`", options=(Option(names=("--x",), help="don't $(x)"),))
    assert "$(x)" not in script(texts, "bash")
    for shell in ("zsh", "fish"):
        for line in script(texts, shell).splitlines():
            assert line.count("'") % 2 == 0


def test_the_commands_print_their_scripts(capsys: pytest.CaptureFixture[str]) -> None:
    assert run_cli(app, ["completion", "bash"], program="sordino") == 0
    assert "complete -F _sordino sordino" in capsys.readouterr().out
    assert run_cli(sim_app, ["completion", "fish"], program="sordino-sim") == 0
    assert "complete -c sordino-sim" in capsys.readouterr().out
    assert agent_cli.main(["completion", "zsh"]) == 0
    assert capsys.readouterr().out.startswith("#compdef sordino-agent")
    assert run_cli(app, ["completion", "tcsh"], program="sordino") == 2


# --- manual pages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PAGES)
def test_a_page_is_one(name: str, tmp_path: Path) -> None:
    """Every line is text or a macro of man(7); and groff, where it is there, has nothing to say."""
    text = PAGES[name]
    assert text.splitlines()[1].startswith(".TH ")
    macros = {line.split()[0] for line in text.splitlines() if line.startswith(".") and not line.startswith('.\\"')}
    assert macros <= {".TH", ".SH", ".SS", ".PP", ".TP", ".B", ".EX", ".EE"}
    for title in (".SH NAME", ".SH DESCRIPTION", ".SH SEE ALSO"):
        assert title in text.splitlines()
    assert not re.search(r"\\(?![-e&fBRn\"])", text)
    if shutil.which("groff") is None:
        pytest.skip("no groff to read it")
    path = tmp_path / name
    path.write_text(text)
    read = subprocess.run(
        ["groff", "-man", "-Tutf8", "-ww", "-K", "utf8", str(path)],
        capture_output=True, text=True, check=True, timeout=60,
    )  # fmt: skip
    assert read.stderr == ""
    assert name.rsplit(".", 1)[0].upper() in read.stdout


def test_pages_tell_every_command_option_and_key() -> None:
    for name, program in PROGRAMS.items():
        text = PAGES[f"{name}.1"]
        for words, command in program.walk():
            if words and not command.commands:
                assert groff.escaped(" ".join((name, *words))) in text
            for option in command.options:
                assert groff.escaped(option.names[0]) in text
    keys = PAGES["agent.yaml.5"]
    for key in ("agent", "operator_key", "broker", "datasets", "path", "policy", "min_rows", "memory_bytes", "drain_s"):
        assert f"{key}\\fR" in keys, key


def test_text_is_never_a_macro() -> None:
    page = groff.program_page(
        Command(name="p", summary=".SH bad\\", arguments=(Argument(metavar="'x", help=".TP"),)),
        version="1", examples=[(".x", "-y \\z")], files=(), environment=(), see_also=(),
    )  # fmt: skip
    assert "\n.SH bad" not in page and "\n.TP\n.TP\n" not in page
    assert "\\-y \\ez" in page


def test_make_man_writes_them(tmp_path: Path) -> None:
    made = Path(__file__).parents[2] / "scripts" / "make-man"
    assert subprocess.run([sys.executable, str(made), str(tmp_path)], check=True, timeout=120).returncode == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(PAGES)
