"""The coordinator's folder: configuration, keys, databases.

::

    server.toml      what a person wrote: name, addresses, ports
    keys/            root.pem, root.pub, ca.key, ca.pem, server.key, server.pem, control.token,
                     superexec.secret; mode 0700 and 0600
    keys/roster      the signed roster in force
    state/           coordinator.sqlite (invites, sites), flower.sqlite and, while the server runs,
                     control.socket and health
    log/             refused.jsonl: rejected connections and requests
    flower/          Flower's own home
    server.lock      held by the server that runs

Keys are made once and never replaced. ``server.toml`` is written last, so a folder with it is a
finished one, and ``init`` after a kill goes on where it ended.
"""

from __future__ import annotations

import contextlib
import ipaddress
import json
import secrets
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from cryptography import x509
from pydantic import AfterValidator, Field

from cloister_fl.encoding.canonical_json import HASH
from cloister_fl.errors import DeploymentError, OptionInvalid, ServerFolderInvalid
from cloister_fl.membership import ec_keys
from cloister_fl.membership.ec_keys import Purpose
from cloister_fl.membership.enrolment import split_address
from cloister_fl.server.coordinator import site_database
from cloister_fl.server.coordinator.certificate_authority import Authority, needs_renewal, pem
from cloister_fl.server.coordinator.federation import Federation
from cloister_fl.server.coordinator.site_database import Registry
from cloister_fl.study.schema import Name
from cloister_fl.system.files import (
    create_secret,
    locked,
    make_private_dir,
    moved_away,
    read_secret,
    sweep,
    write_atomic,
)
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.health import FILE as HEALTH
from cloister_fl.system.toml import FileModel, parse, read_text

SERVER_FILE = "server.toml"
_SITES_FILE = "site.toml"
ROOT_PUBLIC = "root.pub"
SERVER_KEY = "server.key"
SERVER_CERTIFICATE = "server.pem"
CONTROL_TOKEN = "control.token"  # noqa: S105  # a file's name
EXECUTOR_SECRET = "superexec.secret"  # noqa: S105  # a file's name
_FOLDERS = ("keys", "state", "log", "flower")


def _is_address(value: str) -> str:
    if split_address(value) is None:
        raise ValueError("is not HOST:PORT with a port from 1 to 65535")
    return value


def is_loopback(host: str) -> bool:
    """True for a literal loopback address; a name, ``localhost`` included, may change."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def _is_private(value: str) -> str:
    parts = split_address(_is_address(value))
    if parts is None or not is_loopback(parts[0]):
        raise ValueError("is not a loopback address such as 127.0.0.1; no TLS protects this port")
    return value


_Address = Annotated[str, Field(max_length=300), AfterValidator(_is_address)]
_PrivateAddress = Annotated[str, Field(max_length=300), AfterValidator(_is_private)]


class _About(FileModel):
    name: Name


class _Public(FileModel):
    addresses: Annotated[tuple[_Address, ...], Field(min_length=1, max_length=16, strict=False)]
    listen: _Address


class _Private(FileModel):
    health: _PrivateAddress


class ServerFile(FileModel):
    """The file ``server.toml``."""

    federation: _About
    fleet: _Public
    enrolment: _Public
    private: _Private

    @property
    def hosts(self) -> tuple[str, ...]:
        """Hosts that the server's certificate must name, sorted."""
        parts = [split_address(a) for a in (*self.fleet.addresses, *self.enrolment.addresses)]
        return tuple(sorted({part[0] for part in parts if part}))


