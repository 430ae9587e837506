"""Budget statement of a site: spent, reserved, left, and the privacy cost of a proposed study.

Nothing here leaves the site: what its patients have spent in a lifetime is shown here only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from cloister_fl.client.admission import gate
from cloister_fl.client.admission.approvals import judgements
from cloister_fl.client.ledger.ledger import Ledger, Quote, Reservation
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.folder import Site, command_at
from cloister_fl.client.site.policy import refusals
from cloister_fl.encoding.canonical_json import canonical_json
from cloister_fl.encoding.framing import u64
from cloister_fl.errors import OptionInvalid, OutputInTheWay
from cloister_fl.privacy.accounting import epsilon_of
from cloister_fl.privacy.dp_events import compose
from cloister_fl.privacy.renyi_filter import lifetime_epsilon
from cloister_fl.study.cost import charges
from cloister_fl.study.schema import Study
from cloister_fl.system.files import write_atomic
from cloister_fl.system.git_ignore import keep_file_out_of_git
from cloister_fl.system.text import counted

EXPORT_LABEL = "cloister/ledger/export/v3"
EXPORT_FORMAT = 3

LIFETIME_BINDS = (
    "The lifetime's limit is what binds: a study under another name is another study. A lifetime "
    "of 8 is four studies of epsilon 3."
)
"""What a steward should know of the two limits."""


@dataclass(frozen=True)
class StudyAccount:
    """What one study holds of the budget, all its runs together.

    Attributes:
        study: its hash.
        name: its name, where a proposal of it is kept here; else empty.
        delta: the study's.
        steps_started: spent, for good.
        steps_reserved: not started, and still held for it.
        releases: whether a release of score histograms is part of it.
        released: whether that was charged.
        epsilon_spent: of the steps started, at ``delta``, by privacy-loss distribution.
        epsilon_promised: of these and the reserved ones.
        epsilon_planned: of all that was ever reserved for it. It is the study's, also where a
            closing released a part: when a run ends is decided by what it gave, and the proof of a
            study's epsilon needs its steps fixed beforehand.
        rounds_started: rounds of its runs.
        rounds_planned: rounds of all that was ever reserved; 0 where no proposal of it is kept
            here.
        closed: whether it was closed, by the steward or by the policy.
        unsound: why its privacy claim does not hold, where a proposal of it is kept here and its
            engine does not support the claim; else empty.
    """

    study: str
    name: str
    delta: float
    steps_started: int
    steps_reserved: int
    releases: bool
    released: bool
    epsilon_spent: float
    epsilon_promised: float
    epsilon_planned: float
    rounds_started: int
    rounds_planned: int
    closed: bool
    unsound: str = ""

    @property
    def holds(self) -> bool:
        """Whether anything is reserved for it that was not started."""
        return bool(self.steps_reserved or (self.releases and not self.released))


@dataclass(frozen=True)
class Statement:
    """The account of a site's data.

    Attributes:
        site: the site's name.
        lifetime_spent: epsilon of all that was started, at ``lifetime_delta``, by Renyi filter.
        lifetime_promised: epsilon of all that was started or is reserved; the gate counts this.
        lifetime_limit: the policy's.
        lifetime_delta: the ledger's.
        studies: those that hold something, oldest first.
        linked: how many other ledgers' spending counts in the lifetime's.
        continued: whether another ledger counts this one's spending, so that nothing more can be
            reserved here.
        distrusted: why the site refuses every study, for its ledger or audit log is not what was
            noted of it; empty where it is.
    """

    site: str
    lifetime_spent: float
    lifetime_promised: float
    lifetime_limit: float
    lifetime_delta: float
    studies: tuple[StudyAccount, ...]
    linked: int = 0
    continued: bool = False
    distrusted: str = ""

    @property
    def left(self) -> float:
        """Lifetime limit less what is promised, at least 0; epsilons do not add exactly."""
        return max(0.0, self.lifetime_limit - self.lifetime_promised)


@dataclass(frozen=True)
class Proposal:
    """What a run of a study would cost here.

    Attributes:
        study: its hash.
        name: its name.
        delta: the study's.
        noise_multiplier: of each step.
        study_epsilon: of all runs of it here, this one included.
        study_limit: the policy's.
        lifetime_epsilon: of everything, this run included.
        lifetime_limit: the policy's.
        objections: what policy and ledger say against it, in words; empty where it would pass.
    """

    study: str
    name: str
    delta: float
    noise_multiplier: float
    study_epsilon: float
    study_limit: float
    lifetime_epsilon: float
    lifetime_limit: float
    objections: tuple[str, ...]

    @property
    def study_gate(self) -> bool:
        """Whether the study's gate would let it pass."""
        return self.study_epsilon <= self.study_limit

    @property
    def lifetime_gate(self) -> bool:
        """Whether the lifetime's gate would let it pass."""
        return self.lifetime_epsilon <= self.lifetime_limit


