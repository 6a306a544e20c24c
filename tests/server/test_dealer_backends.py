"""Laws of ring back ends, on NumPy and on torch in every way of multiplying: the same bits, against Python integers."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from helpers_fp import from_ints, residues, same
from sordino_common.errors import LocalError
from sordino_common.ring import fp
from sordino_common.ring.backend import NumpyBackend, RingBackend
from sordino_server.dealer.backend_torch import Kernel, TorchBackend, best_backend

EDGES = np.array([0, 1, -1, 1 << 21, -(1 << 21), (1 << 42) - 1, (1 << 63) - 1, -(1 << 63)], dtype=np.int64)
FIELD_EDGES = [0, 1, fp.P - 1, 1 << 63, fp.P - (1 << 63), (1 << 64) - 1, 1 << 64, (1 << 105) - 1]


def torch_backend(device: str, kernel: Kernel) -> Callable[[], RingBackend]:
    def make() -> RingBackend:
        if device == "cuda" and not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        return TorchBackend(device, kernel=kernel, all_on_device=True)

    return make


BACKENDS = [
    pytest.param(NumpyBackend, id="numpy"),
    *(pytest.param(torch_backend("cpu", kernel), id=f"cpu-{kernel}") for kernel in ("integer", "float64", "int8")),
    *(
        pytest.param(torch_backend("cuda", kernel), id=f"cuda-{kernel}", marks=pytest.mark.gpu)
        for kernel in ("float64", "int8")
    ),
]
Make = Callable[[], RingBackend]


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """On a busy machine torch's threads wait for one another, far longer than such small products take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def integers(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    values = rng.integers(-(1 << 63), (1 << 63) - 1, shape, endpoint=True)
    return np.where(rng.random(shape) < 0.5, values, rng.choice(EDGES, shape))


def elements(rng: np.random.Generator, shape: tuple[int, ...]) -> np.ndarray:
    size = int(np.prod(shape))
    drawn = [int.from_bytes(rng.bytes(16), "little") % fp.P for _ in range(size)]
    return from_ints([FIELD_EDGES[k % 8] if k % 2 else value for k, value in enumerate(drawn)], shape)


