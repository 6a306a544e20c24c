"""All committees of a fleet: who is to keep what, in which ranges; and modules, shared and fetched in place."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar, cast

import numpy as np
import torch
from torch import Tensor, nn

from sordino_common.ring.fixed import FRACTION_BITS
from sordino_common.spdz.lowering import Ranges
from sordino_common.spdz.spec import MAX_PARTIES, MIN_PARTIES
from sordino_server.rounds.effects import Effect, Result
from sordino_server.rounds.spdz import World
from sordino_server.tensors import modules
from sordino_server.tensors.errors import WrongPlace
from sordino_server.tensors.lines import user_line
from sordino_server.tensors.pointer import PointerTensor
from sordino_server.tensors.shared.committee import Committee, Security, Source
from sordino_server.tensors.shared.links import SharedTensor
from sordino_server.tensors.shared.local import LocalFixed, PointerFixed, fix_precision
from sordino_server.tensors.shared.pool import SessionPool
from sordino_server.tensors.shared.program import Programs
from sordino_server.trace.draft import spec_of

if TYPE_CHECKING:
    from sordino_server.tensors.fleet import PointerFleet, RemoteAgent

M = TypeVar("M", bound=nn.Module)


class Committees:
    """Of one fleet. `world`: who deals, and with what."""

    def __init__(
        self,
        fleet: PointerFleet,
        world: World,
        drive: Callable[[Generator[Effect, Result, Any]], Any],
    ) -> None:
        self._fleet = fleet
        self._world = world
        self._pool = SessionPool(drive)
        self._programs = Programs()
        self._committees: dict[tuple[tuple[str, ...], str, int], Committee] = {}

    @property
    def sessions(self) -> int:
        """How many are open."""
        return len(self._pool)

    @property
    def programs(self) -> Programs:
        return self._programs

    def __iter__(self) -> Iterator[Committee]:
        return iter(tuple(self._committees.values()))

    def committee(self, agents: Sequence[RemoteAgent], security: str, fraction_bits: int) -> Committee:
        """The committee of these agents, in any order. Raises `WrongPlace` for one that can't be."""
        names = tuple(sorted(agent.name for agent in agents))
        if not MIN_PARTIES <= len(set(names)) <= MAX_PARTIES or len(set(names)) != len(names):
            raise WrongPlace(
                f"share: a committee has {MIN_PARTIES} to {MAX_PARTIES} different agents, got "
                f"{', '.join(names) or 'none'}"
            )
        if security not in ("active", "passive"):
            raise WrongPlace(f"share: security is active or passive, not {security!r}")
        key = (names, security, fraction_bits)
        found = self._committees.get(key)
        if found is None or found.lost:
            if found is not None:
                found.forget_all()
            found = self._committees[key] = Committee(
                self._fleet,
                sorted(agents, key=lambda agent: agent.name),
                security=cast(Security, security),
                fraction_bits=fraction_bits,
                world=self._world,
                pool=self._pool,
                programs=self._programs,
            )
        return found

    def share(
        self, tensors: Sequence[Tensor], committee: Committee, *, ranges: float | Ranges | None
    ) -> list[SharedTensor]:
        """Share them all in one step; see `PointerFleet.share`."""
        stated = ranges_of(ranges)
        sources = [self._source(tensor, committee, stated) for tensor in tensors]
        shared = committee.share(sources, str(user_line()))
        return [
            cast(SharedTensor, link.requires_grad_()) if tensor.requires_grad else link
            for tensor, link in zip(tensors, shared, strict=True)
        ]

    def _source(self, tensor: Tensor, committee: Committee, stated: Ranges) -> Source:
        limit = stated.params if isinstance(tensor, nn.Parameter) else stated.x
        if isinstance(tensor, PointerFixed):
            tensor = tensor.child
        if isinstance(tensor, SharedTensor):
            raise WrongPlace(f"share: {tensor.chain} is shared already")
        if isinstance(tensor, PointerTensor):
            name = tensor.owner.name
            if name not in committee.parties:
                raise WrongPlace(
                    f"share: {tensor.chain} can be shared with committees of which {name} is a member, so that its own "
                    f"policy judges all that becomes of it; this is {committee.name}"
                )
            if not tensor.dtype.is_floating_point:
                raise WrongPlace(f"share: {tensor!r}: on shares numbers are floats; convert it there with .float()")
            agent = self._fleet[name]
            value = tensor.value()
            return Source(
                spec=value.spec, limit=limit, ranges=stated, owner=name, tensor_id=self._fleet.settled(agent, value)
            )
        fixed = tensor if isinstance(tensor, LocalFixed) else fix_precision(tensor, committee.fraction_bits)
        if not isinstance(fixed, LocalFixed):
            raise WrongPlace(f"share: {fixed.chain} is not here")
        integers = fixed.integers
        if integers.size and float(np.abs(integers).max()) > limit * 2.0**fixed.f:
            raise WrongPlace(
                f"share: a value is beyond the {limit:g} that is stated for it; state what no value passes with "
                f"ranges={'Ranges(params=...)' if isinstance(tensor, nn.Parameter) else '...'}, or scale it"
            )
        spec = spec_of(torch.empty(fixed.shape, dtype=fixed.dtype), "share")
        return Source(spec=spec, limit=limit, ranges=stated, integers=integers)

    # --- modules -------------------------------------------------------------------------------------------------

    def share_module(self, module: M, committee: Committee, *, ranges: float | Ranges | None) -> M:
        """Every parameter and buffer is shared, in one step, and replaced in place; if one can't be, none is."""
        tensors = list(modules.tensors_of(module))
        for name, buffer in module.named_buffers():
            if not buffer.dtype.is_floating_point:
                raise WrongPlace(
                    f"share: buffer {name} of the module is {buffer.dtype}, which shares don't have; remove it, or use "
                    "a layer without it"
                )
        shared = iter(self.share(tensors, committee, ranges=ranges) if tensors else ())
        return modules.replaced(module, lambda _: next(shared).detach())

    def close(self) -> None:
        """End every session, have everything dropped that is kept."""
        try:
            self._pool.close_all()
        finally:
            for committee in self:
                committee.forget_all()


