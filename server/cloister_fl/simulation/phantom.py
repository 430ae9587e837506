"""Chest radiographs that no patient ever sat for.

The demo and the tests need images that behave as radiographs do and that can be handed to anyone.
Everything here is drawn: a torso, two lungs, heart, ribs, spine and vessels that vary by patient,
a view that varies by exposure, and a scanner that varies by hospital.

A positive patient carries one nodule. A negative patient carries a *mimic* drawn from the same
distribution and then broken into strands or small dots of the same peak, the same integrated
density and the same grey-level histogram. What separates the classes is therefore shape alone: a
model that looks at brightness, or recognises the hospital, learns nothing. Hospitals may differ in
which mimics they see.

Coordinates: ``y`` runs down from -1 to 1 over the height of the detector and ``x`` to the right
from ``-columns / rows`` to ``columns / rows``; pixels are square. Density runs from 0 (air, black)
to 1 (bone, white).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Plane: TypeAlias = NDArray[np.float32]
Pixels: TypeAlias = NDArray[np.uint16]

# A mark is drawn inside a window of this many standard deviations: beyond it the density is less
# than a thousandth of the peak, below one grey level of what the eye or a network can use.
_REACH = 3.7

LESION_RADIUS = (0.058, 0.090)
LESION_CONTRAST = (0.27, 0.43)

CaseMix: TypeAlias = tuple[float, float, float]
"""Probabilities of a mimic of one strand, of two strands, of four dots."""

EVEN_MIX: CaseMix = (1 / 3, 1 / 3, 1 / 3)
ONE_STRAND: CaseMix = (1.0, 0.0, 0.0)
TWO_STRANDS: CaseMix = (0.0, 1.0, 0.0)
DOTS: CaseMix = (0.0, 0.0, 1.0)


@dataclass(frozen=True, slots=True)
class Scanner:
    """A detector and the processing its maker applied, the same for every image of a hospital.

    Attributes:
        rows: height of the matrix in pixels.
        columns: width of the matrix in pixels.
        bits_stored: bits of a stored value, 10 to 16.
        gain: share of the stored range that full density covers, in (0, 1].
        offset: stored value of zero density as a share of the range, in [0, 1).
        gamma: exponent of the response curve; 1 is linear.
        noise: standard deviation of the detector noise, in units of density.
        exposure_spread: standard deviation of the logarithm of the exposure between images.
    """

    rows: int
    columns: int
    bits_stored: int
    gain: float
    offset: float
    gamma: float
    noise: float
    exposure_spread: float = 0.05

    def __post_init__(self) -> None:
        if self.rows < 32 or self.columns < 32:
            raise ValueError("a scanner's matrix is at least 32 by 32 pixels")
        if not 8 <= self.bits_stored <= 16:
            raise ValueError("bits_stored lies between 8 and 16")
        if not (self.gain > 0.0 and self.offset >= 0.0 and self.gain + self.offset <= 1.0):
            raise ValueError("gain and offset must keep full density inside the stored range")


@dataclass(frozen=True, slots=True)
class Mark:
    """A Gaussian density: a nodule, a vessel seen end-on, a scar or a stretch of vessel.

    Attributes:
        x, y: centre, in the module's coordinates.
        along: standard deviation along the mark's axis.
        across: standard deviation across it.
        angle: direction of the axis in radians, 0 along ``x``.
        contrast: peak density added.
    """

    x: float
    y: float
    along: float
    across: float
    angle: float
    contrast: float


@dataclass(frozen=True, slots=True)
class Anatomy:
    """What differs between two chests; every length in the module's coordinates.

    Attributes:
        lung_x: distance of a lung's centre from the midline.
        lung_y: height of the lungs' centre.
        lung_width: half-width of a lung.
        lung_height: half-height of a lung.
        body_width: half-width of the torso.
        heart_x: centre of the heart, towards the patient's left.
        heart_width: half-width of the heart.
        dome: height of the diaphragm.
        rib_spacing: distance between two ribs.
        rib_slope: how far the ribs fall towards the side.
        rib_phase: position of the first rib in radians.
        rib_contrast: density of a rib.
        lung_depth: how much darker than soft tissue the lungs are.
    """

    lung_x: float
    lung_y: float
    lung_width: float
    lung_height: float
    body_width: float
    heart_x: float
    heart_width: float
    dome: float
    rib_spacing: float
    rib_slope: float
    rib_phase: float
    rib_contrast: float
    lung_depth: float


@dataclass(frozen=True, slots=True)
class PhantomPatient:
    """One patient: a chest, what normally lies in it, and a nodule or its mimic.

    Attributes:
        anatomy: the chest.
        vessels: marks that every chest has.
        lesion: the nodule's marks; empty in a negative patient.
        mimics: what a negative patient has instead; empty in a positive one.
    """

    anatomy: Anatomy
    vessels: tuple[Mark, ...]
    lesion: tuple[Mark, ...]
    mimics: tuple[Mark, ...]


def draw_patient(
    rng: np.random.Generator, *, positive: bool, mix: CaseMix = EVEN_MIX
) -> PhantomPatient:
    """Draw a patient.

    Args:
        rng: source of every choice; the same state draws the same patient.
        positive: whether the patient carries a nodule.
        mix: which mimics the hospital sees.
    """
    anatomy = _draw_anatomy(rng)
    vessels = tuple(_draw_vessels(rng, anatomy))
    # Both are drawn whatever the label, and the pair is kept only where the mimic fits in the
    # lung: were only negatives rejected, the place alone would tell the classes apart.
    while True:
        nodule = _draw_nodule(rng, anatomy)
        mimics = tuple(part for mark in nodule for part in shatter(rng, mark, mix))
        if all(_fits(anatomy, mark) for mark in (*nodule, *mimics)):
            break
    if positive:
        return PhantomPatient(anatomy, vessels, nodule, ())
    return PhantomPatient(anatomy, vessels, (), mimics)


def shatter(rng: np.random.Generator, mark: Mark, mix: CaseMix = EVEN_MIX) -> tuple[Mark, ...]:
    """Break a compact mark into strands or dots of the same total mass and the same peak.

    A Gaussian's grey-level histogram depends on its peak and on the product of its two widths
    only, so a strand whose widths keep that product, or four dots of half the widths, leave the
    image's histogram as the compact mark would, wherever they do not overlap.

    Args:
        rng: source of the choice and of the directions.
        mark: the compact mark.
        mix: how often each kind is chosen; sums to 1.

    Returns:
        One strand, two strands or four dots, centred on the mark.
    """
    radius = math.sqrt(mark.along * mark.across)
    kind = int(rng.choice(3, p=mix))
    if kind == 0:
        stretch = math.sqrt(rng.uniform(8.0, 12.0))
        turn = float(rng.uniform(0.0, math.pi))
        return (replace(mark, along=radius * stretch, across=radius / stretch, angle=turn),)
    parts = 2 if kind == 1 else 4
    stretch = math.sqrt(rng.uniform(5.0, 8.0)) if parts == 2 else 1.0
    small = radius / math.sqrt(parts)
    turn = float(rng.uniform(0.0, 2.0 * math.pi))
    distance = radius * float(rng.uniform(1.9, 2.5))
    found = []
    for part in range(parts):
        towards = turn + 2.0 * math.pi * part / parts + float(rng.uniform(-0.3, 0.3))
        found.append(
            Mark(
                x=mark.x + distance * math.cos(towards),
                y=mark.y + distance * math.sin(towards),
                along=small * stretch,
                across=small / stretch,
                angle=float(rng.uniform(0.0, math.pi)),
                contrast=mark.contrast,
            )
        )
    return tuple(found)


def expose(patient: PhantomPatient, scanner: Scanner, rng: np.random.Generator) -> Pixels:
    """Take one image: a new position of the same patient before a scanner.

    Args:
        patient: who stands before the detector.
        scanner: the detector.
        rng: source of the position, the exposure and the noise.

    Returns:
        Stored values of shape ``(rows, columns)``, 0 to ``2**bits_stored - 1``, bright for dense
        (MONOCHROME2).
    """
    zoom = rng.uniform(0.95, 1.05)
    aspect = scanner.columns / scanner.rows
    shift_x, shift_y = rng.uniform(-0.07, 0.07, 2)
    y = (_axis(scanner.rows) - np.float32(shift_y)) / np.float32(zoom)
    x = (_axis(scanner.columns) * np.float32(aspect) - np.float32(shift_x)) / np.float32(zoom)
    density = _draw_chest(patient.anatomy, x, y)
    for mark in (*patient.vessels, *patient.lesion, *patient.mimics):
        _add_mark(density, mark, x, y)
    density += _draw_texture(rng, scanner.rows, scanner.columns)
    density *= np.float32(np.exp(rng.normal(0.0, scanner.exposure_spread)))
    density += rng.standard_normal(density.shape, dtype=np.float32) * np.float32(scanner.noise)
    np.clip(density, 0.0, 1.0, out=density)
    if scanner.gamma != 1.0:
        np.power(density, np.float32(scanner.gamma), out=density)
    density = (density * scanner.gain + scanner.offset) * ((1 << scanner.bits_stored) - 1)
    return np.rint(density).astype(np.uint16)


def _axis(count: int) -> Plane:
    """Pixel centres from -1 to 1, shape ``(count,)``."""
    return ((np.arange(count, dtype=np.float32) + 0.5) * (2.0 / count) - 1.0).astype(np.float32)


def _draw_anatomy(rng: np.random.Generator) -> Anatomy:
    return Anatomy(
        lung_x=float(rng.uniform(0.36, 0.42)),
        lung_y=float(rng.uniform(-0.12, -0.02)),
        lung_width=float(rng.uniform(0.26, 0.31)),
        lung_height=float(rng.uniform(0.62, 0.74)),
        body_width=float(rng.uniform(0.80, 0.95)),
        heart_x=float(rng.uniform(0.06, 0.16)),
        heart_width=float(rng.uniform(0.22, 0.30)),
        dome=float(rng.uniform(0.42, 0.54)),
        rib_spacing=float(rng.uniform(0.17, 0.21)),
        rib_slope=float(rng.uniform(0.25, 0.55)),
        rib_phase=float(rng.uniform(0.0, 2.0 * math.pi)),
        rib_contrast=float(rng.uniform(0.04, 0.08)),
        lung_depth=float(rng.uniform(0.42, 0.52)),
    )


def _in_lung(anatomy: Anatomy, x: float, y: float) -> bool:
    """Whether a point lies in the dark part of a lung: clear of edge, heart and diaphragm."""
    across = (abs(x) - anatomy.lung_x) / anatomy.lung_width
    down = (y - anatomy.lung_y) / anatomy.lung_height
    heart = ((x - anatomy.heart_x) / anatomy.heart_width) ** 2 + ((y - 0.3) / 0.3) ** 2
    return across**2 + down**2 <= 0.72 and heart > 1.25 and y < anatomy.dome - 0.08


def _fits(anatomy: Anatomy, mark: Mark) -> bool:
    """Whether a mark's body, both its ends included, lies in one lung."""
    x, y = 1.3 * mark.along * math.cos(mark.angle), 1.3 * mark.along * math.sin(mark.angle)
    return all(_in_lung(anatomy, mark.x + end * x, mark.y + end * y) for end in (-1.0, 0.0, 1.0))