@dataclass(frozen=True)
class Coordinator:
    """An opened folder.

    Attributes:
        root: the folder, absolute.
        file: what ``server.toml`` says.
    """

    root: Path
    file: ServerFile

    @property
    def keys(self) -> Path:
        """Folder of the secrets, and of the signed roster."""
        return self.root / "keys"

    @property
    def state(self) -> Path:
        """Folder of the databases."""
        return self.root / "state"

    @property
    def socket(self) -> Path:
        """Socket of the server's Control and Runtime, for its own run executor alone."""
        return self.state / "control.socket"

    @property
    def health(self) -> Path:
        """What the server says of itself while it runs, see ``system.health``."""
        return self.state / HEALTH

    @property
    def refusals(self) -> Path:
        """The log of rejected connections and requests."""
        return self.root / "log" / "refused.jsonl"

    @property
    def lock(self) -> Path:
        """Lock file of the running server, with its process id."""
        return self.root / "server.lock"

    @property
    def database(self) -> Path:
        """The database of invites and sites."""
        return self.state / "coordinator.sqlite"

    def registry(self) -> Registry:
        """Open the database of invites and sites; raises as ``Registry``."""
        return Registry(self.database)

    def authority(self) -> Authority:
        """Open the certificate authority, with its private key."""
        return Authority(self.keys)

    def federation(self) -> Federation:
        """Open the federation, with its root key."""
        return Federation(self.keys)

    def federation_root(self) -> bytes:
        """The root's public key, 32 bytes, without opening the private one."""
        return bytes.fromhex(self._hex(ROOT_PUBLIC))

    @contextlib.contextmanager
    def deciding(self) -> Iterator[None]:
        """Hold the lock that keeps other commands from writing here at the same time."""
        with locked(self.root / "decide.lock"):
            yield

    def token(self) -> str:
        """Token of the private Control API."""
        return self._hex(CONTROL_TOKEN)

    def executor_secret(self) -> bytes:
        """Secret of the private Runtime API."""
        return self._hex(EXECUTOR_SECRET).encode()

    def _hex(self, name: str) -> str:
        """A file of ``keys`` with 64 hexadecimal digits, which ``init`` can make again.

        Raises:
            FileUnreadable: see ``read_secret``.
            ServerFolderInvalid: it holds something else.
        """
        text = read_secret(self.keys / name).decode("ascii", "replace")
        if not HASH.fullmatch(text):
            raise self._damaged(name)
        return text

    def _damaged(self, name: str) -> DeploymentError:
        return ServerFolderInvalid(
            f"keys/{name} is damaged.",
            remedy="Let it be made again: "
            f"{moved_away(self.keys / name)}; cloister server init {shlex.quote(str(self.root))}",
        )


@dataclass(frozen=True)
class Layout:
    """Options of ``init`` for a new ``server.toml``.

    Attributes:
        addresses: host:port that hospitals connect to; the first one goes into invites.
        name: the federation's name.
        listen: address that the two public ports are bound to.
        enrolment_port: port for joining; else the fleet's first port + 1.
        private_port: loopback port of the health service; else the fleet's first port + 2.
    """

    addresses: tuple[str, ...]
    name: str = "federation"
    listen: str = "0.0.0.0"  # noqa: S104  # hospitals connect to it; TLS is always on
    enrolment_port: int | None = None
    private_port: int | None = None

    def toml(self) -> str:
        """The text of ``server.toml``.

        Raises:
            OptionInvalid: an address or the name cannot be used.
        """
        parts = [split_address(address) for address in self.addresses]
        if not parts or None in parts:
            raise OptionInvalid(
                "An --address is not HOST:PORT, or none is given.",
                remedy="Give the address that hospitals connect to: --address fl.example.org:9443",
            )
        hosts = [part[0] for part in parts if part]
        first = parts[0][1] if parts[0] else 0
        joining = self.enrolment_port or first + 1
        private = self.private_port or first + 2
        at = [f"{_bracket(host)}:{joining}" for host in hosts]
        text = f"""\
# This federation's server. After a change: `cloister server init` (it renews the certificate
# where that is needed and replaces no key), then stop and start the server.

[federation]
name = {json.dumps(self.name)}

[fleet]
# What hospitals connect to; the first one goes into invites, all go into the certificate.
addresses = {json.dumps(list(self.addresses))}
listen = {json.dumps(f"{_bracket(self.listen)}:{first}")}

[enrolment]
# For enrolment; open only while an invite is valid.
addresses = {json.dumps(at)}
listen = {json.dumps(f"{_bracket(self.listen)}:{joining}")}

[private]
# For this machine only: it says whether the server serves, and nothing else.
health = "127.0.0.1:{private}"
"""
        _, faults = parse(text, ServerFile)
        if faults:
            raise OptionInvalid(
                f"With these options, server.toml would not be valid: {faults[0]}",
                remedy="Choose other options.",
            )
        return text


