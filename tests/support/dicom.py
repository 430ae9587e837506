"""Build DICOM files for tests: sound ones, and ones that are wrong in exactly one way."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.pixels import get_encoder
from pydicom.uid import (
    HTJ2K,
    JPEG2000,
    UID,
    ExplicitVRLittleEndian,
    HTJ2KLossless,
    HTJ2KLosslessRPCL,
    JPEG2000Lossless,
    JPEGBaseline8Bit,
    JPEGExtended12Bit,
    JPEGLossless,
    JPEGLosslessSV1,
    JPEGLSLossless,
    JPEGLSNearLossless,
    RLELossless,
)

from cloister_fl.client.dicom.transfer_syntaxes import NATIVE, TRANSFER_SYNTAXES

SOP_CLASS = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
}


def uid(*words: object) -> str:
    """A UID that depends on the words alone."""
    digest = hashlib.sha256(repr(words).encode()).digest()
    return f"2.25.{int.from_bytes(digest[:15], 'big')}"


def radiograph(
    seed: int = 0, rows: int = 48, columns: int = 40, bits: int = 12
) -> NDArray[np.uint16]:
    """A smooth image that uses the whole range of ``bits``; another one for each seed."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:rows, 0:columns]
    wave = np.sin(y / rows * 3 + rng.uniform(0, 6)) + np.cos(x / columns * 4 + rng.uniform(0, 6))
    wave = wave + rng.normal(0, 0.02, wave.shape)
    wave = (wave - wave.min()) / (wave.max() - wave.min())
    return np.rint(wave * ((1 << bits) - 1)).astype(np.uint16)


def sample(
    transfer_syntax: str, seed: int = 0, rows: int = 48, columns: int = 40
) -> tuple[NDArray[Any], int]:
    """A radiograph as deep as the transfer syntax allows, 8 or 12 bits; and the bits stored."""
    bits = TRANSFER_SYNTAXES[transfer_syntax].depth
    pixels = radiograph(seed, rows, columns, bits)
    return pixels.astype(np.uint8 if bits == 8 else np.uint16), bits


Encoder = Callable[[NDArray[Any], int], bytes]


def _by_pydicom(transfer_syntax: str, **options: Any) -> Encoder:
    def encode(pixels: NDArray[Any], bits_stored: int) -> bytes:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return bytes(
                get_encoder(UID(transfer_syntax)).encode(
                    pixels.astype(pixels.dtype.newbyteorder("<")).tobytes(),
                    index=0,
                    rows=pixels.shape[0],
                    columns=pixels.shape[1],
                    samples_per_pixel=1,
                    number_of_frames=1,
                    bits_allocated=pixels.dtype.itemsize * 8,
                    bits_stored=bits_stored,
                    pixel_representation=int(pixels.dtype.kind == "i"),
                    photometric_interpretation="MONOCHROME2",
                    **options,
                )
            )

    return encode


def _unsigned(pixels: NDArray[Any]) -> NDArray[Any]:
    return pixels.view(pixels.dtype.str.replace("i", "u"))


def _stored(pixels: NDArray[Any], bits_stored: int) -> NDArray[Any]:
    raw = _unsigned(pixels)
    return raw & raw.dtype.type((1 << bits_stored) - 1)


def _jpeg(pixels: NDArray[Any], bits_stored: int) -> bytes:
    return bytes(imagecodecs.jpeg8_encode(_unsigned(pixels), level=99, bitspersample=bits_stored))


def _jpeg_lossless(pixels: NDArray[Any], bits_stored: int) -> bytes:
    raw, bits = _stored(pixels, bits_stored), bits_stored
    return bytes(imagecodecs.jpeg8_encode(raw, lossless=True, predictor=4, bitspersample=bits))


def _jpeg_lossless_sv1(pixels: NDArray[Any], bits_stored: int) -> bytes:
    return bytes(imagecodecs.ljpeg_encode(_stored(pixels, bits_stored), bitspersample=bits_stored))


def _htj2k(pixels: NDArray[Any], _bits_stored: int) -> bytes:
    return bytes(imagecodecs.htj2k_encode(pixels, reversible=True))


def _htj2k_lossy(pixels: NDArray[Any], _bits_stored: int) -> bytes:
    return bytes(imagecodecs.htj2k_encode(pixels, reversible=False))


ENCODERS: dict[str, Encoder] = {
    JPEGBaseline8Bit: _jpeg,
    JPEGExtended12Bit: _jpeg,
    JPEGLossless: _jpeg_lossless,
    JPEGLosslessSV1: _jpeg_lossless_sv1,
    JPEGLSLossless: _by_pydicom(JPEGLSLossless),
    JPEGLSNearLossless: _by_pydicom(JPEGLSNearLossless, jls_error=2),
    JPEG2000Lossless: _by_pydicom(JPEG2000Lossless),
    JPEG2000: _by_pydicom(JPEG2000, j2k_psnr=[90]),
    HTJ2KLossless: _htj2k,
    HTJ2KLosslessRPCL: _htj2k,
    HTJ2K: _htj2k_lossy,
    RLELossless: _by_pydicom(RLELossless),
}
"""How tests encode each transfer syntax: (pixels, bits stored) to one frame."""


SIZED = sorted(uid for uid, row in TRANSFER_SYNTAXES.items() if row.family.end)
"""Those whose frames say their size in a header of their own, and end with a marker."""


