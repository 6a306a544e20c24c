"""Who computes on shares: chosen among the roster's compute agents that are online, in different zones if asked."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

from sordino_common.channel.roster import Roster
from sordino_common.errors import ConfigError
from sordino_server.job_spdz import NOBODY, OWNERS, SERVER, SpdzSpec


def candidates(spec: SpdzSpec, roster: Roster) -> tuple[str, ...]:
    """Who may compute, ascending. Raises `ConfigError` if the roster can't give what the job asks for."""
    able = {entry.name: entry for entry in roster.entries if "compute" in entry.roles}
    if not isinstance(spec.compute_agents, int):
        for name in spec.compute_agents:
            if name not in able:
                raise ConfigError(
                    f"spdz.compute_agents: {name} has not the role compute in the roster of epoch {roster.epoch}"
                )
        able = {name: able[name] for name in spec.compute_agents}
    dealers = {roster.server.name, spec.dealer}
    names = tuple(sorted(name for name in able if name not in dealers))
    zones = {able[name].zone for name in names}
    if len(names) < spec.committee or len(zones) < spec.zones:
        raise ConfigError(
            f"the job wants {spec.committee} compute agents in {spec.zones} zones; the roster of epoch {roster.epoch} "
            f"has {len(names)} in {len(zones)}: give more agents the role compute, or another zone"
        )
    return names


def provider(spec: SpdzSpec, roster: Roster) -> str:
    """Who provides the first parameters. Raises `ConfigError` if the roster does not let it."""
    if spec.model_from == SERVER:
        return roster.server.name
    roles = {entry.name: entry.roles for entry in roster.entries}.get(spec.model_from)
    if roles is None:
        raise ConfigError(f"spdz.model_from: {spec.model_from} is not in the roster of epoch {roster.epoch}")
    if "data" not in roles or {"server", "dealer"} & set(roles):
        raise ConfigError(
            f"spdz.model_from: {spec.model_from} has the roles {', '.join(roles)} in the roster of epoch "
            f"{roster.epoch}; who provides a model needs the role data, and must not deal"
        )
    return spec.model_from


def require_readers(spec: SpdzSpec, roster: Roster) -> None:
    """Raise `ConfigError` unless the roster lists every agent to whom something opens by name, and none deals."""
    roles = {entry.name: entry.roles for entry in roster.entries}
    for key, name in (("model", spec.outputs.model), ("prediction", spec.outputs.prediction)):
        if name in (SERVER, NOBODY, OWNERS):
            continue
        if name not in roles:
            raise ConfigError(f"spdz.outputs.{key}: {name} is not in the roster of epoch {roster.epoch}")
        if {"server", "dealer"} & set(roles[name]):
            raise ConfigError(f"spdz.outputs.{key}: {name} deals: it must not hold masked values")


def choose(spec: SpdzSpec, roster: Roster, online: Collection[str], *, keep: Sequence[str] = ()) -> tuple[str, ...]:
    """The committee in its order, or () if too few are online yet. `keep`: this very committee (it holds the state)."""
    names = [name for name in candidates(spec, roster) if name in online]
    if keep:
        return tuple(keep) if set(keep) <= set(names) else ()
    zones: Mapping[str, str] = {entry.name: entry.zone for entry in roster.entries}
    chosen: list[str] = []
    seen: set[str] = set()
    for name in names:  # a zone each, as far as they go
        if zones[name] not in seen and len(chosen) < spec.committee:
            chosen.append(name)
            seen.add(zones[name])
    for name in names:
        if len(chosen) < spec.committee and name not in chosen:
            chosen.append(name)
    if len(chosen) < spec.committee or len({zones[name] for name in chosen}) < spec.zones:
        return ()
    return tuple(sorted(chosen))
