"""Contact sheet: preprocessed images side by side, for a person to look at."""

from __future__ import annotations

import io

import numpy as np

from cloister_fl.client.data.cohort import Cohort
from cloister_fl.tasks import Task

SHEET_IMAGES = 48
"""Most images on a contact sheet."""
SHEET_COLUMNS = 8
SHEET_TILE = 128
"""Side of an image on a contact sheet, in pixels."""


def contact_sheet(cohort: Cohort, task: Task | None) -> tuple[int, bytes]:
    """Preprocessed images, one a patient, as a grid; a volume is shown by its middle slice, and the
    edge of what is marked in white.

    Returns:
        How many images it shows, at most ``SHEET_IMAGES``; and a PNG without any text.
    """
    from PIL import Image, ImageChops, ImageFilter

    chosen = [patient.images[0] for patient in cohort.patients[:SHEET_IMAGES]]
    columns = min(SHEET_COLUMNS, max(1, len(chosen)))
    rows = max(1, -(-len(chosen) // columns))
    sheet = Image.new("L", (columns * SHEET_TILE, rows * SHEET_TILE))
    for place, index in enumerate(chosen):
        image = cohort.images[index]
        if image.ndim == 3:
            image = image[len(image) // 2]
        shades = (image >> 8).astype(np.uint8)
        tile = Image.fromarray(shades).resize((SHEET_TILE, SHEET_TILE), Image.Resampling.BOX)
        target = task.overlay(cohort.targets[index]) if task and len(cohort.targets) else None
        if target is not None:
            mask = Image.fromarray(target * np.uint8(255))
            mask = mask.resize((SHEET_TILE, SHEET_TILE), Image.Resampling.NEAREST)
            edge = ImageChops.subtract(mask, mask.filter(ImageFilter.MinFilter(3)))
            tile = ImageChops.lighter(tile, edge)
        row, column = divmod(place, columns)
        sheet.paste(tile, (column * SHEET_TILE, row * SHEET_TILE))
    out = io.BytesIO()
    sheet.save(out, "PNG")
    return len(chosen), out.getvalue()
