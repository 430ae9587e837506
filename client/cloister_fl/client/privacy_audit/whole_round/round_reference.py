"""The law of a round's update, worked out in float64 without the code that is audited.

A step moves the weights by its noised sum, through an optimiser that is linear in it: plain
gradient descent, with momentum, with FedProx's pull. So an update is, exactly,

    -(sum over kinds k of (patients of k who took part) x G_k) + Gaussian noise,

where G_k is what one patient of the kind adds in all steps together, and the noise is independent
in each value, with a standard deviation that follows from noise multiplier, clipping norm,
divisor and optimiser. Gradients are taken along the path of the mean update; the audited studies
have learning rates so small that no sampled path leaves it by anything that matters.

The networks are the installed ones; what is not used are the sampling, the gradient engines, the
clipped sum, the optimiser and the round that train with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister_fl.client.privacy_audit.whole_round.made_up_patients import WHITE, Kind
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.frozen_backbone import FixedFeatures
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for

Vector = NDArray[np.float64]

_COARSE = 0.25
"""Steps of the float32 grid, over the noise, from which a weight is not looked at: its rounding
is then no longer like an independent uniform error."""


@dataclass(frozen=True, eq=False)
class Law:
    """The law of an update, over the values that are looked at.

    Attributes:
        seen: which of the D values those are, bool (D,).
        deviation: of the noise in each, (V,).
        shares: G_k in units of ``deviation``, (kinds, V).
        grid: step of the float32 grid of each weight, (V,).
    """

    seen: NDArray[np.bool_]
    deviation: Vector
    shares: Vector
    grid: Vector

    def whitened(self, update: Vector) -> Vector:
        """An update in units of the noise, (V,)."""
        whitened: Vector = -update[self.seen] / self.deviation
        return whitened

    def participants(self, update: Vector) -> tuple[Vector, Vector]:
        """How many patients of each kind an update shows, and the noise that is left.

        Returns:
            Estimates (kinds,) with the covariance ``covariance``, 0 for kinds who add nothing, and
            the update less what they explain, in units of the noise, (V,).
        """
        values, some = self.whitened(update), self.shares[self.adding]
        found = np.zeros(len(self.shares), np.float64)
        if len(some):
            found[self.adding] = np.linalg.lstsq(some.T, values, rcond=None)[0]
        return found, np.asarray(values - found @ self.shares, np.float64)

    @property
    def adding(self) -> NDArray[np.bool_]:
        """The kinds whose patients add anything: a model may be right of the others, (kinds,)."""
        norms = np.linalg.norm(self.shares, axis=1)
        most = float(norms.max()) if len(norms) else 0.0
        adds: NDArray[np.bool_] = norms > 1e-4 * most
        return adds

    @property
    def covariance(self) -> Vector:
        """Of the estimates of ``participants``, (kinds, kinds)."""
        gram = self.shares @ self.shares.T
        return np.asarray(np.linalg.pinv(gram, hermitian=True), np.float64)


def response(study: Study, number: int) -> Vector:
    """How far a noised gradient of 1 in each step moves a weight by the round's end, (steps,).

    For optimisers that are linear: one run of the recursion for each step.
    """
    training, mu = study.training, study.aggregation.proximal_mu
    rate, steps = training.rate_of(number), steps_of(study)
    moved = []
    for place in range(steps):
        weight = speed = 0.0
        for step in range(steps):
            speed = training.momentum * speed + float(step == place) + mu * weight
            weight -= rate * speed
        moved.append(-weight)
    return np.array(moved)


def steps_of(study: Study) -> int:
    """Local steps of a round, from the study's own words."""
    training = study.training
    if training.epochs is not None:
        whole = training.epochs / training.sampling_rate
        near = round(whole)
        return max(1, near if abs(whole - near) < 1e-6 else int(whole) + 1)
    return training.steps or 1


