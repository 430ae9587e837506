"""Each database and log of a site and of a coordinator, damaged in each way: what is told, and that
nothing of it is lost."""

from __future__ import annotations

import random
import re
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.client.admission.approvals import Decision, judge
from cloister_fl.client.cli import client_group
from cloister_fl.client.data import quarantine
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import CloisterError, Reject, ServerFolderInvalid
from cloister_fl.server.cli import server_group
from cloister_fl.server.coordinator import run_queue, site_database
from cloister_fl.server.coordinator.folder import Layout, init_coordinator, open_coordinator
from cloister_fl.server.coordinator.run_queue import SUMMARY, Status, new_run, next_run
from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints, Progress, RunState
from cloister_fl.server.rounds.strategies import OptimizerState
from cloister_fl.server.service import run_executor, supervisor
from cloister_fl.study.cost import charges
from support import commands
from support.errors import raises
from support.federations import SEEN, study

pytestmark = [
    pytest.mark.process,
    pytest.mark.filterwarnings("ignore:No path_separator found:DeprecationWarning"),
]

RUN = "bright-half-1"
COMMAND = re.compile(r"\b(cloister (client|server|verify|explain) \S|mv --|ls -l |df -h )")


def _foreign(path: Path) -> None:
    """A file of the right form that holds something else."""
    is_database = path.suffix == ".sqlite"
    path.unlink()
    if is_database:
        with closing(sqlite3.connect(path)) as made:
            made.execute("CREATE TABLE other (name TEXT)")
            made.commit()
        path.chmod(0o600)
    else:
        path.write_text('{"other": 1}\n')
        path.chmod(0o600)


def _noise(path: Path, begin: float = 0.0) -> None:
    held = path.read_bytes()
    kept = held[: int(len(held) * begin)]
    path.write_bytes(kept + random.Random(5).randbytes(max(64, len(held) - len(kept))))


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "empty": lambda path: path.write_bytes(b""),
    "noise": _noise,
    "half-noise": lambda path: _noise(path, 0.5),
    "foreign": _foreign,
}


@pytest.fixture(scope="module")
def fed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A coordinator with two invited sites, and a run with a checkpoint and a model."""
    from cloister_fl.server.flower import superlink

    root = tmp_path_factory.mktemp("fed") / "fed"
    place = init_coordinator(root, Layout(("127.0.0.1:9443",)))
    commands.invoke(server_group.app, "invite", "anker", "birke", "--dir", root)
    run = new_run(root, study(), wait=1, timeout=1, holdout=None)
    assert run.name == RUN
    run.tell(Status(state="failed", told="as before"))
    checkpoints = Checkpoints(run.path / CHECKPOINT_FOLDER)
    model = np.zeros(5, np.float32)
    checkpoints.save(study(), RunState("ab" * 16, 2, model, OptimizerState(model, model)))
    checkpoints.mark(Progress(2, ("anker",)))
    (run.path / SUMMARY).write_text('{"study_hash": "", "metrics_final": null}')
    _, nodes = superlink.build(place.state / "flower.sqlite", "token", b"secret")
    nodes.shrink()
    return root


@pytest.fixture(scope="module")
def hospital(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A site with a study that was approved, a round that was charged, and a quarantined file."""
    root = tmp_path_factory.mktemp("site") / "anker"
    site = init_site(root, policy=Policy(patients_at_most=1_000, max_epsilon_study=6.0))
    asked = study()
    judge(site, asked, Decision.APPROVED, data=SEEN)
    session = SiteSession.open(root)
    cost = charges(asked)
    session.require_newest()
    session.ledger.reserve(asked.digest, "ab" * 16, cost.step, cost.steps, cost.delta, 6.0, 100.0)
    session.note()
    session.close()
    held = quarantine.QuarantinedFile("0" * 12, Reject.BURNED_IN, None, bytes(32))
    quarantine.decide(site, held, quarantine.Decision.RELEASED, why="seen")
    return root


def _told(actions: dict[str, Callable[[], object]]) -> dict[str, CloisterError]:
    """The errors of actions; whatever else is raised fails the test."""
    found = {}
    for name, act in actions.items():
        try:
            act()
        except CloisterError as error:
            found[name] = error
    for error in found.values():
        assert not error.code.startswith("CLO-9"), error
        assert COMMAND.search(str(error)), error
    return found


