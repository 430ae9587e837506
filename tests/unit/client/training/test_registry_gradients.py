"""Per-patient gradients of every network of the registry, in each engine, against a float64 loop.

Comparisons to 1e-6 run in float64 modules: in float32 the rounding of a deep network alone is
1e-5.
"""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.training import per_patient_gradients
from cloister_fl.client.training.per_patient_gradients import Engine, PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag, FeatureCohort
from cloister_fl.networks.registry import REGISTRY, build
from cloister_fl.study.schema import Network
from cloister_fl.tasks import Task
from cloister_fl.tasks.segmentation import Segmentation
from support.cohorts import TASK, every_bag, patients_of, targets_by

ENGINES: tuple[Engine, ...] = ("patients", "opacus")
SIZES = (2, 1, 5, 3, 4)


pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def nothing_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(per_patient_gradients, "_tried", {})


def cohort_of(
    sizes: tuple[int, ...],
    side: int,
    dtype: str = "float64",
    seed: int = 0,
    depth: tuple[int, ...] = (),
) -> tuple[FeatureCohort, list[Bag]]:
    pixels = (
        np.random.default_rng(seed).normal(size=(sum(sizes), 1, *depth, side, side)).astype(dtype)
    )
    patients = patients_of(sizes)
    cohort = FeatureCohort(pixels, patients, targets_by(patients))
    return cohort, every_bag(cohort)


MASKS = Segmentation("lungs")


def task_of(cohort: FeatureCohort) -> Task:
    return MASKS if cohort.targets.ndim > 1 else TASK


def segmented(cohort: FeatureCohort) -> FeatureCohort:
    """The same cohort with a mask each, one of them empty."""
    masks = (cohort.images[:, 0] > 0.5).astype(np.uint8)
    masks[1] = 0
    return FeatureCohort(cohort.images, cohort.patients, masks)


def mask_loss(logits: Tensor, masks: NDArray[np.uint8]) -> Tensor:
    """Cross entropy of each pixel and soft Dice, written out, of one patient."""
    total = torch.zeros((), dtype=torch.float64)
    for row, mask in zip(logits[:, 0], torch.from_numpy(masks.astype(np.float64)), strict=True):
        chance = 1 / (1 + torch.exp(-row))
        crossed = -(mask * torch.log(chance) + (1 - mask) * torch.log(1 - chance)).mean()
        dice = (2 * (chance * mask).sum() + 1) / (chance.sum() + mask.sum() + 1)
        total = total + crossed + 1 - dice
    return total / len(masks)


def loop(module: nn.Module, cohort: FeatureCohort, bags: list[Bag]) -> Tensor:
    """Gradients by the definition, float64 (patients, parameters)."""
    precise = copy.deepcopy(module).double()
    weights = [weight for weight in precise.parameters() if weight.requires_grad]
    rows = []
    for bag in bags:
        images = torch.from_numpy(cohort.images[bag.images]).double()
        if cohort.targets.ndim > 1:
            loss = mask_loss(precise(images), cohort.targets[bag.images])
        else:
            loss = F.cross_entropy(precise(images), torch.from_numpy(cohort.targets[bag.images]))
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, weights)]))
    return torch.stack(rows)


def close(one: Tensor, other: Tensor, limit: float = 1e-6) -> bool:
    return bool((one.double() - other).norm() <= limit * other.norm()) and bool(other.norm() > 0)


# Of a frozen backbone only a linear head is trained, on features in single precision.
TRAINED = [name for name in REGISTRY if name not in {"efficientnet-lite0", "frozen-backbone"}]


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in {"resnet18", "densenet121"} else ())
        for name in TRAINED
    ],
)
def test_every_network_equals_the_float64_loop_in_each_engine(name: str) -> None:
    side = REGISTRY[name].smallest
    depth = (5,) if REGISTRY[name].dimensions == 3 else ()
    outputs = 1 if REGISTRY[name].answers == "pixel" else 2
    network = Network(name=name)
    module = build(network, outputs, 1, size=side, seed=1, depth=5 if depth else None).double()
    cohort, bags = cohort_of(SIZES, side, depth=depth)
    if REGISTRY[name].answers == "pixel":
        cohort = segmented(cohort)
    exact = loop(module, cohort, bags)
    for engine in ENGINES:
        patients = PatientGradSampleModule(module, task_of(cohort), engine=engine)
        patients.fill_grad_samples(cohort, bags)
        weights = [weight for weight in module.parameters() if weight.requires_grad]
        rows = torch.cat([w.grad_sample.flatten(1) for w in weights], dim=1)  # type: ignore[attr-defined]
        patients.to_standard_module()
        for row, wanted in zip(rows, exact, strict=True):
            assert close(row, wanted), engine


def test_a_head_on_features_equals_the_float64_loop_in_each_engine() -> None:
    cohort, bags = cohort_of(SIZES, 16)
    module = nn.Sequential(nn.Flatten(), nn.Linear(256, 2)).double()
    exact = loop(module, cohort, bags)
    for engine in ENGINES:
        patients = PatientGradSampleModule(module, task_of(cohort), engine=engine)
        patients.fill_grad_samples(cohort, bags)
        weights = list(module.parameters())
        rows = torch.cat([w.grad_sample.flatten(1) for w in weights], dim=1)  # type: ignore[attr-defined]
        patients.to_standard_module()
        for row, wanted in zip(rows, exact, strict=True):
            assert close(row, wanted), engine
