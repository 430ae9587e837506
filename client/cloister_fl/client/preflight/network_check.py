"""Network checks: the connection to the coordinator, step by step, from one roster request.

Nothing is asked that a node would not ask, over the connection that a node would take.
"""

from __future__ import annotations

import re
import ssl
import time
from collections.abc import Sequence
from email.utils import parsedate_to_datetime

from cloister_fl.client.network import join, node_keys
from cloister_fl.client.network.http import Answer, Cause, Failure, Step, dial
from cloister_fl.client.network.http_errors import error_of
from cloister_fl.client.network.join import Membership
from cloister_fl.client.network.node_keys import CERTIFICATE
from cloister_fl.client.network.proxy import proxy_of
from cloister_fl.client.preflight.findings import Check, Finding, State, failed, found, skipped
from cloister_fl.client.site import trusted_roster
from cloister_fl.client.site.folder import Site
from cloister_fl.errors import (
    ClockOrDates,
    CloisterError,
    RosterMismatch,
    VersionsDiffer,
)
from cloister_fl.membership.enrolment import HEADER_PROTOCOL, HEADER_VERSION, PATH_ROSTER
from cloister_fl.membership.validity import AUTHORITY_DAYS, RENEW_DAYS, Validity
from cloister_fl.system.utc import to_minute
from cloister_fl.version import PROTOCOL, __version__

AHEAD_WARN_S, AHEAD_FAIL_S = 2.0, 5.0
BEHIND_WARN_S, BEHIND_FAIL_S = 60.0, 300.0
"""Seconds of clock skew. Flower takes a node's signed time stamp from 5 s in the future
(``SYSTEM_TIME_TOLERANCE``) to 305 s in the past, so a fast clock is refused long before a slow
one."""
_DATE_S = 2.0
"""The ``Date`` header is cut to whole seconds, and uvicorn renews it once a second."""

_ON_THE_WAY = (Check.NAME, Check.PROXY, Check.CONNECTION, Check.TLS)
_ASKED = (Check.ADMISSION, Check.CLOCK, Check.VERSION)
_STEP = {
    Step.NAME: Check.NAME,
    Step.CONNECT: Check.CONNECTION,
    Step.PROXY: Check.PROXY,
    Step.TLS: Check.TLS,
    Step.ANSWER: Check.ADMISSION,
}


def network(site: Site, *, offline: bool = False) -> list[Finding]:
    """Findings 1 to 10; with ``offline`` nothing is dialled."""
    if not (site.root / join.MEMBERSHIP).exists():
        remedy = "When the coordinator has sent an invite, run: "
        remedy += site.command("join INVITE-FILE")
        missing = found(
            Check.FEDERATION, State.WARN, "This site has not joined a federation.", remedy
        )
        rest = (*_ON_THE_WAY, Check.CERTIFICATE, *_ASKED, Check.ROSTER)
        return [missing, *skipped(rest, "Not joined.")]
    try:
        member = join.membership(site)
    except CloisterError as error:
        rest = (*_ON_THE_WAY, Check.CERTIFICATE, *_ASKED, Check.ROSTER)
        return [failed(Check.FEDERATION, error), *skipped(rest, _not_checked(Check.FEDERATION))]
    joined = found(Check.FEDERATION, State.OK, f"Joined at {member.fleet} as {member.site}.")
    own = certificate(site)
    if offline:
        way = skipped((*_ON_THE_WAY, *_ASKED), "Not checked: --offline.")
        reached = None
    else:
        way, reached = _dialled(site, member, own)
    findings = [joined, own, *way, roster(site, member, reached)]
    return sorted(findings, key=lambda finding: finding.number)


def _dialled(
    site: Site, member: Membership, own: Finding
) -> tuple[list[Finding], Answer | Failure | None]:
    """Ask for the roster as this site, or, without a certificate, only as far as TLS."""
    bare = own.state is State.WARN and not (site.keys / CERTIFICATE).exists()
    try:
        context = join.pinned_context(site) if bare else join.client_context(site)
    except (CloisterError, ssl.SSLError) as error:
        fault = error if isinstance(error, CloisterError) else node_keys.damaged()
        rest = (*_ON_THE_WAY[:-1], *_ASKED)
        return [failed(Check.TLS, fault), *skipped(rest, _not_checked(Check.TLS))], None
    try:
        proxy = proxy_of(site)
    except CloisterError as error:
        rest = (Check.NAME, Check.CONNECTION, Check.TLS, *_ASKED)
        return [failed(Check.PROXY, error), *skipped(rest, _not_checked(Check.PROXY))], None
    reached = dial(context, "GET", member.fleet, PATH_ROSTER, proxy=proxy)
    if bare and isinstance(reached, Failure) and reached.step is Step.ANSWER:
        # The coordinator hangs up on who shows no certificate, after TLS; so the way is open.
        way = _passed(member.fleet, reached.via, _ON_THE_WAY)
        return [*way, *skipped(_ASKED, "This site has no certificate yet.")], None
    return judge(member, reached, site), reached


