"""Approval of a study by a site's steward, who has looked at the data that it would use.

What the site answers before a run rests on this look and on nothing later: the steward tells the
coordinator, by approving, that the data serve the study. It is the one thing about the data that
leaves without noise and without a charge, and a person says it.
"""

from __future__ import annotations

from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.data import frozen_dataset as manifests
from cloister_fl.client.data.frozen_dataset import Manifest
from cloister_fl.client.data.loading import (
    require_decided,
    require_sound,
    write_frozen,
)
from cloister_fl.client.data.patients import other_ledgers
from cloister_fl.client.data.reading import Reading
from cloister_fl.client.site.data_notice import note_look
from cloister_fl.client.site.folder import Site
from cloister_fl.study.schema import Study


def approve(site: Site, study: Study, reading: Reading, *, why: str = "") -> Manifest:
    """Freeze the data that were looked at, where they are not frozen yet, and approve the study.

    An approval is for these data. Frozen first: after a kill between the two, the data are frozen
    and the study waits.

    Args:
        site: the opened site.
        study: what is approved.
        reading: the look at the data, as ``loading.read_for_check`` gives it.
        why: the steward's words; they stay at the site.

    Returns:
        What the study is trained on.

    Raises:
        DataError: the data do not serve the study, or another process froze others meanwhile; an
            earlier decision on the study stands.
        PatientsUndecided, LedgerUnlinked: see ``loading.require_decided``.
        FileUnreadable, AuditLogDamaged, OutputInTheWay: a file cannot be read or written.
    """
    note_look(site.root, study.digest, reading.faults)
    require_sound(reading)
    require_decided(site, reading)
    with manifests.alone(site):
        frozen = manifests.load(site, study)
        if frozen is None:
            other_ledgers.register(site, reading.traits)
            frozen = write_frozen(site, study, reading)
    for fault in manifests.differences(frozen, reading.items, root=site.root):
        raise fault
    judge(site, study, Decision.APPROVED, why=why, data=frozen.digest_at(site.name))
    return frozen
