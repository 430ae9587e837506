"""The initial model of a study: the study carries its hash, and sites compare it in round 1.

The weights follow from the network, the input, the target and the seed, and from none of the other
keys, so a study can carry their hash without a circle. A site compares the hash and does not draw
the weights anew: torch promises the same numbers for a seed on one platform and in one release
alone, and a site with another processor would refuse an honest study.

Whoever proposes a study draws the weights once and binds the study to them: ``cloister study
bind`` writes the hash into the file, and a study that is proposed without it is bound then. What
the hash fixes is what a steward approves: after that no coordinator can begin with another model.
"""

from __future__ import annotations

from cloister_fl.errors import InitialModelUnfit
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.flat_parameters import Vector
from cloister_fl.secagg import model_hash
from cloister_fl.study.binding import bind_command, require_bound
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for


def bind(study: Study) -> Study:
    """Return the study with the hash of its initial model, drawn here from its seed.

    A hash that it has is replaced.

    Raises:
        NetworkUnfit, ExtraMissing: see ``build_for``.
    """
    return study.bound_to(digest_of(flat_parameters.flatten(build_for(study))))


def bound(study: Study) -> Study:
    """Return a study that has the hash of the initial model that this machine draws.

    Raises:
        InitialModelUnfit: it has another one.
        NetworkUnfit, ExtraMissing: see ``build_for``.
    """
    made = bind(study)
    if study.training.initial_model not in ("", made.training.initial_model):
        raise _differs("The initial model that is drawn here from the study's seed")
    return made


def digest_of(model: Vector) -> str:
    """Hash of a model's weights, 64 hexadecimal digits: as of a round's session, BLAKE3."""
    return model_hash(model.astype("<f4", copy=False).tobytes()).hex()


def require_initial(study: Study, digest: str) -> None:
    """Refuse a model that is not the initial one of a study.

    Args:
        study: the approved study.
        digest: of the model, see ``digest_of``.

    Raises:
        InitialModelUnfit: it is another one, or the study has no hash to compare with.
    """
    require_bound(study)
    if digest != study.training.initial_model:
        raise _differs("The model of round 1")


def _differs(what: str) -> InitialModelUnfit:
    return InitialModelUnfit(
        f"{what} is not the one whose hash the study carries.",
        why="The network, the input, the target or the seed was changed after the study was bound, "
        "the weights were drawn on another platform or by another release of PyTorch, or the "
        "coordinator sent another model.",
        remedy=f"Bind the study where it is proposed from, and propose it anew: {bind_command()}",
    )
