"""The sum of a round, held against what honest sites can give: see ``study.update_bound``.

A sum outside it is discarded as if the round had been lost, and the next round trains from the same
model with fresh noise. Which site spoilt it nobody can see; that it happens twice in a row, with
nothing between, is no chance, and people decide how to go on.
"""

from __future__ import annotations

import numpy as np

from cloister_fl.errors import SumOutsideBound
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.server.rounds.checkpoint import RunState
from cloister_fl.server.rounds.collector import Collected
from cloister_fl.study.schema import Study
from cloister_fl.study.update_bound import update_bound


def norm_of(mean: Vector) -> float:
    """L2 norm of a mean update."""
    return float(np.linalg.norm(mean.astype(np.float64)))


def is_possible(
    study: Study, number: int, model: Vector, collected: Collected, norm: float
) -> bool:
    """Whether honest sites can have given the mean update of a round.

    Without privacy nothing is clipped, and any finite mean is possible.

    Args:
        study: what is trained.
        number: of the round, from 1.
        model: the weights that it began with, (D,).
        collected: the mean, (D,), and whose it is.
        norm: L2 norm of the mean.
    """
    if not study.privacy.enabled:
        return True
    bound = update_bound(
        study,
        dimension=model.size,
        weights=[study.aggregation.weight(name) for name in collected.sites],
        round_number=number,
        model_norm=float(np.linalg.norm(model.astype(np.float64))),
    )
    return bound.holds(norm, float(np.abs(collected.mean).max(initial=0.0)))


def require_one_of_two(state: RunState) -> None:
    """End a run whose last two sums were discarded, one after the other.

    Raises:
        SumOutsideBound: they were.
    """
    trained = state.figures[-1].round
    discarded = [number for number in state.discarded if number > trained]
    if len(discarded) < 2 or discarded[-1] != state.completed:
        return
    before, last = discarded[-2:]
    raise SumOutsideBound(
        f"The sums of rounds {before} and {last} are larger than honest sites can send.",
        why="A site sends other numbers than a clipped, noised and masked update, by a fault or on "
        "purpose; the masks hide which. Both rounds were discarded and stay charged.",
        remedy="Ask the hospitals for their versions and last refusals: cloister client status. "
        "Where one of them is to blame, revoke it and propose the study anew; else go on: "
        "cloister server resume RUN",
    )
