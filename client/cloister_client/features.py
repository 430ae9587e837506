"""What the fixed part of a network makes of a cohort: computed once an image, and kept in memory.

Each image goes through by itself, so its features are the same whoever else is in the cohort: the
exact sensitivity of a step begins at the pixels. (For a backbone on a CPU it is also the fastest.)
They are kept by the hash of the pixels, in this process alone; no disk sees them.
"""

from __future__ import annotations

import hashlib
import weakref
from collections import OrderedDict

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloister_client.sampling import Bag, Cohort, FeatureCohort, pixels_of
from cloister_common.frozen_backbone import FixedFeatures

_MOST_BYTES = 1 << 30
"""Most that is kept beyond the cohorts in use; the least recently used goes first."""

_whole: dict[int, dict[str, NDArray[np.float32]]] = {}
"""Features of whole cohorts by identity of the images' array, and by what computed them."""

_rows: OrderedDict[bytes, NDArray[np.float32]] = OrderedDict()
"""Features of single images, for cohorts that are read again or divided otherwise."""


def features_of(module: FixedFeatures, cohort: Cohort) -> FeatureCohort:
    """See a cohort through the part of ``module`` that no training changes.

    Args:
        module: the network; where it has weights, they say on which device it computes.
        cohort: the patients; the pixels of one that was seen before must not have changed.

    Raises:
        ExtraMissing, WeightsUnfit: the network stands on weights that are not here.
    """
    images = cohort.images
    mine = _whole.get(id(images))
    if mine is None:
        mine = _whole[id(images)] = {}
        # An identity is given to another object once this one is gone.
        weakref.finalize(images, _whole.pop, id(images), None)
    if module.fixed not in mine:
        rows = [_row(module, cohort, place) for place in range(len(images))]
        mine[module.fixed] = np.stack(rows) if rows else np.empty((0, 0), np.float32)
    return FeatureCohort(mine[module.fixed], cohort.patients)


def _row(module: FixedFeatures, cohort: Cohort, place: int) -> NDArray[np.float32]:
    image = np.ascontiguousarray(cohort.images[place])
    form = f"{module.fixed}\0{image.shape}\0".encode()
    key = hashlib.sha256(form + image.tobytes()).digest()
    row = _rows.get(key)
    if row is None:
        row = _rows[key] = _compute(module, cohort, place)
        while len(_rows) * row.nbytes > _MOST_BYTES:
            _rows.popitem(last=False)
    else:
        _rows.move_to_end(key)
    return row


def _compute(module: FixedFeatures, cohort: Cohort, place: int) -> NDArray[np.float32]:
    assert isinstance(module, nn.Module)
    device = next(module.parameters()).device
    with torch.no_grad():
        pixels = pixels_of(cohort, [Bag(0, np.array([place]))]).to(device)
        features: NDArray[np.float32] = module.features(pixels)[0].cpu().numpy()
    return features