def init_coordinator(root: Path, layout: Layout | None) -> Coordinator:
    """Create what a coordinator's folder lacks, renew its certificate if needed, and open it.

    Args:
        root: the folder; created with mode 0700 if it is missing.
        layout: what to write as ``server.toml``; not read where there is one.

    Raises:
        OptionInvalid: no layout for a new folder, or one that cannot be used.
        OutputInTheWay, FileUnreadable, IdentityInvalid: a file cannot be written or used.
        ServerFolderInvalid: ``server.toml`` has faults.
    """
    root = root.absolute()
    written = root / SERVER_FILE
    fresh = not written.exists()
    text = (layout or Layout(())).toml() if fresh else read_text(written)
    coordinator = Coordinator(root, _parse(text))
    if (root / _SITES_FILE).exists():
        raise OptionInvalid(
            f"{root} is a site folder.",
            why="A site and a coordinator keep different keys under the same names.",
            remedy="Name another folder: cloister server init FOLDER --address HOST:PORT",
        )
    make_private_dir(root)
    keep_out_of_git(root)
    for folder in _FOLDERS:
        make_private_dir(root / folder)
    keys = coordinator.keys
    # Also where a person's own .gitignore lies above.
    keep_out_of_git(keys)
    root_public = Federation(keys).root.hex().encode()
    create_secret(keys / ROOT_PUBLIC, root_public)
    authority = Authority.create(keys, coordinator.file.federation.name)
    create_secret(keys / SERVER_KEY, ec_keys.generate_pem(Purpose.TLS))
    create_secret(keys / CONTROL_TOKEN, secrets.token_hex(32).encode())
    create_secret(keys / EXECUTOR_SECRET, secrets.token_hex(32).encode())
    certify_server(coordinator, authority)
    site_database.create(coordinator.database)
    with coordinator.deciding(), coordinator.registry() as registry:
        sweep(root)
        publish_roster(coordinator, registry)
    if fresh:
        # Last: a folder with this file is a finished one.
        create_secret(written, text.encode())
    return coordinator


def open_coordinator(root: Path) -> Coordinator:
    """Open a finished folder.

    Raises:
        ServerFolderInvalid: it is none, or ``server.toml`` has faults.
    """
    root = root.absolute()
    if not (root / SERVER_FILE).is_file():
        raise ServerFolderInvalid(
            f"{root} is not a coordinator's folder.",
            why=f"It has no {SERVER_FILE}.",
            remedy="Name another with --dir, or create it: "
            f"cloister server init {shlex.quote(str(root))} --address HOST:PORT",
        )
    return Coordinator(root, _parse(read_text(root / SERVER_FILE)))


def publish_roster(coordinator: Coordinator, registry: Registry) -> None:
    """Sign a roster of the approved sites, if it is not the one in force. Can be repeated.

    Only while ``Coordinator.deciding`` is held.
    """
    approved = {site.name: site.identity for site in registry.sites() if site.state == "approved"}
    coordinator.federation().enrol(coordinator.file.federation.name, approved)


def certify_server(coordinator: Coordinator, authority: Authority, *, anew: bool = False) -> bool:
    """Write the server's chain (its certificate and the authority's); whether it was written.

    The server's key stays, and the chain is one file, so whenever this is killed, the server has a
    certificate for its key. One that still serves is left as it is, unless it is to be made
    ``anew``.
    """
    path = coordinator.keys / SERVER_CERTIFICATE
    hosts = coordinator.file.hosts
    if path.exists() and not anew:
        held = x509.load_pem_x509_certificates(read_secret(path))
        if not needs_renewal(held[0], hosts, authority):
            return False
    key = ec_keys.load_private(read_secret(coordinator.keys / SERVER_KEY), Purpose.TLS)
    certificate = authority.server_certificate(key.public_key(), hosts)
    write_atomic(path, pem(certificate) + pem(authority.certificate))
    return True


def _parse(text: str) -> ServerFile:
    file, faults = parse(text, ServerFile)
    if file is None:
        listing = "\n".join(f"  {fault}" for fault in faults)
        raise ServerFolderInvalid(f"{SERVER_FILE} has faults:\n{listing}")
    return file


def _bracket(host: str) -> str:
    return f"[{host}]" if ":" in host else host