def statement(site: Site) -> Statement:
    """Add up the ledger; a site without one has spent nothing.

    Raises:
        LedgerDamaged, PolicyRefused: see ``Ledger.open``.
        FileUnreadable: see ``judgements``.
    """
    policy = site.policy
    if not site.ledger.exists():
        return Statement(site.name, 0.0, 0.0, policy.max_epsilon_lifetime, policy.ledger_delta, ())
    ledger = Ledger.open(site.ledger, delta=policy.ledger_delta)
    known, closed = judgements(site), ledger.closed()
    held = ledger.reservations()
    accounts = []
    for digest in dict.fromkeys(one.study_digest for one in held):
        own = [one for one in held if one.study_digest == digest]
        accounts.append(
            StudyAccount(
                study=digest,
                name=known[digest].study.study.name if digest in known else "",
                delta=own[0].delta,
                steps_started=sum(one.started for one in own),
                steps_reserved=sum(one.left for one in own),
                releases=any(one.release is not None for one in own),
                released=any(one.released for one in own),
                epsilon_spent=ledger.epsilon_study(digest, own[0].delta),
                epsilon_promised=ledger.epsilon_study(digest, own[0].delta, reserved=True),
                epsilon_planned=_planned(ledger, digest, own),
                rounds_started=sum(one.rounds for one in own),
                rounds_planned=known[digest].study.training.rounds * len(own)
                if digest in known
                else 0,
                closed=digest in closed,
                unsound=known[digest].study.unsound_engine if digest in known else "",
            )
        )
    return Statement(
        site.name,
        ledger.epsilon_lifetime(),
        ledger.epsilon_lifetime(reserved=True),
        policy.max_epsilon_lifetime,
        policy.ledger_delta,
        tuple(accounts),
        len(ledger.linked()),
        bool(ledger.continued()),
    )


def _planned(ledger: Ledger, study: str, own: Sequence[Reservation]) -> float:
    """Epsilon of all that was ever reserved for a study here, at its delta."""
    given_up = compose(*(one.given_up for one in own))
    return epsilon_of(compose(ledger.spent(study, reserved=True), given_up), own[0].delta)


def judged_statement(site: Site) -> Statement:
    """``statement``, and whether the site trusts its ledger; this reads all of ledger and log."""
    error = gate.distrusted(site)
    told = statement(site)
    return told if error is None else replace(told, distrusted=f"{error.what} {error.why}")


def proposal(site: Site, study: Study) -> Proposal:
    """What a run of ``study`` would cost, and what would stand against it; nothing is reserved.

    Raises:
        OptionInvalid: the study trains without privacy, so that it has no cost.
        EpsilonUnreachable: no noise gives the study's epsilon.
        LedgerDamaged, PolicyRefused: see ``Ledger.open``.
    """
    if not study.privacy.enabled:
        raise OptionInvalid(
            "The study trains without differential privacy, so it has no cost in epsilon.",
            remedy=f"See what it asks for: {site.command('review STUDY')}",
        )
    policy, used = site.policy, charges(study)
    delta = used.delta
    if site.ledger.exists():
        ledger = Ledger.open(site.ledger, delta=policy.ledger_delta)
        quote = ledger.quote(study.digest, used.step, used.steps, delta, release=used.release)
    else:
        asked = used.composition()
        quote = Quote(epsilon_of(asked, delta), lifetime_epsilon(asked, policy.ledger_delta))
    short = gate.shortfall(site, study)
    invited = max(policy.min_sites, study.aggregation.min_sites)
    against = [*refusals(policy, study, invited), *([f"{short.what} {short.why}"] if short else [])]
    return Proposal(
        study=study.digest,
        name=study.study.name,
        delta=delta,
        noise_multiplier=used.step.noise_multiplier,
        study_epsilon=quote.study,
        study_limit=policy.max_epsilon_study,
        lifetime_epsilon=quote.lifetime,
        lifetime_limit=policy.max_epsilon_lifetime,
        objections=tuple(against),
    )


