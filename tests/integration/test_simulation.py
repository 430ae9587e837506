"""A whole federation in this process: the product's ServerApp and ClientApp on real DICOM."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
from flwr.app import Context, RecordDict
from safetensors import safe_open

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.site.folder import open_site
from cloister_fl.errors import OptionInvalid, OutputInTheWay, StudyInvalid, TooFewSites
from cloister_fl.model_file import load_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.server.app import build
from cloister_fl.server.flower.engines import InProcessGrid
from cloister_fl.server.results.artifacts import CHANCE, CHANCE_OPEN
from cloister_fl.server.results.run_verification import verify_run
from cloister_fl.server.rounds.checkpoint import Checkpoints
from cloister_fl.simulation.simulated_run import Simulation, notices_of, run_simulation, site_name
from support.dicom import write_dicom
from support.errors import raises
from support.federations import (
    NAMES,
    approve,
    picture,
    study,
    with_engine,
    write_cohort,
    write_federation,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("federation")
    write_federation(root / "sites")
    write_cohort(root / "holdout", np.random.default_rng(99), "HOLD", patients=40)
    return root


def _metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="np") as file:
        found: dict[str, str] = file.metadata()
        return found


def test_a_private_run_leaves_a_model_and_an_honest_summary(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    asked = study()
    summary = run_simulation(Simulation(asked, folders / "sites", out, holdout=folders / "holdout"))
    assert summary == json.loads((out / "summary.json").read_text())
    assert summary["sites"] == 5
    assert summary["site_names"] == list(NAMES)
    assert summary["rounds"] == 3
    assert summary["secure_aggregation"] is True
    assert summary["sums"] == "kept"
    verdict = verify_run(out)
    assert (verdict.sums, verdict.findings) == (3, ())
    # With so few patients and real noise, the interval reaches down to chance now and then.
    # Or the two classes are told apart without an error, which is no certainty either.
    told = ("The interval of ", "The balanced accuracy is at chance")
    others = [one for one in summary["warnings"] if not one.startswith(told)]
    assert set(others) <= {CHANCE, CHANCE_OPEN}
    held = summary["holdout"]
    assert held["reported"]["patients"] == held["selecting"]["patients"] == 20
    assert summary["metrics_final"]["images"] == held["reported"]["images"]
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    names = ("auroc", "auprc", "balanced_accuracy")
    best = max(rows[1:], key=lambda row: [row["selecting"][name]["value"] for name in names])
    assert summary["model_round"] == best["round"]
    assert summary["metrics_final"] == best["metrics"]
    point = json.loads(_metadata(out / "model.safetensors")["operating_point"])
    assert point["threshold"] == held["operating_point"]["threshold"]
    scores = (out / "holdout-scores.csv").read_text().splitlines()
    assert len(scores) == 41
    assert scores[0] == "patient,part,label,score_no,score_yes,images"
    assert summary["delta"] == 1e-5
    assert 5.5 < summary["epsilon_max"] <= 6.0
    assert 0 <= summary["auroc_final"] <= 1
    assert summary["auroc_initial"] is not None
    module, travelled = load_model(out / "model.safetensors")
    assert travelled == asked
    size = flatten(module).size
    for count in summary["bytes_sent_per_site"].values():
        assert 3 * 4 * size < count < 3 * (4 * size + 3000)
    assert [row["round"] for row in rows] == [0, 1, 2, 3]
    assert "Each update was masked" in (out / "report.html").read_text()


def _examinations(folder: Path, rng: np.random.Generator, prefix: str, patients: int) -> None:
    """Patients with two examinations each: without the finding, and with it."""
    rows = ["AccessionNumber,finding"]
    for number, label in ((number, label) for number in range(patients) for label in (0, 1)):
        accession = f"{prefix}{number}-{label}"
        rows.append(f"{accession},{('no', 'yes')[label]}")
        write_dicom(
            folder / "dicom" / f"{accession}.dcm", picture(rng, label), bits_stored=12,
            patient_id=f"{prefix}{number}", elements={"AccessionNumber": accession},
        )  # fmt: skip
    (folder / "labels.csv").write_text("\n".join(rows) + "\n")


@pytest.mark.parametrize("private", [pytest.param(True, marks=pytest.mark.slow), False])
def test_examinations_of_one_patient_have_labels_of_their_own(
    tmp_path: Path, private: bool
) -> None:
    rng = np.random.default_rng(7)
    for place, name in enumerate(NAMES[:2]):
        _examinations(tmp_path / "sites" / name, rng, f"S{place}-", 12)
    _examinations(tmp_path / "holdout", rng, "H", 10)
    asked = study(
        target={"unit": "examination"},
        training={"rounds": 2, "sampling_rate": 1.0, "learning_rate": 1.0},
        privacy={"epsilon": 100.0} if private else {"enabled": False},
        aggregation={"secure": False, "min_sites": 2},
        evaluation={"site_fraction": 0.5, **({"release_epsilon": 60.0} if private else {})},
    )
    out = tmp_path / "run"
    holdout = tmp_path / "holdout" if private else None
    summary = run_simulation(Simulation(asked, tmp_path / "sites", out, holdout=holdout))
    assert summary["unit"] == "examination"
    measured = summary["metrics_final"]
    assert measured["auroc"]["value"] > 0.9
    if private:
        # On the hold-out units are counted, and patients drawn.
        assert (measured["patients"], measured["class_counts"]) == (5, [5, 5])
        release = summary["release"]["metrics"]
        assert 3 <= release["patients"] <= 21
        assert "Each examination has a label of its own" in (out / "report.html").read_text()
    else:
        # Sites count patients: half of twelve at each, all with both classes.
        assert (measured["patients"], measured["class_counts"]) == (12, [6, 6])


@pytest.mark.slow
def test_every_site_charged_its_own_ledger_before_it_trained(folders: Path, tmp_path: Path) -> None:
    asked = study()
    summary = run_simulation(Simulation(asked, folders / "sites", tmp_path / "run"))
    for name in NAMES:
        site = open_site(tmp_path / "run" / "sites" / name)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        ledger.verify()
        spent = ledger.epsilon_study(asked.digest, asked.privacy.delta)
        steps = sum(steps for _, steps in ledger.spent(asked.digest))
        assert steps == 6
        assert spent == pytest.approx(summary["epsilon_per_site"][name], abs=1e-9)


@pytest.mark.slow
def test_a_frozen_backbone_stays_where_it_is_and_the_average_is_released(
    folders: Path, tmp_path: Path
) -> None:
    asked = study(
        network='name = "efficientnet-lite0"\narguments = {}',
        training='steps = 1\nschedule = "cosine"',
        aggregation="ema = 0.5",
    )
    out = tmp_path / "run"
    summary = run_simulation(Simulation(asked, folders / "sites", out, holdout=folders / "holdout"))
    # A head of 1,281 values a round; the backbone has 3,371,024.
    assert max(summary["bytes_sent_per_site"].values()) < 3 * (4 * 1281 + 3000)
    state, _ = Checkpoints(out / "checkpoint").load(asked)
    assert state.average is not None
    module, travelled = load_model(out / "model.safetensors")
    assert travelled == asked
    np.testing.assert_array_equal(flatten(module), state.average)
    assert np.abs(state.average - state.model).max() > 1e-4
    assert summary["auroc_initial"] == 0.5
    assert 5.5 < summary["epsilon_max"] <= 6.0


def test_a_site_without_the_studys_weights_says_so_and_reserves_nothing(
    folders: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("CLOISTER_MODELS", raising=False)
    weights = f'architecture = "resnet18", sha256 = "{"5" * 64}"'
    asked = study(network=f'name = "frozen-backbone"\narguments = {{ {weights} }}')
    with pytest.raises(TooFewSites, match=r"anker: CLO-404: .*5555"):
        run_simulation(Simulation(asked, folders / "sites", tmp_path / "run"))
    for name in NAMES:
        site = open_site(tmp_path / "run" / "sites" / name)
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        assert ledger.reservations() == ()


def test_book_keeping_with_privacy_is_refused_before_anything_is_made(
    folders: Path, tmp_path: Path
) -> None:
    asked = with_engine(study(), "book-keeping")
    with pytest.raises(StudyInvalid, match="can move its sum of clipped gradients"):
        run_simulation(Simulation(asked, folders / "sites", tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_coordinator_asks_no_site_for_book_keeping_with_privacy(tmp_path: Path) -> None:
    asked = with_engine(study(), "book-keeping")
    config = {"study": asked.canonical(), "out": str(tmp_path / "run")}
    sites: list[object] = []
    config |= {"federation": str(tmp_path / "federation"), "expected": 0, "resume": False}
    context = Context(0, 0, {}, RecordDict(), config)
    with pytest.raises(StudyInvalid, match="can move its sum of clipped gradients"):
        build()(InProcessGrid(lambda *asked: sites.append(asked), []), context)
    assert sites == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_without_a_holdout_a_private_run_says_that_nothing_was_measured(
    folders: Path, tmp_path: Path
) -> None:
    summary = run_simulation(Simulation(study(), folders / "sites", tmp_path / "run"))
    assert summary["auroc_final"] is None
    assert any("--holdout" in warning for warning in summary["warnings"])


def test_without_privacy_it_learns_and_says_what_that_means(folders: Path, tmp_path: Path) -> None:
    asked = study(privacy="enabled = false", training="rounds = 4\nsteps = 6\nlearning_rate = 0.1")
    summary = run_simulation(Simulation(asked, folders / "sites", tmp_path / "run"))
    assert summary["auroc_final"] > 0.9
    assert summary["epsilon_max"] is None
    assert summary["privacy"] == "off"
    assert any("may reveal single patients" in warning for warning in summary["warnings"])


@pytest.mark.slow
def test_without_privacy_two_runs_are_the_same_to_the_bit(folders: Path, tmp_path: Path) -> None:
    asked = study(privacy="enabled = false")
    for name in ("one", "two"):
        run_simulation(Simulation(asked, folders / "sites", tmp_path / name))
    one, two = (_weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert all(one[key].tobytes() == two[key].tobytes() for key in one)


@pytest.mark.slow
def test_a_site_that_was_left_out_says_why_at_the_end(tmp_path: Path) -> None:
    sites = write_federation(tmp_path / "sites", names=(*NAMES, "fuchs"), patients=12)
    (sites / "fuchs" / "labels.csv").write_text("PatientID,finding\n")
    out = tmp_path / "run"
    summary = run_simulation(Simulation(study(training="rounds = 1"), sites, out))
    assert set(summary["refused"]) == {"fuchs"}
    told = notices_of(out)
    assert set(told) == {"fuchs"}
    assert told["fuchs"].startswith("CLO-201")
    assert "CLO-201" not in json.dumps(summary)
    assert (out / "site-notices.json").stat().st_mode & 0o077 == 0


@pytest.mark.slow
def test_with_privacy_two_runs_differ_by_their_noise(folders: Path, tmp_path: Path) -> None:
    for name in ("one", "two"):
        run_simulation(Simulation(study(), folders / "sites", tmp_path / name))
    one, two = (_weights(tmp_path / name / "model.safetensors") for name in ("one", "two"))
    assert all(not np.array_equal(one[key], two[key]) for key in one)


def _weights(path: Path) -> dict[str, np.ndarray]:
    with safe_open(path, framework="np") as file:
        return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118


@pytest.mark.slow
@pytest.mark.parametrize(
    "aggregation",
    [
        'strategy = "fedprox"\nproximal_mu = 0.1',
        'strategy = "fedadam"\nserver_learning_rate = 0.01',
        'strategy = "fedyogi"\nserver_learning_rate = 0.01',
    ],
    ids=["fedprox", "fedadam", "fedyogi"],
)
def test_each_strategy_runs_and_gives_another_model_than_fedavg(
    folders: Path, tmp_path: Path, aggregation: str
) -> None:
    plain = study(privacy="enabled = false", training="steps = 4")
    other = study(privacy="enabled = false", training="steps = 4", aggregation=aggregation)
    run_simulation(Simulation(plain, folders / "sites", tmp_path / "plain"))
    summary = run_simulation(Simulation(other, folders / "sites", tmp_path / "other"))
    one, two = (_weights(tmp_path / name / "model.safetensors") for name in ("plain", "other"))
    assert any(not np.allclose(one[key], two[key], rtol=1e-5) for key in one)
    assert summary["auroc_final"] is not None


@pytest.mark.slow
def test_fedprox_keeps_closer_to_the_global_model(folders: Path, tmp_path: Path) -> None:
    norms = {}
    for name, text in (
        ("avg", ""),
        ("prox", 'strategy = "fedprox"\nproximal_mu = 5.0'),
    ):
        lines = "rounds = 1\nsteps = 20\nlearning_rate = 0.05"
        asked = study(privacy="enabled = false", training=lines, aggregation=text)
        run_simulation(Simulation(asked, folders / "sites", tmp_path / name))
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        norms[name] = json.loads(rows[-1])["update_norm"]
    assert norms["prox"] < 0.8 * norms["avg"]


@pytest.mark.slow
def test_the_opacus_engine_runs_the_whole_way(folders: Path, tmp_path: Path) -> None:
    asked = study(training='engine = "opacus"')
    summary = run_simulation(Simulation(asked, folders / "sites", tmp_path / "run"))
    assert summary["rounds"] == 3
    assert 5.5 < summary["epsilon_max"] <= 6.0


def test_a_site_file_is_used_in_place_and_its_policy_wins(folders: Path, tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    write_federation(sites, names=("anker", "birke"), patients=24)
    (sites / "birke" / "site.toml").write_text(
        '[site]\nname = "birke"\n[policy]\npatients_at_most = 1000\nmax_epsilon_study = 1.0\n'
        "min_sites = 2\nrequire_secure_aggregation = false\n"
    )
    asked = study(aggregation="secure = false\nmin_sites = 2")
    with pytest.raises(TooFewSites) as caught:
        run_simulation(Simulation(asked, sites, tmp_path / "run"))
    text = str(caught.value)
    assert "birke: its policy does not allow the study" in text
    assert re.search(r"birke: CLO-303: .*max_epsilon_study", text)


@pytest.mark.slow
def test_a_used_up_budget_refuses_before_a_file_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sites = write_federation(tmp_path / "sites", patients=24)
    for name in NAMES:
        (sites / name / "site.toml").write_text(
            f'[site]\nname = "{name}"\n[policy]\npatients_at_most = 1000\n'
            "max_epsilon_study = 3\nmax_epsilon_lifetime = 4\n"
        )
    first = study(privacy="epsilon = 3")
    second = study(privacy="epsilon = 2.9", training="seed = 12")
    for name in NAMES:
        approve(sites / name, first)
        approve(sites / name, second)
    run_simulation(Simulation(first, sites, tmp_path / "one"))
    opened: list[object] = []
    monkeypatch.setattr("cloister_fl.client.app.load_for_run", lambda *a, **k: opened.append(a))
    with pytest.raises(TooFewSites, match="its privacy budget is not sufficient"):
        run_simulation(Simulation(second, sites, tmp_path / "two"))
    assert opened == []


def test_an_output_folder_in_use_is_left_alone(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(OutputInTheWay, match="CLO-104"):
        run_simulation(Simulation(study(), folders / "sites", tmp_path))
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_without_a_run_is_not_said_to_be_resumable(folders: Path, tmp_path: Path) -> None:
    (tmp_path / "sites").mkdir()
    with pytest.raises(OutputInTheWay, match="It has no run to resume"):
        run_simulation(Simulation(study(), folders / "sites", tmp_path))


def test_no_hospital_is_dropped_in_silence(tmp_path: Path) -> None:
    for name in ("anker", "birke"):
        (tmp_path / "sites" / name / ("dicom" if name == "anker" else "dcm")).mkdir(parents=True)
    with raises(OptionInvalid, match=r"birke in .* is not a site folder"):
        run_simulation(
            Simulation(study(aggregation="min_sites = 1"), tmp_path / "sites", tmp_path / "run")
        )
    assert not (tmp_path / "run").exists()


@pytest.mark.slow
def test_what_a_killed_writer_left_is_swept_on_resume(folders: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    run_simulation(Simulation(study(), folders / "sites", out))
    torn = [out / f".{'ab' * 8}.tmp", out / "sites" / "anker" / "cache" / f".{'01' * 8}.tmp"]
    for path in torn:
        path.write_bytes(b"half")
    (out / "notes.tmp").write_text("mine")
    run_simulation(Simulation(study(), folders / "sites", out, resume=True))
    assert not any(path.exists() for path in torn)
    assert (out / "notes.tmp").read_text() == "mine"


def test_site_names_come_from_folder_names() -> None:
    assert site_name(Path("/data/St. Anna (Nord)")) == "st-anna-nord"
    with raises(OptionInvalid):
        site_name(Path("/data/___"))


def test_two_folders_of_one_name_are_refused(folders: Path, tmp_path: Path) -> None:
    sites = tmp_path / "sites"
    for name in ("North 1", "north-1", "c", "d", "e"):
        (sites / name / "dicom").mkdir(parents=True)
    with raises(OptionInvalid, match="north-1"):
        run_simulation(Simulation(study(), sites, tmp_path / "run"))
