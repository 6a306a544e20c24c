"""What `sordino doctor` finds of the server's host: memory, clock, versions, torch and its GPU, ports."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from typing import Any, Final

from sordino_common.channel.roster import Roster
from sordino_common.diagnosis import machine
from sordino_common.diagnosis.finding import Finding, error, ok, warning
from sordino_common.transport.settings import LinkSettings

UNIT: Final = "sordino-server.service"
WEB_PORT: Final = 8642  # of `sordino web`
_BASE_BYTES: Final = 800 << 20  # Python with torch and a model of some megabytes


def host_findings(roster: Roster | None, *, now_s: float) -> Iterator[Finding]:
    link = LinkSettings()
    yield from machine.common_findings(
        roster,
        now_s=now_s,
        wanted_bytes=link.reassembly_bytes + link.encoded_bytes,
        setting="the link's buffers",
        base_bytes=_BASE_BYTES,
        unit=UNIT,
        remedy="use a host with more memory, or stop what else runs here",
    )
    yield from _torch()
    yield port_finding("127.0.0.1", WEB_PORT, "sordino web")


def _torch() -> Iterator[Finding]:
    try:
        import torch
    except ImportError as problem:
        yield error("torch", f"can't be imported: {problem}", "pip install 'sordino[server]'")
        return
    cuda = torch.cuda.is_available()
    names = [torch.cuda.get_device_name(k) for k in range(torch.cuda.device_count())] if cuda else []
    yield torch_finding(version=torch.__version__, built=torch.version.cuda, devices=names)


def torch_finding(*, version: str, built: Any, devices: list[str]) -> Finding:
    """`built`: the CUDA version that torch was built for, None for a build without it."""
    if devices:
        return ok("torch", f"{version}, CUDA {built}: {', '.join(devices)}")
    if built is not None:
        text = f"{version} is built for CUDA {built}, but no GPU can be used: it computes on the processor"
        return warning("torch", text, "nvidia-smi; is the driver as new as CUDA wants it?")
    return ok("torch", f"{version}, on the processor")


def port_finding(host: str, port: int, who: str) -> Finding:
    """Whether `who` could listen there."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as problem:
            text = f"{host}:{port}, the default of {who}, is taken: {problem.strerror}"
            return warning("port", text, f"is it running already? else: {who} --port N")
    return ok("port", f"{host}:{port} is free for {who}")
