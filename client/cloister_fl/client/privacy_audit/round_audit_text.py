"""Audit of whole rounds in words and as JSON, and what it does not show."""

from __future__ import annotations

from cloister_fl.client.privacy_audit.round_audit import RoundAudit
from cloister_fl.client.privacy_audit.whole_round.evidence import LEVEL, Claim, Finding

_BOUND = (
    "An audit is no proof: it finds faults, never their absence. "
    f"Sound code is accused with a chance of at most {LEVEL:.0%}."
)


def as_dict(found: RoundAudit) -> dict[str, object]:
    """What ``render`` says, ready for JSON."""
    evidence = found.evidence
    return {
        "passed": found.passed,
        "level": LEVEL,
        "tests": sum(evidence.tests.values()),
        "checks": sum(evidence.checks.values()),
        "done": list(found.done),
        "left": list(found.left),
        "claims": [
            {
                "claim": claim.name.lower().replace("_", "-"),
                "says": claim.says,
                "tests": evidence.tests.get(claim, 0),
                "checks": evidence.checks.get(claim, 0),
                "refuted": [
                    {"test": one.test, "p": one.p, "seen": one.detail} for one in _of(found, claim)
                ],
            }
            for claim in Claim
        ],
    }


def render(found: RoundAudit) -> str:
    """An audit for a terminal."""
    evidence, lines = (
        found.evidence,
        ["Asked of made-up sites, by messages, as a coordinator asks:"],
    )
    lines += [f"  {name}" for name in found.done]
    lines.append("")
    for claim in Claim:
        tests, checks = evidence.tests.get(claim, 0), evidence.checks.get(claim, 0)
        refutations = _of(found, claim)
        if refutations:
            lines.append(f"REFUTED     {claim.says}")
            lines += [f"              {_told(one)}" for one in refutations[:5]]
            if len(refutations) > 5:
                lines.append(f"              and {len(refutations) - 5} more")
            lines.append(f"            What it means: {claim.means}")
        elif tests + checks:
            lines.append(f"stands      {claim.says} ({tests} tests, {checks} checks)")
        else:
            lines.append(f"not tested  {claim.says}")
    lines.append("")
    if found.passed:
        lines.append("The claims stand: no test saw more than an update may show.")
    else:
        lines.append("THE CLAIM IS REFUTED: the installed code shows more of a patient than it")
        lines.append("claims. Train nothing with it, and report it with the version of Cloister.")
        if found.left:
            lines.append(f"Not gone through after that: {'; '.join(found.left)}.")
    lines.append(_BOUND)
    return "\n".join(lines)


def _of(found: RoundAudit, claim: Claim) -> list[Finding]:
    return [one for one in found.evidence.findings if one.claim is claim]


def _told(one: Finding) -> str:
    chance = f" (chance from sound code: below {max(one.p, 1e-300):.0e})" if one.p > 0 else ""
    return f"{one.test}{': ' + one.detail if one.detail else ''}{chance}"
