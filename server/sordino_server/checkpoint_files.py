"""The files of a checkpoint: parameters, masks, an optimizer's state (safetensors), findings (JSON). Each carries the
SHA-256 of what it says: one wrong bit in a parameter would otherwise train on to another model without a word.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save as save_tensors

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_server.rounds.effects import PrivateState, SharedState

Tensors = Mapping[str, NDArray[np.generic]]

_DIGEST: Final = "sha256"


def masks_file(file: str) -> str:
    """Beside round-N.safetensors: the server's half of a state on shares."""
    return file.replace("round-", "masks-")


def private_file(file: str) -> str:
    """The optimizer's state of a private run."""
    return file.replace("round-", "private-")


def findings_file(file: str) -> str:
    """What a statistics job has found."""
    return file.replace("round-", "findings-").replace(".safetensors", ".json")


def write_tensors(path: Path, tensors: Tensors, about: Mapping[str, str], *, mode: int = 0o644) -> None:
    """Durable when it returns. Raises `OSError`."""
    # safetensors writes the memory as it lies, whatever the strides say.
    ordered = {name: np.asarray(value, order="C") for name, value in tensors.items()}
    write_atomically(path, save_tensors(ordered, {**about, _DIGEST: _digest(ordered, about)}), mode=mode)


def read_tensors(path: Path) -> tuple[Tensors, Mapping[str, str]]:
    """Tensors and what was said about them. Raises `ConfigError` for a file that is gone or not as it was written."""
    try:
        with path.open("rb"):
            pass  # for an error that says why
        with safe_open(path, framework="numpy") as file:
            about: dict[str, str] = dict(file.metadata() or {})
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  no mapping
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror or error}") from None
    except (SafetensorError, ValueError) as error:
        raise _damaged(path, str(error)) from None
    if about.pop(_DIGEST, None) != _digest(tensors, about):
        raise _damaged(path, "its SHA-256 is another one")
    return tensors, about


def write_masks(path: Path, shared: SharedState) -> None:
    """A secret, as the other half is with the parties."""
    about = {
        "session": shared.session.hex(),
        "steps": str(shared.steps),
        "parties": json.dumps(shared.parties),
        "rows": json.dumps(shared.rows),
        "counters": json.dumps(dict(shared.counters)),
    }
    write_tensors(path, shared.masks, about, mode=0o600)


def read_masks(path: Path) -> SharedState:
    masks, about = read_tensors(path)
    try:
        return SharedState(
            session=bytes.fromhex(about["session"]),
            steps=int(about["steps"]),
            masks={name: np.asarray(value, dtype=np.int64) for name, value in masks.items()},
            parties=tuple(json.loads(about["parties"])),
            rows=tuple((name, count) for name, count in json.loads(about["rows"])),
            counters=json.loads(about["counters"]),
        )
    except (KeyError, ValueError) as error:
        raise _damaged(path, str(error)) from None


def write_private(path: Path, private: PrivateState) -> None:
    write_tensors(path, {f"{k:04d}": value for k, value in enumerate(private.optimizer)}, {})


def read_private(path: Path, begun: int) -> PrivateState:
    """`begun`: by the table, which also counts what began after the checkpoint."""
    states, _ = read_tensors(path)
    return PrivateState(optimizer=tuple(np.asarray(states[name]) for name in sorted(states)), begun=begun)


def write_findings(path: Path, findings: Mapping[str, Any]) -> None:
    text = json.dumps(dict(findings))
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_atomically(path, json.dumps({_DIGEST: digest, "findings": dict(findings)}).encode())


def read_findings(path: Path) -> Mapping[str, Any]:
    try:
        found = json.loads(path.read_bytes())
        findings: dict[str, Any] = dict(found["findings"])
        right = found[_DIGEST] == hashlib.sha256(json.dumps(findings).encode()).hexdigest()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError) as error:
        raise _damaged(path, str(error)) from None
    if not right:
        raise _damaged(path, "its SHA-256 is another one")
    return findings


def _digest(tensors: Tensors, about: Mapping[str, str]) -> str:
    """Over names, dtypes, shapes, bytes, and what is said about them."""
    digest = hashlib.sha256(json.dumps(dict(sorted(about.items()))).encode())
    for name in sorted(tensors):
        value = np.ascontiguousarray(tensors[name])
        digest.update(f"{name}|{value.dtype.str}|{np.shape(tensors[name])}|".encode())
        digest.update(value.tobytes())
    return digest.hexdigest()


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: damaged: {why}. Put it back from a backup, or begin a new run: nothing that follows from it would be "
        "right"
    )
