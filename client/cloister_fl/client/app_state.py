"""What a site's process keeps between messages; it goes with the app that owns it."""

from __future__ import annotations

import os
import threading
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cloister_fl.client.data.cohort import Cohort, same, split, split_apart
from cloister_fl.client.data.feature_store import Features, Rows
from cloister_fl.client.ledger.rollback import Pins
from cloister_fl.client.ledger.site_session import Admission, SiteSession
from cloister_fl.client.secure_aggregation.exchange import Members
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.batch_independence import require_private
from cloister_fl.networks.pretrained import MODELS_FOLDER
from cloister_fl.protocol.round_messages import Vector
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for

if TYPE_CHECKING:
    from torch import nn

COHORTS = 16
"""Cohorts that are kept in memory; the least recently used goes first."""
SESSIONS = 128
"""Sites whose session is kept; a deployment has one, a simulation all of them."""


class _Known:
    """A cohort, and its parts once they are asked for: the same objects each time, as features
    are kept with them."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.parts: tuple[Cohort, Cohort] | None = None


class Kept:
    """What one app keeps in memory of its sites: sessions, cohorts, key epochs and a network.

    Attributes:
        members: parts in secure aggregation, with their key epochs.
        turn: held while a message is answered.
    """

    def __init__(self) -> None:
        self.members = Members()
        self._sessions: OrderedDict[Path, SiteSession] = OrderedDict()
        self._pins: dict[Path, Pins] = {}
        self._cohorts: OrderedDict[tuple[Path, str], _Known] = OrderedDict()
        self._rows = Rows()
        self.turn = threading.RLock()
        self._network: tuple[tuple[Path, str], nn.Module] | None = None

    def session(self, root: Path) -> SiteSession:
        """The session of a site folder, as its file says now; opened where there is none.

        What an earlier session verified of the site must be there again, until ``forget``.

        Raises:
            SiteFileInvalid, FileUnreadable: see ``folder.open_site``.
        """
        session = self._sessions.get(root)
        if session is None or session.owner != os.getpid():
            pins = self._pins.get(root) if session is None else session.pins
            session = self._sessions[root] = SiteSession.open(root, pins)
        else:
            session.refresh()
        self._sessions.move_to_end(root)
        while len(self._sessions) > SESSIONS:
            gone, idle = self._sessions.popitem(last=False)
            idle.close()
            self._pins[gone] = idle.pins
        return session

    def forget(self, root: Path) -> None:
        """Close a site's session, give up its key epochs and forget what was verified."""
        self.members.forget(root)
        self._pins.pop(root, None)
        session = self._sessions.pop(root, None)
        if session is not None:
            session.close()

    def network(self, session: SiteSession, admission: Admission, model: Vector) -> nn.Module:
        """The study's network with the weights of a model; another call changes it.

        With privacy on, it was proved not to mix patients when it was built. The proof is of its
        layers, and takes the weights that it is built with: whoever sends others may have chosen
        such as hide a leak, zeros for one.

        Raises:
            NetworkUnfit, ExtraMissing: see ``build_for``, and ``require_private``.
            UpdateInvalid: the model does not fit the network.
        """
        key = (session.site.root, admission.digest)
        if self._network is None or self._network[0] != key:
            self._network = None  # So that there are never two.
            built, study = build(session, admission.study), admission.study
            if study.privacy.enabled:
                require_private(built, size=study.input.size, depth=study.input.depth)
            self._network = (key, built)
        module = self._network[1]
        flat_parameters.load(module, model)
        return module

    def cohort(
        self,
        session: SiteSession,
        admission: Admission,
        load: Callable[[], Cohort],
        *,
        anew: bool = False,
    ) -> Cohort:
        """The site's patients.

        Args:
            session: of the hospital.
            admission: of the study whose data are frozen.
            load: reads them, where they are not known.
            anew: check what is on disk, as at the start of every run.
        """
        key = (session.site.root, admission.digest)
        known = self._cohorts.get(key)
        if known is None or anew:
            found = load()
            # The same object while nothing changed: features are kept with it.
            if known is None or not same(known.cohort, found):
                known = self._cohorts[key] = _Known(replace(found, features=Features(self._rows)))
        self._cohorts.move_to_end(key)
        while len(self._cohorts) > COHORTS:
            self._cohorts.popitem(last=False)
        return known.cohort

    def parts(
        self, session: SiteSession, admission: Admission, load: Callable[[], Cohort]
    ) -> tuple[Cohort, Cohort]:
        """Who is trained on and who is kept apart; arguments as of ``cohort``."""
        cohort, study = self.cohort(session, admission, load), admission.study
        fraction = study.evaluation.site_fraction
        if not study.releases and (study.privacy.enabled or fraction == 0):
            return cohort, cohort
        known = self._cohorts[session.site.root, admission.digest]
        if known.parts is None:
            divide = split_apart if study.releases else split
            known.parts = divide(cohort, fraction)
        return known.parts


def build(session: SiteSession, study: Study) -> nn.Module:
    """Build a study's network with the site's own pretrained weights; see ``build_for``."""
    return build_for(study, models=session.site.root / MODELS_FOLDER)
