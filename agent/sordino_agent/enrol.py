"""`sordino-agent init`: a key made on this device, a configuration to fill in, and a request to be enrolled."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from sordino_agent.config import KEY_FILE, load_agent_config
from sordino_agent.policy import Limits
from sordino_common.channel.files import write_atomically, write_new
from sordino_common.channel.identity import DeviceKey, check_sign_key
from sordino_common.errors import ConfigError
from sordino_common.messages.base import NAME_PATTERN
from sordino_common.transport.mqtt_settings import TlsSettings

CONFIG_FILE: Final = "agent.yaml"
REQUEST_FILE: Final = "enrolment.json"
STATE_FOLDER: Final = "state"


@dataclass(frozen=True, slots=True, kw_only=True)
class Enrolment:
    """What `init` made: where, and the public keys that the operator has to compare."""

    config: Path
    request: Path
    fingerprint: str
    sign_key: str
    box_key: str


def enrol(
    folder: Path,
    *,
    name: str,
    fleet: str,
    operator_key: str,
    broker: str,
    server: str = "server",
    roles: tuple[str, ...] = ("data",),
    tls: TlsSettings | None = None,
    state_dir: str = STATE_FOLDER,
) -> Enrolment:
    """Make `folder` with key, configuration and enrolment request. A key that is there already is kept. `tls` and
    `state_dir` (relative to `folder`): for the configuration.

    Raises `ConfigError` if an argument is wrong or the folder holds a configuration."""
    for what, value in (("--name", name), ("--fleet", fleet), ("--server", server)):
        if not re.match(NAME_PATTERN, value):
            raise ConfigError(f"{what} {value!r}: lower-case letters, digits and -, at most 63, are expected")
    if name == server:
        raise ConfigError(f"--name {name!r}: this is the server's name")
    fault = check_sign_key(bytes.fromhex(operator_key)) if re.fullmatch(r"[0-9a-fA-F]{64}", operator_key) else "not hex"
    if fault is not None:
        raise ConfigError(f"--operator-key: expected the 64 hex digits that `sordino init` printed ({fault})")
    host, port = broker_address(broker)
    config = folder / CONFIG_FILE
    if config.exists():
        raise ConfigError(f"{config}: is there already; edit it, or choose another folder")
    state = folder / state_dir
    key_path = state / KEY_FILE
    try:
        folder.mkdir(parents=True, exist_ok=True)
        state.mkdir(mode=0o700, parents=True, exist_ok=True)
        if key_path.exists():
            key = DeviceKey.load(key_path)
        else:
            key = DeviceKey.generate()
            key.save(key_path)
        request = folder / REQUEST_FILE
        made = Enrolment(
            config=config,
            request=request,
            fingerprint=key.fingerprint,
            sign_key=key.public.sign_key.hex(),
            box_key=key.public.box_key.hex(),
        )
        write_atomically(request, _request(made, name=name, fleet=fleet, roles=roles))
        text = _config(
            name=name,
            fleet=fleet,
            server=server,
            operator_key=operator_key.lower(),
            host=host,
            port=port,
            tls=tls,
            state_dir=state_dir,
        )
        write_new(config, text.encode(), mode=0o600)
    except OSError as error:
        raise ConfigError(f"{error.filename or folder}: can't be written: {error.strerror}") from None
    load_agent_config(config)
    return made


def broker_address(text: str) -> tuple[str, int]:
    """(host, port) of HOST, HOST:PORT or [IPV6]:PORT; the port is 1883 if absent. Raises `ConfigError`."""
    match = re.fullmatch(r"(?:\[([0-9A-Fa-f:.]+)\]|([^:\s\[\]]+))(?::([0-9]{1,5}))?", text)
    if match is None or not 1 <= int(match.group(3) or 1883) <= 65535:
        raise ConfigError(f"--broker {text!r}: expected HOST:PORT, as in broker.example:1883 or [::1]:1883")
    return match.group(1) or match.group(2), int(match.group(3) or 1883)


def _request(made: Enrolment, *, name: str, fleet: str, roles: tuple[str, ...]) -> bytes:
    request = {
        "name": name,
        "fleet": fleet,
        "roles": list(roles),
        "sign_key": made.sign_key,
        "box_key": made.box_key,
        "fingerprint": made.fingerprint,
    }
    return (json.dumps(request, indent=2) + "\n").encode()


def sample_config() -> str:
    """What `init` writes, for the manual: with every key that there is, most of them as comments."""
    return _config(
        name="pi-01",
        fleet="lab",
        server="server",
        operator_key="0" * 64,
        host="broker.example",
        port=8883,
        tls=None,
        state_dir=STATE_FOLDER,
    )


def _config(
    *,
    name: str,
    fleet: str,
    server: str,
    operator_key: str,
    host: str,
    port: int,
    tls: TlsSettings | None,
    state_dir: str,
) -> str:
    limits = Limits()
    tls_line = f"# tls: {{ca: ca.pem, certificate: {name}.pem, key: {name}.key}}"
    if tls is not None:
        given = {key: value for key, value in msgspec.to_builtins(tls).items() if value is not None}
        tls_line = f"tls: {json.dumps(given)}"
    return f"""\
