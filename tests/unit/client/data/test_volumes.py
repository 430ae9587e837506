"""Slices become volumes: the same to the bit from any files, or turned away with a reason."""

from __future__ import annotations

import csv
import io
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from PIL import Image
from pydicom import dcmread

from cloister_fl.client.data.cohort import Cohort, Patient
from cloister_fl.client.data.file_cache.image_cache import Cache
from cloister_fl.client.data.loading import load_cohort, load_frozen, read_cohort
from cloister_fl.client.data.volumes import assemble, resample
from cloister_fl.client.dicom.acceptance import precheck
from cloister_fl.client.dicom.facts import Facts
from cloister_fl.client.dicom.folder_reader import Accepted, Keys, read_folder
from cloister_fl.client.dicom.geometry import Place, numbers, text_of
from cloister_fl.client.dicom.image import read_image
from cloister_fl.client.dicom.rejection import RejectedFile
from cloister_fl.client.dicom.stored_image import HeldImage
from cloister_fl.client.predict import predict
from cloister_fl.client.preflight.data_check import inspect, render
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.steward.contact_sheet import contact_sheet
from cloister_fl.client.training.sampling import Bag, images_at_once, pixels_of
from cloister_fl.errors import DataChanged, LabelMissing, Reject
from cloister_fl.model_file import load_model, save_model
from cloister_fl.networks.flat_parameters import flatten
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Input
from support import studies
from support.ct_series import AXIAL, OBLIQUE, decimals, phantom, place, write_series
from support.dicom import make_dicom, uid
from support.errors import raises

pytestmark = pytest.mark.process


Shades = NDArray[np.uint16]

SPEC = Input(
    modalities=("CT", "MR"),
    size=24,
    windowing="fixed",
    window=(2048.0, 4096.0),
    dimensions=3,
    depth=9,
    spacing=1.0,
)
STUDY = studies.study(
    input=SPEC.model_dump(), network={"name": "small-cnn-3d", "arguments": {"width": 4}}
)
KEY = b"k" * 32


def spec(**changes: Any) -> Input:
    return Input.model_validate({**SPEC.model_dump(), **changes})


def read(folder: Path, given: Input = SPEC) -> tuple[list[Shades], Counter[Reject]]:
    """The volumes of a folder, and how many files were turned away, by reason."""
    outcomes = list(read_folder(folder, given, key=KEY))
    accepted = [one for one in outcomes if isinstance(one, Accepted)]
    rejects = Counter(one.reason for one in outcomes if not isinstance(one, Accepted))
    volumes, refused = assemble(accepted, given)
    rejects.update(refused.values())
    assert sum(len(one.slices) for one in volumes) + sum(rejects.values()) == len(outcomes)
    return [one.image.read() for one in volumes], rejects


def alone(stored: NDArray[np.uint16], given: Input = SPEC) -> Shades:
    """What each slice becomes as an image of its own, one above the other."""
    flat = [
        read_image(precheck(make_dicom(one, modality="CT", bits_stored=12), ("CT",)), given)[1]
        for one in stored
    ]
    return np.stack(flat)


def test_one_phantom_gives_one_volume_however_it_is_written(tmp_path: Path) -> None:
    stored = phantom()
    expected = alone(stored)
    assert expected.shape == (9, 24, 24)
    assert len({one.tobytes() for one in expected}) == 9
    orders = {
        "rising": range(9),
        "falling": range(8, -1, -1),
        "shuffled": (4, 0, 8, 2, 7, 1, 6, 3, 5),
    }
    for plane, cosines in (("axial", AXIAL), ("oblique", OBLIQUE)):
        for name, order in orders.items():
            folder = tmp_path / plane / name
            write_series(folder, stored, cosines=cosines, order=order)
            (volume,), rejects = read(folder)
            assert not rejects
            assert np.array_equal(volume, expected), (plane, name)


