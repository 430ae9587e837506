"""Images stay sealed on disk, and are what they were when a step reads them; or nobody's."""

from __future__ import annotations

import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from cloister_fl.client.data import images as images_module
from cloister_fl.client.data.cohort import Cohort, same, subset
from cloister_fl.client.data.file_cache.image_cache import Cache, SealedImage
from cloister_fl.client.data.images import SealedImages, are_same, digest_at, gathered, part_of
from cloister_fl.client.data.loading import load_cohort
from cloister_fl.client.dicom.stored_image import HeldImage, digest_of
from cloister_fl.client.site.folder import Site, init_site
from cloister_fl.client.site.policy import Policy
from cloister_fl.client.training import feature_cache
from cloister_fl.client.training.feature_cache import features_of
from cloister_fl.client.training.per_patient_gradients import PatientGradSampleModule
from cloister_fl.client.training.sampling import Bag
from cloister_fl.errors import DataChanged
from cloister_fl.networks.frozen_backbone import FixedFeatures, FrozenBackbone
from cloister_fl.networks.registry import build
from cloister_fl.study.schema import Network
from support import studies
from support.dicom import write_site
from support.errors import raises
from support.federations import write_cohort

KEY = b"k" * 32


@pytest.fixture(autouse=True)
def _even_few_are_streamed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images_module, "HELD_BYTES", 0)


SHADES = np.random.default_rng(0).integers(0, 1 << 16, (6, 8, 8)).astype(np.uint16)


def sealed(folder: Path, held: int | None = None) -> SealedImages:
    """Six images in a cache, of which one was not taken."""
    cache = Cache(folder / "cache", KEY)
    kept: list[SealedImage | HeldImage] = []
    for place, one in enumerate(SHADES):
        name = cache.name(bytes([place]) * 32, "ab" * 32)
        if place == held:
            kept.append(HeldImage(one))
        else:
            assert cache.put(name, {"rows": 8}, one)
            kept.append(cache.image(name, one))
    found = gathered(kept)
    assert isinstance(found, SealedImages)
    return found


def entry(images: SealedImages, place: int) -> Path:
    return Path(images.cache._folder) / bytes(images.entries[place]).hex()


@pytest.mark.parametrize("held", [None, 0, 3])
def test_they_are_read_as_an_array_is(tmp_path: Path, held: int | None) -> None:
    images = sealed(tmp_path, held)
    assert (images.shape, images.ndim, len(images)) == (SHADES.shape, 3, 6)
    assert np.array_equal(images[4], SHADES[4])
    assert images[4].dtype == np.uint16
    places = np.array([5, 0, 3])
    assert np.array_equal(images[places], SHADES[places])
    assert np.array_equal(images[[1]], SHADES[[1]])
    assert np.array_equal(np.asarray(images), SHADES)
    assert [one.sum() for one in images] == [one.sum() for one in SHADES]
    some = part_of(images, places)
    assert isinstance(some, SealedImages)
    assert np.array_equal(some[np.array([2, 1])], SHADES[[3, 0]])
    assert digest_at(images, 2) == digest_of(SHADES[2]) == digest_at(SHADES, 2)
    with pytest.raises(IndexError):
        images[6]


def test_alike_are_those_of_the_same_shades(tmp_path: Path) -> None:
    images = sealed(tmp_path)
    assert are_same(images, sealed(tmp_path / "again"))
    assert are_same(images, SHADES)
    assert not are_same(images, SHADES[::-1])
    assert not are_same(images, SHADES[:5])


