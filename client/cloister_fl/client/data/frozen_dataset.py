"""Manifests of frozen training data: every image of a study, its patient and label, signed.

The steward's approval of a study freezes the site's data; each run checks that every image is
still there, from the same bytes and with the same pixels, and looks whether the labels file still
says the same. Images that came later are left out of the study, so a folder that grows disturbs
nobody. Everything in a manifest is a pseudonym, a keyed hash or sealed: it can be kept and shown,
and tells of no patient.
"""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType

from cloister_fl.client.data.patients.units import Decisions, Row
from cloister_fl.client.data.sealed_labels import Cells, Named, open_labels, seal_labels
from cloister_fl.client.dicom.pixels.preprocessing_digest import spec_digest
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site, command_at
from cloister_fl.encoding.canonical_json import canonical_json
from cloister_fl.errors import DataChanged, DataError, FileUnreadable, OptionInvalid
from cloister_fl.membership.identity import verify
from cloister_fl.study.schema import Study
from cloister_fl.system import utc
from cloister_fl.system.files import locked, make_private_dir, write_atomic
from cloister_fl.system.text import counted, is_reason

_LABEL = "cloister/manifest/v1"
_VERSION = 3
_SHOWN = 20
_AGAIN = "freeze STUDY --again --why '...'"


@dataclass(frozen=True, order=True, slots=True)
class Item:
    """One image; hexadecimal digits throughout.

    Attributes:
        image: its pseudonym within the study, 32 digits.
        patient: the patient's pseudonym within the study, 64 digits.
        file: keyed hash of the file's content.
        pixels: keyed hash of the stored pixels and their meaning.
        label: keyed hash of the label.
    """

    image: str
    patient: str
    file: str
    pixels: str
    label: str


@dataclass(frozen=True)
class Manifest:
    """A frozen cohort.

    Attributes:
        study: ``Study.digest``.
        spec: ``spec_digest`` of what is made of the files.
        time: when it was frozen.
        items: the images.
        segmentations: keyed hashes of the files that the masks came from.
        patients: by which patients were told apart.
        labels: what the images were labelled with; see ``sealed_labels``.
    """

    study: str
    spec: str
    time: str
    items: tuple[Item, ...]
    segmentations: tuple[str, ...] = ()
    patients: Decisions = field(default_factory=Decisions)
    labels: str = ""

    @property
    def contents(self) -> frozenset[bytes]:
        """Keyed hashes of all files, 32 bytes each."""
        files = (*(one.file for one in self.items), *self.segmentations)
        return frozenset(map(bytes.fromhex, files))

    @property
    def images(self) -> frozenset[tuple[str, str]]:
        """Pseudonyms of the images and their patients: two patients may have an image each under
        one UID."""
        return frozenset((one.image, one.patient) for one in self.items)

    def body(self, site: str) -> bytes:
        """The canonical JSON that is signed."""
        return canonical_json({"version": _VERSION, "site": site, **asdict(self)}).encode()

    def digest_at(self, site: str) -> str:
        """SHA-256 of the body, 64 digits: what the audit log names it by."""
        return hashlib.sha256(self.body(site)).hexdigest()


def item_of(
    key: bytes,
    study: str,
    *,
    sop_instance: str,
    patient: str,
    content: bytes,
    pixels: str,
    label: str | None,
) -> Item:
    """Describe one image.

    Args:
        key: the site's pseudonym key.
        study: ``Study.digest``.
        sop_instance: SOP Instance UID.
        patient: the patient's pseudonym.
        content: keyed hash of the file's content.
        pixels: ``Facts.pixels``.
        label: ``Task.token`` of the record, or None.
    """

    image = image_name(key, study, sop_instance)
    # With the image: equal labels of two images must not have equal hashes.
    return Item(
        image,
        patient,
        content.hex(),
        _keyed(key, "pixels", study, pixels),
        _keyed(key, "label", study, image, str(label)),
    )


def image_name(key: bytes, study: str, sop_instance: str) -> str:
    """An image's pseudonym within a study, 32 hexadecimal digits."""
    return _keyed(key, "image", study, sop_instance)[:32]


def _keyed(key: bytes, *words: str) -> str:
    message = bytearray()
    for word in (_LABEL, *words):
        data = word.encode("utf-8", "surrogatepass")
        message += len(data).to_bytes(8, "big") + data
    return hmac.new(key, bytes(message), hashlib.sha256).hexdigest()


