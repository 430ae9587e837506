"""Encrypted store of files fetched from a PACS: nothing plain comes to lie on the disk.

One file an instance, named by a keyed hash of its SOP Instance UID, sealed with AES-256-GCM under a
key of its own, and bound to its name. It is written whole or not at all, so a fetch that was killed
goes on with what is missing.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand

from cloister_fl.client.dicom.file_finder import Found, read_file
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.size_limits import MAX_FILE_BYTES
from cloister_fl.encoding.framing import frame
from cloister_fl.errors import Reject
from cloister_fl.system.files import make_private_dir, write_atomic

_FORMAT = b"cloister/store/v1\0"
_NONCE_BYTES = 12
_TAG_BYTES = 16


Listed: TypeAlias = tuple[str, str, str]
"""UIDs of study, series and instance, as the archive lists an image. All three: an archive may list
one instance under two patients, and neither may keep the other's out."""


class Store:
    """The store of one site.

    Args:
        folder: where the files lie; made with mode 0700 at the first ``put``.
        key: the site's cache key, 32 bytes; the keys in use are derived from it.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        self._folder = folder
        self._cipher = AESGCM(_derive(key, b"files"))
        self._name_key = _derive(key, b"names")

    def __contains__(self, listed: Listed) -> bool:
        return (self._folder / self._name(listed)).is_file()

    def put(self, listed: Listed, data: bytes) -> None:
        """Keep a file's bytes, in place of what was kept of the same image of the archive.

        Raises:
            RejectedFile: ``TOO_LARGE``.
            OutputInTheWay: it cannot be written.
        """
        if len(data) > MAX_FILE_BYTES - _NONCE_BYTES - _TAG_BYTES:
            raise RejectedFile(Reject.TOO_LARGE)
        make_private_dir(self._folder)
        name = self._name(listed)
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, data, _FORMAT + name.encode())
        write_atomic(self._folder / name, sealed)

    def items(self) -> Sequence[Stored]:
        """Every file, ordered by its name."""
        if not self._folder.is_dir():
            return ()
        names = sorted(path.name for path in self._folder.iterdir() if len(path.name) == 64)
        return [Stored(self._folder / name, self._cipher) for name in names]

    def _name(self, listed: Listed) -> str:
        return hmac.new(self._name_key, frame(*map(str.encode, listed)), hashlib.sha256).hexdigest()


@dataclass(frozen=True)
class Stored:
    """One sealed file, as ``read_folder`` takes it."""

    path: Path
    cipher: AESGCM = field(repr=False, compare=False)
    reason: Reject | None = None

    @property
    def name(self) -> bytes:
        """What tells it from every other file of the site."""
        return b"store/" + self.path.name.encode()

    def read(self) -> bytes:
        """The file's bytes.

        Raises:
            RejectedFile: ``UNREADABLE``, also where the seal does not hold.
        """
        sealed = read_file(self.path)
        try:
            return self.cipher.decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _FORMAT + self.path.name.encode()
            )
        except (InvalidTag, ValueError):
            raise RejectedFile(Reject.UNREADABLE) from None

    def stamp(self) -> str:
        """See ``file_finder.Found.stamp``."""
        return Found(self.path, self.name).stamp()


def _derive(key: bytes, purpose: bytes) -> bytes:
    return HKDFExpand(algorithm=SHA256(), length=32, info=_FORMAT + purpose).derive(key)
