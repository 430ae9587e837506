"""Studies as programs use them: by the study, or by the path of its file."""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister_fl.study import initial_model, signatures
from cloister_fl.study.cost import Charges, charges
from cloister_fl.study.file import given_study
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for
from cloister_fl.system import arguments
from cloister_fl.system.arguments import StrPath

if TYPE_CHECKING:
    from torch import nn


def privacy_cost(study: Study | StrPath) -> Charges | None:
    """Return what a study costs its patients: mechanisms, steps and epsilon.

    It is a public function of the study's constants, the same at every site, and known before
    anybody trains. None where the study's privacy is off.

    Args:
        study: a study, or the path of its file.

    Raises:
        EpsilonUnreachable: no noise gives the study's epsilon.
        FileUnreadable, StudyInvalid: the file cannot be read, or has faults.
        OptionInvalid: it is neither a study nor a path.
    """
    asked = given_study(study)
    return charges(asked) if asked.privacy.enabled else None


def bind(study: Study | StrPath) -> Study:
    """Return a study with the hash of its initial model, drawn here from its seed.

    Sites compare it with the model of the first round. ``simulate`` and ``cloister server run``
    bind a study that is not; bind it first where its hash is needed before, as to sign it. The
    file is not changed: ``cloister study bind`` does that.

    Args:
        study: a study, or the path of its file.

    Raises:
        NetworkUnfit: the network does not do what the target asks for.
        ExtraMissing: the network needs a package that is not installed.
        FileUnreadable, StudyInvalid: the file cannot be read, or has faults.
        OptionInvalid: it is neither a study nor a path.
    """
    return initial_model.bind(given_study(study))


def build_network(study: Study | StrPath, *, models: StrPath | None = None) -> nn.Module:
    """Build a study's network for its input and its target; see ``networks.build``.

    Args:
        study: a study, or the path of its file.
        models: folder of pretrained weights; None for those that are installed.

    Raises:
        NetworkUnfit: the network does not do what the target asks for.
        ExtraMissing: the network needs a package that is not installed.
        FileUnreadable, StudyInvalid: the file cannot be read, or has faults.
        OptionInvalid: an argument is neither a study nor a path.
    """
    folder = None if models is None else arguments.path("models", models)
    return build_for(given_study(study), models=folder)


def load_signatures(study: StrPath) -> bytes:
    """Return the signatures that lie beside a study file, for ``simulate``.

    They say who vouches for the study at sites with a policy of their own; ``cloister study sign``
    writes them. Each is the signer's public key and an Ed25519 signature, 96 bytes.

    Args:
        study: the path of the study's file.

    Returns:
        The signatures one behind another; empty where there is no file of them.

    Raises:
        FileUnreadable: a file cannot be read, or a signature is not under this study.
        StudyInvalid: the study has faults.
        OptionInvalid: it is no path.
    """
    file = arguments.path("study", study)
    return signatures.load(file, given_study(file))