def _place_in_lung(rng: np.random.Generator, anatomy: Anatomy) -> tuple[float, float]:
    """A point inside one lung."""
    side = -1.0 if rng.random() < 0.5 else 1.0
    while True:
        across, down = rng.uniform(-1.0, 1.0, 2)
        x = side * anatomy.lung_x + anatomy.lung_width * float(across)
        y = anatomy.lung_y + anatomy.lung_height * float(down)
        if _in_lung(anatomy, x, y):
            return x, y


def _draw_nodule(rng: np.random.Generator, anatomy: Anatomy) -> tuple[Mark, ...]:
    """A compact opacity, in a third of the patients with a second lobe."""
    x, y = _place_in_lung(rng, anatomy)
    radius = float(rng.uniform(*LESION_RADIUS))
    stretch = math.sqrt(rng.uniform(1.0, 1.35))
    contrast = float(rng.uniform(*LESION_CONTRAST))
    angle = float(rng.uniform(0.0, math.pi))
    core = Mark(x, y, radius * stretch, radius / stretch, angle, contrast)
    if rng.random() >= 1.0 / 3.0:
        return (core,)
    towards = float(rng.uniform(0.0, 2.0 * math.pi))
    lobe = Mark(
        x=x + 1.3 * radius * math.cos(towards),
        y=y + 1.3 * radius * math.sin(towards),
        along=0.5 * radius,
        across=0.5 * radius,
        angle=0.0,
        contrast=0.6 * contrast,
    )
    return (core, lobe)


