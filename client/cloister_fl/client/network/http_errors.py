"""Errors of failed requests, in words for a hospital's IT: the cause, and whom to ask."""

from __future__ import annotations

import datetime
from collections.abc import Callable

from cloister_fl.client.network.http import Cause, Failure, Step
from cloister_fl.client.site.folder import Site, command_at
from cloister_fl.errors import (
    ClockOrDates,
    CloisterError,
    CoordinatorUnproven,
    CoordinatorUnreachable,
    DeploymentError,
    EnrolmentRefused,
    ProxyForbids,
    ProxyLoginRefused,
    ProxyUnusable,
)
from cloister_fl.system import utc

_WHERE_PROXY = "Check the proxy's address in site.toml, or in HTTPS_PROXY where that names none."
_AT_CONNECT = {
    Cause.NAME_UNKNOWN: "Its name cannot be resolved (DNS).",
    Cause.REFUSED: "Connection refused: nothing listens at this port.",
    Cause.TIMEOUT: "Timed out; a firewall may be dropping the connection.",
    Cause.NO_ROUTE: "No route to the host.",
}
_CUT = "The connection was cut."


def error_of(failure: Failure, site: Site | None = None) -> CloisterError:
    """Return the error that describes a failed request.

    Args:
        failure: what failed, and at which step.
        site: the site that asked; its folder goes into the commands of the remedy.
    """
    if failure.cause is Cause.PROXY_SETTING:
        return ProxyUnusable(
            "The proxy set in the environment cannot be used.",
            why="HTTPS_PROXY or ALL_PROXY is not an http:// address.",
            remedy='Write proxy = "http://HOST:PORT" below [network] in site.toml.',
        )
    if failure.cause is Cause.BEYOND_PROXY:
        return CoordinatorUnreachable(
            f"{failure.address} cannot be reached from {failure.via}, the proxy.",
            why=f"The proxy answered {failure.status}.",
            remedy="Ask the coordinator whether the server runs and your invite is open, then "
            f"your network team whether the proxy may go to {failure.address}.",
        )
    if failure.via and failure.step <= Step.PROXY:
        return _proxy(failure, site)
    if failure.step <= Step.CONNECT:
        return CoordinatorUnreachable(
            f"{failure.address} cannot be reached.",
            why=_AT_CONNECT.get(failure.cause, _CUT),
            remedy=_unreached(failure, site),
        )
    if failure.cause is Cause.CERTIFICATE_REFUSED:
        return _refused(failure, site)
    judge = _AT_TLS.get(failure.cause, _broken_off)
    return judge(failure)


def _unreached(failure: Failure, site: Site | None) -> str:
    new_address = f"If it has another address now: {_command(site, 'address HOST:PORT')}"
    if failure.cause is Cause.NAME_UNKNOWN:
        return (
            "Compare the name with the coordinator's. If only a proxy resolves names outside the "
            f"hospital, set proxy below [network] in site.toml. {new_address}"
        )
    if failure.cause is Cause.REFUSED:
        return (
            "Ask the coordinator whether the server runs, your invite is open and the address is "
            f"still this one. {new_address}"
        )
    return (
        f"Ask your network team to allow outbound TCP to {failure.address}. If the hospital uses a "
        "proxy, ask for its address and write it as proxy below [network] in site.toml. Then ask "
        f"the coordinator whether the server runs. {new_address}"
    )


def _proxy(failure: Failure, site: Site | None) -> CloisterError:
    proxy = f"{failure.via}, the proxy,"
    if failure.step <= Step.CONNECT:
        why = _AT_CONNECT.get(failure.cause, _CUT)
        return ProxyUnusable(f"{proxy} cannot be reached.", why=why, remedy=_WHERE_PROXY)
    if failure.cause is Cause.PROXY_LOGIN:
        return _login(failure, proxy, _command(site, "proxy"))
    if failure.cause is Cause.PROXY_STATUS:
        return ProxyForbids(
            f"{proxy} does not open a connection to {failure.address}.",
            why=f"It answered {failure.status}."
            if failure.status
            else "It gave an invalid answer.",
            remedy=f"Ask your network team to allow CONNECT to {failure.address}.",
        )
    if failure.cause is Cause.TIMEOUT:
        return ProxyUnusable(
            f"{proxy} took the connection and did not answer in time.",
            why=f"It is not a proxy, or {failure.address} does not answer it.",
            remedy=_WHERE_PROXY,
        )
    if failure.cause in {Cause.UNTRUSTED, Cause.DATES, Cause.OTHER_NAME}:
        return ProxyUnusable(
            f"{proxy} shows a certificate that this machine does not trust.",
            remedy="Use its http:// address, or have its authority installed on this machine.",
        )
    return ProxyUnusable(
        f"{proxy} cut the connection before it answered.",
        why="It is not a proxy, or it does not support CONNECT.",
        remedy=_WHERE_PROXY,
    )


