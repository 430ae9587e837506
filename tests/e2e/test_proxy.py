"""A hospital behind an outbound proxy, at a real coordinator: through it, or told why not."""

from __future__ import annotations

import contextlib
import os
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
from typer.testing import CliRunner

from cloister_fl.client.cli import client_group
from cloister_fl.client.network import http, join
from cloister_fl.client.network.proxy import FILE, proxy_of, set_password
from cloister_fl.client.preflight.findings import Check, Finding, State, exit_status
from cloister_fl.client.preflight.network_check import network
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.client.site.settings import network_of
from cloister_fl.errors import (
    ClockOrDates,
    CloisterError,
    CoordinatorUnproven,
    CoordinatorUnreachable,
    EnrolmentRefused,
    ErrorKind,
    OptionInvalid,
    ProxyForbids,
    ProxyLoginRefused,
    ProxyUnusable,
)
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.server.coordinator import certificate_authority as authority_module
from cloister_fl.server.coordinator.certificate_authority import Authority, pem
from cloister_fl.server.coordinator.site_approval import approve_site, revoke_site
from cloister_fl.system.child_process import local_environment
from support import coordinator_process, deployment
from support.coordinator_process import Hospital, Running, wait_for
from support.errors import is_of, raises
from support.proxies import INSPECTOR, Mode, Proxy

Error = type[CloisterError] | ErrorKind[CloisterError]
LOGIN = ("fl-node", "s3cret:with colon ü")
PROXIES = ("HTTPS_PROXY", "HTTP_PROXY", "ALL_PROXY", "NO_PROXY")


@pytest.fixture(autouse=True)
def no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in PROXIES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.lower(), raising=False)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("federation")
    server = coordinator_process.start(
        coordinator_process.new_coordinator(folder / "fed"), folder / "output"
    )
    # The port for joining closes with the last open invite, and opens again with the next: a
    # second later, perhaps between a test's invite and its join.
    server.invite("keeps-the-port-open", 3600)
    yield server
    server.stop()


@pytest.fixture(scope="module")
def north(running: Running, tmp_path_factory: pytest.TempPathFactory) -> Hospital:
    return coordinator_process.join(running, tmp_path_factory.mktemp("north"), "north")


def behind(hospital: Hospital, proxy: Proxy | str, user: str = "") -> Site:
    """The hospital's site, as if its ``site.toml`` named this proxy."""
    url = proxy if isinstance(proxy, str) else proxy.url
    path = hospital.site.root / "site.toml"
    lines = [line for line in path.read_text().splitlines() if not line.startswith("proxy")]
    at = lines.index("[network]") + 1
    lines[at:at] = [f'proxy = "{url}"', f'proxy_user = "{user}"']
    path.write_text("\n".join(lines) + "\n")
    return open_site(hospital.site.root)


def fleet(running: Running) -> str:
    return running.place.file.fleet.addresses[0]


def at(findings: list[Finding], check: Check) -> Finding:
    return next(finding for finding in findings if finding.number == check)


def told(site: Site, check: Check, error: Error, *words: str) -> None:
    """What ``look`` raises and what ``check`` finds is the same, and nothing after it is told."""
    with raises(error) as caught:
        join.look(site)
    text = str(caught.value)
    for word in words:
        assert word in text
    assert LOGIN[1] not in text
    assert "\x1b" not in text
    findings = network(site)
    finding = at(findings, check)
    assert (finding.state, finding.code) == (State.FAIL, error.code)
    assert finding.what in text
    assert exit_status(findings) == error.exit_status
    way = (Check.NAME, Check.PROXY, Check.CONNECTION, Check.TLS)
    assert {at(findings, each).state for each in way if each < check} <= {State.OK}
    assert {at(findings, each).state for each in way if each > check} <= {State.SKIP}


# Through it


