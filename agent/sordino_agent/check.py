"""`sordino-agent check`: everything that could keep this agent from working, each finding with its remedy."""

from __future__ import annotations

import importlib.util
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from sordino_agent.config import LEDGER_FILE, LoadedConfig, load_agent_config
from sordino_agent.errors import LedgerError, ModelFileError
from sordino_agent.ledger import Ledger
from sordino_agent.ledger_mark import mark_path
from sordino_agent.service import roster_book
from sordino_common.errors import ConfigError, FleetUnavailable, RosterError, SordinoError
from sordino_common.transport.mqtt import MqttSettings, MqttTransport
from sordino_common.transport.reactor import Reactor

Level = Literal["ok", "warning", "error"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at. `exit_code` is what an error of this kind ends a command with."""

    level: Level
    what: str
    text: str
    remedy: str = ""
    exit_code: int = 0


def ok(what: str, text: str) -> Finding:
    return Finding(level="ok", what=what, text=text)


def warning(what: str, text: str, remedy: str) -> Finding:
    return Finding(level="warning", what=what, text=text, remedy=remedy)


def error(what: str, text: str, remedy: str, *, exit_code: int = ConfigError.exit_code) -> Finding:
    return Finding(level="error", what=what, text=text, remedy=remedy, exit_code=exit_code)


def exit_code(findings: list[Finding]) -> int:
    """That of the worst error: configuration (2) before security (4) before broker (3); 0 if there is none."""
    codes = {finding.exit_code for finding in findings if finding.level == "error"}
    return next((code for code in (2, 4, 3) if code in codes), 0)


def check(path: Path, *, offline: bool) -> list[Finding]:
    """Look at everything; what depends on something that is broken is left out."""
    try:
        loaded = load_agent_config(path)
    except ConfigError as problem:
        remedy = "mend the file at this place"
        if not path.exists():
            remedy = "name the configuration: sordino-agent check PATH, or make one with `sordino-agent init`"
        return [error("configuration", str(problem), remedy)]
    findings = [ok("configuration", f"{path} is valid")]
    for part in (_state, _roster, _datasets, _budgets, _models, _policy, _resources):
        findings += part(loaded)
    if not offline:
        findings += _broker(loaded)
    return findings


def _state(loaded: LoadedConfig) -> Iterator[Finding]:
    folder = loaded.state_dir
    if not folder.is_dir() or not os.access(folder, os.W_OK | os.X_OK):
        yield error(
            "state", f"{folder} is not a folder that this user can write", f"mkdir -p {folder}, or change its owner"
        )
        return
    if folder.stat().st_mode & 0o022:
        yield error("state", f"{folder} can be written by others", f"chmod 700 {folder}")
    else:
        yield ok("state", f"{folder} is there and writable")
    try:
        key = loaded.device_key()
    except ConfigError as problem:
        yield error("key", str(problem), "make one with `sordino-agent init`, or mend the file's mode: chmod 600")
        return
    yield ok("key", f"device key {key.fingerprint}")


def _roster(loaded: LoadedConfig) -> Iterator[Finding]:
    section = loaded.config.agent
    try:
        book = roster_book(loaded, wall_s=time.time, persist=False)
    except ConfigError as problem:
        yield error("roster", str(problem), "put the key and roster there that the operator gave you")
        return
    except SordinoError as problem:
        remedy = (
            "ask the operator for the fleet's signed roster, and compare operator_key with what `sordino init` printed"
        )
        yield error("roster", str(problem), remedy, exit_code=problem.exit_code)
        return
    if book.current is None:
        yield warning(
            "roster", "no roster yet", "the first one comes from the broker, once the operator has enrolled this device"
        )
        return
    try:
        roster = book.require()
        entry = book.party(section.name)
    except RosterError as problem:
        remedy = (
            "send enrolment.json to the operator (sordino roster add, sordino roster sign); check this device's clock"
        )
        yield error("roster", str(problem), remedy, exit_code=problem.exit_code)
        return
    if roster.server.name != section.server:
        yield error(
            "roster",
            f"the roster's server is {roster.server.name!r}, agent.server is {section.server!r}",
            "set agent.server to the roster's",
        )
    try:
        key = loaded.device_key()
    except ConfigError:
        return  # told already
    if entry.sign_key != key.public.sign_key or entry.box_key != key.public.box_key:
        yield error(
            "roster",
            f"the roster lists other keys for {section.name} than the one in {loaded.state_dir}",
            "have this device enrolled again with its enrolment.json",
            exit_code=RosterError.exit_code,
        )
    else:
        days = (roster.expires_s - time.time()) / 86_400
        yield ok("roster", f"epoch {roster.epoch} lists this device; it expires in {days:.0f} days")


def _datasets(loaded: LoadedConfig) -> Iterator[Finding]:
    from sordino_agent.data.catalogue import FileCatalogue  # NumPy: only here, not in the daemon

    config = loaded.config
    if not config.datasets:
        yield warning("datasets", "none is configured", "add the files that this device offers under `datasets`")
        return
    listed = FileCatalogue(loaded.datasets(), max_bytes=config.limits.memory_bytes // 2).describe()
    for problem in listed.problems:
        yield error("datasets", problem.detail, "mend the file or the entry")
    for info in listed.datasets:
        text = (
            f"{info.name}: {info.train_rows} rows to train on, {info.test_rows} to test on, {len(info.columns)} columns"
        )
        few = [str(rows) for rows in (info.train_rows, info.test_rows) if 0 < rows < config.policy.min_rows]
        if few or not info.train_rows:
            remedy = f"more rows, or a smaller policy.min_rows (now {config.policy.min_rows})"
            yield warning("datasets", f"{text}: commands over too few rows will be refused", remedy)
        else:
            yield ok("datasets", text)


def _budgets(loaded: LoadedConfig) -> Iterator[Finding]:
    """The ledger as far as it can be read, and rows that are offered under a budget and again beside it."""
    path = loaded.state_file(LEDGER_FILE)
    try:
        if path.exists() or mark_path(path).exists():
            ledger = Ledger(path, read_only=True)
            count = sum(1 for _ in ledger.entries())
            ledger.close()
            yield ok("ledger", f"{path}: {count} entries, none missing or changed")
    except LedgerError as problem:
        yield error("ledger", str(problem), "the agent does not start until this is settled")
    specs = loaded.datasets()
    for spec in specs:
        others = [other.name for other in specs if other.path == spec.path and other.name != spec.name]
        if spec.budget is not None and others:
            yield warning(
                "budget",
                f"the file of {spec.name} is also offered as {', '.join(others)}: its budget does not cover that",
                "offer the same rows under one name",
            )


def _models(loaded: LoadedConfig) -> Iterator[Finding]:
    from sordino_agent.data.models import FileModels  # NumPy: only here, not in the daemon

    policy, specs = loaded.config.policy, loaded.models()
    models = FileModels(specs, max_bytes=loaded.config.limits.memory_bytes // 4)
    for spec in specs:
        try:
            tensors = models.tensors(spec.name)
        except ModelFileError as problem:
            yield error("models", str(problem), "mend the file or the entry")
            continue
        text = f"{spec.name}: {sum(tensor.size for tensor in tensors.values())} parameters in {len(tensors)} tensors"
        allowed = policy.models == "any" or spec.name in policy.models
        if allowed and "spdz-model" in policy.jobs:
            yield ok("models", text)
        else:
            remedy = f"add spdz-model to policy.jobs, and {spec.name} to policy.models"
            yield warning("models", f"{text}: sessions that ask for it will be refused", remedy)


def _policy(loaded: LoadedConfig) -> Iterator[Finding]:
    policy = loaded.config.policy
    wants_plans = {"train", "evaluate", "tensors", "aggregate"} & set(policy.jobs)
    if policy.plans == "any":
        yield warning(
            "policy",
            "any Plan may run here",
            "list the Plans (SHA-256) under policy.plans, or trust the server with it",
        )
    elif wants_plans and not policy.plans:
        remedy = "list the Plans (SHA-256) under policy.plans, or say: any"
        yield warning("policy", f"no Plan may run here, so {', '.join(sorted(wants_plans))} will be refused", remedy)
    else:
        yield ok("policy", f"jobs: {', '.join(policy.jobs) or 'none'}; Plans that may run: {len(policy.plans)}")


def _resources(loaded: LoadedConfig) -> Iterator[Finding]:
    config = loaded.config
    if config.executor == "torch" and importlib.util.find_spec("torch") is None:
        yield error("executor", "torch is not installed", "pip install 'sordino[torch]', or set executor: numpy")
    available, wanted = _available_bytes(), config.limits.memory_bytes
    if available is not None and available < wanted:
        text = f"limits.memory_bytes allows a task {wanted >> 20} MiB, {available >> 20} MiB are available"
        yield warning("memory", text, "lower limits.memory_bytes")
    else:
        yield ok("memory", f"limits.memory_bytes ({wanted >> 20} MiB) fits into what is available")


def _broker(loaded: LoadedConfig) -> Iterator[Finding]:
    try:
        settings = loaded.broker()
    except ConfigError as problem:
        yield error("broker", str(problem), "mend the file or its mode")
        return
    where = f"{settings.host}:{settings.port}"
    try:
        limit, window = _connect(settings)
    except ConfigError as problem:
        yield error("broker", str(problem), "mend the entry under broker.tls")
    except FleetUnavailable as problem:
        remedy = "is the broker running, the address right, the firewall open, the user known to it?"
        yield error("broker", f"{where}: {problem}", remedy, exit_code=problem.exit_code)
    else:
        yield ok("broker", f"{where} answers; packets up to {limit} bytes, {window} unacknowledged")


def _connect(settings: MqttSettings) -> tuple[int, int]:
    """(largest packet, window) that the broker grants. Under an id of its own: the running agent stays connected."""
    from msgspec.structs import replace

    class Listener:
        reason = "no answer"
        connected = False

        def on_connected(self) -> None:
            self.connected = True

        def on_disconnected(self, reason: str) -> None:
            self.reason = reason

        def on_packet(self, topic: str, payload: bytes, retained: bool) -> None:
            pass

        def on_writable(self) -> None:
            pass

    listener = Listener()
    with Reactor() as reactor:
        transport = MqttTransport(replace(settings, client_id=f"{settings.client_id}-check"), reactor)
        transport.open(listener)
        deadline_s = reactor.now_s() + settings.connect_timeout_s
        reactor.run_until(lambda: listener.connected or listener.reason != "no answer", deadline_s=deadline_s)
        limits = transport.max_packet_bytes, transport.window
        transport.close()
    if not listener.connected:
        raise FleetUnavailable(listener.reason)
    return limits


def _available_bytes() -> int | None:
    try:
        lines = Path("/proc/meminfo").read_text("ascii").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")), None)