def line(study: float | None, lifetime: float, limit: float) -> str:
    """The two epsilons beside each other, always in these words; without a study the second."""
    account = f"lifetime on this data: {lifetime:.2f} of {limit:g}"
    if study is None:
        return f"patient-level, {account}"
    return f"patient-level, this study: {study:.2f}; {account}"


def study_promised(site: Site, study: Study) -> float:
    """Epsilon that all runs of one study here have reserved or spent, at the study's delta."""
    if not site.ledger.exists():
        return 0.0
    ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
    return ledger.epsilon_study(study.digest, study.privacy.delta, reserved=True)


def summary(site: Site) -> str:
    """``line`` for the study that reserved last; for none, the lifetime alone.

    Raises:
        LedgerDamaged, PolicyRefused, FileUnreadable: see ``statement``.
    """
    told = statement(site)
    if not told.studies:
        return f"patient-level, lifetime on this data: 0 of {told.lifetime_limit:g}"
    last = told.studies[-1].epsilon_planned
    return line(last, told.lifetime_promised, told.lifetime_limit)


def render(told: Statement, root: Path | None = None) -> str:
    """The account of the site at ``root`` in words, for a terminal."""
    lines = [
        f"Site {told.site}: privacy budget, patient-level (add or remove one patient)",
        f"  lifetime on this data  epsilon {told.lifetime_promised:.2f} of "
        f"{told.lifetime_limit:g} at delta {told.lifetime_delta:g}; {told.left:.2f} left",
        "                         by an account for all studies together: those of single",
        "                         studies are not to be added",
        f"  of this, spent         epsilon {told.lifetime_spent:.2f}; the rest is reserved",
        f"  {LIFETIME_BINDS}",
    ]
    if told.linked:
        lines.append(
            f"  {counted(told.linked, 'other ledger')} of the same patients counted as spent"
        )
    if told.distrusted:
        lines.append(f"  refused: {told.distrusted}")
    if told.continued:
        lines.append("  continued in another site folder: nothing more can be reserved here")
    for one in told.studies:
        state = ", closed" if one.closed else ""
        of_all = f" of {one.rounds_planned}" if one.rounds_planned else ""
        lines += [
            f"{one.name or 'study'} {one.study[:16]}{state}",
            f"  planned {one.epsilon_planned:.2f}; {one.rounds_started}{of_all} rounds started",
            f"  {line(one.epsilon_planned, told.lifetime_promised, told.lifetime_limit)}",
            f"  spent     epsilon {one.epsilon_spent:.2f} at delta {one.delta:g}, "
            f"{counted(one.steps_started, 'step')}",
            f"  reserved  {counted(one.steps_reserved, 'step')}, not started",
        ]
        if one.unsound:
            lines.append(f"  remark    these epsilons do not hold: {one.unsound}")
        if one.releases:
            made = "done" if one.released else "not done"
            lines.append(f"  noised evaluation: {made}")
        if one.holds and not one.closed:
            lines.append("  " + _release_command(root, one.study))
    if not told.studies:
        lines.append("No study has a reservation at this site.")
    return "\n".join(lines)


def left_reserved(site: Site) -> tuple[str, ...]:
    """What the study that reserved last still holds, and how it is released; words for a person.

    Empty where nothing is held. A run that has ended keeps what it did not start: whether another
    run of the study comes is for people to know.

    Raises:
        LedgerDamaged, PolicyRefused, FileUnreadable: see ``statement``.
    """
    studies = statement(site).studies
    if not studies or studies[-1].closed or not studies[-1].holds:
        return ()
    last = studies[-1]
    return (
        f"{last.name or 'study'} {last.study[:16]}: {counted(last.steps_reserved, 'step')} "
        "reserved and not started"
        + (", and a noised evaluation" if last.releases and not last.released else ""),
        _release_command(site.root, last.study),
    )


def _release_command(root: Path | None, study: str) -> str:
    close = command_at(root, f"budget close {study[:16]}")
    return f"once no run of it is to come, release what is not started: {close}"


