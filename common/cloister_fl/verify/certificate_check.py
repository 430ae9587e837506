"""Check of a certificate against accountants, the ledger and the audit log; offline.

Epsilon is computed anew by another accountant than the one that wrote it: Opacus' PRV accountant
(Gopi, Lee, Wutschitz 2021; error at most 0.01) where it is installed, else by the same one on the
reader's machine. A lifetime's Renyi filter is computed anew by Opacus' implementation.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

from cloister_fl.audit_log import Entry
from cloister_fl.errors import StudyInvalid
from cloister_fl.privacy.accounting import (
    NOISE_DIGITS,
    epsilon_of,
    epsilon_prv_of,
    epsilon_rdp_of,
)
from cloister_fl.privacy.certificate import Certificate
from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
from cloister_fl.privacy.renyi_filter import lifetime_epsilon
from cloister_fl.study.cost import sensitivity
from cloister_fl.study.gradient_engines import REMEDY
from cloister_fl.study.schema import Study, study_from_canonical
from cloister_fl.system.libraries.imports import undisturbed_imports
from cloister_fl.verify.ledger_export import LedgerExport, Spent

TOLERANCE = 0.02
"""How far two accountants of one study may lie apart."""
LIFETIME_TOLERANCE = 1e-6
ASK_AGAIN = (
    "Ask the site for a new copy of the file; if it has the same fault, ask for an explanation."
)
NO_CLAIM = (
    "A new copy of the file would say the same. Do not rely on the run's epsilon, and tell the "
    f"site's data steward and the coordinator. For another run, in a new study: {REMEDY}"
)
_MEANINGLESS = 40.0
"""Above this epsilon, by Renyi accounting, nothing is recomputed: it promises nothing."""


@dataclass(frozen=True)
class Checked:
    """What was found.

    Attributes:
        faults: what does not hold, a sentence each; empty where all does.
        accountant: which one recomputed epsilon.
        epsilon_run, epsilon_study: what it found.
        lifetime: the lifetime's epsilon by the filter, where a ledger was given.
        remedy: what the reader can do about the faults; empty where there are none.
        unsupported: how many studies of the ledger that was given have an engine that does not
            support their privacy claim, so that the lifetime's epsilon does not hold.
    """

    faults: tuple[str, ...]
    accountant: str
    epsilon_run: float
    epsilon_study: float
    lifetime: float | None = None
    remedy: str = ""
    unsupported: int = 0


def check(
    certificate: Certificate,
    *,
    ledger: LedgerExport | None = None,
    log: Iterable[Entry] | None = None,
) -> Checked:
    """Find what in a certificate does not hold; its signature was checked when it was read.

    Args:
        certificate: see ``certificate.read``.
        ledger: the site's export, at least as new as the certificate.
        log: the site's audit log, entries in order; see ``audit_log.read``.
    """
    faults = list(_constants(certificate))
    release = certificate.release
    in_run, in_study = (
        (False, False) if release is None else (release.charged, release.charged_of_study)
    )
    run, accountant = _epsilon(certificate, certificate.steps_started, released=in_run)
    study, _ = _epsilon(certificate, certificate.steps_of_study, released=in_study)
    for what, claimed, found in (
        ("this run", certificate.epsilon_run, run),
        ("the study", certificate.epsilon_study, study),
    ):
        if not abs(claimed - found) <= TOLERANCE:
            faults.append(
                f"Epsilon of {what} is {claimed:.4f} in the certificate and {found:.4f} by "
                f"{accountant}."
            )
    lifetime = None
    if ledger is not None:
        told = list(_against_ledger(certificate, ledger))
        faults += told
        if not told:
            lifetime, fault = _lifetime(ledger)
            faults += fault
    if log is not None:
        faults += _against_log(certificate, log, ledger)
    remedy = ""
    if faults:
        # The file may be whole and the site honest: what was trained has no such privacy.
        remedy = NO_CLAIM if _claims_nothing(certificate) else ASK_AGAIN
    unsupported = 0 if ledger is None else len(ledger.unsupported)
    return Checked(tuple(faults), accountant, run, study, lifetime, remedy, unsupported)


def _claims_nothing(certificate: Certificate) -> bool:
    """Whether the study that was trained, and not the file, is why the certificate is refused."""
    try:
        return bool(study_from_canonical(certificate.study).unsound_engine)
    except StudyInvalid:
        return False


def _constants(certificate: Certificate) -> Iterator[str]:
    try:
        study = study_from_canonical(certificate.study)
    except StudyInvalid:
        yield "The study in it is not valid."
        return
    if study.digest != certificate.study_hash:
        yield "The study does not match its hash."
    if not study.privacy.enabled:
        yield "The study trains without privacy."
    unsound = study.unsound_engine
    if unsound:
        yield f"The privacy claim of the study does not hold. {unsound}"
    for name, held, wanted in (
        ("sampling rate", certificate.sampling_rate, study.training.sampling_rate),
        ("clipping norm", certificate.clipping_norm, study.privacy.clipping_norm),
        ("delta", certificate.delta, study.privacy.delta),
        ("number of steps reserved", certificate.steps_reserved, study.training.total_steps),
    ):
        if held != wanted:
            yield f"The {name} is {held:g} in the certificate and {wanted:g} in the study."
    if certificate.steps_started > certificate.steps_reserved:
        yield "More steps were started than reserved."
    if certificate.steps_of_study < certificate.steps_started:
        yield "All runs of the study together started fewer steps than this one."
    yield from _release(certificate, study)
    yield from _noise(certificate, study)


def _noise(certificate: Certificate, study: Study) -> Iterator[str]:
    """The noise is the least that keeps all steps within the study's epsilon: another one was not
    the study's, and with more the file could claim any epsilon above 0."""
    spent = _spent(certificate, study.training.total_steps, released=True)
    if not study.privacy.enabled or spent is None:
        return
    with _quiet():
        whole = _bounded(spent, certificate.delta, epsilon_of)
    asked = study.privacy.epsilon
    # One unit of the last of the noise's decimals, ten times over.
    room = TOLERANCE + asked * 10.0**-NOISE_DIGITS * 10 / certificate.noise_multiplier
    if not abs(whole - asked) <= room:
        yield (
            f"With the noise in the certificate all steps of the study cost epsilon {whole:.4f}; "
            f"the study asks for {asked:g}."
        )


