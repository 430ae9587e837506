"""The studies that an audit asks a made-up site to train, so small that a round takes little.

Their epsilon is large and their noise therefore small: one patient can be seen in it, and so can
whatever shows more of a patient than it should. Their learning rates are tiny, so that gradients
stay what they are over a round; rate, divisor and noise only scale an update.
"""

from __future__ import annotations

import math
from typing import Any

from cloister_fl.privacy.accounting import epsilon_pld
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import (
    About,
    Aggregation,
    Evaluation,
    Input,
    Network,
    Privacy,
    Study,
    Training,
)
from cloister_fl.tasks.classification import ClassificationTarget

LOUD = 300.0
"""Epsilon of a study in which single patients are seen."""
_SIGMA = 0.3
_MOVED = 4e-6
"""What the noise of a step moves a weight by: many steps of its float32 grid, and no gradient."""


def small_study(
    name: str,
    *,
    classes: int = 2,
    width: int = 4,
    epsilon: float = LOUD,
    clip: float = 8.0,
    release: float = 0.0,
    proximal: float = 0.0,
    **training: Any,
) -> Study:
    """A study of a small network on images of 16 pixels a side.

    Args:
        name: tells studies apart, and so their ledgers' entries.
        classes: 2 or more.
        width: of the network.
        epsilon: of the study.
        clip: the clipping norm; about a third of the gradients are below 8.
        release: epsilon of the noised evaluation.
        proximal: FedProx's mu.
        training: keys of ``Training``.
    """
    return quiet(
        Study(
            study=About(name=name, question="Does the installed code keep what it claims?"),
            input=Input(size=16),
            target=ClassificationTarget(
                column="finding", classes=tuple(f"class {place}" for place in range(classes))
            ),
            network=Network(name="small-cnn", arguments={"width": width}),
            training=Training(**{"expected_batch": 4, "learning_rate": 1.0, **training}),
            privacy=Privacy(epsilon=epsilon, clipping_norm=clip),
            aggregation=Aggregation(
                secure=False,
                min_sites=1,
                strategy="fedprox" if proximal else "fedavg",
                proximal_mu=proximal,
            ),
            evaluation=Evaluation(release_epsilon=release, site_fraction=0.5),
        )
    )


def changed(before: Study, /, **tables: dict[str, Any]) -> Study:
    """The study with other values of some keys, validated anew."""
    given = before.model_dump(mode="json")
    for table, values in tables.items():
        given[table] = {**given[table], **values}
    return Study.model_validate(given)


def quiet(study: Study) -> Study:
    """The study with a learning rate at which no gradient changes within a round."""
    noise = charges(study).step.noise_multiplier * study.privacy.clipping_norm
    rate = _MOVED * study.training.expected_batch / noise
    return changed(study, training={"learning_rate": rate})


def shown(study: Study) -> Study:
    """The study as an audit asks for it: each update is seen, and all else stays.

    But for an epsilon above ``LOUD``, which no site's ledger would bear.
    """
    seen = changed(study, aggregation={"secure": False, "min_sites": 1})
    if study.privacy.epsilon <= LOUD:
        return seen
    release = min(study.evaluation.release_epsilon, LOUD / 2)
    return changed(seen, privacy={"epsilon": LOUD}, evaluation={"release_epsilon": release})


def loud(study: Study, *, rounds: int, steps: int, everybody: bool) -> Study:
    """The study with little noise and gradients that stay, by plain gradient descent.

    Args:
        study: from ``shown``.
        rounds: how many rounds it has.
        steps: of a round.
        everybody: sample all patients in each step.
    """
    rate = 1.0 if everybody else study.training.sampling_rate
    # So little that one patient shows, and enough for the ledger's account to be finite.
    sigma = max(_SIGMA, math.sqrt(rounds * steps) / 20)
    epsilon = epsilon_pld(sigma, rate, rounds * steps, study.privacy.delta)
    training: dict[str, Any] = {
        "rounds": rounds,
        "steps": steps,
        "epochs": None,
        "sampling_rate": rate,
        "optimizer": "sgd",
        "momentum": 0.0,
        "schedule": "constant",
        "augment": False,
    }
    return quiet(
        changed(
            study,
            training=training,
            privacy={"epsilon": max(epsilon, study.privacy.epsilon)},
            evaluation={"release_epsilon": 0.0},
        )
    )