def render_proposal(told: Proposal) -> str:
    """What a study would cost, in words."""

    def passes(yes: bool) -> str:
        return "passes" if yes else "exceeded"

    lines = [
        f"If it ran now: {told.name} {told.study[:16]}, noise multiplier "
        f"{told.noise_multiplier:.4g}",
        f"  {line(told.study_epsilon, told.lifetime_epsilon, told.lifetime_limit)}",
        f"  study gate     {passes(told.study_gate)}: {told.study_epsilon:.2f} of "
        f"{told.study_limit:g} at delta {told.delta:g}",
        f"  lifetime gate  {passes(told.lifetime_gate)}: {told.lifetime_epsilon:.2f} of "
        f"{told.lifetime_limit:g}",
    ]
    lines += [f"  refused        {sentence}" for sentence in told.objections]
    return "\n".join(lines)


def as_dict(told: Statement, asked: Proposal | None) -> dict[str, object]:
    """What both ``render`` say, ready for JSON."""
    held: dict[str, object] = {**asdict(told), "lifetime_left": told.left}
    if asked is not None:
        gates = {"study_gate": asked.study_gate, "lifetime_gate": asked.lifetime_gate}
        held["proposal"] = {**asdict(asked), **gates}
    return held


def export(site: Site, out: Path) -> int:
    """Write the ledger's entries to a file, one a line, and a last line that signs its head.

    Each line holds ``body``, ``previous`` and ``hash``; the hash is that of ``ledger.chain``, so
    that whoever has the file can check the chain. The last line also names the studies whose
    engine does not support their privacy claim, as far as the site keeps their proposals. Its
    signature, by the site's identity, is over the label, the site's name, the number and hash of
    the last entry, the SHA-256 of all lines before it, and these studies.

    Returns:
        The number of entries.

    Raises:
        OptionInvalid: there is no ledger.
        OutputInTheWay: ``out`` exists, or cannot be written or kept out of git.
        LedgerDamaged, PolicyRefused: see ``Ledger.open``.
    """
    if not site.ledger.exists():
        raise OptionInvalid(
            "The site has no ledger yet.",
            why="Nothing was reserved at this site.",
            remedy=f"See the budget: {site.command('budget')}",
        )
    if out.exists():
        raise OutputInTheWay(f"{out} exists already.", remedy="Name another file: --out FILE")
    keep_file_out_of_git(out)
    entries = Ledger.open(site.ledger, delta=site.policy.ledger_delta).entries()
    lines = [_line({"body": e.body, "previous": e.previous, "hash": e.hash}) for e in entries]
    content, last, identity = b"".join(lines), entries[-1], site.identity()
    digest = hashlib.sha256(content).digest()
    unsupported = sorted(one.study for one in statement(site).studies if one.unsound)
    named = "".join(unsupported).encode()
    fields = (site.name.encode(), u64(last.seq), last.hash.encode(), digest, named)
    signature = identity.sign(EXPORT_LABEL, *fields)
    head = {"seq": last.seq, "hash": last.hash}
    signed = {"format": EXPORT_FORMAT, "site": site.name, "head": head}
    signed |= {"unsupported": unsupported}
    signed |= {"key": identity.public.hex(), "signature": signature.hex()}
    write_atomic(out, content + _line(signed))
    return len(entries)


def close(site: Site, digest: str) -> int:
    """Close a study at this site, in the ledger and the audit log; see ``Ledger.close``.

    Raises:
        LedgerDamaged, PolicyRefused: see ``Ledger.close``.
        AuditLogDamaged: the log cannot be written.
    """
    session = SiteSession(site)
    released = session.ledger.close(digest, session.identity)
    session.log.append("closed", study=digest, released=released, by="steward")
    session.note()
    return released


def find(site: Site, prefix: str) -> str:
    """The hash of the study in the ledger that begins with ``prefix``, at least 8 digits.

    Raises:
        OptionInvalid: there is none, or more than one.
    """
    found = [one.study for one in statement(site).studies if one.study.startswith(prefix.lower())]
    if len(prefix) < 8 or len(found) != 1:
        raise OptionInvalid(
            f"{prefix!r} matches {'more than one study' if len(found) > 1 else 'no study'} with a "
            "reservation in the ledger.",
            remedy=f"Give at least 8 digits of a listed hash: {site.command('budget')}",
        )
    return found[0]


def _line(held: dict[str, object]) -> bytes:
    return canonical_json(held).encode() + b"\n"