def load(site: Site, study: Study) -> Manifest | None:
    """The site's manifest of a study, or None where it is not frozen.

    Raises:
        DataChanged: it is not this site's, not of this study, was altered, or is not the one that
            the audit log names.
        FileUnreadable: it cannot be read.
    """
    noted = _noted(site, study)
    try:
        text = path_of(site, study).read_bytes()
    except FileNotFoundError:
        if noted is not None:
            raise _altered(site) from None
        return None
    except OSError:
        raise FileUnreadable(
            "The study's manifest cannot be read.", remedy="Check the permissions of 'manifests'."
        ) from None
    try:
        told = json.loads(text)
        signature = bytes.fromhex(told["signature"])
        body = told["body"]
        items = tuple(Item(**one) for one in body["items"])
        files = tuple(str(one) for one in body["segmentations"])
        if body["version"] in {1, 2}:
            raise _older(site, "keeps labels")
        told_apart = body["patients"]
        patients = Decisions(
            told_apart["settings"], tuple(Row(**row) for row in told_apart["rows"])
        )
        manifest = Manifest(
            body["study"], body["spec"], body["time"], items, files, patients, body["labels"]
        )
        # Every hash has the form of one.
        _ = manifest.contents
        canonical = manifest.body(site.name)
        sound = json.loads(canonical) == body and manifest.study == study.digest
    except (ValueError, KeyError, TypeError, AttributeError):
        raise _altered(site) from None
    if not sound or not verify(site.identity().public, signature, _LABEL, canonical):
        raise _altered(site)
    if noted is None:
        _note(site, manifest, "")
    elif noted != hashlib.sha256(canonical).hexdigest():
        # An older one, put back.
        raise _altered(site)
    if manifest.spec != spec_digest(study.input, study.task.segment_read):
        raise _older(site, "preprocesses images")
    return manifest


@contextmanager
def alone(site: Site) -> Iterator[None]:
    """One freezing at a time at a site, whoever else freezes."""
    with locked(site.root / "manifests.lock"):
        yield


def _noted(site: Site, study: Study) -> str | None:
    """SHA-256 of the manifest that the audit log names last, or None."""
    named = [
        str(entry.body.get("sha256"))
        for entry in log_of(site).entries()
        if entry.kind == "frozen" and entry.body.get("study") == study.digest
    ]
    return named[-1] if named else None


def freeze(
    site: Site,
    study: Study,
    items: Iterable[Item],
    *,
    segmentations: Iterable[bytes] = (),
    cells: Mapping[Named, Cells] = MappingProxyType({}),
    patients: Decisions | None = None,
    undecided: int = 0,
    why: str = "",
) -> Manifest:
    """Sign and keep what a study is trained on from now on, and say so in the audit log.

    The log comes last: after a kill between the two the first manifest counts all the same
    (``load`` notes it), and one that was to replace another does not.

    Args:
        site: the opened site.
        study: the study.
        items: its images.
        segmentations: contents of the segmentations that mark them.
        cells: their labels, by pseudonym of image and patient.
        patients: by which patients were told apart.
        undecided: how many sets of patients may be one, and were not decided; for the log.
        why: why another manifest is replaced; empty for the first.

    Raises:
        OutputInTheWay, AuditLogDamaged: it cannot be kept.
    """
    now = utc.timestamp()
    spec = spec_digest(study.input, study.task.segment_read)
    files = tuple(sorted(one.hex() for one in segmentations))
    patients = patients or Decisions()
    labels = seal_labels(site.pseudonym_key(), study.digest, cells)
    manifest = Manifest(study.digest, spec, now, tuple(sorted(items)), files, patients, labels)
    body = manifest.body(site.name)
    path = path_of(site, study)
    make_private_dir(path.parent)
    signature = site.identity().sign(_LABEL, body).hex()
    text = json.dumps({"body": json.loads(body), "signature": signature}, indent=0)
    write_atomic(path, text.encode())
    _note(site, manifest, why, undecided)
    return manifest


def labels_of(site: Site, manifest: Manifest) -> dict[Named, Cells]:
    """What the images were labelled with, by pseudonym of image and patient.

    Raises:
        DataChanged: the labels cannot be opened with the site's key.
    """
    try:
        return open_labels(site.pseudonym_key(), manifest.study, manifest.labels)
    except ValueError:
        raise _altered(site) from None


