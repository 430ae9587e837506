"""The release: one patient moves it by at most L, its noise is what is charged, and it is one."""

from __future__ import annotations

import itertools
import math
import os
import signal
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from flwr.app import Message
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cloister_fl.client import app as client
from cloister_fl.client import app_state, envelope
from cloister_fl.client.admission.approvals import Decision, judge, judgements
from cloister_fl.client.app_state import Kept
from cloister_fl.client.data.cohort import Cohort, Patient, Unit, apart, split_apart, subset
from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.review import review
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.evaluation import exact_counts
from cloister_fl.client.training.local_training import train_round
from cloister_fl.client.training.noised_evaluation import counts_in_units, noised
from cloister_fl.errors import ReleaseAlreadySpent
from cloister_fl.metrics.classification import BINS
from cloister_fl.networks import flat_parameters, registry
from cloister_fl.networks.frozen_backbone import FixedFeatures
from cloister_fl.protocol.round_messages import (
    SITE_KEY,
    Evaluated,
    EvaluateTask,
    Refusal,
    RoundMessage,
    octets,
    pack,
    unpack,
)
from cloister_fl.protocol.sessions import counts_shape
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.rounds.messenger import TYPES
from cloister_fl.study.cost import RELEASE_BINS, UNITS, charges, release_mechanism, sensitivity
from cloister_fl.study.schema import Study
from cloister_fl.tasks.classification import Classification
from support import spending
from support.cohorts import targets_by
from support.federations import SEEN, study, write_cohort

pytestmark = pytest.mark.process


ASKED = study(aggregation="secure = false", evaluation="release_epsilon = 1.0\nsite_fraction = 0.5")
THREE = study(target='classes = ["no", "yes", "perhaps"]', evaluation="release_epsilon = 1.0")


# What one patient can move


def _cohort(rng: np.random.Generator, counts: list[int], classes: int, *, wild: bool) -> Cohort:
    size = ASKED.input.size
    images = rng.integers(0, 65536, (sum(counts), size, size)).astype(np.uint16)
    if wild:
        images[::3], images[1::3] = 0, 65535
    ends = np.cumsum([0, *counts])
    patients = tuple(
        Patient(f"{rng.bytes(32).hex()}", int(rng.integers(classes)), tuple(range(a, b)))
        for a, b in itertools.pairwise(ends)
    )
    return Cohort(images, patients, {}, {}, {}, targets_by(patients))


def _network(asked: Study, *, seed: int = 0, broken: bool = False) -> torch.nn.Module:
    module = registry.build(
        asked.network, outputs=asked.task.outputs, size=asked.input.size, seed=seed
    )
    rng = np.random.default_rng(seed)
    model = flat_parameters.flatten(module)
    model = model + rng.normal(0, 1, model.size).astype(np.float32)
    flat_parameters.load(module, model * np.float32(1e30 if broken else 1))
    return module


@settings(deadline=None, max_examples=25)
@given(
    seed=st.integers(0, 10**6),
    counts=st.lists(st.integers(1, 30), min_size=1, max_size=4),
    three=st.booleans(),
    wild=st.booleans(),
    broken=st.booleans(),
)
def test_adding_or_removing_a_patient_moves_at_most_the_sensitivity(
    seed: int, counts: list[int], three: bool, wild: bool, broken: bool
) -> None:
    asked = THREE if three else ASKED
    cohort = _cohort(np.random.default_rng(seed), counts, asked.task.outputs, wild=wild)
    module = _network(asked, seed=seed, broken=broken)
    whole = counts_in_units(module, cohort, asked)
    assert whole.dtype == np.int64
    curves = 3 if three else 1
    assert whole.shape == counts_shape(asked) == (curves, 2, RELEASE_BINS)
    limit = sensitivity(asked)
    assert limit == UNITS * math.sqrt(curves)
    assert whole.sum() == UNITS * curves * len(counts)
    for gone in cohort.patients:
        rest = subset(cohort, [one for one in cohort.patients if one is not gone])
        moved = whole - counts_in_units(module, rest, asked)
        # In L2, which is what the noise is a multiple of; whole numbers, so no rounding.
        assert int((moved**2).sum()) <= curves * UNITS**2
        assert (moved >= 0).all()


