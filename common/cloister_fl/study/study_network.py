"""The network of a study, built for its input and its target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.errors import NetworkUnfit
from cloister_fl.networks.registry import (
    REGISTRY,
    build,
    choose,
    other_dimensions,
    registered,
    resolve,
)
from cloister_fl.networks.spec import Entry, Value
from cloister_fl.study.schema import Study

if TYPE_CHECKING:
    from torch import nn


def build_for(study: Study, *, models: Path | None = None) -> nn.Module:
    """Build a study's network for its input and its target; see ``build``.

    Raises:
        NetworkUnfit: also where the network does not do what the target asks for.
        ExtraMissing: see ``build``.
    """
    resolve_for(study)
    return build(
        study.network,
        outputs=study.task.outputs,
        size=study.input.size,
        depth=study.input.depth,
        seed=study.training.seed,
        models=models,
    )


def resolve_for(study: Study) -> tuple[Entry, dict[str, Value]]:
    """Look a study's network up, and see that it fits its input and its target.

    Raises:
        NetworkUnfit: it does not.
    """
    entry, task = registered(study.network.name), study.task
    fit = _fitting(study)
    if entry.dimensions != study.input.dimensions:
        raise other_dimensions(entry, study.input.dimensions, fit)
    if entry.answers != task.answers:
        raise NetworkUnfit(
            f"The network '{entry.name}' answers for each {entry.answers}, and target.kind = "
            f"'{study.target.kind}' needs an answer for each {task.answers}.",
            remedy=choose(fit),
        )
    if entry.fewest_outputs > task.outputs:
        raise NetworkUnfit(
            f"The network '{entry.name}' gives {entry.fewest_outputs} outputs or more, and "
            f"target.kind = '{study.target.kind}' needs {task.outputs}.",
            remedy=choose(fit),
        )
    return resolve(study.network, size=study.input.size, depth=study.input.depth)


def _fitting(study: Study) -> list[str]:
    """Names of the networks that fit a study's input and its target."""
    return [
        one.name
        for one in REGISTRY.values()
        if one.dimensions == study.input.dimensions
        and one.answers == study.task.answers
        and one.fewest_outputs <= study.task.outputs
        and one.smallest <= study.input.size
    ]
