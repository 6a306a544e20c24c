"""`sordino-agent support-bundle`: what whoever is asked for help needs to know of this device, and no secret."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import msgspec

from sordino_agent.budget_report import report
from sordino_agent.check import check
from sordino_agent.config import KEY_FILE, LEDGER_FILE, STATUS_FILE, LoadedConfig, load_agent_config
from sordino_agent.ledger import Ledger
from sordino_agent.ledger_mark import mark_path
from sordino_agent.service import roster_book
from sordino_agent.status import is_alive, read_status
from sordino_common.daemon.bundle import KEEP, SET, Bundle, add_logs, files_under, select, system, versions
from sordino_common.daemon.scrub import Scrubber, secrets_in, secrets_of_environment, secrets_of_yaml
from sordino_common.errors import ConfigError, SordinoError

UNITS: Final = ("sordino-agent",)
_SECRET_FILES: Final = ("*.key", "*.pem", "*.token", "*password*")  # where no configuration names them
_SHAPE: Final[dict[str, Any]] = {
    "agent": {"name": KEEP, "fleet": KEEP, "server": KEEP},
    "operator_key": SET,
    "device_key": SET,
    "roster": SET,
    "broker": {
        **dict.fromkeys(("host", "port", "keepalive_s", "connect_timeout_s", "reconnect_least_s", "refused_s"), KEEP),
        **dict.fromkeys(("reconnect_most_s", "window", "max_packet_bytes", "max_inbound_bytes"), KEEP),
        **dict.fromkeys(("client_id", "username", "password"), SET),
        "tls": {"ca": SET, "certificate": SET, "key": SET, "server_name": KEEP},
    },
    "broker_password_file": SET,
    "datasets": [{"name": KEEP, "path": lambda text: Path(text).suffix, "test_rows": KEEP, "budget": KEEP}],
    "models": [{"name": KEEP}],
    "policy": KEEP,
    "limits": KEEP,
    "executor": KEEP,
    "metrics_file": SET,
    "drain_s": KEEP,
}


def make_bundle(path: Path, *, logs: Sequence[Path] = ()) -> Bundle:
    """Of the agent whose configuration is at `path`. What is broken is named in it; it is made all the same."""
    loaded: LoadedConfig | None = None
    problem = ""
    try:
        loaded = load_agent_config(path)
    except ConfigError as error:
        problem = str(error)
    scrubber = Scrubber([*_secrets(path, loaded), *secrets_of_environment(os.environ)])
    name = loaded.config.agent.name if loaded is not None else "agent"
    bundle = Bundle(f"sordino-agent-{name}-{time.strftime('%Y%m%d-%H%M%S', time.gmtime())}", scrubber)
    bundle.try_add("versions.json", "of Python and packages", versions)
    bundle.try_add("system.json", "machine, clock, memory, disk", lambda: system(path.parent))
    bundle.try_add("check.json", "findings of sordino-agent check --offline", lambda: _findings(path))
    if loaded is None:
        bundle.leave_out("config.json", problem)
        bundle.leave_out("the rest", "it stands in the folder that the configuration names")
    else:
        _add(bundle, loaded)
    add_logs(bundle, UNITS, logs)
    return bundle


def _add(bundle: Bundle, loaded: LoadedConfig) -> None:
    state = loaded.state_dir
    bundle.try_add("config.json", "the configuration, without its secrets", lambda: shown(loaded))
    bundle.try_add("status.json", "what the daemon last said of itself", lambda: _status(loaded))
    bundle.try_add("roster.json", "the roster in force: names and roles", lambda: _roster(loaded))
    bundle.try_add("budget.json", "privacy spent, by dataset", lambda: _budget(loaded))
    bundle.try_add("files.json", "the state folder: names, sizes, modes", lambda: files_under(state))


def shown(loaded: LoadedConfig) -> Any:
    """The configuration as a bundle has it."""
    return select(msgspec.to_builtins(loaded.config), _SHAPE)


def _findings(path: Path) -> Any:
    return [msgspec.to_builtins(finding) for finding in check(path, offline=True)]


def _status(loaded: LoadedConfig) -> Any:
    status = read_status(loaded.state_file(STATUS_FILE))
    return {"alive": is_alive(status), **msgspec.to_builtins(status)}


def _roster(loaded: LoadedConfig) -> Any:
    roster = roster_book(loaded, wall_s=time.time, persist=False).current
    if roster is None:
        return None
    entries = [{"name": e.name, "roles": list(e.roles), "zone": e.zone} for e in roster.entries]
    return {"epoch": roster.epoch, "expires_s": roster.expires_s, "entries": entries}


def _budget(loaded: LoadedConfig) -> Any:
    path = loaded.state_file(LEDGER_FILE)
    there = path.exists() or mark_path(path).exists()
    ledger = Ledger(path, read_only=True) if there else None
    try:
        return [msgspec.to_builtins(account) for account in report(ledger, loaded.budgets())]
    finally:
        if ledger is not None:
            ledger.close()


def _secrets(path: Path, loaded: LoadedConfig | None) -> Iterator[bytes]:
    """Everything secret that this device keeps: to be searched for, never to be shown."""
    try:
        yield from secrets_of_yaml(path.read_text("utf-8", "replace"))
    except OSError:
        return
    if loaded is None:
        for pattern in _SECRET_FILES:
            for file in sorted(path.parent.rglob(pattern)):
                yield from _file(file)
        return
    config = loaded.config
    files = {*loaded.state_dir.rglob("*.key"), *loaded.state_dir.rglob("*.pem")}
    try:
        files.add(loaded.key_file)
    except ConfigError:  # a credential that was not handed over: then it is not here either
        files.add(loaded.state_file(KEY_FILE))
    if config.broker.password is not None:
        yield config.broker.password.encode()
    try:
        broker = loaded.broker()
    except SordinoError:  # its password file is gone, say: then there is nothing in it to be searched for
        broker = config.broker
    if broker.password is not None:
        yield broker.password.encode()
    if broker.tls is not None:
        files |= {Path(text) for text in (broker.tls.key, broker.tls.certificate) if text is not None}
    for file in sorted(files):
        yield from _file(file)


def _file(path: Path) -> Iterator[bytes]:
    try:
        yield from secrets_in(path.read_bytes())
    except OSError:
        return
