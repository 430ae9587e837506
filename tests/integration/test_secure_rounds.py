"""Rounds under secure aggregation: the product's apps, sites that fail and servers that lie.

Every test wraps the product's ClientApp: what goes wrong goes wrong on the way.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message
from safetensors import safe_open

from cloister_fl import secagg
from cloister_fl.client.app import app
from cloister_fl.errors import (
    ParameterRefused,
    SecureAggregationError,
    TooFewSites,
    TooFewSitesGiven,
)
from cloister_fl.protocol.round_messages import (
    Exchange,
    Exchanged,
    Prepare,
    RoundMessage,
    TrainTask,
    octets,
)
from cloister_fl.secagg.messages.codec import Bundle, Masked, MaskRequest
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from support.errors import raises
from support.federations import NAMES, study, write_federation
from support.message_tap import OPEN, Between, asks_to_unmask, charges


@pytest.fixture(scope="module")
def sites(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_federation(tmp_path_factory.mktemp("masked") / "sites")


def _model(folder: Path) -> np.ndarray:
    with safe_open(folder / "model.safetensors", framework="np") as file:
        return np.concatenate([file.get_tensor(k).reshape(-1) for k in sorted(file.keys())])


@pytest.mark.parametrize(
    "lines",
    [
        "",
        *(
            pytest.param(text, marks=pytest.mark.slow)
            for text in (
                "weights = { anker = 3.0, dorn = 0.25 }",
                'strategy = "fedprox"\nproximal_mu = 0.1',
                'strategy = "fedadam"\nserver_learning_rate = 0.01',
                'strategy = "fedyogi"\nserver_learning_rate = 0.01',
            )
        ),
    ],
    ids=["fedavg", "weights", "fedprox", "fedadam", "fedyogi"],
)
def test_a_masked_run_gives_the_model_of_a_plain_one(
    sites: Path, tmp_path: Path, lines: str
) -> None:
    for name, secure in (("masked", "true"), ("plain", "false")):
        asked = study(privacy=OPEN, aggregation=f"secure = {secure}\n{lines}")
        summary = run_simulation(Simulation(asked, sites, tmp_path / name))
        assert summary["secure_aggregation"] is (secure == "true")
        assert summary["rounds"] == 3
    masked, plain = _model(tmp_path / "masked"), _model(tmp_path / "plain")
    # Clip 8 among five sites: units of 2**-25, and less where a weight is 3; three rounds. The
    # adaptive optimisers divide by the root of a small second moment.
    assert np.abs(masked - plain).max() < (1e-4 if "feda" in lines or "yogi" in lines else 1e-6)
    assert not np.array_equal(masked, plain)


@pytest.mark.slow
def test_the_sites_histograms_are_summed_to_the_patient(sites: Path, tmp_path: Path) -> None:
    figures = []
    for name, secure in (("masked", "true"), ("plain", "false")):
        asked = study(privacy=OPEN, training="rounds = 1", aggregation=f"secure = {secure}")
        figures.append(run_simulation(Simulation(asked, sites, tmp_path / name))["auroc_initial"])
    assert figures[0] == figures[1]


def test_nothing_but_masked_vectors_and_protocol_leaves_a_site(sites: Path, tmp_path: Path) -> None:
    wire = Between()
    run_simulation(Simulation(study(privacy=OPEN), sites, tmp_path / "run"), client_app=wire)
    vectors = 0
    for name, kind, reply in wire.replies:
        if kind == "prepare":
            continue
        assert isinstance(reply, Exchanged), (name, kind)
        bundle = secagg.decode(reply.exchange.data)
        assert isinstance(bundle, Bundle)
        vectors += sum(isinstance(part, Masked) for part in bundle.parts)
    # Three updates and four histograms from each of five sites.
    assert vectors == 5 * (3 + 4)


@pytest.mark.slow
def test_two_round_trips_a_round_after_the_first(sites: Path, tmp_path: Path) -> None:
    trips: list[str] = []

    def count(name: str, task: RoundMessage) -> RoundMessage:
        if name == "anker":
            trips.append(task.kind)
        return task

    run_simulation(Simulation(study(), sites, tmp_path / "run"), client_app=Between(count))
    assert trips == ["prepare", "exchange", "exchange", *["train", "exchange"] * 3]


@pytest.mark.slow
def test_a_site_may_miss_a_round_and_comes_back(sites: Path, tmp_path: Path) -> None:
    def lose(name: str, task: RoundMessage) -> RoundMessage | None:
        return None if name == "clara" and task.kind == "train" and task.round == 2 else task

    out = tmp_path / "run"
    run_simulation(Simulation(study(training="rounds = 4"), sites, out), client_app=Between(lose))
    rows = (out / "metrics.jsonl").read_text().splitlines()
    # It missed the request for the next round's keys, too.
    assert [json.loads(row)["sites"] for row in rows[1:]] == [5, 4, 4, 5]
    assert charges(out, "clara") == [1, 4]
    assert charges(out, "anker") == [1, 2, 3, 4]


def test_a_site_may_die_before_the_shares(sites: Path, tmp_path: Path) -> None:
    def lose(name: str, task: RoundMessage) -> RoundMessage | None:
        return None if name == "dorn" and asks_to_unmask(task) and task.round == 2 else task

    out = tmp_path / "run"
    run_simulation(Simulation(study(training="rounds = 4"), sites, out), client_app=Between(lose))
    rows = (out / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["sites"] for row in rows[1:]] == [5, 5, 4, 5]
    assert charges(out, "dorn") == [1, 2, 4]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [pytest.param("vectors", marks=pytest.mark.slow), "shares"])
def test_a_sum_that_failed_is_tried_again_without_training_again(
    sites: Path, tmp_path: Path, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    lost: list[str] = []

    def lose(name: str, task: RoundMessage) -> RoundMessage | None:
        hit = task.kind == "train" if stage == "vectors" else asks_to_unmask(task)
        hit = hit and getattr(task, "round", 0) == 2 and name in {"anker", "esche"} - set(lost)
        if hit:
            lost.append(name)
        return None if hit else task

    trained: list[tuple[str, int]] = []
    from cloister_fl.client import app as module

    stock = module.train_round

    def counted(*given: object, **named: object) -> object:
        trained.append((str(named["site"]), int(str(named["round_number"]))))
        return stock(*given, **named)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "train_round", counted)
    out = tmp_path / "run"
    summary = run_simulation(Simulation(study(), sites, out), client_app=Between(lose))
    assert summary["rounds"] == 3
    assert lost == ["anker", "esche"]
    assert sorted(trained) == sorted((name, number) for name in NAMES for number in (1, 2, 3))
    assert {name: charges(out, name) for name in NAMES} == {key: [1, 2, 3] for key in NAMES}


def test_two_missing_sites_of_five_end_the_run_by_name_and_cost_one_round(
    sites: Path, tmp_path: Path
) -> None:
    def lose(name: str, task: RoundMessage) -> RoundMessage | None:
        gone = name in ("anker", "esche") and task.kind in ("train", "exchange")
        return None if gone and getattr(task, "round", 0) == 2 else task

    out = tmp_path / "run"
    with pytest.raises(TooFewSites, match="3 of 5 sites take part, and 4 are needed"):
        run_simulation(Simulation(study(), sites, out), client_app=Between(lose))
    assert charges(out, "birke") == [1, 2]
    resumed = run_simulation(Simulation(study(), sites, out, resume=True))
    assert resumed["rounds_lost"] == [2]
    assert charges(out, "birke") == [1, 2, 3]


@pytest.mark.slow
def test_a_restart_gives_the_epoch_up_and_the_round_goes_on(sites: Path, tmp_path: Path) -> None:
    """Secrets are in memory alone: after a restart a site answers for no epoch of before."""
    out = tmp_path / "run"
    restarts: list[str] = []

    def restart(name: str, task: RoundMessage) -> RoundMessage:
        if task.kind == "train" and task.round == 2 and not restarts:
            restarts.append(name)
            app.kept.forget(out / "sites" / name)
        return task

    wire = Between(restart)
    assert run_simulation(Simulation(study(), sites, out), client_app=wire)["rounds"] == 3
    assert charges(out, restarts[0]) == [1, 3]


class TestLies:
    """What a server may try on the way; each site checks before it charges or trains."""

    def _refused(
        self,
        sites: Path,
        out: Path,
        change: Callable[[str, RoundMessage], RoundMessage | None],
        privacy: str = "",
    ) -> str:
        asked = study(privacy=privacy or "epsilon = 6.0")
        with pytest.raises((TooFewSites, SecureAggregationError)) as caught:
            run_simulation(Simulation(asked, sites, out), client_app=Between(change))
        return str(caught.value)

    def test_another_model_than_the_session_says(self, sites: Path, tmp_path: Path) -> None:
        def swap(name: str, task: RoundMessage) -> RoundMessage:
            # In round 1 it is another model than the study's, which is refused for itself.
            if isinstance(task, TrainTask) and task.round == 2:
                vector = task.vector.copy()
                vector[0] += 1
                return TrainTask(
                    task.study, task.run, task.round, task.sites, task.exchange, vector
                )
            return task

        told = self._refused(sites, tmp_path / "run", swap)
        assert "CLO-718" in told
        assert charges(tmp_path / "run", "anker") == [1]

    def test_no_masks_at_all(self, sites: Path, tmp_path: Path) -> None:
        """An empty exchange is what an unmasked study would send."""

        def strip(name: str, task: RoundMessage) -> RoundMessage:
            if isinstance(task, TrainTask):
                return replace(task, exchange=octets())
            return task

        self._refused(sites, tmp_path / "run", strip)
        assert charges(tmp_path / "run", "anker") == []

    def test_a_vector_asked_for_without_a_model(self, sites: Path, tmp_path: Path) -> None:
        wire = Between()

        def ask(name: str, task: RoundMessage) -> RoundMessage:
            if isinstance(task, TrainTask):
                return Exchange(task.study, task.run, task.round, task.sites, task.exchange)
            return task

        wire.change = ask
        with pytest.raises((TooFewSites, SecureAggregationError)):
            run_simulation(Simulation(study(), sites, tmp_path / "run"), client_app=_as_query(wire))
        assert charges(tmp_path / "run", "anker") == []

    def test_another_round_than_the_session_says(self, sites: Path, tmp_path: Path) -> None:
        def shift(name: str, task: RoundMessage) -> RoundMessage:
            if isinstance(task, TrainTask):
                return replace(task, round=3)
            return task

        told = self._refused(sites, tmp_path / "run", shift)
        assert "CLO-718" in told
        assert charges(tmp_path / "run", "anker") == []

    def test_another_weight_than_the_study_says(self, sites: Path, tmp_path: Path) -> None:
        def heavier(name: str, task: RoundMessage) -> RoundMessage:
            if not isinstance(task, TrainTask):
                return task
            bundle = secagg.decode(task.exchange.data)
            assert isinstance(bundle, Bundle)
            parts = []
            for part in bundle.parts:
                if isinstance(part, MaskRequest):
                    weights = tuple((site, 2.0) for site, _ in part.session.weights)
                    session = replace(part.session, weights=weights)
                    parts.append(replace(part, session=session))
                else:
                    parts.append(part)
            data = octets(Bundle(tuple(parts)).encode())
            return replace(task, exchange=data)

        told = self._refused(sites, tmp_path / "run", heavier)
        assert "CLO-718" in told
        assert charges(tmp_path / "run", "anker") == []

    def test_another_roster_than_the_pinned_one(self, sites: Path, tmp_path: Path) -> None:
        def other(name: str, task: RoundMessage) -> RoundMessage:
            if isinstance(task, Prepare):
                return replace(task, roster="00" * 32)
            return task

        told = self._refused(sites, tmp_path / "run", other)
        assert "its trusted roster is another one" in told

    def test_bytes_that_are_no_bundle(self, sites: Path, tmp_path: Path) -> None:
        def garble(name: str, task: RoundMessage) -> RoundMessage:
            if isinstance(task, Exchange):
                data = octets(task.exchange.tobytes()[:-1])
                return replace(task, exchange=data)
            return task

        told = self._refused(sites, tmp_path / "run", garble)
        assert "it rejected the request as malformed" in told


def _as_query(wire: Between) -> Callable[[Message, Context], Message]:
    """Deliver a training message as a query of the protocol."""

    def deliver(message: Message, context: Context) -> Message:
        if message.metadata.message_type == "train":
            message.metadata.message_type = "query.exchange"
        return wire(message, context)

    return deliver


def test_a_value_out_of_range_is_named_at_the_site_and_nothing_is_sent(
    sites: Path, tmp_path: Path
) -> None:
    asked = study(privacy=OPEN, aggregation="clip = 1e-6", evaluation="site_fraction = 0.0")
    wire = Between()
    with pytest.raises((TooFewSites, SecureAggregationError)) as caught:
        run_simulation(Simulation(asked, sites, tmp_path / "run"), client_app=wire)
    assert "CLO-719" in str(caught.value)
    # It is the site's own fault and no failed check of the protocol.
    assert "anker: it declined; the reason is shown at the site" in str(caught.value)
    for _, kind, reply in wire.replies:
        if kind != "prepare":
            assert isinstance(reply, Exchanged)
            bundle = secagg.decode(reply.exchange.data)
            assert isinstance(bundle, Bundle)
            assert not any(isinstance(part, Masked) for part in bundle.parts)
            assert b"CLO-719" not in reply.exchange.tobytes()


@pytest.mark.parametrize(
    ("count", "lines", "words"),
    [
        (2, "min_sites = 2", ("aggregation.secure = false", "Invite more sites")),
        (3, "min_sites = 3", ("aggregation.colluders = 0", "aggregation.secure = false")),
    ],
)
def test_too_few_to_sum_in_secret_is_refused_with_what_to_do(
    tmp_path: Path, count: int, lines: str, words: tuple[str, ...]
) -> None:
    few = write_federation(tmp_path / "sites", names=NAMES[:count], patients=20, images=1)
    with raises(ParameterRefused) as caught:
        run_simulation(Simulation(study(aggregation=lines), few, tmp_path / "run"))
    for word in words:
        assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_fewer_sites_than_the_study_wants(tmp_path: Path) -> None:
    few = write_federation(tmp_path / "sites", names=NAMES[:4], patients=20, images=1)
    with raises(TooFewSitesGiven, match=r"lower aggregation\.min_sites"):
        run_simulation(Simulation(study(), few, tmp_path / "run"))


def test_three_sites_that_trust_each_other_run_and_are_told_what_that_means(tmp_path: Path) -> None:
    three = write_federation(tmp_path / "sites", names=NAMES[:3], patients=24, images=1)
    asked = study(aggregation="min_sites = 3\ncolluders = 0", training="rounds = 1")
    summary = run_simulation(Simulation(asked, three, tmp_path / "run"))
    assert summary["rounds"] == 1
    told = " ".join(str(line) for line in summary["warnings"])
    assert "No site may collude" in told
    assert "No site may drop out" in told
