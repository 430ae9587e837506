"""What a failed request means to a hospital's IT: the error, with what to ask of whom."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from cloister_fl.client.network.http import Cause, Failure, Step
from cloister_fl.errors import (
    ClockOrDates,
    CloisterError,
    CoordinatorUnproven,
    CoordinatorUnreachable,
    EnrolmentRefused,
    ProxyForbids,
    ProxyLoginRefused,
    ProxyUnusable,
)
from cloister_fl.system import utc

_WHERE_PROXY = "Check the proxy's address in site.toml, or in HTTPS_PROXY where that names none."
_AT_CONNECT = {
    Cause.NAME_UNKNOWN: "No name server here knows its name.",
    Cause.REFUSED: "The machine answers, and nothing listens at this port.",
    Cause.TIMEOUT: "Nothing answered in time; a firewall that drops the connection looks so.",
    Cause.NO_ROUTE: "This machine has no way to it.",
}
_CUT = "The connection was cut."


def error_of(failure: Failure) -> CloisterError:
    """The error that a failure is raised as; its words hold for this failure alone."""
    if failure.cause is Cause.PROXY_SETTING:
        return ProxyUnusable(
            "The proxy that the environment names cannot be used.",
            why="HTTPS_PROXY or ALL_PROXY is no http:// address.",
            remedy='Write proxy = "http://HOST:PORT" below [network] in site.toml.',
        )
    if failure.cause is Cause.BEYOND_PROXY:
        return CoordinatorUnreachable(
            f"{failure.address} cannot be reached from {failure.via}, the proxy.",
            why=f"The proxy answered {failure.status}.",
            remedy="Ask the coordinator whether the server runs and your invite is open, then "
            f"your network's people whether the proxy may go to {failure.address}.",
        )
    if failure.via and failure.step <= Step.PROXY:
        return _proxy(failure)
    if failure.step <= Step.CONNECT:
        return CoordinatorUnreachable(
            f"{failure.address} cannot be reached.",
            why=_AT_CONNECT.get(failure.cause, _CUT),
            remedy=_unreached(failure),
        )
    judge = _AT_TLS.get(failure.cause, _broken_off)
    return judge(failure)


def _unreached(failure: Failure) -> str:
    if failure.cause is Cause.NAME_UNKNOWN:
        return (
            "Compare the name with the coordinator's. Where only a proxy knows the names of the "
            "outside, write it below [network] in site.toml."
        )
    if failure.cause is Cause.REFUSED:
        return "Ask the coordinator whether the server runs and your invite is open."
    return (
        f"Ask your network's people to allow outbound TCP to {failure.address}, or for the "
        "proxy's address; then the coordinator whether the server runs."
    )


def _proxy(failure: Failure) -> CloisterError:
    proxy = f"{failure.via}, the proxy,"
    if failure.step <= Step.CONNECT:
        why = _AT_CONNECT.get(failure.cause, _CUT)
        return ProxyUnusable(f"{proxy} cannot be reached.", why=why, remedy=_WHERE_PROXY)
    if failure.cause is Cause.PROXY_LOGIN:
        return _login(failure, proxy)
    if failure.cause is Cause.PROXY_STATUS:
        return ProxyForbids(
            f"{proxy} does not open a connection to {failure.address}.",
            why=f"It answered {failure.status}."
            if failure.status
            else "It gave an answer that is none.",
            remedy=f"Ask your network's people to allow CONNECT to {failure.address}.",
        )
    if failure.cause is Cause.TIMEOUT:
        return ProxyUnusable(
            f"{proxy} took the connection and did not answer in time.",
            why=f"It is no proxy, or waits in vain for {failure.address}.",
            remedy=_WHERE_PROXY,
        )
    if failure.cause in {Cause.UNTRUSTED, Cause.DATES, Cause.OTHER_NAME}:
        return ProxyUnusable(
            f"{proxy} shows a certificate that this machine does not trust.",
            remedy="Use its http:// address, or have its authority installed on this machine.",
        )
    return ProxyUnusable(
        f"{proxy} cut the connection before it answered.",
        why="It is no proxy, or one that does not pass CONNECT on.",
        remedy=_WHERE_PROXY,
    )


def _login(failure: Failure, proxy: str) -> ProxyLoginRefused:
    if failure.logins and "Basic" not in failure.logins:
        return ProxyLoginRefused(
            f"{proxy} lets people log in by {' or '.join(failure.logins)} only.",
            why="Cloister knows Basic.",
            remedy=f"Ask for a rule that lets this machine through to {failure.address} without.",
        )
    if failure.user:
        return ProxyLoginRefused(
            f"{proxy} did not accept the user {failure.user} with the password that was set.",
            remedy="Set it again: cloister client proxy",
        )
    return ProxyLoginRefused(
        f"{proxy} wants a user and a password.",
        remedy="Write proxy and proxy_user below [network] in site.toml, then run: "
        "cloister client proxy",
    )


def _inspected(failure: Failure) -> CoordinatorUnproven:
    by = failure.seen.issuer if failure.seen is not None else ""
    whose = f"by {by}" if by else "by somebody who shows no name"
    return CoordinatorUnproven(
        f"TLS is inspected on the way to {failure.address} {whose}, or another machine answers.",
        why="What answered has no certificate of the coordinator's authority. "
        "Nothing secret was sent.",
        remedy=f"Ask for an exemption for {failure.address}; Cloister pins the coordinator's "
        "authority and does not go on.",
    )


def _other_name(failure: Failure) -> CoordinatorUnproven:
    return CoordinatorUnproven(
        f"The certificate at {failure.address} is for another name.",
        why="It is the coordinator's authority's. Nothing secret was sent.",
        remedy="Ask the coordinator to run 'cloister server init' with this address.",
    )


def _too_long(failure: Failure) -> CoordinatorUnproven:
    return CoordinatorUnproven(
        f"{failure.address} is not the coordinator that the invite names.",
        why="It answered with more than a coordinator does. Nothing secret was sent.",
        remedy="Ask your network's people whether TLS is inspected on the way.",
    )


def _refused(failure: Failure) -> EnrolmentRefused:
    return EnrolmentRefused(
        f"{failure.address} does not accept this site's certificate.",
        why="It is not one of the coordinator's authority, or has expired.",
        remedy="Run 'cloister client check', and call the coordinator.",
    )


def _dates(failure: Failure) -> ClockOrDates:
    now = utc.now()
    why = f"This machine's clock says {_minute(now)}"
    if failure.seen is not None:
        begins, ends = _minute(failure.seen.begins), _minute(failure.seen.ends)
        why += f", and the certificate is valid from {begins} to {ends}"
    return ClockOrDates(
        f"The certificate of {failure.address} is not valid at this time.",
        why=why + ".",
        remedy="Check this machine's clock first; where it is right, the coordinator renews its "
        "certificate: cloister server init",
    )


def _broken_off(failure: Failure) -> CoordinatorUnreachable:
    """TCP stood; it broke off in TLS or before an answer."""
    at_tls = failure.step is Step.TLS
    if failure.cause is Cause.NO_TLS:
        why = "What answers there speaks no TLS: another program, or a page that blocks."
        remedy = "Compare the port with the coordinator's; ask your network's people what answers."
    elif failure.cause is Cause.TIMEOUT:
        why = f"It did not answer in time, {'in' if at_tls else 'after'} the TLS handshake."
        remedy = (
            f"Ask your network's people to let TLS to {failure.address} through unchanged; then "
            "the coordinator whether the server runs."
        )
    else:
        why = f"The connection was cut {'in' if at_tls else 'after'} the TLS handshake."
        remedy = (
            f"Ask your network's people to let TLS to {failure.address} through unchanged, and "
            "the coordinator whether it knows this site's certificate."
        )
    return CoordinatorUnreachable(
        f"{failure.address} gives no answer that can be used.", why=why, remedy=remedy
    )


def _minute(moment: datetime.datetime) -> str:
    return f"{utc.to_minute(moment)} UTC"


_AT_TLS: dict[Cause, Callable[[Failure], CloisterError]] = {
    Cause.UNTRUSTED: _inspected,
    Cause.DATES: _dates,
    Cause.OTHER_NAME: _other_name,
    Cause.CERTIFICATE_REFUSED: _refused,
    Cause.TOO_LONG: _too_long,
}