def _login(failure: Failure, proxy: str, command: str) -> ProxyLoginRefused:
    if failure.logins and "Basic" not in failure.logins:
        return ProxyLoginRefused(
            f"{proxy} accepts only {' or '.join(failure.logins)}.",
            why="Cloister supports Basic authentication.",
            remedy="Ask for a rule that lets this machine through to "
            f"{failure.address} without a login.",
        )
    if failure.user:
        return ProxyLoginRefused(
            f"{proxy} did not accept the password of the user {failure.user}.",
            remedy=f"Set it again: {command}",
        )
    return ProxyLoginRefused(
        f"{proxy} requires a user and a password.",
        remedy=f"Write proxy and proxy_user below [network] in site.toml, then run: {command}",
    )


def _command(site: Site | None, words: str) -> str:
    return command_at(None if site is None else site.root, words)


def _inspected(failure: Failure) -> DeploymentError:
    by = failure.seen.issuer if failure.seen is not None else ""
    whose = f"by {by}" if by else "by an unnamed issuer"
    return CoordinatorUnproven(
        f"TLS is inspected on the way to {failure.address} {whose}, or another machine answers.",
        why="The certificate shown was not issued by the coordinator's authority. "
        "Nothing secret was sent.",
        remedy=f"Ask for an exemption for {failure.address}; Cloister accepts "
        "certificates of the coordinator's authority only.",
    )


def _other_name(failure: Failure) -> DeploymentError:
    return CoordinatorUnproven(
        f"The certificate at {failure.address} is for another name.",
        why="The coordinator's authority issued it. Nothing secret was sent.",
        remedy="Ask the coordinator to run: cloister server init FOLDER --address "
        f"{failure.address}",
    )


def _too_long(failure: Failure) -> DeploymentError:
    return CoordinatorUnproven(
        f"{failure.address} is not the coordinator that the invite names.",
        why="Its answer is compressed, or longer than any of a coordinator. "
        "Nothing secret was sent.",
        remedy="Ask your network team whether TLS is inspected on the way.",
    )


def _refused(failure: Failure, site: Site | None) -> EnrolmentRefused:
    return EnrolmentRefused(
        f"{failure.address} does not accept this site's certificate.",
        why="The coordinator's authority did not issue it, or it has expired.",
        remedy=f"Run: {_command(site, 'check')}. Then call the coordinator.",
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
        remedy="Check this machine's clock first. If it is right, ask the coordinator to renew the "
        "certificate: cloister server renew --dir FOLDER",
    )


def _broken_off(failure: Failure) -> CoordinatorUnreachable:
    """TCP stood; it broke off in TLS or before an answer."""
    at_tls = failure.step is Step.TLS
    if failure.cause is Cause.NO_TLS:
        why = "The answer is not TLS: another program, or a proxy's block page."
        remedy = "Compare the port with the coordinator's; ask your network team what answers."
    elif failure.cause is Cause.TIMEOUT:
        why = f"It did not answer in time, {'in' if at_tls else 'after'} the TLS handshake."
        remedy = (
            f"Ask your network team to let TLS to {failure.address} through unchanged, and "
            "the coordinator whether the server runs."
        )
    else:
        why = f"The connection was cut {'in' if at_tls else 'after'} the TLS handshake."
        remedy = (
            f"Ask your network team to let TLS to {failure.address} through unchanged, and "
            "the coordinator whether it knows this site's certificate."
        )
    return CoordinatorUnreachable(
        f"{failure.address} gave no usable answer.", why=why, remedy=remedy
    )


def _minute(moment: datetime.datetime) -> str:
    return f"{utc.to_minute(moment)} UTC"


_AT_TLS: dict[Cause, Callable[[Failure], CloisterError]] = {
    Cause.UNTRUSTED: _inspected,
    Cause.DATES: _dates,
    Cause.OTHER_NAME: _other_name,
    Cause.TOO_LONG: _too_long,
}
