"""Tasks: each keeps the promises of the interface, and a wrong one is caught."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from cloister_fl.errors import StudyInvalid
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import study_from_canonical
from cloister_fl.tasks import KINDS, Task, read_target
from cloister_fl.tasks.classification import Classification
from cloister_fl.tasks.segmentation import Segmentation
from support import studies
from support.task_conformance import check_task, largest_norm

ROOT = Path(__file__).parents[3]
TWO = Classification("finding", ("normal", "nodule"))
FIVE = Classification("grade", ("a", "b", "c", "d", "e"))
LUNGS = Segmentation("lungs")


TRIED: list[Task] = [TWO, FIVE, LUNGS]
"""Tasks that are held to the interface, of each kind one at least."""


@pytest.mark.parametrize("task", TRIED, ids=str)
def test_a_task_keeps_its_promises(task: Task) -> None:
    check_task(task)


def test_every_kind_is_tried() -> None:
    assert {task.kind for task in TRIED} == set(KINDS), "add a task of the kind to TRIED"


# The sensitivity of what is counted


def test_one_patient_of_k_classes_moves_the_histograms_by_the_root_of_k() -> None:
    assert largest_norm(TWO) == TWO.sensitivity == 1.0
    assert largest_norm(FIVE) == FIVE.sensitivity == math.sqrt(5)


@dataclass(frozen=True)
class ClaimsTooLittle(Classification):
    """Counts every class and claims the sensitivity of one."""

    @property
    def sensitivity(self) -> float | None:
        return 1.0


@dataclass(frozen=True)
class CountsWildScoresTwice(Classification):
    """Right for every score that a model should give, wrong for one that is no number."""

    def count(self, label: int, row: np.ndarray, bins: int) -> np.ndarray:
        counted = super().count(label, row, bins)
        return counted if np.isfinite(row).all() else 2 * counted


@pytest.mark.parametrize(
    "task",
    [ClaimsTooLittle("grade", FIVE.classes), CountsWildScoresTwice("finding", TWO.classes)],
    ids=lambda task: type(task).__name__,
)
def test_a_task_with_a_wrong_sensitivity_is_caught(task: Task) -> None:
    with pytest.raises(AssertionError):
        check_task(task)


# Kinds


@pytest.mark.parametrize(
    ("kind", "hint"),
    [
        ("xyzzy", f"Known: {', '.join(KINDS)}."),
        ("clasification", "Did you mean 'classification'?"),
        (7, f"Known: {', '.join(KINDS)}."),
    ],
)
def test_a_study_of_an_unknown_kind_is_refused(kind: object, hint: str) -> None:
    text = studies.study_text(target={"kind": kind})
    with pytest.raises(StudyInvalid) as caught:
        parse_study(text)
    (fault,) = caught.value.faults
    assert (fault.key, fault.message, fault.hint) == ("target.kind", "is no kind of task.", hint)
    assert text.splitlines()[fault.line - 1].startswith("kind = ")
    # Nor does one come in by a message.
    sound = studies.study().canonical()
    with pytest.raises(StudyInvalid):
        study_from_canonical(sound.replace('"kind":"classification"', '"kind":"regression"'))


def test_a_key_of_another_kind_is_told_with_the_keys_of_this_one() -> None:
    target = {"kind": "segmentation", "segment": "lungs", "classes": None}
    text = studies.study_text(target=target, network={"name": "unet"})
    with pytest.raises(StudyInvalid) as caught:
        parse_study(text)
    (fault,) = caught.value.faults
    assert (fault.key, fault.message) == ("target.column", "is not a known key.")
    assert fault.hint == "Known keys here: kind, segment."


LUNGS_TARGET = {"kind": "segmentation", "segment": "lungs", "column": None, "classes": None}


@pytest.mark.parametrize(
    ("tables", "key", "message"),
    [
        (
            {
                "input": {"modalities": ["CT"], "dimensions": 3, "depth": 8, "spacing": 2.0},
                "network": {"name": "small-cnn-3d"},
            },
            "target.kind",
            "cannot be 'segmentation' for input.dimensions = 3.",
        ),
        (
            {"network": {"name": "unet"}, "evaluation": {"release_epsilon": 1.0}},
            "evaluation.release_epsilon",
            "must be 0 for kind = 'segmentation', which has no noised evaluation.",
        ),
    ],
)
def test_what_a_task_is_not_offered_for_is_refused(
    tables: dict[str, dict[str, object]], key: str, message: str
) -> None:
    with pytest.raises(StudyInvalid) as caught:
        parse_study(studies.study_text(target=LUNGS_TARGET, **tables))
    assert (key, message) in [(fault.key, fault.message) for fault in caught.value.faults]


def test_another_record_is_another_token() -> None:
    masks = np.zeros((3, 4, 4), np.uint8)
    masks[2, 0, 0] = 1
    assert LUNGS.token(masks[0]) == LUNGS.token(masks[1]) != LUNGS.token(masks[2])
    assert TWO.token(0) != TWO.token(1)


@pytest.mark.parametrize(
    ("classes", "told"),
    [
        (["no", "no "], "names 'no' twice; white space around a class does not count."),
        (["no", " no", "yes"], "names 'no' twice"),
        (["no", "\N{NO-BREAK SPACE}no"], "names 'no' twice"),
        (["no", "yes", "no"], "names 'no' twice"),
        (["no", " "], "names a class without a letter."),
    ],
)
def test_classes_that_are_read_as_one_are_refused(classes: list[str], told: str) -> None:
    with pytest.raises(StudyInvalid) as caught:
        parse_study(studies.study_text(target={"classes": classes}))
    (fault,) = caught.value.faults
    assert fault.key == "target.classes"
    assert fault.message.startswith(told)


def test_a_class_is_read_without_the_white_space_around_it() -> None:
    assert Classification("finding", (" no", "yes ")).record(["yes"]) == 1


def test_a_target_that_is_no_table_is_refused() -> None:
    with pytest.raises(ValueError, match="must be a table"):
        read_target("classification")


# What is learnt


def test_a_class_is_learnt_by_cross_entropy() -> None:
    logits, targets = torch.randn(5, 5), torch.tensor([0, 4, 2, 1, 1])
    assert torch.equal(
        FIVE.losses(logits, targets), F.cross_entropy(logits, targets, reduction="none")
    )


def test_targets_with_a_place_move_as_the_image_does_and_classes_stay() -> None:
    masks = np.zeros((1, 4, 4), np.uint8)
    masks[0, 0, 0] = 1

    def mirror(array: np.ndarray) -> np.ndarray:
        return array[..., ::-1].copy()

    assert LUNGS.tensor(masks, mirror)[0, 0, 0].tolist() == [0, 0, 0, 1]
    assert TWO.tensor(np.array([1, 0]), mirror).tolist() == [1, 0]


def test_a_mask_is_learnt_by_cross_entropy_and_soft_dice() -> None:
    logits = torch.tensor([[[[2.0, -2.0], [0.0, 0.0]]]])
    targets = torch.tensor([[[[1.0, 0.0], [0.0, 0.0]]]])
    chances = torch.sigmoid(logits)
    crossed = F.binary_cross_entropy(chances, targets)
    dice = (2 * chances[0, 0, 0, 0] + 1) / (chances.sum() + 1 + 1)
    assert LUNGS.losses(logits, targets).item() == pytest.approx((crossed + 1 - dice).item())


# Who knows of kinds


def test_no_other_file_asks_what_kind_of_label_there_is() -> None:
    asks = re.compile(
        r"target\.segment|\boutlines?\b(?!-|:)|dtype == torch\.int64|target\.kind ==|"
        r"masks is (not )?None"
    )
    found = [
        f"{path.relative_to(ROOT)}:{number}"
        for side in ("common", "client", "server")
        for path in (ROOT / side).rglob("*")
        if path.suffix in {".py", ".j2"} and "/tasks/" not in str(path)
        for number, line in enumerate(path.read_text("utf-8").splitlines(), 1)
        if asks.search(line)
    ]
    assert found == []
