"""A U-Net without batch statistics (Ronneberger et al. 2015), small enough for patients' noise.

It differs from the paper's where privacy or a small machine ask for it: GroupNorm after each
convolution, strides in the place of pooling, nearest-neighbour enlargement in the place of
transposed convolutions, zero padding so that the mask has the image's size, and an eighth of
the width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 4


class UNet(nn.Module):
    """Four levels of two 3 x 3 convolutions each, down and up again.

    Args:
        outputs: logits a pixel.
        in_channels: channels of the input.
        width: channels of the first level, a multiple of 4; each level has twice as many.

    Its forward takes (batch, in_channels, S, S) to logits (batch, outputs, S, S), for S of 16 or
    more, also where it is no multiple of 8.
    """

    def __init__(self, outputs: int, in_channels: int = 1, *, width: int = 8) -> None:
        super().__init__()
        channels = [width << level for level in range(_LEVELS)]
        before = [in_channels, *channels]
        self.down = nn.ModuleList(
            _level(before[level], channels[level], stride=1 if level == 0 else 2)
            for level in range(_LEVELS)
        )
        self.up = nn.ModuleList(
            _level(channels[level + 1] + channels[level], channels[level])
            for level in reversed(range(_LEVELS - 1))
        )
        self.head = nn.Conv2d(width, outputs, 1)

    def forward(self, images: Tensor) -> Tensor:
        maps = images
        seen: list[Tensor] = []
        for level in self.down:
            maps = level(maps)
            seen.append(maps)
        for level, beside in zip(self.up, reversed(seen[:-1]), strict=True):
            larger = F.interpolate(maps, size=beside.shape[-2:], mode="nearest")
            maps = level(torch.cat([larger, beside], dim=1))
        logits: Tensor = self.head(maps)
        return logits


def _level(channels: int, width: int, stride: int = 1) -> nn.Sequential:
    layers: list[nn.Module] = []
    for given, step in ((channels, stride), (width, 1)):
        layers += [
            nn.Conv2d(given, width, 3, stride=step, padding=1, bias=False),
            nn.GroupNorm(width // 4, width),
            nn.ReLU(),
        ]
    return nn.Sequential(*layers)
