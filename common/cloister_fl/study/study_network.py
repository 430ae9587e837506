"""The network of a study, built for its input and its target."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.errors import NetworkUnfit
from cloister_fl.networks.spec import Entry, Value
from cloister_fl.study.schema import Study

if TYPE_CHECKING:
    from torch import nn
from cloister_fl.networks.registry import REGISTRY, build, resolve


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
    entry, values = resolve(study.network, size=study.input.size, depth=study.input.depth)
    wanted = study.task.answers
    if entry.answers != wanted:
        fit = [one.name for one in REGISTRY.values() if one.answers == wanted]
        raise NetworkUnfit(
            f"The network '{entry.name}' answers for each {entry.answers}, and target.kind = "
            f"'{study.target.kind}' needs an answer for each {wanted}.",
            remedy=f"Choose one of: {', '.join(fit)}.",
        )
    return entry, values
