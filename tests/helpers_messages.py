"""One well-formed example of every message, and a Hypothesis-free mutator for fuzzing encoded bytes."""

from __future__ import annotations

import random
import struct

from sordino_common import messages as m

F32 = m.Array("float32", (2, 3), struct.pack("<6f", 1, 2, 3, 4, 5, 6.5))
F64 = m.Array("float64", (2,), struct.pack("<2d", 0.5, -2))
EMPTY = m.Array("int64", (0, 4), b"")
PLAN_ID = bytes(range(32))
TENSOR_ID = bytes(range(16))
SESSION = bytes(range(100, 116))
I64 = m.Array("int64", (2,), struct.pack("<2q", -1, 1 << 62))

DATA = m.DataRef(
    dataset="boston",
    features=("CRIM", "ZN"),
    target="MEDV",
    split="train",
    offset=(0.5, 0.25),
    scale=(2.0, 4.0),
    target_offset=22.5,
    target_scale=9.0,
)

TERMS = m.SumTerms(
    session=TENSOR_ID,
    run="boston-1",
    index=12,
    purpose="update of round 3",
    bits=32,
    length=3,
    bound=1 << 22,
    helpers=("helper-0", "helper-1"),
    minimum=5,
    most=100,
    noise=m.SumNoise(sigma_squared=1 << 40),
)
U32 = m.Array("uint32", (3,), struct.pack("<3I", 1, 2, (1 << 32) - 1))

