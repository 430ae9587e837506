"""Killed at any step, the coordinator's commands leave the old state or the new one.

A process is killed (SIGKILL, by itself) at its n-th change of the disk, for many n. SQLite's own
writes are its own business; its commits are among the steps.
"""

from __future__ import annotations

import os
import signal
import sqlite3
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from cloister_fl.audit_log import examine, read
from cloister_fl.client.network import join
from cloister_fl.membership.enrolment import Invite, Request, secret_hash
from cloister_fl.membership.identity import Identity
from cloister_fl.server.coordinator.federation import AUDIT
from cloister_fl.server.coordinator.folder import Coordinator, init_coordinator, open_coordinator
from cloister_fl.server.coordinator.site_approval import approve_site, invite_sites, revoke_site
from support import coordinator_process

KILLER = """
import os, signal, sqlite3, sys
left = int(sys.argv.pop(1))
base = sys.argv.pop(1)
def count(event, arguments):
    global left
    about = str(arguments[0]) if arguments else ""
    writes = event in {"os.rename", "os.link", "os.mkdir", "os.remove", "os.chmod"} or (
        event == "open" and base in about and (arguments[2] or 0) & (os.O_WRONLY | os.O_RDWR)
    )
    if writes or event == "cloister.commit":
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(count)
from cloister_fl.server.coordinator import site_database as registry
real = registry.Registry._change
import contextlib
@contextlib.contextmanager
def change(self):
    with real(self):
        yield
        sys.audit("cloister.commit")
    sys.audit("cloister.commit")
registry.Registry._change = change
from cloister_fl.server.cli.server_group import app
app()
"""


def killed_after(steps: int, base: Path, *arguments: str) -> bool:
    """Run a command that is killed before its change number ``steps``; False where it ended."""
    done = subprocess.run(
        [sys.executable, "-c", KILLER, str(steps), str(base), *arguments],
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        timeout=60,
    )
    assert done.returncode in {0, -signal.SIGKILL}, done.stderr
    return done.returncode != 0


def assert_private(root: Path) -> None:
    for path in [root, *root.rglob("*")]:
        assert stat.S_IMODE(path.lstat().st_mode) & 0o077 == 0, path


def logged(place: Coordinator, name: str | None = None) -> list[str]:
    """What the coordinator's log says, of one site or of all; it is sound, whatever was killed."""
    log = place.keys / AUDIT
    assert examine(log, key=place.federation_root()).findings == ()
    return [entry.kind for entry in read(log) if name in {None, entry.body.get("site")}]


@pytest.mark.slow
def test_init(tmp_path: Path) -> None:
    steps, killed = 0, True
    while killed:
        root = tmp_path / str(steps)
        command = ("init", str(root), "--address", "127.0.0.1:9443")
        killed = killed_after(steps, root, *command)
        finished = (root / "server.toml").exists()
        keys = {
            path.name: path.read_bytes()
            for path in (root / "keys").glob("*")
            if not path.name.endswith(".tmp") and path.name not in {AUDIT, ".gitignore"}
        }
        if finished:
            # A folder with this file is whole: it opens, and says the root key.
            place = open_coordinator(root)
            assert place.federation().root == place.federation_root()
            assert len(keys) == 9
        if not (root / "server.toml").exists():
            again = killed_after(10**9, root, *command)
            assert not again
        place = init_coordinator(root, None)
        for name, content in keys.items():
            assert (place.keys / name).read_bytes() == content, f"{name} was replaced"
        assert place.authority().fingerprint
        assert place.federation().roster().sites == ()
        assert "roster" in logged(place)
        assert_private(root)
        assert not list(root.rglob(".*.tmp"))
        steps += 4
    assert steps > 30


@pytest.fixture
def place(tmp_path: Path) -> Coordinator:
    return coordinator_process.new_coordinator(tmp_path / "fed")


def asked(place: Coordinator, tmp_path: Path, name: str) -> Request:
    """A site that asked to join, without a server."""
    (made,) = invite_sites(place, [name], 600, to_file=False)
    invite = Invite.decode(made.line)
    site = join.prepare(tmp_path / name, invite)
    pems = [(site.keys / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)]
    request = Request.make(invite, site.identity(), *pems)
    with place.registry() as registry:
        assert registry.use(request).state == "pending"
    return request


@pytest.mark.slow
def test_invite(place: Coordinator) -> None:
    steps, killed = 0, True
    while killed:
        name = f"site-{steps}"
        killed = killed_after(steps, place.root, "invite", name, "--dir", str(place.root))
        path = place.root / "invites" / f"{name}.invite"
        if path.exists():
            # A line that was written is one that the database knows, and is whole.
            invite = Invite.decode(path.read_text())
            with sqlite3.connect(place.state / "coordinator.sqlite") as database:
                row = database.execute(
                    "SELECT site, secret_hash FROM invites WHERE id = ?", (invite.invite_id,)
                ).fetchone()
            database.close()
            assert row == (name, secret_hash(invite.secret))
        else:
            assert killed
        # What left is in the log.
        assert "invited" in logged(place, name) or not path.exists()
        # Again, and it works; at most one invite of a site is open.
        assert not killed_after(10**9, place.root, "invite", name, "--dir", str(place.root))
        with place.registry() as registry:
            assert [site for site, _ in registry.invited()].count(name) == 1
        steps += 1
    assert steps > 4
    init_coordinator(place.root, None)
    assert_private(place.root)


@pytest.mark.slow
def test_approve_and_revoke(place: Coordinator, tmp_path: Path) -> None:
    for verb in ("approve", "revoke"):
        steps, killed = 0, True
        while killed:
            name = f"{verb}-{steps}"
            request = asked(place, tmp_path, name)
            arguments = [verb, name, "--dir", str(place.root)]
            if verb == "approve":
                from cloister_fl.membership.identity import fingerprint

                arguments += ["--fingerprint", fingerprint(request.identity)]
            else:
                arguments += ["--yes"]
            killed = killed_after(steps, place.root, *arguments)
            with place.registry() as registry:
                row = registry.site(name)
            assert row is not None
            assert (row.state == "approved") == (row.certificate is not None)
            roster = place.federation().roster()
            if roster.public_key(name) is not None:
                assert row.state == "approved"
            if row.state == "approved" or roster.public_key(name) is not None:
                assert verb == "revoke" or "approved" in logged(place, name)
            if verb == "approve":
                approve_site(place, name)
                assert "approved" in logged(place, name)
                assert place.federation().roster().public_key(name) == request.identity
            else:
                revoke_site(place, name)
                assert place.federation().roster().public_key(name) is None
                assert "revoked" in logged(place, name)
            steps += 2
        assert steps > 4
    serial = place.federation().roster().serial
    init_coordinator(place.root, None)
    assert place.federation().roster().serial == serial


def test_a_used_key_does_not_come_in_twice(place: Coordinator, tmp_path: Path) -> None:
    request = asked(place, tmp_path, "first")
    assert request.identity != Identity.generate().public
    (made,) = invite_sites(place, ["second"], 600, to_file=False)
    invite = Invite.decode(made.line)
    site = join.prepare(tmp_path / "first-again", invite)
    first = tmp_path / "first" / "keys"
    pems = [(first / key).read_bytes() for key in (join.NODE_KEY, join.TLS_KEY)]
    with place.registry() as registry, pytest.raises(Exception, match="key-in-use"):
        registry.use(Request.make(invite, site.identity(), *pems))
