"""`sordino-agent init | enroll | run | check | status | budget | support-bundle | renew | rotate | completion`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import textwrap
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from sordino_agent import __version__
from sordino_common.errors import FleetUnavailable, SordinoError

DEFAULT_CONFIG = "/etc/sordino/agent.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 our bug, 2 usage or configuration, 3 broker or daemon not there, 4 security."""
    arguments = make_parser().parse_args(argv)
    try:
        return int(arguments.act(arguments))
    except SordinoError as error:
        sys.stderr.write(f"sordino-agent: {error}\n")
        return error.exit_code
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # whoever read our output has gone
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1


_EXIT = "exit codes: 0 done, 1 a bug of ours, 2 command line or configuration, 3 broker or daemon not there, 4 security"


class _Help(argparse.HelpFormatter):
    """Paragraphs are as wide as the terminal, lines that are indented stay as they are."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        kept = (line if line[:1] in ("", " ") else textwrap.fill(line, width) for line in text.splitlines())
        return "\n".join(f"{indent}{line}" for line in kept)


def _explained(
    commands: argparse._SubParsersAction[argparse.ArgumentParser],
    name: str,
    line: str,
    text: str,
    *examples: str,
) -> argparse.ArgumentParser:
    """A command with its line for the list, its text, and examples; all end with the exit codes."""
    return commands.add_parser(
        name,
        help=line,
        description=text,
        epilog="\n".join(("examples:", *(f"  {example}" for example in examples), "", _EXIT)),
        formatter_class=_Help,
    )


def make_parser() -> argparse.ArgumentParser:
    """The whole command line; manual pages and completion are made from it."""
    parser = argparse.ArgumentParser(
        prog="sordino-agent",
        description="Train on this device's data, which stays here.",
        epilog=f"A new device: `enroll` with a token, or `init`; then `check`, then `run`.\n{_EXIT}",
        formatter_class=_Help,
    )
    parser.add_argument("--version", action="version", version=f"sordino-agent {__version__}", help="print the version")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    init = _explained(
        commands,
        "init",
        "make a key, a configuration and a request to be enrolled",
        "Make DIR: this device's own key (which never leaves it), agent.yaml to be filled in, and enrolment.json, "
        "which the operator takes with `sordino roster add`. With a token, use `enroll`: it does all of that.",
        "sordino-agent init pi-01 --name pi-01 --fleet lab --operator-key HEX --broker broker.example:8883",
    )
    init.add_argument("folder", type=Path, metavar="DIR", help="a new folder")
    init.add_argument("--name", required=True, help="this device's name in the fleet")
    init.add_argument("--fleet", required=True, help="the fleet's name")
    init.add_argument("--operator-key", required=True, metavar="HEX", help="the operator's public key, 64 hex digits")
    init.add_argument("--broker", required=True, metavar="HOST:PORT", help="the MQTT broker")
    init.add_argument("--server", default="server", help="the server's name in the fleet (default: server)")
    init.set_defaults(act=_handed_over(_init))

    enroll = _explained(
        commands,
        "enroll",
        "become a member with a token of `sordino enroll-token`",
        "Make this device's key, ask to be enrolled with a token that the operator gave you, and wait for the "
        "answer. Compare the fingerprint that it prints with the one that the operator sees. If the wait ends "
        "before the answer comes, the same command without a token goes on.",
        "sordino-agent enroll TOKEN",
        "sordino-agent enroll --grant grant.txt     # the answer, by hand",
    )
    enroll.add_argument(
        "token", nargs="?", metavar="TOKEN", help="the token; - reads it; none: go on with the last one"
    )
    enroll.add_argument(
        "--dir",
        dest="folder",
        metavar="DIR",
        type=Path,
        default=Path(DEFAULT_CONFIG).parent,
        help=f"where key and configuration go (default: {Path(DEFAULT_CONFIG).parent})",
    )
    enroll.add_argument(
        "--state-dir",
        metavar="DIR",
        help="for keys and state, relative to --dir (default: state, or where the package keeps it)",
    )
    enroll.add_argument("--name", help="this device's name, if the token does not say it")
    _wait_argument(enroll)
    enroll.add_argument("--offline", action="store_true", help="write the request into a file, to be carried by hand")
    enroll.add_argument("--grant", type=Path, metavar="FILE", help="take the answer from this file")
    enroll.set_defaults(act=_handed_over(_enroll))

    run = _explained(
        commands,
        "run",
        "be the agent until SIGTERM or Ctrl-C; SIGHUP reads policy and datasets again",
        "Connect, and do what the server asks for within this device's policy, until SIGTERM or Ctrl-C. SIGHUP "
        "reads policy and datasets again. Under systemd: systemctl enable --now sordino-agent.",
        "sordino-agent run",
        "sordino-agent run pi-01/agent.yaml --verbose",
    )
    _config_argument(run)
    run.add_argument("--verbose", action="store_true", help="log debug lines too")
    run.add_argument(
        "--log-format",
        choices=("auto", "text", "json", "journal"),
        default="auto",
        help="auto (default): the journal with its fields under systemd, else text",
    )
    run.set_defaults(act=_run)

    check = _explained(
        commands,
        "check",
        "look for everything that could keep the agent from working",
        "Look at keys and their modes, roster, certificates, datasets, budgets, disk, memory, clock, versions and "
        "databases, and on a short visit at the broker's limits and access rules. Each finding has its remedy. "
        "Changes nothing, and disturbs no agent that runs. Warnings alone end with 0.",
        "sordino-agent check",
        "sordino-agent check --offline --json | jq '.[] | select(.level != \"ok\")'",
    )
    _config_argument(check)
    check.add_argument("--offline", action="store_true", help="don't connect to the broker")
    check.add_argument("--json", action="store_true", help="findings as one JSON array")
    check.set_defaults(act=_check)

    status = _explained(
        commands,
        "status",
        "what the running agent does",
        "What the running agent does, from its status file. Exit code 3 if no agent runs.",
        "sordino-agent status",
    )
    _config_argument(status)
    status.add_argument("--json", action="store_true", help="as one JSON object")
    status.set_defaults(act=_status)

    support = _explained(
        commands,
        "support-bundle",
        "what whoever is asked for help needs, without secrets",
        "Write one file with what whoever is asked for help needs: configuration, status, findings, versions and "
        "lines of logs; without keys, passwords, rows or models. It is sent to nobody: look at it first.",
        "sordino-agent support-bundle --list",
        "sordino-agent support-bundle -o pi-01.tar.gz",
    )
    _config_argument(support)
    support.add_argument("-o", "--output", type=Path, metavar="FILE", help="a new .tar.gz file")
    support.add_argument(
        "--log", type=Path, action="append", default=[], help="a log file; of it, the lines that are ours"
    )
    support.add_argument("--list", action="store_true", help="say what would be in it; write nothing")
    support.set_defaults(act=_support)

    budget = _explained(
        commands,
        "budget",
        "what privacy was spent of each dataset, and what is left",
        "What was released about each dataset, what it cost in epsilon, and what is left of its budget.",
        "sordino-agent budget",
        "sordino-agent budget --json",
    )
    _config_argument(budget)
    budget.add_argument("--json", action="store_true", help="as one JSON array")
    budget.set_defaults(act=_budget)

    renew = _explained(
        commands,
        "renew",
        "get a new certificate for the broker",
        "Ask for a new certificate under the key that is here, and wait for it.",
        "sordino-agent renew --if-due",
    )
    _config_argument(renew)
    _wait_argument(renew)
    renew.add_argument(
        "--if-due", action="store_true", help="only if less than a third of its time is left: for a timer"
    )
    renew.set_defaults(act=_handed_over(_renew))

    rotate = _explained(
        commands,
        "rotate",
        "get new keys for this device; the old ones end",
        "Make new keys, have the operator approve them, and let the old ones end.",
        "sordino-agent rotate",
    )
    _config_argument(rotate)
    _wait_argument(rotate)
    rotate.set_defaults(act=_handed_over(_rotate))

    completion = _explained(
        commands,
        "completion",
        "print a completion script for a shell",
        "Print a script that completes commands, options and files. It starts no Python when TAB is pressed.",
        'eval "$(sordino-agent completion bash)"       # in ~/.bashrc',
        "sordino-agent completion zsh > ~/.zfunc/_sordino_agent",
        "sordino-agent completion fish > ~/.config/fish/completions/sordino-agent.fish",
    )
    completion.add_argument("shell", choices=("bash", "zsh", "fish"), metavar="SHELL", help="bash, zsh or fish")
    completion.set_defaults(act=_completion)
    return parser


def _wait_argument(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--wait", type=float, default=600.0, metavar="S", help="seconds to wait for the operator (default: 600)"
    )


def _config_argument(parser: argparse.ArgumentParser) -> None:
    default = os.environ.get("SORDINO_AGENT_CONFIG", DEFAULT_CONFIG)
    parser.add_argument(
        "config",
        type=Path,
        nargs="?",
        default=Path(default),
        metavar="CONFIG",
        help=f"the YAML file, or the folder with agent.yaml (default: $SORDINO_AGENT_CONFIG or {DEFAULT_CONFIG})",
    )


def _config_path(arguments: argparse.Namespace) -> Path:
    path: Path = arguments.config
    return path / "agent.yaml" if path.is_dir() else path


def _handed_over(act: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """`act`, after which what root has made for the service belongs to the service, however it ended."""

    def run(arguments: argparse.Namespace) -> int:
        from sordino_agent.ownership import settle

        try:
            return act(arguments)
        finally:
            settle(arguments.folder / "agent.yaml" if "folder" in arguments else _config_path(arguments))

    return run


def _init(arguments: argparse.Namespace) -> int:
    from sordino_agent.enrol import enrol
    from sordino_agent.ownership import state_dir_for

    made = enrol(
        arguments.folder,
        name=arguments.name,
        fleet=arguments.fleet,
        operator_key=arguments.operator_key,
        broker=arguments.broker,
        server=arguments.server,
        state_dir=state_dir_for(arguments.folder),
    )
    config = made.config
    _say(
        f"""\
