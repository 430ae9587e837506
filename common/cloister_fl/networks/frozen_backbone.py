"""A frozen pretrained network under a trainable linear head.

The backbone is a constant: it is no parameter of this module, so no vector, checkpoint or model
file carries it, and it is read when features are first asked for. A coordinator that only sums
heads needs no weights at all.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloister_fl.networks.pretrained import WIDTHS, Weights, backbone, require

_IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
_NORMALISED = {"efficientnet-lite0": ((127 / 255,) * 3, (128 / 255,) * 3)}
"""Mean and deviation that an architecture's weights were learned with, where not ImageNet's."""


@runtime_checkable
class FixedFeatures(Protocol):
    """A network whose first part no training changes: ``forward(x) = head(features(x))``.

    What comes before the head is computed once an image, and kept.
    """

    @property
    def fixed(self) -> str:
        """Names all that the features depend on but the image."""

    def features(self, images: Tensor) -> Tensor:
        """(batch, 1, S, S) to features, (batch, ...)."""

    def head(self, features: Tensor) -> Tensor:
        """Features to logits, (batch, outputs)."""


class FrozenBackbone(nn.Module):
    """(batch, 1, S, S) to (batch, outputs) logits; the first class's logit is always 0.

    A class fewer to weigh says the same (softmax does not see a shift) with half the noise. The
    head begins at 0, so that no noise has to undo a random start. Each image's features are
    brought to length 1, which bounds a patient's gradient before it is clipped.

    Args:
        weights: the backbone's.
        outputs: number of classes, 2 or more.
    """

    def __init__(self, weights: Weights, outputs: int) -> None:
        super().__init__()
        self._weights = weights
        self.last = nn.Linear(WIDTHS[weights.architecture], outputs - 1)
        nn.init.zeros_(self.last.weight)
        nn.init.zeros_(self.last.bias)

    @property
    def fixed(self) -> str:
        """The architecture and the hash of its weights."""
        return f"{self._weights.architecture} {self._weights.sha256}"

    def require(self) -> None:
        """Refuse, before anything is spent, weights that are not on this machine.

        Raises:
            ExtraMissing, WeightsUnfit: as ``pretrained.require``.
        """
        require(self._weights)

    def features(self, images: Tensor) -> Tensor:
        """What no training changes: (batch, 1, S, S) to (batch, width).

        Raises:
            ExtraMissing, WeightsUnfit: as ``pretrained.backbone``.
        """
        body = backbone(self._weights, str(images.device))
        if body.channels == 3:
            # From -2..2 to 0..1, then as the images were that the weights were learned from.
            of = _NORMALISED.get(self._weights.architecture, _IMAGENET)
            mean, deviation = torch.tensor(of, device=images.device).view(2, 1, 3, 1, 1)
            images = (images * 0.25 + 0.5 - mean) / deviation
        maps: Tensor = body(images)
        return F.normalize(maps, dim=1)

    def head(self, features: Tensor) -> Tensor:
        """What is trained: features to logits."""
        return F.pad(self.last(features), (1, 0))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
