"""Auto-approval rules: a list of study hashes, or trusted signatures.

A rule knows the study and nothing of the data. Whoever proposes a study that a rule approves reads
the answer, and could ask one study after another: an answer by the data would tell what is there,
exactly and without a charge. So nothing is asked of the data, not the policy's least number of
patients of a class either; they are frozen at the first request as far as they can be used, and
a site with none answers with noise, which it is charged for. Whoever wants to know first
looks at them (``cloister client check --study``) before the hash goes on the list.

The rule is asked again whenever the study is: a hash that the steward takes off the list, or a
key that is trusted no more, ends what it approved.
"""

from __future__ import annotations

from cloister_fl.client.site.policy import Policy
from cloister_fl.study.schema import Study
from cloister_fl.study.signatures import signers

LISTED = "listed"
"""Ground of an approval by hash; that of a signed study is the signer's key, 64 digits."""


def ground_of(policy: Policy, study: Study, signatures: bytes) -> str:
    """Say on what ground the policy approves a study by itself; empty where it does not.

    Args:
        policy: the site's.
        study: what is proposed.
        signatures: who vouches for it, see ``study.signatures``.

    Raises:
        MessageInvalid: the signatures are looked at, and do not have the agreed form.
    """
    if policy.approve == "listed" and study.digest in policy.approved_hashes:
        return LISTED
    if policy.approve == "signed":
        for public in signers(study, signatures):
            if public.hex() in policy.trusted_signers:
                return public.hex()
    return ""


def stands(policy: Policy, study: Study, ground: str) -> bool:
    """Whether a ground that approved a study earlier still would; a signature was checked then."""
    if ground == LISTED:
        return policy.approve == "listed" and study.digest in policy.approved_hashes
    return policy.approve == "signed" and ground in policy.trusted_signers


def in_words(ground: str) -> str:
    """A ground for the audit log and the steward."""
    if ground == LISTED:
        return "policy.approved_hashes lists it"
    return f"signed with {ground}, which policy.trusted_signers names"
