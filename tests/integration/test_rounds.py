"""The run over a grid: sites that refuse, lie, fail or vanish, and what a crash costs."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message, RecordDict

from cloister_fl.errors import NothingToResume, RunStopped, TooFewSites
from cloister_fl.metrics.classification import BINS
from cloister_fl.protocol.round_messages import (
    Evaluated,
    EvaluateTask,
    Finish,
    Finished,
    Prepare,
    Prepared,
    Refusal,
    RoundMessage,
    TrainTask,
    Update,
    pack,
    unpack,
)
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.results.artifacts import NOT_RELEASED, site_epsilons, warnings
from cloister_fl.server.rounds.checkpoint import Checkpoints, Progress, Released
from cloister_fl.server.rounds.collector import PlainCollector
from cloister_fl.server.rounds.events import Began, Event, Hooks, KeepWhatIsThere
from cloister_fl.server.rounds.messenger import Messenger
from cloister_fl.server.rounds.run import Outcome, Run
from cloister_fl.study.cost import RELEASE_BINS, study_epsilon
from cloister_fl.study.initial_model import bind
from cloister_fl.study.schema import Study
from cloister_fl.tasks.divided_holdout import Holdout
from support import studies
from support.errors import raises
from support.holdouts import holdout_patients

Answer = Callable[[str, TrainTask], RoundMessage]


def _study(**tables: studies.Table) -> Study:
    few: dict[str, studies.Table] = {
        "aggregation": {"secure": False, "min_sites": 2},
        "training": {"rounds": 3},
        # So many patients that made-up updates are possible: see ``study.update_bound``.
        "privacy": {"delta": 1e-8},
    }
    return bind(studies.study(**studies.merged(few, tables)))


def _add(value: float) -> Answer:
    def answer(name: str, task: TrainTask) -> RoundMessage:
        vector = np.full(task.vector.shape, value, np.float32)
        return Update(site=name, round=task.round, vector=vector)

    return answer


@dataclass
class Sites:
    """A ClientApp of made-up sites: how each answers a training task."""

    answers: dict[str, Answer]
    refuse: dict[str, str] = field(default_factory=dict)
    seen: list[tuple[str, str, int]] = field(default_factory=list)
    evaluated: list[np.ndarray] = field(default_factory=list)
    bins: int = BINS

    def __call__(self, message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        task = unpack(message.content, Prepare, TrainTask, EvaluateTask, Finish)
        self.seen.append((name, task.kind, getattr(task, "round", 0)))
        reply: RoundMessage
        if isinstance(task, Prepare):
            reason = self.refuse.get(name)
            reply = Refusal(name, reason, b"") if reason else Prepared(name, b"", "")
        elif isinstance(task, Finish):
            reply = Finished(name)
        elif isinstance(task, EvaluateTask):
            self.evaluated.append(task.vector)
            counts = np.zeros((2, self.bins), np.int64)
            counts[0, 0] = counts[1, -1] = 10
            reply = Evaluated(name, task.round, self.bins, counts.reshape(-1))
        else:
            reply = self.answers[name](name, task)
        return Message(content=pack(reply), reply_to=message)


def _run(
    sites: Sites,
    study: Study,
    folder: Path,
    *,
    resume: bool = False,
    events: list[Event] | None = None,
    holdout: Holdout | None = None,
    check: Callable[[], None] | None = None,
) -> Outcome:
    grid = InProcessGrid(sites, [{"site": f"/sites/{name}"} for name in sites.answers])
    told = events if events is not None else []
    run = Run(
        Messenger(grid, check=check),
        study,
        Checkpoints(folder),
        Hooks(holdout=holdout, notify=told.append, check=check or (lambda: None)),
        expected=len(sites.answers),
    )
    return run.execute(resume=resume)


def test_the_model_moves_by_the_mean_of_the_updates(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false")
    sites = Sites({"a": _add(1.0), "b": _add(4.0)})
    outcome = _run(sites, study, tmp_path)
    start = _run(sites, _study(privacy="enabled = false", training=""), tmp_path / "again")
    first = Checkpoints(tmp_path).load(study)[0]
    np.testing.assert_array_equal(first.model, outcome.state.model)
    np.testing.assert_array_equal(start.state.model, outcome.state.model)
    assert outcome.state.completed == 3
    assert outcome.sites == ("a", "b")
    # Three rounds, each with a mean of 2.5 in each of D values.
    size = outcome.state.model.size
    assert outcome.state.figures[-1].update_norm == pytest.approx(2.5 * size**0.5, rel=1e-6)


def test_public_weights_count_and_nothing_else(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false", aggregation="weights = { a = 3.0 }")
    outcome = _run(Sites({"a": _add(1.0), "b": _add(5.0)}), study, tmp_path)
    size = outcome.state.model.size
    assert outcome.state.figures[-1].update_norm == pytest.approx(2.0 * size**0.5, rel=1e-6)


def test_the_order_of_nodes_does_not_change_a_bit(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false")
    rng = np.random.default_rng(3)
    values = {name: rng.normal(size=100_000).astype(np.float32) for name in "abc"}

    def answer(name: str, task: TrainTask) -> RoundMessage:
        return Update(name, task.round, values[name][: task.vector.size])

    one = _run(Sites(dict.fromkeys("abc", answer)), study, tmp_path / "1")
    two = _run(Sites(dict.fromkeys("cab", answer)), study, tmp_path / "2")
    assert one.state.model.tobytes() == two.state.model.tobytes()


@pytest.mark.parametrize(
    "lie",
    [
        lambda name, task: Update("a", task.round, task.vector),
        lambda name, task: Update(name, task.round + 1, task.vector),
        lambda name, task: Update(name, task.round, task.vector[:-1]),
        lambda name, task: Update(name, task.round, np.full_like(task.vector, np.nan)),
        lambda name, task: Prepared(name, b"", ""),
    ],
    ids=["other-name", "other-round", "too-short", "nan", "other-kind"],
)
def test_an_update_that_is_not_as_agreed_is_left_out(tmp_path: Path, lie: Answer) -> None:
    study = _study(privacy="enabled = false")
    outcome = _run(Sites({"a": _add(1.0), "b": _add(1.0), "z": lie}), study, tmp_path)
    assert [figures.sites for figures in outcome.state.figures[1:]] == [2, 2, 2]
    assert set(outcome.refused) == {"z"}


def test_a_site_that_raises_is_left_out_without_its_text(tmp_path: Path) -> None:
    def fail(name: str, task: TrainTask) -> RoundMessage:
        raise RuntimeError("patient Doe, MRN 12345")

    study = _study(privacy="enabled = false")
    outcome = _run(Sites({"a": _add(1.0), "b": _add(1.0), "z": fail}), study, tmp_path)
    assert dict(outcome.refused) == {"z": "declined"}


def test_too_few_sites_stop_the_run_with_their_reasons(tmp_path: Path) -> None:
    study = _study()
    sites = Sites({"a": _add(1.0), "b": _add(1.0)}, refuse={"b": "policy"})
    with pytest.raises(TooFewSites) as caught:
        _run(sites, study, tmp_path)
    assert "1 of 2 sites take part" in str(caught.value)
    assert "b: its policy does not allow the study" in str(caught.value)
    assert ("a", "train", 1) not in sites.seen


def test_two_nodes_under_one_name_count_once(tmp_path: Path) -> None:
    class Twins(Sites):
        def __call__(self, message: Message, context: Context) -> Message:
            context.node_config["site"] = "/sites/a"
            return super().__call__(message, context)

    with pytest.raises(TooFewSites, match="1 of 2 sites"):
        _run(Twins({"a": _add(1.0), "b": _add(1.0)}), _study(), tmp_path)


class Killed(BaseException):
    """Stands for the end of the process."""


def _dies_in(round_number: int) -> Answer:
    def answer(name: str, task: TrainTask) -> RoundMessage:
        if task.round == round_number:
            raise Killed
        return _add(1.0)(name, task)

    return answer


def test_with_privacy_a_lost_round_is_charged_and_never_sent_again(tmp_path: Path) -> None:
    study = _study()
    sites = Sites({"a": _add(1.0), "b": _dies_in(2)})
    with pytest.raises(Killed):
        _run(sites, study, tmp_path)
    events: list[Event] = []
    later = Sites({"a": _add(1.0), "b": _add(1.0)})
    outcome = _run(later, study, tmp_path, resume=True, events=events)
    assert [entry for entry in later.seen if entry[1] == "train"] == [
        ("a", "train", 3),
        ("b", "train", 3),
    ]
    assert outcome.state.lost == (2,)
    assert outcome.state.started == {"a": 3, "b": 3}
    began = next(event for event in events if isinstance(event, Began))
    assert began.lost == (2,)
    assert began.update_bytes == outcome.state.model.nbytes
    assert outcome.state.figures[-1].epsilon == study_epsilon(study, 3)


def test_all_rounds_that_were_sent_count_where_the_state_is_an_older_copy(tmp_path: Path) -> None:
    """The state of an earlier round beside newer progress, as a backup restored by halves."""
    study = _study(training={"rounds": 5})
    with pytest.raises(Killed):
        _run(Sites({"a": _add(1.0), "b": _dies_in(2)}), study, tmp_path)
    older = (tmp_path / "state.safetensors").read_bytes()
    with pytest.raises(Killed):
        _run(Sites({"a": _add(1.0), "b": _dies_in(4)}), study, tmp_path, resume=True)
    (tmp_path / "state.safetensors").write_bytes(older)
    # Only one is asked in the last round that was sent; whom the two before asked is not known.
    Checkpoints(tmp_path).mark(Progress(4, ("a",)))
    later = Sites({"a": _add(1.0), "b": _add(1.0)})
    outcome = _run(later, study, tmp_path, resume=True)
    assert [entry[2] for entry in later.seen if entry[:2] == ("a", "train")] == [5]
    assert outcome.state.lost == (2, 3, 4)
    assert outcome.state.started == {"a": 5, "b": 4}
    assert outcome.state.figures[-1].epsilon == study_epsilon(study, 5)


def test_a_model_of_another_length_is_not_resumed(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false")
    with pytest.raises(Killed):
        _run(Sites({"a": _add(1.0), "b": _dies_in(2)}), study, tmp_path)
    state = Checkpoints(tmp_path).load(study)[0]
    Checkpoints(tmp_path).save(study, replace(state, model=state.model[:5]))
    later = Sites({"a": _add(1.0), "b": _add(1.0)})
    with raises(NothingToResume, match="CLO-504"):
        _run(later, study, tmp_path, resume=True)
    assert later.seen == []


def test_without_privacy_the_interrupted_round_is_repeated(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false")
    with pytest.raises(Killed):
        _run(Sites({"a": _add(1.0), "b": _dies_in(2)}), study, tmp_path)
    later = Sites({"a": _add(1.0), "b": _add(1.0)})
    outcome = _run(later, study, tmp_path, resume=True)
    assert [entry[2] for entry in later.seen if entry[:2] == ("a", "train")] == [2, 3]
    assert outcome.state.lost == ()


def test_a_resumed_run_keeps_its_id_and_ends_like_an_uninterrupted_one(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false")
    whole = _run(Sites({"a": _add(1.0), "b": _add(2.0)}), study, tmp_path / "whole")
    with pytest.raises(Killed):
        _run(Sites({"a": _dies_in(3), "b": _add(2.0)}), study, tmp_path / "cut")
    before = Checkpoints(tmp_path / "cut").load(study)[0].run
    outcome = _run(Sites({"a": _add(1.0), "b": _add(2.0)}), study, tmp_path / "cut", resume=True)
    assert outcome.state.run == before
    assert outcome.state.model.tobytes() == whole.state.model.tobytes()


def test_the_moving_average_is_measured_released_and_kept_over_a_crash(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false", aggregation="ema = 0.5")
    with pytest.raises(Killed):
        _run(Sites({"a": _dies_in(3), "b": _add(1.0)}), study, tmp_path)
    start = Checkpoints(tmp_path).load(study)[0].model - np.float32(2)
    measured: list[np.ndarray] = []

    def score(model: np.ndarray) -> np.ndarray:
        measured.append(model)
        return np.full((2, 2), 0.5)

    patients = holdout_patients(range(2))
    holdout = Holdout(study.task, patients, score)
    sites = Sites({"a": _add(1.0), "b": _add(1.0)})
    state = _run(sites, study, tmp_path, resume=True, holdout=holdout).state
    # Rounds 1, 2, 3 moved by 1 each: (0.25 x 1 + 0.5 x 2 + 3) / 1.75.
    np.testing.assert_allclose(state.released, start + np.float32(17 / 7), atol=1e-5)
    np.testing.assert_allclose(state.model, start + np.float32(3), atol=1e-5)
    np.testing.assert_array_equal(measured[-1], state.released)


def test_a_lost_round_does_not_count_in_the_moving_average(tmp_path: Path) -> None:
    study = _study(aggregation="ema = 0.5")
    with pytest.raises(Killed):
        _run(Sites({"a": _dies_in(1), "b": _add(1.0)}), study, tmp_path)
    start = Checkpoints(tmp_path).load(study)[0].model
    sites = Sites({"a": _add(1.0), "b": _add(1.0)})
    state = _run(sites, study, tmp_path, resume=True).state
    assert state.lost == (1,)
    # Two rounds gave a model: (0.5 x 1 + 2) / 1.5.
    np.testing.assert_allclose(state.released, start + np.float32(5 / 3), atol=1e-5)


def test_a_finished_run_can_be_resumed_and_trains_nothing(tmp_path: Path) -> None:
    study = _study()
    _run(Sites({"a": _add(1.0), "b": _add(1.0)}), study, tmp_path)
    later = Sites({"a": _add(1.0), "b": _add(1.0)})
    outcome = _run(later, study, tmp_path, resume=True)
    assert {kind for _, kind, _ in later.seen} == {"prepare"}
    assert outcome.state.completed == 3


def test_without_privacy_the_sites_measure(tmp_path: Path) -> None:
    study = _study(privacy="enabled = false")
    outcome = _run(Sites({"a": _add(0.0), "b": _add(0.0)}), study, tmp_path)
    metrics = outcome.state.figures[0].metrics
    assert metrics is not None
    assert metrics.auroc is not None
    assert metrics.auroc.value == 1.0
    assert metrics.patients == sum(metrics.class_counts) > 0


def test_with_privacy_no_site_is_asked_for_a_figure(tmp_path: Path) -> None:
    sites = Sites({"a": _add(0.0), "b": _add(0.0)})
    outcome = _run(sites, _study(), tmp_path)
    assert "evaluate" not in {kind for _, kind, _ in sites.seen}
    assert outcome.state.figures[-1].metrics is None


def test_epsilon_grows_with_the_rounds_up_to_what_was_asked(tmp_path: Path) -> None:
    study = _study(privacy="epsilon = 2.0")
    outcome = _run(Sites({"a": _add(0.0), "b": _add(0.0)}), study, tmp_path)
    spent = [figures.epsilon or 0.0 for figures in outcome.state.figures]
    assert spent == sorted(spent)
    assert spent[0] == 0.0
    assert 1.9 < spent[-1] <= 2.0


def test_bytes_are_counted_by_site(tmp_path: Path) -> None:
    outcome = _run(Sites({"a": _add(0.0), "b": _add(0.0)}), _study(), tmp_path)
    size = outcome.state.model.size
    for count in outcome.state.sent.values():
        assert 3 * 4 * size < count < 3 * (4 * size + 300)


def test_messages_are_copied_so_no_side_sees_the_other(tmp_path: Path) -> None:
    kept: list[RecordDict] = []

    def client(message: Message, context: Context) -> Message:
        kept.append(message.content)
        reply = Message(content=pack(Prepared("a", b"", "")), reply_to=message)
        kept.append(reply.content)
        return reply

    grid = InProcessGrid(client, [{"site": "/sites/a"}])
    sent = Message(
        content=pack(Prepare("s", "r", 1, "", b"", "")), dst_node_id=2, message_type="query.prepare"
    )
    (received,) = grid.send_and_receive([sent])
    kept[0]["cloister"]["study"] = "changed"
    kept[1]["cloister"]["site"] = "changed"
    assert sent.content["cloister"]["study"] == "s"
    assert received.content["cloister"]["site"] == "a"


def _right(study: Study, *share: float) -> Holdout:
    """A hold-out on which the model of round i ranks this share of the pairs rightly."""
    patients = holdout_patients(place % 2 for place in range(40))
    calls = iter((0.5, *share))

    def score(model: np.ndarray) -> np.ndarray:
        right = next(calls)
        ranks = [
            one.label if i % 20 < 20 * right else 1 - one.label for i, one in enumerate(patients)
        ]
        told = 0.25 + 0.5 * np.array(ranks)
        return np.stack([1 - told, told], axis=1)

    return Holdout(study.task, patients, score)


def test_a_run_that_no_longer_gains_ends_with_its_best_model(tmp_path: Path) -> None:
    study = _study(training={"rounds": 9}, evaluation={"stop_after": 2})
    sites = Sites({"a": _add(1.0), "b": _add(1.0)})
    outcome = _run(sites, study, tmp_path, holdout=_right(study, 0.7, 1.0, 0.8, 0.2))
    state = outcome.state
    assert (state.completed, state.best_round, state.ended) == (4, 2, "stop_after")
    np.testing.assert_allclose(state.model - state.best, np.float32(2), atol=1e-5)
    # The sites hear that it has ended, and a resumed run trains no more.
    assert [entry[:2] for entry in sites.seen[-2:]] == [("a", "finish"), ("b", "finish")]
    later = Sites({"a": _add(1.0), "b": _add(1.0)})
    again = _run(later, study, tmp_path, resume=True, holdout=_right(study)).state
    assert {kind for _, kind, _ in later.seen} == {"prepare", "finish"}
    np.testing.assert_array_equal(again.best, state.best)
    # What it stopped on is an output, so the study costs what was planned.
    planned = study_epsilon(study, 9)
    assert site_epsilons(study, state) == {"a": planned, "b": planned}
    assert planned > study_epsilon(study, 4)


def test_a_run_that_is_kept_has_what_it_had(tmp_path: Path) -> None:
    study = _study(training={"rounds": 9})
    sites = Sites({"a": _add(1.0), "b": _add(1.0)})

    def end_in_the_third() -> None:
        if ("a", "train", 2) in sites.seen and not ended:
            ended.append(True)
            raise KeepWhatIsThere

    ended: list[bool] = []
    holdout = _right(study, 0.7, 0.9)
    state = _run(sites, study, tmp_path, check=end_in_the_third, holdout=holdout).state
    assert (state.completed, state.ended, state.lost) == (2, "kept", ())
    assert state.figures[-1].metrics is not None
    assert [entry[1] for entry in sites.seen[-2:]] == ["finish", "finish"]


def test_a_run_that_is_kept_while_it_asks_for_the_noised_evaluation_says_that_it_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The sites may have charged it, so it counts, though nothing came of it."""

    def ended(self: PlainCollector, number: int, model: np.ndarray) -> None:
        raise KeepWhatIsThere

    monkeypatch.setattr(PlainCollector, "histogram", ended)
    study = _study(evaluation={"release_epsilon": 0.5})
    outcome = _run(Sites({"a": _add(1.0), "b": _add(1.0)}), study, tmp_path)
    state = outcome.state
    assert (state.completed, state.ended) == (3, "kept")
    assert state.release == Released(asked=("a", "b"))
    assert NOT_RELEASED in warnings(study, outcome)
    whole = study_epsilon(study, 3, released=True)
    assert site_epsilons(study, state) == {"a": whole, "b": whole}


