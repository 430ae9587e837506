"""The toy of docs/guides/add-a-task.md: a grade from 0 to a public highest one."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from cloister_fl.networks.spec import Answers
from cloister_fl.tasks import LabelsFile, Target, Task
from cloister_fl.tasks.classification import Classification
from cloister_fl.tasks.task import Source

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    from cloister_fl.metrics.figures import Metrics
    from cloister_fl.tasks.task import Floats, Integers, Move


class SeverityTarget(Target):
    """A column of grades; patients from ``severe`` on are told from the others."""

    kind: Literal["severity"]
    column: Annotated[str, Field(min_length=1, max_length=128)]
    highest: Annotated[int, Field(ge=1, le=100)]
    severe: Annotated[int, Field(ge=1, le=100)]

    @property
    def task(self) -> Severity:
        return Severity(self.column, self.highest, self.severe)


@dataclass(frozen=True)
class Severity(Task):
    """One grade a patient, a whole number; figures and counts are those of severe or not."""

    column: str
    highest: int
    severe: int

    kind: ClassVar[str] = "severity"
    dimensions: ClassVar[frozenset[int]] = frozenset((2, 3))
    answers: ClassVar[Answers] = "image"
    chance: ClassVar[float | None] = 0.5
    counted_by: ClassVar[str] = "score"

    @property
    def _two(self) -> Classification:
        return Classification(self.column, self.strata)

    @property
    def source(self) -> Source:
        return LabelsFile((self.column,))

    @property
    def strata(self) -> tuple[str, ...]:
        return f"below {self.severe}", f"{self.severe} or more"

    @property
    def needed(self) -> tuple[int, ...]:
        return (0, 1)

    @property
    def described(self) -> str:
        return f"grade '{self.column}' (0 to {self.highest})"

    @property
    def allowed(self) -> str:
        return f"A grade is a whole number from 0 to {self.highest}."

    def record(self, cells: Sequence[str]) -> Hashable:
        if not cells[0].isascii() or not cells[0].isdecimal() or int(cells[0]) > self.highest:
            raise ValueError("has a grade that is out of range")
        return int(cells[0])

    def label(self, records: Sequence[Any]) -> int:
        return int(records[0] >= self.severe)

    def stack(self, records: Sequence[Any]) -> NDArray[Any]:
        import numpy as np

        return np.array([0 if one is None else one for one in records], np.float32)

    @property
    def outputs(self) -> int:
        return 1

    def tensor(self, targets: NDArray[Any], move: Move) -> Tensor:
        import torch

        return torch.from_numpy(targets / self.highest).float()

    def example(self, images: Tensor) -> Tensor:
        import torch

        return torch.arange(len(images)) % 2.0

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        return (logits[:, 0].sigmoid() - targets).square()

    def answer(self, logits: Tensor) -> Tensor:
        return logits.double().sigmoid()

    @property
    def columns(self) -> tuple[str, ...]:
        return ("grade_as_a_share",)

    def row(self, answers: NDArray[Any], targets: NDArray[Any]) -> Floats:
        import numpy as np

        mean = answers.mean()
        return np.array([1 - mean, mean])

    @property
    def figures(self) -> tuple[str, ...]:
        return self._two.figures

    def measure(self, labels: Integers, rows: Floats) -> Metrics:
        return self._two.measure(labels, rows)

    def counts_shape(self, bins: int) -> tuple[int, ...]:
        return 1, 2, bins

    def count(self, label: int, row: Floats, bins: int) -> Integers:
        return self._two.count(label, row, bins)

    @property
    def sensitivity(self) -> float | None:
        return 1.0

    def measure_counts(self, counts: NDArray[Any], noise: float = 0.0) -> Metrics:
        return self._two.measure_counts(counts, noise)

    @property
    def question(self) -> str:
        return f"tell the grade “{self.column}”"

    @property
    def figures_told(self) -> str:
        return (
            f"All figures are of patients with a grade of {self.severe} or more, by the grade told."
        )

    @property
    def counts_told(self) -> str:
        return "which grade told, by severe or not (a histogram)"

    def told(self, value: float) -> str:
        pairs = round(100 * value)
        return f"Of a severe and another patient, the model ranks {pairs} in 100 pairs rightly."
