"""Canary audit in words, and what it does not show."""

from __future__ import annotations

from dataclasses import asdict

from cloister_fl.client.privacy_audit.canary import CanaryAudit


def as_dict(found: CanaryAudit) -> dict[str, object]:
    """What ``render`` says, ready for JSON."""
    return {**asdict(found), "passed": found.passed}


def render(found: CanaryAudit) -> str:
    """An audit for a terminal."""
    lines = [
        f"claimed          epsilon {found.claimed_epsilon:.3f} at delta {found.delta:g}, "
        f"two rounds at noise multiplier {found.noise_multiplier:g}",
        f"audited          epsilon {found.audited_epsilon:.3f} or more, at confidence "
        f"{found.confidence:.0%}, from {found.draws} draws",
        f"guessed wrongly  {found.false_alarms:.1%} without the canary, {found.misses:.1%} with it",
    ]
    if found.passed:
        lines.append("The claim stands: this attack did not see more than the step may show.")
    else:
        lines.append("THE CLAIM IS REFUTED: the installed step shows more of a patient than it")
        lines.append("claims. Train nothing with it, and report it with the version of Cloister.")
    lines.append("An audit is a lower bound and no proof: it finds faults, never their absence.")
    lines.append(
        "More draws find smaller faults: 600 half of the noise, 10,000 noise 15 % too low."
    )
    return "\n".join(lines)
