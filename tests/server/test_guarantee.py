"""What a private job promises: from the mechanisms that devices and helpers use, whatever the job file calls them."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from sordino_common.errors import LocalError
from sordino_common.privacy.grid_bound import grid_bound
from sordino_common.privacy.mechanism import FULL_SAMPLING, Mechanism
from sordino_common.privacy.row_queries import sensitivity_squared
from sordino_common.privacy.rows import row_bound
from sordino_server.accounting.accountant import account
from sordino_server.guarantee import Guarantee, guarantee_of
from sordino_server.job import load_job
from sordino_server.job_statistics import queries_of

EXAMPLES = Path(__file__).parents[2] / "examples"
LOCAL = ("privacy.noise=device", "train.local_steps=4", "train.rounds=5")


def promised(*changes: str, name: str = "boston-dp") -> Guarantee:
    return guarantee_of(load_job(EXAMPLES / f"{name}.yaml", overrides=changes), gradient_length=14, update_length=17)


def test_a_target_is_kept_over_all_rounds_and_hardly_more_than_needed() -> None:
    guarantee = promised()
    one = guarantee.first.one
    assert (one.unit, one.sampling_threshold, one.count) == ("record", FULL_SAMPLING, 1)
    assert one.sensitivity_squared == row_bound(14, 16)
    assert guarantee.first.releases == 30
    spent = guarantee.summary(begun=30, rounds=30)
    assert 0.4995 < spent["epsilon"] <= 0.5
    assert spent["epsilon"] <= spent["rdp_epsilon"] <= spent["moments_epsilon"]
    assert guarantee.label == "record-level differential privacy, epsilon 0.5 at delta 1e-05"


def test_the_summary_has_all_that_the_interface_names() -> None:
    spent = promised().summary(begun=31, rounds=30)
    wanted = "unit epsilon delta accountant noise_multiplier clip_norm sampling_rate adversary moments_epsilon"
    assert not set(wanted.split()) - set(spent)
    assert (spent["rounds"], spent["releases"], spent["unit"], spent["device"]) == (30, 31, "record", None)
    assert spent["epsilon"] > 0.5, "a release that was begun and lost counts"
    assert any("held-out rows" in text for text in spent["not_covered"])
    assert "2 helpers" in spent["adversary"] and "one honest helper is enough" in spent["adversary"]
    assert spent["noise_from"] == "each of 2 helpers and the server"
    assert promised().summary(begun=0, rounds=0)["epsilon"] == 0.0


@pytest.mark.parametrize("seen", [1, 12, 30])
def test_what_was_spent_is_the_accountants_figure_for_the_mechanism_that_was_used(seen: int) -> None:
    guarantee = promised("privacy.sampling_rate=0.25", "privacy.epsilon=2.0")
    one = guarantee.first.one
    again = Mechanism(
        unit="record",
        sensitivity_squared=one.sensitivity_squared,
        sigma_squared=one.sigma_squared,
        sampling_threshold=1 << 30,
        count=seen,
    )
    assert guarantee.summary(begun=seen, rounds=seen)["epsilon"] == account([again], 1e-5).epsilon


def test_noise_of_devices_counts_every_local_step() -> None:
    guarantee = promised(*LOCAL)
    one = guarantee.first.one
    assert one.count == 4 and guarantee.first.releases == 5
    assert guarantee.summary(begun=5, rounds=5)["releases"] == 20
    # As many steps in all need as much noise in each, whoever adds it.
    assert one.noise_multiplier == pytest.approx(promised("train.rounds=20").first.one.noise_multiplier, rel=1e-3)
    terms = guarantee.record_terms(b"\x07" * 32)
    assert (terms.sigma_squared, terms.sampling_threshold) == (one.sigma_squared, one.sampling_threshold)
    assert (terms.clip_norm, terms.grid_bits, terms.apply_plan) == (1.0, 16, b"\x07" * 32)
    spent = guarantee.summary(begun=5, rounds=5)
    assert "Each device adds the whole noise before anything leaves it" in spent["adversary"]


def test_devices_are_protected_by_the_whole_updates_bound() -> None:
    guarantee = promised(name="fleet-device-dp")
    one = guarantee.first.one
    assert one.unit == "device" and one.sensitivity_squared == grid_bound(17, 16)
    spent = guarantee.summary(begun=20, rounds=20)
    assert spent["sampling_rate"] is None and 3.99 < spent["epsilon"] <= 4.0
    assert guarantee.label.startswith("device-level differential privacy, epsilon 4 at")


def test_both_units_have_a_noise_each() -> None:
    guarantee = promised(*LOCAL, "privacy.device={noise_multiplier: 3.0, clip_norm: 0.5}")
    assert guarantee.second is not None
    second = guarantee.second.one
    assert second.unit == "device" and second.count == 1
    assert second.noise_multiplier == pytest.approx(3.0, rel=1e-6)
    assert second.noise_multiplier >= 3.0, "rounded to more noise"
    spent = guarantee.summary(begun=5, rounds=5)
    assert spent["device"]["clip_norm"] == 0.5 and spent["device"]["target_epsilon"] is None
    assert spent["device"]["epsilon"] == account([Mechanism(
        unit="device", sensitivity_squared=second.sensitivity_squared, sigma_squared=second.sigma_squared, count=5
    )], 1e-5).epsilon  # fmt: skip
    assert guarantee.label.endswith(", and of devices")


def test_a_stated_noise_is_what_is_used_and_its_epsilon_is_told() -> None:
    guarantee = promised("privacy.epsilon=null", "privacy.noise_multiplier=20.0")
    one = guarantee.first.one
    assert one.sigma_squared == math.ceil(400 * one.sensitivity_squared)
    assert guarantee.first.target is None
    told = account(guarantee.first.spent(30), 1e-5).epsilon
    assert f"epsilon {told:.4g} at delta" in guarantee.label


def test_with_one_helper_it_holds_only_as_long_as_that_one_is_honest() -> None:
    adversary = promised("secure_aggregation={helpers: 1}").first.adversary
    assert "the server as long as the helper is honest" in adversary


def test_a_statistics_job_promises_one_release_with_no_clip_norm() -> None:
    job = load_job(EXAMPLES / "boston-statistics.yaml")
    first = guarantee_of(job).first
    assert (first.releases, first.one.count, first.clip_norm) == (1, 1, None)
    assert first.one.sensitivity_squared == sensitivity_squared(queries_of(job.spec))
    with pytest.raises(LocalError, match="no clip norm"):
        _ = first.clip


@pytest.mark.parametrize("lengths", [(1, 1), (14, 17), (1_000_000, 2_000_000)])
def test_epsilon_does_not_depend_on_the_length_of_the_model(lengths: tuple[int, int]) -> None:
    job = load_job(EXAMPLES / "boston-dp.yaml", overrides=["privacy.epsilon=null", "privacy.noise_multiplier=9.5"])
    told = guarantee_of(job, gradient_length=lengths[0], update_length=lengths[1]).summary(begun=30, rounds=30)
    assert told["epsilon"] == pytest.approx(guarantee_of(job).summary(begun=30, rounds=30)["epsilon"], rel=1e-6)