@pytest.mark.parametrize("classes", [2, 3])
def test_a_patient_of_any_number_of_units_moves_at_most_the_sensitivity(classes: int) -> None:
    """The worst case: all units of a patient fall into one cell of each curve."""
    asked = study(
        target={"unit": "image", "classes": ["no", "yes", "perhaps"][:classes]},
        evaluation="release_epsilon = 1.0",
    )
    curves = 1 if classes == 2 else classes
    module, size = _network(asked), asked.input.size
    for n in (1, 2, 3, 5, 7, 15, 16, 17, 40):
        # Equal images, so equal scores; and one label.
        images = np.full((n, size, size), 30_000, np.uint16)
        places = tuple(range(n))
        patient = Patient("a" * 64, 1, places, parts=tuple(Unit(1, (each,)) for each in places))
        cohort = Cohort(images, (patient,), {}, {}, {}, np.ones(n, np.int64))
        counted = counts_in_units(module, cohort, asked)
        share = UNITS // n
        assert counted.sum() == curves * n * share
        assert (n > UNITS) == (not counted.any())
        assert counted.max() == n * share <= UNITS
        assert math.sqrt(int((counted**2).sum())) <= sensitivity(asked)
        # With several labels and scores it moves less.
        mixed = replace(patient, parts=tuple(Unit(each % classes, (each,)) for each in places))
        images = np.random.default_rng(n).integers(0, 65536, images.shape).astype(np.uint16)
        cohort = Cohort(images, (mixed,), {}, {}, {}, np.arange(n) % classes)
        spread = counts_in_units(module, cohort, asked)
        assert math.sqrt(int((spread**2).sum())) <= sensitivity(asked)


def test_units_of_one_patient_follow_from_that_patient_alone() -> None:
    asked = study(target={"unit": "image"}, evaluation="release_epsilon = 1.0")
    plain = _cohort(np.random.default_rng(3), [3, 1, 20, 2], 2, wild=False)
    patients = tuple(
        replace(one, parts=tuple(Unit(place % 2, (place,)) for place in one.images))
        for one in plain.patients
    )
    cohort = replace(plain, patients=patients)
    module = _network(asked)
    each = [counts_in_units(module, subset(cohort, [one]), asked) for one in patients]
    np.testing.assert_array_equal(counts_in_units(module, cohort, asked), sum(each))
    assert [one.sum() for one in each] == [15, 16, 0, 16]


def test_open_counts_take_a_patient_as_one_too() -> None:
    asked = study(target={"unit": "image"}, privacy="enabled = false")
    plain = _cohort(np.random.default_rng(3), [3, 1, 2], 2, wild=False)
    patients = tuple(
        replace(one, parts=tuple(Unit(place % 2, (place,)) for place in one.images))
        for one in plain.patients
    )
    counts = exact_counts(_network(asked), replace(plain, patients=patients), asked)
    assert counts.sum() == 15 + 16 + 16
    measured = asked.task.measure_counts(counts / UNITS)
    assert measured.patients == 3
    assert measured.auroc is not None


