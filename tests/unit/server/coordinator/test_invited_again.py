"""A revoked name is invited again, with new keys; no key of before is taken."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.client.network import join
from cloister_fl.client.network.new_keys import replace_keys, replaceable
from cloister_fl.client.site.audit_log import entries_of
from cloister_fl.client.site.folder import IDENTITY, Site
from cloister_fl.errors import EnrolmentRefused, InviteInvalid, SiteStateInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import PATH_ROSTER, Request
from cloister_fl.membership.identity import Identity
from cloister_fl.server.coordinator.folder import Coordinator, Layout, init_coordinator
from cloister_fl.server.coordinator.site_approval import approve_site, invite_sites, revoke_site
from support.errors import raises
from support.renewals import (
    FleetPort,
    asked,
    copied,
    invited,
    picked_up,
    row_of,
    shown_by,
    template,
)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return template(tmp_path_factory.mktemp("made"))


@pytest.fixture
def both(made: Path, tmp_path: Path) -> tuple[Coordinator, Site]:
    return copied(made, tmp_path)


@pytest.fixture
def place(both: tuple[Coordinator, Site]) -> Coordinator:
    return both[0]


@pytest.fixture
def north(both: tuple[Coordinator, Site]) -> Site:
    return both[1]


def test_only_a_revoked_name_is_invited_again(place: Coordinator, north: Site) -> None:
    del north
    with raises(SiteStateInvalid, match="north is approved already"):
        invite_sites(place, ["north"], 600, to_file=False)
    revoke_site(place, "north")
    assert invited(place).site == "north"


def test_the_keys_of_a_revoked_site_do_not_come_back(place: Coordinator, north: Site) -> None:
    old = [(north.keys / name).read_bytes() for name in (IDENTITY, join.NODE_KEY, join.TLS_KEY)]
    revoke_site(place, "north")
    invite = invited(place)
    for kept in range(3):
        keys = [
            Identity.generate().to_pem(),
            ec_keys.generate_pem(Purpose.NODE),
            ec_keys.generate_pem(Purpose.TLS),
        ]
        keys[kept] = old[kept]
        request = Request.make(invite, Identity.from_pem(keys[0]), *keys[1:])
        with place.registry() as registry, raises(EnrolmentRefused) as refused:
            registry.use(request)
        assert refused.value.why == "key-in-use"
    assert row_of(place).state == "revoked"


def test_with_new_keys_the_name_is_the_same_site_s_again(place: Coordinator, north: Site) -> None:
    before, old = row_of(place), shown_by(north)
    serial = place.federation().roster().serial
    revoke_site(place, "north")
    invite = invited(place)
    replace_keys(north, invite)
    site = join.prepare(north.root, invite)
    assert asked(place, site, invite).state == "pending"
    assert place.federation().roster().public_key("north") is None
    assert approve_site(place, "north")
    picked_up(place, site, invite)
    after, port = row_of(place), FleetPort(place, site)
    assert not {after.identity, after.node_key, after.tls_key} & {
        before.identity,
        before.node_key,
        before.tls_key,
    }
    roster = place.federation().roster()
    assert (roster.public_key("north"), roster.serial) == (site.identity().public, serial + 2)
    assert port.ask(shown_by(site), "GET", PATH_ROSTER)[0] == 200
    assert port.ask(old, "GET", PATH_ROSTER) == (403, b"certificate-unknown")
    with place.registry() as registry:
        assert old in registry.renewals.retired("certificate")
        assert registry.renewals.successors() == {}  # another node, not the old one renewed
    assert [entry.kind for entry in entries_of(site)] == ["new-keys"]


def test_keys_are_replaced_once_for_an_invite(place: Coordinator, north: Site) -> None:
    revoke_site(place, "north")
    invite = invited(place)
    site = replaceable(north.root, invite)
    assert site is not None
    replace_keys(site, invite)
    made = (north.keys / IDENTITY).read_bytes()
    # A join whose answer was lost is repeated.
    assert replaceable(north.root, invite) is None
    assert (north.keys / IDENTITY).read_bytes() == made


def test_killed_between_the_old_identity_and_the_new_one(place: Coordinator, north: Site) -> None:
    revoke_site(place, "north")
    invite = invited(place)
    (north.keys / IDENTITY).unlink()
    site = replaceable(north.root, invite)
    assert site is not None
    replace_keys(site, invite)
    assert asked(place, join.prepare(north.root, invite), invite).state == "pending"


def test_another_s_invite_replaces_no_key(place: Coordinator, north: Site, tmp_path: Path) -> None:
    other = init_coordinator(tmp_path / "other", Layout(("127.0.0.1:9443",)))
    held = (north.keys / IDENTITY).read_bytes()
    for invite in (invited(other, "north"), invited(place, "south")):
        with raises(InviteInvalid):
            replaceable(north.root, invite)
    assert (north.keys / IDENTITY).read_bytes() == held