@pytest.mark.slow
def test_a_hospital_joins_through_a_proxy_that_asks_who(running: Running, tmp_path: Path) -> None:
    invite = running.invite("east")
    with Proxy(login=LOGIN) as proxy:
        site = join.prepare(tmp_path / "east", invite, network_of(proxy.url, LOGIN[0]))
        set_password(site, LOGIN[1] + "\n")
        assert join.ask(site, invite).state == "pending"
        assert approve_site(running.place, "east")
        assert join.look(site).state == "approved"
        enrolment = running.place.file.enrolment.addresses[0]
        # Authority, request, question; then, with the certificate, the roster.
        assert proxy.targets == [enrolment] * 3 + [fleet(running)]
        assert proxy.carried > 4000
        carried = proxy.carried
        findings = network(site)
        assert proxy.carried > carried
        assert exit_status(findings) == 0
        assert at(findings, Check.PROXY).what == f"{proxy.address} opens the connection."
        assert at(findings, Check.ADMISSION).state is State.OK
        assert at(findings, Check.CLOCK).state is State.OK
        assert at(findings, Check.VERSION).state is State.OK
        assert at(findings, Check.ROSTER).state is State.WARN
    assert (site.keys / FILE).stat().st_mode & 0o777 == 0o600
    assert LOGIN[1] not in (site.root / "site.toml").read_text()
    assert LOGIN[1] not in repr(proxy_of(site)) + repr(site)


def test_the_commands_join_through_a_proxy(running: Running, tmp_path: Path) -> None:
    invite, site = running.invite("west").encode(), tmp_path / "west"
    runner = CliRunner()
    with Proxy(login=LOGIN) as proxy:
        options = ["--dir", str(site), "--proxy", proxy.url, "--proxy-user", LOGIN[0]]
        first = runner.invoke(client_group.app, ["join", "-", *options], input=invite)
        assert isinstance(first.exception, ProxyLoginRefused)
        assert "cloister client proxy" in str(first.exception)
        kept = runner.invoke(client_group.app, ["proxy", "--dir", str(site)], input=LOGIN[1])
        assert kept.exit_code == 0
        assert LOGIN[1] not in kept.output
        # Given again, the same options do no harm; another proxy is not silently ignored.
        again = runner.invoke(client_group.app, ["join", "-", *options], input=invite)
        assert again.exit_code == 0, again.output
        assert len(proxy.targets) == 2
        other = ["--dir", str(site), "--proxy", "http://127.0.0.1:1"]
        refused = runner.invoke(client_group.app, ["join", "-", *other], input=invite)
        assert is_of(refused.exception, OptionInvalid)


@pytest.mark.slow
def test_the_node_serves_through_the_proxy_and_says_when_it_is_gone(
    running: Running, tmp_path: Path
) -> None:
    invite = running.invite("through")
    hospital = deployment.Hospital(tmp_path / "through")
    try:
        with Proxy(login=LOGIN) as proxy:
            site = join.prepare(hospital.folder, invite, network_of(proxy.url, LOGIN[0]))
            set_password(site, LOGIN[1] + "\n")
            assert join.ask(site, invite).state == "pending"
            assert approve_site(running.place, "through")
            assert join.look(site).state == "approved"
            asked = proxy.targets.count(fleet(running))
            hospital.start()
            assert proxy.targets.count(fleet(running)) > asked
            assert hospital.standing()["online"] is True
        wait_for(lambda: hospital.standing()["online"] is False, 120, hospital.told)
        assert hospital.standing()["why"] == "the coordinator does not answer"
    finally:
        hospital.stop()
    assert LOGIN[1] not in hospital.told()