def test_the_normal_says_where_up_is_not_the_files(tmp_path: Path) -> None:
    stored = phantom()
    # The patient seen from the other side: the normal, and with it the order, turns round.
    turned = ((1.0, 0.0, 0.0), (0.0, -1.0, 0.0))
    change = {k: {"ImagePositionPatient": decimals(place(k))} for k in range(9)}
    write_series(tmp_path, stored, cosines=turned, change=change)
    (volume,), _ = read(tmp_path)
    assert np.array_equal(volume, alone(stored)[::-1])


@pytest.mark.parametrize("cosines", [AXIAL, OBLIQUE])
def test_one_and_two_millimetres_give_one_volume(tmp_path: Path, cosines: Any) -> None:
    stored = phantom()
    write_series(tmp_path / "fine", stored, cosines=cosines)
    write_series(tmp_path / "coarse", stored[::2], step=2.0, cosines=cosines)
    two = spec(spacing=2.0, depth=5)
    (fine,), _ = read(tmp_path / "fine", two)
    (coarse,), _ = read(tmp_path / "coarse", two)
    assert np.array_equal(fine, coarse)
    assert np.array_equal(fine, alone(stored)[::2])
    (fine,), _ = read(tmp_path / "fine")
    (coarse,), _ = read(tmp_path / "coarse")
    assert np.array_equal(fine[::2], coarse[::2])
    assert int(np.abs(fine.astype(int) - coarse).max()) <= 1
    assert not np.array_equal(coarse[1], coarse[0])


def test_cropping_and_padding_are_centred(tmp_path: Path) -> None:
    stored = phantom()
    write_series(tmp_path, stored)
    expected = alone(stored)
    (cropped,), _ = read(tmp_path, spec(depth=4))
    assert np.array_equal(cropped, expected[2:6])
    (padded,), _ = read(tmp_path, spec(depth=12))
    assert not padded[:2].any()
    assert np.array_equal(padded[2:11], expected)
    assert not padded[11].any()


