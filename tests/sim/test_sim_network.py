"""Laws of the simulated network. Statistical tests have a fixed seed; the chance that they would fail for a right
model under another seed is stated at each."""

import math

import pytest

from sordino_common.errors import ConfigError
from sordino_sim.network import BROKER, LinkSpec, Partition, SimulatedNetwork, wire_bytes

MANY = 20_000


def network(spec: LinkSpec, **options: object) -> SimulatedNetwork:
    return SimulatedNetwork(seed=5, default=spec, **options)  # type: ignore[arg-type]


def delays(model: SimulatedNetwork, count: int = MANY, nbytes: int = 100, gap_s: float = 100.0) -> list[float]:
    """Delays of packets so far apart that none waits for another."""
    return [
        arrival - index * gap_s
        for index in range(count)
        for arrival in model.deliveries("a", BROKER, nbytes, index * gap_s)
    ]


def test_without_figures_a_packet_arrives_at_once() -> None:
    assert network(LinkSpec()).deliveries("a", BROKER, 10**6, 3.0) == [3.0]


def test_mean_delay_is_latency_plus_jitter() -> None:
    found = delays(network(LinkSpec(latency_s=0.01, jitter_s=0.004)))
    assert min(found) >= 0.01 - 1e-9
    # Exponential: standard error is jitter / sqrt(n); 5 of them: false alarm below 1e-6.
    assert abs(sum(found) / MANY - 0.014) < 5 * 0.004 / math.sqrt(MANY)


def test_bandwidth_is_serialisation_delay_and_packets_queue() -> None:
    model = network(LinkSpec(up_bps=1e6, down_bps=4e6))
    one_s = 8 * wire_bytes(1000) / 1e6
    assert model.deliveries("a", BROKER, 1000, 0.0) == [pytest.approx(one_s)]
    assert model.deliveries("a", BROKER, 1000, 0.0) == [pytest.approx(2 * one_s)], "waits until the link is free"
    assert model.deliveries("a", BROKER, 1000, 9.0) == [pytest.approx(9.0 + one_s)], "an idle link has no queue"
    assert model.deliveries(BROKER, "a", 1000, 0.0) == [pytest.approx(one_s / 4)], "down is another direction"
    assert model.deliveries("b", BROKER, 1000, 0.0) == [pytest.approx(one_s)], "and b another link"


def test_a_large_payload_pays_for_every_frame() -> None:
    assert wire_bytes(0) == wire_bytes(1) - 1 == 90
    assert wire_bytes(1448 * 10) == 1448 * 10 + 900


def test_loss_is_a_retransmission_delay_over_tcp() -> None:
    loss = 0.1
    model = network(LinkSpec(loss=loss))
    found = delays(model)
    assert len(found) == MANY and model.lost == 0
    late = sum(delay > 1e-9 for delay in found)
    # Binomial: 5 standard deviations, false alarm below 1e-6.
    assert abs(late - MANY * loss) < 5 * math.sqrt(MANY * loss * (1 - loss))
    assert min(delay for delay in found if delay > 1e-9) == pytest.approx(0.2), "one RTO at least"


def test_lossy_drops() -> None:
    loss = 0.1
    model = network(LinkSpec(loss=loss), lossy=True)
    found = delays(model)
    assert len(found) + model.lost == MANY
    assert abs(model.lost - MANY * loss) < 5 * math.sqrt(MANY * loss * (1 - loss))  # false alarm below 1e-6


def test_duplication_rate() -> None:
    model = network(LinkSpec(latency_s=0.01, duplicate=0.05))
    found = delays(model)
    assert len(found) == MANY + model.duplicated
    assert abs(model.duplicated - MANY * 0.05) < 5 * math.sqrt(MANY * 0.05 * 0.95)  # false alarm below 1e-6


def test_jitter_keeps_the_order_and_reorder_breaks_it() -> None:
    def arrivals(spec: LinkSpec) -> list[float]:
        model = network(spec)
        return [model.deliveries("a", BROKER, 10, index * 1e-3)[0] for index in range(2000)]

    kept = arrivals(LinkSpec(latency_s=0.01, jitter_s=0.02))
    assert kept == sorted(kept)
    mixed = arrivals(LinkSpec(latency_s=0.01, reorder=0.2, reorder_s=0.05))
    assert mixed != sorted(mixed)
    assert max(late - (index * 1e-3 + 0.01) for index, late in enumerate(mixed)) <= 0.05 + 1e-9


def test_a_partition_holds_packets_until_it_ends_and_drops_them_if_lossy() -> None:
    cut = (Partition(start_s=10.0, end_s=20.0, names=frozenset({"a"})), Partition(start_s=20.0, end_s=25.0))
    model = network(LinkSpec(latency_s=0.5), partitions=cut)
    assert model.deliveries("a", BROKER, 1, 9.0) == [9.5]
    assert model.deliveries("a", BROKER, 1, 12.0) == [25.5], "the second partition follows at once and cuts everybody"
    assert model.deliveries(BROKER, "b", 1, 12.0) == [12.5]
    assert model.deliveries(BROKER, "b", 1, 24.0) == [25.5]
    assert network(LinkSpec(), partitions=cut, lossy=True).deliveries(BROKER, "a", 1, 12.0) == []


def test_draws_depend_on_the_link_and_its_packets_only() -> None:
    spec = LinkSpec(latency_s=0.01, jitter_s=0.01, duplicate=0.3, loss=0.2)
    alone = network(spec)
    only_a = [alone.deliveries("a", BROKER, 50, float(index)) for index in range(200)]
    crowded = network(spec)
    with_others = []
    for index in range(200):
        for other in ("b", "c", "d"):
            crowded.deliveries(other, BROKER, 50, float(index))
            crowded.deliveries(BROKER, other, 50, float(index))
        with_others.append(crowded.deliveries("a", BROKER, 50, float(index)))
        crowded.deliveries(BROKER, "a", 50, float(index))
    assert with_others == only_a


def test_another_seed_gives_another_network_and_one_seed_always_the_same() -> None:
    def first(seed: int) -> list[float]:
        return SimulatedNetwork(seed=seed, default=LinkSpec(jitter_s=1.0)).deliveries("a", BROKER, 1, 0.0)

    assert first(1) == first(1) != first(2)
    # Golden: the same in every process; on another machine up to the last bit of its log().
    assert first(1) == pytest.approx([0.8744058768319907], rel=1e-15)


@pytest.mark.parametrize("wrong", [{"loss": 1.0}, {"jitter_s": -1.0}, {"latency_s": math.nan}, {"up_bps": math.inf}])
def test_figures_that_make_no_sense_are_refused_by_name(wrong: dict[str, float]) -> None:
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        LinkSpec(**wrong)


def test_a_partition_that_ends_before_it_begins_is_refused() -> None:
    with pytest.raises(ConfigError, match="start < end"):
        Partition(start_s=3.0, end_s=3.0)
