"""Training losses: cross entropy of a class, or of each pixel together with soft Dice.

Cross entropy alone is content with an empty mask where what is sought is small; soft Dice
(Milletari et al. 2016) is not, and their sum is the usual loss of segmentation (Isensee et al.
2021). Both are a mean or a ratio within one image, so that an image's loss depends on no other.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

_SMOOTH = 1.0
"""Pixels added to both sides of the Dice ratio: an empty mask that is predicted has no loss."""


def image_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """One loss an image, (images,).

    Args:
        logits: (images, classes), or (images, 1, S, S).
        targets: int64 (images,) classes, or float32 (images, 1, S, S) of 0 and 1.
    """
    if targets.dtype == torch.int64:
        return F.cross_entropy(logits, targets, reduction="none")
    targets = targets.to(logits.dtype)
    crossed = F.binary_cross_entropy_with_logits(logits, targets, reduction="none")
    shown, marked = torch.sigmoid(logits).flatten(1), targets.flatten(1)
    both = (shown * marked).sum(dim=1)
    dice = (2 * both + _SMOOTH) / (shown.sum(dim=1) + marked.sum(dim=1) + _SMOOTH)
    return crossed.flatten(1).mean(dim=1) + (1 - dice)


def patient_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """A patient's loss: the mean over the patient's images. Arguments as ``image_losses``."""
    if targets.dtype == torch.int64:
        return F.cross_entropy(logits, targets)
    return image_losses(logits, targets).mean()


def anything(images: Tensor, outputs: int, *, outlines: bool) -> Tensor:
    """Return arbitrary targets that fit images, for trials of a network.

    Args:
        images: (images, channels, ...).
        outputs: width of the network's last layer.
        outlines: whether targets are masks.
    """
    if outlines:
        return (images[:, :1] > 0).to(images.dtype)
    return torch.arange(len(images)) % outputs
