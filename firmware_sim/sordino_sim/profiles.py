"""What a device can do, in figures: how long a Plan takes there, what it may hold, how it is connected.

EVERY FIGURE HERE IS AN ESTIMATE, made to predict the order of a round's time, not to compare boards. What stands on
data sheets (cores, clock, memory, network interface) is exact. The effective speeds are derived from it as follows and
wait for measurements on the boards themselves:

- `gflops`: what one thread reaches in a small float32 matrix product through NumPy/OpenBLAS. Taken as about a quarter
  of the core's peak (clock x float32 operations per cycle: 4 for Cortex-A53 sustained, 8 for A72, 16 for A76, 32 for an
  AVX2 server core), because the matrices of these jobs are small.
- `node_s`: interpreter and NumPy's call overhead per node of a Plan. About 2.5 us was measured on a server core; the
  others are scaled by single-thread integer benchmarks in the public Geekbench 5 browser (server ~1300, Pi 5 ~600,
  Pi 4 ~230, Pi 3 ~120, Zero 2 W ~100).
- links: Pi 3's Ethernet is 100 Mbit/s; the Zero 2 W has 2.4 GHz Wi-Fi only, for which 20 Mbit/s and a few
  milliseconds of jitter are usual indoors; Pi 4 and 5 have gigabit Ethernet.
"""

from __future__ import annotations

from dataclasses import dataclass
from types import MappingProxyType
from typing import Final

from sordino_common.errors import ConfigError
from sordino_sim.network import LinkSpec

_MIB: Final = 1 << 20


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceProfile:
    """One kind of device: effective GFLOP/s, seconds per Plan node, seconds per task, memory in bytes, and its link."""

    name: str
    gflops: float
    node_s: float
    task_s: float
    memory_bytes: int
    link: LinkSpec

    def plan_seconds(self, *, flops: int, nodes: int, runs: int, slowdown: float = 1.0) -> float:
        """Time for one task that runs a Plan of `nodes` nodes and `flops` operations `runs` times.

        task + runs x (nodes x node_s + flops / gflops), times `slowdown` (a fault that makes the device slow)."""
        return slowdown * (self.task_s + runs * (nodes * self.node_s + flops / (self.gflops * 1e9)))


_LAN: Final = LinkSpec(latency_s=0.0005, jitter_s=0.0002, up_bps=900e6, down_bps=900e6)

_ALL: Final = (
    # 4 x Cortex-A53 at 1.0 GHz, 512 MB, Wi-Fi 802.11n at 2.4 GHz.
    DeviceProfile(
        name="pi-zero2",
        gflops=1.0,
        node_s=33e-6,
        task_s=0.030,
        memory_bytes=512 * _MIB,
        link=LinkSpec(latency_s=0.004, jitter_s=0.003, up_bps=20e6, down_bps=20e6, loss=0.002),
    ),
    # 4 x Cortex-A53 at 1.2 GHz, 1 GB, Ethernet 100 Mbit/s.
    DeviceProfile(
        name="pi3",
        gflops=1.2,
        node_s=27e-6,
        task_s=0.025,
        memory_bytes=1024 * _MIB,
        link=LinkSpec(latency_s=0.001, jitter_s=0.0005, up_bps=94e6, down_bps=94e6),
    ),
    # 4 x Cortex-A72 at 1.5 GHz, 2 GB in its smallest common form, gigabit Ethernet.
    DeviceProfile(name="pi4", gflops=3.0, node_s=14e-6, task_s=0.012, memory_bytes=2048 * _MIB, link=_LAN),
    # 4 x Cortex-A76 at 2.4 GHz, 4 GB, gigabit Ethernet.
    DeviceProfile(name="pi5", gflops=9.6, node_s=5.5e-6, task_s=0.005, memory_bytes=4096 * _MIB, link=_LAN),
    # One AVX2 core at about 3 GHz.
    DeviceProfile(name="server", gflops=24.0, node_s=2.5e-6, task_s=0.002, memory_bytes=16 * 1024 * _MIB, link=_LAN),
)

PROFILES: Final = MappingProxyType({profile.name: profile for profile in _ALL})
DEFAULT_PROFILE: Final = "pi4"


def profile(name: str) -> DeviceProfile:
    """The profile of that name. Raises `ConfigError` with the names that there are."""
    try:
        return PROFILES[name]
    except KeyError:
        raise ConfigError(f"profile {name!r}: expected one of {', '.join(PROFILES)}") from None
