"""Site folder of a hospital: its file, its keys, and where its data and records lie.

::

    site.toml        what a person wrote: name, data, policy
    keys/            identity.pem (Ed25519), pseudonym.key, cache.key; mode 0700 and 0600
    cache/           preprocessed images, encrypted
    store/           files that were fetched from an archive, encrypted
    index.sqlite     which files did not change; can be lost
    quarantine.json  decisions on quarantined files: released, or kept
    manifests/       what each study was frozen with, signed
    audit/           the signed log of what left the site
    ledger.sqlite    what privacy was spent

Keys are made once: another pseudonym key would make other patients of the same people. The identity
is replaced only where it is lost, with an invite for that, see ``network.new_keys``; the keys of
the node are renewed, see ``network.renewal``.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import shlex
from dataclasses import dataclass, field
from pathlib import Path

from cloister_fl.client.site.archive_settings import CGet, DicomWeb, Query
from cloister_fl.client.site.label_settings import LabelSettings
from cloister_fl.client.site.patient_settings import PatientSettings
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.settings import Network, SiteFile
from cloister_fl.client.site.template import site_text
from cloister_fl.errors import FileUnreadable, IdentityInvalid, OptionInvalid, SiteFileInvalid
from cloister_fl.membership.identity import Identity
from cloister_fl.system.files import create_secret, make_private_dir, read_secret
from cloister_fl.system.git_ignore import keep_out_of_git
from cloister_fl.system.toml import parse, read_text

SITE_FILE = "site.toml"
IDENTITY = "identity.pem"
PSEUDONYM_KEY = "pseudonym.key"
CACHE_KEY = "cache.key"
KEY_BYTES = 32
LEDGER = "ledger.sqlite"
THROWAWAY = "throwaway"
"""A file that says that the site was made for a simulation; the machine's registry of ledgers
leaves it out."""
_COORDINATORS_FILE = "server.toml"

_PSEUDONYM_LABEL = b"cloister/pseudonym/v1\0"
_NAME = re.compile(r"[a-z0-9][a-z0-9-]{0,62}")


@dataclass(frozen=True)
class Site:
    """An opened site.

    Attributes:
        root: the site folder, absolute.
        name: the site's name in the federation.
        dicom: folder of the images; need not exist yet.
        labels: the labels file; need not exist yet.
        policy: what the hospital allows.
        network: the way out of the hospital; see ``proxy``.
        health: HOST:PORT on loopback of the service's health; port 0 takes a free one.
        archive: where images are fetched from, or None; see ``archive_settings``.
        query: which of them.
        patients: what makes two patient numbers one patient's.
        label_settings: how the labels file is read.
        left_out_at_most: of images and of rows of labels, the share in percent that may not fit
            each other when data are frozen; None where all must.
    """

    root: Path
    name: str
    dicom: Path
    labels: Path
    policy: Policy
    network: Network
    health: str = "127.0.0.1:0"
    archive: DicomWeb | CGet | None = None
    query: Query = field(default_factory=Query)
    patients: PatientSettings = field(default_factory=PatientSettings)
    label_settings: LabelSettings = field(default_factory=LabelSettings)
    left_out_at_most: float | None = None

    @property
    def store(self) -> Path:
        """Folder of the files that were fetched from the archive, sealed."""
        return self.root / "store"

    @property
    def ledger(self) -> Path:
        """The privacy ledger."""
        return self.root / LEDGER

    @property
    def cache(self) -> Path:
        """Folder of the encrypted, preprocessed images."""
        return self.root / "cache"

    @property
    def audit(self) -> Path:
        """Folder of the signed logs."""
        return self.root / "audit"

    @property
    def roster(self) -> Path:
        """The roster that the steward accepted; see ``trusted_roster``."""
        return self.root / "roster.pin"

    @property
    def keys(self) -> Path:
        """Folder of the site's secrets."""
        return self.root / "keys"

    def command(self, words: str) -> str:
        """Return ``cloister client WORDS`` for this site, to be pasted into a shell."""
        return command_at(self.root, words)

    def pseudonym_key(self) -> bytes:
        """Return the 32 bytes that pseudonyms are made with; see ``read_secret``."""
        return _raw_key(self.keys / PSEUDONYM_KEY)

    def cache_key(self) -> bytes:
        """Return the 32 bytes that the cache is encrypted with; see ``read_secret``."""
        return _raw_key(self.keys / CACHE_KEY)

    def identity(self) -> Identity:
        """Return the key that the site signs with; see ``read_secret``."""
        return _identity(self.keys / IDENTITY)