def test_what_fails_for_one_patient_costs_that_patient_alone() -> None:
    cohort = _cohort(np.random.default_rng(7), [1, 2, 3], 2, wild=False)
    rest = subset(cohort, [cohort.patients[0], cohort.patients[2]])
    module = _network(ASKED)
    expected = counts_in_units(module, rest, ASKED)

    class Breaking(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = module

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            if len(images) == 2:
                raise MemoryError
            result: torch.Tensor = self.inner(images)
            return result

    told: list[Exception] = []
    np.testing.assert_array_equal(counts_in_units(Breaking(), cohort, ASKED, told.append), expected)
    assert [type(error) for error in told] == [MemoryError]
    with pytest.raises(MemoryError):
        counts_in_units(Breaking(), cohort, ASKED)


def test_features_that_are_kept_change_nothing_of_it() -> None:
    asked = study(
        network='name = "filter-bank"\narguments = {}', evaluation="release_epsilon = 1.0"
    )
    module = _network(asked)
    assert isinstance(module, FixedFeatures)
    cohort = _cohort(np.random.default_rng(5), [1, 30, 3], 2, wild=True)
    whole = counts_in_units(module, cohort, asked)
    assert whole.sum() == 3 * UNITS
    parts = [counts_in_units(module, subset(cohort, [one]), asked) for one in cohort.patients]
    np.testing.assert_array_equal(whole, sum(parts))
    # A coin can keep nobody apart, or everybody: no error tells so.
    assert not counts_in_units(module, subset(cohort, []), asked).any()
    train_round(
        module,
        subset(cohort, []),
        asked,
        noise_multiplier=1.0,
        random=SecureRandom(),
        round_number=1,
        steps=1,
        site="anker",
    )


def test_many_images_of_a_patient_are_one_score() -> None:
    rng = np.random.default_rng(0)
    cohort = _cohort(rng, [200, 1], 2, wild=False)
    table = counts_in_units(_network(ASKED), cohort, ASKED)
    assert sorted(table[table > 0]) in ([UNITS, UNITS], [2 * UNITS])


def test_who_is_kept_apart_depends_on_no_other_patient() -> None:
    rng = np.random.default_rng(1)
    cohort = _cohort(rng, [1] * 400, 2, wild=False)
    train, held = split_apart(cohort, 0.25)
    names = {one.pseudonym for one in held.patients}
    assert 60 < len(names) < 140
    assert len(names) + len(train.patients) == 400
    assert len(held.images) == len(names)
    for gone in cohort.patients[:20]:
        rest = subset(cohort, [one for one in cohort.patients if one is not gone])
        other = {one.pseudonym for one in split_apart(rest, 0.25)[1].patients}
        assert other == names - {gone.pseudonym}
    assert split_apart(cohort, 0.0)[1].patients == ()
    assert len(counts_in_units(_network(ASKED), split_apart(cohort, 0.0)[1], ASKED)) == 1
    # The coin is fair to the fraction, whatever the name.
    tosses = [apart(rng.bytes(32).hex(), 0.25) for _ in range(8_000)]
    assert abs(np.mean(tosses) - 0.25) < 5 * (0.25 * 0.75 / 8_000) ** 0.5


def test_a_count_beyond_the_sensitivity_counts_as_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Whatever a task counts, no patient moves the sums by more than the noise is made for.
    cohort = _cohort(np.random.default_rng(4), [1, 2], 2, wild=False)
    honest = Classification.count
    monkeypatch.setattr(
        Classification, "count", lambda *args: honest(*args) * (1 + 10**6 * (args[1] == 1))
    )
    table = counts_in_units(_network(ASKED), cohort, ASKED)
    assert table.sum() == UNITS * sum(one.label == 0 for one in cohort.patients)


@pytest.mark.parametrize(
    "lie",
    [
        np.ones(1, np.int64),
        np.int64(1),
        np.eye(1, 16, dtype=np.int64)[0],
        np.array([[[1.0]]]),
        np.ones((3,), np.int64),
        np.full((1, 2, 16), 2**62, np.int64),
        None,
        "counts",
    ],
)
def test_a_count_of_another_shape_or_type_counts_as_nothing(
    lie: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Spread over the table where it is added, one number moved the sum by 5.7 sensitivities."""
    cohort = _cohort(np.random.default_rng(4), [1, 2], 2, wild=False)
    monkeypatch.setattr(Classification, "count", lambda *_: lie)
    table = counts_in_units(_network(ASKED), cohort, ASKED)
    assert table.shape == (1, 2, 16)
    assert not table.any()


def test_exact_counts_of_nobody_are_none() -> None:
    """A site with one patient of each class keeps nobody apart; it answered with CLO-901."""
    cohort = _cohort(np.random.default_rng(4), [1, 2], 2, wild=False)
    counts = exact_counts(_network(ASKED), subset(cohort, []), ASKED)
    assert counts.shape == ASKED.task.counts_shape(BINS)
    assert not counts.any()


# The noise


def test_the_noise_is_that_of_the_mechanism() -> None:
    mechanism = release_mechanism(THREE)
    assert mechanism is not None
    std = mechanism.noise_multiplier * sensitivity(THREE)
    random, zero = SecureRandom(), np.zeros((3, 2, RELEASE_BINS), np.int64)
    drawn = np.concatenate([noised(zero, THREE, mechanism, random).ravel() for _ in range(400)])
    assert drawn.dtype == np.int64
    # Rounding adds 1/12 to a variance of thousands; a false alarm in 1e6 either way.
    assert stats.kstest(drawn / std, "norm").pvalue > 1e-6
    assert abs(drawn.var() / (std**2 + 1 / 12) - 1) < 5 * (2 / drawn.size) ** 0.5
    assert abs(drawn.mean()) < 5 * std / drawn.size**0.5
    table = zero + 1000
    assert abs((noised(table, THREE, mechanism, random) - table).mean()) < 5 * std / 96**0.5
    assert len({noised(zero, THREE, mechanism, SecureRandom()).tobytes() for _ in range(20)}) == 20


# What is charged


def _site(root: Path, asked: Study = ASKED, **policy: object) -> Site:
    write_cohort(root / "anker", np.random.default_rng(0), "MRN", patients=24, images=1)
    allowed: dict[str, object] = {
        "patients_at_most": 1_000,
        "max_epsilon_study": 12.0,
        "max_epsilon_lifetime": 100.0,
        "require_secure_aggregation": False,
        "metrics": ("score-histograms",),
        **policy,
    }
    site = init_site(root / "anker", name="anker", policy=Policy.model_validate(allowed))
    judge(site, asked, Decision.APPROVED, data=SEEN)
    return site


def _evaluate(
    site: Site, asked: Study = ASKED, *, run: str = "run", number: int = 3, shift: float = 0.0
) -> RoundMessage:
    module = registry.build(
        asked.network, outputs=asked.task.outputs, size=asked.input.size, seed=0
    )
    model = flat_parameters.flatten(module) + np.float32(shift)
    task = EvaluateTask(asked.canonical(), run, number, 5, octets(), model)
    grid = InProcessGrid(client.app, [{SITE_KEY: str(site.root)}])
    message = Message(content=pack(task), dst_node_id=2, message_type=TYPES["evaluate"])
    (reply,) = grid.send_and_receive([message])
    assert not reply.has_error()
    return unpack(reply.content, Refusal, Evaluated)


def _reason(reply: RoundMessage) -> str:
    assert isinstance(reply, Refusal)
    return reply.reason


def _ledger(site: Site) -> Ledger:
    return Ledger.open(site.ledger, delta=site.policy.ledger_delta)


def test_what_leaves_is_noised_and_charged(tmp_path: Path) -> None:
    site = _site(tmp_path)
    reply = _evaluate(site)
    assert isinstance(reply, Evaluated)
    assert reply.bins == RELEASE_BINS
    counts = reply.counts
    # 24 patients, half of them kept apart; noise of about 60 units in each of 32 cells.
    assert counts.size == 2 * RELEASE_BINS
    assert (counts < 0).any()
    assert len(set((counts % UNITS).tolist())) > 3
    (held,) = _ledger(site).reservations()
    assert (held.released, held.started) == (True, 0)
    whole = charges(ASKED)
    assert _ledger(site).spent(ASKED.digest) == ((whole.release, 1),)
    assert _ledger(site).epsilon_study(ASKED.digest, 1e-5) == whole.epsilon(0) <= 1.0
    reserved = _ledger(site).epsilon_study(ASKED.digest, 1e-5, reserved=True)
    assert 5.9 < reserved == whole.epsilon() <= 6.0


@pytest.mark.parametrize("fault", [RuntimeError, KeyboardInterrupt])
def test_it_is_charged_before_data_are_read_and_stays_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fault: type[BaseException]
) -> None:
    site = _site(tmp_path)
    seen: list[bool] = []

    def dies(*_: object) -> Cohort:
        seen.extend(one.released for one in _ledger(site).reservations())
        raise fault

    with monkeypatch.context() as patched:
        patched.setattr(Kept, "cohort", dies)
        if fault is RuntimeError:
            # Noise alone: a refusal would tell of the data.
            assert isinstance(_evaluate(site), Evaluated)
        else:
            with pytest.raises(KeyboardInterrupt):
                _evaluate(site)
    assert seen == [True]
    assert [one.released for one in _ledger(site).reservations()] == [True]
    assert _reason(_evaluate(site)) == "round-spent"


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
@pytest.mark.parametrize(
    ("where", "name", "charged"),
    [
        (app_state, "require_private", False),
        (Ledger, "start_release", False),
        (Kept, "parts", True),
        (client, "counts_in_units", True),
        (client, "noised", True),
        (envelope, "_logged", True),
    ],
)
def test_a_kill_during_a_release_gives_nothing_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: object, name: str, charged: bool
) -> None:
    site = _site(tmp_path)
    assert callable(getattr(where, name))
    pid = os.fork()
    if pid == 0:
        try:
            monkeypatch.setattr(where, name, lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
            _evaluate(site)
        finally:
            os._exit(7)  # Not reached: it is killed before.
    _, status = os.waitpid(pid, 0)
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGKILL
    assert [one.released for one in _ledger(site).reservations()] == [charged]
    again = _evaluate(site)
    if charged:
        assert _reason(again) == "round-spent"
    else:
        assert isinstance(again, Evaluated)
    assert [entry.kind for entry in _ledger(site).entries()].count("evaluated") == 1


def test_a_second_release_is_refused(tmp_path: Path) -> None:
    site = _site(tmp_path)
    assert isinstance(_evaluate(site), Evaluated)
    before = _ledger(site).entries()
    # The same again, another model, another run of the study: none of them gets a second look.
    for more in ({}, {"shift": 0.1}):
        assert _reason(_evaluate(site, **more)) == "round-spent"  # type: ignore[arg-type]
    assert _ledger(site).entries() == before
    assert _reason(_evaluate(site, run="another")) == "round-spent"
    notice = read_last_refusal(site.root)
    assert notice is not None
    assert "CLO-311" in notice.message
    assert [entry.kind for entry in _ledger(site).entries()].count("evaluated") == 1
    with pytest.raises(ReleaseAlreadySpent, match="CLO-311"):
        spending.charge_release(site, ASKED, run="another")


def test_a_budget_that_does_not_bear_both_refuses_before_a_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Enough for the steps of this study, by the lifetime's filter; not for its release on top.
    used = charges(ASKED)
    ledger = Ledger.open(tmp_path / "other.sqlite", delta=Policy().ledger_delta)
    alone = ledger.quote(ASKED.digest, used.step, used.steps, used.delta).lifetime
    whole = ledger.quote(
        ASKED.digest, used.step, used.steps, used.delta, release=used.release
    ).lifetime
    assert alone < whole
    site = _site(tmp_path / "b", max_epsilon_lifetime=(alone + whole) / 2)
    monkeypatch.setattr(client, "load_for_run", lambda *_: pytest.fail("data were read"))
    assert _reason(_evaluate(site)) == "budget"
    assert _ledger(site).reservations() == ()


def test_what_was_not_paid_for_is_not_measured(tmp_path: Path) -> None:
    plain = study(aggregation="secure = false")
    site = _site(tmp_path, plain)
    assert _reason(_evaluate(site, plain)) == "policy"
    judge(site, ASKED, Decision.APPROVED, data=SEEN)
    for number in (0, 1, 2, 4):
        assert _reason(_evaluate(site, number=number)) == "message"
    assert "evaluated" not in [entry.kind for entry in _ledger(site).entries()]


def test_the_policy_must_allow_it(tmp_path: Path) -> None:
    site = _site(tmp_path, metrics=())
    assert _reason(_evaluate(site)) == "policy"
    assert not site.ledger.exists()
    told = review(site, judgements(site)[ASKED.digest])
    assert "evaluation.release_epsilon = 1" in told
    assert "noised counts of patients by score" in told


def test_nobody_kept_apart_is_trained_on(tmp_path: Path) -> None:
    cohort = _cohort(np.random.default_rng(3), [2] * 40, 2, wild=False)
    session = SiteSession(init_site(tmp_path / "anker", name="anker"))
    train, held = Kept().parts(session, spending.admission(ASKED, "run"), lambda: cohort)
    assert not {one.pseudonym for one in train.patients} & {one.pseudonym for one in held.patients}
    assert len(train.patients) + len(held.patients) == 40
    assert held.patients
    # Without a release all are trained on, as before.
    kept = Kept()
    admitted = spending.admission(study(), "run")
    whole, _ = kept.parts(session, admitted, lambda: cohort)
    assert whole is kept.cohort(session, admitted, lambda: cohort)
    assert whole.patients == cohort.patients