def test_the_environment_names_the_proxy_where_the_site_does_not(
    north: Hospital, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    site = behind(north, "")
    with Proxy(login=("env", "word")) as proxy, Proxy() as own:
        monkeypatch.setenv("HTTPS_PROXY", proxy.url.replace("//", "//env:word@"))
        assert join.look(site).state == "approved"
        assert proxy.targets == [fleet(running)]
        assert at(network(site), Check.PROXY).what == f"{proxy.address} opens the connection."
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        assert join.look(site).state == "approved"
        assert at(network(site), Check.PROXY).what == "None; the connection is direct."
        assert len(proxy.targets) == 2
        # What the site says comes first.
        assert join.look(behind(north, own)).state == "approved"
        assert len(own.targets) == 1


# Told why not


def test_a_wrong_password_and_none(north: Hospital) -> None:
    with Proxy(login=LOGIN) as proxy:
        site = behind(north, proxy)
        told(site, Check.PROXY, ProxyLoginRefused, "requires a user and a password")
        site = behind(north, proxy, LOGIN[0])
        (site.keys / FILE).unlink(missing_ok=True)
        with pytest.raises(ProxyLoginRefused, match="is not set"):
            join.look(site)
        assert at(network(site), Check.PROXY).code == "CLO-812"
        set_password(site, "wrong")
        refused = "did not accept the password of the user fl-node"
        told(site, Check.PROXY, ProxyLoginRefused, refused, proxy.address)
        assert proxy.carried == 0


def test_a_proxy_that_knows_no_passwords(north: Hospital) -> None:
    with Proxy(login=LOGIN, offers=("Negotiate", "NTLM", "\x1b[31mX")) as proxy:
        site = behind(north, proxy)
        told(site, Check.PROXY, ProxyLoginRefused, "accepts only NTLM or Negotiate", "Basic")


def test_a_proxy_that_forbids(north: Hospital, running: Running) -> None:
    with Proxy(Mode.FORBID) as proxy:
        allow = f"allow CONNECT to {fleet(running)}"
        told(behind(north, proxy), Check.PROXY, ProxyForbids, "403", allow)


@pytest.mark.parametrize("newest", ["TLSv1_3", "TLSv1_2"])
def test_a_proxy_that_inspects(
    north: Hospital, running: Running, tmp_path: Path, newest: str
) -> None:
    with Proxy(Mode.INSPECT, newest=getattr(ssl.TLSVersion, newest)) as proxy:
        words = (
            f"TLS is inspected on the way to {fleet(running)} by {INSPECTOR}",
            f"Ask for an exemption for {fleet(running)}",
            "accepts certificates of the coordinator's authority only",
        )
        told(behind(north, proxy), Check.TLS, CoordinatorUnproven, *words)
        # Already the first step of joining says it, and no secret went through.
        name = f"seen-{newest[-1]}"
        invite = running.invite(name)
        site = join.prepare(tmp_path / "site", invite, network_of(proxy.url))
        with raises(CoordinatorUnproven, match=INSPECTOR):
            join.ask(site, invite)
        assert running.row(name) is None


def test_a_proxy_that_hangs(north: Hospital, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TIMEOUT_S", 0.5)
    with Proxy(Mode.HANG) as proxy:
        told(behind(north, proxy), Check.PROXY, ProxyUnusable, "did not answer in time")


def test_a_proxy_that_cuts_and_one_that_is_not_there(north: Hospital) -> None:
    with Proxy(Mode.CUT) as proxy:
        told(behind(north, proxy), Check.PROXY, ProxyUnusable, "cut the connection")
        url = proxy.url
    told(behind(north, url), Check.PROXY, ProxyUnusable, "cannot be reached", "nothing listens")
    nameless = behind(north, "http://proxy.invalid:3128")
    told(
        nameless,
        Check.PROXY,
        ProxyUnusable,
        "proxy.invalid:3128",
        "Its name cannot be resolved (DNS)",
    )


def test_a_page_that_blocks(north: Hospital) -> None:
    with Proxy(Mode.BLOCK_PAGE) as proxy:
        told(behind(north, proxy), Check.TLS, CoordinatorUnreachable, "The answer is not TLS")


def test_a_proxy_of_a_kind_that_is_not_spoken(
    north: Hospital, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ALL_PROXY", "socks5://127.0.0.1:1")
    told(behind(north, ""), Check.PROXY, ProxyUnusable, "environment")


# At the coordinator itself


@pytest.mark.parametrize(
    ("address", "check", "words"),
    [
        ("nobody.invalid:9443", Check.NAME, "Its name cannot be resolved (DNS)"),
        ("127.0.0.1:1", Check.CONNECTION, "nothing listens"),
        ("127.0.0.1:1", Check.CONNECTION, "cannot be reached from 127.0.0.1:"),
    ],
)
def test_no_way_to_the_coordinator(north: Hospital, address: str, check: Check, words: str) -> None:
    with Proxy() as proxy:
        site = behind(north, proxy if "from" in words else "")
        path = site.root / join.MEMBERSHIP
        kept = path.read_bytes()
        member = join.membership(site).model_copy(update={"fleet": address})
        path.write_text(member.model_dump_json())
        try:
            told(site, check, CoordinatorUnreachable, words, address)
        finally:
            path.write_bytes(kept)


@contextlib.contextmanager
def posing(context: ssl.SSLContext, hospital: Hospital) -> Iterator[Site]:
    """The hospital's site, sent to a server of ours with this TLS."""
    bound = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            try:
                line, _ = bound.accept()
            except OSError:
                return
            with contextlib.suppress(OSError), line:
                secured = context.wrap_socket(line, server_side=True)
                with secured:
                    secured.recv(4096)

    thread = Thread(target=serve)
    thread.start()
    site = behind(hospital, "")
    path = site.root / join.MEMBERSHIP
    kept = path.read_bytes()
    away = {"fleet": f"127.0.0.1:{bound.getsockname()[1]}"}
    path.write_text(join.membership(site).model_copy(update=away).model_dump_json())
    try:
        yield site
    finally:
        path.write_bytes(kept)
        bound.shutdown(socket.SHUT_RDWR)
        bound.close()
        thread.join()


def served(folder: Path, authority: Authority, host: str = "127.0.0.1") -> ssl.SSLContext:
    """A server's TLS with a certificate of this authority."""
    key = ec_keys.generate_pem(Purpose.TLS)
    public = ec_keys.load_private(key, Purpose.TLS).public_key()
    path = folder / "server.pem"
    path.write_bytes(key + pem(authority.server_certificate(public, [host])))
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(path)
    return context


def test_a_certificate_that_has_expired(
    north: Hospital, running: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(authority_module, "LEAF_DAYS", 0)
    context = served(tmp_path, running.place.authority())
    time.sleep(1.1)
    with posing(context, north) as site:
        told(site, Check.TLS, ClockOrDates, "Check this machine's clock first", "valid from")


def test_a_certificate_for_another_name(north: Hospital, running: Running, tmp_path: Path) -> None:
    context = served(tmp_path, running.place.authority(), "fl.example.org")
    with posing(context, north) as site:
        told(site, Check.TLS, CoordinatorUnproven, "is for another name")


def test_a_certificate_of_the_site_that_is_not_accepted(
    north: Hospital, running: Running, tmp_path: Path
) -> None:
    """The server knows another authority's clients only, and says so with an alert."""
    context = served(tmp_path, running.place.authority())
    other = Authority.create(tmp_path, "other")
    context.load_verify_locations(cadata=pem(other.certificate).decode())
    context.verify_mode = ssl.CERT_REQUIRED
    with posing(context, north) as site:
        told(site, Check.ADMISSION, EnrolmentRefused, "does not accept this site's certificate")


def test_revoked(running: Running, tmp_path: Path) -> None:
    hospital = coordinator_process.join(running, tmp_path / "gone", "gone")
    revoke_site(running.place, "gone")
    told(hospital.site, Check.ADMISSION, EnrolmentRefused, "has revoked this site")


def test_not_approved_yet(running: Running, tmp_path: Path) -> None:
    invite = running.invite("early")
    site = join.prepare(tmp_path / "early", invite)
    join.ask(site, invite)
    findings = network(site)
    assert exit_status(findings) == 0
    assert at(findings, Check.TLS).state is State.OK
    assert at(findings, Check.CERTIFICATE).state is State.WARN
    assert at(findings, Check.ADMISSION).state is State.SKIP


# The site's own processes


class _Here(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(204)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Nothing."""


@pytest.mark.parametrize("named", ["", "intranet.example"])
def test_local_processes_do_not_use_the_proxy(named: str) -> None:
    """With the environment of ``local_environment``; without, they do."""
    server = HTTPServer(("127.0.0.1", 0), _Here)
    thread = Thread(target=server.serve_forever)
    thread.start()
    code = (
        "import sys, httpx\n"
        "print(httpx.get(sys.argv[1], timeout=5).status_code)\n"
        "try: httpx.get('https://fl.invalid', timeout=5)\n"
        "except httpx.HTTPError as e: print(type(e).__name__)"
    )
    try:
        with Proxy(Mode.FORBID) as proxy:
            plain = {
                **{k: v for k, v in os.environ.items() if k.upper() not in PROXIES},
                "HTTP_PROXY": proxy.url,
                "http_proxy": proxy.url,
                "HTTPS_PROXY": proxy.url,
                "no_proxy": named,
            }
            seen = []
            for environment in (plain, local_environment(plain)):
                done = subprocess.run(
                    [sys.executable, "-c", code, f"http://127.0.0.1:{server.server_port}/"],
                    env=environment,
                    capture_output=True,
                    text=True,
                    check=True,
                )
                seen.append(done.stdout.split())
            # The proxy knows CONNECT alone; what is not local still goes to it.
            assert seen == [["405", "ProxyError"], ["204", "ProxyError"]]
            assert proxy.targets[1:] == ["fl.invalid:443"] * 2
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
