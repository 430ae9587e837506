"""The plan of a study: its figures against other ways to get them, and the command."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from cloister_fl.cli import main
from cloister_fl.errors import EpsilonUnreachable, StudyInvalid
from cloister_fl.networks import flat_parameters, registry
from cloister_fl.planning import plan_output, timing
from cloister_fl.planning.plan import Pace, Plan, make_plan, ratio
from cloister_fl.privacy.accounting import epsilon_of, epsilon_pld
from cloister_fl.privacy.dp_events import Mechanism, compose
from cloister_fl.study import study_network
from cloister_fl.study.file import parse_study
from cloister_fl.study.schema import Study
from support.accountants import epsilon_rdp
from support.errors import raises
from support.federations import with_engine
from support.studies import Table, merged, study_text


def text_of(rate: float = 0.25, rounds: int = 8, **tables: Table) -> str:
    training = {"steps": 2, "images_per_patient": 2, "rounds": rounds, "sampling_rate": rate}
    asked = merged({"privacy": {"epsilon": 3.0}}, tables)
    return study_text(study={"name": "planned"}, training=training, **asked)


def study_of(rate: float = 0.25, rounds: int = 8, **tables: Table) -> Study:
    return parse_study(text_of(rate, rounds, **tables))


def plan_of(rate: float = 0.25, rounds: int = 8, **tables: Table) -> Plan:
    asked = study_of(rate, rounds, **tables)
    return make_plan(asked, [100, 300], weights=900, pace=Pace(0.5, 0.25))


def test_book_keeping_with_privacy_is_not_planned() -> None:
    asked = with_engine(study_of(), "book-keeping")
    with pytest.raises(StudyInvalid, match="can move its sum of clipped gradients"):
        make_plan(asked, [100], weights=900, pace=Pace(0.5))


@pytest.mark.slow
def test_the_noise_and_each_round_keep_the_epsilon_by_two_accountants() -> None:
    plan = plan_of()
    assert plan.setting is not None
    sigma = plan.setting.noise_multiplier
    assert plan.epsilons[-1] == epsilon_pld(sigma, 0.25, 16, 1e-5) <= 3.0
    assert plan.whole == plan.epsilons[-1]
    assert plan.release is None
    assert epsilon_pld(sigma - 0.01, 0.25, 16, 1e-5) > 3.0
    assert len(plan.epsilons) == 8
    for number, told in enumerate(plan.epsilons, start=1):
        exact = epsilon_pld(sigma, 0.25, 2 * number, 1e-5)
        assert exact - 1e-9 <= told <= exact + 0.01
        assert told <= epsilon_rdp(sigma, 0.25, 2 * number, 1e-5)


@pytest.mark.slow
def test_a_release_is_part_of_the_whole_that_is_planned() -> None:
    plan, plain = plan_of(evaluation={"release_epsilon": 1.0}), plan_of()
    assert plan.setting is not None
    assert plain.setting is not None
    assert plan.release is not None
    assert plan.whole is not None
    sigma = plan.setting.noise_multiplier
    assert sigma > plain.setting.noise_multiplier
    whole = compose(((Mechanism(sigma, 0.25), 16),), ((Mechanism(plan.release, 1.0), 1),))
    assert 2.99 < plan.whole == epsilon_of(whole, 1e-5) <= 3.0
    assert plan.epsilons[-1] == epsilon_pld(sigma, 0.25, 16, 1e-5) < plan.whole
    # A fifth of the patients are kept apart for it.
    assert [site.sampled for site in plan.sites] == pytest.approx([0.25 * 80, 0.25 * 240])
    assert plan.setting.step_ratio == pytest.approx(0.25 * 320 / (sigma * (2 * 900) ** 0.5))
    for one in plan.others:
        step = Mechanism(one.noise_multiplier, one.sampling_rate)
        steps = one.rounds * one.steps_per_round
        whole = compose(((step, steps),), ((Mechanism(plan.release, 1.0), 1),))
        assert 2.9 < epsilon_of(whole, 1e-5) <= 3.0
    told = plan_output.render(plan)
    assert f"evaluation, noised: epsilon 1, sigma {plan.release:.4f}, once at the end" in told
    assert f"{plan.whole:.3f} with training" in told
    assert plan_output.as_dict(plan)["epsilon_whole"] == plan.whole


def test_signal_to_noise_is_what_a_simulation_finds() -> None:
    generator = np.random.default_rng(5)
    patients, rate, sigma, weights, norm = [100, 300], 0.25, 2.0, 900, 3.0
    direction = norm * np.full(weights, 1 / math.sqrt(weights))
    sums, noises = [], []
    for _ in range(300):
        drawn = sum(int((generator.random(count) < rate).sum()) for count in patients)
        noise = sum(generator.normal(0, sigma * norm, weights) for _ in patients)
        sums.append(np.linalg.norm(drawn * direction))
        noises.append(np.linalg.norm(noise))
    found = np.mean(sums) / np.mean(noises)
    assert ratio(rate, patients, sigma, weights) == pytest.approx(found, rel=0.02)


@pytest.mark.slow
def test_figures_of_sites() -> None:
    plan = plan_of()
    small, large = plan.sites
    assert plan.setting is not None
    sigma = plan.setting.noise_multiplier
    assert (small.sampled, large.sampled) == (25.0, 75.0)
    assert large.step_ratio == pytest.approx(0.25 * 300 / (sigma * 30))
    # 2 steps of 75 patients at half a second, and a quarter of a second for each of the 300.
    assert large.minutes == pytest.approx((2 * 75 * 0.5 + 300 * 0.25) / 60)
    assert plan.bytes_each_way == 3600
    assert plan.setting.step_ratio == pytest.approx(0.25 * 400 / (sigma * 30 * math.sqrt(2)))
    assert plan.setting.study_ratio == pytest.approx(4 * plan.setting.step_ratio)
    assert plan.setting.passes == 4.0


@pytest.mark.slow
def test_delta_is_judged_by_the_number_of_patients() -> None:
    study = study_of(privacy={"delta": 1e-3})
    plan = make_plan(study, [100, 101], weights=9, pace=Pace(1.0))
    assert [site.delta_too_large for site in plan.sites] == [False, True]
    assert "delta is above 1 / (10 x 101)" in plan_output.render(plan)
    assert "(10 x 100)" not in plan_output.render(plan)


@pytest.mark.long
def test_each_setting_to_compare_keeps_the_same_epsilon() -> None:
    plan = plan_of()
    assert plan.setting is not None
    given = {(one.sampling_rate, one.rounds, one.steps_per_round) for one in plan.others}
    assert given == {(0.5, 8, 2), (1, 8, 2), (0.5, 4, 2), (1, 2, 2), (0.25, 4, 2)}
    for one in plan.others:
        steps = one.rounds * one.steps_per_round
        spent = epsilon_pld(one.noise_multiplier, one.sampling_rate, steps, 1e-5)
        assert 2.99 < spent <= 3.0
        assert one.passes == one.sampling_rate * steps


def test_a_larger_rate_wastes_less_and_full_participation_nothing() -> None:
    plan = plan_of()
    assert plan.setting is not None
    full = {one.rounds: one for one in plan.others if one.sampling_rate == 1}
    assert all(one.share == pytest.approx(1.0, abs=1e-3) for one in full.values())
    assert plan.setting.share < 0.97
    # 8 and 2 rounds keep alike; the shorter one is computed in less time.
    assert plan.better == full[2]
    assert f"{plan.setting.share:.0%} kept" not in plan_output.render(plan)
    assert f"100% kept instead of {plan.setting.share:.0%}" in plan_output.render(plan)


def test_nothing_is_suggested_where_nothing_is_wasted() -> None:
    plan = plan_of(rate=1.0)
    assert plan.better is None
    assert "More efficient" not in plan_output.render(plan)
    assert [(one.sampling_rate, one.rounds) for one in plan.others] == [(1.0, 4)]


def test_a_study_without_privacy_has_no_noise_to_plan() -> None:
    plan = plan_of(privacy={"enabled": False})
    assert (plan.setting, plan.epsilons, plan.others, plan.better) == (None, (), (), None)
    assert "NONE: no noise" in plan_output.render(plan)


def test_an_epsilon_that_no_noise_gives_is_refused() -> None:
    study = study_of().model_copy(deep=True)
    privacy = study.privacy.model_copy(update={"epsilon": 1e-9})
    with raises(EpsilonUnreachable):
        make_plan(study.model_copy(update={"privacy": privacy}), [9], weights=9, pace=Pace(1.0))


@pytest.mark.parametrize("network", ["small-cnn", "filter-bank"])
def test_the_pace_is_that_of_the_study_s_network(network: str) -> None:
    study = study_of(network={"name": network})
    pace, weights = timing.measure(study)
    module = registry.build(study.network, 2, size=32, seed=0)
    assert weights == flat_parameters.layout_of(module).size
    assert pace.gradient > 0
    # The fixed filters run once a round; of the other network everything is trained.
    assert (pace.once > 0) == (network == "filter-bank")


def test_the_pace_follows_the_time_that_the_network_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    real = registry.build

    def slow(*given: object, **named: object) -> torch.nn.Module:
        module = real(*given, **named)  # type: ignore[arg-type]
        module.register_forward_hook(lambda *_: time.sleep(0.05))
        return module

    monkeypatch.setattr(study_network, "build", slow)
    pace, _ = timing.measure(study_of())
    assert 0.05 < pace.gradient < 0.5


# The command


def end(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    """Run the command line: exit status, standard output, standard error."""
    with pytest.raises(SystemExit) as caught:
        main.main(list(arguments))
    told = capsys.readouterr()
    return int(caught.value.code or 0), told.out, told.err


def write(folder: Path, privacy: str = "") -> str:
    path = folder / "study.toml"
    path.write_text(text_of(rate=0.5, rounds=3, privacy=privacy))
    return str(path)


@pytest.mark.slow
def test_the_command_in_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    status, out, err = end(capsys, "study", "plan", write(tmp_path), "--patients", "400, 250")
    assert (status, err) == (0, "")
    assert "planned: 3 rounds, 2 sites" in out
    assert "patient-level, epsilon 3 at delta 1e-05" in out
    assert "15,998 trained weights" in out
    assert "63,992 to a site and 63,992 from it" in out


@pytest.mark.long
def test_the_command_as_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = write(tmp_path)
    status, out, _ = end(capsys, "study", "plan", file, "--patients", "400,250", "--json")
    told = json.loads(out)
    assert status == 0
    assert told["hash"] == study_of(rate=0.5, rounds=3).digest
    assert told["epsilon_by_round"][-1] <= 3.0
    assert [site["patients"] for site in told["sites"]] == [400, 250]
    assert told["bytes_to_site_per_round"] == 4 * told["weights"] == 63_992
    assert told["setting"]["noise_multiplier"] > told["others"][-1]["noise_multiplier"]


@pytest.mark.parametrize("name", ["plan.png", "plan.svg"])
def test_the_plot(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / name
    given = ["study", "plan", write(tmp_path), "--patients", "9", "--plot", str(out)]
    status, told, _ = end(capsys, *given)
    assert status == 0
    assert told.endswith(f"Wrote {out}.\n")
    begins = {"plan.png": b"\x89PNG", "plan.svg": b"<?xml"}
    assert out.read_bytes().startswith(begins[name])
    assert out.stat().st_mode & 0o777 == 0o644


def test_the_plot_draws_the_plan_s_epsilons(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from matplotlib.axes import Axes

    drawn: list[tuple[list[int], list[float]]] = []
    real = Axes.plot

    def noted(self: Axes, x: object, y: object, **style: object) -> object:
        drawn.append((list(x), list(y)))  # type: ignore[call-overload]
        return real(self, x, y, **style)

    monkeypatch.setattr(Axes, "plot", noted)
    plan = plan_of()
    plan_output.write_plot(plan, tmp_path / "plan.svg")
    assert drawn[0] == ([1, 2, 3, 4, 5, 6, 7, 8], list(plan.epsilons))


@pytest.mark.parametrize(
    ("patients", "plot", "more"),
    [
        ("", "", ""),
        ("0", "", ""),
        ("4,", "", ""),
        ("-4", "", ""),
        ("four", "", ""),
        ("1e3", "", ""),
        ("9" * 11, "", ""),
        ("4", "plan.pdf", ""),
        ("4", "plan", ""),
        ("4", "plan.svg", "enabled = false"),
    ],
)
def test_what_cannot_be_planned_is_refused(
    patients: str, plot: str, more: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["study", "plan", write(tmp_path, more), "--patients", patients]
    if plot:
        given += ["--plot", str(tmp_path / plot)]
    status, out, err = end(capsys, *given)
    assert (status, out) == (2, "")
    assert "CLO-106" in err
    assert {path.name for path in tmp_path.iterdir()} == {"study.toml"}


def test_the_numbers_of_patients_must_be_given(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, out, err = end(capsys, "study", "plan", write(tmp_path))
    assert (status, out) == (2, "")
    assert "--patients" in err