# Configuration of one Sordino agent. Check it with: sordino-agent check agent.yaml

agent:
  name: {name}
  fleet: {fleet}
  server: {server}
  state_dir: {json.dumps(state_dir)}   # device key, roster, boot counter, status; relative to this file

# The operator's public key. A roster that it did not sign is refused; so is a server that the roster does not name.
operator_key: {operator_key}

broker:
  host: {json.dumps(host)}
  port: {port}
  # username: {name}
  {tls_line}
# broker_password_file: broker.password

# What this device offers. Rows never leave it: a server can ask for training, sums over many rows, and descriptions.
datasets: []
#  - name: boston
#    path: data/boston.csv       # csv (header row, numbers), npz (an array per column) or npy
#    columns: [CRIM, RM, MEDV]   # only these are offered; absent: all
#    tags: [housing]
#    test_fraction: 0.2          # or test_rows: 50 (the last ones), or test_path: data/test.csv
#    split_seed: 1
#    budget: {{epsilon: 3.0, delta: 1.0e-5}}   # all that may ever be learnt from its rows; absent: counted, not refused

# Models that this device may provide to sessions on shares: it masks the parameters, nobody else ever sees them.
models: []
#  - name: boiler
#    path: {state_dir}/models/RUN.npz    # a float32 array per parameter; models that open to it are kept there

# What a server may ask for. Whatever is not allowed here is refused.
policy:
  jobs: [describe, moments, train, evaluate, aggregate]   # tensors, statistics, help: not allowed by default
  plans: []                # SHA-256 (hex) of the Plans that may run here, or: any. With `any` a hostile server could
                           # write a Plan whose result tells more about your rows than a model does (SECURITY.md).
  # datasets: {{boston: [train, evaluate]}}       # absent: every dataset is open to all of `jobs`
  fetch: none              # stored tensors that may be fetched: none, any, or the Plans that made them
  min_rows: 10             # no answer is formed over fewer rows
  # exact_evaluation: true # with a budget: sums over held-out rows may leave without noise all the same
  # min_noise_multiplier: 1.0  # least noise of a private release, over its sensitivity
  # Secure aggregation (`aggregate`): the server sees sums over so many devices. With `aggregate` alone instead of
  # moments, train and evaluate, it never sees more. `help` holds masks for others (roster role helper).
  min_cohort: 5            # fewest contributors to a sum
  min_helpers: 1           # fewest helpers; one honest one is enough
  models: []               # names of `models` that may be input into sessions on shares (spdz-model in `jobs`), or: any
  # Secret shares: add spdz-compute and spdz-data to `jobs`, and say what may open to whom.
  # spdz:
  #   outputs: {{model: [{server}], loss: [{server}], prediction: ["*owners"], tensors: [{server}]}}
  #   min_committee: 3         # fewest compute agents
  #   zones: 2                 # in so many zones of the roster
  #   security: active         # the least that is accepted

limits:
  memory_bytes: {limits.memory_bytes}  # of one task, in the worker process
  plan_seconds: {limits.plan_seconds:g}        # the longest task
  payload_bytes: {limits.payload_bytes}  # the largest command, answer or message of a session on shares
  # store_bytes: {limits.store_bytes}  # stored tensors
  # plans_bytes: {limits.plans_bytes}  # Plans
  # results_bytes: {limits.results_bytes} # answers already given, to be given again
  # queue: {limits.queue}               # tasks waiting or running
  # threads: {limits.threads}             # of the linear algebra; with 1, the same command gives the same bytes
  # idle_s: {limits.idle_s:g}             # then the worker process ends and its memory is free
  # spdz_bytes: {limits.spdz_bytes}  # preprocessing on shares that waits for its step
  # sessions: {limits.sessions}            # on shares, at a time

executor: numpy            # or torch, if sordino[torch] is installed
drain_s: 10                # at a stop, tasks get this long to finish
"""
