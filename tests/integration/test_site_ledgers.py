"""A site that comes with another privacy ledger than before is left out until a person confirms."""

from __future__ import annotations

from pathlib import Path

import pytest
from flwr.app import Context, Message

from cloister_fl.audit_log import AuditLog
from cloister_fl.errors import TooFewSites
from cloister_fl.membership.identity import Identity
from cloister_fl.protocol.round_messages import Prepare, Prepared, Update, pack, unpack
from cloister_fl.protocol.round_messages import TrainTask as Train
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.rounds.checkpoint import Checkpoints
from cloister_fl.server.rounds.events import Hooks
from cloister_fl.server.rounds.messenger import Messenger
from cloister_fl.server.rounds.run import Outcome, Run
from cloister_fl.server.rounds.site_ledgers import LEDGER_ACCEPTED, KnownLedger, known_ledgers
from support import studies

ONE, TWO, THREE = ("1" * 64, "2" * 64, "3" * 64)
STUDY = studies.bound(
    privacy="enabled = false", aggregation="secure = false\nmin_sites = 2", training="rounds = 1"
)


@pytest.fixture
def log(tmp_path: Path) -> AuditLog:
    return AuditLog(tmp_path / "audit.jsonl", Identity.generate())


def _run(log: AuditLog, folder: Path, ledgers: dict[str, str]) -> Outcome:
    def app(message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        task = unpack(message.content, Prepare, Train)
        if isinstance(task, Prepare):
            return Message(content=pack(Prepared(name, b"", ledgers[name])), reply_to=message)
        return Message(content=pack(Update(name, task.round, 0 * task.vector)), reply_to=message)

    grid = InProcessGrid(app, [{"site": f"/sites/{name}"} for name in ledgers])
    run = Run(Messenger(grid, log=log), STUDY, Checkpoints(folder), Hooks(), expected=len(ledgers))
    return run.execute(resume=False)


def _kinds(log: AuditLog) -> list[tuple[str, object]]:
    kinds = {"ledger", "ledger-changed", LEDGER_ACCEPTED}
    return [(one.kind, one.body["site"]) for one in log.entries() if one.kind in kinds]


def test_another_ledger_under_a_known_name_takes_no_part_until_it_is_confirmed(
    log: AuditLog, tmp_path: Path
) -> None:
    first = _run(log, tmp_path / "1", {"a": ONE, "b": TWO, "c": THREE})
    assert dict(first.refused) == {}
    # The same again, in another run.
    assert dict(_run(log, tmp_path / "2", {"a": ONE, "b": TWO, "c": THREE}).refused) == {}
    changed = _run(log, tmp_path / "3", {"a": ONE, "b": TWO, "c": ONE})
    assert dict(changed.refused) == {"c": "ledger"}
    # Asked again, it is noted once.
    assert dict(_run(log, tmp_path / "4", {"a": ONE, "b": TWO, "c": ONE}).refused) == {
        "c": "ledger"
    }
    assert _kinds(log) == [
        ("ledger", "a"), ("ledger", "b"), ("ledger", "c"), ("ledger-changed", "c"),
    ]  # fmt: skip
    log.append(LEDGER_ACCEPTED, site="c", ledger=ONE)
    assert dict(_run(log, tmp_path / "5", {"a": ONE, "b": TWO, "c": ONE}).refused) == {}
    # And no longer with the one before.
    assert dict(_run(log, tmp_path / "6", {"a": ONE, "b": TWO, "c": THREE}).refused) == {
        "c": "ledger"
    }


def test_a_study_without_privacy_has_no_ledger_and_leaves_the_known_one(
    log: AuditLog, tmp_path: Path
) -> None:
    _run(log, tmp_path / "1", {"a": ONE, "b": TWO})
    assert dict(_run(log, tmp_path / "2", {"a": "", "b": ""}).refused) == {}
    with pytest.raises(TooFewSites):
        _run(log, tmp_path / "3", {"a": TWO, "b": TWO})


def test_a_ledger_that_is_no_hash_is_no_answer_and_is_not_logged(
    log: AuditLog, tmp_path: Path
) -> None:
    outcome = _run(log, tmp_path / "1", {"a": ONE, "b": TWO, "c": "Doe, MRN 12345"})
    assert set(outcome.refused.values()) == {"message"}
    assert "Doe" not in (tmp_path / "audit.jsonl").read_text()


def test_what_the_log_says_in_order(log: AuditLog) -> None:
    log.append("ledger-changed", site="x", ledger=ONE)
    log.append("ledger", site="a", ledger=ONE)
    log.append("ledger-changed", site="a", ledger=TWO)
    log.append("ledger-changed", site="a", ledger=THREE)
    assert known_ledgers(log.entries()) == {"a": KnownLedger(ONE, THREE)}
    log.append(LEDGER_ACCEPTED, site="a", ledger=THREE)
    assert known_ledgers(log.entries()) == {"a": KnownLedger(THREE)}
