"""Hospitals that lie to the run, and runs that end in the middle: nobody honest pays for it."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from flwr.app import Context, Message, RecordDict

from cloister_fl import secagg
from cloister_fl.client.app import app
from cloister_fl.errors import MessageInvalid, TooFewSites, UpdateReuse
from cloister_fl.protocol import sessions
from cloister_fl.protocol.round_messages import (
    Exchange,
    Exchanged,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    octets,
    pack,
    unpack,
)
from cloister_fl.secagg import participant_epoch as protocol
from cloister_fl.secagg import share_keys
from cloister_fl.secagg.messages.codec import Bundle
from cloister_fl.server.rounds import secure_collector
from cloister_fl.server.rounds.checkpoint import Checkpoints
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.errors import raises
from support.federations import NAMES, approve, study, write_federation
from support.message_tap import OPEN, Between, asks_to_unmask, charges

Answer = Exchanged | Prepared | Refusal


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("peers") / "sites")


class Liar:
    """The product's ClientApp, but for one site whose answers a test alters."""

    def __init__(self, name: str, lie: Callable[[Answer, Context], RoundMessage]) -> None:
        self.name = name
        self.lie = lie

    def __call__(self, message: Message, context: Context) -> Message:
        reply = app(message, context)
        if Path(str(context.node_config["site"])).name == self.name:
            answer = unpack(reply.content, Exchanged, Prepared, Refusal)
            reply.content = RecordDict(pack(self.lie(answer, context)))
        return reply


def _hostile_dealer(monkeypatch: pytest.MonkeyPatch, name: str, mode: str) -> None:
    """Let ``name`` deal boxes that do not open, or the shares of another secret than its own."""
    right, seal = share_keys.deal, share_keys.key_agreement.seal

    def wrong(dealer: str, identity: Any, **rest: Any) -> Any:
        if dealer != name:
            return right(dealer, identity, **rest)
        if mode == "secret":
            rest["secrets"] = (bytes(32), rest["secrets"][1])
            return right(dealer, identity, **rest)

        def spoiled(key: bytes, *given: Any) -> bytes:
            return seal(bytes(32), *given)

        with monkeypatch.context() as patched:
            patched.setattr(share_keys.key_agreement, "seal", spoiled)
            return right(dealer, identity, **rest)

    monkeypatch.setattr(protocol, "deal", wrong)


