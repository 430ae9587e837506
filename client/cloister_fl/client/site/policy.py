"""Policy of a site: what the hospital allows, whatever a study asks for.

The policy stands in the site's own file, is read anew for each study, and can only narrow: a
study that asks for more is refused with the key that refuses it.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from cloister_fl.client.site.training_hours import is_span
from cloister_fl.errors import EpsilonUnreachable, PrivacyError
from cloister_fl.membership.identity import usable_public_key
from cloister_fl.study.schema import Modality, Name, Study
from cloister_fl.system.toml import FileModel, KeyedValueError

Epsilon = Annotated[float, Field(gt=0, le=1000)]
_HEX = re.compile(r"[0-9a-f]{64}", re.ASCII)
Metric = Literal["score-histograms"]
"""What a site can measure for the coordinator: how many of its own patients, kept apart from
training, have which score. Exact in a study without privacy; noised and charged, once, in the
release of a study with it."""


def _is_hash(value: str) -> str:
    if not _HEX.fullmatch(value):
        raise ValueError(
            f"{value[:20]!r} is not the whole hash of a study: 64 digits of 0-9 and a-f, "
            "as shown by: cloister study check STUDY"
        )
    return value


def _is_key(value: str) -> str:
    if not _HEX.fullmatch(value) or not usable_public_key(bytes.fromhex(value)):
        raise ValueError(
            f"{value[:20]!r} is not an Ed25519 public key: 64 digits of 0-9 and a-f, "
            "as shown by: cloister study key"
        )
    return value


class Policy(FileModel):
    """The table ``[policy]`` of a site file; the defaults are the strict ones."""

    max_epsilon_study: Epsilon = 3.0
    """Most epsilon that one study may cost a patient, at the study's delta."""
    max_epsilon_lifetime: Epsilon = 8.0
    """Most epsilon that all studies together may cost a patient, at ``ledger_delta``."""
    ledger_delta: Annotated[float, Field(gt=0, lt=0.1)] = 1e-5
    """Delta of the lifetime's account; a study with a larger delta is refused."""
    patients_at_most: Annotated[int, Field(ge=0, le=1_000_000_000)] = 0
    """A public upper bound on the site's patients, which the steward declares; 0: not declared, and
    then no study with privacy is allowed. One whose delta is above 1 / (10 x this) is refused:
    such a delta would let whole patients out."""
    min_noise_multiplier: Annotated[float, Field(ge=0, le=1000)] = 0.3
    """Least noise, as a multiple of what one patient moves a sum by, of training steps and of a
    noised evaluation. Below it an epsilon rests on hardly anything but the chance of being
    sampled, and shows single patients to whoever learns who was."""
    min_patients: Annotated[int, Field(ge=1, le=1_000_000)] = 10
    """Fewest patients before the site trains at all."""
    min_patients_per_class: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Fewest patients of each class before the site trains at all; 0 asks for none. A hospital that
    has one class alone is ordinary: the others have the rest."""
    min_patients_per_class_without_privacy: Annotated[int, Field(ge=0, le=1_000_000)] = 10
    """The same for a study without privacy, whose updates and counts are exact; the larger of both
    holds there."""
    require_secure_aggregation: bool = True
    """Whether an update may leave only masked, so that only the sum of the sites can be read."""
    colluders: Annotated[int, Field(ge=0, le=100)] = 1
    """Sites that may work with the coordinator; a study must allow for as many, or more."""
    min_sites: Annotated[int, Field(ge=1, le=1000)] = 5
    """Fewest sites that must be invited, and that a study may ask for."""
    max_weight_ratio: Annotated[float, Field(ge=1, le=1000)] = 1.0
    """Most that the largest public weight of a study may be of the smallest. A site with a far
    larger weight than all others has the sum to itself."""
    max_rounds: Annotated[int, Field(ge=1, le=10_000)] = 1000
    allow_without_privacy: bool = False
    """Whether a study may train without differential privacy; for public data only."""
    networks: Annotated[tuple[Name, ...], Field(strict=False)] = ()
    """Networks that may be trained; empty allows all that are registered."""
    modalities: Annotated[tuple[Modality, ...], Field(strict=False)] = ()
    """Modalities that a study may read; empty allows all that Cloister reads."""
    metrics: Annotated[tuple[Metric, ...], Field(strict=False)] = ()
    """Metrics that may leave; empty allows none."""
    hours: Annotated[
        tuple[Annotated[str, AfterValidator(is_span)], ...], Field(strict=False, max_length=50)
    ] = ()
    """When a round may begin, each "HH:MM-HH:MM" of local time; empty allows any time. It keeps
    no study out: a round that is asked for at another time is refused, and costs nothing."""
    release_unstarted: bool = False
    """Whether the coordinator's word that a run has ended before its last round releases, in the
    lifetime's account, what was not started. The study is closed here for good. It holds for what
    is reserved from then on; the study's own epsilon stays that of all its rounds."""
    approve: Literal["none", "listed", "signed"] = "none"
    """What is approved without a person's decision here: no study; those of ``approved_hashes``;
    or those that a key of ``trusted_signers`` has signed. A study that was denied stays so."""
    approved_hashes: Annotated[
        tuple[Annotated[str, AfterValidator(_is_hash)], ...], Field(strict=False, max_length=1000)
    ] = ()
    """Hashes of studies, 64 digits; counted only where ``approve`` is "listed"."""
    trusted_signers: Annotated[
        tuple[Annotated[str, AfterValidator(_is_key)], ...], Field(strict=False, max_length=100)
    ] = ()
    """Ed25519 public keys, 64 digits; counted only where ``approve`` is "signed"."""

    @field_validator("networks", mode="after")
    @classmethod
    def _are_networks(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        from cloister_fl.networks.registry import REGISTRY

        for name in names:
            if name not in REGISTRY:
                near = difflib.get_close_matches(name, REGISTRY, 1)
                hint = f" Did you mean {near[0]!r}?" if near else ""
                raise ValueError(f"names {name!r}, which is not a network of this version.{hint}")
        return names

    @model_validator(mode="after")
    def _has_grounds(self) -> Policy:
        needed = {"listed": "approved_hashes", "signed": "trusted_signers"}.get(self.approve)
        if needed is not None and not getattr(self, needed):
            raise KeyedValueError(
                "approve", f"is {self.approve!r}, so {needed} must name at least one."
            )
        return self


def policy_for(patients_at_most: int | None) -> Policy:
    """The strict policy of a site with a bound on its patients; None leaves it undeclared.

    The lifetime's delta follows the bound, for a ledger keeps the delta that it began with.
    """
    if patients_at_most is None:
        return Policy()
    usual = Policy().ledger_delta
    return Policy(
        patients_at_most=patients_at_most, ledger_delta=min(usual, delta_for(patients_at_most))
    )


def refusals(policy: Policy, study: Study, invited_sites: int) -> tuple[str, ...]:
    """Say in plain words why the policy does not allow a study.

    Args:
        policy: the site's policy.
        study: the study that is asked for.
        invited_sites: number of sites on the federation's list, this one included.

    Returns:
        One sentence for each refusal, with the policy's key and both values; empty if the study
        is allowed. What the lifetime's budget has left is the ledger's to judge. An engine that
        does not support the study's privacy claim is refused under any policy.
    """
    unsound = study.unsound_engine
    found = [unsound] if unsound else []
    privacy, asked = study.privacy, study.input.modalities
    if not privacy.enabled:
        if not policy.allow_without_privacy:
            found.append(
                "policy.allow_without_privacy is false; "
                "the study sets privacy.enabled to false and would train without protection."
            )
        if study.evaluation.site_fraction and not may_measure(policy):
            found.append(
                "policy.metrics does not allow score-histograms; "
                f"the study asks for them with privacy.enabled = false and "
                f"evaluation.site_fraction = {study.evaluation.site_fraction:g}."
            )
    else:
        if study.releases and not may_measure(policy):
            found.append(
                "policy.metrics does not allow score-histograms; the study asks for a noised "
                "evaluation with "
                f"evaluation.release_epsilon = {study.evaluation.release_epsilon:g}."
            )
        if privacy.epsilon > policy.max_epsilon_study:
            found.append(
                f"policy.max_epsilon_study is {policy.max_epsilon_study:g}; "
                f"the study asks for privacy.epsilon = {privacy.epsilon:g}."
            )
        if privacy.delta > policy.ledger_delta:
            # An epsilon means little without its delta: at delta 0.09 any bound on it is empty.
            found.append(
                f"policy.ledger_delta is {policy.ledger_delta:g}; "
                f"the study asks for privacy.delta = {privacy.delta:g}."
            )
        if not policy.patients_at_most:
            found.append(
                "policy.patients_at_most is 0, not declared, so nothing tells whether the study's "
                f"privacy.delta = {privacy.delta:g} is small enough for this site's patients; "
                f"it is for up to {_patients_for(privacy.delta)}."
            )
        else:
            found.extend(_of_delta(policy, privacy.delta))
        found.extend(_of_noise(policy, study))
    if study.training.rounds > policy.max_rounds:
        found.append(
            f"policy.max_rounds is {policy.max_rounds}; "
            f"the study asks for training.rounds = {study.training.rounds}."
        )
    found.extend(_of_aggregation(policy, study, invited_sites))
    if policy.networks and study.network.name not in policy.networks:
        found.append(
            f"policy.networks allows {', '.join(policy.networks)}; "
            f"the study asks for network.name = {study.network.name}."
        )
    refused = [word for word in asked if policy.modalities and word not in policy.modalities]
    if refused:
        found.append(
            f"policy.modalities allows {', '.join(policy.modalities)}; "
            f"the study asks for input.modalities = {', '.join(asked)}."
        )
    return tuple(found)


def _of_delta(policy: Policy, delta: float) -> Iterator[str]:
    bound = f"policy.patients_at_most is {policy.patients_at_most}, which allows a delta of "
    bound += f"{delta_for(policy.patients_at_most):g}; "
    if delta * 10 * policy.patients_at_most > 1 + 1e-9:
        yield f"{bound}the study asks for privacy.delta = {delta:g}."
    if policy.ledger_delta * 10 * policy.patients_at_most > 1 + 1e-9:
        # The lifetime's promise is for all patients, too.
        yield f"{bound}policy.ledger_delta is {policy.ledger_delta:g}."


def delta_for(patients: int) -> float:
    """The largest delta for so many patients, 1 or more: a tenth of one over their number."""
    return 1 / (10 * patients)


def _of_noise(policy: Policy, study: Study) -> Iterator[str]:
    from cloister_fl.study.cost import charges

    try:
        used = charges(study)
    except PrivacyError as error:
        if error.code != EpsilonUnreachable.code:
            raise
        # Told with more words where the study is let in.
        return
    for name, mechanism in (("training", used.step), ("noised evaluation", used.release)):
        if mechanism is not None and mechanism.noise_multiplier < policy.min_noise_multiplier:
            yield (
                f"policy.min_noise_multiplier is {policy.min_noise_multiplier:g}; the noise "
                f"multiplier of the study's {name} is {mechanism.noise_multiplier:.3g}."
            )


def _patients_for(delta: float) -> int:
    """The most patients that a delta suits."""
    # 1 / (10 x 1e-5) is 9,999.99... in floating point.
    return int(1 / (10 * delta) * (1 + 1e-9))


def bound_missing(policy: Policy) -> str:
    """What to tell a steward who has not declared ``patients_at_most``; empty where it is."""
    if policy.patients_at_most:
        return ""
    return (
        "No study with privacy is let in before patients_at_most stands below [policy] in "
        "site.toml: a public upper bound on this site's patients, such as 10000."
    )


def may_measure(policy: Policy) -> bool:
    """Whether score histograms may leave: exact without privacy, else noised and charged."""
    return "score-histograms" in policy.metrics


def _of_aggregation(policy: Policy, study: Study, invited_sites: int) -> Iterator[str]:
    aggregation = study.aggregation
    if not aggregation.secure:
        if policy.require_secure_aggregation:
            yield (
                "policy.require_secure_aggregation is true; "
                "the study sets aggregation.secure to false and would send updates without secure "
                "aggregation."
            )
    elif aggregation.colluders < policy.colluders:
        yield (
            f"policy.colluders is {policy.colluders}; "
            f"the study sets aggregation.colluders = {aggregation.colluders}."
        )
    if aggregation.weight_ratio > policy.max_weight_ratio:
        yield (
            f"policy.max_weight_ratio is {policy.max_weight_ratio:g}; the largest of the study's "
            f"aggregation.weights is {aggregation.weight_ratio:.6g} times the smallest, where a "
            "site that is not named has 1."
        )
    if aggregation.min_sites < policy.min_sites:
        yield (
            f"policy.min_sites is {policy.min_sites}; "
            f"the study sets aggregation.min_sites = {aggregation.min_sites}."
        )
    if invited_sites < policy.min_sites:
        yield f"policy.min_sites is {policy.min_sites}; {invited_sites} are on the roster."