def encode(pixels: NDArray[Any], transfer_syntax: str, bits_stored: int) -> bytes:
    """One encoded frame; ``pixels`` are uint8, uint16 or int16, shape (rows, columns)."""
    if transfer_syntax not in ENCODERS:
        raise ValueError(f"no encoder for transfer syntax {transfer_syntax!r}")
    return ENCODERS[transfer_syntax](pixels, bits_stored)


def make_dicom(
    pixels: NDArray[Any] | None = None,
    *,
    patient_id: str = "P1",
    modality: str = "DX",
    transfer_syntax: str = ExplicitVRLittleEndian,
    bits_stored: int | None = None,
    photometric: str = "MONOCHROME2",
    preamble: bytes = bytes(128),
    encoded: bytes | None = None,
    elements: Mapping[str, Any] | None = None,
    without: Sequence[str] = (),
) -> bytes:
    """The bytes of a DICOM file.

    Args:
        pixels: uint8, uint16 or int16, shape (rows, columns); else ``radiograph()``.
        bits_stored: else 12 for the default image, and all bits of the type otherwise.
        encoded: a codestream to use in place of the encoded pixels.
        elements: elements by keyword, which replace what stands here.
        without: keywords of elements to leave out.
    """
    if pixels is None:
        pixels, bits_stored = radiograph(), bits_stored or 12
    stored = bits_stored or pixels.dtype.itemsize * 8
    signed = pixels.dtype.kind == "i"
    content = hashlib.sha256(pixels.tobytes()).hexdigest()
    data_set = Dataset()
    data_set.SOPClassUID = SOP_CLASS[modality]
    data_set.SOPInstanceUID = uid("instance", patient_id, content)
    data_set.Modality = modality
    data_set.AccessionNumber = f"ACC-{patient_id}"[:16]
    data_set.PatientID = patient_id
    data_set.BurnedInAnnotation = "NO"
    data_set.SamplesPerPixel = 1
    data_set.PhotometricInterpretation = photometric
    data_set.Rows, data_set.Columns = pixels.shape
    data_set.BitsAllocated = pixels.dtype.itemsize * 8
    data_set.BitsStored = stored
    data_set.HighBit = stored - 1
    data_set.PixelRepresentation = int(signed)
    native = transfer_syntax in NATIVE
    if native:
        raw = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
        data_set.PixelData = raw + bytes(len(raw) % 2)
    else:
        frame = encoded or encode(pixels, transfer_syntax, stored)
        data_set.PixelData = encapsulate([frame])
    data_set["PixelData"].VR = "OW" if native and pixels.dtype.itemsize == 2 else "OB"
    with warnings.catch_warnings():
        # Tests plant values that the standard does not allow.
        warnings.simplefilter("ignore")
        for keyword, value in (elements or {}).items():
            setattr(data_set, keyword, value)
    for keyword in without:
        delattr(data_set, keyword)
    if not native and "PixelData" in data_set:
        data_set["PixelData"].is_undefined_length = True
    meta = FileMetaDataset()
    meta.MediaStorageSOPClassUID = SOP_CLASS[modality]
    meta.MediaStorageSOPInstanceUID = uid("meta", patient_id, content)
    meta.TransferSyntaxUID = UID(transfer_syntax)
    data_set.file_meta = meta
    data_set.preamble = preamble
    out = io.BytesIO()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dcmwrite(out, data_set, enforce_file_format=True)
    return out.getvalue()


def write_dicom(path: Path, pixels: NDArray[Any] | None = None, **options: Any) -> str:
    """Write ``make_dicom(pixels, **options)`` to a file; return its SOP Instance UID."""
    path.parent.mkdir(parents=True, exist_ok=True)
    data = make_dicom(pixels, **options)
    path.write_bytes(data)
    given = (options.get("elements") or {}).get("SOPInstanceUID")
    if given is not None:
        return str(given)
    image = radiograph() if pixels is None else pixels
    content = hashlib.sha256(image.tobytes()).hexdigest()
    return uid("instance", options.get("patient_id", "P1"), content)


def wide(text: str) -> str:
    """ASCII letters and digits in their full-width forms."""
    return "".join(chr(ord(one) + 0xFEE0) for one in text)


def write_site(
    root: Path,
    patients: int = 24,
    images_per_patient: int = 1,
    *,
    classes: Sequence[str] = ("normal", "nodule"),
    column: str = "finding",
    key: str = "SOPInstanceUID",
    **options: Any,
) -> Path:
    """Write ``root/dicom`` and ``root/labels.csv``; patient ``i`` has class ``i % len(classes)``.

    Returns:
        ``root``, which ``cloister_fl.client.site.folder.init_site`` completes.
    """
    lines = [f"{key},{column}"]
    for number in range(patients):
        patient, label = f"MRN{number:05d}", classes[number % len(classes)]
        for image in range(images_per_patient):
            pixels = radiograph(1000 * number + image)
            instance = write_dicom(
                root / "dicom" / f"{number:03d}" / f"{image}.dcm",
                pixels,
                patient_id=patient,
                bits_stored=12,
                **options,
            )
            if key == "SOPInstanceUID":
                lines.append(f"{instance},{label}")
        if key == "AccessionNumber":
            lines.append(f"ACC-{patient},{label}")
        if key == "PatientID":
            lines.append(f"{patient},{label}")
    (root / "labels.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return root
