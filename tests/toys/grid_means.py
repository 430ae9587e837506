"""Two networks that are not offered: one that treats each patient alone, and one that does not.

What docs/guides/add-a-network.md adds. In the product the module stands in a file of its own in
``networks``, its builder and its entry in ``registry``.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cloister_fl.networks.spec import Argument, Entry


class GridMeans(nn.Module):
    """(batch, in_channels, S, S) to (batch, outputs) logits, from the means of a grid of cells.

    Args:
        outputs: number of logits.
        in_channels: channels of the input.
        cells: cells along each side; S is at least as many.
    """

    def __init__(self, outputs: int, in_channels: int = 1, *, cells: int = 4) -> None:
        super().__init__()
        self.cells = cells
        self.hidden = nn.Linear(in_channels * cells**2, 16)
        self.norm: nn.Module = nn.GroupNorm(4, 16)
        self.head = nn.Linear(16, outputs)

    def forward(self, images: Tensor) -> Tensor:
        means = F.adaptive_avg_pool2d(images, self.cells).flatten(1)
        logits: Tensor = self.head(torch.relu(self.norm(self.hidden(means))))
        return logits


def _grid_means(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    return GridMeans(outputs, in_channels, cells=arguments["cells"])


ENTRY = Entry(
    name="grid-means",
    smallest=16,
    arguments={
        "cells": Argument(4, 1, 16),  # along each side
    },
    builder=_grid_means,
)

NETWORK = """\
[network]
name = "grid-means"
arguments = { cells = 8 }
"""
"""What a study says to use it."""


def _with_batch_norm(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    module = GridMeans(outputs, in_channels, cells=arguments["cells"])
    module.norm = nn.BatchNorm1d(16, track_running_stats=False)
    return module


class Centred(GridMeans):
    """Takes the batch's mean away, in a way that no list of layers shows."""

    def forward(self, images: Tensor) -> Tensor:
        return super().forward(images - images.mean(dim=0))


def _centred(
    outputs: int, in_channels: int, arguments: Mapping[str, Any], _: Path | None
) -> nn.Module:
    return Centred(outputs, in_channels, cells=arguments["cells"])


MIXING = (
    replace(ENTRY, name="grid-means-batch-norm", builder=_with_batch_norm),
    replace(ENTRY, name="grid-means-centred", builder=_centred),
)
"""What no site trains with privacy: a patient's output depends on who else is in the batch."""