def judge(member: Membership, reached: Answer | Failure, site: Site | None = None) -> list[Finding]:
    """Return the findings of one request: how far it came, and what was answered.

    Args:
        member: the site's membership.
        reached: the answer or the failure.
        site: goes into the commands of remedies.
    """
    if isinstance(reached, Failure):
        by_proxy = reached.via and reached.step <= Step.PROXY
        at = Check.PROXY if by_proxy else _STEP[reached.step]
        if reached.cause is Cause.BEYOND_PROXY:
            at = Check.CONNECTION
        before = [check for check in _ON_THE_WAY if check < at]
        after = [check for check in (*_ON_THE_WAY, *_ASKED) if check > at]
        return [
            *_passed(member.fleet, reached.via, before, reached.cause),
            failed(at, error_of(reached, site)),
            *skipped(after, _not_checked(at)),
        ]
    way = _passed(member.fleet, reached.via, _ON_THE_WAY)
    tick = clock(member.fleet, reached.headers.get("date", ""), reached.sent, reached.received)
    try:
        join.check_status(reached)
    except CloisterError as error:
        refused = failed(Check.ADMISSION, error)
        return [*way, refused, tick, *skipped([Check.VERSION], _not_checked(Check.ADMISSION))]
    admitted = found(Check.ADMISSION, State.OK, "The coordinator answers this site.")
    versions = (reached.headers.get(name, "") for name in (HEADER_PROTOCOL, HEADER_VERSION))
    return [*way, admitted, tick, version(*versions)]


def _passed(
    address: str, via: str, checks: Sequence[Check], cause: Cause | None = None
) -> list[Finding]:
    """Steps that went well."""
    words = {
        Check.NAME: f"{via}, the proxy, resolves it." if via else f"{address} can be resolved.",
        Check.PROXY: f"{via} opens the connection." if via else "None; the connection is direct.",
        Check.CONNECTION: f"{address} accepts connections.",
        Check.TLS: f"TLS 1.3, and {address} has the pinned authority's certificate.",
    }
    if cause is Cause.PROXY_SETTING:
        words[Check.NAME] = "The proxy resolves it."
    return [found(check, State.OK, words[check]) for check in checks]


def certificate(site: Site) -> Finding:
    """Judge the dates of the site's own certificate, and of the coordinator's authority."""
    try:
        own, authority = node_keys.own_validity(site), node_keys.authority_validity(site)
    except CloisterError as error:
        return failed(Check.CERTIFICATE, error)
    if own is None:
        return found(
            Check.CERTIFICATE,
            State.WARN,
            "The coordinator has not approved this site yet.",
            f"Wait for it: {site.command('start')}. Or ask once: {site.command('join')}",
        )
    judged = dates(own, time.time(), site)
    if judged.state is State.OK and authority is not None:
        return authority_dates(authority, time.time()) or judged
    return judged


def dates(own: Validity, now: float, site: Site | None = None) -> Finding:
    """Judge a certificate of the site by its dates.

    Args:
        own: its dates.
        now: Unix time in seconds.
        site: goes into the command of the remedy.
    """
    remedy = node_keys.renewal_remedy(own, site, now)
    if own.is_early(now):
        early = ClockOrDates(
            f"This site's certificate is valid from {to_minute(own.begins)} UTC, which is not yet.",
            remedy="Set this machine's clock; it is wrong.",
        )
        return failed(Check.CERTIFICATE, early)
    days = own.days_left(now)
    if days <= 0:
        late = ClockOrDates(f"This site's certificate {own.told(now)}.", remedy=remedy)
        return failed(Check.CERTIFICATE, late)
    if days < RENEW_DAYS:
        return found(
            Check.CERTIFICATE, State.WARN, f"This site's certificate {own.told(now)}.", remedy
        )
    what = f"This site's certificate is valid until {own.until}, for {int(days)} more days."
    return found(Check.CERTIFICATE, State.OK, what)


