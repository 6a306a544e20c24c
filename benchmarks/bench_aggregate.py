"""Secure sums: what leader, helper and contributor take for 1,000,000 parameters of 100 devices, beside a plain sum.

Everything is in Z_2^32 unless --bits says otherwise. Throughput counts the words that are summed: contributors times
parameters times word size. `encoded`: from the messages' bytes, as they come off the wire.
"""

from __future__ import annotations

import argparse
import tracemalloc

import numpy as np
from timing import best_seconds

from sordino_common.aggregate.contributor import mask
from sordino_common.aggregate.leader import LeaderSum
from sordino_common.aggregate.masks import dtype_of
from sordino_common.aggregate.seeds import BOX_KIND, seed_plaintext
from sordino_common.aggregate.shares import share_of
from sordino_common.channel.identity import DeviceKey
from sordino_common.channel.roster import RosterEntry
from sordino_common.channel.sealed_box import seal_box
from sordino_common.messages import (
    Contribution,
    SumCut,
    SumNoise,
    SumSeedsChecked,
    SumTerms,
    decode_message,
    encode_message,
)
from sordino_common.plan.arrays import from_numpy, to_numpy
from sordino_common.privacy.discrete_gaussian import discrete_gaussian
from sordino_common.ring.seed import Seed

DISTINCT = 25  # vectors; used by turns, they are beyond every cache together


def terms_of(*, bits: int, length: int, count: int, helpers: int, noise: SumNoise | None = None) -> SumTerms:
    return SumTerms(
        session=bytes(16),
        run="bench",
        index=1,
        purpose="a benchmark",
        bits=32 if bits == 32 else 64,
        length=length,
        bound=1 << 20,
        helpers=tuple(f"helper-{k}" for k in range(helpers)),
        minimum=2,
        most=count,
        noise=noise,
    )


def boxes_of(terms: SumTerms) -> tuple[bytes, ...]:
    """Real ones, to count their bytes."""
    keys = [DeviceKey.generate() for _ in range(len(terms.helpers) + 1)]
    entries = [
        RosterEntry(name=name, sign_key=key.public.sign_key, box_key=key.public.box_key, roles=("data",))
        for name, key in zip(("agent-00", *terms.helpers), keys, strict=True)
    ]
    plaintext = seed_plaintext(bytes(32), terms)
    return tuple(
        seal_box(
            plaintext,
            identity=keys[0],
            sender=entries[0],
            receiver=receiver,
            session=terms.session,
            round=terms.index,
            kind=BOX_KIND,
        )
        for receiver in entries[1:]
    )


def lead(terms: SumTerms, messages: list[Contribution], names: list[str]) -> LeaderSum:
    leader = LeaderSum(terms, asked=names)
    for k, name in enumerate(names):
        leader.contribute(name, messages[k % len(messages)])
        for helper in terms.helpers:
            leader.checked(helper, SumSeedsChecked(session=terms.session, accepted=(name,), rejected=()))
    return leader


def lead_encoded(terms: SumTerms, encoded: list[bytes], names: list[str]) -> None:
    leader = LeaderSum(terms, asked=names)
    for k, name in enumerate(names):
        message = decode_message(encoded[k % len(encoded)])
        assert isinstance(message, Contribution)
        leader.contribute(name, message)
        for helper in terms.helpers:
            leader.checked(helper, SumSeedsChecked(session=terms.session, accepted=(name,), rejected=()))


