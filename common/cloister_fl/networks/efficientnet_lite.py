"""EfficientNet-Lite0 (Tan and Le 2019; Google's Lite variant, 2020) as far as its features.

Lite leaves out squeeze-and-excitation and uses ReLU6. The layers carry the names of the published
PyTorch weights, and pad as TensorFlow does ("same"), where those weights come from.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

WIDTH = 1280
"""Length of a feature vector."""

# Repeats, kernel, stride, expansion, input and output channels: table 1 of the paper.
_STAGES = (
    (1, 3, 1, 1, 32, 16),
    (2, 3, 2, 6, 16, 24),
    (2, 5, 2, 6, 24, 40),
    (3, 3, 2, 6, 40, 80),
    (3, 5, 1, 6, 80, 112),
    (4, 5, 2, 6, 112, 192),
    (1, 3, 1, 6, 192, 320),
)
_EPSILON = 1e-3


class _Same(nn.Conv2d):
    """A convolution whose output has ceil(side / stride) places; the odd padding comes last."""

    def __init__(self, channels: int, out: int, kernel: int, stride: int = 1, groups: int = 1):
        super().__init__(channels, out, kernel, stride, groups=groups, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        kernel, stride = self.kernel_size[0], self.stride[0]
        pads: list[int] = []
        for side in (x.shape[-1], x.shape[-2]):
            total = max((-(-side // stride) - 1) * stride + kernel - side, 0)
            pads += [total // 2, total - total // 2]
        return super().forward(F.pad(x, pads) if any(pads) else x)


class _Block(nn.Module):
    """An inverted residual bottleneck (Sandler et al. 2018)."""

    def __init__(self, kernel: int, stride: int, expansion: int, channels: int, out: int) -> None:
        super().__init__()
        inner = channels * expansion
        self.expands, self.adds = expansion > 1, stride == 1 and channels == out
        if self.expands:
            self._expand_conv = _Same(channels, inner, 1)
            self._bn0 = nn.BatchNorm2d(inner, eps=_EPSILON)
        self._depthwise_conv = _Same(inner, inner, kernel, stride, groups=inner)
        self._bn1 = nn.BatchNorm2d(inner, eps=_EPSILON)
        self._project_conv = _Same(inner, out, 1)
        self._bn2 = nn.BatchNorm2d(out, eps=_EPSILON)

    def forward(self, x: Tensor) -> Tensor:
        inner = F.relu6(self._bn0(self._expand_conv(x)), inplace=True) if self.expands else x
        inner = F.relu6(self._bn1(self._depthwise_conv(inner)), inplace=True)
        out: Tensor = self._bn2(self._project_conv(inner))
        return out + x if self.adds else out


class EfficientNetLite0(nn.Module):
    """(batch, channels, S, S) to (batch, 1280): the feature maps' means, centred.

    What each map has on the images that the weights were learned from is taken away: a constant
    of the weights, without which most of a feature vector says only that this is an image.
    """

    def __init__(self, in_channels: int = 3) -> None:
        super().__init__()
        self._conv_stem = _Same(in_channels, 32, 3, 2)
        self._bn0 = nn.BatchNorm2d(32, eps=_EPSILON)
        self._blocks = nn.ModuleList(
            _Block(kernel, stride if number == 0 else 1, expansion, channels, out)
            for repeats, kernel, stride, expansion, first, out in _STAGES
            for number, channels in enumerate([first] + [out] * (repeats - 1))
        )
        self._conv_head = _Same(320, WIDTH, 1)
        self._bn1 = nn.BatchNorm2d(WIDTH, eps=_EPSILON)

    def forward(self, images: Tensor) -> Tensor:
        x: Tensor = F.relu6(self._bn0(self._conv_stem(images)), inplace=True)
        for block in self._blocks:
            x = block(x)
        x = F.relu6(self._bn1(self._conv_head(x)), inplace=True)
        return x.mean(dim=(2, 3)) - expected_relu6(self._bn1.bias, self._bn1.weight)


def expected_relu6(mean: Tensor, deviation: Tensor) -> Tensor:
    """Mean of min(max(x, 0), 6) of a Gaussian x, such as what leaves a batch norm.

    Args:
        mean: of x; a batch norm's bias.
        deviation: of x, of either sign but not 0; a batch norm's weight.
    """
    mu, sigma = mean.double(), deviation.double().abs()
    low, high = -mu / sigma, (6 - mu) / sigma
    inside = torch.special.ndtr(high) - torch.special.ndtr(low)
    density = (torch.exp(-(low**2) / 2) - torch.exp(-(high**2) / 2)) / math.sqrt(2 * math.pi)
    result: Tensor = mu * inside + sigma * density + 6 * torch.special.ndtr(-high)
    return result.to(mean.dtype)
