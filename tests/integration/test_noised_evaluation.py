"""A study that pays for its figures: one release over secure sums, in a whole federation."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, Message

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import open_site
from cloister_fl.client.steward.issue_certificate import certify
from cloister_fl.protocol.round_messages import (
    Evaluated,
    EvaluateTask,
    Prepare,
    Prepared,
    Refusal,
    Refused,
    RoundMessage,
    TrainTask,
    Update,
    pack,
    unpack,
)
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.results.artifacts import (
    NOT_RELEASED,
    site_epsilons,
    summarise,
    warnings,
    write_outputs,
)
from cloister_fl.server.rounds.checkpoint import Checkpoints, Released
from cloister_fl.server.rounds.events import Event, Hooks, ReleaseMade
from cloister_fl.server.rounds.messenger import Messenger
from cloister_fl.server.rounds.run import Outcome, Run
from cloister_fl.simulation.simulated_run import Simulation, run_simulation
from cloister_fl.study.cost import RELEASE_BINS, UNITS, charges, sensitivity
from support.federations import NAMES, study, write_federation

ASKED = study(
    privacy="epsilon = 100.0",
    training="rounds = 3\nsteps = 4\nsampling_rate = 1.0\nexpected_batch = 20\nlearning_rate = 0.5",
    evaluation="release_epsilon = 40.0\nsite_fraction = 0.5",
)
"""Little noise: with 40 patients a site, the figures must then be those of the patients."""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("released")
    write_federation(root / "sites", patients=40, images=1)
    run_simulation(Simulation(ASKED, root / "sites", root / "run"))
    return root / "run"


def test_the_sum_is_measured_and_marked_as_noised(run: Path) -> None:
    summary = json.loads((run / "summary.json").read_text())
    release = summary["release"]
    assert release["noised"] is True
    assert release["epsilon"] == 40.0
    assert release["sites"] == 5
    used = charges(ASKED)
    assert used.release is not None
    assert release["noise_per_cell"] == pytest.approx(used.release.noise_multiplier * 5**0.5)
    # About half of 200 patients; a bright upper half is easily learned.
    noised = release["metrics"]
    assert 70 <= noised["patients"] <= 130
    assert len(noised["class_counts"]) == 2
    assert noised["auroc"]["value"] > 0.9
    low, high = noised["auroc"]["low"], noised["auroc"]["high"]
    assert 0.6 < low <= noised["auroc"]["value"] <= high <= 1
    assert summary["auroc_final"] is None
    assert summary["epsilon_max"] == charges(ASKED).epsilon() <= 100.0
    assert summary["epsilon_max"] > charges(ASKED).epsilon(released=False) + 1
    assert not any("The model was not evaluated" in warning for warning in summary["warnings"])
    report = (run / "report.html").read_text()
    assert "<strong>Noised evaluation</strong>, once, for" in report
    assert f"AUROC {noised['auroc']['value']:.3f} (noised)" in report


def test_every_site_charged_the_whole_and_can_show_it(run: Path, tmp_path: Path) -> None:

    summary = json.loads((run / "summary.json").read_text())
    used = charges(ASKED)
    for name in NAMES:
        site = open_site(run / "sites" / name)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        assert ledger.spent(ASKED.digest) == used.composition()
        found = certify(site, ASKED.digest)
        assert found.epsilon_run == summary["epsilon_per_site"][name] == used.epsilon()
    assert found.release is not None
    assert found.release.sensitivity == sensitivity(ASKED)
    assert found.release.charged


# The server alone, with made-up sites


@dataclass
class Sites:
    """Sites that train nothing, and answer a release with the counts given, or not at all."""

    counts: np.ndarray | None = None
    dies: bool = False
    seen: list[tuple[str, int]] = field(default_factory=list)

    def __call__(self, message: Message, context: Context) -> Message:
        name = Path(str(context.node_config["site"])).name
        task = unpack(message.content, Prepare, TrainTask, EvaluateTask)
        reply: RoundMessage
        if isinstance(task, Prepare):
            reply = Prepared(name, b"", "")
        elif isinstance(task, TrainTask):
            reply = Update(name, task.round, np.zeros_like(task.vector))
        else:
            self.seen.append((name, task.round))
            if self.dies:
                raise Killed
            if self.counts is None:
                reply = Refusal(name, Refused.SPENT.value, b"")
            else:
                reply = Evaluated(name, task.round, RELEASE_BINS, self.counts)
        return Message(content=pack(reply), reply_to=message)


class Killed(BaseException):
    """The process ends here."""


PLAIN = study(
    aggregation="secure = false\nmin_sites = 2", evaluation="release_epsilon = 1.0", training=""
)


def _run(sites: Sites, folder: Path, *, resume: bool = False) -> tuple[Outcome, list[Event]]:
    told: list[Event] = []
    grid = InProcessGrid(sites, [{"site": "/sites/a"}, {"site": "/sites/b"}])
    run = Run(Messenger(grid), PLAIN, Checkpoints(folder), Hooks(notify=told.append), expected=2)
    return run.execute(resume=resume), told


def test_noised_counts_may_be_negative_and_are_added(tmp_path: Path) -> None:
    table = np.full((2, RELEASE_BINS), -3 * UNITS, np.int64)
    table[0, 0] = table[1, -1] = 500 * UNITS
    sites = Sites(table.reshape(-1))
    outcome, told = _run(sites, tmp_path)
    assert sites.seen == [("a", 3), ("b", 3)]
    release = outcome.state.release
    assert release is not None
    assert release.metrics is not None
    assert (release.asked, release.sites) == (("a", "b"), 2)
    # sigma of one site is 3.73 patients; two sites add their noise.
    assert release.noise == pytest.approx(3.7307 * 2**0.5, abs=1e-3)
    assert release.metrics.patients == 2 * 2 * (500 - 15 * 3)
    assert release.metrics.auroc is not None
    assert release.metrics.auroc.value > 0.99
    assert told[-1] == ReleaseMade(release)
    # It is kept, and a run that is resumed at its end does not ask again.
    assert Checkpoints(tmp_path).load(PLAIN)[0].release == release
    again, _ = _run(sites, tmp_path, resume=True)
    assert again.state.release == release
    assert len(sites.seen) == 2


def test_a_release_that_was_asked_for_is_never_asked_for_again(tmp_path: Path) -> None:
    with pytest.raises(Killed):
        _run(Sites(dies=True), tmp_path)
    later = Sites(np.zeros(2 * RELEASE_BINS, np.int64))
    outcome, _ = _run(later, tmp_path, resume=True)
    assert later.seen == []
    release = outcome.state.release
    assert release == Released(asked=("a", "b"))
    summary = summarise(PLAIN, outcome, seconds=1.0)
    assert summary["epsilon_max"] == charges(PLAIN).epsilon() <= 6.0
    assert NOT_RELEASED in warnings(PLAIN, outcome)


def test_a_release_that_nobody_answers_costs_no_model(tmp_path: Path) -> None:
    outcome, told = _run(Sites(), tmp_path)
    assert outcome.state.completed == 3
    assert outcome.state.release == Released(asked=("a", "b"))
    assert told[-1] == ReleaseMade(Released(asked=("a", "b")))
    assert NOT_RELEASED in warnings(PLAIN, outcome)
    # What was asked for counts as charged, whether or not it was answered.
    epsilons = site_epsilons(PLAIN, outcome.state)
    assert epsilons == dict.fromkeys(("a", "b"), charges(PLAIN).epsilon())
    (tmp_path / "out").mkdir()
    write_outputs(tmp_path / "out", PLAIN, outcome, seconds=1.0)
    report = (tmp_path / "out" / "report.html").read_text()
    assert "It gave no figure: too few sites answered" in report
