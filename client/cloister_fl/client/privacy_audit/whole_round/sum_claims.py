"""Claims about the clipped sum, looked at directly: whole numbers, without noise.

The study's own networks and engines give the gradients, and ``clipped_sum`` what a step adds its
noise to. Leaving one patient out must take from the sum what that patient alone gives, and no more
than the clipping norm, whoever else is there, in whatever order, for any images and any weights.
Nothing of it is left to chance.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cloister_fl.client.data.cohort import Cohort, subset
from cloister_fl.client.privacy_audit.whole_round.audited_studies import changed, small_study
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import (
    WHITE,
    Kind,
    cohort_of,
    kinds_of,
)
from cloister_fl.client.privacy_audit.whole_round.round_reference import Reference
from cloister_fl.client.training.exact_sum import Block, clipped_sum
from cloister_fl.client.training.local_training import trained_part
from cloister_fl.client.training.per_patient_gradients import Engine, PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag
from cloister_fl.errors import CloisterError
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.frozen_backbone import FrozenBackbone
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for

Whole = NDArray[np.int64]

_UNIT = 2.0**30
"""The clipping norm on the grid of the sum."""
_CLOSE = 0.02
"""What a float32 gradient may differ by from one in float64, of the clipping norm: DenseNet-121
comes to 0.003."""
HUGE = 1e22
"""Weights of the last layer that make gradients whose squares are no float32."""
_NETWORKS = (
    ("small-cnn", {"width": 4}, 16),
    ("filter-bank", {"width": 8}, 32),
    ("unet", {"width": 4}, 16),
    ("small-cnn-3d", {"width": 4}, 16),
)


def hostile_model(reference: Reference, size: float) -> NDArray[np.float32]:
    """The first model, with the last matrix of weights ``size`` times as large."""
    model = reference.first.copy()
    matrices = [part for name, part in reference.layers if name.endswith("weight")]
    model[matrices[-1]] *= np.float32(size)
    return model


def judge_synthetic(evidence: Evidence) -> None:
    """Judge ``clipped_sum`` on gradients that are made up: any size, shape and value."""
    generator, clip = np.random.default_rng(0), 0.7
    sizes = [70, 3, 64, 1]
    total = sum(sizes)
    rows = []
    for scale in (0.0, 1e-30, 1e-3, 0.05, 1.0, 1e4, 3e18, 1e20, 1e25, 1e36):
        rows.append(generator.standard_normal(total) * scale)
        spike = np.zeros(total)
        spike[generator.integers(total)] = scale * 10
        rows.append(spike)
    for wrong in (math.inf, -math.inf, math.nan):
        spoiled = generator.standard_normal(total)
        spoiled[generator.integers(total)] = wrong
        rows.append(spoiled)
    gradients = torch.from_numpy(np.stack(rows).astype(np.float32))
    parted = [[part.clone() for part in torch.split(row, sizes)] for row in gradients]
    alone = [_sum([part], total, clip) for part in parted]
    for place, (row, whole) in enumerate(zip(gradients.double().numpy(), alone, strict=True)):
        norm = float(np.linalg.norm(row))
        wanted = row / max(norm, clip) * _UNIT if math.isfinite(norm) else np.zeros(total)
        away = float(np.linalg.norm(whole - wanted)) / _UNIT
        _bounded(evidence, f"made-up gradient {place + 1}", whole)
        evidence.require(
            Claim.SUM,
            f"made-up gradient {place + 1} is clipped as a whole",
            away < 1e-4,
            f"it is {away:.3g} clipping norms away from its clipped value",
        )
    everybody = np.sum(alone, axis=0)
    forms: Sequence[tuple[str, list[Block]]] = (
        ("in one block", [gradients]),
        ("one by one", list(parted)),
        ("in any order", [gradients[torch.randperm(len(gradients))]]),
        ("in blocks and one by one", [gradients[:9], *parted[9:]]),
    )
    for what, blocks in forms:
        same = np.array_equal(_sum(blocks, total, clip), everybody)
        evidence.require(Claim.SUM, f"made-up gradients {what} add up exactly", same)


def judge_networks(evidence: Evidence, models: Path | None = None) -> None:
    """Judge each network of the registry that is small or installed, with both engines."""
    for name, arguments, size in _NETWORKS:
        judge_study(evidence, _study_of(name, arguments, size), models)
    for name in ("resnet18", "densenet121", "efficientnet-lite0"):
        study = _study_of(name, {}, 32)
        try:
            network = build_for(study, models=models)
            if isinstance(network, FrozenBackbone):
                network.require()
        except CloisterError:
            # Its packages or weights are not installed here.
            continue
        # One case: a gradient of theirs takes a quarter of a second.
        judge_study(evidence, study, models, patients=2, engines=("patients",), cases=1)


def _study_of(name: str, arguments: dict[str, int], size: int) -> Study:
    study = small_study(f"sums of {name}".replace(" ", "-"))
    asked: dict[str, Any] = {"size": size}
    if name == "small-cnn-3d":
        asked |= {"dimensions": 3, "depth": 8, "spacing": 5.0, "modalities": ["CT"]}
    more = {}
    if name == "unet":
        more = {"target": {"kind": "segmentation", "segment": "lung"}}
    given = study.model_dump(mode="json")
    given |= {"input": {**given["input"], **asked}, **more}
    given["network"] = {"name": name, "arguments": arguments}
    return Study.model_validate(given)


@dataclass(frozen=True, eq=False)
class _Case:
    """A model and patients whose gradients are looked at."""

    what: str
    model: NDArray[np.float32]
    kinds: Sequence[Kind]


def judge_study(
    evidence: Evidence,
    study: Study,
    models: Path | None = None,
    *,
    patients: int = 20,
    engines: Sequence[Engine] = ("patients", "opacus"),
    cases: int = 2,
) -> None:
    """Judge the clipped sum of a study's network: of single patients, and of all without one.

    Args:
        evidence: where requirements are counted.
        study: its network, input, target and clipping norm.
        models: a folder of pretrained weights, where its network needs them.
        patients: how many there are.
        engines: of ``training.engine``.
        cases: how many of: the first model; huge weights and plain images.
    """
    study = changed(study, training={"augment": False})
    reference = Reference(study, models)
    for engine in engines:
        for case in islice(_cases(study, reference, patients), cases):
            _judge_case(evidence, study, reference, case, engine, models)


def _cases(study: Study, reference: Reference, patients: int) -> Iterator[_Case]:
    kinds = kinds_of(study, patients)
    yield _Case("first model", reference.first, kinds)
    shape = kinds[0].images.shape[1:]
    plain = [np.zeros(shape), np.full(shape, WHITE), np.indices(shape).sum(axis=0) % 2 * WHITE]
    hostile = [
        Kind(image[None].astype(np.uint16), kind.records[:1], kind.label)
        for image, kind in zip(plain, kinds, strict=False)
    ]
    yield _Case("huge weights", hostile_model(reference, HUGE), [*hostile, *kinds[:4]])


def _judge_case(
    evidence: Evidence,
    study: Study,
    reference: Reference,
    case: _Case,
    engine: Engine,
    models: Path | None,
) -> None:
    where = f"{study.network.name}, {engine}, {case.what}"
    cohort = cohort_of(study, case.kinds, [1] * len(case.kinds))
    order = sorted(range(len(case.kinds)), key=lambda place: _same(cohort, case.kinds, place))

    def summed(places: Sequence[int]) -> Whole:
        module = build_for(study, models=models)
        flat_parameters.load(module, case.model)
        some = subset(cohort, [cohort.patients[place] for place in places])
        trained, seen = trained_part(module.train(), some, study.training)
        network = PatientGradSampleModule(trained, study.task, engine=engine)
        bags = [Bag(np.asarray(one.images, np.int64)) for one in some.patients]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return _sum(network.blocks(seen, bags), reference.size, study.privacy.clipping_norm)
        finally:
            network.to_standard_module()

    everyone = range(len(case.kinds))
    whole = summed(everyone)
    weights = case.model.astype(np.float64)
    # The first, one in the middle and the last: a pass of several patients has an edge.
    chosen = sorted({0, len(case.kinds) // 2, len(case.kinds) - 1})
    kinds = [case.kinds[order[place]] for place in chosen]
    wanted = reference.gradients(kinds, weights, study.privacy.clipping_norm)
    for place, gradient in zip(chosen, wanted, strict=True):
        alone = summed([place])
        less = whole - summed([other for other in everyone if other != place])
        _bounded(evidence, f"one patient, {where}", alone)
        _bounded(evidence, f"all less all but one, {where}", less)
        away = float(np.linalg.norm((less - alone).astype(np.float64)))
        evidence.require(
            Claim.APART,
            f"a patient adds the same alone and beside others, {where}",
            away == 0,
            f"the difference is {away / _UNIT:.3g} clipping norms",
        )
        clipped = gradient * _UNIT / study.privacy.clipping_norm
        off = float(np.linalg.norm(alone - clipped)) / _UNIT
        evidence.require(
            Claim.SUM,
            f"a patient's gradient is clipped as a whole, {where}",
            off < _CLOSE,
            f"it is {off:.3g} clipping norms away from its clipped value",
        )
    again = summed(list(reversed(everyone)))
    apart = float(np.linalg.norm((again - whole).astype(np.float64)))
    evidence.require(Claim.APART, f"order does not matter, {where}", apart == 0)


def _same(cohort: Cohort, kinds: Sequence[Kind], place: int) -> int:
    """Where in the cohort the patient of a kind stands."""
    for index, patient in enumerate(cohort.patients):
        if np.array_equal(cohort.images[list(patient.images)], kinds[place].images):
            return index
    raise AssertionError


def _sum(blocks: object, size: int, clip: float) -> Whole:
    found: Whole = clipped_sum(blocks, size, clip).numpy()  # type: ignore[arg-type]
    return found


def _bounded(evidence: Evidence, what: str, whole: Whole) -> None:
    norm = float(np.linalg.norm(whole.astype(np.float64)))
    evidence.require(
        Claim.SUM,
        f"{what} is within the clipping norm",
        norm <= _UNIT,
        f"it moves the sum by {norm / _UNIT:.6g} clipping norms",
    )
