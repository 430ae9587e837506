"""The policy refuses what it does not allow, and says which key did."""

from __future__ import annotations

from typing import Any

import pytest

from cloister_fl.client.site.policy import Policy, bound_missing, policy_for, refusals
from cloister_fl.study.cost import charges
from support import studies

BOUND = {"patients_at_most": 10_000}


def test_the_defaults_and_a_bound_on_the_patients_allow_the_default_study() -> None:
    assert refusals(Policy(patients_at_most=10_000), studies.study(), 5) == ()


def test_without_a_bound_on_the_patients_nobody_tells_whether_delta_is_small_enough() -> None:
    (told,) = refusals(Policy(), studies.study(), 5)
    assert told == (
        "policy.patients_at_most is 0, not declared, so nothing tells whether the study's "
        "privacy.delta = 1e-05 is small enough for this site's patients; it is for up to 10000."
    )
    (other,) = refusals(Policy(), studies.study(privacy={"delta": 3e-6}), 5)
    assert "up to 33333." in other
    # What it says is what the gate allows.
    for most, refused in ((33_333, False), (33_334, True)):
        policy = Policy(patients_at_most=most, ledger_delta=3e-6)
        assert bool(refusals(policy, studies.study(privacy={"delta": 3e-6}), 5)) is refused
    assert bound_missing(Policy()).startswith("No study with privacy is let in")
    assert bound_missing(Policy(patients_at_most=1)) == ""


def test_defaults() -> None:
    assert Policy().model_dump() == {
        "max_epsilon_study": 3.0,
        "max_epsilon_lifetime": 8.0,
        "ledger_delta": 1e-5,
        "patients_at_most": 0,
        "min_noise_multiplier": 0.3,
        "min_patients": 10,
        "min_patients_per_class": 0,
        "min_patients_per_class_without_privacy": 10,
        "require_secure_aggregation": True,
        "colluders": 1,
        "min_sites": 5,
        "max_weight_ratio": 1.0,
        "max_rounds": 1000,
        "allow_without_privacy": False,
        "networks": (),
        "modalities": (),
        "metrics": (),
        "hours": (),
        "release_unstarted": False,
        "approve": "none",
        "approved_hashes": (),
        "trusted_signers": (),
    }


@pytest.mark.parametrize(
    ("policy", "tables", "sites", "words"),
    [
        ({}, {"privacy": {"epsilon": 50.0}}, 5, ("max_epsilon_study", "3", "50")),
        (
            {"patients_at_most": 9},
            {"privacy": {"delta": 0.01}},
            5,
            ("ledger_delta", "1e-05", "0.01"),
        ),
        (
            {"metrics": ("score-histograms",)},
            {"privacy": {"enabled": False}},
            5,
            ("allow_without_privacy", "false", "enabled"),
        ),
        (
            {"allow_without_privacy": True},
            {"privacy": {"enabled": False}},
            5,
            ("metrics", "score-histograms", "evaluation.site_fraction = 0.2"),
        ),
        (
            {},
            {"evaluation": {"release_epsilon": 1.0}},
            5,
            ("metrics", "score-histograms", "evaluation.release_epsilon = 1"),
        ),
        (
            {"max_weight_ratio": 1.5},
            {"aggregation": {"weights": {"north": 2.0, "south": 0.5}}},
            5,
            ("max_weight_ratio", "1.5", "is 4 times the smallest"),
        ),
        (
            {},
            {"aggregation": {"weights": {"north": 1.0001}}},
            5,
            ("max_weight_ratio", "is 1;", "is 1.0001 times the smallest"),
        ),
        ({"max_rounds": 10}, {"training": {"rounds": 11}}, 5, ("max_rounds", "10", "11")),
        ({"min_sites": 3}, {}, 2, ("min_sites", "3", "2 are on the roster")),
        (
            {"min_sites": 3},
            {"aggregation": {"min_sites": 2}},
            5,
            ("min_sites", "3", "aggregation.min_sites = 2"),
        ),
        (
            {},
            {"aggregation": {"secure": False}},
            5,
            ("require_secure_aggregation", "true", "aggregation.secure"),
        ),
        ({}, {"aggregation": {"colluders": 0}}, 5, ("colluders", "1", "= 0")),
        ({"networks": ("resnet18",)}, {}, 5, ("networks", "resnet18", "small-cnn")),
        (
            {"modalities": ("CT",)},
            {"input": {"modalities": ("CT", "MR")}},
            5,
            ("modalities", "CT", "CT, MR"),
        ),
    ],
)
def test_refusal_names_key_and_values(
    policy: dict[str, Any], tables: dict[str, Any], sites: int, words: tuple[str, ...]
) -> None:
    (told,) = refusals(Policy(**BOUND | policy), studies.study(**tables), sites)
    assert f"policy.{words[0]}" in told
    for word in words:
        assert word in told


