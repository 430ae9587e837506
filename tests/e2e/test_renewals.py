"""A hospital renews its certificate at a coordinator that runs, over TLS."""

from __future__ import annotations

import http.client
from contextlib import closing
from pathlib import Path

import pytest

from cloister_fl.client.network.node_keys import own_validity
from cloister_fl.client.network.renewal import renew_certificate
from cloister_fl.membership.enrolment import PATH_ROSTER
from cloister_fl.server.coordinator.site_renewal import SITE_RENEWED
from support.coordinator_process import Hospital, Running, join, wait_for
from support.renewals import age_certificate, shown_by


@pytest.mark.slow
def test_the_node_stays_itself_and_the_old_certificate_ends(
    running: Running, tmp_path: Path
) -> None:
    hospital = join(running, tmp_path / "north", "north")
    site = hospital.site
    age_certificate(running.place, site.root, 29)
    node, before = hospital.activate(), shown_by(site)
    with closing(hospital.connect()) as old:
        old.request("GET", PATH_ROSTER)
        assert old.getresponse().read()
        made = renew_certificate(site)
        assert made.days_left() > 700
        assert made == own_validity(site)
        assert shown_by(site) != before
        wait_for(lambda: not _answers(old), 10, lambda: "the old connection is still answered")
    assert Hospital(running, site).activate() == node
    row = running.row("north")
    assert row is not None
    assert row.fingerprint == shown_by(site)
    kinds = [entry.kind for entry in running.place.federation().log.entries()]
    assert kinds.count(SITE_RENEWED) == 1


def _answers(connection: http.client.HTTPSConnection) -> bool:
    try:
        connection.request("GET", PATH_ROSTER)
        response = connection.getresponse()
        response.read()
    except (OSError, http.client.HTTPException):
        return False
    return response.status == 200