def test_a_dealer_of_bad_boxes_is_found_by_its_accusers_and_left_out(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _hostile_dealer(monkeypatch, "anker", "boxes")
    out = tmp_path / "run"
    asked: list[tuple[str, str, int]] = []

    def watch(name: str, task: RoundMessage) -> RoundMessage:
        asked.append((name, task.kind, int(getattr(task, "round", 0))))
        return task

    summary = run_simulation(Simulation(study(), sites, out), client_app=Between(watch))
    assert summary["rounds"] == 3
    assert summary["refused"] == {"anker": "protocol"}
    # Once it is known for what it is, it is asked for nothing more.
    assert ("anker", "train", 2) not in asked
    assert charges(out, "birke") == [1, 2, 3]


@pytest.mark.slow
def test_a_dealer_of_a_wrong_secret_costs_one_round(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found when the sum is due; no site answers for others then, so the round is lost."""
    _hostile_dealer(monkeypatch, "anker", "secret")
    out = tmp_path / "run"
    summary = run_simulation(Simulation(study(), sites, out))
    assert summary["rounds"] == 3
    assert summary["rounds_lost"] == [1]
    assert summary["refused"] == {"anker": "protocol"}
    assert charges(out, "birke") == [1, 2, 3]
    lost = "Rounds lost to a crash or a failed aggregation: 1."
    assert any(str(line).startswith(lost) for line in summary["warnings"])


@pytest.mark.slow
def test_one_accuser_alone_is_not_believed(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A site that cries foul loses its own place, and no other's."""
    right = protocol.SiteEpoch.open

    def cries(self: protocol.SiteEpoch, *given: Any) -> None:
        from cloister_fl.errors import BoxTampered

        if self._site == "anker":
            raise BoxTampered("A lie.", blamed="birke")
        right(self, *given)

    monkeypatch.setattr(protocol.SiteEpoch, "open", cries)
    summary = run_simulation(Simulation(study(), sites, tmp_path / "run"))
    assert summary["rounds"] == 3
    assert summary["refused"] == {"anker": "protocol"}


def test_without_privacy_no_second_sum_follows_a_round_that_was_answered_for(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next round begins with the same model: without anker it would tell anker's update."""
    _hostile_dealer(monkeypatch, "anker", "secret")
    out, asked = tmp_path / "run", study(privacy=OPEN, evaluation="site_fraction = 0.0")
    rounds: list[int] = []

    def watch(name: str, task: RoundMessage) -> RoundMessage:
        if task.kind == "train":
            rounds.append(int(getattr(task, "round", 0)))
        return task

    with raises(UpdateReuse, match="no second set of sites is asked for updates of one model"):
        run_simulation(Simulation(asked, sites, out), client_app=Between(watch))
    assert set(rounds) == {1}


@pytest.mark.parametrize("answers", [True, False])
def test_a_dealer_whose_box_does_not_open_shuts_nobody_out(
    answers: bool, sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It publishes the shares and both stay; or it is silent, and named, and the other stays."""
    from cloister_fl.secagg.crypto import hashes
    from cloister_fl.secagg.messages.codec import Dealing

    right, right_answer = protocol.deal, protocol.SiteEpoch.disclose

    def garbles(dealer: str, identity: Any, **rest: Any) -> Any:
        shares, given = right(dealer, identity, **rest)
        if dealer != "birke":
            return shares, given
        keys, box = rest["epoch_keys"], bytes(len(shares.boxes[0][1]))
        assert shares.boxes[0][0] == "anker"
        first, *others = shares.dealing.dealt
        bad = replace(first, box_hash=hashes.box_hash(keys, "birke", "anker", box))
        dealing = Dealing("birke", (bad, *others)).signed_by(identity, keys)
        boxes = (("anker", box), *shares.boxes[1:])
        return replace(shares, dealing=dealing, boxes=boxes), given

    def disclose(self: protocol.SiteEpoch, request: Any) -> Any:
        if not answers:
            raise MessageInvalid("Not a word.")
        return right_answer(self, request)

    monkeypatch.setattr(protocol, "deal", garbles)
    monkeypatch.setattr(protocol.SiteEpoch, "disclose", disclose)
    summary = run_simulation(Simulation(study(), sites, tmp_path / "run"))
    assert summary["rounds"] == 3
    assert summary["refused"] == ({} if answers else {"birke": "message"})
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    took_part = [json.loads(line)["sites"] for line in metrics]
    assert took_part[1:] == ([5, 5, 5] if answers else [4, 4, 4])


@pytest.mark.slow
def test_a_site_that_complains_of_every_box_costs_trips_and_nothing_else(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloister_fl.secagg import peer_checks

    right = peer_checks._open

    def cries(parcel: Any, site: str, *rest: Any) -> Any:
        found = right(parcel, site, *rest)
        return None if site == "anker" else found

    monkeypatch.setattr(peer_checks, "_open", cries)
    summary = run_simulation(Simulation(study(), sites, tmp_path / "run"))
    assert summary["rounds"] == 3
    assert summary["refused"] == {}


def test_whatever_an_answer_makes_a_library_raise_costs_its_own_site_and_no_round(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = secure_collector.receive

    def overflows(part: Any, epoch: secagg.ServerEpoch) -> None:
        if secure_collector.author(part) == "anker":
            raise OverflowError("int too large")
        right(part, epoch)

    monkeypatch.setattr(secure_collector, "receive", overflows)
    out = tmp_path / "run"
    summary = run_simulation(Simulation(study(), sites, out))
    assert summary["rounds"] == 3
    assert summary["rounds_lost"] == []
    assert summary["refused"] == {"anker": "unreadable"}
    assert charges(out, "birke") == [1, 2, 3]


def test_an_answer_in_another_s_name_counts_for_nobody(sites: Path, tmp_path: Path) -> None:
    """A site that sends on what another sent adds nothing to the sum and takes nothing from it."""
    heard: dict[int, bytes] = {}

    def repeat(answer: Answer, context: Context) -> RoundMessage:
        if isinstance(answer, Exchanged) and answer.round in heard:
            return replace(answer, exchange=octets(heard[answer.round]))
        return answer

    liar = Liar("birke", repeat)

    def app_with_ears(message: Message, context: Context) -> Message:
        reply = liar(message, context)
        if Path(str(context.node_config["site"])).name == "anker":
            answer = unpack(reply.content, Exchanged, Prepared, Refusal)
            if isinstance(answer, Exchanged):
                heard[answer.round] = answer.exchange.tobytes()
        return reply

    summary = run_simulation(Simulation(study(), sites, tmp_path / "run"), client_app=app_with_ears)
    assert summary["rounds"] == 3
    assert summary["refused"] == {"birke": "protocol"}


@pytest.mark.slow
def test_nobody_takes_another_s_seat(sites: Path, tmp_path: Path) -> None:
    def as_birke(answer: Answer, context: Context) -> RoundMessage:
        return replace(answer, site="birke") if isinstance(answer, Prepared) else answer

    summary = run_simulation(
        Simulation(study(aggregation="min_sites = 4"), sites, tmp_path / "run"),
        client_app=Liar("anker", as_birke),
    )
    assert "birke" in summary["site_names"]
    assert "anker" not in summary["site_names"]
    assert list(summary["refused"].values()) == ["message"]
    assert next(iter(summary["refused"])).startswith("node ")


@pytest.mark.slow
def test_a_site_off_the_roster_ends_no_run(sites: Path, tmp_path: Path) -> None:
    def stranger(answer: Answer, context: Context) -> RoundMessage:
        return replace(answer, site="zorn") if isinstance(answer, Prepared) else answer

    summary = run_simulation(
        Simulation(study(aggregation="min_sites = 4"), sites, tmp_path / "run"),
        client_app=Liar("anker", stranger),
    )
    assert summary["rounds"] == 3
    assert "zorn" not in summary["site_names"]


@pytest.mark.slow
def test_a_refusal_in_another_s_name_is_not_told_as_its_own(sites: Path, tmp_path: Path) -> None:
    def slander(answer: Answer, context: Context) -> RoundMessage:
        refusal = Refusal("birke", "budget", b"\0" * 64)
        return refusal if isinstance(answer, Prepared) else answer

    summary = run_simulation(
        Simulation(study(aggregation="min_sites = 4"), sites, tmp_path / "run"),
        client_app=Liar("anker", slander),
    )
    assert "birke" in summary["site_names"]
    assert "birke" not in summary["refused"]


class Killed(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("again", [pytest.param("same process", marks=pytest.mark.slow), "resumed"])
def test_what_was_asked_for_once_is_asked_for_again_and_nothing_else(
    sites: Path, tmp_path: Path, again: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Privacy is off: one site misses the vectors, and then the sum fails, or the server dies.

    The sites answered for the other four, so a second attempt over all five would end in refusal.
    """
    lost: list[str] = []

    def lose(name: str, task: RoundMessage) -> RoundMessage | None:
        if name == "clara" and task.kind == "train" and not lost:
            lost.append(name)
            return None
        if lost and len(lost) < 3 and asks_to_unmask(task) and task.round == 1:
            if again == "resumed" and len(lost) == 2:
                raise Killed
            if name in ("anker", "birke"):
                lost.append(name)
                return task if again == "resumed" else None
        return task

    asked = study(privacy=OPEN, evaluation="site_fraction = 0.0")
    out = tmp_path / "run"
    if again == "resumed":
        with pytest.raises(Killed):
            run_simulation(Simulation(asked, sites, out), client_app=Between(lose))
        _, progress = Checkpoints(out / "checkpoint").load(asked)
        assert progress.answered == {2: ("anker", "birke", "dorn", "esche")}
        summary = run_simulation(Simulation(asked, sites, out, resume=True))
    else:
        summary = run_simulation(Simulation(asked, sites, out), client_app=Between(lose))
    rows = [json.loads(row) for row in (out / "metrics.jsonl").read_text().splitlines()]
    assert rows[1]["sites"] == 4
    assert summary["rounds"] == 3
    assert summary["rounds_lost"] == []


@pytest.mark.slow
def test_a_resumed_run_takes_in_nobody_new(sites: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    more = tmp_path / "sites"
    shutil.copytree(sites, more)

    def dies(name: str, task: RoundMessage) -> RoundMessage:
        if task.kind == "train" and task.round == 2:
            raise Killed
        return task

    with pytest.raises(Killed):
        run_simulation(Simulation(study(), more, out), client_app=Between(dies))
    write_federation(more, names=("zorn",), seed=5)
    summary = run_simulation(Simulation(study(), more, out, resume=True))
    assert summary["site_names"] == list(NAMES)
    assert summary["refused"] == {"zorn": "late"}


def test_a_round_that_the_study_does_not_have_is_refused_before_it_is_charged(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server's lie is consistent: session and task both say round 101."""
    right = sessions.update_session

    def later(*given: Any, round_number: int, **rest: Any) -> secagg.Session:
        return right(*given, round_number=100 + round_number % 100, **rest)

    def shift(name: str, task: RoundMessage) -> RoundMessage:
        return replace(task, round=task.round + 100) if isinstance(task, TrainTask) else task

    monkeypatch.setattr(sessions, "update_session", later)
    out = tmp_path / "run"
    with pytest.raises(TooFewSites, match="it rejected the request as malformed"):
        run_simulation(Simulation(study(), sites, out), client_app=Between(shift))
    assert charges(out, "anker") == []


def test_the_protocol_is_refused_where_the_study_is(sites: Path, tmp_path: Path) -> None:
    """Every message is judged by the policy, not the first one alone."""
    out = tmp_path / "run"

    def narrow(name: str, task: RoundMessage) -> RoundMessage:
        if isinstance(task, Exchange):
            file = out / "sites" / name / "site.toml"
            file.write_text(file.read_text().replace("networks = []", 'networks = ["resnet18"]'))
        return task

    wire = Between(narrow)
    with pytest.raises(TooFewSites, match="its policy does not allow the study"):
        run_simulation(Simulation(study(), sites, out), client_app=wire)
    assert {reply.reason for _, kind, reply in wire.replies if isinstance(reply, Refusal)} == {
        "policy"
    }


def test_the_protocol_is_refused_where_nothing_is_masked(sites: Path, tmp_path: Path) -> None:
    seen: list[RoundMessage] = []

    def swap(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            task = unpack(message.content, TrainTask)
            asked = Exchange(task.study, task.run, task.round, task.sites, octets(_EMPTY))
            message.content = RecordDict(pack(asked))
            message.metadata.message_type = "query.exchange"
        reply = app(message, context)
        if "cloister" in reply.content:
            seen.append(unpack(reply.content, Exchanged, Prepared, Refusal))
        return reply

    asked = study(aggregation="secure = false")
    with pytest.raises(TooFewSites):
        run_simulation(Simulation(asked, sites, tmp_path / "run"), client_app=swap)
    assert {one.reason for one in seen if isinstance(one, Refusal)} == {"message"}


_EMPTY = Bundle(()).encode()


def test_with_privacy_a_value_out_of_range_is_cut_and_never_refused(
    sites: Path, tmp_path: Path
) -> None:
    """A refusal that depends on data would be a release."""
    asked = study(aggregation="clip = 1e-6")
    summary = run_simulation(Simulation(asked, sites, tmp_path / "run"))
    assert summary["rounds"] == 3
    assert summary["refused"] == {}
    rows = [
        json.loads(row) for row in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert [row["sites"] for row in rows[1:]] == [5, 5, 5]
    # Every coordinate of the mean lies within the clip.
    assert all(row["update_norm"] < 1e-6 * 100 for row in rows[1:])


def test_every_sum_of_a_run_has_a_number_of_its_own() -> None:
    import numpy as np

    asked = study()
    model = np.zeros(3, np.float32)
    numbers = [
        sessions.update_session(asked, NAMES, round_number=number, attempt=0, model=model).round
        for number in range(1, 20)
    ] + [
        sessions.histogram_session(asked, NAMES, round_number=number, attempt=0, model=model).round
        for number in range(20)
    ]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.slow
@pytest.mark.parametrize("training", ["rounds = 1", "rounds = 2\nmomentum = 0.5"])
def test_two_studies_over_one_model_share_their_answers(
    training: str, sites: Path, tmp_path: Path
) -> None:
    """Without privacy both give the same updates, or nearly; one site less would tell that site's.

    The studies differ in name alone, or in rounds and momentum: their first model is the same.
    """
    folder = tmp_path / "sites"
    shutil.copytree(sites, folder)
    for name in NAMES:
        (folder / name / "site.toml").write_text(
            f'[site]\nname = "{name}"\n[policy]\npatients_at_most = 1000\n'
            "allow_without_privacy = true\nmin_sites = 4\n"
        )
    lines = {"privacy": OPEN, "evaluation": "site_fraction = 0.0", "training": "rounds = 1"}
    four = "min_sites = 4"
    first = study(**lines, aggregation=four)
    twin = study(**{**lines, "training": training}, aggregation=four, study='name = "twin"')
    other = study(**lines, aggregation=four, study='name = "third"')
    for name in NAMES:
        for asked in (first, twin, other):
            approve(folder / name, asked)
    run_simulation(Simulation(first, folder, tmp_path / "one"))
    out = tmp_path / "two"

    def lose(name: str, task: RoundMessage) -> RoundMessage | None:
        return None if name == "esche" and task.kind != "prepare" else task

    with pytest.raises((TooFewSites, secagg_error())):
        run_simulation(Simulation(twin, folder, out), client_app=Between(lose))
    # The very same sum may be had again.
    assert run_simulation(Simulation(other, folder, tmp_path / "three"))["rounds"] == 1


def secagg_error() -> type[Exception]:
    from cloister_fl.errors import SecureAggregationError

    return SecureAggregationError


def test_no_histogram_beyond_the_study_s_rounds(
    sites: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from cloister_fl.protocol.round_messages import EvaluateTask

    right = sessions.histogram_session

    def later(*given: Any, round_number: int, **rest: Any) -> secagg.Session:
        return right(*given, round_number=1000 + round_number % 1000, **rest)

    def shift(name: str, task: RoundMessage) -> RoundMessage:
        return replace(task, round=task.round + 1000) if isinstance(task, EvaluateTask) else task

    monkeypatch.setattr(sessions, "histogram_session", later)
    wire = Between(shift)
    asked = study(privacy=OPEN, training="rounds = 1")
    with pytest.raises(TooFewSites, match="it rejected the request as malformed"):
        run_simulation(Simulation(asked, sites, tmp_path / "run"), client_app=wire)