def _draw_vessels(rng: np.random.Generator, anatomy: Anatomy) -> list[Mark]:
    """Vessels that leave the two hila, thinner and fainter with distance."""
    found = []
    for side in (-1.0, 1.0):
        for _ in range(int(rng.integers(4, 8))):
            towards = float(rng.uniform(-1.2, 1.2))
            direction = towards if side > 0.0 else math.pi - towards
            distance = float(rng.uniform(0.05, 0.30))
            found.append(
                Mark(
                    x=side * (anatomy.lung_x - 0.22) + distance * math.cos(direction),
                    y=anatomy.lung_y + 0.05 + 1.4 * distance * math.sin(direction),
                    along=float(rng.uniform(0.06, 0.12)),
                    across=float(rng.uniform(0.012, 0.022)),
                    angle=direction,
                    contrast=float(rng.uniform(0.05, 0.14)),
                )
            )
    return found


def _soft(distance: NDArray[np.floating[Any]], sharpness: float) -> Plane:
    """A soft edge: 0 outside, 1 inside, from a signed distance that is positive inside."""
    edge: Plane = (0.5 + 0.5 * np.tanh(distance * np.float32(0.5 * sharpness))).astype(np.float32)
    return edge


def _draw_chest(anatomy: Anatomy, x: Plane, y: Plane) -> Plane:
    """Density of a chest without vessels or findings, shape ``(len(y), len(x))``."""
    across, down = x[None, :], y[:, None]
    body = _soft(1.0 - (across / anatomy.body_width) ** 4 - ((down - 0.55) / 1.75) ** 4, 14.0)
    height2 = ((down - anatomy.lung_y) / anatomy.lung_height) ** 2
    lungs = np.zeros_like(body)
    for side in (-1.0, 1.0):
        width2 = ((across - side * anatomy.lung_x) / anatomy.lung_width) ** 2
        lungs += _soft(1.0 - width2 - height2, 9.0)
    dome = anatomy.dome + 0.9 * (np.abs(across) - anatomy.lung_x) ** 2
    lungs *= _soft(dome - down, 30.0)
    width2 = ((across - anatomy.heart_x) / anatomy.heart_width) ** 2
    lungs *= 1.0 - 0.85 * _soft(1.0 - width2 - ((down - 0.3) / 0.3) ** 2, 8.0)
    ribs = np.cos(
        (down - anatomy.rib_slope * across**2) * (2.0 * math.pi / anatomy.rib_spacing)
        + anatomy.rib_phase
    )
    np.maximum(ribs, 0.0, out=ribs)
    ribs *= ribs * (np.abs(across) > 0.1)
    spine = np.exp(-((across / 0.085) ** 2)) * (0.09 + 0.02 * np.cos(down * 28.0))
    collar = -0.62 - 0.28 * np.abs(across) + 0.05
    clavicles = 0.10 * np.exp(-(((down - collar) / 0.035) ** 2)) * (np.abs(across) > 0.08)

    chest = 0.72 - anatomy.lung_depth * lungs + spine + clavicles + anatomy.rib_contrast * ribs
    density: Plane = (chest * body).astype(np.float32)
    return density