def by_definition(slices: Sequence[Shades], step: int, spacing: int, depth: int) -> Shades:
    """Linear interpolation with fractions, value by value."""
    extent = (len(slices) - 1) * step
    count = (extent + spacing // 1000) // spacing + 1
    margin = (extent - (count - 1) * spacing) // 2
    grid = []
    for place_ in range(count):
        where = Fraction(min(max(margin + place_ * spacing, 0), extent), step)
        low = min(int(where), len(slices) - 2)
        share = where - low
        mixed = [
            int((1 - share) * int(a) + share * int(b) + Fraction(1, 2))
            for a, b in zip(slices[low].ravel(), slices[low + 1].ravel(), strict=True)
        ]
        grid.append(np.array(mixed, np.uint16).reshape(slices[0].shape))
    black = np.zeros_like(grid[0])
    while len(grid) < depth:
        grid = [black, *grid] if (depth - len(grid)) % 2 else [*grid, black]
    while len(grid) > depth:
        grid = grid[:-1] if (len(grid) - depth) % 2 else grid[1:]
    return np.stack(grid)


@given(
    count=st.integers(4, 9),
    step=st.integers(100_000, 9_000_000),
    spacing=st.integers(100_000, 9_000_000),
    depth=st.integers(4, 12),
    seed=st.integers(0, 99),
)
@settings(max_examples=200, deadline=None)
def test_resampling_is_linear_interpolation(
    count: int, step: int, spacing: int, depth: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    slices = list(rng.integers(0, 65536, (count, 2, 2)).astype(np.uint16))
    if abs(step - spacing) * 1000 < spacing:
        step = spacing
    assert np.array_equal(
        resample(slices, step, spacing, depth), by_definition(slices, step, spacing, depth)
    )


def test_distances_that_differ_by_rounding_are_not_resampled() -> None:
    slices = [np.full((2, 2), 300 * k, np.uint16) for k in range(200)]
    kept = resample(slices, 1_000_400, 1_000_000, 200)
    assert np.array_equal(kept, np.stack(slices))
    assert not np.array_equal(resample(slices, 1_002_000, 1_000_000, 200), kept)


def test_a_stack_that_rounding_made_short_keeps_its_last_slice() -> None:
    slices = [np.full((2, 2), 1000 * k, np.uint16) for k in range(9)]
    short = resample(slices, 999_999, 2_000_000, 5)
    assert np.abs(short.astype(int) - np.stack(slices[::2])).max() <= 1
    assert len({int(one) for one in short[:, 0, 0]}) == 5


def accepted(k: int, position: Sequence[float], **changes: str) -> Accepted:
    about = {
        "series": "1.2",
        "frame": "1.3",
        "position": text_of(position, 3),
        "orientation": text_of([*OBLIQUE[0], *OBLIQUE[1]], 6),
        "pixel_spacing": text_of([0.7, 0.7], 2),
    }
    image = np.full((2, 2), 100 * k, np.uint16)
    keys = Keys(f"1.{k}", "", "P", "")
    names = dict.fromkeys(("manufacturer", "year", "accession", "issuer", "person"), "")
    names |= {"pixels": "", "modality": "CT", "sop_instance": f"1.{k}", "patient_id": "P"}
    return Accepted(
        "", keys, Facts(rows=8, columns=8, **{**names, **about, **changes}), HeldImage(image)
    )


@given(st.permutations(range(10)), st.floats(0.3, 5.0), st.sampled_from([1.0, 0.7, 2.5]))
def test_the_order_of_files_has_no_say(order: list[int], step: float, spacing: float) -> None:
    slices = [accepted(k, place(k * step, OBLIQUE)) for k in range(10)]
    given_ = spec(size=16, spacing=spacing)
    (first,), _ = assemble(slices, given_)
    (other,), refused = assemble([slices[k] for k in order], given_)
    assert not refused
    assert [order[index] for index in other.slices] == list(range(10))
    assert np.array_equal(first.image.read(), other.image.read())


@given(st.lists(st.floats(-9e4, 9e4), min_size=6, max_size=6))
def test_numbers_come_back_to_the_bit(values: list[float]) -> None:
    assert numbers(text_of(values, 6), 6) == tuple(values)
    assert numbers(text_of(values, 6), 3) == ()


SHIFTED = decimals([-120.5 + 2.0, -80.25, 33.0 + 4])
REFUSED: dict[str, tuple[Reject, dict[str, Any]]] = {
    "missing slice": (Reject.VOLUME_UNEVEN, {"order": (0, 1, 2, 3, 5, 6, 7, 8)}),
    "uneven by 1.5 %": (
        Reject.VOLUME_UNEVEN,
        {"change": {8: {"ImagePositionPatient": decimals(place(8.015))}}},
    ),
    "two slices at one position": (
        Reject.VOLUME_DOUBLED,
        {"change": {4: {"ImagePositionPatient": decimals(place(3))}}},
    ),
    "gantry tilt": (
        Reject.VOLUME_TILTED,
        {
            "change": {
                # A tilt of 15 degrees: the table moves along z, the normal leans.
                k: {
                    "ImagePositionPatient": decimals((-120.5, -80.25, 33.0 + k)),
                    "ImageOrientationPatient": decimals((1, 0, 0, 0, 0.9659258263, 0.2588190451)),
                }
                for k in range(9)
            }
        },
    ),
    "one slice shifted": (Reject.VOLUME_TILTED, {"change": {4: {"ImagePositionPatient": SHIFTED}}}),
    "mixed orientation": (
        Reject.VOLUME_MIXED,
        {"change": {2: {"ImageOrientationPatient": ["1", "0", "0", "0", "0", "-1"]}}},
    ),
    "mixed pixel spacing": (Reject.VOLUME_MIXED, {"change": {2: {"PixelSpacing": ["0.7", "0.8"]}}}),
    "mixed frames": (Reject.VOLUME_MIXED, {"change": {2: {"FrameOfReferenceUID": "1.2.3"}}}),
    "localizer": (Reject.VOLUME_INCOMPLETE, {"order": (0, 1, 2)}),
    "no position": (Reject.VOLUME_UNPLACED, {"without": {3: ["ImagePositionPatient"]}}),
    "no series": (
        Reject.VOLUME_UNPLACED,
        {"without": {k: ["SeriesInstanceUID"] for k in range(9)}},
    ),
    "two numbers": (
        Reject.VOLUME_UNPLACED,
        {"change": {3: {"ImagePositionPatient": ["1", "2"]}}},
    ),
    "cosines that are none": (
        Reject.VOLUME_UNPLACED,
        {"change": {k: {"ImageOrientationPatient": ["1", "0", "0", "1", "0", "0"]} for k in (1,)}},
    ),
    "no distance of pixels": (
        Reject.VOLUME_UNPLACED,
        {"change": {3: {"PixelSpacing": ["0", "0"]}}},
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_no_volume_is_turned_away_whole(tmp_path: Path, name: str) -> None:
    reason, options = REFUSED[name]
    stored = phantom()
    write_series(tmp_path, stored, series="bad", **options)
    write_series(tmp_path, stored[::-1], series="good")
    (volume,), rejects = read(tmp_path)
    assert rejects == {reason: len(options.get("order", range(9)))}
    assert np.array_equal(volume, alone(stored[::-1]))


def test_one_per_cent_is_even(tmp_path: Path) -> None:
    stored = phantom()
    write_series(
        tmp_path, stored, change={8: {"ImagePositionPatient": decimals(place(8.009, AXIAL))}}
    )
    (volume,), rejects = read(tmp_path)
    assert not rejects
    assert volume.shape == (9, 24, 24)


def test_slices_that_look_alike_are_no_duplicates_and_copies_are(tmp_path: Path) -> None:
    stored = phantom()
    stored[0] = stored[1] = stored[8] = 0
    write_series(tmp_path, stored)
    write_series(tmp_path / "again", stored)
    # The same pixels at the same place under another name.
    write_series(
        tmp_path / "renamed", stored, order=(2,), change={2: {"SOPInstanceUID": uid("other")}}
    )
    write_series(tmp_path / "resent", stored, series="second")
    (volume,), rejects = read(tmp_path)
    assert rejects == {Reject.DUPLICATE: 9 + 1 + 9}
    assert np.array_equal(volume, alone(stored))


def test_two_patients_never_share_a_volume(tmp_path: Path) -> None:
    stored = phantom()
    same = {k: {"SeriesInstanceUID": "1.2.3"} for k in range(9)}
    write_series(tmp_path / "a", stored, patient="A", change=same, order=(0, 2, 4, 6, 8))
    write_series(tmp_path / "b", stored, patient="B", change=same, order=(1, 3, 5, 7))
    volumes, rejects = read(tmp_path, spec(spacing=2.0, depth=5))
    assert not rejects
    assert np.array_equal(volumes[0], alone(stored)[::2])
    assert np.array_equal(volumes[1][1:], alone(stored)[1::2])


@pytest.mark.parametrize(
    ("kind", "modality"),
    [("1.2.840.10008.5.1.4.1.1.2.1", "CT"), ("1.2.840.10008.5.1.4.1.1.4.1", "MR")],
)
def test_enhanced_multi_frame_objects_are_refused(kind: str, modality: str) -> None:
    data = make_dicom(phantom()[0], modality=modality, elements={"SOPClassUID": kind})
    with pytest.raises(RejectedFile) as caught:
        precheck(data, ("CT", "MR"))
    assert caught.value.reason is Reject.SOP_CLASS


def test_a_place_that_cannot_be_read_turns_no_image_away() -> None:
    data = make_dicom(
        phantom()[0],
        modality="CT",
        elements={
            "ImagePositionPatient": "1\\2\\33.12345",
            "PixelSpacing": "",
            "SeriesInstanceUID": "x",
        },
    )
    assert precheck(data, ("CT",)).tags.place == Place(position="1.0\\2.0\\33.12345")
    damaged = data.replace(b"33.12345", b"northern")
    assert precheck(damaged, ("CT",)).tags.place == Place()
    radiograph = make_dicom(phantom()[0], elements={"SeriesInstanceUID": "1.2.3"})
    assert precheck(radiograph, ("DX",)).tags.place == Place()


def ct_site(root: Path, patients: int = 4, key: str = "PatientID") -> Site:
    """Each patient with one volume and a localizer of two slices."""
    rows = [f"{key},finding"]
    for number in range(patients):
        patient, label = f"MRN{number}", ("normal", "nodule")[number % 2]
        stored = phantom() + np.uint16(number)
        folder = root / "dicom" / f"{number}"
        instances = write_series(folder, stored, patient=patient, order=range(8, -1, -1))
        write_series(folder, stored[:2], patient=patient, series="localizer")
        rows.append(f"{patient if key == 'PatientID' else instances[5]},{label}")
    (root / "labels.csv").write_text("\n".join(rows) + "\n", encoding="utf-8")
    return init_site(root, name="site", policy=Policy(patients_at_most=1_000, min_patients=1))


@pytest.mark.parametrize("key", ["PatientID", "SOPInstanceUID"])
def test_a_cohort_of_volumes(tmp_path: Path, key: str) -> None:
    site = ct_site(tmp_path, key=key)
    reading = read_cohort(site, STUDY)
    assert reading.faults == ()
    assert reading.files == 44
    cohort = reading.cohort
    assert cohort is not None
    assert cohort.images.shape == (4, 9, 24, 24)
    assert cohort.rejects == {Reject.VOLUME_INCOMPLETE: 8}
    assert cohort.modalities == {"CT": 4}
    assert cohort.shapes == {(24, 24): 4}
    for number in range(4):
        expected = alone(phantom() + np.uint16(number))
        (index,) = [i for i in range(4) if np.array_equal(cohort.images[i], expected)]
        (patient,) = [one for one in cohort.patients if one.images == (index,)]
        assert patient.label == number % 2
    seen = pixels_of(cohort, [Bag(np.array([2, 0]))])
    assert seen.shape == (2, 1, 9, 24, 24)
    share = int(cohort.images[2][3, 4, 5]) / 65535
    assert float(seen[0, 0, 3, 4, 5]) == pytest.approx((share - 0.5) / 0.25, abs=1e-6)
    again = read_cohort(site, STUDY)
    assert (again.files, again.damaged) == (44, 0)
    assert again.cohort is not None
    assert np.array_equal(again.cohort.images, cohort.images)
    assert again.cohort.patients == cohort.patients


def test_an_entry_from_before_places_were_read_is_read_again(tmp_path: Path) -> None:
    site = ct_site(tmp_path, patients=2)
    before = load_cohort(site, STUDY)
    cache = Cache(site.cache, site.cache_key())
    for path in site.cache.iterdir():
        entry = cache.get(path.name)
        assert entry is not None
        # A volume's entry holds its shades alone.
        if entry[0]:
            assert entry[0].pop("position")
        cache.put(path.name, *entry)
    after = load_cohort(site, STUDY)
    assert np.array_equal(after.images, before.images)
    told = [cache.get(path.name) for path in site.cache.iterdir()]
    assert all(one is not None and (not one[0] or "position" in one[0]) for one in told)
    assert sum(bool(one and one[0]) for one in told) == len(told) - len(after.images)


def test_one_flipped_pixel_of_one_slice_is_found_after_freezing(tmp_path: Path) -> None:
    site = ct_site(tmp_path)
    before = load_frozen(site, STUDY)
    path = sorted(site.dicom.rglob("*.dcm"))[4]
    data = bytearray(path.read_bytes())
    data[-30] ^= 1
    path.write_bytes(data)
    with raises(DataChanged, match=r"(?s)1 of 36 images .*its pixels changed"):
        load_frozen(site, STUDY)
    data[-30] ^= 1
    path.write_bytes(data)
    write_series(site.dicom / "late", phantom() + np.uint16(9), patient="LATE")
    assert np.array_equal(load_frozen(site, STUDY).images, before.images)


def test_the_same_slices_are_images_where_a_study_is_flat(tmp_path: Path) -> None:
    site = ct_site(tmp_path)
    given_ = {**SPEC.model_dump(), "dimensions": 2, "depth": None, "spacing": None}
    flat = STUDY.model_copy(update={"input": Input.model_validate(given_)})
    cohort = load_cohort(site, flat)
    # The first two slices of each series are those of the localizer: duplicates.
    assert cohort.images.shape == (36, 24, 24)
    assert cohort.rejects == {Reject.DUPLICATE: 8}


def test_a_volume_without_a_label_is_missed(tmp_path: Path) -> None:
    site = ct_site(tmp_path)
    lines = site.labels.read_text().splitlines()
    site.labels.write_text("\n".join(lines[:-1]) + "\n")
    with raises(LabelMissing, match="1 image has no label"):
        load_cohort(site, STUDY)


def test_the_check_counts_volumes_and_shows_their_middle(tmp_path: Path) -> None:
    site = ct_site(tmp_path / "site")
    report = inspect(site, STUDY)
    text = render(report)
    assert "  volumes     4 (CT 4)\n" in text
    assert "4 patients with 1 volume\n" in text
    assert "          8  CLO-228  slice of a series too short for a volume\n" in text
    assert report.cohort is not None
    shown, png = contact_sheet(report.cohort, None)
    assert shown == 4
    sheet = np.asarray(Image.open(io.BytesIO(png)))
    middle = (report.cohort.images[0][4] >> 8).astype(np.uint8)
    tile = Image.fromarray(middle).resize((128, 128), Image.Resampling.BOX)
    assert np.array_equal(sheet[:128, :128], np.asarray(tile))


def test_a_model_of_volumes_scores_series(tmp_path: Path) -> None:
    stored = phantom()
    for name in ("a", "b"):
        write_series(tmp_path / "dicom", stored + np.uint16(ord(name)), series=name)
    write_series(tmp_path / "dicom", stored[:1], series="localizer")
    module = build(STUDY.network, 2, size=24, depth=9, seed=1)
    save_model(tmp_path / "model", STUDY, flatten(module), {})
    done = predict(tmp_path / "model", tmp_path / "dicom", tmp_path / "out.csv", device="cpu")
    assert (done.images, done.rejects) == (2, {Reject.VOLUME_INCOMPLETE: 1})
    (rejected,) = done.rejected
    rows = list(csv.DictReader((tmp_path / "out.csv").read_text().splitlines()))
    assert list(rows[0])[:5] == [
        *("SeriesInstanceUID", "file", "patient", "score_normal", "score_nodule")
    ]
    names = sorted(uid("series", "P1", name) for name in ("a", "b"))
    assert [row["SeriesInstanceUID"] for row in rows] == names
    assert len({row["patient"] for row in rows}) == done.patients == 1
    loaded, _ = load_model(tmp_path / "model")
    for row in rows:
        series = row["SeriesInstanceUID"]
        (name,) = [one for one in ("a", "b") if uid("series", "P1", one) == series]
        assert rejected != row["file"]
        assert dcmread(tmp_path / "dicom" / row["file"]).SeriesInstanceUID == series
        volume = alone(stored + np.uint16(ord(name)))
        cohort = Cohort(volume[None], (), {}, {}, {})
        scores = loaded(pixels_of(cohort, [Bag(np.array([0]))])).softmax(dim=1)[0]
        told = [float(row["score_normal"]), float(row["score_nodule"])]
        assert told == pytest.approx(scores.tolist(), abs=2e-6)


def test_augmentation_moves_all_slices_of_a_volume_alike() -> None:
    images = np.random.default_rng(3).integers(0, 65536, (2, 5, 32, 32)).astype(np.uint16)
    patients = (Patient("a", 0, (0, 1)),)
    cohort = Cohort(images, patients, {}, {}, {})
    moves = np.array([[1, 2, -1], [0, -2, 0]])
    moved = pixels_of(cohort, [Bag(np.array([0, 1]), moves)])
    assert moved.shape == (2, 1, 5, 32, 32)
    for layer in range(5):
        flat = Cohort(images[:, layer], patients, {}, {}, {})
        expected = pixels_of(flat, [Bag(np.array([0, 1]), moves)])
        assert np.array_equal(moved[:, :, layer], expected)
    assert images_at_once(cohort, 64) == 12
    assert images_at_once(flat, 64) == 64
    assert images_at_once(Cohort(np.zeros((1, 256, 16, 16), np.uint16), (), {}, {}, {}), 64) == 1
