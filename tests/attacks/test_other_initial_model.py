"""A coordinator that begins a run with another model than the one that the stewards approved."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from cloister_fl.client.admission.approvals import judgements
from cloister_fl.client.site.last_refusal import read_last_refusal
from cloister_fl.errors import TooFewSites
from cloister_fl.networks import flat_parameters
from cloister_fl.networks.flat_parameters import Vector
from cloister_fl.protocol.round_messages import (
    EvaluateTask,
    Prepare,
    Refusal,
    TrainTask,
    Update,
    octets,
)
from cloister_fl.server.rounds import run
from cloister_fl.server.rounds.run import Run
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.schema import Study
from cloister_fl.study.study_network import build_for
from support import federations, studies
from support.federations import study, write_federation
from support.hand_asked_site import ask, fits, rounds_charged, write_hospital
from support.message_tap import charges

PLAIN = study(aggregation="secure = false")
OPEN = study(aggregation="secure = false", privacy="enabled = false")


def drawn(asked: Study) -> Vector:
    return flat_parameters.flatten(build_for(asked))


def crafted(asked: Study) -> Vector:
    """The honest model with the last bit of one weight changed: what the hash is for."""
    model = drawn(asked)
    model[0] = np.nextafter(model[0], np.float32(np.inf))
    return model


@pytest.mark.parametrize("asked", [PLAIN, OPEN], ids=["private", "open"])
def test_another_model_in_round_1_is_refused_before_a_charge(asked: Study, tmp_path: Path) -> None:
    site = write_hospital(tmp_path, fits(asked))
    text = asked.canonical()
    reply = ask(site, TrainTask(text, "run", 1, 5, octets(), crafted(asked)))
    assert isinstance(reply, Refusal)
    assert reply.reason == "model"
    assert rounds_charged(site) == []
    told = read_last_refusal(site.root)
    assert told is not None
    assert told.code == "CLO-405"
    # The honest one is trained; and in round 2 the model is no longer a public constant.
    assert isinstance(ask(site, TrainTask(text, "run", 1, 5, octets(), drawn(asked))), Update)
    assert isinstance(ask(site, TrainTask(text, "run", 2, 5, octets(), crafted(asked))), Update)


def test_another_model_is_not_measured_before_round_1(tmp_path: Path) -> None:
    site = write_hospital(tmp_path, fits(OPEN))
    for model, refused in ((crafted(OPEN), True), (drawn(OPEN), False)):
        reply = ask(site, EvaluateTask(OPEN.canonical(), "run", 0, 5, octets(), model))
        assert isinstance(reply, Refusal) is refused, reply


def test_a_study_without_the_hash_is_not_even_kept_for_review(tmp_path: Path) -> None:
    asked = federations.study(aggregation="secure = false").bound_to("")
    site = write_hospital(tmp_path, {**fits(asked), "approve": "none", "approved_hashes": ()})
    reply = ask(site, Prepare(asked.canonical(), "run", 5, "", b"", ""))
    assert isinstance(reply, Refusal)
    assert reply.reason == "model"
    assert judgements(site) == {}


def test_a_lying_coordinator_with_masks_gets_no_sum_and_no_site_pays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its sessions are right for the model that it sends: only the study tells that it lies."""
    sites = write_federation(tmp_path / "sites", patients=20, images=1)
    monkeypatch.setattr(Run, "_drawn", lambda self: crafted(study()))
    blind = SimpleNamespace(require_initial=lambda *_: None, digest_of=lambda _: "")
    monkeypatch.setattr(run, "initial_model", blind)
    with pytest.raises(TooFewSites, match="the initial model is not the one"):
        run_simulation(Simulation(study(), sites, tmp_path / "run"))
    for name in federations.NAMES:
        assert charges(tmp_path / "run", name) == []


def test_a_study_that_was_changed_after_it_was_bound_does_not_start(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", patients=20, images=1)
    stale = studies.merged(federations.BRIGHT_HALF, {})
    stale["training"] |= {"seed": 12, "initial_model": study().training.initial_model}
    asked = federations.study(training=stale["training"])
    with pytest.raises(Exception, match="not the one whose hash the study carries") as caught:
        run_simulation(Simulation(asked, sites, tmp_path / "run"))
    assert getattr(caught.value, "code", "") == "CLO-405"
    assert not (tmp_path / "run").exists()
