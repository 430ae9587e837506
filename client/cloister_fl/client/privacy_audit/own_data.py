"""One-run audit on a site's own patients: its preconditions and its result.

It trains without charging the ledger. That is sound for one reason alone: nothing of it leaves the
site. The model is thrown away, no message is sent, and the log entry is written before data are
read and says only that a study was audited. What is shown to the steward was computed from the
patients without noise, as all that a steward sees.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias

from cloister_fl.client.admission import gate
from cloister_fl.client.data.cohort import Cohort
from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.privacy_audit.one_run import (
    FEWEST,
    MOST_VALUES,
    OneRunAudit,
    audit_training,
)
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.errors import CohortTooSmall, OptionInvalid
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.flat_parameters import layout_of
from cloister_fl.networks.frozen_backbone import FrozenBackbone
from cloister_fl.networks.pretrained import MODELS_FOLDER
from cloister_fl.study import study_network
from cloister_fl.study.gradient_engines import require_sound_engine
from cloister_fl.study.schema import Study

if TYPE_CHECKING:
    from torch import nn

Progress: TypeAlias = Callable[[int, int], None]


@dataclass(frozen=True)
class Asked:
    """What a steward asks of an audit; ``None`` and empty leave it to the audit.

    Attributes:
        rounds: of the study, from its first; else all.
        canaries: patients whose coins are guessed; else all, or as many as fit into memory.
        guesses: numbers of guesses; else ``one_run.usual_guesses``.
    """

    rounds: int | None = None
    canaries: int | None = None
    guesses: Sequence[int] = ()


@dataclass(frozen=True)
class Ready:
    """A study, the site's patients and what was asked, all found fit; made by ``prepare``."""

    module: nn.Module
    cohort: Cohort
    study: Study
    noise_multiplier: float
    rounds: int
    canaries: int
    guesses: Sequence[int]

    def audit(self, *, progress: Progress | None = None) -> OneRunAudit:
        """Train the rounds on half of the patients, and guess which half.

        Args:
            progress: called with (steps done, steps in all).

        Raises:
            UpdateInvalid: training led to weights that are not finite.
        """
        return audit_training(
            self.module,
            self.cohort,
            self.study,
            noise_multiplier=self.noise_multiplier,
            random=SecureRandom(),
            rounds=self.rounds,
            canaries=self.canaries,
            guesses=self.guesses,
            progress=progress,
        )


def check(site: Site, study: Study, asked: Asked) -> nn.Module:
    """Check, before anything is done, that a study can be audited here.

    Args:
        site: the opened site.
        study: its privacy must be on; it need not be approved, for nothing leaves.
        asked: how long and on how many.

    Returns:
        The study's first model.

    Raises:
        StudyInvalid: its engine does not support its privacy claim.
        OptionInvalid: the study has no privacy, or ``asked`` does not fit it.
        ExtraMissing, WeightsUnfit, NetworkUnfit: as for training.
    """
    if not study.privacy.enabled:
        raise OptionInvalid(
            "The study trains without privacy.",
            why="It claims no epsilon, so there is nothing to audit.",
            remedy="Name a study with privacy.enabled = true.",
        )
    require_sound_engine(study)
    if asked.rounds is not None and asked.rounds > study.training.rounds:
        raise OptionInvalid(
            f"The study has {study.training.rounds} rounds, and --rounds asks for {asked.rounds}.",
            remedy=f"Use --rounds {study.training.rounds} at most.",
        )
    module = study_network.build_for(study, models=site.root / MODELS_FOLDER)
    if isinstance(module, FrozenBackbone):
        module.require()
    return module


def prepare(site: Site, study: Study, asked: Asked, *, progress: Progress | None = None) -> Ready:
    """Check that a study can be audited here, note in the site's log that it is, and read the data.

    Args:
        site, study, asked: as of ``check``.
        progress: called with (files done, files in all).

    Raises:
        OptionInvalid: ``asked`` does not fit the patients; or as ``check``.
        CohortTooSmall: there are fewer patients than an audit can say anything of.
        DataError: the site's data cannot be used; see ``loading.load_cohort``.
        EpsilonUnreachable: as for training.
        others: see ``check``.
    """
    module = check(site, study, asked)
    require_private(module, size=study.input.size, depth=study.input.depth)
    rounds = study.training.rounds if asked.rounds is None else asked.rounds
    sigma = gate.mechanism(study).noise_multiplier
    # Before data are read, so that the log, whose head is shown to others, holds nothing of them.
    log_of(site).append("audited", on="own patients", study=study.digest)
    cohort = load_cohort(site, study, progress=progress)
    canaries = _canaries(len(cohort.patients), layout_of(module).size, asked.canaries)
    if any(number > canaries for number in asked.guesses):
        raise OptionInvalid(
            f"There are {canaries} canaries, and --guesses asks for more guesses than that.",
            remedy=f"Use --guesses {canaries} at most.",
        )
    return Ready(module, cohort, study, sigma, rounds, canaries, asked.guesses)


def _canaries(patients: int, size: int, asked: int | None) -> int:
    fit = max(MOST_VALUES // size, FEWEST)
    if patients < FEWEST:
        raise CohortTooSmall(
            f"The site has {patients} patients.",
            why=f"An audit with fewer than {FEWEST} canaries shows nothing.",
            remedy="Audit the code without patients: leave --study out.",
        )
    if asked is None:
        return min(patients, fit)
    if asked > patients:
        raise OptionInvalid(
            f"The site has {patients} patients, and --canaries asks for {asked}.",
            remedy="Leave --canaries out: then all are canaries.",
        )
    if asked > fit:
        raise OptionInvalid(
            f"{asked} canaries of a network with {size:,} trained weights do not fit into memory.",
            remedy=f"Use --canaries {fit} at most.",
        )
    return asked
