"""A federation over years: certificates are renewed, a key is lost, and every ledger stays."""

from __future__ import annotations

import re
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from cloister_fl.client.ledger.machine_registry import ledger_id
from cloister_fl.client.network.node_keys import own_validity
from cloister_fl.client.network.renewal import is_unsettled
from cloister_fl.client.site.folder import IDENTITY
from cloister_fl.membership.validity import RENEW_DAYS
from cloister_fl.server.coordinator.certificate_dates import warnings_of
from cloister_fl.server.rounds.site_ledgers import LEDGER, LEDGER_ACCEPTED, LEDGER_CHANGED
from cloister_fl.study.file import parse_study
from support.coordinator_process import wait_for
from support.deployment import Deployment, cloister, deployed, study_text
from support.renewals import age_certificate, row_of

POLICY = {
    "max_epsilon_study": "8.0",
    "max_epsilon_lifetime": "100.0",
    "colluders": "0",
    "min_sites": "3",
}


@pytest.mark.slow
def test_one_run_before_and_one_after_a_renewal_and_a_lost_key(
    three_drawn: Path, tmp_path: Path
) -> None:
    sites = {path.name: path for path in sorted((three_drawn / "sites").iterdir())}
    with deployed(tmp_path, sites, policy=POLICY) as made:
        _run(made, "before")
        ledgers, identities = _ledgers(made), _identities(made)
        nodes = {name: row_of(made.place, name).node_key for name in sites}
        ids = _nodes(made)

        _let_almost_two_years_pass(made)
        for name, hospital in made.hospitals.items():
            _await_renewed(made, name)
            hospital.wait()
        assert warnings_of(made.place) == ()
        assert _identities(made) == identities
        assert not set(nodes.values()) & {row_of(made.place, n).node_key for n in sites}
        assert _run(made, "renewed") == sorted(sites)
        assert _nodes(made) == ids
        assert _ledgers(made) == ledgers

        lost = min(sites)
        _lose_the_identity(made, lost)
        assert _run(made, "new-key") == sorted(sites)
        assert _ledgers(made) == ledgers
        assert {n for n, key in _identities(made).items() if key != identities[n]} == {lost}
        # The coordinator knew the ledger again, and nobody had to vouch for it.
        kinds = [entry.kind for entry in made.place.federation().log.entries()]
        assert kinds.count(LEDGER) == len(sites)
        assert not {LEDGER_CHANGED, LEDGER_ACCEPTED} & set(kinds)
        for hospital in made.hospitals.values():
            with closing(sqlite3.connect(hospital.folder / "ledger.sqlite")) as rows:
                text = 'SELECT COUNT(*) FROM entries WHERE body LIKE \'%"kind":"reserved"%\''
                assert rows.execute(text).fetchone() == (3,)


def _run(made: Deployment, name: str) -> list[str]:
    """A run of a study with privacy, to its end; the sites that took part."""
    text = study_text(
        name,
        training={
            "rounds": 1,
            "steps": 2,
            "expected_batch": 24,
            "images_per_patient": 2,
            "sampling_rate": 0.5,
        },
        privacy={"epsilon": 6.0},
        evaluation={"site_fraction": 0.0},
        aggregation={"min_sites": 3, "colluders": 0},
    )
    run = made.run(text)
    made.approve(parse_study(text))
    names: list[str] = made.wait_for_end(run)["site_names"]
    return sorted(names)


def _let_almost_two_years_pass(made: Deployment) -> None:
    """All certificates end within a month, and every process is started anew."""
    for name, hospital in made.hospitals.items():
        hospital.stop()
        age_certificate(made.place, hospital.folder, 29)
        own = own_validity(hospital.site)
        assert own is not None
        assert own.days_left() < RENEW_DAYS, name
    made.server.stop()
    made.restart_server()
    for hospital in made.hospitals.values():
        hospital.start(wait=False)
    cloister("server", "renew", "--dir", made.folder)


def _await_renewed(made: Deployment, name: str) -> None:
    """By the service itself, without a command."""
    site = made.hospitals[name].site

    def renewed() -> bool:
        own = own_validity(site)
        return own is not None and own.days_left() > 700 and not is_unsettled(site)

    wait_for(renewed, 300, made.told)


def _lose_the_identity(made: Deployment, name: str) -> None:
    """The site is revoked, invited again, joins with new keys; every steward accepts the roster."""
    hospital, folder = made.hospitals[name], made.folder
    hospital.stop()
    (hospital.folder / "keys" / IDENTITY).unlink()
    cloister("server", "revoke", name, "--yes", "--dir", folder)
    cloister("server", "invite", name, "--dir", folder)
    invite = folder / "invites" / f"{name}.invite"
    told = cloister("client", "join", invite, "--new-keys", "--yes", "--dir", hospital.folder)
    mark = re.search(r"^  ([0-9a-f ]+)$", told, re.M)
    assert mark is not None, told
    cloister("server", "approve", name, "--fingerprint", mark[1], "--dir", folder)
    digest = made.place.federation().roster().digest.hex()
    for each in made.hospitals.values():
        told = cloister("client", "join", "--dir", each.folder, "--accept-roster", digest)
        assert "Accepted" in told
    hospital.start()


def _ledgers(made: Deployment) -> dict[str, str]:
    return {name: ledger_id(one.folder / "ledger.sqlite") for name, one in made.hospitals.items()}


def _identities(made: Deployment) -> dict[str, bytes]:
    return {name: one.site.identity().public for name, one in made.hospitals.items()}


def _nodes(made: Deployment) -> set[int]:
    """Ids of the nodes that Flower knows now."""
    text = "SELECT node_id FROM node WHERE status != 'unregistered'"
    with closing(sqlite3.connect(made.folder / "state" / "flower.sqlite")) as rows:
        return {one for (one,) in rows.execute(text)}
