"""One-run audit in words and as JSON, and what it does not show."""

from __future__ import annotations

from cloister_fl.client.privacy_audit.one_run import OneRunAudit
from cloister_fl.system.text import counted


def as_dict(found: OneRunAudit) -> dict[str, object]:
    """What ``render`` says, ready for JSON; no score and no coin of a patient."""
    return {
        "claimed_epsilon": found.claimed_epsilon,
        "audited_epsilon": found.audited_epsilon,
        "most_epsilon": found.most_epsilon,
        "passed": found.passed,
        "could_refute": found.could_refute,
        "confidence": found.confidence,
        "delta": found.delta,
        "noise_multiplier": found.noise_multiplier,
        "sampling_rate": found.sampling_rate,
        "steps": found.steps,
        "canaries": found.canaries,
        "others": found.others,
        "guesses": [
            {
                "made": line.made,
                "right": line.right,
                "epsilon": line.epsilon,
                "most": line.most,
                "chance": line.chance,
                "least_chance": line.least,
            }
            for line in found.guesses
        ],
    }


def verdict(found: OneRunAudit) -> str:
    """One line: refuted, not refuted, or not put to the test."""
    if not found.passed:
        return "THE CLAIM IS REFUTED: training shows more of your patients than the study claims."
    if found.could_refute:
        return "The claim stands: who sees every step could not guess more than it allows."
    return "This run could not have refuted the claim, however right the guesses."


def render(found: OneRunAudit) -> str:
    """An audit for a terminal."""
    rarest = min(found.guesses, key=lambda line: line.chance)
    guessed = ", ".join(f"{line.right} of {line.made}" for line in found.guesses)
    steps = counted(found.steps, "step")
    lines = [
        f"claimed           epsilon {found.claimed_epsilon:.3f} at delta {found.delta:g}: {steps} "
        f"at noise multiplier {found.noise_multiplier:g}, rate {found.sampling_rate:g}",
        f"audited           epsilon {found.audited_epsilon:.3f} or more, at confidence "
        f"{found.confidence:.0%}",
        f"could have shown  epsilon {found.most_epsilon:.3f}, had every guess been right",
        f"canaries          {found.canaries} patients, each in by a coin; "
        f"{found.others} more always in",
        f"guessed right     {guessed} (the most confident first)",
        f"by the claim      {rarest.right} of {rarest.made} or more have a chance of "
        f"{rarest.chance:.2g} at most; below {found.level:.2g} refutes it",
    ]
    lines.append(verdict(found))
    if not found.passed:
        lines.append(
            "Train nothing with this installation, and report it with the version of Cloister."
        )
    elif not found.could_refute:
        lines.append("Audit fewer rounds, whose claim is smaller (--rounds 1), or more patients.")
    lines += [
        "An audit is a lower bound and no proof: it finds faults, never their absence. A low "
        "figure is",
        "no evidence of privacy.",
        "The model was thrown away, nothing left this site, and so the ledger was not charged.",
        "All of this was computed from your patients without noise. Keep it at the site: what is "
        "passed on",
        "is not counted.",
    ]
    return "\n".join(lines)
