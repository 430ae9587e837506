"""Session parameters: what a key epoch and a session are bound to, and their ids.

``kid`` names a key epoch before any key exists; ``T`` fixes its complete signed keys; ``sid``
adds the model and the constants of one sum. All three are hashes of complete contents, so a
site that recomputes one agrees with its peers on everything inside or its masks do not cancel.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from cloister_fl.encoding.framing import digest, f64, frame, is_sorted_set, listed, names, u32, u64
from cloister_fl.errors import ParameterRefused, WeightAboveCap
from cloister_fl.secagg import remedies
from cloister_fl.secagg.fixed_point import scale_for
from cloister_fl.secagg.parameters import VERSION, Parameters

MAX_DIMENSION = 1 << 32
MIN_CLIP, MAX_CLIP = 1e-6, 1e6
MIN_WEIGHT, MAX_WEIGHT = 1e-3, 1e3
"""So near to each other that no weight of 1000 sites is encoded as 0."""
MAX_RUN_CHARACTERS = 200


@dataclass(frozen=True)
class EpochTerms:
    """What a key epoch is for.

    Attributes:
        federation: name of the federation.
        study: hash of the approved study, 32 bytes.
        roster: digest of the trusted roster, 32 bytes.
        run: id of the run, at most 200 characters; a resumed run has another.
        epoch: number of the key epoch within the run.
        invited: ids of the invited sites, rising.
        colluders: c, as the study and the site's policy state it.

    Raises:
        ParameterRefused: a field out of range, ids that do not rise, or see
            ``Parameters.derive``.
    """

    federation: str
    study: bytes
    roster: bytes
    run: str
    epoch: int
    invited: tuple[str, ...]
    colluders: int

    def __post_init__(self) -> None:
        if len(self.study) != 32 or len(self.roster) != 32:
            raise ParameterRefused("A study or roster hash is not 32 bytes.")
        if not 0 <= self.epoch < 2**64:
            raise ParameterRefused("The epoch number is out of range.")
        if len(self.run) > MAX_RUN_CHARACTERS:
            raise ParameterRefused(f"A run's id is longer than {MAX_RUN_CHARACTERS} characters.")
        if not is_sorted_set(self.invited):
            raise ParameterRefused("The invited sites are not sorted, or one is listed twice.")
        Parameters.derive(len(self.invited), self.colluders)

    @cached_property
    def parameters(self) -> Parameters:
        """n, t, m, c; of the invited sites, whoever answers."""
        return Parameters.derive(len(self.invited), self.colluders)

    @cached_property
    def kid(self) -> bytes:
        """Id of the key epoch, 32 bytes."""
        return digest(
            "secagg/v2/kid",
            VERSION.encode(),
            self.federation.encode(),
            self.study,
            self.roster,
            self.run.encode(),
            u64(self.epoch),
            names(self.invited),
            u32(self.parameters.c),
            u32(self.parameters.t),
            u32(self.parameters.m),
        )


@dataclass(frozen=True)
class Session:
    """The constants of one sum, public and the same at every site.

    A site builds its own from the approved study and from the model bytes that it received, and
    takes part only where the server's says the same.

    Attributes:
        round: number of the round in the study, from 0.
        attempt: number of the attempt at that round, from 0.
        model: hash of the global model's bytes, 32 bytes.
        dimension: D, length of the vector.
        clip: bound of the absolute value of a coordinate before the weight is applied; 1e-6 to 1e6.
        weights: (site id, public weight) of every invited site, by rising id; 0.001 to 1000.

    Raises:
        ParameterRefused: a field out of range.
        WeightAboveCap: a weight out of range.
    """

    round: int
    attempt: int
    model: bytes
    dimension: int
    clip: float
    weights: tuple[tuple[str, float], ...]

    def __post_init__(self) -> None:
        if not (0 <= self.round < 2**64 and 0 <= self.attempt < 2**32):
            raise ParameterRefused("The round or attempt number is out of range.")
        if len(self.model) != 32:
            raise ParameterRefused("The model's hash is not 32 bytes.")
        if not 1 <= self.dimension <= MAX_DIMENSION:
            raise ParameterRefused("The vector's length is out of range.")
        if not MIN_CLIP <= self.clip <= MAX_CLIP:
            raise ParameterRefused("The clip of a coordinate is out of range.")
        if not self.weights or not is_sorted_set([site for site, _ in self.weights]):
            raise ParameterRefused("The weights do not name each site once, in order.")
        for site, weight in self.weights:
            if not MIN_WEIGHT <= weight <= MAX_WEIGHT:
                raise WeightAboveCap(
                    f"The weight of {site} is not between {MIN_WEIGHT:g} and {MAX_WEIGHT:g}.",
                    remedy=remedies.CORRECT_WEIGHTS,
                )

    @cached_property
    def scale(self) -> float:
        """Units to one, a power of two; see ``fixed_point.scale_for``."""
        return scale_for(len(self.weights), self.weight_range[1], self.clip)

    @cached_property
    def weight_range(self) -> tuple[float, float]:
        """The smallest public weight and the largest."""
        weights = sorted(dict(self.weights).values())
        return weights[0], weights[-1]

    @cached_property
    def weight_list(self) -> bytes:
        """The weights as they are hashed, and as they travel."""
        return listed(frame(site.encode(), f64(weight)) for site, weight in self.weights)

    def weight(self, site: str) -> float:
        """The public weight of an invited site."""
        return dict(self.weights)[site]

    def constants(self, threshold: int) -> bytes:
        """What every attempt at a round must share: 32 bytes over sites, t, D, scale and weights.

        Two sums of the same updates under other weights would tell as much as two over other
        sites.
        """
        return digest(
            "secagg/v2/round",
            u32(threshold),
            u64(self.dimension),
            f64(self.scale),
            f64(self.clip),
            self.weight_list,
        )

    def sid(self, keys: bytes) -> bytes:
        """Id of the session over the epoch's keys ``T``; 32 bytes."""
        return digest(
            "secagg/v2/sid",
            keys,
            u64(self.round),
            u32(self.attempt),
            self.model,
            u64(self.dimension),
            f64(self.scale),
            f64(self.clip),
            self.weight_list,
        )
