"""Class weights: constants of the study, which never let a patient count more than the clip."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.exact_sum import GRID_BITS, Weighted, clipped_sum
from cloister_fl.client.training.local_training import train_round
from cloister_fl.client.training.per_patient_gradients import Engine, PatientGradSampleModule
from cloister_fl.errors import InternalError, StudyInvalid
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network
from support import studies
from support.cohorts import TASK, cohort_of, every_bag
from support.errors import raises

UNIT = 1 << GRID_BITS
HEAVY = {"normal": 1.0, "nodule": 4.0}


def small(seed: int = 0) -> nn.Module:
    return build(Network(arguments={"width": 4}), 2, 1, size=16, seed=seed)


def exact_norm(total: torch.Tensor) -> int:
    return sum(int(value) ** 2 for value in total.tolist())


def test_a_class_weight_multiplies_the_clipped_gradient() -> None:
    torch.manual_seed(0)
    rows = torch.randn(3, 130) * 40
    plain = [clipped_sum([row[None]], 130, 1.0) for row in rows]
    for weight in (1.0, 0.25):
        for row, whole in zip(rows, plain, strict=True):
            block = Weighted(row[None], [weight])
            found = clipped_sum([block], 130, 1.0)
            # Far above the clip: a weight before it would have been clipped away.
            assert exact_norm(found) <= (weight * UNIT) ** 2
            assert torch.allclose(found.double(), weight * whole.double(), atol=2, rtol=1e-6)
    both = clipped_sum([Weighted(rows[:2], [1.0, 0.5]), rows[2:]], 130, 1.0)
    parts = [Weighted(rows[0:1], [1.0]), Weighted(rows[1:2], [0.5]), rows[2:3]]
    assert torch.equal(both, sum(clipped_sum([one], 130, 1.0) for one in parts))
    autograd_form = Weighted([rows[0, :100], rows[0, 100:]], [0.5])
    assert torch.equal(
        clipped_sum([autograd_form], 130, 1.0), clipped_sum([Weighted(rows[:1], [0.5])], 130, 1.0)
    )


@pytest.mark.parametrize("weights", [[1.5], [0.0], [-0.5], [math.nan], [], [1.0, 1.0]])
def test_a_weight_that_is_none_is_refused(weights: list[float]) -> None:
    with raises(InternalError, match="weight"):
        clipped_sum([Weighted(torch.ones(1, 3), weights)], 3, 1.0)


@pytest.mark.parametrize("engine", ["patients", "opacus"])
def test_a_patient_s_weight_follows_the_patient_s_own_labels(engine: Engine) -> None:
    cohort = cohort_of([2, 1, 3])
    patients = PatientGradSampleModule(small(), TASK, engine=engine)
    size = sum(weight.numel() for weight in patients.trained)
    bags = every_bag(cohort)
    each = [clipped_sum(patients.blocks(cohort, [bag]), size, 1e-3) for bag in bags]
    weights = (0.25, 1.0)
    for place, bag in enumerate(bags):
        own = np.asarray(weights)[cohort.targets[bag.images]].mean()
        (alone,) = patients.blocks(cohort, [bag], weights)
        assert alone.weights == [own]
        found = clipped_sum([alone], size, 1e-3).double()
        assert torch.allclose(found, own * each[place].double(), atol=2, rtol=1e-6)
    whole = clipped_sum(patients.blocks(cohort, bags, weights), size, 1e-3)
    parts = [clipped_sum(patients.blocks(cohort, [bag], weights), size, 1e-3) for bag in bags]
    assert torch.equal(whole, sum(parts))


def test_weights_are_over_the_largest_and_change_the_hash() -> None:
    plain, weighted = studies.study(), studies.study(training={"class_weights": HEAVY})
    assert weighted.class_weights == (0.25, 1.0)
    assert plain.class_weights == ()
    assert "class_weights" not in plain.canonical()
    assert weighted.digest != plain.digest
    # Alike weights say what none say, and are another text all the same.
    alike = studies.study(training={"class_weights": dict.fromkeys(HEAVY, 3.0)})
    assert alike.class_weights == ()
    without = [one.bound_to("").update_digest for one in (plain, weighted)]
    assert without[0] != without[1]


@pytest.mark.parametrize(
    ("weights", "said"),
    [
        ({"normal": 1.0}, "each class once"),
        ({"normal": 1.0, "nodule": 1.0, "cyst": 1.0}, "each class once"),
        ({"normal": 0.0, "nodule": 1.0}, "class_weights"),
        ({"normal": 0.001, "nodule": 1000.0}, "factor above 1000"),
    ],
)
def test_weights_that_do_not_fit_are_refused(weights: dict[str, float], said: str) -> None:
    with raises(StudyInvalid, match=said):
        studies.study(training={"class_weights": weights})


def test_a_task_without_classes_has_no_weights() -> None:
    with raises(StudyInvalid, match="class_weights: is for classes"):
        studies.study(
            target={"kind": "segmentation", "segment": "lung", "column": None, "classes": None},
            network={"name": "unet"},
            training={"class_weights": {"lung": 1.0}},
        )


@pytest.mark.parametrize("privacy", ["", "enabled = false"])
def test_weights_change_what_is_trained_and_which_way(privacy: str) -> None:
    """One step from the same model: the heavy class pulls more than the other one."""
    cohort = cohort_of([1] * 8)
    pulls = []
    for weights in ({}, {"normal": 1.0, "nodule": 1000.0}):
        asked = studies.study(
            training={"learning_rate": 0.5, "expected_batch": 8, "class_weights": weights},
            privacy=privacy,
        )
        delta = train_round(
            small(),
            cohort,
            asked,
            noise_multiplier=1e-9,
            random=SecureRandom() if asked.privacy.enabled else None,
            round_number=1,
            steps=1,
        )
        # The last two values are the biases of the classes.
        pulls.append(float(delta[-1] - delta[-2]))
    assert pulls[1] > pulls[0]
    assert pulls[1] > 0.01
