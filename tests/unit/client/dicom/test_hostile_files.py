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
from pydicom.uid import ExplicitVRLittleEndian, JPEG2000Lossless, JPEGLSLossless

from cloister_fl.client.dicom import acceptance
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.sandbox import worker_process
from cloister_fl.client.dicom.sandbox.pool import Pool
from cloister_fl.client.dicom.size_limits import WALL_SECONDS
from cloister_fl.client.dicom.transfer_syntaxes import TRANSFER_SYNTAXES
from cloister_fl.errors import Reject
from cloister_fl.study.schema import Input
from support.dicom import make_dicom, radiograph, sample
from support.hostile_dicom import Hostile, bombs, corpus, precinct_bomb

pytestmark = pytest.mark.process


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


def _wrong(pool: Pool, files: Iterator[Hostile]) -> list[tuple[str, Reject | None]]:
    ends = [(hostile, _end(pool, hostile.data)) for hostile in files]
    assert _end(pool, SOUND) is None
    return [(hostile.name, end) for hostile, end in ends if end not in hostile.ends]


def test_each_hostile_file_ends_as_it_must(pool: Pool) -> None:
    assert _wrong(pool, corpus()) == []


@pytest.mark.slow
def test_a_bomb_of_each_coding_is_an_image_or_a_code(
    pool: Pool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Some would take the whole time that they may; the test has less of it.
    monkeypatch.setattr(worker_process, "WALL_SECONDS", 1)
    assert _wrong(pool, bombs()) == []


@pytest.mark.slow
def test_names_of_the_corpus_are_told_apart() -> None:
    names = Counter(hostile.name for hostile in corpus())
    assert max(names.values()) == 1
    assert len(names) > 150


@pytest.mark.slow
def test_the_precinct_bomb_needs_its_limit(pool: Pool) -> None:
    bomb = precinct_bomb()
    assert acceptance.precheck(bomb.data, SPEC.modalities), "a check before decoding stops it"
    assert len(bomb.data) < 2000
    before = _resident()
    assert _end(pool, bomb.data) in bomb.ends
    assert _resident() - before < 64 << 20
    assert _end(pool, SOUND) is None


@pytest.mark.parametrize(
    "syntax",
    [
        ExplicitVRLittleEndian,
        JPEGLSLossless,
        pytest.param(JPEG2000Lossless, marks=pytest.mark.slow),
    ],
)
def test_the_largest_mammograms_are_read(
    pool: Pool, syntax: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # By the clock it depends on who else is at work; what it may compute and hold stays as it is.
    monkeypatch.setattr(worker_process, "WALL_SECONDS", 60)
    image = np.tile(radiograph(3, 1024, 1024), (6, 5))[:5928, :4728]
    assert _end(pool, make_dicom(image, bits_stored=12, transfer_syntax=syntax)) is None


@cache
def _seeds() -> tuple[tuple[bytes, ...], tuple[bytes, ...]]:
    """Files whose undamaged form is turned away before decoding, and files that are read."""
    # Not through pydicom's own function, which downloads what is not there.
    found = sorted((Path(pydicom.__file__).parent / "data" / "test_files").rglob("*"))
    there = [path.read_bytes() for path in found if path.is_file()]
    dicom = [data for data in there if data[128:132] == b"DICM" and len(data) < 300_000]
    assert len(dicom) > 50
    own = []
    for syntax in sorted(TRANSFER_SYNTAXES):
        image, bits = sample(syntax)
        own.append(make_dicom(image, bits_stored=bits, transfer_syntax=syntax))
    sound = tuple(data for data in (*dicom, *own) if _passes(data))
    assert len(sound) > len(own) + 5
    return tuple(data for data in dicom if not _passes(data)), sound


def _passes(data: bytes) -> bool:
    try:
        acceptance.precheck(data, SPEC.modalities)
    except RejectedFile:
        return False
    return True


def _mutated(number: int) -> bytes:
    """Damage number ``number``: bytes changed, cut out, doubled, or a number that lies."""
    rng = np.random.default_rng(number)
    turned_away, sound = _seeds()
    # Two of three spare the structure and hit the pixels, which are the end of a file.
    deep = rng.integers(3) > 0
    seeds = sound if deep else (*turned_away, *sound)
    data = bytearray(seeds[int(rng.integers(len(seeds)))])
    first, end = (len(data) // 2, len(data) - 12) if deep else (132, len(data))
    for _ in range(int(rng.integers(1, 6))):
        at, size = int(rng.integers(first, end)), int(rng.integers(1, 13))
        kind = int(rng.integers(4 if deep else 6))
        if kind <= 1:
            data[at] ^= 1 << int(rng.integers(8))
        elif kind == 2:
            data[at : at + size] = rng.bytes(size)
        elif kind == 3:
            data[at : at + 4] = (b"\xff\xff\xff\xff", b"\0\0\0\0", b"\xff\xff\xff\x7f")[size % 3]
        elif kind == 4:
            data[at:at] = data[at : at + size]
        else:
            del data[at : at + size]
            end = max(first + 1, end - size)
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


@pytest.mark.slow
def test_damage_ends_the_same_way_each_time(pool: Pool) -> None:
    for number in range(40):
        assert _end(pool, _mutated(number)) is _end(pool, _mutated(number))
