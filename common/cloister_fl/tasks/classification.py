"""Classification: each patient, examination or image has one of K classes of the labels file."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from cloister_fl.networks.spec import Answers
from cloister_fl.tasks.task import LabelsFile, Source, Target, Task, Unit, bin_of

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cloister_fl.metrics.figures import Metrics
    from cloister_fl.tasks.task import Floats, Integers, Move


def _as_read(name: str) -> str:
    """A class as it is compared with a cell of the labels file, which has no white space around and
    is composed: one keyboard types a letter, another a letter and its dots."""
    return unicodedata.normalize("NFC", name.strip())


def _distinct(words: tuple[str, ...]) -> tuple[str, ...]:
    read = [_as_read(word) for word in words]
    if not all(read):
        raise ValueError("names a class without a letter.")
    for place, name in enumerate(read):
        if name in read[:place]:
            raise ValueError(f"names {name!r} twice; white space around a class does not count.")
    return words


_Word = Annotated[str, Field(min_length=1, max_length=128)]
Words = Annotated[tuple[_Word, ...], Field(strict=False), AfterValidator(_distinct)]


class ClassificationTarget(Target):
    """A column of the labels file and its classes."""

    kind: Literal["classification"] = "classification"
    column: Annotated[str, Field(min_length=1, max_length=128)]
    classes: Annotated[Words, Field(min_length=2, max_length=64)]
    """The first class is the reference ("negative") of a binary target."""
    unit: Unit = "patient"
    """What has a class of its own, and is measured: a patient; an examination, which is what has
    one Accession Number, or one Study Instance UID where there is none; or an image. The unit of
    privacy is the patient, always."""

    @property
    def task(self) -> Classification:
        return Classification(self.column, self.classes, self.unit)


@dataclass(frozen=True)
class Classification(Task):
    """One class a unit, which is a patient unless the study says another.

    Targets are int64 (N,), the index of each image's class. A unit's row is the mean
    probability of each class over its images, (K,). Counted are score histograms, one curve for a
    binary target (of the second class), else one a class against the rest: (curves, 2, bins), the
    units without and with the class, by score.

    Attributes:
        column: of the labels file.
        classes: K names, two or more.
        labelled: what has a class of its own.
    """

    column: str
    classes: tuple[str, ...]
    labelled: Unit = "patient"

    kind: ClassVar[str] = "classification"
    dimensions: ClassVar[frozenset[int]] = frozenset((2, 3))
    answers: ClassVar[Answers] = "image"
    chance: ClassVar[float | None] = 0.5
    counted_by: ClassVar[str] = "score"

    @property
    def figures(self) -> tuple[str, ...]:
        from cloister_fl.metrics.figures import of_classes

        return of_classes()

    @property
    def unit(self) -> Unit:
        return self.labelled

    @property
    def source(self) -> Source:
        return LabelsFile((self.column,))

    @property
    def strata(self) -> tuple[str, ...]:
        return self.classes

    @property
    def needed(self) -> tuple[int, ...]:
        return tuple(range(len(self.classes)))

    @property
    def described(self) -> str:
        whose = "" if self.unit == "patient" else f" of each {self.unit}"
        return f"label '{self.column}'{whose} ({', '.join(self.classes)})"

    def record(self, cells: Sequence[str]) -> Hashable:
        for index, name in enumerate(self.classes):
            if _as_read(cells[0]) == _as_read(name):
                return index
        raise ValueError("has a class that the study does not name")

    @property
    def allowed(self) -> str:
        return f"Classes are: {', '.join(self.classes)}."

    def label(self, records: Sequence[Any]) -> int:
        # Those of a unit are equal. Of a patient with several units, the class named last.
        return int(max(records))

    def stack(self, records: Sequence[Any]) -> NDArray[Any]:
        import numpy as np

        # A missing one is 0: it is a fault already, and the array needs a number.
        return np.array([0 if one is None else one for one in records], np.int64)

    @property
    def outputs(self) -> int:
        return len(self.classes)

    def tensor(self, targets: NDArray[Any], move: Move) -> Tensor:
        import torch

        return torch.from_numpy(targets.astype("int64"))

    def example(self, images: Tensor) -> Tensor:
        import torch

        return torch.arange(len(images)) % self.outputs

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy."""
        import torch.nn.functional as F

        return F.cross_entropy(logits, targets, reduction="none")

    def answer(self, logits: Tensor) -> Tensor:
        return logits.double().softmax(dim=1)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(f"score_{name}" for name in self.classes)

    @property
    def called(self) -> tuple[str, ...]:
        return self.classes

    def row(self, answers: NDArray[Any], targets: NDArray[Any]) -> Floats:
        mean: Floats = answers.mean(axis=0)
        return mean

    def measure(self, labels: Integers, rows: Floats) -> Metrics:
        from cloister_fl.metrics.classification import measure

        return measure(labels, rows)

    def measure_units(self, labels: Integers, rows: Floats, patients: Integers) -> Metrics:
        from cloister_fl.metrics.classification import measure

        return measure(labels, rows, patients)

    @property
    def _counted(self) -> tuple[int, ...]:
        """The classes that have a curve."""
        return (1,) if len(self.classes) == 2 else tuple(range(len(self.classes)))

    def counts_shape(self, bins: int) -> tuple[int, ...]:
        return len(self._counted), 2, bins

    def count(self, label: int, row: Floats, bins: int) -> Integers:
        import numpy as np

        table = np.zeros(self.counts_shape(bins), np.int64)
        for curve, each in enumerate(self._counted):
            table[curve, int(label == each), bin_of(float(row[each]), bins)] = 1
        return table

    @property
    def sensitivity(self) -> float | None:
        """A unit counts 1 in one cell of each curve: sqrt(curves) in L2."""
        return math.sqrt(len(self._counted))

    def measure_counts(self, counts: NDArray[Any], noise: float = 0.0) -> Metrics:
        if noise > 0 or self.unit != "patient":
            # Parts of patients are no whole numbers.
            from cloister_fl.metrics.noisy import measure_noised

            return measure_noised(counts, noise)
        from cloister_fl.metrics.classification import measure_histograms

        return measure_histograms(counts)

    @property
    def question(self) -> str:
        return (
            f"tell the {len(self.classes)} classes of “{self.column}” apart "
            f"({', '.join(self.classes)})"
        )

    @property
    def figures_told(self) -> str:
        from cloister_fl.metrics.figures import CALLED_TOLD

        return (
            f"AUROC: chance of ranking a pair of {self.unit}s correctly. Average precision: mean "
            "precision over all recalls; compare it with the share of the class among the "
            f"{self.unit}s. Balanced accuracy: mean share of {self.unit}s called correctly, over "
            f"the classes; {CALLED_TOLD}"
        )

    @property
    def counts_told(self) -> str:
        return "which score, by class (a score histogram)"

    def told(self, value: float) -> str:
        if len(self.classes) > 2:
            return (
                f"AUROC is averaged over the {len(self.classes)} classes, each against the others: "
                "0.5 is a coin's, 1 is perfect."
            )
        return (
            f"Take two {self.unit}s at random, one whose label is “{self.classes[1]}” and one "
            f"whose label is “{self.classes[0]}”: the model ranks them correctly about "
            f"{round(100 * value)} times in 100. A coin would do so 50 times."
        )