def _add_mark(density: Plane, mark: Mark, x: Plane, y: Plane) -> None:
    """Add a mark in place; only the window that it reaches is touched."""
    cosine, sine = math.cos(mark.angle), math.sin(mark.angle)
    reach_x = _REACH * math.hypot(mark.along * cosine, mark.across * sine)
    reach_y = _REACH * math.hypot(mark.along * sine, mark.across * cosine)
    left, right = np.searchsorted(x, (mark.x - reach_x, mark.x + reach_x))
    top, bottom = np.searchsorted(y, (mark.y - reach_y, mark.y + reach_y))
    if left == right or top == bottom:
        return
    across = x[None, left:right] - np.float32(mark.x)
    down = y[top:bottom, None] - np.float32(mark.y)
    along = (across * np.float32(cosine) + down * np.float32(sine)) / np.float32(mark.along)
    aside = (down * np.float32(cosine) - across * np.float32(sine)) / np.float32(mark.across)
    density[top:bottom, left:right] += np.float32(mark.contrast) * np.exp(
        np.float32(-0.5) * (along * along + aside * aside)
    )


def _draw_texture(rng: np.random.Generator, rows: int, columns: int) -> Plane:
    """Soft-tissue mottle: coarse random knots, smoothly interpolated, shape ``(rows, columns)``."""
    knots = rng.normal(0.0, 0.025, (14, 12)).astype(np.float32)
    return (_smoothing(rows, 14) @ knots @ _smoothing(columns, 12).T).astype(np.float32)


def _smoothing(count: int, knots: int) -> Plane:
    """Weights that spread ``knots`` values over ``count`` pixels, shape ``(count, knots)``."""
    place = (np.arange(count, dtype=np.float32) + 0.5) * (knots / count) - 0.5
    distance = place[:, None] - np.arange(knots, dtype=np.float32)[None, :]
    weights = np.exp(-0.9 * distance * distance)
    smooth: Plane = (weights / weights.sum(axis=1, keepdims=True)).astype(np.float32)
    return smooth
