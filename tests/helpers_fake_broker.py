"""A broker that misbehaves on order: just enough MQTT v5, on the reactor of the test, to answer or not to answer."""

from __future__ import annotations

import socket
from collections.abc import Callable
from dataclasses import dataclass, field

from sordino_common.transport.reactor import READ, Reactor

CONNECT, CONNACK, PUBLISH, PUBACK, SUBSCRIBE, SUBACK, PINGREQ, PINGRESP, DISCONNECT = 1, 2, 3, 4, 8, 9, 12, 13, 14


def packet(kind: int, body: bytes, flags: int = 0) -> bytes:
    """One control packet: kind and flags, length as a variable byte integer, body."""
    length, left = b"", len(body)
    while True:
        left, digit = left >> 7, left & 0x7F
        length += bytes([digit | (0x80 if left else 0)])
        if not left:
            return bytes([kind << 4 | flags]) + length + body


def connack(code: int = 0, *, receive_maximum: int | None = None, maximum_packet: int | None = None) -> bytes:
    properties = b""
    if receive_maximum is not None:
        properties += b"\x21" + receive_maximum.to_bytes(2, "big")
    if maximum_packet is not None:
        properties += b"\x27" + maximum_packet.to_bytes(4, "big")
    return packet(CONNACK, bytes([0, code, len(properties)]) + properties)


def publish(topic: bytes, payload: bytes, *, mid: int = 1) -> bytes:
    return packet(PUBLISH, len(topic).to_bytes(2, "big") + topic + mid.to_bytes(2, "big") + b"\0" + payload, flags=2)


def puback(body: bytes, code: int = 0) -> bytes:
    """The answer to the body of a PUBLISH of quality of service 1."""
    at = 2 + int.from_bytes(body[:2], "big")
    return packet(PUBACK, body[at : at + 2] + (bytes([code, 0]) if code else b""))


@dataclass
class FakeBroker:
    """Answers each packet by what `answers[kind](body)` gives; kinds without an entry are met with silence."""

    reactor: Reactor
    answers: dict[int, Callable[[bytes], bytes]] = field(default_factory=dict)
    received: list[tuple[int, bytes]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._listener.setblocking(False)
        self.port = int(self._listener.getsockname()[1])
        self._clients: dict[socket.socket, bytearray] = {}
        self.accepted = 0
        self.reactor.register(self._listener, READ, self._accept)
        self.answers.setdefault(CONNECT, lambda body: connack())
        self.answers.setdefault(SUBSCRIBE, lambda body: packet(SUBACK, body[:2] + b"\0\1"))

    def kinds(self, kind: int) -> list[bytes]:
        return [body for found, body in self.received if found == kind]

    def say(self, data: bytes) -> None:
        """To everybody who is connected."""
        for client in tuple(self._clients):
            client.sendall(data)

    def hang_up(self) -> None:
        """End every connection."""
        for client in tuple(self._clients):
            self._end(client)

    def close(self) -> None:
        self.hang_up()
        self.reactor.unregister(self._listener)
        self._listener.close()

    def _accept(self, _ready: int) -> None:
        client, _ = self._listener.accept()
        self.accepted += 1
        self._clients[client] = bytearray()
        self.reactor.register(client, READ, lambda _ready: self._read(client))

    def _read(self, client: socket.socket) -> None:
        try:
            data = client.recv(1 << 20)
        except OSError:
            data = b""
        if not data:
            self._end(client)
            return
        buffer = self._clients[client]
        buffer += data
        while (found := _split(buffer)) is not None and client in self._clients:
            self.received.append(found)
            answer = self.answers.get(found[0])
            if answer is not None:
                try:
                    client.sendall(answer(found[1]))
                except OSError:
                    self._end(client)

    def _end(self, client: socket.socket) -> None:
        if self._clients.pop(client, None) is not None:
            self.reactor.unregister(client)
            client.close()


def _split(buffer: bytearray) -> tuple[int, bytes] | None:
    """Take the first whole packet off `buffer`: its kind and body."""
    length = 0
    for at in range(1, min(5, len(buffer))):
        length |= (buffer[at] & 0x7F) << 7 * (at - 1)
        if not buffer[at] & 0x80:
            end = at + 1 + length
            if len(buffer) < end:
                return None
            kind, body = buffer[0] >> 4, bytes(buffer[at + 1 : end])
            del buffer[:end]
            return kind, body
    return None