def command_at(root: Path | None, words: str) -> str:
    """Return ``cloister client WORDS`` for the site folder ``root``, or for FOLDER if unknown."""
    return f"cloister client {words} --dir {'FOLDER' if root is None else shlex.quote(str(root))}"


def init_site(
    root: Path,
    *,
    name: str | None = None,
    dicom: Path | str | None = None,
    labels: Path | str | None = None,
    policy: Policy | None = None,
    network: Network | None = None,
    throwaway: bool = False,
) -> Site:
    """Create what a site folder lacks, and open it.

    Nothing that is there is replaced, so it can be repeated and can mend an interrupted one. The
    arguments only shape a ``site.toml`` that is created now.

    Args:
        root: the site folder; created with mode 0700 if it is missing.
        name: the site's name; else made from the folder's.
        dicom: folder of the images, relative to ``root`` or absolute.
        labels: labels file, relative to ``root`` or absolute.
        policy: what to write as the policy; else the defaults.
        network: what to write as the way out of the hospital; else a direct one.
        throwaway: whether the site is made for a simulation; see ``THROWAWAY``.

    Raises:
        OptionInvalid: the name or a path cannot be written to a site file.
        OutputInTheWay: the folder or a file cannot be created.
        SiteFileInvalid, FileUnreadable: what was there cannot be used; see ``open_site``.
    """
    root = root.absolute()
    text = _site_toml(
        name if name is not None else _name_from(root),
        str(dicom) if dicom is not None else "dicom",
        str(labels) if labels is not None else "labels.csv",
        policy or Policy(),
        network or Network(),
    )
    if (root / _COORDINATORS_FILE).exists():
        raise OptionInvalid(
            f"{root} is a coordinator's folder.",
            why="A site and a coordinator keep different keys under the same names.",
            remedy="Name another folder: cloister client init FOLDER",
        )
    if not root.is_dir():
        make_private_dir(root)
    keep_out_of_git(root)
    for folder in ("keys", "cache", "audit"):
        make_private_dir(root / folder)
    # Also where a person's own .gitignore lies above.
    keep_out_of_git(root / "keys")
    create_identity(root)
    create_secret(root / "keys" / PSEUDONYM_KEY, secrets.token_bytes(KEY_BYTES))
    create_secret(root / "keys" / CACHE_KEY, secrets.token_bytes(KEY_BYTES))
    if throwaway:
        create_secret(root / THROWAWAY, b"")
    # Last: a folder with a site file is a finished one.
    create_secret(root / SITE_FILE, text.encode())
    return open_site(root)


def create_identity(root: Path) -> None:
    """Make the identity of a site folder, unless it has one; raises as ``create_secret``."""
    create_secret(root / "keys" / IDENTITY, Identity.generate().to_pem())


def open_site(root: Path) -> Site:
    """Read a site folder and check its keys.

    Raises:
        SiteFileInvalid: ``site.toml`` has faults; all of them are listed.
        FileUnreadable: ``site.toml`` or a key is missing, cannot be read, or is no secret.
    """
    root = root.absolute()
    file = _parse_site(read_text(root / SITE_FILE))
    site = Site(
        root=root,
        name=file.site.name,
        dicom=root / file.data.dicom,
        labels=root / file.data.labels.file,
        policy=file.policy,
        network=file.network,
        health=file.service.health,
        archive=file.data.dicomweb or file.data.cget,
        query=file.data.query,
        patients=file.data.patients,
        label_settings=file.data.labels,
        left_out_at_most=None if file.data.on_mismatch == "refuse" else file.data.left_out_at_most,
    )
    site.pseudonym_key()
    site.cache_key()
    site.identity()
    return site


