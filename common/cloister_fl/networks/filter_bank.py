"""A fixed bank of oriented filters under a small trainable head.

Features that need no training cost no privacy: under a tight budget, hand-made ones beat learned
ones (Tramer and Boneh 2021). Each filter is a second derivative of a Gaussian along one
orientation (Freeman and Adelson 1991), so it answers to bright ridges and blobs of its scale. The
answers of one scale are sorted over the orientations: a blob answers in all of them, a ridge in
one, whichever way it lies. The filters are constants of this file; nothing of them is learned.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

SCALES = (1.2, 1.8, 2.6)
"""Standard deviations of the Gaussians, in pixels of the network's input."""
ORIENTATIONS = 4
_SIDE = 13
_GAIN = 3.0
"""Brings the answers to images of the usual contrast to the order of 1."""


def filters() -> Tensor:
    """The bank, (scales x orientations, 1, 13, 13); each filter sums to 0, its magnitudes to 2."""
    places = torch.arange(_SIDE, dtype=torch.float64) - _SIDE // 2
    y, x = torch.meshgrid(places, places, indexing="ij")
    bank = []
    for scale in SCALES:
        gauss = torch.exp(-(x**2 + y**2) / (2 * scale**2))
        for step in range(ORIENTATIONS):
            angle = math.pi * step / ORIENTATIONS
            along = x * math.cos(angle) + y * math.sin(angle)
            ridge = (1 - along**2 / scale**2) * gauss
            ridge = ridge - ridge.mean()
            bank.append(2 * ridge / ridge.abs().sum())
    return torch.stack(bank).unsqueeze(1).float()


class FilterBank(nn.Module):
    """(batch, 1, S, S) to (batch, outputs) logits; the first class's logit is always 0.

    A class fewer to weigh says the same (softmax does not see a shift) with half the noise.

    Args:
        outputs: number of classes, 2 or more.
        width: channels of the head's hidden layer, a multiple of 4.
    """

    def __init__(self, outputs: int, *, width: int = 32) -> None:
        super().__init__()
        self.bank = nn.Parameter(filters(), requires_grad=False)
        self.mix = nn.Conv2d(len(SCALES) * ORIENTATIONS, width, 1)
        self.norm = nn.GroupNorm(4, width)
        self.last = nn.Linear(width, outputs - 1)

    @property
    def fixed(self) -> str:
        """Names the filters."""
        return "filter-bank 1"

    def features(self, images: Tensor) -> Tensor:
        """What no training changes: (batch, 1, S, S) to (batch, 12, S // 4, S // 4)."""
        edge = _SIDE // 2
        padded = F.pad(images, [edge, edge, edge, edge], mode="replicate")
        answers = F.conv2d(padded, self.bank, stride=2) * _GAIN
        batch, _, rows, columns = answers.shape
        by_scale = answers.reshape(batch, len(SCALES), ORIENTATIONS, rows, columns)
        ordered = by_scale.sort(dim=2).values.reshape(batch, -1, rows, columns)
        return F.max_pool2d(ordered, 2)

    def head(self, features: Tensor) -> Tensor:
        """What is trained: features to logits, by the strongest answer anywhere."""
        mixed = F.relu(self.norm(self.mix(features)))
        return F.pad(self.last(mixed.amax(dim=(2, 3))), (1, 0))

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.features(images))
