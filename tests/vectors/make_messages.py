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
    share = cbor2.loads(encode_message(EXAMPLES["spdz-shares"]))[1]["shares"][1]
    terms = cbor2.loads(encode_message(EXAMPLES["sum-seeds"]))[1]["terms"]
    floats = cbor2.CBORTag(40, [[1], cbor2.CBORTag(85, bytes(4))])
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
        "bad_session_id": bad("spdz-close", "length", session=bytes(15)),
        "bad_committee_of_one": bad("spdz-open", "length >= 2", parties=["agent-00"]),
        "bad_committee_of_five": bad("spdz-open", "length <= 4", parties=[f"agent-{k}" for k in range(5)]),
        "bad_party_twice": bad("spdz-open", "a party is named twice", parties=["agent-00", "agent-00"]),
        "bad_owner_twice": bad("spdz-open", "an owner is named twice", rows=[{"owner": "a", "rows": 1}] * 2),
        "bad_owners_none": bad("spdz-open", "expected the owners of rows", rows=[]),
        "bad_stepwise_with_rows": bad("spdz-open", "schedules nothing", idle_s=60.0),
        "bad_step_with_an_input_twice": bad(
            "spdz-step", "named twice", given=[{"name": "i0", "owner": "agent-00", "tensor_id": bytes(16)}]
        ),
        "bad_step_with_an_output_twice": bad("spdz-step", "named twice", opened=["o0", "o0"]),
        "bad_step_that_moves_an_output_twice": bad(
            "spdz-step",
            "named twice",
            moved=[
                {"name": "o0", "to": to, "tensor_id": bytes([k] * 16), "dtype": "float32"}
                for k, to in enumerate(("agent-00", "agent-01"), start=20)
            ],
        ),
        "bad_step_that_moves_integers": bad(
            "spdz-step",
            "Invalid enum value",
            moved=[{"name": "o0", "to": "agent-00", "tensor_id": bytes(16), "dtype": "int64"}],
        ),
        "bad_step_with_an_id_twice": bad(
            "spdz-step", "named twice", keep=[{"name": name, "tensor_id": bytes(16)} for name in ("o0", "o1")]
        ),
        "bad_step_origin": bad(
            "spdz-step", "length >= 32", kept=[{"name": "i0", "tensor_id": bytes(16), "origin": b""}]
        ),
        "bad_no_rows": bad("spdz-open", ">= 1", rows=[{"owner": "a", "rows": 0}]),
        "bad_two_first_states": bad("spdz-open", "either state_from or resume", state_from="server"),
        "bad_first_step_behind_the_last": bad("spdz-open", "first_step 40 is not one of 40", first_step=40),
        "bad_security": bad("spdz-open", "Invalid enum value 'none'", security="none"),
        "bad_receiver": bad("spdz-open", "regex", outputs=[{"name": "loss", "receiver": "*everybody", "every": 0}]),
        "bad_party_seed_short": bad("spdz-setup", "length >= 32", party_seed=bytes(31)),
        "bad_mac_key_long": bad("spdz-setup", "length <= 16", mac_key=bytes(17)),
        "bad_correction_part": bad("spdz-correction", "part 2 of 2", part=2),
        "bad_input_of_floats": bad(
            "spdz-input", "'x' is float32, expected int64", batches=[{"step": 3, "names": ["x"], "values": [floats]}]
        ),
        "bad_values_without_names": bad("spdz-state", "0 names for 1 values", names=[]),
        "bad_share_kind": bad("spdz-shares", "Invalid enum value", shares=[{**share, "kind": "check-5"}]),
        "bad_too_many_shares": bad("spdz-shares", "length <= 16", shares=[share] * 17),
        "bad_helper_twice": bad("sum-update", "a helper is named twice", terms={**terms, "helpers": ["h", "h"]}),
        "bad_four_helpers": bad("sum-update", "length <= 3", terms={**terms, "helpers": ["a", "b", "c", "d"]}),
        "bad_word_of_16_bits": bad("sum-update", "Invalid enum value 16", terms={**terms, "bits": 16}),
        "bad_cohort_of_one": bad("sum-update", ">= 2", terms={**terms, "minimum": 1}),
        "bad_cohort_upside_down": bad("sum-update", "at least 5 and at most 4", terms={**terms, "most": 4}),
        "bad_no_variance": bad("sum-update", ">= 1", terms={**terms, "noise": {"sigma_squared": 0}}),
        "bad_clipped_and_weighted": bad("sum-update", "is not weighted by rows", weight="rows"),
        "bad_members_out_of_order": bad("sum-cut", "ascending order, each once", members=["b", "a"]),
        "bad_member_twice": bad("sum-cut", "ascending order, each once", members=["a", "a"]),
        "bad_seeds_of_nobody": bad("sum-seeds", "length >= 1", seeds=[]),
        "bad_box_too_large": bad("contribution", "length <= 512", boxes=[bytes(513)]),
        "bad_abort_reason_too_long": bad("spdz-abort", "length <= 4000", reason="x" * 4001),
        "bad_reason_too_long": bad("refused", "length <= 4000", reason="x" * 4001),
    }
    target = Path(__file__).parent / "messages.json"
    target.write_text(json.dumps({"good": good, "bad": refusals}, indent=1) + "\n", "utf-8")


if __name__ == "__main__":
    main()
