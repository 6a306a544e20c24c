"""`sordino train` as a process of its own, for the tests of whole fleets. Every wait has a deadline."""

from __future__ import annotations

import json
import queue
import re
import subprocess
import sys
import threading
import time
from typing import Any

from sordino_sim.fleet_dir import FleetFolder

PATIENCE_S = 150.0  # ten interpreters start on two cores that others may use as well


class Training:
    """`sordino train` as a process; its stderr line by line, with deadlines."""

    def __init__(self, folder: FleetFolder, *arguments: str) -> None:
        command = [sys.executable, "-m", "sordino_server.cli", "train", *arguments, "--fleet", str(folder.folder)]
        self._process = subprocess.Popen(
            [*command, "--json", "--no-baseline"],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        self.log: list[str] = []

    def _read(self) -> None:
        assert self._process.stderr is not None
        for line in self._process.stderr:
            self._lines.put(line.rstrip("\n"))
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line on stderr, from here on, in which `pattern` is found."""
        deadline_s = time.monotonic() + PATIENCE_S
        while True:
            try:
                line = self._lines.get(timeout=max(0.0, deadline_s - time.monotonic()))
            except queue.Empty:
                raise AssertionError(f"no line with {pattern!r} in {PATIENCE_S:g} s:\n" + self.text) from None
            if line is None:
                raise AssertionError(f"ended without a line with {pattern!r}:\n" + self.text)
            self.log.append(line)
            match = re.search(pattern, line)
            if match:
                return match

    def kill(self) -> None:
        self._process.kill()
        self._process.wait(PATIENCE_S)

    def end(self) -> tuple[int, str]:
        """(exit code, stdout)."""
        assert self._process.stdout is not None
        code = self._process.wait(PATIENCE_S)
        self._reader.join(PATIENCE_S)
        while (line := self._lines.get(timeout=PATIENCE_S)) is not None:
            self.log.append(line)
        return code, self._process.stdout.read()

    def finish(self) -> dict[str, Any]:
        """The summary of a run that went well."""
        code, out = self.end()
        assert code == 0, self.text
        summary: dict[str, Any] = json.loads(out)
        return summary

    @property
    def text(self) -> str:
        return "\n".join(self.log)

    def close(self) -> None:
        if self._process.poll() is None:
            self.kill()
        self._reader.join(PATIENCE_S)
        for stream in (self._process.stdout, self._process.stderr):
            if stream is not None:
                stream.close()