def _release(certificate: Certificate, study: Study) -> Iterator[str]:
    release = certificate.release
    if (release is not None) != study.releases:
        yield "The noised evaluation is in only one of certificate and study."
    if release is None or not study.releases:
        return
    if release.sensitivity != sensitivity(study):
        yield (
            f"The noised evaluation's sensitivity is {release.sensitivity} in the certificate and "
            f"{sensitivity(study)} in the study."
        )
    if release.charged and not release.charged_of_study:
        yield "This run charged a noised evaluation, and all runs of the study together none."
    alone, _ = _epsilon(certificate, 0, released=True)
    if not abs(alone - study.evaluation.release_epsilon) <= TOLERANCE:
        yield (
            f"The noised evaluation costs epsilon {alone:.4f}; the study reserves "
            f"{study.evaluation.release_epsilon:g}."
        )


def _epsilon(certificate: Certificate, steps: int, *, released: bool) -> tuple[float, str]:
    spent, delta = _spent(certificate, steps, released=released), certificate.delta
    if spent is None:
        return math.inf, "any accountant"
    with _quiet():
        try:
            found, name = _bounded(spent, delta, epsilon_prv_of), "PRV (Opacus)"
        except ImportError:
            found, name = _bounded(spent, delta, epsilon_of), "PLD"
    return found, name if math.isfinite(found) else "any accountant (above 40 none is asked)"


def _spent(certificate: Certificate, steps: int, *, released: bool) -> Composition | None:
    """So many steps of a certificate, and its noised evaluation; None where it states no such."""
    release = certificate.release
    try:
        step = Mechanism(certificate.noise_multiplier, certificate.sampling_rate)
        spent = compose(((step, steps),))
        if release is not None and released:
            spent = compose(spent, ((Mechanism(release.noise_multiplier, 1.0), 1),))
    except ValueError:
        return None
    return spent if 0 < certificate.delta < 1 else None


def _bounded(
    spent: Composition, delta: float, epsilon: Callable[[Composition, float], float]
) -> float:
    """Epsilon by an accountant, or infinity: a hostile file could name so little noise that its
    grid fills the memory."""
    return epsilon(spent, delta) if epsilon_rdp_of(spent, delta) <= _MEANINGLESS else math.inf


def _against_ledger(certificate: Certificate, ledger: LedgerExport) -> Iterator[str]:
    if ledger.key != certificate.key:
        yield "The ledger belongs to another site."
        return
    if certificate.ledger not in ledger.hashes:
        yield "The ledger has no entry with the hash in the certificate."
        return
    seq = ledger.hashes.index(certificate.ledger) + 1
    spent = [one for one in ledger.spent(seq) if one.study == certificate.study_hash]
    run = sum(one.started for one in spent if one.run == certificate.run)
    linked = dict(ledger.linked(seq, study=certificate.study_hash))
    wanted = (certificate.noise_multiplier, certificate.sampling_rate)
    study = sum(one.started for one in spent) + sum(
        steps
        for one, steps in linked.items()
        if (one.noise_multiplier, one.sampling_rate) == wanted
    )
    if run != certificate.steps_started:
        yield f"The ledger counts {run} steps of this run, not {certificate.steps_started}."
    if study != certificate.steps_of_study:
        yield f"The ledger counts {study} steps of the study, not {certificate.steps_of_study}."
    for one in spent:
        held = (one.mechanism.noise_multiplier, one.mechanism.sampling_rate)
        if held != wanted:
            yield f"The ledger states noise {held[0]:g} at rate {held[1]:g} for run {one.run}."
    yield from _release_in_ledger(certificate, spent, linked)