def fetch_module(module: M) -> M:
    """Every shared tensor of the module as what opens to us, of each committee in one step; if one may not, none is
    replaced."""
    wanted: dict[Committee, list[SharedTensor]] = {}
    for tensor in modules.tensors_of(module):
        if isinstance(tensor, SharedTensor):
            wanted.setdefault(tensor.owner, []).append(tensor)
    plain: dict[int, Tensor] = {}
    for committee, links in wanted.items():
        opened = committee.fetch_all([link.value() for link in links])
        plain |= {id(link): value for link, value in zip(links, opened, strict=True)}
    fetched = iter([plain.get(id(tensor), tensor) for tensor in modules.tensors_of(module)])
    return modules.replaced(module, lambda _: _fetched(next(fetched)))


def _fetched(tensor: Tensor) -> Tensor:
    return tensor.get() if isinstance(tensor, PointerTensor) else tensor


def ranges_of(ranges: float | Ranges | None) -> Ranges:
    """A number bounds what is shared; nothing said means what jobs assume (8 for tensors, 4 for parameters)."""
    if ranges is None:
        return Ranges()
    if isinstance(ranges, Ranges):
        return ranges
    return replace(Ranges(), x=float(ranges), params=float(ranges))


def bits_of(thing: Any, f: int | None) -> int:
    """Fraction bits: those that the tensor has, or what was asked for."""
    own = thing.f if isinstance(thing, LocalFixed | PointerFixed) else None
    if own is not None and f is not None and own != f:
        raise WrongPlace(
            f"share: the tensor has {own} fraction bits, not {f}; leave out f, or .fix_precision({f}) first"
        )
    return own or f or FRACTION_BITS
