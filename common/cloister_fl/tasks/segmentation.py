"""Segmentation: each image has a mask, which stands in a DICOM Segmentation."""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, Field

from cloister_fl.networks.spec import Answers
from cloister_fl.system.text import segment_name
from cloister_fl.tasks.task import Segmentations, Source, Target, Task, bin_of

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from cloister_fl.metrics.figures import Metrics
    from cloister_fl.tasks.task import Floats, Integers, Move

UNMARKED = "nothing marked"
"""What the label of a patient says in whom nothing is marked."""

_SMOOTH = 1.0
"""Pixels added to both sides of the Dice ratio: an empty mask that is predicted has no loss."""


def _named(text: str) -> str:
    name = segment_name(text)
    if not name:
        raise ValueError("is needed for kind = 'segmentation'.")
    return name


class SegmentationTarget(Target):
    """A segment of the images' DICOM Segmentations; no labels file is read."""

    kind: Literal["segmentation"]
    segment: Annotated[str, Field(max_length=64), AfterValidator(_named)]
    """What is marked, as ``segment_name``. A segment counts whose Segment Label (0062,0005) this
    is, or the meaning of whose property type; case does not matter, and several in one file are
    united."""

    @property
    def task(self) -> Segmentation:
        return Segmentation(self.segment)


@dataclass(frozen=True)
class Segmentation(Task):
    """One mask an image.

    Targets are uint8 (N, S, S), 1 where something is marked. A patient's label is whether anything
    is marked in any image; the row is the Dice coefficient over the pixels of all images, (1,).
    Counted are patients by Dice coefficient, without and with something marked: (1, 2, bins).

    Attributes:
        segment: what is marked.
    """

    segment: str

    kind: ClassVar[str] = "segmentation"
    dimensions: ClassVar[frozenset[int]] = frozenset((2,))
    answers: ClassVar[Answers] = "pixel"
    # A mask that is met half is no chance.
    chance: ClassVar[float | None] = None
    counted_by: ClassVar[str] = "Dice coefficient"

    @property
    def figures(self) -> tuple[str, ...]:
        return ("dice",)

    @property
    def source(self) -> Source:
        return Segmentations(self.segment)

    @property
    def strata(self) -> tuple[str, ...]:
        return UNMARKED, self.segment

    @property
    def needed(self) -> tuple[int, ...]:
        # Patients in whom nothing is marked are welcome, and nothing asks for them.
        return (1,)

    @property
    def described(self) -> str:
        return f"segmentation masks of '{self.segment}' in DICOM Segmentations"

    def record(self, cells: Sequence[str]) -> Hashable:
        raise ValueError("has no place in a study of masks")

    @property
    def allowed(self) -> str:
        return ""

    def token(self, record: Any) -> str:
        return hashlib.sha256(record.tobytes()).hexdigest()

    def overlay(self, target: NDArray[Any]) -> NDArray[np.uint8] | None:
        return target

    def label(self, records: Sequence[Any]) -> int:
        return int(any(one.any() for one in records))

    def stack(self, records: Sequence[Any]) -> NDArray[Any]:
        import numpy as np

        size = next((one.shape for one in records if one is not None), (1, 1))
        return np.stack([np.zeros(size, np.uint8) if one is None else one for one in records])

    @property
    def outputs(self) -> int:
        return 1

    def tensor(self, targets: NDArray[Any], move: Move) -> Tensor:
        import torch

        return torch.from_numpy(move(targets).astype("float32")).unsqueeze(1)

    def example(self, images: Tensor) -> Tensor:
        return (images[:, :1] > 0).to(images.dtype)

    def losses(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Cross entropy of each pixel plus soft Dice.

        Cross entropy alone is content with an empty mask where what is sought is small; soft Dice
        (Milletari et al. 2016) is not, and their sum is the usual loss (Isensee et al. 2021). Both
        are a mean or a ratio within one image, so that an image's loss depends on no other.

        Args:
            logits: (N, 1, S, S).
            targets: (N, 1, S, S) of 0 and 1.
        """
        import torch
        import torch.nn.functional as F

        targets = targets.to(logits.dtype)
        crossed = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
        shown, marked = torch.sigmoid(logits).flatten(1), targets.flatten(1)
        both = (shown * marked).sum(dim=1)
        dice = (2 * both + _SMOOTH) / (shown.sum(dim=1) + marked.sum(dim=1) + _SMOOTH)
        return crossed.flatten(1).mean(dim=1) + (1 - dice)

    def answer(self, logits: Tensor) -> Tensor:
        return logits[:, 0] >= 0

    @property
    def columns(self) -> tuple[str, ...]:
        return ()

    def row(self, answers: NDArray[Any], targets: NDArray[Any]) -> Floats:
        import numpy as np

        from cloister_fl.metrics.dice import coefficient

        # Images without a mask have one empty pixel each, see ``stack``.
        marked = np.broadcast_to(targets == 1, answers.shape)
        return np.array([coefficient(marked, answers)])

    def measure(self, labels: Integers, rows: Floats) -> Metrics:
        from cloister_fl.metrics.dice import measure_dice

        return measure_dice(labels, rows[:, 0])

    def counts_shape(self, bins: int) -> tuple[int, ...]:
        return 1, 2, bins

    def count(self, label: int, row: Floats, bins: int) -> Integers:
        import numpy as np

        table = np.zeros(self.counts_shape(bins), np.int64)
        table[0, int(label == 1), bin_of(float(row[0]), bins)] = 1
        return table

    @property
    def sensitivity(self) -> float | None:
        return None

    def measure_counts(self, counts: NDArray[Any], noise: float = 0.0) -> Metrics:
        from cloister_fl.metrics.dice import measure_dice_histogram

        if noise > 0:
            raise ValueError("A segmentation has no noised evaluation.")
        return measure_dice_histogram(counts[0])

    @property
    def question(self) -> str:
        return f"segment “{self.segment}”"

    @property
    def figures_told(self) -> str:
        return (
            "Dice: mean over patients in whom something is marked of twice the pixels in common "
            "over the pixels of both."
        )

    @property
    def counts_told(self) -> str:
        return "which Dice coefficient, without and with something marked (a histogram)"

    def told(self, value: float) -> str:
        return (
            "The Dice coefficient says how well the model's mask and the marked one cover each "
            "other, over all images of a patient: 0 for nothing in common, 1 for the same. It is "
            f"the mean over patients in whom “{self.segment}” is marked."
        )