def flipped(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(bytes(data))


def removed(file: Path) -> None:
    file.unlink()


def another(file: Path) -> None:
    """What is authentic of another image, under this name."""
    other = next(one for one in sorted(file.parent.iterdir()) if one != file)
    file.write_bytes(other.read_bytes())


def made_anew(file: Path) -> None:
    """Sealed with the site's own key, under this very name, with other shades."""
    Cache(file.parent, KEY).put(file.name, {"rows": 8}, SHADES[0] ^ 1)


DAMAGE = [flipped, removed, another, made_anew]


@pytest.mark.parametrize("damage", DAMAGE)
def test_one_that_is_not_what_it_was_is_not_read(
    tmp_path: Path, damage: Callable[[Path], None]
) -> None:
    images = sealed(tmp_path)
    damage(entry(images, 2))
    assert np.array_equal(images[3], SHADES[3])
    with raises(DataChanged, match="missing, or is not what it was"):
        images[2]
    with pytest.raises(type(DataChanged(""))):
        images[np.array([1, 2])]


def site_of(root: Path) -> Site:
    write_site(root, 6)
    return init_site(root, name="north", policy=Policy(patients_at_most=1_000, min_patients=1))


@pytest.mark.process
@pytest.mark.parametrize("batched", [True, False])
def test_an_image_that_is_gone_costs_its_patient_and_nobody_else(
    tmp_path: Path, batched: bool
) -> None:
    """In a pass of 16 patients as in one's own: the others' gradients keep their bits."""
    study = studies.study(input={"size": 32})
    cohort = load_cohort(site_of(tmp_path), study)
    assert isinstance(cohort.images, SealedImages)
    width = 4 if batched else 64
    network = build(Network(name="small-cnn", arguments={"width": width}), 2, size=32, seed=0)
    bags = [Bag(np.asarray(one.images)) for one in cohort.patients]

    def gradients() -> tuple[list[torch.Tensor | None], list[Exception]]:
        told: list[Exception] = []
        patients = PatientGradSampleModule(network.train(), study.task, told=told.append)
        found: list[torch.Tensor | None] = [None] * len(bags)
        try:
            for places, block in patients._placed_blocks(cohort, bags):
                assert isinstance(block, torch.Tensor) is (len(places) > 1 or batched)
                flat = (
                    block
                    if isinstance(block, torch.Tensor)
                    else torch.cat([one.reshape(-1) for one in block])[None]
                )
                for place, row in zip(places, flat, strict=True):
                    found[place] = row.clone()
        finally:
            patients.to_standard_module()
        return found, told

    before, told = gradients()
    assert not told
    removed(entry(cohort.images, 2))
    after, told = gradients()
    assert [type(one) for one in told] == [type(DataChanged(""))]
    for place, (one, other) in enumerate(zip(before, after, strict=True)):
        assert one is not None
        if 2 in cohort.patients[place].images:
            assert other is None
        else:
            assert other is not None
            assert torch.equal(one, other)


@pytest.mark.process
def test_a_backbone_sees_no_image_that_is_gone(tmp_path: Path) -> None:
    cohort = load_cohort(site_of(tmp_path), studies.study(input={"size": 32}))
    assert isinstance(cohort.images, SealedImages)
    backbone = build(Network(name="efficientnet-lite0"), 2, 1, size=32, seed=0)
    assert isinstance(backbone, FrozenBackbone)
    removed(entry(cohort.images, 4))
    told: list[Exception] = []
    found = features_of(backbone, cohort, told.append).images
    assert np.isnan(found[4]).all()
    assert np.isfinite(np.delete(found, 4, axis=0)).all()
    assert len(told) == 1


@pytest.mark.process
def test_a_cohort_is_in_memory_as_an_index(tmp_path: Path) -> None:
    """Forty images of 256 pixels are 5 MB; of a cohort that was read twice, 10 and more."""
    write_cohort(tmp_path, np.random.default_rng(0), "MRN", patients=40)
    site = init_site(tmp_path, name="north", policy=Policy(patients_at_most=1_000, min_patients=1))
    study = studies.study(
        input={"size": 256}, target={"column": "finding", "classes": ("no", "yes")}
    )
    load_cohort(site, study)
    tracemalloc.start()
    try:
        cohorts = [load_cohort(site, study) for _ in range(2)]
        now, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert same(*cohorts)
    assert now < 1 << 20
    part = subset(cohorts[0], cohorts[0].patients[3:5])
    assert isinstance(part.images, SealedImages)
    for one in part.patients:
        for place in one.images:
            assert digest_of(part.images[place]) == digest_at(part.images, place)


@pytest.mark.process
def test_a_full_disk_costs_memory_and_no_image(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    site, study = site_of(tmp_path), studies.study(input={"size": 32})
    monkeypatch.setattr(Cache, "put", lambda *_: False)
    cohort = load_cohort(site, study)
    monkeypatch.undo()
    assert isinstance(cohort, Cohort)
    assert same(cohort, load_cohort(site, study))
    assert isinstance(cohort.images, np.ndarray)


@pytest.mark.process
def test_features_are_computed_once_for_the_life_of_the_site(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In another process, for another study of the images; after a kill from where it was."""
    site, study = site_of(tmp_path), studies.study(input={"size": 32})
    backbone = build(Network(name="filter-bank"), 2, 1, size=32, seed=0)
    assert isinstance(backbone, FixedFeatures)
    computed: list[int] = []
    honest = feature_cache._compute

    def counted(m: Any, c: Any, place: int) -> Any:
        if len(computed) == stop_at:
            raise KeyboardInterrupt
        computed.append(place)
        return honest(m, c, place)

    monkeypatch.setattr(feature_cache, "_compute", counted)
    stop_at = 4
    with pytest.raises(KeyboardInterrupt):
        features_of(backbone, load_cohort(site, study))
    stop_at = -1
    first = features_of(backbone, load_cohort(site, study)).images
    assert computed == [0, 1, 2, 3, 4, 5]
    named = studies.study(input={"size": 32}, study={"name": "another"})
    again = features_of(backbone, load_cohort(site, named)).images
    assert sorted(map(bytes, again)) == sorted(map(bytes, first))
    assert len(computed) == 6


@pytest.mark.process
@pytest.mark.parametrize("damage", [flipped, removed, another])
def test_features_that_are_not_what_they_were_are_computed_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, damage: Callable[[Path], None]
) -> None:
    site, study = site_of(tmp_path), studies.study(input={"size": 32})
    backbone = build(Network(name="filter-bank"), 2, 1, size=32, seed=0)
    assert isinstance(backbone, FixedFeatures)
    entries = set(site.cache.iterdir())
    first = features_of(backbone, load_cohort(site, study)).images
    (one, *_) = sorted(set(site.cache.iterdir()) - entries - images_of(site, study))
    damage(one)
    computed: list[int] = []
    honest = feature_cache._compute

    def counted(m: Any, c: Any, place: int) -> Any:
        computed.append(place)
        return honest(m, c, place)

    monkeypatch.setattr(feature_cache, "_compute", counted)
    again = features_of(backbone, load_cohort(site, study)).images
    assert again.tobytes() == first.tobytes()
    assert len(computed) == 1


def images_of(site: Site, study: Any) -> set[Path]:
    """The entries of images."""
    found = load_cohort(site, study).images
    assert isinstance(found, SealedImages)
    return {entry(found, place) for place in range(len(found))}


@pytest.mark.process
def test_few_are_held_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    site, study = site_of(tmp_path), studies.study(input={"size": 32})
    streamed = load_cohort(site, study)
    monkeypatch.undo()
    held = load_cohort(site, study)
    assert isinstance(streamed.images, SealedImages)
    assert isinstance(held.images, np.ndarray)
    assert same(streamed, held)
    assert np.array_equal(np.asarray(streamed.images), held.images)
    # As many as fit, and not one more.
    monkeypatch.setattr(images_module, "HELD_BYTES", held.images.nbytes)
    assert isinstance(load_cohort(site, study).images, np.ndarray)
    monkeypatch.setattr(images_module, "HELD_BYTES", held.images.nbytes - 1)
    assert isinstance(load_cohort(site, study).images, SealedImages)
