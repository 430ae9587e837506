"""Features of a cohort by the frozen backbone, computed once an image.

Each image goes through by itself, so its features are the same whoever else is in the cohort: the
exact sensitivity of a step begins at the pixels. (For a backbone on a CPU it is also the fastest.)
A cohort keeps its own, and those of single images by the hash of the pixels; see
``feature_store``.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from cloister_fl.client.data.feature_store import Features, Rows
from cloister_fl.client.data.images import digest_at
from cloister_fl.client.training.sampling import Bag, Cohort, FeatureCohort, pixels_of
from cloister_fl.errors import CloisterError, DataError
from cloister_fl.networks.frozen_backbone import FixedFeatures


def features_of(
    module: FixedFeatures, cohort: Cohort, told: Callable[[Exception], None] | None = None
) -> FeatureCohort:
    """See a cohort through the part of ``module`` that no training changes.

    Args:
        module: the network; where it has weights, they say on which device it computes.
        cohort: the patients; the pixels of one that was seen before must not have changed.
        told: gets what fails for one image, whose features then are no numbers, so that its
            patient has no gradient; without it, it is raised.

    Raises:
        ExtraMissing, WeightsUnfit: the network stands on weights that are not here.
    """
    # A cohort that keeps nothing, as a made-up one, is computed each time.
    kept: Features = getattr(cohort, "features", None) or Features()
    if module.fixed in kept.whole:
        return FeatureCohort(kept.whole[module.fixed], cohort.patients, cohort.targets)
    rows: list[NDArray[np.float32] | None] = []
    for place in range(len(cohort.images)):
        try:
            rows.append(_row(module, cohort, place, kept.rows))
        except Exception as error:
            # Other numbered errors are of the weights, not of an image.
            of_image = not isinstance(error, CloisterError) or isinstance(error, DataError)
            if told is None or not of_image:
                raise
            told(error)
            rows.append(None)
    sound = [row for row in rows if row is not None]
    none = np.full_like(sound[0], np.nan) if sound else np.empty(0, np.float32)
    whole = np.stack([none if row is None else row for row in rows]) if rows else none[None][:0]
    if len(sound) == len(rows):
        kept.whole[module.fixed] = whole
    return FeatureCohort(whole, cohort.patients, cohort.targets)


def _row(module: FixedFeatures, cohort: Cohort, place: int, rows: Rows) -> NDArray[np.float32]:
    assert isinstance(module, nn.Module)
    device = next(module.parameters()).device.type
    # Sums are rounded otherwise on another device, and by another version.
    how = f"{device}/float32/torch {torch.__version__}"
    form = f"{module.fixed}\0{cohort.images.shape[1:]}\0{how}\0".encode()
    key = hashlib.sha256(form + digest_at(cohort.images, place)).digest()
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
