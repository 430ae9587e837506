"""In-memory cache of the frozen backbone's features, computed once an image.

Each image goes through by itself, so its features are the same whoever else is in the cohort: the
exact sensitivity of a step begins at the pixels. (For a backbone on a CPU it is also the fastest.)
A cohort keeps its own, and those of single images by the hash of the pixels; see
``feature_store``.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloister_fl.client.data.feature_store import Features, Rows
from cloister_fl.client.training.sampling import Bag, Cohort, FeatureCohort, pixels_of
from cloister_fl.networks.frozen_backbone import FixedFeatures


def features_of(module: FixedFeatures, cohort: Cohort) -> FeatureCohort:
    """See a cohort through the part of ``module`` that no training changes.

    Args:
        module: the network; where it has weights, they say on which device it computes.
        cohort: the patients; the pixels of one that was seen before must not have changed.

    Raises:
        ExtraMissing, WeightsUnfit: the network stands on weights that are not here.
    """
    # A cohort that keeps nothing, as a made-up one, is computed each time.
    kept: Features = getattr(cohort, "features", None) or Features()
    if module.fixed not in kept.whole:
        rows = [_row(module, cohort, place, kept.rows) for place in range(len(cohort.images))]
        kept.whole[module.fixed] = np.stack(rows) if rows else np.empty((0, 0), np.float32)
    return FeatureCohort(kept.whole[module.fixed], cohort.patients, cohort.targets)


def _row(module: FixedFeatures, cohort: Cohort, place: int, rows: Rows) -> NDArray[np.float32]:
    image = np.ascontiguousarray(cohort.images[place])
    form = f"{module.fixed}\0{image.shape}\0".encode()
    key = hashlib.sha256(form + image.tobytes()).digest()
    row = rows.get(key)
    if row is None:
        row = _compute(module, cohort, place)
        rows.keep(key, row)
    return row


def _compute(module: FixedFeatures, cohort: Cohort, place: int) -> NDArray[np.float32]:
    assert isinstance(module, nn.Module)
    device = next(module.parameters()).device
    with torch.no_grad():
        pixels = pixels_of(cohort, [Bag(np.array([place]))]).to(device)
        features: NDArray[np.float32] = module.features(pixels)[0].cpu().numpy()
    return features
