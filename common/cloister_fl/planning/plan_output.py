"""Output of a plan: text, JSON, and a plot of epsilon over rounds."""

from __future__ import annotations

import io
from dataclasses import asdict
from pathlib import Path

from cloister_fl.errors import OptionInvalid
from cloister_fl.planning.plan import Plan, Setting
from cloister_fl.system.files import write_atomic
from cloister_fl.system.text import counted

_INK, _FAINT, _GRID, _LINE, _ACCENT = "#1d2b33", "#52636d", "#d9e1e5", "#0b6e75", "#a8480f"
_KINDS = ("png", "svg")


def as_dict(plan: Plan) -> dict[str, object]:
    """The whole plan, ready for JSON."""
    study = plan.study
    return {
        "study": study.study.name,
        "hash": study.digest,
        "epsilon": study.privacy.epsilon if study.privacy.enabled else None,
        "delta": study.privacy.delta if study.privacy.enabled else None,
        "weights": plan.weights,
        "seconds_per_gradient": plan.pace.gradient,
        "seconds_per_patient_once_a_round": plan.pace.once,
        "bytes_to_site_per_round": plan.bytes_each_way,
        "bytes_from_site_per_round": plan.bytes_each_way,
        "setting": asdict(plan.setting) if plan.setting else None,
        "epsilon_by_round": list(plan.epsilons),
        "release_epsilon": study.evaluation.release_epsilon if study.releases else None,
        "release_noise_multiplier": plan.release,
        "epsilon_whole": plan.whole,
        "sites": [asdict(site) for site in plan.sites],
        "others": [asdict(other) for other in plan.others],
    }


def render(plan: Plan) -> str:
    """The plan for a person, several lines."""
    study, setting = plan.study, plan.setting
    privacy = study.privacy
    lines = [
        f"{study.study.name}: {counted(study.training.rounds, 'round')}, "
        + counted(len(plan.sites), "site")
    ]
    if setting is None:
        lines.append("  privacy   NONE: no noise and no epsilon")
    else:
        lines += [
            f"  privacy   patient-level, epsilon {privacy.epsilon:g} at delta {privacy.delta:g}",
            f"  noise     sigma {setting.noise_multiplier:.4f}, "
            f"{counted(setting.rounds * setting.steps_per_round, 'step')}, each patient in a "
            f"step with probability {setting.sampling_rate:g}",
            f"  epsilon   {_by_round(plan)}",
        ]
        if plan.release is not None:
            lines.append(
                f"  evaluation, noised: epsilon {study.evaluation.release_epsilon:g}, sigma "
                f"{plan.release:.4f}, once at the end; {plan.whole:.3f} with training"
            )
    lines += [
        f"  network   {study.network.name}, {plan.weights:,} trained weights",
        f"  bytes     {plan.bytes_each_way:,} to a site and {plan.bytes_each_way:,} from it, a "
        "round; plus keys and signatures",
        f"  machine   {plan.pace.gradient:.4f} s for a patient of "
        f"{counted(study.training.images_per_patient, 'image')}, one after the other",
        "",
        f"  {'patients':>8}  {'in a step':>9}  {'minutes a round':>15}  signal-to-noise of a step",
    ]
    for site in plan.sites:
        told = "-" if site.step_ratio is None else f"{site.step_ratio:.3g}"
        row = f"  {site.patients:>8}  {site.sampled:>9.1f}  {site.minutes:>15.3g}  {told}"
        warned = f"  delta is above 1 / (10 x {site.patients})" if site.delta_too_large else ""
        lines.append(row + warned)
    if setting is not None:
        lines.append(f"  all sites' sum: {setting.step_ratio:.3g}")
        lines += _comparison(plan, setting)
    return "\n".join(lines)