class Reference:
    """A study's network in float64, and the gradients of single patients.

    Args:
        study: the study.
        models: a folder of pretrained weights, where its network needs them.

    Attributes:
        study: the study.
        first: its first model, (D,).
        layers: names of the parameters, and where they lie in a vector.
    """

    def __init__(self, study: Study, models: Path | None = None) -> None:
        self.study = study
        network = build_for(study, models=models)
        self.first = flat_parameters.flatten(network)
        layout = flat_parameters.layout_of(network)
        ends = np.cumsum([0, *(int(np.prod(shape)) for shape in layout.shapes)]).tolist()
        self.layers: list[tuple[str, slice]] = [
            (name, slice(*ends[place : place + 2])) for place, name in enumerate(layout.names)
        ]
        self._precise = network.double()
        self._fixed: dict[Kind, Tensor] = {}
        self._models = models

    @property
    def size(self) -> int:
        """D."""
        return len(self.first)

    def gradients(self, kinds: Sequence[Kind], weights: Vector, clip: float) -> Vector:
        """The clipped gradient of a patient of each kind at these weights, (kinds, D)."""
        place = 0
        trained = [p for p in self._precise.parameters() if p.requires_grad]
        with torch.no_grad():
            for parameter in trained:
                part = torch.from_numpy(weights[place : place + parameter.numel()])
                parameter.copy_(part.view_as(parameter))
                place += parameter.numel()
        found = np.zeros((len(kinds), self.size))
        for row, kind in zip(found, kinds, strict=True):
            loss = self._losses(kind).mean()
            parts = torch.autograd.grad(loss, trained)
            flat = torch.cat([part.reshape(-1) for part in parts]).numpy()
            norm = float(np.linalg.norm(flat))
            if np.isfinite(norm):
                row[:] = flat * min(1.0, clip / norm) if norm > 0 else flat
        return found

    def _losses(self, kind: Kind) -> Tensor:
        task = self.study.task
        pixels = torch.from_numpy((kind.images / WHITE - 0.5) / 0.25).unsqueeze(1)
        logits = self._logits(kind, pixels)
        targets = task.tensor(task.stack(kind.records), lambda places: places)
        return task.losses(logits, targets)

    def _logits(self, kind: Kind, pixels: Tensor) -> Tensor:
        network: nn.Module = self._precise
        if isinstance(network, FixedFeatures):
            if kind not in self._fixed:
                plain = build_for(self.study, models=self._models)
                assert isinstance(plain, FixedFeatures)
                with torch.no_grad():
                    rows = [plain.features(one.unsqueeze(0).float()) for one in pixels]
                self._fixed[kind] = torch.cat(rows).double()
            return network.head(self._fixed[kind])
        logits: Tensor = network(pixels)
        return logits

    def law(
        self,
        kinds: Sequence[Kind],
        counts: Sequence[int],
        model: NDArray[np.float32],
        *,
        noise_multiplier: float,
        number: int = 1,
    ) -> Law:
        """The law of the update of a round.

        Args:
            kinds: of the patients who are there.
            counts: how many of each there are; they bend the path that gradients are taken along.
            model: the weights that the round begins with, (D,).
            noise_multiplier: sigma of each step.
            number: of the round, from 1.
        """
        study = self.study
        clip, divisor = study.privacy.clipping_norm, study.training.expected_batch
        expected = np.asarray(counts, np.float64) * study.training.sampling_rate
        moves = response(study, number)
        shares = np.zeros((len(kinds), self.size))
        weights = model.astype(np.float64)
        if kinds:
            speed, start = np.zeros(self.size), weights.copy()
            pull, rate = study.aggregation.proximal_mu, study.training.rate_of(number)
            for move in moves:
                gradients = self.gradients(kinds, weights, clip) / divisor
                shares += move * gradients
                speed = study.training.momentum * speed + expected @ gradients
                speed = speed + pull * (weights - start)
                weights = weights - rate * speed
        noise = noise_multiplier * clip / divisor * float(np.linalg.norm(moves))
        grid = np.spacing(np.abs(model)).astype(np.float64)
        # Each step rounds a weight to the grid of its size.
        variance = noise**2 + len(moves) * grid**2 / 12
        seen = grid < _COARSE * noise
        deviation = np.sqrt(variance[seen])
        return Law(seen, deviation, shares[:, seen] / deviation, grid[seen])
