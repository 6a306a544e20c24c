"""Writes channel_packets.json anew. Run it only when the wire format changes on purpose, and read the difference.

All keys, boots, times and ephemerals are fixed, so everything comes out the same each time, but for the sealed box,
whose encapsulated key the library draws: the box that is in the file stays there.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cbor2

from helpers_channel import (
    FLEET,
    KEYS,
    OPERATOR,
    STRANGER_OPERATOR,
    WALL_S,
    altered,
    entry,
    only_reply,
    replies,
    roster,
    seeded,
    session,
    signed,
    table,
)
from sordino_common.channel.packets import read_packet
from sordino_common.channel.presence import make_birth, make_death
from sordino_common.channel.roster import sign_roster
from sordino_common.channel.sealed_box import seal_box

TARGET = Path(__file__).parent / "channel_packets.json"
ORDER = 2**252 + 27742317777372353535851937790883648493


def malleated(packet: bytes) -> bytes:
    *front, signature = cbor2.loads(packet)
    s = int.from_bytes(signature[32:], "little") + ORDER
    return cbor2.dumps([*front, signature[:32] + s.to_bytes(32, "little")], canonical=True)


def flipped(packet: bytes, at: int) -> bytes:
    bad = bytearray(packet)
    bad[at] ^= 1
    return bytes(bad)


def resigned(body: bytes) -> bytes:
    return cbor2.dumps([body, OPERATOR.sign("roster", body)], canonical=True)


def main() -> None:
    alto, bass = table("alto"), table("bass")
    hello = alto.initiate("bass", now_s=0)
    accept = only_reply(bass.receive(hello, now_s=0))
    (confirm,) = replies(alto.receive(accept, now_s=0))
    bass.receive(confirm, now_s=0)
    near, there = session(alto, "bass"), session(bass, "alto")
    from_alto, from_bass = near.seal(b"from alto"), there.seal(b"from bass")
    reject = only_reply(table("bass", first=signed(2)).receive(hello, now_s=0))
    fields = {"fleet": FLEET, "name": "alto", "boot": 1, "connection": 2}
    birth = make_birth(KEYS["alto"], version="0.1.0", epoch=1, **fields)  # type: ignore[arg-type]
    death = make_death(KEYS["alto"], **fields)  # type: ignore[arg-type]
    body, signature = cbor2.loads(signed())
    rows = cbor2.loads(body)
    backwards = cbor2.dumps([*rows[:6], rows[6][::-1]], canonical=True)
    two_servers = cbor2.loads(body)
    two_servers[6][0][3] = ["server"]
    low_order = altered(hello, "alto", ephemeral=bytes(32))
    box = seal_box(
        b"a seed",
        identity=KEYS["alto"],
        sender=entry("alto"),
        receiver=entry("bass"),
        session=b"run 1",
        round=3,
        kind="seed",
    ).hex()
    if TARGET.exists():
        box = json.loads(TARGET.read_text("utf-8"))["box"]["good"]

    def bad(data: bytes, error: str, text: str) -> dict[str, str]:
        return {"data": data.hex(), "error": error, "text": text}

    vectors = {
        "keys": {
            name: {
                "sign_seed": seeded(f"sign {name}").hex(),
                "box_seed": seeded(f"box {name}").hex(),
                "sign_key": KEYS[name].public.sign_key.hex(),
                "box_key": KEYS[name].public.box_key.hex(),
                "fingerprint": KEYS[name].fingerprint,
            }
            for name in ("alto", "bass", "hub")
        },
        "operator": {"seed": seeded("operator").hex(), "key": OPERATOR.public.hex()},
        "roster": {
            "good": signed().hex(),
            "digest": roster().digest.hex(),
            "bad_signature": bad(flipped(signed(), -1), "signature", "roster: "),
            "bad_operator": bad(sign_roster(roster(), STRANGER_OPERATOR), "signature", "does not verify"),
            "bad_malleable": bad(malleated(signed()), "signature", "malleable"),
            "bad_fleet": bad(signed(fleet="other"), "roster", "this is fleet ward"),
            "bad_expired": bad(signed(issued_s=1, expires_s=WALL_S), "roster", "has expired already"),
            "bad_order": bad(resigned(backwards), "roster", "canonical order"),
            "bad_two_servers": bad(resigned(cbor2.dumps(two_servers, canonical=True)), "roster", "exactly one entry"),
            "bad_trailing": bad(signed() + b"\0", "codec", "1 bytes after the end"),
            "bad_body_trailing": bad(resigned(body + b"\0"), "codec", "1 bytes after the end"),
            "bad_no_signature": bad(cbor2.dumps([body], canonical=True), "codec", "expected"),
        },
        "hello": {
            "good": hello.hex(),
            "bad_signature": bad(flipped(hello, -1), "signature", "hello: "),
            "bad_signer": bad(altered(hello, "cello"), "signature", "does not verify"),
            "bad_malleable": bad(malleated(hello), "signature", "malleable"),
            "bad_receiver": bad(altered(hello, "alto", receiver="cello"), "handshake", "is for cello"),
            "bad_fleet": bad(altered(hello, "alto", fleet="other"), "handshake", "for fleet other"),
            "bad_sender": bad(altered(hello, "stranger", sender="stranger"), "roster", "is not in epoch"),
            "bad_roster": bad(altered(hello, "alto", roster=bytes(32)), "roster", "another roster of epoch 1"),
            "bad_ephemeral": bad(low_order, "handshake", "small order"),
            "bad_trailing": bad(hello + b"\0", "codec", "1 bytes after the end"),
            "bad_kind": bad(hello.replace(b"ehello", b"ehullo", 1), "codec", "no kind of packet"),
        },
        "accept": {
            "good": accept.hex(),
            "session_id": near.id.hex(),
            "confirm": confirm.hex(),
            "bad_signature": bad(flipped(accept, -1), "signature", "accept: "),
            "bad_signer": bad(altered(accept, "cello"), "signature", "does not verify"),
            "bad_hello": bad(altered(accept, "bass", hello=bytes(32)), "handshake", "answers no Hello"),
            "bad_context": bad(altered(accept, "bass", context=b"job"), "handshake", "answers no Hello"),
            "bad_epoch": bad(altered(accept, "bass", epoch=2), "handshake", "accepts in epoch 2"),
            "bad_roster": bad(altered(accept, "bass", roster=bytes(32)), "roster", "another roster of epoch 1"),
            "bad_ephemeral": bad(altered(accept, "bass", ephemeral=b"\xff" * 32), "handshake", "not canonical"),
            "bad_reflected": bad(hello, "handshake", "is for bass, this is alto"),
        },
        "reject": {
            "good": reject.hex(),
            "bad_signer": bad(altered(reject, "cello"), "signature", "does not verify"),
            "bad_hello": bad(altered(reject, "bass", hello=bytes(32)), "handshake", "answers no Hello"),
            "bad_planted_roster": bad(
                altered(reject, "bass", signed_roster=sign_roster(roster(epoch=2), STRANGER_OPERATOR)),
                "signature",
                "roster: the signature does not verify",
            ),
        },
        "sealed": {
            "from_alto": from_alto.hex(),
            "from_bass": from_bass.hex(),
            "bad_tag": bad(flipped(from_alto, -1), "session", "forged or damaged"),
            "bad_session": bad(flipped(from_alto, 12), "session", "not one of ours"),
            "bad_counter": bad(_with_counter(from_alto, 2), "session", "forged or damaged"),
            "bad_reflected": bad(there.seal(b"from bass"), "session", "packet 1 is forged or damaged"),
            "bad_replay": bad(confirm, "session", "packet 0 is a replay"),
            "bad_long_counter": bad(from_alto[:25] + b"\x18\x01" + from_alto[26:], "codec", "shortest form"),
            "bad_truncated": bad(from_alto[:-1], "codec", "a ciphertext of 25 bytes, but 24 follow"),
        },
        "birth": {
            "good": birth.hex(),
            "bad_signer": bad(altered(birth, "bass"), "signature", "does not verify"),
            "bad_signature": bad(flipped(birth, -1), "signature", "birth: "),
            "bad_name": bad(altered(birth, "stranger", name="stranger"), "roster", "is not in epoch"),
            "bad_fleet": bad(altered(birth, "alto", fleet="other"), "roster", "is for fleet other"),
            "bad_kind": bad(birth.replace(b"ebirth", b"edeath", 1), "codec", "death: "),
        },
        "death": {
            "good": death.hex(),
            "bad_signer": bad(altered(death, "hub"), "signature", "does not verify"),
        },
        "box": {"good": box},
    }
    assert read_packet(from_alto)[1][1] == 1
    assert signature == cbor2.loads(signed())[1]
    TARGET.write_text(json.dumps(vectors, indent=1) + "\n", "utf-8")


def _with_counter(packet: bytes, counter: int) -> bytes:
    kind, session_id, _, ciphertext = cbor2.loads(packet)
    return cbor2.dumps([kind, session_id, counter, ciphertext], canonical=True)


if __name__ == "__main__":
    main()