def _by_round(plan: Plan) -> str:
    last = len(plan.epsilons)
    shown = sorted({1, max(1, last // 4), max(1, last // 2), last})
    return ", ".join(f"{plan.epsilons[number - 1]:.3f} after round {number}" for number in shown)


def _comparison(plan: Plan, setting: Setting) -> list[str]:
    head = f"  {'rate':>7} {'rounds':>6} {'steps':>6} {'sigma':>9} {'of a step':>10} "
    lines = [
        "",
        "Within the same epsilon (signal-to-noise of all sites' sum):",
        f"{head}{'of all':>8} {'kept':>6} {'passes':>7}",
    ]
    lines += [
        f"  {one.sampling_rate:>7.4g} {one.rounds:>6} {one.steps_per_round:>6} "
        f"{one.noise_multiplier:>9.4f} {one.step_ratio:>10.3g} {one.study_ratio:>8.3g} "
        f"{one.share:>6.0%} {one.passes:>7.4g}" + "  as it is" * (one is setting)
        for one in (setting, *plan.others)
    ]
    lines += [
        "",
        "Signal-to-noise is q N / (sigma sqrt(d)): the most that patients who all agree can give "
        "against the",
        "norm of the noise. Kept: the share of what full participation gets out of this epsilon. "
        "Passes:",
        "how often each patient is computed.",
    ]
    better = plan.better
    if better is not None:
        times = better.passes / setting.passes
        lines.append(
            f"More efficient: rate {better.sampling_rate:.4g} with {better.rounds} rounds: "
            f"{better.share:.0%} kept instead of {setting.share:.0%}, for {times:.3g} times the "
            "computing. The number of steps changes, so the learning rate may have to change, too."
        )
    return lines


def kind_of_plot(path: Path) -> str:
    """``png`` or ``svg``, by the file's name.

    Raises:
        OptionInvalid: another ending.
    """
    kind = path.suffix.lower().removeprefix(".")
    if kind not in _KINDS:
        raise OptionInvalid(
            f"A plot cannot be written to {path.name}.", remedy="Name a file .png or .svg."
        )
    return kind


def write_plot(plan: Plan, path: Path) -> None:
    """Draw epsilon over rounds; an older file is replaced.

    Raises:
        OptionInvalid: the plan has no epsilon, or the file's name another ending.
        OutputInTheWay: the file cannot be written.
    """
    import matplotlib as mpl
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    kind, limit = kind_of_plot(path), plan.study.privacy.epsilon
    if not plan.epsilons:
        raise OptionInvalid(
            "A study without privacy has no epsilon to draw.", remedy="Leave --plot out."
        )
    with mpl.rc_context({"svg.hashsalt": "cloister", "font.size": 11, "text.color": _INK}):
        # Figure without pyplot: no global state, no display.
        figure = Figure(figsize=(6.4, 3.8), layout="constrained", dpi=150)
        axes = figure.add_subplot()
        for side in ("top", "right", "left"):
            axes.spines[side].set_visible(False)
        axes.grid(axis="y", color=_GRID, linewidth=0.8)
        axes.tick_params(length=0, colors=_FAINT)
        rounds = range(1, len(plan.epsilons) + 1)
        # A round charges all its steps before the first of them: a step, not a slope.
        axes.plot(rounds, plan.epsilons, color=_LINE, linewidth=2, drawstyle="steps-post")
        axes.plot(rounds[-1:], plan.epsilons[-1:], color=_LINE, marker="o", markersize=5)
        axes.axhline(limit, color=_ACCENT, linewidth=1.5, linestyle=(0, (4, 3)))
        axes.annotate(
            f"the study's epsilon, {limit:g}",
            (0, limit),
            xycoords=("axes fraction", "data"),
            xytext=(4, 4),
            textcoords="offset points",
            color=_ACCENT,
        )
        axes.set_ylim(0, 1.15 * limit)
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        axes.set_xlabel("Round", color=_INK)
        axes.set_ylabel(f"Epsilon at delta {plan.study.privacy.delta:g}", color=_INK)
        out = io.BytesIO()
        nothing = {"Software": None} if kind == "png" else {"Date": None, "Creator": None}
        figure.savefig(out, format=kind, metadata=nothing)
    write_atomic(path, out.getvalue(), mode=0o644)