def test_the_delta_of_the_lifetime_suits_the_patients_too() -> None:
    """It is what a patient can rely on, and a study's delta alone was judged."""
    small = studies.study(privacy={"delta": 1e-9})
    many = Policy(patients_at_most=10_000_000)
    bound = "policy.patients_at_most is 10001, which allows a delta of 9.999e-06; "
    assert refusals(Policy(patients_at_most=10_001), studies.study(), 5) == (
        f"{bound}the study asks for privacy.delta = 1e-05.",
        f"{bound}policy.ledger_delta is 1e-05.",
    )
    (told,) = refusals(many, small, 5)
    assert told == (
        "policy.patients_at_most is 10000000, which allows a delta of 1e-08; "
        "policy.ledger_delta is 1e-05."
    )
    assert refusals(policy_for(10_000_000), small, 5) == ()
    assert policy_for(10_000_000).ledger_delta == pytest.approx(1e-8)
    assert policy_for(10_000).ledger_delta == policy_for(5).ledger_delta == 1e-5
    assert policy_for(None) == Policy()
    for patients in (1, 7, 10_000, 33_333, 123_457, 10**9):
        assert refusals(policy_for(patients), studies.study(privacy={"delta": 1e-12}), 5) == ()


@pytest.mark.long
def test_too_little_noise_in_training_or_release_is_refused() -> None:
    few = {"rounds": 1, "steps": 1, "sampling_rate": 0.01}
    much = studies.study(training=few, privacy={"epsilon": 200.0, "delta": 1e-5})
    released = studies.study(
        training=few,
        privacy={"epsilon": 200.0, "delta": 1e-5},
        evaluation={"release_epsilon": 60.0},
    )
    open_to_all = Policy(patients_at_most=10, max_epsilon_study=500, metrics=("score-histograms",))
    (told,) = refusals(open_to_all, much, 5)
    assert told == (
        "policy.min_noise_multiplier is 0.3; the noise multiplier of the study's training is "
        f"{charges(much).step.noise_multiplier:.3g}."
    )
    of_release = charges(released).release
    assert of_release is not None
    assert (
        "noised evaluation is "
        f"{of_release.noise_multiplier:.3g}." in refusals(open_to_all, released, 5)[-1]
    )
    # The bound itself is enough.
    enough = charges(much).step.noise_multiplier
    lower = open_to_all.model_copy(update={"min_noise_multiplier": enough})
    assert refusals(lower, much, 5) == ()


def test_the_bound_itself_is_allowed() -> None:
    policy = Policy(
        max_epsilon_study=2.0,
        max_rounds=20,
        patients_at_most=10_000,
        min_sites=5,
        networks=("small-cnn",),
        modalities=("CR", "DX"),
    )
    assert refusals(policy, studies.study(privacy={"epsilon": 2.0}), 5) == ()


def test_without_privacy_where_allowed_the_epsilon_is_moot() -> None:
    study = studies.study(privacy={"enabled": False, "epsilon": 900.0, "delta": 0.05})
    policy = Policy(allow_without_privacy=True, metrics=("score-histograms",))
    assert refusals(policy, study, 5) == ()


def test_without_privacy_and_without_metrics_a_study_that_measures_nothing_is_allowed() -> None:
    study = studies.study(privacy={"enabled": False}, evaluation={"site_fraction": 0.0})
    assert refusals(Policy(allow_without_privacy=True), study, 5) == ()


def test_all_refusals_at_once() -> None:
    study = studies.study(privacy={"epsilon": 9.0, "delta": 1e-3}, training={"rounds": 2000})
    assert len(refusals(Policy(networks=("resnet18",), min_sites=9), study, 1)) == 7