def authority_dates(authority: Validity, now: float) -> Finding | None:
    """A warning of the end of the coordinator's authority; None while it is far."""
    if authority.days_left(now) >= AUTHORITY_DAYS:
        return None
    return found(
        Check.CERTIFICATE,
        State.WARN,
        f"The coordinator's authority {authority.told(now)}, and with it all certificates.",
        "Ask the coordinator when it is replaced.",
    )


def clock(address: str, date: str, sent: float, received: float) -> Finding:
    """Compare the clocks by the answer's ``Date``.

    Args:
        address: of the coordinator.
        date: the header; empty where there was none.
        sent: Unix time in seconds before the request, by this machine's clock.
        received: the same after the answer's head.
    """
    try:
        theirs = parsedate_to_datetime(date).timestamp()
    except (ValueError, TypeError, OverflowError):
        return found(Check.CLOCK, State.WARN, f"The answer of {address} has no date.")
    # The true skew lies between these two.
    ahead, behind = sent - theirs - _DATE_S, theirs - received
    remedy = "Set the clock, and keep it set with NTP or chrony."
    if ahead > AHEAD_WARN_S:
        what = f"This machine's clock is ahead of {address} by {_span(ahead, -behind)} s."
        why = f"The coordinator refuses a node whose clock is {AHEAD_FAIL_S:.0f} s ahead."
        if ahead > AHEAD_FAIL_S:
            return failed(Check.CLOCK, ClockOrDates(what, why=why, remedy=remedy))
        return found(Check.CLOCK, State.WARN, f"{what} {why}", remedy)
    if behind > BEHIND_WARN_S:
        what = f"This machine's clock is behind {address} by {_span(behind, -ahead)} s."
        why = "The coordinator refuses a node whose clock is 5 minutes behind."
        if behind > BEHIND_FAIL_S:
            return failed(Check.CLOCK, ClockOrDates(what, why=why, remedy=remedy))
        return found(Check.CLOCK, State.WARN, f"{what} {why}", remedy)
    return found(Check.CLOCK, State.OK, f"It agrees with the clock of {address}.")


def version(protocol: str, wheel: str) -> Finding:
    """Compare what the coordinator says of itself with what is installed here."""
    theirs = wheel if re.fullmatch(r"[0-9A-Za-z.+-]{1,40}", wheel) else "(unknown version)"
    if not re.fullmatch(r"[0-9]{1,6}", protocol):
        return found(
            Check.VERSION,
            State.WARN,
            "The coordinator does not report its version; it is older than this site's.",
            "Ask the coordinator which version it runs.",
        )
    if int(protocol) != PROTOCOL:
        error = VersionsDiffer(
            f"The coordinator has protocol version {int(protocol)}, and this site {PROTOCOL}.",
            remedy=f"It runs Cloister {theirs}, and this site {__version__}: install the same.",
        )
        return failed(Check.VERSION, error)
    if wheel != __version__:
        # The bundle of a run names the version, and the executor refuses every other (CLO-505).
        other = VersionsDiffer(
            f"The coordinator runs Cloister {theirs}, and this site {__version__}.",
            why="A site refuses the runs of another version.",
            remedy="Install the same on both sides.",
        )
        return failed(Check.VERSION, other)
    return found(Check.VERSION, State.OK, f"Cloister {__version__} on both sides.")


def roster(site: Site, member: Membership, reached: Answer | Failure | None) -> Finding:
    """Whether the steward accepted a roster, and whether it is the one offered now."""
    accept = f"Compare it with the other sites and accept it: {site.command('roster')}"
    try:
        if not site.roster.exists():
            return found(Check.ROSTER, State.WARN, "No roster is trusted at this site yet.", accept)
        trusted = trusted_roster.read_pin(site.roster)
        if isinstance(reached, Answer) and reached.status == 200:
            offer = trusted_roster.examine(site.roster, reached.body, bytes.fromhex(member.root))
            if offer.roster.digest != trusted.digest:
                what = "The coordinator offers another roster than the trusted one."
                return found(Check.ROSTER, State.WARN, what, accept)
    except CloisterError as error:
        return failed(Check.ROSTER, error)
    if trusted.public_key(site.name) != site.identity().public:
        wrong = RosterMismatch(
            "The trusted roster does not list this site with its own key.", remedy=accept
        )
        return failed(Check.ROSTER, wrong)
    return found(Check.ROSTER, State.OK, f"The trusted roster lists {len(trusted.entries)} sites.")


def _not_checked(check: Check) -> str:
    return f"Not checked: check {int(check)} failed."


def _span(low: float, high: float) -> str:
    low, high = round(low), round(high)
    return str(low) if low == high else f"{low} to {high}"