def test_a_run_that_no_longer_gains_is_evaluated_with_noise_all_the_same(tmp_path: Path) -> None:
    study = _study(
        training={"rounds": 9}, evaluation={"stop_after": 2, "release_epsilon": 0.5, "every": 1}
    )
    sites = Sites({"a": _add(1.0), "b": _add(1.0)}, bins=RELEASE_BINS)
    state = _run(sites, study, tmp_path, holdout=_right(study, 0.7, 1.0, 0.8, 0.2)).state
    assert (state.completed, state.best_round, state.ended) == (4, 2, "stop_after")
    assert state.release is not None
    assert (state.release.asked, state.release.sites) == (("a", "b"), 2)
    # It was the last model that was evaluated, beside the best that was handed out.
    assert state.best is not None
    for evaluated in sites.evaluated:
        np.testing.assert_array_equal(evaluated, state.best)
    # The sites hear of the end after it.
    kinds = [kind for name, kind, _ in sites.seen if name == "a"]
    assert kinds == ["prepare", *["train"] * 4, "evaluate", "finish"]
    whole = study_epsilon(study, 9, released=True)
    assert site_epsilons(study, state) == {"a": whole, "b": whole}
    assert whole > study_epsilon(study, 9)


def test_a_run_without_a_round_has_nothing_to_keep(tmp_path: Path) -> None:
    study = _study()

    def end() -> None:
        raise KeepWhatIsThere

    with raises(RunStopped, match="nothing to keep"):
        _run(Sites({"a": _add(1.0), "b": _add(1.0)}), study, tmp_path, check=end)