def _release_in_ledger(
    certificate: Certificate, spent: Iterable[Spent], linked: Mapping[Mechanism, int]
) -> Iterator[str]:
    release = certificate.release
    elsewhere = release is not None and any(
        (one.noise_multiplier, one.sampling_rate) == (release.noise_multiplier, 1.0)
        for one in linked
    )
    charged = {one.run: one.release for one in spent if one.release is not None}
    for what, held, told in (
        ("this run", certificate.run in charged, release is not None and release.charged),
        ("the study", bool(charged) or elsewhere, release is not None and release.charged_of_study),
    ):
        if held != told:
            has, says = ("a", "none") if held else ("no", "one")
            yield (
                f"The ledger charged {has} noised evaluation of {what}; "
                f"the certificate says {says}."
            )
    if release is None:
        return
    for run, mechanism in charged.items():
        if mechanism.noise_multiplier != release.noise_multiplier:
            yield (
                f"The ledger states noise {mechanism.noise_multiplier:g} for the noised evaluation "
                f"of run {run}."
            )


def _lifetime(ledger: LedgerExport) -> tuple[float, list[str]]:
    """The filter's epsilon, by two implementations where Opacus is installed."""
    spent = ledger.composition()
    with _quiet():
        value = lifetime_epsilon(spent, ledger.delta, orders=ledger.orders)
        try:
            other = _opacus_lifetime(spent, ledger.delta, ledger.orders)
        except ImportError:
            return value, []
    if math.isfinite(value) and not abs(value - other) <= LIFETIME_TOLERANCE:
        return value, [f"The lifetime's epsilon is {value:.7f}, and {other:.7f} by Opacus' RDP."]
    return value, []


def _opacus_lifetime(spent: Composition, delta: float, orders: tuple[float, ...]) -> float:
    with undisturbed_imports():
        from opacus.accountants.analysis import rdp

    if not spent:
        return 0.0
    total = sum(
        rdp.compute_rdp(
            q=mechanism.sampling_rate,
            noise_multiplier=mechanism.noise_multiplier,
            steps=steps,
            orders=list(orders),
        )
        for mechanism, steps in spent
    )
    # The ledger's delta is split evenly over the orders (privacy.renyi_filter).
    found, _ = rdp.get_privacy_spent(orders=list(orders), rdp=total, delta=delta / len(orders))
    return max(0.0, float(found))


def _against_log(
    certificate: Certificate, log: Iterable[Entry], ledger: LedgerExport | None
) -> Iterator[str]:
    counts: Counter[str] = Counter()
    sizes: Counter[str] = Counter()
    noted: list[tuple[object, object]] = []
    # A log is never empty where something was charged: each charge is noted in it.
    found = False
    for entry in log:
        if found:
            break
        found = entry.hash == certificate.log
        if entry.kind == "ledger":
            noted.append((entry.body.get("ledger_seq"), entry.body.get("ledger_hash")))
        if entry.kind == "sent" and entry.body.get("run") == certificate.run:
            kind = str(entry.body.get("message"))
            counts[kind] += 1
            size = entry.body.get("bytes")
            sizes[kind] += size if isinstance(size, int) else 0
    if not found:
        yield "The audit log has no entry with the hash in the certificate."
    told = [(left.message, left.count, left.bytes) for left in certificate.left]
    if told != [(kind, counts[kind], sizes[kind]) for kind in sorted(counts)]:
        yield "The messages of this run in the audit log differ from those in the certificate."
    if ledger is not None and certificate.ledger in ledger.hashes:
        yield from _of_one_time(certificate, ledger, noted)


def _of_one_time(
    certificate: Certificate, ledger: LedgerExport, noted: Iterable[tuple[object, object]]
) -> Iterator[str]:
    """What left must be told up to when the steps are: an older end of the log knows of less."""
    numbers = {digest: seq for seq, digest in enumerate(ledger.hashes, start=1)}
    known = {(seq, digest) for digest, seq in numbers.items()}
    newest = max(
        (numbers[str(digest)] for seq, digest in noted if (seq, digest) in known), default=0
    )
    later = sum(
        body["kind"] in {"started", "evaluated"}
        and (body["study"], body["run"]) == (certificate.study_hash, certificate.run)
        for body in ledger.bodies[newest : numbers[certificate.ledger]]
    )
    # A kill between a charge and its note leaves one that is not noted.
    if later > 1:
        yield (
            f"The audit log up to the entry in the certificate is older than {later} charges of "
            "this run in the ledger."
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """Accountants remark on orders and grids; none of it is about the result."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