configuration  {config}
request        {made.request}
fingerprint    {made.fingerprint}
sign key       {made.sign_key}
box key        {made.box_key}

Next: name your datasets in {config}, send {made.request.name} to the operator, and let them compare the
fingerprint with you before `sordino roster add`. Then:
    sordino-agent check {config}
    sordino-agent run {config}"""
    )
    return 0


def _enroll(arguments: argparse.Namespace) -> int:
    from sordino_agent.enrolling import enroll
    from sordino_agent.ownership import state_dir_for

    text: str | None = arguments.token
    enroll(
        arguments.folder,
        token=sys.stdin.read(1 << 16) if text == "-" else text,
        name=arguments.name,
        wait_s=arguments.wait,
        offline=arguments.offline,
        grant=arguments.grant,
        say=_say_now,
        state_dir=arguments.state_dir or state_dir_for(arguments.folder),
    )
    return 0


def _renew(arguments: argparse.Namespace) -> int:
    from sordino_agent.config import load_agent_config
    from sordino_agent.enrolling import renew

    loaded = load_agent_config(_config_path(arguments))
    renew(loaded, wait_s=arguments.wait, if_due=arguments.if_due, say=_say_now)
    return 0


def _rotate(arguments: argparse.Namespace) -> int:
    from sordino_agent.config import load_agent_config
    from sordino_agent.enrolling import rotate

    rotate(load_agent_config(_config_path(arguments)), wait_s=arguments.wait, say=_say_now)
    return 0


def _say_now(text: str) -> None:
    """Before a wait: whoever reads our output must see the fingerprint now."""
    _say(text)
    sys.stdout.flush()


def _run(arguments: argparse.Namespace) -> int:
    from sordino_agent.config import load_agent_config
    from sordino_agent.service import run
    from sordino_common.daemon.logs import set_up_logging
    from sordino_common.daemon.notify import Notifier

    level = logging.DEBUG if arguments.verbose else logging.INFO
    set_up_logging("sordino-agent", form=arguments.log_format, level=level)
    notifier = Notifier.from_environment(os.environ)
    try:
        return run(load_agent_config(_config_path(arguments)), notifier)
    except SordinoError as error:
        notifier.status(str(error))  # it stays in `systemctl status` when the process is gone
        raise


def _check(arguments: argparse.Namespace) -> int:
    from sordino_agent.check import check, exit_code
    from sordino_agent.ownership import look_as_owner

    look_as_owner(_config_path(arguments))
    from sordino_common.diagnosis.finding import count_line

    findings = check(_config_path(arguments), offline=arguments.offline)
    if arguments.json:
        _say(msgspec.json.format(msgspec.json.encode(findings), indent=2).decode())
    for finding in [] if arguments.json else findings:
        _say(f"{finding.level:8} {finding.what:14} {finding.text}")
        if finding.remedy:
            _say(f"{'':8} {'':14} -> {finding.remedy}")
    if not arguments.json:
        _say(count_line(findings))
    return exit_code(findings)


def _status(arguments: argparse.Namespace) -> int:
    from sordino_agent.config import STATUS_FILE, load_agent_config
    from sordino_agent.status import is_alive, read_status

    loaded = load_agent_config(_config_path(arguments))
    status = read_status(loaded.state_file(STATUS_FILE))
    alive = is_alive(status)
    if arguments.json:
        _say(msgspec.json.encode({"alive": alive, **msgspec.to_builtins(status)}).decode())
        return 0 if alive else FleetUnavailable.exit_code
    age = _duration(time.time() - status.updated_s)
    _say(f"{status.name} of fleet {status.fleet}, version {status.version}, boot {status.boot}")
    if alive:
        _say(
            f"  {status.state} as process {status.pid} for {_duration(time.time() - status.started_s)}; as of {age} ago"
        )
    else:
        _say(f"  NOT RUNNING; last seen {age} ago as process {status.pid} ({status.state})")
    link = "connected" if status.connected else f"NOT CONNECTED: {status.connection}"
    _say(f"  broker    {link}; server {status.server} is {'online' if status.server_online else 'not online'}")
    if status.server_unlike:
        _say(f"  protocol  {status.server_unlike}")
    _say(f"  roster    {'none yet' if status.roster_epoch is None else f'epoch {status.roster_epoch}'}")
    for dataset in status.datasets or ():
        _say(f"  dataset   {dataset.name}: {dataset.train_rows} rows to train on, {dataset.test_rows} to test on")
    for name in status.datasets_unreadable:
        _say(f"  dataset   {name}: CAN'T BE READ; see: sordino-agent check")
    _say(f"  tasks     {status.tasks_done} done, {status.tasks_failed} failed, {status.refusals} commands refused")
    for label in status.running:
        _say(f"  running   {label}")
    megabytes = status.resident_bytes / 1e6
    _say(f"  traffic   {status.bytes_sent} bytes sent, {status.bytes_received} received; {megabytes:.1f} MB resident")
    return 0 if alive else FleetUnavailable.exit_code


def _budget(arguments: argparse.Namespace) -> int:
    from sordino_agent.budget_report import lines, report
    from sordino_agent.config import LEDGER_FILE, load_agent_config
    from sordino_agent.ledger import Ledger
    from sordino_agent.ledger_mark import mark_path

    loaded = load_agent_config(_config_path(arguments))
    path = loaded.state_file(LEDGER_FILE)
    there = path.exists() or mark_path(path).exists()
    ledger = Ledger(path, read_only=True) if there else None
    reports = report(ledger, loaded.budgets())
    if ledger is not None:
        ledger.close()
    if arguments.json:
        _say(msgspec.json.format(msgspec.json.encode(reports), indent=2).decode())
        return 0
    for line in lines(reports):
        _say(line)
    return 0


def _support(arguments: argparse.Namespace) -> int:
    from sordino_agent.support import make_bundle

    bundle = make_bundle(_config_path(arguments), logs=arguments.log)
    path = arguments.output or Path(f"{bundle.title}.tar.gz")
    if not arguments.list:
        bundle.write(path)
    for line in bundle.listing():
        _say(line)
    if not arguments.list:
        _say(f"\n{path}: written, and not sent to anybody. Look before you send it:\n  tar -xzOf {path} | less")
    return 0


def _completion(arguments: argparse.Namespace) -> int:
    from sordino_agent.manual import tree_of
    from sordino_common.manual.completion import script

    _say(script(tree_of(make_parser()), arguments.shell).rstrip("\n"))
    return 0


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")
