"""The agent's YAML file: typed, with errors that name file, line and column. Relative paths start at the file's folder.

The device key is never in the file: `sordino-agent init` makes it in `state_dir`. A broker password is better kept in a
file of its own (`broker_password_file`) than here. `credential:NAME` in the place of a path is what systemd hands over.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Final, Literal

import msgspec

from sordino_agent.budget import BudgetSpec
from sordino_agent.datasets import DatasetSpec
from sordino_agent.models import ModelFile
from sordino_agent.policy import Limits, Policy
from sordino_common.channel.credentials import located, seen_by_others
from sordino_common.channel.identity import DeviceKey
from sordino_common.config import Marks, error_at, load_config_with_marks
from sordino_common.errors import ConfigError
from sordino_common.messages.base import Name
from sordino_common.transport.mqtt_settings import MqttSettings, TlsSettings

KEY_FILE: Final = "agent.key"
IDENTITY_FILE: Final = "broker.pem"  # key and certificate for the broker, if they came with `sordino-agent enroll`
BOOT_FILE: Final = "boot"
ROSTER_FILE: Final = "roster.cbor"
STATUS_FILE: Final = "status.json"
JOURNAL_FILE: Final = "journal.sqlite"
LEDGER_FILE: Final = "ledger.sqlite"
SUMS_FILE: Final = "sums.sqlite"
MODELS_FOLDER: Final = "models"
NO_CONFIGURATION: Final = (
    "name its file or folder, or make one: `sordino-agent enroll TOKEN`, or by hand `sordino-agent init`"
)

_KEY_HEX: Final = 64


class AgentSection(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Who this device is, whose commands it takes, and where it keeps key, roster, boot counter and status."""

    name: Name
    fleet: Name
    server: Name = "server"
    state_dir: str


class AgentConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """The whole file. `operator_key`: 64 hex digits, or the path of a file that holds them. `device_key`: the file of
    this device's own keys; absent: agent.key in `state_dir`. `roster`: a signed roster to begin with; without it the
    first comes from the broker (it is checked against the operator's key either way). `metrics_file`: figures for
    node_exporter's textfile collector, which reads files that end in .prom."""

    agent: AgentSection
    operator_key: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)]
    device_key: Annotated[str, msgspec.Meta(min_length=1, max_length=4096)] | None = None
    roster: str | None = None
    broker: MqttSettings
    broker_password_file: str | None = None
    datasets: Annotated[tuple[DatasetSpec, ...], msgspec.Meta(max_length=256)] = ()
    models: Annotated[tuple[ModelFile, ...], msgspec.Meta(max_length=64)] = ()
    policy: Policy = Policy()
    limits: Limits = Limits()
    executor: Literal["numpy", "torch"] = "numpy"
    metrics_file: Annotated[str, msgspec.Meta(pattern=r"\.prom\Z")] | None = None
    drain_s: Annotated[float, msgspec.Meta(ge=0.0, le=3600.0)] = 10.0


