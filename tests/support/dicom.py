"""Build DICOM files for tests: sound ones, and ones that are wrong in exactly one way."""

from __future__ import annotations

import hashlib
import io
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import imagecodecs
import numpy as np
from numpy.typing import NDArray
from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.encaps import encapsulate
from pydicom.filewriter import dcmwrite
from pydicom.pixels import get_encoder
from pydicom.uid import UID

from cloister_fl.client.dicom import acceptance

SOP_CLASS = {
    "CR": "1.2.840.10008.5.1.4.1.1.1",
    "DX": "1.2.840.10008.5.1.4.1.1.1.1",
    "MG": "1.2.840.10008.5.1.4.1.1.1.2",
    "CT": "1.2.840.10008.5.1.4.1.1.2",
    "MR": "1.2.840.10008.5.1.4.1.1.4",
}
_PYDICOM_ENCODES = {
    acceptance.RLE: {},
    acceptance.JPEG_LS_LOSSLESS: {},
    acceptance.JPEG_LS_NEAR: {"jls_error": 2},
    acceptance.JPEG_2000_LOSSLESS: {},
    acceptance.JPEG_2000: {"j2k_psnr": [90]},
}
_HTJ2K = (acceptance.HTJ2K_LOSSLESS, acceptance.HTJ2K_LOSSLESS_RPCL, acceptance.HTJ2K)


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


def encode(
    pixels: NDArray[Any], transfer_syntax: str, bits_stored: int, *, signed: bool = False
) -> bytes:
    """One encoded frame; ``pixels`` are uint8, uint16 or int16, shape (rows, columns)."""
    wide = pixels.dtype.itemsize * 8
    raw = pixels.view(pixels.dtype.str.replace("i", "u"))
    mask = (1 << bits_stored) - 1
    if transfer_syntax in _PYDICOM_ENCODES:
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
                    bits_allocated=wide,
                    bits_stored=bits_stored,
                    pixel_representation=int(signed),
                    photometric_interpretation="MONOCHROME2",
                    **_PYDICOM_ENCODES[transfer_syntax],
                )
            )
    if transfer_syntax in (acceptance.JPEG_BASELINE, acceptance.JPEG_EXTENDED):
        return bytes(imagecodecs.jpeg8_encode(raw, level=99, bitspersample=bits_stored))
    if transfer_syntax == acceptance.JPEG_LOSSLESS:
        return bytes(
            imagecodecs.jpeg8_encode(
                raw & raw.dtype.type(mask), lossless=True, predictor=4, bitspersample=bits_stored
            )
        )
    if transfer_syntax == acceptance.JPEG_LOSSLESS_SV1:
        return bytes(
            imagecodecs.ljpeg_encode(raw & raw.dtype.type(mask), bitspersample=bits_stored)
        )
    if transfer_syntax in _HTJ2K:
        reversible = transfer_syntax != acceptance.HTJ2K
        return bytes(imagecodecs.htj2k_encode(pixels, reversible=reversible))
    raise ValueError(f"no encoder for transfer syntax {transfer_syntax!r}")


def make_dicom(
    pixels: NDArray[Any] | None = None,
    *,
    patient_id: str = "P1",
    modality: str = "DX",
    transfer_syntax: str = acceptance.EXPLICIT_LITTLE,
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
    native = transfer_syntax in acceptance.NATIVE
    if native:
        raw = pixels.astype(pixels.dtype.newbyteorder("<")).tobytes()
        data_set.PixelData = raw + bytes(len(raw) % 2)
    else:
        frame = encoded or encode(pixels, transfer_syntax, stored, signed=signed)
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
