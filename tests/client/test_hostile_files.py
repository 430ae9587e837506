"""Hostile and damaged files: each ends as an image or a code, and the reader lives and stays small.

The mutations are drawn from the files that pydicom brings along, and from our own in every coding;
they are the same on every run.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import numpy as np
import pydicom
import pytest

from cloister_client.dicom import precheck
from cloister_client.dicom.bounds import WALL_SECONDS
from cloister_client.dicom.pool import Pool
from cloister_client.dicom.reject import RejectedFile
from cloister_common.errors import Reject
from cloister_common.study import Input
from dicom_files import make_dicom, radiograph
from hostile_files import Hostile, corpus, precinct_bomb

SPEC = Input(size=32, modalities=("CR", "DX", "MG", "CT", "MR"))
SOUND = make_dicom()
GROWTH_BYTES = 1 << 30
START_SECONDS = 5.0
"""What the start of a replacement may add, on a busy machine."""


@pytest.fixture(scope="module")
def pool() -> Iterator[Pool]:
    made = Pool(1)
    yield made
    made.close()


@pytest.fixture(scope="module", autouse=True)
def stays_small() -> Iterator[None]:
    before = _resident()
    yield
    assert _resident() - before < GROWTH_BYTES


def _resident() -> int:
    """The most memory that this process ever held, in bytes."""
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split("kB")[0]) * 1024


def _end(pool: Pool, data: bytes) -> Reject | None:
    start = time.monotonic()
    try:
        _, image = pool.submit(data, SPEC).result()
    except RejectedFile as rejected:
        return rejected.reason
    finally:
        assert time.monotonic() - start < WALL_SECONDS + START_SECONDS
    assert (image.shape, image.dtype) == ((32, 32), np.uint16)
    return None


def test_each_hostile_file_ends_as_it_must(pool: Pool) -> None:
    wrong = []
    for hostile in corpus():
        end = _end(pool, hostile.data)
        if end not in hostile.ends:
            wrong.append((hostile.name, end))
    assert wrong == []
    assert _end(pool, SOUND) is None


def test_names_of_the_corpus_are_told_apart() -> None:
    names = Counter(hostile.name for hostile in corpus())
    assert max(names.values()) == 1
    assert len(names) > 150


def test_the_precinct_bomb_needs_its_limit(pool: Pool) -> None:
    bomb = precinct_bomb()
    assert precheck.precheck(bomb.data, SPEC.modalities), "a check before decoding stops it"
    assert len(bomb.data) < 2000
    before = _resident()
    assert _end(pool, bomb.data) in bomb.ends
    assert _resident() - before < 64 << 20
    assert _end(pool, SOUND) is None


def test_the_largest_mammograms_are_read(pool: Pool) -> None:
    image = np.tile(radiograph(3, 1024, 1024), (6, 5))[:5928, :4728]
    for syntax in (precheck.EXPLICIT_LITTLE, precheck.JPEG_2000_LOSSLESS):
        assert _end(pool, make_dicom(image, bits_stored=12, transfer_syntax=syntax)) is None


@cache
def _seeds() -> tuple[bytes, ...]:
    # Not through pydicom's own function, which downloads what is not there.
    found = sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*"))
    there = [path.read_bytes() for path in found if path.is_file()]
    dicom = [data for data in there if data[128:132] == b"DICM" and len(data) < 300_000]
    assert len(dicom) > 50
    own = []
    for syntax in sorted(precheck.TRANSFER_SYNTAXES):
        image, bits = radiograph(), 12
        if syntax == precheck.JPEG_BASELINE:
            image, bits = (image >> 4).astype(np.uint8), 8
        own.append(make_dicom(image, bits_stored=bits, transfer_syntax=syntax))
    # Of pydicom's files few pass the checks; ours reach the decoders, so each counts more.
    return (*dicom, *(own * 4))


def _mutated(number: int) -> bytes:
    """Damage number ``number``: bytes changed, cut out, doubled, or a number that lies."""
    rng = np.random.default_rng(number)
    seeds = _seeds()
    data = bytearray(seeds[int(rng.integers(len(seeds)))])
    # The pixels of a small file are its end; half of the damage is done there.
    first = len(data) // 2 if rng.integers(2) else 132
    for _ in range(int(rng.integers(1, 9))):
        at = int(rng.integers(min(first, len(data) - 1), len(data)))
        size = int(rng.integers(1, 17))
        kind = int(rng.integers(6))
        if kind <= 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at : at + size] = rng.bytes(size)
        elif kind == 3 and len(data) > 200:
            del data[at : at + size]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        else:
            data[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f")[size % 3]
    return bytes(data)


def _run(pool: Pool, numbers: range) -> Counter[str]:
    """Read damaged files; whatever is no image and no code fails the test by its own exception."""
    ends = Counter(str(_end(pool, _mutated(number))) for number in numbers)
    assert _end(pool, SOUND) is None
    return ends


def test_500_damaged_files(pool: Pool) -> None:
    ends = _run(pool, range(500))
    # Damage that never reaches a decoder would prove nothing of it.
    assert ends["None"] >= 50
    assert ends[str(Reject.DECODE_FAILED)] >= 10
    assert len(ends) >= 6


@pytest.mark.slow
def test_5000_damaged_files(pool: Pool) -> None:
    ends = _run(pool, range(1000, 6000))
    assert ends["None"] >= 500
    assert ends[str(Reject.DECODE_FAILED)] >= 100


def test_damage_ends_the_same_way_each_time(pool: Pool) -> None:
    for number in range(40):
        assert _end(pool, _mutated(number)) is _end(pool, _mutated(number))


def test_hostile_files_are_told_by_name_alone() -> None:
    assert isinstance(next(iter(corpus())), Hostile)