def is_frozen(site: Site, study: Study) -> bool:
    """Whether there is a manifest of the study, or the audit log says that there was one."""
    return path_of(site, study).exists() or _noted(site, study) is not None


def _note(site: Site, manifest: Manifest, why: str, undecided: int | None = None) -> None:
    patients = manifest.patients
    log_of(site).append(
        "frozen",
        study=manifest.study,
        images=len(manifest.items),
        patients=patients.digest,
        decided=patients.words,
        mapped=len(patients.rows),
        undecided=undecided,
        sha256=manifest.digest_at(site.name),
        why=why,
    )
    # At once: a line at the end that nothing signs could be cut off.
    log_of(site).sign()


def require_reason(why: str) -> None:
    """See that a person says why a manifest is replaced.

    Raises:
        OptionInvalid: no reason is given, it has several lines, or more than 500 characters.
    """
    if not is_reason(why):
        raise OptionInvalid(
            "This study is frozen already.",
            why="With other data, the training set of the study would change.",
            remedy="Give a reason for freezing it again, one line of at most 500 characters: "
            "--again --why '...'. It is written to the audit log: name no patient.",
        )


def differences(
    manifest: Manifest,
    items: Sequence[Item],
    damaged: Iterable[str] = (),
    elsewhere: Collection[str] = (),
    *,
    root: Path | None = None,
) -> list[DataError]:
    """See whether the frozen images are there, and unchanged.

    Args:
        manifest: what was frozen.
        items: what is there now; what was not frozen is of no concern.
        damaged: pseudonyms of images whose cached pixels did not bear their seal.
        elsewhere: pseudonyms of frozen images that another patient has now.
        root: the site folder, for the command of the remedy.

    Returns:
        Nothing, or one ``DataChanged`` that names the images that differ, by pseudonym.
    """
    now: Mapping[tuple[str, str], Item] = {(one.image, one.patient): one for one in items}
    spoiled = set(damaged)
    found: dict[Item, str] = {}
    for frozen in manifest.items:
        differs = _difference(frozen, now.get((frozen.image, frozen.patient)), elsewhere)
        if not differs and frozen.image in spoiled:
            differs = "its cached pixels were altered"
        if differs:
            found[frozen] = differs
    if not found:
        return []
    told = [
        f"\n  image {one.image[:12]} of patient {one.patient[:12]}: {differs}"
        for one, differs in found.items()
    ]
    more = f"\n  and {len(found) - _SHOWN} more" if len(found) > _SHOWN else ""
    return [
        DataChanged(
            f"{len(found)} of {counted(len(manifest.items), 'image')} changed since the study was "
            f"frozen:{''.join(told[:_SHOWN])}{more}\n",
            remedy="Restore the files or the labels. Cached pixels were decoded again: run again. "
            f"If the change is intended: {command_at(root, _AGAIN)}",
        ).about((one.image[:12], one.patient[:12]) for one in found)
    ]


def _difference(frozen: Item, now: Item | None, elsewhere: Collection[str]) -> str:
    if now is None and frozen.image in elsewhere:
        return "it belongs to another patient"
    if now is None:
        return "it is missing or rejected"
    if now.pixels != frozen.pixels:
        return "its pixels changed"
    if now.label != frozen.label:
        return "its label changed"
    if now.file != frozen.file:
        return "its file changed, its pixels did not"
    return ""


def patients_in(manifest: Manifest) -> int:
    """How many patients are frozen."""
    return len({one.patient for one in manifest.items})


def path_of(site: Site, study: Study) -> Path:
    """Where the manifest lies."""
    return site.root / "manifests" / f"{study.digest}.json"


def _older(site: Site, what: str) -> DataError:
    return DataChanged(
        f"The study was frozen by a version of Cloister that {what} differently.",
        remedy=f"Install that version; or freeze the study again: {site.command(_AGAIN)}",
    )


def _altered(site: Site) -> DataError:
    return DataChanged(
        "The study's manifest does not match this site's signature or audit log.",
        remedy="Restore it from the site's backup. When the study was frozen: "
        f"{site.command('audit')}. To freeze it again: {site.command(_AGAIN)}",
    )