RECORD = m.RecordTerms(
    clip_norm=1.0, grid_bits=16, sampling_threshold=1 << 28, sigma_squared=1 << 34, apply_plan=PLAN_ID
)
EXAMPLES: dict[str, m.Message] = {
    "describe": m.Describe(),
    "described": m.Described(
        version="0.1.0",
        executor="numpy",
        memory_bytes=1 << 28,
        store_bytes=1 << 26,
        payload_bytes=1 << 26,
        plan_seconds=60.0,
        datasets=(
            m.DatasetInfo(
                name="boston",
                tags=("housing",),
                train_rows=40,
                test_rows=10,
                columns=(
                    m.ColumnInfo(name="CRIM", dtype="float64", shape=()),
                    m.ColumnInfo(name="image", dtype="uint8", shape=(28, 28)),
                ),
            ),
        ),
    ),
    "health": m.Health(),
    "health-report": m.HealthReport(
        wall_s=1_700_000_000.5,
        uptime_s=12.5,
        resident_bytes=40_000_000,
        store_used_bytes=0,
        store_tensors=0,
        plans=2,
        tasks_done=7,
        tasks_failed=1,
        refusals=3,
        running=("train",),
    ),
    "plan-put": m.PlanPut(plan=b"\x80"),
    "plan-ready": m.PlanReady(plan_id=PLAN_ID, peak_bytes=4096, flops=123_456),
    "refused": m.Refused(command="train", code="policy", reason="dataset `wages` is not offered"),
    "moments": m.Moments(dataset="boston", columns=("CRIM", "ZN")),
    "moments-result": m.MomentsResult(rows=40, sums=F64, squares=F64),
    "train": m.Train(
        run="boston-1",
        round=3,
        attempt=0,
        plan_id=PLAN_ID,
        data=DATA,
        params=(F32, EMPTY),
        batch_rows=32,
        steps=0,
        epochs=1.5,
        seed=7,
        privacy=RECORD,
    ),
    "trained": m.Trained(
        run="boston-1", round=3, attempt=0, rows=40, steps=2, update=(F32, EMPTY), loss_sum=1.25, seconds=0.5
    ),
    "evaluate": m.Evaluate(run="boston-1", round=3, plan_id=PLAN_ID, data=DATA, params=(F32,), batch_rows=64),
    "evaluated": m.Evaluated(run="boston-1", round=3, rows=10, names=("loss",), sums=(2.5,), seconds=0.25),
    "cancel": m.Cancel(run="boston-1", round=None),
    "contribution": m.Contribution(session=TENSOR_ID, masked=U32, boxes=(b"one", b"two"), seconds=0.5),
    "sum-seeds": m.SumSeeds(terms=TERMS, seeds=(m.SealedSeed(name="agent-00", box=b"one"),)),
    "sum-seeds-checked": m.SumSeedsChecked(
        session=TENSOR_ID, accepted=("agent-00",), rejected=(m.RejectedSeed(name="agent-01", reason="does not open"),)
    ),
    "sum-cut": m.SumCut(session=TENSOR_ID, members=("agent-00", "agent-02")),
    "sum-share": m.SumShare(session=TENSOR_ID, members=PLAN_ID, share=U32),
    "sum-update": m.SumUpdate(
        terms=TERMS,
        round=3,
        attempt=0,
        plan_id=PLAN_ID,
        data=DATA,
        params=(F32,),
        batch_rows=32,
        steps=0,
        epochs=1.5,
        seed=7,
        weight="one",
        weight_unit=40,
        fraction_bits=16,
        clip=m.SumClip(norm=1.0, grid_bits=16),
    ),
    "sum-gradient": m.SumGradient(
        terms=TERMS,
        round=3,
        attempt=0,
        plan_id=PLAN_ID,
        data=DATA,
        params=(F32,),
        batch_rows=32,
        clip_norm=1.0,
        grid_bits=16,
        sampling_threshold=1 << 28,
    ),
    "sum-metrics": m.SumMetrics(
        terms=TERMS, round=3, plan_id=PLAN_ID, data=DATA, params=(F32,), batch_rows=64, fraction_bits=20
    ),
    "sum-statistics": m.SumStatistics(
        terms=TERMS,
        round=1,
        dataset="boston",
        columns=(m.RangedColumn(name="RM", low=3.0, high=9.0), m.RangedColumn(name="MEDV", low=0.0, high=50.0)),
        queries=(
            m.RowQuery(kind="count", columns=(), bits=0, weight=9),
            m.RowQuery(kind="gram", columns=(0, 1), bits=10, row_norm=1.0, target_norm=0.5, bias=0.25),
        ),
    ),
    "tensor-put": m.TensorPut(tensor_id=TENSOR_ID, value=F32, lease_s=60.0),
    "tensor-run": m.TensorRun(
        plan_id=PLAN_ID,
        inputs=(TENSOR_ID,),
        outputs=(TENSOR_ID,),
        values=(F32,),
        drops=(TENSOR_ID,),
        lease_s=60.0,
    ),
    "tensor-load": m.TensorLoad(
        tensor_id=TENSOR_ID, dataset="boston", columns=("x",), split="train", dtype="float32", lease_s=60.0
    ),
    "tensor-renew": m.TensorRenew(tensor_ids=(TENSOR_ID,), lease_s=60.0),
    "tensor-stored": m.TensorStored(tensor_ids=(TENSOR_ID,), used_bytes=24, budget_bytes=1 << 20),
    "tensor-get": m.TensorGet(tensor_id=TENSOR_ID),
    "tensor-value": m.TensorValue(tensor_id=TENSOR_ID, value=F32),
    "tensor-drop": m.TensorDrop(tensor_ids=(TENSOR_ID,)),
    "tensor-dropped": m.TensorDropped(dropped=1),
    "spdz-open": m.SpdzOpen(
        run="boston-1",
        session=SESSION,
        plan_id=PLAN_ID,
        circuit=PLAN_ID,
        digest=PLAN_ID,
        settings=(m.SpdzNumber(name="fraction_bits", value=14.0), m.SpdzNumber(name="x", value=8.0)),
        parties=("agent-00", "agent-01"),
        dealer="server",
        security="active",
        first_step=20,
        steps=40,
        check_every=1,
        retries=8,
        rows=(m.SpdzRows(owner="agent-00", rows=40), m.SpdzRows(owner="agent-02", rows=7)),
        batch_rows=32,
        seed=7,
        order="shuffled",
        outputs=(
            m.SpdzOutput(name="loss", receiver="server"),
            m.SpdzOutput(name="model", receiver="agent-02", every=20),
            m.SpdzOutput(name="prediction", receiver="*owners"),
        ),
        data=DATA,
        state_from=None,
        resume=m.SpdzPoint(session=SESSION, step=20),
        checkpoints=(20, 40),
        ahead=16,
        report_every=4,
        silence_s=60.0,
    ),
    "spdz-ready": m.SpdzReady(session=SESSION, digest=PLAN_ID, correction_bytes=4096),
    "spdz-setup": m.SpdzSetup(session=SESSION, party_seed=PLAN_ID, mac_key=TENSOR_ID, owner_seed=None, state_seed=None),
    "spdz-correction": m.SpdzCorrection(session=SESSION, step=3, attempt=0, part=0, parts=2, data=b"\x01\x02"),
    "spdz-state": m.SpdzState(session=SESSION, terms=PLAN_ID, names=("w",), values=(I64,)),
    "spdz-input": m.SpdzInput(
        terms=PLAN_ID, attempt=0, batches=(m.SpdzValues(step=3, names=("x", "y"), values=(I64, EMPTY)),)
    ),
    "spdz-step": m.SpdzStep(
        session=SESSION,
        step=3,
        kept=(m.SpdzKept(name="i0", tensor_id=TENSOR_ID, origin=PLAN_ID),),
        given=(
            m.SpdzGiven(name="i1", owner="agent-00", tensor_id=SESSION),
            m.SpdzGiven(name="i2", owner="server", tensor_id=None),
        ),
        keep=(m.SpdzKeep(name="o0", tensor_id=SESSION),),
        opened=("o0", "o1"),
        moved=(m.SpdzMoved(name="o1", to="agent-00", tensor_id=PLAN_ID[:16], dtype="float32"),),
        drops=(TENSOR_ID,),
        lease_s=60.0,
    ),
    "spdz-taken": m.SpdzTaken(session=SESSION, step=3),
    "spdz-stored": m.SpdzStored(session=SESSION, step=3),
    "spdz-shares": m.SpdzShares(
        shares=(
            m.SpdzShare(kind="check-4", step=2, attempt=0, round=0, payload=bytes(48)),
            m.SpdzShare(kind="open", step=3, attempt=0, round=0, payload=bytes(16)),
        )
    ),
    "spdz-outputs": m.SpdzOutputs(outputs=(m.SpdzValues(step=3, names=("prediction",), values=(I64,)),)),
    "spdz-masks": m.SpdzMasks(session=SESSION, outputs=(m.SpdzValues(step=3, names=("prediction",), values=(I64,)),)),
    "spdz-confirm": m.SpdzConfirm(session=SESSION, step=4),
    "spdz-checked": m.SpdzChecked(
        session=SESSION, step=4, checkpoint=0, outputs=(m.SpdzValues(step=3, names=("loss",), values=(I64,)),)
    ),
    "spdz-retry": m.SpdzRetry(session=SESSION, step=3, attempt=0, where="gate 7, round 2"),
    "spdz-restart": m.SpdzRestart(session=SESSION, step=3, attempt=1),
    "spdz-abort": m.SpdzAbort(session=SESSION, code="mac-check", reason="the MAC check after step 3 failed"),
    "spdz-close": m.SpdzClose(session=SESSION),
    "spdz-closed": m.SpdzClosed(
        session=SESSION,
        counters=m.SpdzCounters(rounds=28, checks=4, opened_bytes=1 << 16, online_s=0.5),
        rows=7,
        names=("loss",),
        sums=(2.5,),
    ),
}


def mutate(data: bytes, rng: random.Random) -> bytes:
    """One to four edits: flip a bit, set, insert, delete or repeat bytes, splice a CBOR head, cut the end."""
    out = bytearray(data)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(out)) if out else 0
        match rng.randrange(7):
            case 0 if out:
                out[at] ^= 1 << rng.randrange(8)
            case 1 if out:
                out[at] = rng.choice((0x00, 0x1B, 0x3B, 0x5B, 0x7F, 0x9F, 0xBB, 0xC2, 0xD8, 0xF7, 0xFB, 0xFF))
            case 2:
                out[at:at] = rng.randbytes(rng.randint(1, 9))
            case 3 if out:
                del out[at : at + rng.randint(1, 9)]
            case 4 if out:
                out[at:at] = out[at : at + rng.randint(1, 40)]
            case 5:
                out[at:at] = bytes([rng.randrange(256)]) + rng.randbytes(8)
            case _:
                del out[at:]
    return bytes(out)
