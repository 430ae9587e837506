"""The interface of a task, and the table ``target`` of the study that names one."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol, TypeAlias, get_args

from cloister_fl.networks.spec import Answers
from cloister_fl.system.toml import VariantModel

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from cloister_fl.metrics.figures import Metrics

    Floats: TypeAlias = NDArray[np.float64]
    Integers: TypeAlias = NDArray[np.int64]

    Move: TypeAlias = Callable[[NDArray[Any]], NDArray[Any]]
    """Moves an array of (images, S, S) as augmentation moved the images themselves."""


@dataclass(frozen=True)
class LabelsFile:
    """Targets that stand in the site's labels file.

    Attributes:
        columns: the columns that are read, in the order in which ``Task.record`` gets their cells.
    """

    columns: tuple[str, ...]


@dataclass(frozen=True)
class Segmentations:
    """Targets that stand in the DICOM Segmentations (PS3.3 A.51) beside the images.

    Attributes:
        segment: name of the segment that counts; see ``segment_name``.
    """

    segment: str


Source: TypeAlias = LabelsFile | Segmentations
"""Where a site finds the targets of its images."""


Unit: TypeAlias = Literal["patient", "examination", "image"]
"""What has a label of its own and is measured. The unit of privacy is the patient, always."""


DEFAULT_KIND = "classification"
"""The kind of a study that names none."""


class Target(VariantModel):
    """The table ``target`` of a study: the kind of the task and what that kind asks for."""

    kind: str
    """The kind of the task, one of ``KINDS``."""

    @property
    @abstractmethod
    def task(self) -> Task:
        """The task that the table describes."""
        raise NotImplementedError

    @classmethod
    def model_of(cls, given: object) -> type[Target]:
        """The model that judges a table, for hints; this one where the kind is not known."""
        named = given.get("kind", DEFAULT_KIND) if isinstance(given, Mapping) else None
        for each in cls.__subclasses__():
            if named in get_args(each.model_fields["kind"].annotation):
                return each
        return cls


class Task(Protocol):
    """What a study predicts. A task is immutable, comparable and hashable, and does no I/O.

    Three values describe a target. A **record** is what one row of the labels file says, or the
    mask of one image. **Targets** are the records of all images in one array, (N, ...). A
    **label** is a whole number that a patient has: the index into ``strata``.

    A **row** is what a model's answers for all images of one patient come to: a float64 vector.

    Attributes:
        kind: what a study writes as ``target.kind``.
        dimensions: of the input that the task is offered for: 2, 3 or both.
        answers: whether the network answers for each image or for each pixel.
        chance: value of the headline for a model that knows nothing; None where there is none.
        counted_by: what patients are counted by where figures are summed over sites.
    """

    kind: ClassVar[str]
    dimensions: ClassVar[frozenset[int]]
    answers: ClassVar[Answers]
    chance: ClassVar[float | None]
    counted_by: ClassVar[str]

    @property
    @abstractmethod
    def figures(self) -> tuple[str, ...]:
        """Names of what is measured, see ``metrics.figures``; the first is the headline."""

    @property
    def headline(self) -> str:
        """Name of the figure that is told first."""
        return self.figures[0]

    @property
    def unit(self) -> Unit:
        """What has a label of its own: rows, labels and counts are of such units."""
        return "patient"

    # What a site reads.

    @property
    @abstractmethod
    def source(self) -> Source:
        """Where a site finds the targets."""

    @property
    @abstractmethod
    def strata(self) -> tuple[str, ...]:
        """What a patient's label may be, in words; the label is the index."""

    @property
    @abstractmethod
    def needed(self) -> tuple[int, ...]:
        """Labels of which a site must have patients; with two or more, of at least two."""

    @property
    def segment_read(self) -> str:
        """Segment that DICOM Segmentations are read for; empty where none is read."""
        return self.source.segment if isinstance(self.source, Segmentations) else ""

    @property
    @abstractmethod
    def described(self) -> str:
        """The target as text, for whoever approves the study."""

    @abstractmethod
    def record(self, cells: Sequence[str]) -> Hashable:
        """Read a row of the labels file.

        Args:
            cells: the row's cells of ``source.columns``, without white space around them; none
                is empty.

        Raises:
            ValueError: the row is refused; the message is a clause about the line, such as "has a
                class that the study does not name", and repeats nothing of the row.
        """

    @property
    @abstractmethod
    def allowed(self) -> str:
        """What a cell of the labels file may say, in a sentence; empty where there is no file."""

    def token(self, record: Any) -> str:
        """A record as text, equal for equal records: what frozen data keep a keyed hash of."""
        return str(record)

    def overlay(self, target: NDArray[Any]) -> NDArray[np.uint8] | None:
        """What to draw over an image for a person, uint8 (S, S) of 0 and 1, or None."""
        return None

    @abstractmethod
    def label(self, records: Sequence[Any]) -> int:
        """The label of a unit, from the records of all its images, one or more. Of a patient with
        several units it is what ``data.cohort.split`` divides patients by."""

    @abstractmethod
    def stack(self, records: Sequence[Any]) -> NDArray[Any]:
        """The records of all images as one array, (N, ...); None stands for a missing one, which
        is a fault of the data and never trained on."""

    # What is learnt.

    @property
    @abstractmethod
    def outputs(self) -> int:
        """Width of the network's last layer, or its channels."""

    @abstractmethod
    def tensor(self, targets: NDArray[Any], move: Move) -> Tensor:
        """The targets of some images, (N, ...), as ``losses`` takes them; ``move`` is for targets
        that have a place in the image."""

    @abstractmethod
    def example(self, images: Tensor) -> Tensor:
        """Return arbitrary targets for (N, channels, ...) images, as ``losses`` takes them, for
        trials of a network."""

    @abstractmethod
    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """One loss an image, (N,): each a function of that image and its target alone. A patient's
        loss is the mean over the patient's images."""

    # What a model is measured by.

    @abstractmethod
    def answer(self, logits: Tensor) -> Tensor:
        """What the network says of each image: probabilities (N, K), or a mask (N, S, S)."""

    @property
    @abstractmethod
    def columns(self) -> tuple[str, ...]:
        """Names of the numbers that ``answer`` gives for an image; none where it gives a mask."""

    @property
    def called(self) -> tuple[str, ...]:
        """The classes that a patient may be called, one for each of ``columns``, whose number is
        the class's probability; none where the numbers are no classes'."""
        return ()

    @abstractmethod
    def row(self, answers: NDArray[Any], targets: NDArray[Any]) -> Floats:
        """One patient's row, (R,), from the answers and the targets of the patient's images."""

    @abstractmethod
    def measure(self, labels: Integers, rows: Floats) -> Metrics:
        """Measure patients exactly: labels (P,) and rows (P, R)."""

    def measure_units(self, labels: Integers, rows: Floats, patients: Integers) -> Metrics:
        """Measure units exactly, with intervals by patient; where a unit is a patient, as
        ``measure``. A task whose ``unit`` is another says how.

        Args:
            labels: (U,) of the units.
            rows: (U, R).
            patients: (U,) which patient each is of.
        """
        return self.measure(labels, rows)

    @abstractmethod
    def counts_shape(self, bins: int) -> tuple[int, ...]:
        """Shape of ``count``."""

    @abstractmethod
    def count(self, label: int, row: Floats, bins: int) -> Integers:
        """What one patient adds to the sums over patients, of ``counts_shape(bins)``.

        It never raises, whatever the row: a refusal that depends on data would be a release.
        """

    @property
    @abstractmethod
    def sensitivity(self) -> float | None:
        """Largest L2 norm of ``count``, over all labels, rows and numbers of bins: how far one
        patient more or less moves the sum. None where no noised evaluation is offered."""

    @abstractmethod
    def measure_counts(self, counts: NDArray[Any], noise: float = 0.0) -> Metrics:
        """Measure patients by sums of ``count``.

        Args:
            counts: of ``counts_shape``, in patients; with noise they may be below zero.
            noise: standard deviation of the noise in each number, in patients.
        """

    # What people are told.

    @property
    @abstractmethod
    def question(self) -> str:
        """What the network is to do, such as "tell the classes apart", to follow "Can it"."""

    @property
    @abstractmethod
    def figures_told(self) -> str:
        """What the figures mean, in a few sentences."""

    @property
    @abstractmethod
    def counts_told(self) -> str:
        """What an evaluation counts of a site's patients, to follow "how many of them got"."""

    @abstractmethod
    def told(self, value: float) -> str:
        """The headline figure in a sentence or two, for a reader of the report."""


def bin_of(score: float, bins: int) -> int:
    """The bin of a score over [0, 1]; what is no number from 0 to 1 falls into the first."""
    return min(int(score * bins), bins - 1) if 0 <= score <= 1 else 0
