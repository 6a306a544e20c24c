"""fleet.yaml, pointed at the fleet's own broker: rewritten only if nobody has edited it."""

from __future__ import annotations

import msgspec

from sordino_common.channel.files import write_atomically
from sordino_common.errors import ConfigError
from sordino_server.home import Home, TlsSpec, fleet_yaml


def point_at_broker(home: Home, *, host: str, port: int, identity: str) -> str:
    """Have fleet.yaml name the broker with TLS. Returns the lines that are to be put there by hand, or "" if done."""
    path = home.folder / "fleet.yaml"
    old = home.spec
    tls = TlsSpec(ca="ca/ca.pem", certificate=identity)
    new = msgspec.structs.replace(old, broker=msgspec.structs.replace(old.broker, host=host, port=port, tls=tls))
    text = fleet_yaml(new)
    if new == old:
        return ""
    if path.read_text("utf-8") != fleet_yaml(old):
        return text[text.index("broker:") :].rstrip("\n")
    try:
        write_atomically(path, text.encode())
    except OSError as error:
        raise ConfigError(f"{path}: can't be written: {error.strerror}") from None
    home.spec = new
    return ""
