"""The `spdz:` block of a job: who computes on shares, how safely, in which ranges, and to whom what opens.

What the numbers mean on the wire and for the lowering is said in `sordino_common.spdz`. `check_spdz` refuses what can
be known to be wrong without the model; the rest is refused when the model is lowered, with its line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Annotated, Final, Literal

import msgspec
from msgspec import Meta

from sordino_common.errors import ConfigError
from sordino_common.messages.base import NAME_PATTERN

if TYPE_CHECKING:
    from sordino_server.job import JobSpec

Member = Annotated[str, Meta(pattern=NAME_PATTERN)]
Range = Annotated[float, Meta(gt=0.0, le=1e6)]
NOBODY: Final = "nobody"
SERVER: Final = "server"
OWNERS: Final = "owners"
_CHECKPOINT: Final = 100


class _Strict(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    pass


class RangesSpec(_Strict, frozen=True, kw_only=True):
    """What real values never pass in size: features, targets and parameters as the Plan sees them (scaled), optimizer
    state. Optional: `values` (every result of a layer), `updates` (what a parameter moves by in one step),
    `preactivations` (what goes into a sigmoid or tanh; left out, the worst case must lie in the fit's interval). Tight
    ranges make small bounds, hence exact small learning rates; a value that leaves its range ends the session."""

    x: Range = 8.0
    y: Range = 8.0
    params: Range = 4.0
    state: Range = 4.0
    values: Range | None = None
    updates: Range | None = None
    preactivations: Range | None = None


class ActivationSpec(_Strict, frozen=True, kw_only=True):
    """torch.sigmoid and tanh become odd polynomials of this degree, fitted by least squares on |z| <= interval."""

    degree: Literal[3, 5] = 3
    interval: Annotated[float, Meta(gt=0.0, le=64.0)] = 8.0


class OutputsSpec(_Strict, frozen=True, kw_only=True):
    """To whom what opens: `server`, `nobody`, or an agent by name. `model`: the parameters after the last step. `loss`:
    that of every step. `prediction`: of inference; `owners` means each row's to who owns the row, an agent's name all
    rows' to that agent, if the owners' policies allow it."""

    model: Literal["server", "nobody"] | Member = SERVER
    loss: Literal["server", "nobody"] = NOBODY
    prediction: Literal["owners", "server", "nobody"] | Member = OWNERS


class InferenceSpec(_Strict, frozen=True, kw_only=True):
    """After training, the model is run on shares over the owners' rows of `split`, `batch_rows` at a time."""

    split: Literal["train", "test"] = "test"
    batch_rows: Annotated[int, Meta(ge=1, le=1 << 16)] = 32


class SpdzSpec(_Strict, frozen=True, kw_only=True):
    """`compute_agents`: how many (the server picks them among those with the role compute), or which. `zones`: in how
    many different zones of the roster they stand at least. `dealer`: who deals preprocessing; by default the server.
    `model_from`: who provides the first parameters: the server, or an agent that masks its own, which the server then
    never sees; `model`: under which name that agent has them, by default the job's. `check_every`: steps between MAC
    checks (every output waits for one). `checkpoint_every`: steps between states that a run can resume from. `retries`:
    how often one step may meet the edge of the ring. `ahead_bytes`: how much preprocessing may be under way.
    `preprocessing`: dealt beside the steps, or as much of it as `ahead_bytes` allows before the first one, so that the
    steps run undisturbed: shorter from the first to the last, longer in all.
    `evaluate`: held-out metrics in the clear on the owners' devices, which takes a model that opens to the server, or
    on shares; a job that only infers evaluates if this says so."""

    compute_agents: (
        Annotated[int, Meta(ge=2, le=4)] | Annotated[tuple[Member, ...], Meta(min_length=2, max_length=4)]
    ) = 3
    security: Literal["active", "passive"] = "active"
    zones: Annotated[int, Meta(ge=1, le=4)] = 1
    dealer: Member | None = None
    model_from: Literal["server"] | Member = SERVER
    model: Member | None = None
    check_every: Annotated[int, Meta(ge=1, le=1 << 16)] = 1
    checkpoint_every: Annotated[int, Meta(ge=1, le=1 << 20)] | None = None
    retries: Annotated[int, Meta(ge=0, le=1000)] = 10
    fraction_bits: Annotated[int, Meta(ge=8, le=20)] = 14
    ranges: RangesSpec = RangesSpec()
    activation: ActivationSpec = ActivationSpec()
    outputs: OutputsSpec = OutputsSpec()
    ahead_bytes: Annotated[int, Meta(ge=1 << 20, le=1 << 36)] = 64 << 20
    preprocessing: Literal["beside", "first"] = "beside"
    silence_s: Annotated[float, Meta(gt=0.0, le=86_400.0)] = 60.0
    evaluate: Literal["clear", "shares"] | None = None
    inference: InferenceSpec | None = None

    @property
    def committee(self) -> int:
        """How many compute agents."""
        return self.compute_agents if isinstance(self.compute_agents, int) else len(self.compute_agents)

    @property
    def checkpoint_steps(self) -> int:
        """Steps between checkpoints: a multiple of `check_every`."""
        return self.checkpoint_every or -(-_CHECKPOINT // self.check_every) * self.check_every

    @property
    def evaluates(self) -> Literal["clear", "shares"]:
        return self.evaluate or ("clear" if self.outputs.model == SERVER else "shares")


def check_spdz(spec: JobSpec, error: Callable[[str, str], ConfigError]) -> None:
    """Raise `ConfigError` at the first key that can't be right. `error(key, text)` makes it."""
    for key, text in _problems(spec):
        raise error(key, text)


def _problems(spec: JobSpec) -> Iterator[tuple[str, str]]:
    spdz = spec.shares
    if spec.security is not None:
        yield "security", "with mode spdz, say it in the block: spdz.security"
    if spec.optimizer.__class__.__name__ == "AdamSpec":
        yield "optimizer", "adam divides by square roots, which secret shares can't do yet; use sgd"
    if spec.limits.update_norm is not None or spec.limits.rows_per_agent is not None:
        yield "limits", "bound what agents send in federated rounds; on shares use spdz.ranges"
    if isinstance(spdz.compute_agents, tuple):
        if len(set(spdz.compute_agents)) != len(spdz.compute_agents):
            yield "spdz.compute_agents", "an agent is named twice"
        if spdz.dealer in spdz.compute_agents:
            yield "spdz.dealer", f"{spdz.dealer} is also a compute agent: who deals masks must never see a masked value"
    if spdz.preprocessing == "first" and spdz.dealer is not None:
        yield (
            "spdz.preprocessing",
            f"first takes the server as the dealer, and here {spdz.dealer} deals; say beside, or leave spdz.dealer out",
        )
    if spdz.model is not None and spdz.model_from == SERVER:
        yield "spdz.model", "names a model of an agent; say which agent with spdz.model_from"
    if spdz.model_from != SERVER and spdz.model_from == spdz.dealer:
        yield "spdz.model_from", f"{spdz.dealer} deals: who knows the masks must not be who masks the parameters"
    if spec.train.rounds == 0 and spdz.inference is None:
        yield "train.rounds", "with 0 rounds nothing is trained: say what is inferred (spdz.inference)"
    if spec.train.rounds == 0 and spdz.outputs.model != NOBODY:
        yield "spdz.outputs.model", "with train.rounds 0 no model comes out that could open; say nobody"
    if spdz.zones > spdz.committee:
        yield "spdz.zones", f"{spdz.committee} compute agents can't stand in {spdz.zones} zones"
    if spdz.checkpoint_every is not None and spdz.checkpoint_every % spdz.check_every:
        yield (
            "spdz.checkpoint_every",
            f"{spdz.checkpoint_every} is no multiple of check_every, {spdz.check_every}: only what is checked is kept",
        )
    if spdz.outputs.model == OWNERS:
        yield "spdz.outputs.model", "opens to server, to nobody, or to an agent by name"
    if spdz.evaluate == "clear" and spdz.outputs.model != SERVER:
        yield (
            "spdz.evaluate",
            f"clear takes a model that opens to the server, but spdz.outputs.model is {spdz.outputs.model}; say shares",
        )
