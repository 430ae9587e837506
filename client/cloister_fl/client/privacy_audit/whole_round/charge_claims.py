"""Claims about the ledger: what is trained is charged, before data are read, once and for good."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from cloister_fl.client.privacy_audit.whole_round.audited_studies import changed, small_study
from cloister_fl.client.privacy_audit.whole_round.evidence import Claim, Evidence
from cloister_fl.client.privacy_audit.whole_round.made_up_patients import cohort_of, kinds_of
from cloister_fl.client.privacy_audit.whole_round.round_reference import Reference, steps_of
from cloister_fl.client.privacy_audit.whole_round.throwaway_site import (
    RoundRefused,
    ThrowawaySite,
)
from cloister_fl.protocol.round_messages import Refused
from cloister_fl.study.cost import charges


def judge_charges(evidence: Evidence, folder: Path) -> None:
    """Ask made-up sites for rounds and releases, and see what their ledgers say.

    Args:
        evidence: where requirements are counted.
        folder: private; sites are made in it.
    """
    study = small_study("charges", rounds=2, steps=3, sampling_rate=0.5, release=40.0)
    model, kinds = Reference(study).first, kinds_of(study, 4)
    site = ThrowawaySite(folder / "charged", study, model)
    site.place(cohort_of(study, kinds, [2] * 4))

    def require(what: str, holds: bool, detail: str = "") -> None:
        evidence.require(Claim.CHARGE, what, holds, detail)

    def refused(what: str, ask: Callable[[], object], reason: Refused) -> None:
        try:
            ask()
        except RoundRefused as error:
            require(what, error.reason == reason.value, f"it is refused as '{error.reason}'")
        else:
            require(what, holds=False, detail="it is answered")

    site.train(1, model)
    site.evaluate(model)
    refused("a round is charged and trained once", lambda: site.train(1, model), Refused.SPENT)
    refused("the release is charged and made once", lambda: site.evaluate(model), Refused.SPENT)
    site.train(2, model)
    used, entries = charges(study), site.entries()
    reserved = [body for kind, body in entries if kind == "reserved"]
    expected = {
        "noise_multiplier": used.step.noise_multiplier,
        "sampling_rate": study.training.sampling_rate,
        "steps": study.training.rounds * steps_of(study),
        "delta": study.privacy.delta,
        "release_noise_multiplier": used.release and used.release.noise_multiplier,
    }
    require(
        "the whole study is reserved, with the noise that is added",
        len(reserved) == 1 and all(reserved[0].get(key) == expected[key] for key in expected),
    )
    started = [(body["round"], body["steps"]) for kind, body in entries if kind == "started"]
    require("each round is charged with all its steps", started == [(1, 3), (2, 3)], str(started))
    require("the release is charged", [kind for kind, _ in entries].count("evaluated") == 1)

    # Nobody's images are there: it is charged all the same, and noise is the answer.
    empty = ThrowawaySite(folder / "empty", study, model)
    try:
        answered = bool(empty.train(1, model).any())
    except RoundRefused:
        answered = False
    require("a site without images answers with noise", answered)
    kinds_there = [kind for kind, _ in empty.entries()]
    require("a round is charged whoever is there", kinds_there.count("started") == 1)

    dear = changed(study, study={"name": "dear"}, privacy={"epsilon": 900.0})
    site = ThrowawaySite(folder / "dear", dear, model)
    refused(
        "what the lifetime cannot bear is refused", lambda: site.train(1, model), Refused.BUDGET
    )
    denied = ThrowawaySite(folder / "denied", study, model)
    other = changed(study, study={"name": "another"})
    denied.ask_for(other)
    refused("what nobody approved is refused", lambda: denied.train(1, model), Refused.APPROVAL)
    require("what is refused is not charged", not denied.site.ledger.exists())
