"""Outbound HTTP proxy of the hospital, used for connections to the coordinator only.

``site.toml`` names the proxy and the user; the password lies in ``keys/proxy.password``, so that
it is in no argument list, no environment and no file that people edit. Where ``site.toml`` names
no proxy, ``HTTPS_PROXY`` and ``NO_PROXY`` hold, as they do for other programs.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cloister_fl.client.site.folder import Site
from cloister_fl.errors import FileUnreadable, OptionInvalid, ProxyLoginRefused
from cloister_fl.system.files import read_secret, write_atomic

if TYPE_CHECKING:
    import httpx

FILE = "proxy.password"
MAX_BYTES = 1024


def proxy_of(site: Site) -> httpx.Proxy | None:
    """The proxy that ``site.toml`` names, with its user and password; ``None`` if it names none.

    Its ``repr`` hides the password. ``None`` leaves httpx to ``HTTPS_PROXY`` and ``NO_PROXY``.

    Raises:
        ProxyLoginRefused: a user is named and no password was set.
        FileUnreadable: others could have read the password, or it cannot be read.
    """
    import httpx

    network = site.network
    if not network.proxy:
        return None
    if not network.proxy_user:
        return httpx.Proxy(network.proxy)
    return httpx.Proxy(network.proxy, auth=(network.proxy_user, _password(site)))


def user_of(site: Site) -> str:
    """Whom the proxy of ``site.toml`` is told that this is.

    Raises:
        OptionInvalid: it names no proxy or no user, so there is no password to keep.
    """
    if not (site.network.proxy and site.network.proxy_user):
        raise OptionInvalid(
            "site.toml names no proxy, or no user for it, so there is no password to set.",
            remedy='Write proxy = "http://HOST:PORT" and proxy_user = "NAME" below [network].',
        )
    return site.network.proxy_user


def set_password(site: Site, text: str) -> None:
    """Keep the proxy's password, mode 0600, in place of one that was there.

    Args:
        site: its ``site.toml`` names the proxy and the user.
        text: one line; its line break is not part of the password.

    Raises:
        OptionInvalid: see ``user_of``; or the text is empty, too long or more than one line.
        OutputInTheWay: it cannot be written.
    """
    user_of(site)
    password = text.removesuffix("\n").removesuffix("\r")
    # What is printable can be encoded; half a surrogate pair is not.
    data = password.encode() if password.isprintable() else b""
    if not 0 < len(data) <= MAX_BYTES:
        raise OptionInvalid(
            "This cannot be the proxy's password.",
            remedy=f"Give one line of text, of at most {MAX_BYTES} bytes.",
        )
    write_atomic(site.keys / FILE, data)


def _password(site: Site) -> str:
    path = site.keys / FILE
    if not path.exists():
        raise ProxyLoginRefused(
            f"The proxy password of {site.network.proxy_user} is not set.",
            remedy=f"Set it: {site.command('proxy')}",
        )
    try:
        return read_secret(path).decode()
    except UnicodeDecodeError:
        raise FileUnreadable(
            f"{FILE} is not UTF-8 text.", remedy=f"Set it again: {site.command('proxy')}"
        ) from None