def _damaged(sound: Path, root: Path, file: str, damage: str) -> tuple[Path, bytes]:
    """Copy a folder to ``root`` and damage a file there; its path, and what it holds now."""
    shutil.copytree(sound, root)
    path = root / file
    path.parent.mkdir(exist_ok=True)
    path.touch(0o600)
    DAMAGES[damage](path)
    return path, path.read_bytes()


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "is_told", "acts"),
    [
        ("state/coordinator.sqlite", True, "status sites"),
        ("state/flower.sqlite", True, "begin"),
        ("keys/audit.jsonl", True, "audit"),
        (f"runs/{RUN}/run.json", True, "status queue study"),
        (f"runs/{RUN}/summary.json", True, "report"),
        (f"runs/{RUN}/checkpoint/state.safetensors", True, "load"),
        (f"runs/{RUN}/checkpoint/progress.json", True, "load"),
        (f"runs/{RUN}/status.json", False, "status queue"),
        ("log/refused.jsonl", False, "audit"),
        ("keys/root.pub", True, "root"),
        ("keys/control.token", True, "begin"),
    ],
)
def test_a_damaged_file_of_the_coordinator_is_told_with_a_way_on(
    file: str, is_told: bool, acts: str, damage: str, fed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "fed"
    path, before = _damaged(fed, root, file, damage)

    def command(*words: str) -> Callable[[], object]:
        return lambda: commands.invoke(server_group.app, *words, "--dir", root)

    def begin() -> None:
        """As ``start`` does, with the engine's database."""
        place = open_coordinator(root)
        with place.registry() as registry:
            supervisor._Service(place, registry)._build()

    actions = {
        "status": command("status"),
        "sites": command("sites"),
        "audit": command("audit"),
        "report": command("report", RUN),
        "begin": begin,
        "root": lambda: open_coordinator(root).federation_root(),
        "queue": lambda: next_run(root),
        "study": lambda: run_queue.find_run(root, RUN).study(),
        "load": lambda: Checkpoints(root / "runs" / RUN / CHECKPOINT_FOLDER).load(study()),
    }
    told = _told({name: actions[name] for name in acts.split()})
    # What is empty of a log or of the engine's messages has nothing to tell.
    silent = damage == "empty" and file in {"state/flower.sqlite", "keys/audit.jsonl"}
    assert bool(told) == (is_told and not silent), told
    if not silent:
        assert path.read_bytes() == before
    if file.endswith("run.json"):
        assert (
            "run.json is missing or not valid"
            in commands.invoke(server_group.app, "status", "--dir", root).output
        )


@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize(
    ("file", "is_told", "acts"),
    [
        ("ledger.sqlite", True, "budget message"),
        ("audit/audit.jsonl", True, "audit message quarantine"),
        ("approvals.json", True, "review"),
        ("quarantine.json", True, "quarantine"),
        ("ledger.high", True, "message"),
        ("notice.json", False, "status"),
        ("data.json", False, "status"),
        ("audit.claimed", False, "message"),
        ("run/service.json", False, "status"),
    ],
)
def test_a_damaged_file_of_a_hospital_is_told_with_a_way_on(
    file: str, is_told: bool, acts: str, damage: str, hospital: Path, tmp_path: Path
) -> None:
    root = tmp_path / "anker"
    path, before = _damaged(hospital, root, file, damage)

    def command(*words: str) -> Callable[[], object]:
        return lambda: commands.invoke(client_group.app, *words, "--dir", root)

    actions = {
        "status": command("status"),
        "budget": command("budget"),
        "audit": command("audit"),
        "review": command("review"),
        "quarantine": lambda: quarantine.judgements(init_site(root)),
        "message": lambda: SiteSession.open(root).require_newest(),
    }
    told = _told({name: actions[name] for name in acts.split()})
    assert bool(told) == is_told, told
    # An empty ledger is begun anew, and refused until the steward accepts that.
    if not (damage == "empty" and file == "ledger.sqlite"):
        assert path.read_bytes() == before


def test_a_database_that_another_program_keeps_locked_is_told(
    fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "fed"
    shutil.copytree(fed, root)
    monkeypatch.setattr(site_database, "_WAIT_MS", 50)
    place = open_coordinator(root)
    with closing(sqlite3.connect(place.database, isolation_level=None)) as holder:
        holder.execute("BEGIN IMMEDIATE")
        with place.registry() as registry:
            assert len(registry.invited()) == 2
            with raises(ServerFolderInvalid, match="locked by another program.*fuser -v"):
                registry.revoke("anker")
    with place.registry() as registry:
        registry.revoke("anker")


def test_a_database_that_is_gone_is_not_taken_for_a_federation_without_sites(
    fed: Path, tmp_path: Path
) -> None:
    root = tmp_path / "fed"
    shutil.copytree(fed, root)
    place = open_coordinator(root)
    place.database.unlink()
    for words in (("sites",), ("status",), ("invite", "clara")):
        with raises(ServerFolderInvalid, match="coordinator.sqlite is missing"):
            commands.invoke(server_group.app, *words, "--dir", root)
    assert not place.database.exists()
    # A person's own word makes a new one.
    commands.invoke(server_group.app, "init", root)
    with place.registry() as registry:
        assert registry.sites() == ()


def test_a_run_that_cannot_be_resumed_says_what_to_do_at_the_coordinator(
    fed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "fed"
    shutil.copytree(fed, root)
    run = next(run_queue.runs(root))

    def load(*_: object) -> None:
        Checkpoints(run.path / "nowhere").load(study())

    monkeypatch.setattr(run_executor, "_run", load)
    run_executor.execute(open_coordinator(root), run)
    status = run.status()
    assert (status.state, status.code) == ("failed", "CLO-504")
    assert f"cloister server run STUDY-FILE --dir {root}" in status.told
