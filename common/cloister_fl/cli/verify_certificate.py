"""`cloister verify` of a privacy certificate."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import typer

from cloister_fl.errors import CertificateInvalid, FileUnreadable
from cloister_fl.membership.identity import fingerprint
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.privacy.certificate import Certificate
    from cloister_fl.verify.certificate_check import Checked

_MOST = 1 << 28
"""Bytes of the largest file that is read."""


def is_certificate(path: Path) -> bool:
    """Whether the file begins as a certificate does; an audit log's first line is one object."""
    try:
        return _read(path, most=2) == b"{\n"
    except FileUnreadable:
        return False


def verify_certificate(
    path: Path, *, key: bytes | None, ledger: Path | None, log: Path | None, as_json: bool
) -> None:
    """Check a certificate and say what it means.

    Raises:
        CertificateInvalid: it is refused; says why.
        FileUnreadable, AuditLogDamaged: a file cannot be read, or is no sound log.
    """
    from cloister_fl import audit_log
    from cloister_fl.privacy import certificate
    from cloister_fl.verify import ledger_export
    from cloister_fl.verify.certificate_check import check

    found = certificate.read(_read(path), key=key)
    checked = check(
        found,
        ledger=None if ledger is None else ledger_export.read(_read(ledger)),
        log=None if log is None else tuple(audit_log.read(log)),
    )
    if as_json:
        typer.echo(json.dumps(_as_dict(found, checked)))
    elif not checked.faults:
        typer.echo(_in_words(found, checked, log=log is not None))
    if checked.faults:
        raise CertificateInvalid(
            "The certificate is not valid.",
            why=" ".join(checked.faults),
            remedy=checked.remedy,
        )


def _as_dict(found: Certificate, checked: Checked) -> dict[str, object]:
    return {
        "holds": not checked.faults,
        "faults": list(checked.faults),
        "site": found.site,
        "key": found.key,
        "study": found.study_hash,
        "run": found.run,
        "delta": found.delta,
        "epsilon_run": found.epsilon_run,
        "epsilon_study": found.epsilon_study,
        "accountant": checked.accountant,
        "epsilon_run_recomputed": checked.epsilon_run,
        "epsilon_study_recomputed": checked.epsilon_study,
        "lifetime": checked.lifetime,
        "lifetime_studies_without_support": checked.unsupported,
    }


def _in_words(found: Certificate, checked: Checked, *, log: bool) -> str:
    from cloister_fl.privacy.certificate import code_hash
    from cloister_fl.study.schema import study_from_canonical

    study = study_from_canonical(found.study)
    unfinished = found.steps_started < found.steps_reserved
    same = (
        "the same as installed here" if found.code == code_hash() else "another than installed here"
    )
    lines = [
        f"The certificate of {found.site} is valid: {study.study.name}, run {found.run}",
        f"  signed by    {fingerprint(bytes.fromhex(found.key))}, {found.made}",
        f"  epsilon      {found.epsilon_run:.3f} at delta {found.delta:g}, patient-level; "
        f"{checked.epsilon_run:.3f} by {checked.accountant}",
        f"  steps        {found.steps_started} of {found.steps_reserved}, each patient in a step "
        f"with probability {found.sampling_rate:g}, noise {found.noise_multiplier:g} times the "
        f"clipping norm {found.clipping_norm:g}",
    ]
    if found.release is not None:
        made = "charged" if found.release.charged else "not charged"
        lines.append(
            f"  evaluation   noised, of score histograms, {made}: noise "
            f"{found.release.noise_multiplier:g} times the most that one patient adds; its "
            "epsilon is in the sum"
        )
    if unfinished:
        lines += [
            "               the run has not ended, or lost rounds: more may follow. If it ended",
            "               early, for what it had given, the epsilon to quote is that of the",
            f"               whole study, {study.privacy.epsilon:g}: the proof needs its steps "
            "fixed beforehand",
        ]
    release = found.release
    others = release is not None and release.charged != release.charged_of_study
    if found.steps_of_study != found.steps_started or others:
        lines.append(
            f"  other runs   of this study took part: {found.steps_of_study} steps together, "
            f"epsilon {found.epsilon_study:.3f} ({checked.epsilon_study:.3f})"
        )
    lines += [
        f"  left         {one.count} x {one.message}, {one.bytes:,} bytes" for one in found.left
    ]
    lines.append(f"  code         Cloister {found.version}, {found.code[:16]}, {same}")
    if checked.lifetime is not None:
        lines.append(
            f"  lifetime     epsilon {checked.lifetime:.3f} on this data, by the ledger given"
        )
    if checked.unsupported:
        lines.append(
            f"               which does not hold: the engine of "
            f"{counted(checked.unsupported, 'study', 'studies')} in it does not support the "
            "privacy claim"
        )
    lines += [
        "Promised: what left the site in this study would have been nearly as likely, within these",
        "epsilon and delta, had any one patient, with all images, not been in the site's data.",
        "Not promised: anything about a patient of two of the hospitals (both pay), about other",
        "studies on the same data, or about timing. That the machine ran this code is the site's",
        "word; so is who its patients are, which the certificate does not say.",
    ]
    if not log:
        lines.append(
            "What left the site is not checked: give the site's audit log with --against LOG."
        )
    return "\n".join(lines)


def _read(path: Path, most: int = _MOST) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(most)
    except OSError as error:
        raise FileUnreadable(
            f"{path} cannot be read.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name a file that this user can read.",
        ) from None
