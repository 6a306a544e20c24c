"""The masks of checkpoints that a dealer of its own keeps: files, mode 0600, durable before anybody is told."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load as load_tensors
from safetensors.numpy import save as save_tensors

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError, LocalError, PolicyRefusal, RemoteError

FORM: Final = "1"  # of a file, in its metadata
I64 = npt.NDArray[np.int64]
_RUN: Final = re.compile(r"^[a-z0-9][a-z0-9-]{0,79}\Z")


class MaskStore:
    """Under `folder`; None: in memory, for the simulator."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._held: dict[tuple[str, str], bytes] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)

    def save(self, run: str, session: bytes, step: int, masks: Mapping[str, I64]) -> None:
        """Durable when it returns. Raises `LocalError` if it can't be."""
        data = save_tensors({name: np.asarray(value, order="C") for name, value in masks.items()}, {"form": FORM})
        name = _file(session, step)
        if self._folder is None:
            self._held[run, name] = data
            return
        try:
            self._home(run).mkdir(exist_ok=True, mode=0o700)
            write_atomically(self._home(run) / name, data, mode=0o600)
        except OSError as error:
            raise LocalError(f"{self._home(run) / name}: can't be written: {error.strerror}") from None

    def load(self, run: str, session: bytes, step: int) -> dict[str, I64]:
        """Raises `PolicyRefusal` if it is not here."""
        name = _file(session, step)
        try:
            data = self._held[run, name] if self._folder is None else (self._home(run) / name).read_bytes()
            _require_known(data, name)
            return {key: np.asarray(value, dtype=np.int64) for key, value in load_tensors(data).items()}
        except (KeyError, OSError):
            raise PolicyRefusal(
                f"this dealer holds no masks of run {run} after {step} steps of session {session.hex()}"
            ) from None
        except SafetensorError as error:
            raise RemoteError(f"the masks of run {run} after {step} steps are damaged: {error}") from None

    def forget_before(self, run: str, session: bytes, step: int) -> None:
        """This checkpoint is what the run would go on from: the others are not needed."""
        kept = _file(session, step)
        if self._folder is None:
            for key in [key for key in self._held if key[0] == run and key[1] != kept]:
                if key[1][:32] != kept[:32] or key[1] < kept:
                    del self._held[key]
            return
        for path in self._home(run).glob("*.safetensors"):
            if path.name[:32] != kept[:32] or path.name < kept:
                path.unlink(missing_ok=True)

    def _home(self, run: str) -> Path:
        if self._folder is None or _RUN.match(run) is None:
            raise LocalError(f"MaskStore: {run!r} is no run id")
        return self._folder / run


def _require_known(data: bytes, name: str) -> None:
    """Raises `ConfigError` if a newer sordino has written the file. (The metadata: safetensors' header, section 1.)"""
    length = int.from_bytes(data[:8], "little")
    try:
        about = json.loads(data[8 : 8 + length]).get("__metadata__", {})
    except ValueError:
        return  # damaged: reading the tensors says how
    form = str(about.get("form", FORM))
    if form != FORM:
        raise ConfigError(
            f"{name}: masks of form {form[:20]}, this sordino knows form {FORM}. Upgrade sordino on the dealer's host"
        )


def _file(session: bytes, step: int) -> str:
    return f"{session.hex()}-{step:012d}.safetensors"
