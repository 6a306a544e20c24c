"""`sordino-agent init | enroll | run | check | status | budget | support-bundle | renew | rotate`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import msgspec

from sordino_agent import __version__
from sordino_common.errors import FleetUnavailable, SordinoError

DEFAULT_CONFIG = "/etc/sordino/agent.yaml"


def main(argv: Sequence[str] | None = None) -> int:
    """Exit codes: 0 done, 1 our bug, 2 usage or configuration, 3 broker or daemon not there, 4 security."""
    arguments = _parser().parse_args(argv)
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


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="sordino-agent", description="Train on this device's data, which stays here.")
    parser.add_argument("--version", action="version", version=f"sordino-agent {__version__}")
    commands = parser.add_subparsers(
        required=True, metavar="init | enroll | run | check | status | budget | support-bundle | renew | rotate"
    )

    init = commands.add_parser("init", help="make a key, a configuration and a request to be enrolled")
    init.add_argument("folder", type=Path, metavar="DIR")
    init.add_argument("--name", required=True, help="this device's name in the fleet")
    init.add_argument("--fleet", required=True, help="the fleet's name")
    init.add_argument("--operator-key", required=True, metavar="HEX", help="the operator's public key")
    init.add_argument("--broker", required=True, metavar="HOST:PORT", help="the MQTT broker")
    init.add_argument("--server", default="server", help="the server's name in the fleet (default: server)")
    init.set_defaults(act=_init)

    enroll = commands.add_parser("enroll", help="become a member with a token of `sordino enroll-token`")
    enroll.add_argument(
        "token", nargs="?", metavar="TOKEN", help="the token; - reads it; none: go on with the last one"
    )
    enroll.add_argument(
        "--dir",
        dest="folder",
        type=Path,
        default=Path(DEFAULT_CONFIG).parent,
        help=f"where key and configuration go (default: {Path(DEFAULT_CONFIG).parent})",
    )
    enroll.add_argument(
        "--state-dir", default="state", metavar="DIR", help="for keys and state, relative to --dir (default: state)"
    )
    enroll.add_argument("--name", help="this device's name, if the token does not say it")
    _wait_argument(enroll)
    enroll.add_argument("--offline", action="store_true", help="write the request into a file, to be carried by hand")
    enroll.add_argument("--grant", type=Path, metavar="FILE", help="take the answer from this file")
    enroll.set_defaults(act=_enroll)

    run = commands.add_parser(
        "run", help="be the agent until SIGTERM or Ctrl-C; SIGHUP reads policy and datasets again"
    )
    _config_argument(run)
    run.add_argument("--verbose", action="store_true", help="log debug lines too")
    run.add_argument(
        "--log-format",
        choices=("auto", "text", "json", "journal"),
        default="auto",
        help="auto: the journal with its fields under systemd, else text",
    )
    run.set_defaults(act=_run)

    check = commands.add_parser("check", help="look for everything that could keep the agent from working")
    _config_argument(check)
    check.add_argument("--offline", action="store_true", help="don't connect to the broker")
    check.add_argument("--json", action="store_true", help="findings as one JSON array")
    check.set_defaults(act=_check)

    status = commands.add_parser("status", help="what the running agent does")
    _config_argument(status)
    status.add_argument("--json", action="store_true", help="as one JSON object")
    status.set_defaults(act=_status)

    support = commands.add_parser("support-bundle", help="what whoever is asked for help needs, without secrets")
    _config_argument(support)
    support.add_argument("-o", "--output", type=Path, metavar="FILE", help="a new .tar.gz file")
    support.add_argument(
        "--log", type=Path, action="append", default=[], help="a log file; of it, the lines that are ours"
    )
    support.add_argument("--list", action="store_true", help="say what would be in it; write nothing")
    support.set_defaults(act=_support)

    budget = commands.add_parser("budget", help="what privacy was spent of each dataset, and what is left")
    _config_argument(budget)
    budget.add_argument("--json", action="store_true", help="as one JSON array")
    budget.set_defaults(act=_budget)

    renew = commands.add_parser("renew", help="get a new certificate for the broker")
    _config_argument(renew)
    _wait_argument(renew)
    renew.add_argument(
        "--if-due", action="store_true", help="only if less than a third of its time is left: for a timer"
    )
    renew.set_defaults(act=_renew)

    rotate = commands.add_parser("rotate", help="get new keys for this device; the old ones end")
    _config_argument(rotate)
    _wait_argument(rotate)
    rotate.set_defaults(act=_rotate)
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


def _init(arguments: argparse.Namespace) -> int:
    from sordino_agent.enrol import enrol

    made = enrol(
        arguments.folder,
        name=arguments.name,
        fleet=arguments.fleet,
        operator_key=arguments.operator_key,
        broker=arguments.broker,
        server=arguments.server,
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

    text: str | None = arguments.token
    enroll(
        arguments.folder,
        token=sys.stdin.read(1 << 16) if text == "-" else text,
        name=arguments.name,
        wait_s=arguments.wait,
        offline=arguments.offline,
        grant=arguments.grant,
        say=_say_now,
        state_dir=arguments.state_dir,
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


def _duration(seconds: float) -> str:
    whole = max(0, int(seconds))
    days, hours, minutes = whole // 86_400, whole // 3600 % 24, whole // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {whole % 60} s"


def _say(text: str) -> None:
    sys.stdout.write(text + "\n")


if __name__ == "__main__":
    sys.exit(main())