def peak_bytes(work: object) -> int:
    tracemalloc.start()
    work()  # type: ignore[operator]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--parameters", type=int, default=1_000_000)
    parser.add_argument("--contributors", type=int, default=100)
    parser.add_argument("--helpers", type=int, default=2)
    parser.add_argument("--bits", type=int, default=32, choices=(32, 64))
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    count, length = arguments.contributors, arguments.parameters
    terms = terms_of(bits=arguments.bits, length=length, count=count, helpers=arguments.helpers)
    rng = np.random.default_rng(0)
    dtype = dtype_of(terms)
    arrays = [rng.integers(0, 1 << 32, length, dtype=np.uint64).astype(dtype) for _ in range(min(DISTINCT, count))]
    names = [f"agent-{k:05d}" for k in range(count)]
    boxes = boxes_of(terms)
    messages = [
        Contribution(session=terms.session, masked=from_numpy(array), boxes=boxes, seconds=0.5) for array in arrays
    ]
    encoded = [encode_message(message) for message in messages]
    seeds = [Seed(rng.bytes(32)) for _ in names]
    x = rng.integers(-(1 << 20), 1 << 20, length)

    def plain() -> None:
        total = np.zeros(length, dtype=dtype)
        for k in range(count):
            total += arrays[k % len(arrays)]

    def share(terms: SumTerms = terms) -> None:
        share_of(terms, helper="helper-0", members=names, seeds=seeds, draw=discrete_gaussian)

    noisy = terms_of(
        bits=64, length=length, count=count, helpers=arguments.helpers, noise=SumNoise(sigma_squared=1 << 32)
    )
    seconds = best_seconds(
        {
            "plain": plain,
            "leader": lambda: lead(terms, messages, names),
            "leader, encoded": lambda: lead_encoded(terms, encoded, names),
            "helper": share,
            "contributor": lambda: mask(x, terms, contributor="agent-00000"),
            "noise": lambda: discrete_gaussian(1 << 32, length),
        },
        rounds=arguments.rounds,
    )
    words = count * length * terms.word_bytes
    print(
        f"{length:,} parameters of {count} contributors in Z_2^{terms.bits}, {arguments.helpers} helpers; "
        f"{words / 1e6:,.0f} MB of words. {len(arrays)} distinct vectors, by turns"
    )
    print(f"{'':24}{'GB/s':>8}{'x plain':>9}")
    for name in ("plain", "leader", "leader, encoded", "helper"):
        print(f"{name:24}{words / seconds[name] / 1e9:8.2f}{seconds[name] / seconds['plain']:9.2f}")
    mine = length * terms.word_bytes * len(terms.helpers)
    print(f"{'contributor, per mask':24}{mine / seconds['contributor'] / 1e9:8.2f}")
    print(f"{'noise, once':24}{'':8}{seconds['noise'] / seconds['plain']:9.2f}    {length:,} values of N_Z(0, 2^32)")
    sizes = {len(data) for data in encoded}
    most = max(sizes)
    cut = len(encode_message(SumCut(session=terms.session, members=tuple(names))))
    print(
        f"bytes per contributor and parameter: {most / length:.4f} ({most:,} bytes: "
        f"{most - length * terms.word_bytes:,} besides the words, of that {sum(map(len, boxes))} in {len(boxes)} boxes)"
    )
    print(f"bytes to a helper: {len(boxes[0])} a contributor, and a cut of {cut:,}")
    few = min(10, count)
    print("peak of memory, MB       helper   leader")
    for n in (few, count):
        part = names[:n]
        helper = peak_bytes(
            lambda n=n, part=part: share_of(
                terms, helper="helper-0", members=part, seeds=seeds[:n], draw=discrete_gaussian
            )
        )
        leader = peak_bytes(lambda part=part: lead(terms, messages, part))
        print(f"{n:6} contributors   {helper / 1e6:9.2f}{leader / 1e6:9.2f}")
    with_noise = peak_bytes(lambda: share(noisy))
    print(f"the same with noise, in Z_2^64: {with_noise / 1e6:.2f} MB; an accumulator is {8 * length / 1e6:.2f}")
    check = lead(terms, messages, names)
    expected = sum(int(arrays[k % len(arrays)][0]) for k in range(count)) % (1 << terms.bits)
    assert int(check._sum[0]) == expected
    assert to_numpy(messages[0].masked).dtype == dtype


if __name__ == "__main__":
    main()
