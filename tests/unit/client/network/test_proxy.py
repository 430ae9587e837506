"""The proxy in ``site.toml``, its password, and the environment of a site's own processes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.network.proxy import FILE, proxy_of, set_password
from cloister_fl.client.site.folder import Site, init_site, open_site
from cloister_fl.client.site.settings import Network, network_of
from cloister_fl.errors import (
    CloisterError,
    FileUnreadable,
    OptionInvalid,
    ProxyLoginRefused,
    SiteFileInvalid,
)
from cloister_fl.system.child_process import local_environment
from support.errors import raises

PROXY = Network(proxy="http://proxy.hospital.example:3128", proxy_user="fl-node")


def _site(tmp_path: Path, network: Network | None = PROXY) -> Site:
    return init_site(tmp_path / "site", name="north", network=network)


def test_proxy_of(tmp_path: Path) -> None:
    assert proxy_of(_site(tmp_path / "a", None)) is None
    open_to_all = proxy_of(_site(tmp_path / "b", Network(proxy="http://p:3128")))
    assert open_to_all is not None
    assert open_to_all.auth is None
    site = _site(tmp_path)
    assert site.network == PROXY
    with pytest.raises(ProxyLoginRefused, match="is not set"):
        proxy_of(site)
    for text in ("word\n", "other ü:\r\n"):
        set_password(site, text)
        found = proxy_of(site)
        assert found is not None
        assert found.auth == ("fl-node", text.strip())
        assert str(found.url) == PROXY.proxy
        assert text.strip() not in repr(found) + repr(site)
    (site.keys / FILE).chmod(0o640)
    with pytest.raises(FileUnreadable, match="chmod 600"):
        proxy_of(site)


@pytest.mark.parametrize("text", ["", "\n", "two\nlines", "x" * 1025, "bell\x07", "\udcff"])
def test_what_is_no_password(tmp_path: Path, text: str) -> None:
    site = _site(tmp_path)
    with raises(OptionInvalid) as caught:
        set_password(site, text)
    assert not (site.keys / FILE).exists()
    assert not text.strip() or text not in str(caught.value)


def test_a_password_wants_a_user(tmp_path: Path) -> None:
    site = _site(tmp_path, None)
    with raises(OptionInvalid, match="names no proxy, or no user"):
        set_password(site, "word")
    with raises(OptionInvalid, match="names no proxy, or no user"):
        CliRunner().invoke(
            client_group.app,
            ["proxy", "--dir", str(site.root)],
            input="word",
            catch_exceptions=False,
        )


BAD_PROXIES = (
    "proxy:3128",
    "http://proxy",
    "https://proxy:3128",
    "socks5://proxy:1080",
    "http://user:hunter2@proxy:3128",
    "http://proxy:3128/path",
    "http://proxy:99999",
)


@pytest.mark.parametrize("url", BAD_PROXIES)
def test_bad_proxies(tmp_path: Path, url: str) -> None:
    with raises(OptionInvalid) as caught:
        network_of(url)
    assert "hunter2" not in str(caught.value)
    site = _site(tmp_path)
    path = site.root / "site.toml"
    path.write_text(path.read_text().replace(PROXY.proxy, url))
    with pytest.raises(SiteFileInvalid, match=r"network\.proxy") as found:
        open_site(site.root)
    assert "hunter2" not in str(found.value)


@pytest.mark.parametrize(
    "made", [lambda: network_of("", "user"), lambda: network_of("http://p:1", "a:b")]
)
def test_bad_users(made: Callable[[], object]) -> None:
    with pytest.raises(CloisterError):
        made()


def test_a_site_file_without_the_table_is_as_good(tmp_path: Path) -> None:
    site = _site(tmp_path, None)
    path = site.root / "site.toml"
    text = path.read_text()
    path.write_text(text.replace("[network]", "").replace("proxy", "# proxy"))
    assert open_site(site.root) == site


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, "127.0.0.1,localhost,::1"),
        ({"NO_PROXY": "a, b", "no_proxy": "b,c"}, "a,b,c,127.0.0.1,localhost,::1"),
        ({"no_proxy": "localhost"}, "localhost,127.0.0.1,::1"),
    ],
)
def test_local_environment(before: dict[str, str], after: str) -> None:
    given = {**before, "HTTPS_PROXY": "http://p:1", "HOME": "/h"}
    kept = dict(given)
    made = local_environment(given)
    assert given == kept
    assert made == {**given, "NO_PROXY": after, "no_proxy": after}
