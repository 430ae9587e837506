"""What reading costs, by transfer syntax: our workers beside plain pydicom and MONAI.

    python benchmarks/ingest.py [--rounds N] [--images N] [--side N] [--only UID ...]

Drawn images of 2048 x 2048 in 12 bits (JPEG Baseline: 8 bits), from files in the system's cache to
224 x 224. The contestants take turns, one file each a round; a cost is CPU seconds, the workers'
included, so that what else runs on the machine falls on none of them alone, and a ratio is the
median over the rounds of ratios within a round. A first file of each is not counted.

- workers: the product's ``Pool`` with one worker: check of the whole file, decoding, rescale,
  window, resize; the image comes back through shared memory.
- inside: the same steps in this process, so without isolation.
- pydicom: ``dcmread``, ``pixel_array``, the same steps from there on.
- bare: ``dcmread``, ``pixel_array``, the same resize; no rescale and no window, so another image.
- MONAI: ``LoadImage`` with its ``PydicomReader``, and ``Resize`` by area.

What the workers do and pydicom does not: the check of the whole file, and a hash of the pixels by
which one image under two names is found. pydicom and MONAI have no number where they have no
decoder here: the two forms of JPEG Lossless, and JPEG Extended with 12 bits. RLE they decode with
pylibjpeg-rle where that is installed, which Cloister does not do; else in Python.

Last, an epoch from the cache: 10,000 entries of 224 x 224, in random order, opened and set down as
one array; images a CPU second, the median of three epochs. The disk is asked for about 1 GB.

The last line is JSON. ``isolation_overhead`` is the workers' cost over plain pydicom's, less one,
for all syntaxes that both read, each with the same weight; ``isolation_overhead_worst`` is that of
the worst of them, ``isolation_alone`` the workers' cost over the same steps inside, less one, and
``over_bare`` over the bare resize. ``vs_monai`` is the workers' speed over MONAI's,
``cached_images_per_second`` the speed of the epoch from the cache.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[1]
for part in ("common", "client", "tests"):
    sys.path.insert(0, str(ROOT / part))

import numpy as np  # noqa: E402
import pydicom  # noqa: E402
from numpy.typing import NDArray  # noqa: E402

from cloister_fl.client.data.file_cache.image_cache import Cache  # noqa: E402
from cloister_fl.client.dicom import acceptance  # noqa: E402
from cloister_fl.client.dicom.facts import TEXTS  # noqa: E402
from cloister_fl.client.dicom.file_finder import read_file  # noqa: E402
from cloister_fl.client.dicom.header import Grayscale, PixelLayout  # noqa: E402
from cloister_fl.client.dicom.image import read_image  # noqa: E402
from cloister_fl.client.dicom.pixels.preprocess import area_resize, preprocess  # noqa: E402
from cloister_fl.client.dicom.sandbox.pool import Pool  # noqa: E402
from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES  # noqa: E402
from cloister_fl.study.schema import Input  # noqa: E402
from support.dicom import encode, make_dicom, uid  # noqa: E402

SPEC = Input(size=224, modalities=("DX",))
Contestant = Callable[[Path], object]


def draw(number: int, side: int, bits: int) -> NDArray[np.generic]:
    """A smooth image with the noise of a detector: about 8 grey levels of 4096."""
    rng = np.random.default_rng(number)
    y, x = np.mgrid[0:side, 0:side] / side
    wave = 0.5 + 0.2 * np.sin(9 * y + number) + 0.2 * np.cos(7 * x * (1 + y))
    wave += rng.normal(0, 0.002, wave.shape)
    image = np.rint(np.clip(wave, 0, 1) * ((1 << bits) - 1))
    return image.astype(np.uint8 if bits == 8 else np.uint16)


def write(folder: Path, syntax: str, images: int, side: int) -> list[Path]:
    """Write the files of one transfer syntax."""
    bits = TRANSFER_SYNTAXES[syntax].depth
    paths = []
    for number in range(images):
        pixels = draw(number, side, bits)
        frame = None if syntax in NATIVE else encode(pixels, syntax, bits)
        data = make_dicom(
            pixels,
            bits_stored=bits,
            transfer_syntax=syntax,
            encoded=frame,
            elements={"SOPInstanceUID": uid("benchmark", syntax, number)},
        )
        path = folder / f"{syntax}-{number}.dcm"
        path.write_bytes(data)
        paths.append(path)
    return paths


def workers_seconds() -> float:
    """CPU seconds of the living children of this process."""
    own, total = str(os.getpid()), 0
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            if stat.read_text().rpartition(")")[2].split()[1] != own:
                continue
            for task in stat.parent.glob("task/*/schedstat"):
                total += int(task.read_text().split()[0])
        except (FileNotFoundError, ProcessLookupError):
            continue
    return total / 1e9


def by_workers(pool: Pool) -> Contestant:
    return lambda path: pool.submit(read_file(path), SPEC).result()


def inside(path: Path) -> object:
    return read_image(acceptance.precheck(read_file(path), SPEC.modalities), SPEC)


def by_pydicom(path: Path) -> object:
    read = pydicom.dcmread(path)
    bits = read.BitsStored
    layout = PixelLayout(read.Rows, read.Columns, read.BitsAllocated, bits, bits - 1, False)
    return preprocess(read.pixel_array.astype(np.int32), layout, Grayscale(False), SPEC)


def bare(path: Path) -> object:
    return area_resize(pydicom.dcmread(path).pixel_array, SPEC.size)


def by_monai() -> Contestant:
    from monai.transforms import Compose, LoadImage, Resize

    read = LoadImage(reader="PydicomReader", image_only=True, ensure_channel_first=True)
    return Compose([read, Resize((SPEC.size, SPEC.size), mode="area")])


def seconds(contestant: Contestant, path: Path) -> float:
    # Looking for the workers costs time of this process, which is not counted.
    before = workers_seconds()
    start = time.process_time()
    contestant(path)
    own = time.process_time() - start
    return own + workers_seconds() - before


def can_read(contestant: Contestant, path: Path) -> bool:
    """Read a first file, so that what is loaded once is loaded."""
    try:
        contestant(path)
    except Exception:
        return False
    return True


def compare(
    contestants: dict[str, Contestant], paths: list[Path], rounds: int
) -> dict[str, list[float]]:
    """CPU seconds of each contestant that can read them, in turns."""
    able = {name: one for name, one in contestants.items() if can_read(one, paths[0])}
    took: dict[str, list[float]] = {name: [] for name in able}
    for number in range(rounds):
        for name, contestant in able.items():
            took[name].append(seconds(contestant, paths[number % len(paths)]))
    return took


def ratio(took: dict[str, list[float]], one: str, other: str) -> float | None:
    """Median over the rounds of what one cost over what the other cost."""
    if one not in took or other not in took:
        return None
    return statistics.median(a / b for a, b in zip(took[one], took[other], strict=True))


def mean(ratios: list[float | None]) -> float:
    return statistics.geometric_mean([one for one in ratios if one is not None])


def cached(images: int) -> float:
    """Images a CPU second of an epoch that is read from the cache."""
    rng = np.random.default_rng(1)
    size = SPEC.size
    facts: dict[str, str | int] = {"rows": 2048, "columns": 2048, "pixels": "00" * 32}
    facts |= dict.fromkeys(TEXTS, "1.2.840.113619.2.5.1762583153.215519.978957063.78")
    with tempfile.TemporaryDirectory() as folder:
        cache = Cache(Path(folder), os.urandom(32))
        names = [cache.name(os.urandom(32), "00" * 32) for _ in range(images)]
        for name in names:
            cache.put(name, facts, rng.integers(0, 65536, (size, size), dtype=np.uint16))
        epoch = np.empty((images, size, size), dtype=np.uint16)
        speeds = []
        for _ in range(3):
            order = rng.permutation(images)
            start = time.process_time()
            for place in order:
                entry = cache.get(names[place])
                assert entry is not None
                epoch[place] = entry[1]
            speeds.append(images / (time.process_time() - start))
    return statistics.median(speeds)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=9, help="files that count, each contestant")
    parser.add_argument("--images", type=int, default=3, help="different files of each syntax")
    parser.add_argument("--side", type=int, default=2048)
    parser.add_argument("--cached", type=int, default=10_000, help="entries of the cached epoch")
    parser.add_argument("--only", nargs="*", help="UIDs of these transfer syntaxes alone")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    pool = Pool(1)
    contestants: dict[str, Contestant] = {
        "workers": by_workers(pool),
        "inside": inside,
        "pydicom": by_pydicom,
        "bare": bare,
        "MONAI": by_monai(),
    }
    wanted = [syntax for syntax in TRANSFER_SYNTAXES if not given.only or syntax in given.only]
    print("images a CPU second; overhead of the workers over plain pydicom, and over 'inside'")
    print(f"{'':>38}" + "".join(f"{name:>9}" for name in contestants) + "    over   alone")
    ratios: dict[str, list[float | None]] = {"pydicom": [], "inside": [], "bare": [], "MONAI": []}
    try:
        for syntax in wanted:
            with tempfile.TemporaryDirectory() as folder:
                took = compare(
                    contestants,
                    write(Path(folder), syntax, given.images, given.side),
                    given.rounds,
                )
            for name, found in ratios.items():
                found.append(ratio(took, "workers", name))
            cells = [
                f"{1 / statistics.median(took[name]):9.1f}" if name in took else f"{'-':>9}"
                for name in contestants
            ]
            ends = [
                f"{one - 1:+8.0%}" if one is not None else f"{'-':>8}"
                for one in (ratios[name][-1] for name in ("pydicom", "inside"))
            ]
            print(f"{TRANSFER_SYNTAXES[syntax].name:>38}" + "".join(cells + ends), flush=True)
    finally:
        pool.close()
    answer = {
        "isolation_overhead": mean(ratios["pydicom"]) - 1,
        "isolation_overhead_worst": max(filter(None, ratios["pydicom"])) - 1,
        "isolation_alone": mean(ratios["inside"]) - 1,
        "over_bare": mean(ratios["bare"]) - 1,
        "vs_monai": 1 / mean(ratios["MONAI"]),
        "cached_images_per_second": cached(given.cached),
    }
    print(json.dumps({name: round(value, 4) for name, value in answer.items()}))


if __name__ == "__main__":
    main()