def require_as_written(
    site: Site,
    *,
    name: str | None = None,
    dicom: Path | str | None = None,
    labels: Path | str | None = None,
    network: Network | None = None,
    patients_at_most: int | None = None,
) -> None:
    """Refuse options that shape a new ``site.toml``, where the one that is there says otherwise.

    Args:
        site: the site as it is.
        name, dicom, labels, network: as of ``init_site``; None where they were not given.
        patients_at_most: as of ``Policy``, likewise.

    Raises:
        OptionInvalid: see above.
    """
    if network is not None and site.network != network:
        raise OptionInvalid(
            f"{site.root / SITE_FILE} exists, and names another proxy or user.",
            remedy="Write them there, below [network], and leave out --proxy and --proxy-user.",
        )
    for given, is_written, table, key in (
        (name, name == site.name, "site", "name"),
        (dicom, site.root / (dicom or "") == site.dicom, "data", "dicom"),
        (labels, site.root / (labels or "") == site.labels, "data", "labels"),
        (
            patients_at_most,
            patients_at_most == site.policy.patients_at_most,
            "policy",
            "patients_at_most",
        ),
    ):
        if given is not None and not is_written:
            raise OptionInvalid(
                f"{site.root / SITE_FILE} exists, and its {key} is another one.",
                remedy=f"Write it there, at '{key}' below [{table}], and leave "
                f"--{key.replace('_', '-')} out.",
            )


def pseudonym(key: bytes, study_digest: str, *unit: str) -> str:
    """Name a patient within one study at one site.

    HMAC-SHA-256 over a label and the fields, each behind its length in 8 bytes, so that no two
    lists share an encoding. Without the site's key it can be neither reversed nor recomputed;
    another study gives another name to the same patient.

    Args:
        key: the site's pseudonym key, 32 bytes.
        study_digest: ``Study.digest``.
        unit: what stands for the patient, such as Issuer of Patient ID (0010,0021), which may be
            empty, and Patient ID (0010,0020); see ``data.patients.units``.

    Returns:
        64 hexadecimal digits.
    """
    message = bytearray(_PSEUDONYM_LABEL)
    for word in (study_digest, *(word.strip() for word in unit)):
        data = word.encode("utf-8", "surrogatepass")
        message += len(data).to_bytes(8, "big") + data
    return hmac.new(key, bytes(message), hashlib.sha256).hexdigest()


def _parse_site(text: str) -> SiteFile:
    file, faults = parse(text, SiteFile)
    if file is None:
        raise SiteFileInvalid.of(SITE_FILE, faults)
    return file


def _raw_key(path: Path) -> bytes:
    key = read_secret(path)
    if len(key) != KEY_BYTES:
        raise FileUnreadable(
            f"{path.name} does not hold {KEY_BYTES} bytes.",
            remedy="Restore it from the site's backup.",
        )
    return key


def _identity(path: Path) -> Identity:
    try:
        return Identity.from_pem(read_secret(path))
    except IdentityInvalid:
        raise FileUnreadable(
            f"{path.name} is not an Ed25519 private key.",
            remedy="Restore it from the site's backup.",
        ) from None


def _name_from(root: Path) -> str:
    """Make a valid site name from a folder's."""
    words = re.findall(r"[a-z0-9]+", root.name.lower())
    return "-".join(words)[:63].strip("-") or "site"


def _site_toml(name: str, dicom: str, labels: str, policy: Policy, network: Network) -> str:
    if not _NAME.fullmatch(name):
        raise OptionInvalid(
            f"The site name {name!r} cannot be used.",
            remedy="Use lower-case letters, digits and hyphens, at most 63.",
        )

    text = site_text(name, dicom, labels, policy, network)
    try:
        text.encode()
        _parse_site(text)
    except (UnicodeEncodeError, SiteFileInvalid):
        raise OptionInvalid(
            "The data paths cannot be written to a site file.",
            remedy="Use paths of at most 4096 characters that are valid UTF-8.",
        ) from None
    return text
