"""Writes messages.json anew. Run it only when the wire format changes on purpose, and read the difference."""

from __future__ import annotations

import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))

import cbor2

from helpers_messages import EXAMPLES
from sordino_common.messages import encode_message


def hexed(value: object) -> str:
    return cbor2.dumps(value, canonical=True).hex()


def bad(kind: str, error: str, **changes: object) -> dict[str, str]:
    _, fields = cbor2.loads(encode_message(EXAMPLES[kind]))
    return {"data": hexed([kind, {**fields, **changes}]), "error": error}


def main() -> None:
    train = encode_message(EXAMPLES["train"])
    data = cbor2.loads(encode_message(EXAMPLES["evaluate"]))[1]["data"]
    good = {kind: encode_message(example).hex() for kind, example in sorted(EXAMPLES.items())}
    refusals = {
        "bad_unknown_kind": {"data": hexed(["os.system", {}]), "error": "unknown kind 'os.system'"},
        "bad_not_a_pair": {"data": hexed(["describe"]), "error": r"expected \[kind, fields\]"},
        "bad_fields_not_a_map": {"data": hexed(["describe", []]), "error": r"expected \[kind, fields\]"},
        "bad_trailing_byte": {"data": train.hex() + "00", "error": "1 bytes after the end"},
        "bad_truncated": {"data": train[:-1].hex(), "error": "CBOR: "},
        "bad_cbor_tag": {"data": hexed(cbor2.CBORTag(1, ["describe", {}])), "error": "tag 1 at byte 0"},
        "bad_plan_id_short": bad("train", "length >= 32", plan_id=bytes(31)),
        "bad_plan_id_text": bad("train", "Expected `bytes`, got `str`", plan_id="00" * 32),
        "bad_tensor_id_base64": bad("tensor-get", "Expected `bytes`, got `str`", tensor_id="AAAAAAAAAAAAAAAAAAAAAA=="),
        "bad_whole_number_for_float": bad("tensor-put", "floats as floats", lease_s=60),
        "bad_nested_default_left_out": bad(
            "evaluate", "not its one encoding", data={k: v for k, v in data.items() if k != "target_scale"}
        ),
        "bad_run_with_slash": bad("train", "regex", run="../../etc/passwd"),
        "bad_run_with_newline": bad("train", "regex", run="boston\n"),
        "bad_negative_round": bad("train", ">= 0", round=-1),
        "bad_batch_of_zero": bad("train", ">= 1", batch_rows=0),
        "bad_steps_huge": bad("train", "<= ", steps=1 << 40),
        "bad_params_not_arrays": bad("train", "params", params=[b"raw"]),
        "bad_split": bad("train", "Invalid enum value 'both'", data={**cbor2.loads(train)[1]["data"], "split": "both"}),
        "bad_bool_for_int": bad("train", "Expected `int`, got `bool`", round=True),
        "bad_float_for_int": bad("train", "Expected `int`", round=1.5),
        "bad_lease_forever": bad("tensor-put", "<= 86400", lease_s=1e9),
        "bad_lease_zero": bad("tensor-put", "> 0", lease_s=0.0),
        "bad_tensor_id": bad("tensor-get", "length", tensor_id=bytes(17)),
        "bad_reason_too_long": bad("refused", "length <= 4000", reason="x" * 4001),
    }
    target = Path(__file__).parent / "messages.json"
    target.write_text(json.dumps({"good": good, "bad": refusals}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
