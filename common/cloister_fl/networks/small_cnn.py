"""A small convolutional network without batch statistics, small enough to train in seconds.

With privacy the noise grows with the square root of the number of weights, so few weights, wisely
placed, beat many. The head sees both the mean and the maximum of each feature map: the mean tells
how much of a texture there is, the maximum whether a small thing is anywhere.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class MeanMaxPool(nn.Module):
    """(batch, channels, places...) to (batch, 2 x channels): means, then maxima."""

    def forward(self, maps: Tensor) -> Tensor:
        places = tuple(range(2, maps.ndim))
        return torch.cat([maps.mean(dim=places), maps.amax(dim=places)], dim=1)


class SmallCNN(nn.Module):
    """Four 3 x 3 convolutions with GroupNorm and ReLU, the first three of stride 2.

    Args:
        outputs: number of logits.
        in_channels: channels of the input.
        width: channels of the first layer, a multiple of 4; the later ones have 2, 2 and 3 times
            as many.
    """

    def __init__(self, outputs: int, in_channels: int = 1, *, width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for factor, stride in ((1, 2), (2, 2), (2, 2), (3, 1)):
            layers += [
                nn.Conv2d(channels, factor * width, 3, stride=stride, padding=1, bias=False),
                nn.GroupNorm(factor * width // 4, factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        self.features = nn.Sequential(*layers)
        self.pool = MeanMaxPool()
        self.head = nn.Linear(2 * channels, outputs)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.features(images)))
        return logits


class SmallCNN3D(nn.Module):
    """Four 3 x 3 x 3 convolutions with GroupNorm and ReLU, the first three of stride 2.

    Args:
        outputs: number of logits.
        in_channels: channels of the input, (batch, in_channels, depth, height, width).
        width: channels of the first layer, a multiple of 4; the later ones have 2, 4 and 4 times
            as many.
    """

    def __init__(self, outputs: int, in_channels: int = 1, *, width: int = 12) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = in_channels
        for factor, stride in ((1, 2), (2, 2), (4, 2), (4, 1)):
            layers += [
                nn.Conv3d(channels, factor * width, 3, stride=stride, padding=1, bias=False),
                nn.GroupNorm(factor * width // 4, factor * width),
                nn.ReLU(),
            ]
            channels = factor * width
        self.features = nn.Sequential(*layers)
        self.pool = MeanMaxPool()
        self.head = nn.Linear(2 * channels, outputs)

    def forward(self, volumes: Tensor) -> Tensor:
        logits: Tensor = self.head(self.pool(self.features(volumes)))
        return logits