class LoadedConfig:
    """An `AgentConfig` with its paths resolved. Reads the small files that it names only when asked."""

    def __init__(self, path: Path, config: AgentConfig, marks: Marks) -> None:
        self.path = path
        self.config = config
        self.folder = path.resolve().parent
        self._marks = marks

    def with_config(self, config: AgentConfig) -> LoadedConfig:
        """The same file, read as `config`."""
        return LoadedConfig(self.path, config, self._marks)

    @property
    def state_dir(self) -> Path:
        return self.resolve(self.config.agent.state_dir)

    def state_file(self, name: str) -> Path:
        return self.state_dir / name

    def resolve(self, text: str) -> Path:
        """Raises `ConfigError` for a credential that was not handed over."""
        try:
            return located(text, self.folder)
        except ConfigError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    @property
    def key_file(self) -> Path:
        """Where this device's own keys are. Raises `ConfigError`."""
        return self.state_file(KEY_FILE) if self.config.device_key is None else self.resolve(self.config.device_key)

    def device_key(self) -> DeviceKey:
        """Raises `ConfigError`."""
        return DeviceKey.load(self.key_file)

    def datasets(self) -> tuple[DatasetSpec, ...]:
        """The datasets with absolute paths."""
        return tuple(
            msgspec.structs.replace(
                spec,
                path=str(self.resolve(spec.path)),
                test_path=None if spec.test_path is None else str(self.resolve(spec.test_path)),
            )
            for spec in self.config.datasets
        )

    def budgets(self) -> dict[str, BudgetSpec]:
        """The privacy budgets by dataset, of those that have one."""
        return {spec.name: spec.budget for spec in self.config.datasets if spec.budget is not None}

    def models(self) -> tuple[ModelFile, ...]:
        """The models with absolute paths."""
        return tuple(msgspec.structs.replace(spec, path=str(self.resolve(spec.path))) for spec in self.config.models)

    def operator_key(self) -> bytes:
        """The pinned key, 32 bytes. Raises `ConfigError`."""
        text = self.config.operator_key
        where = ""
        if not _is_key(text):
            file = self.resolve(text)
            where = f"{file}: "
            try:
                text = file.read_bytes()[:4096].decode("ascii", "replace").strip()
            except OSError as error:
                raise self.error(
                    ("operator_key",),
                    f"expected {_KEY_HEX} hex digits or a readable file of them; {file}: {error.strerror}",
                ) from None
        if not _is_key(text):
            raise self.error(("operator_key",), f"{where}expected {_KEY_HEX} hex digits, found {len(text)} characters")
        return bytes.fromhex(text)

    def broker(self) -> MqttSettings:
        """How to reach the broker: client id and password filled in, paths absolute. Raises `ConfigError`."""
        broker = self.config.broker
        password = broker.password
        if self.config.broker_password_file is not None:
            password = self._password(self.resolve(self.config.broker_password_file))
        tls = broker.tls
        if tls is not None:
            tls = TlsSettings(
                ca=self._resolved(tls.ca),
                certificate=self._resolved(tls.certificate),
                key=self._resolved(tls.key),
                server_name=tls.server_name,
            )
        client_id = broker.client_id or f"sordino-{self.config.agent.fleet}-{self.config.agent.name}"
        return msgspec.structs.replace(broker, client_id=client_id, password=password, tls=tls)

    def _resolved(self, text: str | None) -> str | None:
        return None if text is None else str(self.resolve(text))

    def _password(self, file: Path) -> str:
        key = ("broker_password_file",)
        try:
            if seen_by_others(file, file.stat()):
                raise self.error(key, f"{file}: readable by others; run chmod 600 {file}")
            return file.read_text("utf-8").rstrip("\r\n")
        except OSError as error:
            raise self.error(key, f"{file}: can't be read: {error.strerror}") from None

    def error(self, key: tuple[str | int, ...], text: str) -> ConfigError:
        """A `ConfigError` with the file, line and column of `key`."""
        return error_at(str(self.path), self._marks, key, f"{'.'.join(map(str, key))}: {text}")


def is_enrolled(loaded: LoadedConfig) -> bool:
    """Whether the certificate for the broker is the one that `sordino-agent enroll` keeps, and renews."""
    tls = loaded.config.broker.tls
    return (
        tls is not None
        and tls.certificate is not None
        and (loaded.resolve(tls.certificate) == loaded.state_file(IDENTITY_FILE))
    )


def load_agent_config(path: Path) -> LoadedConfig:
    """The configuration at `path`. Raises `ConfigError`: FILE:LINE:COLUMN, what was expected, what was found."""
    try:
        config, marks = load_config_with_marks(path, AgentConfig)
    except ConfigError as error:
        if path.exists():
            raise
        raise ConfigError(f"{error}; {NO_CONFIGURATION}") from None
    loaded = LoadedConfig(path, config, marks)
    names = [spec.name for spec in config.datasets]
    for index, name in enumerate(names):
        if name in names[:index]:
            raise loaded.error(("datasets", index, "name"), f"{name!r} is there twice")
    for name in config.policy.datasets or {}:
        if name not in names:
            raise loaded.error(
                ("policy", "datasets", name), f"no such dataset; there are: {', '.join(names) or 'none'}"
            )
    models = [spec.name for spec in config.models]
    for index, name in enumerate(models):
        if name in models[:index]:
            raise loaded.error(("models", index, "name"), f"{name!r} is there twice")
    for index, name in enumerate(config.policy.models if config.policy.models != "any" else ()):
        if name not in models:
            raise loaded.error(
                ("policy", "models", index), f"no such model {name!r}; there are: {', '.join(models) or 'none'}"
            )
    if config.agent.name == config.agent.server:
        raise loaded.error(("agent", "name"), "an agent can't have the server's name")
    has_password = config.broker.password is not None or config.broker_password_file is not None
    if config.broker.username is None and has_password:
        raise loaded.error(("broker",), "a password without a username")
    if config.broker.password is not None and config.broker_password_file is not None:
        raise loaded.error(("broker_password_file",), "the password is given twice, here and in broker.password")
    return loaded


def _is_key(text: str) -> bool:
    return len(text) == _KEY_HEX and all(digit in "0123456789abcdef" for digit in text.lower())