def product(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """a @ b with Python integers."""
    return (a[..., :, :, None] * b[..., None, :, :]).sum(axis=-2)


@pytest.mark.parametrize("make", BACKENDS)
@pytest.mark.parametrize(
    ("a_shape", "b_shape"),
    [
        ((1, 1), (1, 1)),
        ((3, 1), (1, 5)),
        ((5, 13), (13, 1)),
        ((2, 511), (511, 3)),
        ((3, 512), (512, 2)),
        ((2, 513), (513, 3)),
        ((40, 9), (9, 17)),
        ((2, 3, 4), (4, 5)),
        ((2, 1, 3, 4), (3, 4, 2)),
        ((4, 0), (0, 2)),
        ((0, 4), (4, 2)),
        ((2, 4), (4, 0)),
    ],
)
def test_products_are_exact(make: Make, a_shape: tuple[int, ...], b_shape: tuple[int, ...]) -> None:
    backend, rng = make(), np.random.default_rng(len(a_shape) + a_shape[-1])
    a, b = integers(rng, a_shape), integers(rng, b_shape)
    exact = product(a.astype(object), b.astype(object))
    ring = np.array([(int(v) + (1 << 63)) % (1 << 64) - (1 << 63) for v in exact.ravel()], dtype=np.int64)
    assert np.array_equal(backend.matmul(a, b), ring.reshape(exact.shape))


@pytest.mark.parametrize("make", BACKENDS)
def test_extreme_operands(make: Make) -> None:
    """Every limb at its largest size and of one sign, at the largest inner block."""
    backend = make()
    for value in (
        -(1 << 63),
        -1,
        (1 << 63) - 1,
        -(1 << 21) - (1 << 43),
        -(1 << 63) + (1 << 42) - 1,
        -0x7F7F7F7F7F7F7F80,
    ):
        a = np.full((2, 512), value, dtype=np.int64)
        assert backend.matmul(a, a.T)[1, 0] == np.int64((512 * value**2 + (1 << 63)) % (1 << 64) - (1 << 63))


@pytest.mark.parametrize("make", BACKENDS)
def test_elementwise_products_are_exact(make: Make) -> None:
    backend, rng = make(), np.random.default_rng(3)
    v = np.concatenate((np.repeat(EDGES, len(FIELD_EDGES)), integers(rng, (200,))))
    a = np.concatenate((from_ints(FIELD_EDGES * len(EDGES), (64,)), elements(rng, (200,))), axis=1)
    assert same(backend.fp_mul_int64(a, v), residues(a) * v.astype(object))
    for alpha in FIELD_EDGES:
        assert same(backend.fp_scale_fp(alpha, a), alpha * residues(a))
        assert same(backend.fp_scale(alpha, v.reshape(2, -1)), alpha * v.astype(object).reshape(2, -1))
    assert backend.fp_scale(5, np.array(-1)).shape == (2,)
    assert backend.fp_scale(5, np.zeros((0, 3), dtype=np.int64)).shape == (2, 0, 3)


@pytest.mark.parametrize("make", BACKENDS)
def test_views_and_read_only_operands(make: Make) -> None:
    backend, rng = make(), np.random.default_rng(4)
    a, tagged = integers(rng, (6, 4)).T, elements(rng, (6, 5)).swapaxes(1, 2)
    a.flags.writeable = tagged.flags.writeable = False
    wide = np.broadcast_to(a[:1], (5, 6))
    assert np.array_equal(backend.matmul(a, a.T), np.matmul(a, a.T))
    assert np.array_equal(backend.matmul(wide, a.T), np.matmul(wide, a.T))
    assert same(backend.fp_scale(77, wide), 77 * wide.astype(object))
    assert same(backend.fp_scale_fp(77, tagged), 77 * residues(tagged))
    assert same(backend.fp_mul_int64(tagged, wide), residues(tagged) * wide.astype(object))


@pytest.mark.parametrize("make", BACKENDS)
def test_refusals(make: Make) -> None:
    backend = make()
    ints, floats = np.zeros((2, 3), dtype=np.int64), np.zeros((2, 3))
    with pytest.raises(LocalError, match=r"shapes \(2, 3\) and \(2, 3\) do not fit"):
        backend.matmul(ints, ints)
    with pytest.raises(LocalError, match="expected int64 operands, got int64 and float64"):
        backend.matmul(ints, floats)  # type: ignore[arg-type]
    with pytest.raises(LocalError, match="expected int64, got float64"):
        backend.fp_scale(1, floats)  # type: ignore[arg-type]
    with pytest.raises(LocalError, match=r"not in 0\.\.p-1"):
        backend.fp_scale(fp.P, ints)
    with pytest.raises(LocalError, match=r"not in 0\.\.p-1"):
        backend.fp_scale_fp(-1, from_ints([0, 0], (2,)))
    with pytest.raises(LocalError, match=r"shapes \(2,\) and \(2, 3\) differ"):
        backend.fp_mul_int64(from_ints([0, 0], (2,)), ints)


def test_how_a_backend_is_chosen() -> None:
    assert NumpyBackend().name == "numpy"
    assert TorchBackend().name == "torch cpu (integer)"
    rng = np.random.default_rng(5)
    v, a = integers(rng, (5,)), elements(rng, (5,))
    assert np.array_equal(TorchBackend().fp_mul_int64(a, v), fp.mul_int64(a, v))
    with pytest.raises(LocalError, match="no int64 product on 'meta'; use kernel 'int8' or 'float64'"):
        TorchBackend("meta", kernel="integer")


@pytest.mark.parametrize("capability", ["AVX2", "AVX512"])
def test_what_torch_does_on_a_cpu_depends_on_its_instructions(monkeypatch: pytest.MonkeyPatch, capability: str) -> None:
    """It has the larger products where there is AVX-512, and none elsewhere: to the same bits."""
    done: list[tuple[int, ...]] = []
    exact = torch.matmul

    def noted(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        done.append(tuple(a.shape))
        return exact(a, b)

    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    backend, rng = TorchBackend(), np.random.default_rng(6)
    monkeypatch.setattr(torch, "matmul", noted)
    for shape in ((32, 13), (64, 64)):
        a, b = integers(rng, shape), integers(rng, (shape[1], 64))
        assert np.array_equal(backend.matmul(a, b), np.matmul(a, b))
    assert done == ([(64, 64)] if capability == "AVX512" else [])


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_device_is_named() -> None:
    with pytest.raises(LocalError, match="torch sees no CUDA device, asked for 'cuda'; use 'cpu'"):
        TorchBackend("cuda")


def test_a_device_that_rounds_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    exact = torch.matmul
    monkeypatch.setattr(torch, "matmul", lambda a, b: exact(a.to(torch.float32), b.to(torch.float32)).to(a.dtype))
    with pytest.raises(LocalError, match="does not multiply exactly"):
        TorchBackend(kernel="float64")


def test_the_servers_own_choice_is_torch_on_what_there_is() -> None:
    where = "cuda" if torch.cuda.is_available() else "cpu"
    assert best_backend().name.startswith(f"torch {where}")
