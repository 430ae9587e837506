"""What a site's process keeps between messages; it goes with the app that owns it."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from cloister_fl.client.data.cohort import Cohort, same, split, split_apart
from cloister_fl.client.data.feature_store import Features, Rows
from cloister_fl.client.secure_aggregation.exchange import Members
from cloister_fl.client.site.folder import Site
from cloister_fl.study.schema import Study

COHORTS = 16
"""Cohorts that are kept in memory; the least recently used goes first."""
_SIGN_EVERY = 10
"""Entries of the audit log between two signatures, at most."""


class _Known:
    """A cohort, and its parts once they are asked for: the same objects each time, as features
    are kept with them."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.parts: tuple[Cohort, Cohort] | None = None


class Kept:
    """What one app keeps in memory of its sites: cohorts, key epochs, and signatures of logs.

    Attributes:
        members: parts in secure aggregation, with their key epochs.
    """

    def __init__(self) -> None:
        self.members = Members()
        self._cohorts: OrderedDict[tuple[Path, str], _Known] = OrderedDict()
        self._rows = Rows()
        self._signed: dict[Path, int] = {}

    def cohort(
        self, site: Site, study: Study, load: Callable[[], Cohort], *, anew: bool = False
    ) -> Cohort:
        """The site's patients.

        Args:
            site: the hospital.
            study: whose data are frozen.
            load: reads them, where they are not known.
            anew: check what is on disk, as at the start of every run.
        """
        key = (site.root, study.digest)
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

    def parts(self, site: Site, study: Study, load: Callable[[], Cohort]) -> tuple[Cohort, Cohort]:
        """Who is trained on and who is kept apart; arguments as of ``cohort``."""
        cohort = self.cohort(site, study, load)
        fraction = study.evaluation.site_fraction
        if not study.releases and (study.privacy.enabled or fraction == 0):
            return cohort, cohort
        known = self._cohorts[site.root, study.digest]
        if known.parts is None:
            divide = split_apart if study.releases else split
            known.parts = divide(cohort, fraction)
        return known.parts

    def is_signature_due(self, site: Site, seq: int) -> bool:
        """Whether entry ``seq`` of the site's audit log is to be signed."""
        return seq >= self._signed.get(site.root, 0) + _SIGN_EVERY

    def signed(self, site: Site, seq: int) -> None:
        """Remember that entry ``seq`` signs what was before it."""
        self._signed[site.root] = seq
