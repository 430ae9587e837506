"""Review of a proposed study in words: its training, its privacy cost, what would leave."""

from __future__ import annotations

import textwrap
from unicodedata import east_asian_width

from cloister_fl.client.admission import gate
from cloister_fl.client.admission.approvals import Decision, Judgement
from cloister_fl.client.site.data_notice import data_notices
from cloister_fl.client.site.folder import Site
from cloister_fl.client.site.policy import refusals
from cloister_fl.client.steward.budget import LIFETIME_BINDS, line, study_promised
from cloister_fl.secagg.parameters import Parameters
from cloister_fl.study.schema import Study
from cloister_fl.system.text import counted

_COLUMNS = 78
"""One less than may be filled: a line may end with the first half of a character."""
_SECOND = "\0"
_MORE = "    | "
"""How a line begins that goes on with the coordinator's words."""


def review(site: Site, judgement: Judgement) -> str:
    """Return the study in words, with what this site's policy and budget say of it."""
    study = judgement.study
    what = "images" if study.input.dimensions == 2 else "volumes"
    lines = [
        *_told(f"{study.study.name}: ", study.study.question),
        f"  hash         {study.digest}",
        f"  decision     {judgement.decision.value}"
        + (" by the policy" if judgement.ground else "")
        + (f", {judgement.time}" if judgement.time else "")
        + (f": {judgement.why}" if judgement.why else ""),
        f"  trains       {study.network.name}, {counted(study.training.rounds, 'round')} of "
        f"{counted(study.training.steps_per_round, 'step')}, each patient in a step with "
        f"probability {study.training.sampling_rate:g}",
        *_starts(study),
        *_pretrained_weights(study),
        *_told(
            "  on           ",
            f"{', '.join(study.input.modalities)} {what} of this site, their "
            f"{study.task.described}",
        ),
        *_class_weights(study),
        *_cost(site, study),
        *_leaves(study),
        *_data(site, judgement),
    ]
    told = refusals(site.policy, study, max(site.policy.min_sites, study.aggregation.min_sites))
    short = None if told else gate.shortfall(site, study)
    objections = [*told, *([f"{short.what} {short.why}"] if short else [])]
    lines += [f"  policy       refuses: {sentence}" for sentence in objections]
    if not objections:
        lines.append("  policy       allows it")
    if judgement.decision is Decision.PENDING:
        lines.append(f"To allow it: {site.command(f'approve {study.digest[:16]}')}")
    return "\n".join(lines)


def _class_weights(study: Study) -> list[str]:
    given = study.training.class_weights
    if not given:
        return []
    named = ", ".join(f"{name} {given[name]:g}" for name in study.task.strata)
    return _told("  weighs       ", f"{named}; none lets a patient count more")


def listing(judgements: dict[str, Judgement]) -> str:
    """All studies, one line each."""
    if not judgements:
        return "No study has been proposed to this site yet."
    return "\n".join(
        f"{digest[:16]}  {one.decision.value:<8}  {one.study.study.name}"
        for digest, one in judgements.items()
    )


def _cost(site: Site, study: Study) -> list[str]:
    privacy = study.privacy
    if not privacy.enabled:
        return ["  costs        NO differential privacy: what leaves may reveal single patients"]
    return [
        f"  costs        at most epsilon {privacy.epsilon:g} at delta {privacy.delta:g}, a patient",
        "  budget       promised so far, "
        + line(study_promised(site, study), gate.promised(site), site.policy.max_epsilon_lifetime),
        *textwrap.wrap(
            LIFETIME_BINDS, _COLUMNS, initial_indent=" " * 15, subsequent_indent=" " * 15
        ),
    ]


def _data(site: Site, judgement: Judgement) -> list[str]:
    """What was found of the data last, and who looked at them before the study was approved."""
    study = judgement.study
    notice = data_notices(site.root).get(study.digest)
    if notice is not None:
        return [f"  data         not as they must be, {notice.time}: {notice.message}"]
    if judgement.decision is not Decision.APPROVED:
        return []
    if judgement.data:
        told = f"checked when it was approved, and frozen: manifest {judgement.data[:16]}"
    elif judgement.ground:
        told = "not checked: a rule of the policy looks at no data"
    else:
        told = "not checked" + (
            ": with privacy on, the approval does not count until it is given again"
            if study.privacy.enabled
            else ""
        )
    return [f"  data         {told}"]


def _leaves(study: Study) -> list[str]:
    noised = "noised " if study.privacy.enabled else ""
    if study.aggregation.secure:
        lines = [
            f"  would leave  {noised}model updates, by secure aggregation: the coordinator "
            "reads only their sum",
            *_sum(study),
        ]
    else:
        lines = [f"  would leave  {noised}model updates, which the coordinator can read"]
    if not study.privacy.enabled and study.evaluation.site_fraction:
        secure = ", by secure aggregation" if study.aggregation.secure else ""
        by = study.task.counted_by
        lines.append(f"               counts of patients by {by}{secure}")
    if study.releases:
        secure = ", by secure aggregation" if study.aggregation.secure else ""
        lines.append(
            f"               once, at the end, noised counts of patients by "
            f"{study.task.counted_by}{secure}: "
            f"epsilon {study.evaluation.release_epsilon:g}, part of the cost above"
        )
    return lines


def _sum(study: Study) -> list[str]:
    """All that shapes a sum: how few sites, who may work together, weights, range."""
    asked = study.aggregation
    numbers = Parameters.derive(asked.fewest_sites, asked.colluders)
    few = f"{numbers.m} sites or more in it"
    if numbers.m < numbers.n:
        few += f", for of {numbers.n} invited {numbers.dropouts} may fail; more if more are invited"
    others = f"{counted(asked.colluders, 'site')} may work with the coordinator"
    weights = "all sites alike"
    if asked.weights:
        named = ", ".join(f"{site} {weight:g}" for site, weight in sorted(asked.weights.items()))
        weights = f"{named}; any other site 1"
    return [
        f"  a sum has    {few}",
        f"               {others} and still not read another's update",
        *_told("  weights      ", weights),
        f"  range        each coordinate is cut to {asked.clip:g} on either side",
    ]


def _starts(study: Study) -> list[str]:
    """Which model round 1 begins with: this site compares its hash, and trains no other."""
    stated = study.training.initial_model
    if not stated:
        return ["  round 1      NO hash of the initial model: the study is refused"]
    return ["  round 1      begins with the model of this hash, or is refused:", f"{_MORE}{stated}"]


def _pretrained_weights(study: Study) -> list[str]:
    given = study.network.arguments
    sha256 = given.get("weights", given.get("sha256"))
    if not sha256:
        return []
    # The hash has a line of its own, whole: a steward copies it to compare it.
    return ["  starts from  pretrained weights with the SHA-256", *_told(_MORE, str(sha256))]


def _told(label: str, words: str) -> list[str]:
    """Words of the coordinator's, which never begin a line as this site's own do.

    Broken here and not by the terminal, where spaces would push what follows onto a new line.
    """
    # Some characters take two columns; textwrap counts characters.
    spread = [one + _SECOND * (east_asian_width(one) in "WF") for one in " ".join(words.split())]
    lines = textwrap.wrap(
        "".join(spread),
        _COLUMNS,
        initial_indent=label,
        subsequent_indent=_MORE,
        break_on_hyphens=False,
    )
    return [line.replace(_SECOND, "") for line in lines]
