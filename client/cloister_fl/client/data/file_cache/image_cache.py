"""Encrypted cache of preprocessed images, and of their features, so that each is computed once.

An entry is named by keyed hashes of the file's content and of the preprocessing, so neither a
changed file nor a changed study can find a stale image, and the name tells nothing of the file.
AES-256-GCM binds the content to the name. An entry that was tampered with, cut short or moved is
as good as absent: the file is decoded again, the entry replaced and the event counted.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDFExpand
from numpy.typing import NDArray

from cloister_fl.client.dicom.stored_image import digest_of
from cloister_fl.errors import DataChanged, OutputInTheWay
from cloister_fl.system.files import make_private_dir, write_atomic

_FORMAT = b"cloister/cache/v1\0"
_NONCE_BYTES = 12


class Cache:
    """A folder of encrypted entries; one process may write while others read.

    Args:
        folder: where the entries lie; created with mode 0700.
        key: the site's cache key, 32 bytes; the keys in use are derived from it.

    Attributes:
        misses: entries not found.
        damaged: entries found and refused; they count as misses too.
    """

    def __init__(self, folder: Path, key: bytes) -> None:
        make_private_dir(folder)
        self._folder = folder
        self._cipher = AESGCM(_derive(key, b"entries"))
        self._name_key = _derive(key, b"names")
        self.misses = 0
        self.damaged = 0

    def content(self, data: bytes) -> bytes:
        """Name a file's content, 32 bytes: a keyed hash, of no use to who holds the same file."""
        return self._keyed(b"content\0" + hashlib.sha256(data).digest())

    def name(self, content: bytes, spec: str, *, released: bool = False) -> str:
        """Name the entry of a file of this ``content``.

        Args:
            content: see there.
            spec: digest of what is made of the file, and by which rules, hexadecimal digits.
            released: whether the image is one that a person had to release.
        """
        kind = b"released\0" if released else b"image\0"
        return self._keyed(kind + content + bytes.fromhex(spec)).hex()

    def volume(self, slices: Sequence[bytes], how: bytes) -> str:
        """Name the entry of a volume.

        Args:
            slices: names of the entries of its slices, 32 bytes each, in their order.
            how: what is made of them, and by which rules.
        """
        named = hashlib.sha256(b"".join(slices)).digest() + hashlib.sha256(how).digest()
        return self._keyed(b"volume\0" + named).hex()

    def _keyed(self, message: bytes) -> bytes:
        return hmac.new(self._name_key, message, hashlib.sha256).digest()

    def get(self, name: str) -> tuple[dict[str, str | int], NDArray[np.uint16]] | None:
        """Return the facts and the image (rows, columns) of an entry, or None."""
        plain = self.read(name)
        if plain is None:
            return None
        # What is authentic was written by ``put``, so its form needs no further check.
        end = 4 + int.from_bytes(plain[:4], "big")
        facts = json.loads(plain[4:end])
        image = np.frombuffer(plain, dtype="<u2", offset=end).astype(np.uint16)
        rows = int(facts.pop("side"))
        return facts, image.reshape(rows, -1)

    def put(self, name: str, facts: Mapping[str, str | int], image: NDArray[np.uint16]) -> bool:
        """Write an entry whole; whether it is there. A disk that is full costs memory and time,
        never the run."""
        head = json.dumps({**facts, "side": image.shape[0]}).encode()
        plain = len(head).to_bytes(4, "big") + head + image.astype("<u2").tobytes()
        return self.write(name, plain)

    def feature(self, key: bytes) -> str:
        """Name the entry of features; ``key`` tells of which image, by what, and how."""
        return self._keyed(b"feature\0" + key).hex()

    def read(self, name: str) -> bytes | None:
        """Return what an entry holds, or None where it is not there or does not bear its seal."""
        try:
            sealed = (self._folder / name).read_bytes()
        except OSError:
            self.misses += 1
            return None
        try:
            return self._cipher.decrypt(
                sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], _FORMAT + name.encode()
            )
        except (InvalidTag, ValueError):
            self.damaged += 1
            self.misses += 1
            return None

    def write(self, name: str, plain: bytes) -> bool:
        """Seal and write an entry whole; whether it is there."""
        nonce = secrets.token_bytes(_NONCE_BYTES)
        sealed = nonce + self._cipher.encrypt(nonce, plain, _FORMAT + name.encode())
        try:
            # Not flushed: a torn entry fails its seal, and is made anew.
            write_atomic(self._folder / name, sealed, durable=False)
        except OutputInTheWay:
            return False
        return True

    def image(self, name: str, shades: NDArray[np.uint16]) -> SealedImage:
        """The image of an entry that is there, to be read when it is needed."""
        return SealedImage(self, bytes.fromhex(name), digest_of(shades), shades.shape)


@dataclass(frozen=True, eq=False, slots=True)
class SealedImage:
    """An image that lies in the cache; see ``dicom.stored_image.StoredImage``.

    Attributes:
        cache: where.
        name: its entry, 32 bytes.
        digest: SHA-256 of the shades.
        shape: of the image.
    """

    cache: Cache
    name: bytes = field(repr=False)
    digest: bytes = field(repr=False)
    shape: tuple[int, ...]

    def read(self) -> NDArray[np.uint16]:
        """Read and authenticate the shades.

        Raises:
            DataChanged: the entry is missing, or is not what it was.
        """
        found = self.cache.get(self.name.hex())
        if found is not None and digest_of(found[1]) == self.digest:
            return found[1].reshape(self.shape)
        raise DataChanged(
            "An image in the site's cache is missing, or is not what it was.",
            why="The folder cache/ was changed while its images were in use.",
            remedy="Stop the site's service and start it again: what is missing is made anew from "
            "the files. Nothing but Cloister may write to the folder.",
        )


def _derive(key: bytes, purpose: bytes) -> bytes:
    return HKDFExpand(algorithm=SHA256(), length=32, info=_FORMAT + purpose).derive(key)
