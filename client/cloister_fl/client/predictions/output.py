"""Where a prediction is written: judged before the images are read, which takes long."""

from __future__ import annotations

import io
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from cloister_fl.client.dicom.folder_reader import Accepted
from cloister_fl.errors import OutputInTheWay
from cloister_fl.system.files import create_secret, write_atomic
from cloister_fl.system.git_ignore import keep_file_out_of_git, keep_out_of_git

_ANOTHER = "Name another place (--out, out=)."


def prepare(out: Path, folder: Path, model: Path, *, masks: bool, overwrite: bool) -> None:
    """See that the output can be written and harms nothing; keep a file out of git.

    Args:
        out: the file of scores, or the folder of masks.
        folder: of the images.
        model: the model file.
        masks: whether ``out`` is a folder.
        overwrite: whether a file that is there may be replaced.

    Raises:
        OutputInTheWay: it cannot, or does.
    """
    try:
        _judge(out, folder, model, masks=masks, overwrite=overwrite)
    except (OSError, RuntimeError) as error:
        # Such as a name that is too long, or a folder that may not be entered.
        reason = error.strerror if isinstance(error, OSError) else None
        raise OutputInTheWay(
            f"{out} cannot be written.",
            why=(reason or "The system gave no reason") + ".",
            remedy=_ANOTHER,
        ) from None
    if not masks:
        keep_file_out_of_git(out)


def _judge(out: Path, folder: Path, model: Path, *, masks: bool, overwrite: bool) -> None:
    parent = out.absolute().parent
    if not parent.is_dir():
        raise OutputInTheWay(
            f"{out} cannot be written.",
            why=f"There is no folder {parent}.",
            remedy=f"Create it, or name another place: mkdir -p {parent}",
        )
    place, images = parent.resolve() / out.name, folder.resolve()
    if place.is_relative_to(images):
        raise OutputInTheWay(
            f"{out} would lie in the folder of the images.",
            why="The folder is only read, and the next prediction would read what is written here.",
            remedy="Name a place outside it (--out, out=).",
        )
    if _is_there(out):
        if out.resolve() == model.resolve():
            raise OutputInTheWay(f"{out} is the model itself.", remedy=_ANOTHER)
        if masks and not (out.is_dir() and not any(out.iterdir())):
            raise OutputInTheWay(
                f"{out} is not empty.", remedy="Name another folder (--out, out=)."
            )
        if not masks and not out.is_file():
            raise OutputInTheWay(f"{out} exists and is not a regular file.", remedy=_ANOTHER)
        if not masks and not overwrite:
            raise _taken(out)
    # Tried, for permission bits do not tell all: of root, or on a network share.
    handle, probe = tempfile.mkstemp(prefix=".cloister-", suffix=".tmp", dir=parent)
    os.close(handle)
    Path(probe).unlink()


def _is_there(path: Path) -> bool:
    try:
        path.lstat()
    except FileNotFoundError:
        return False
    return True


def _taken(out: Path) -> OutputInTheWay:
    return OutputInTheWay(
        f"{out} exists already.",
        remedy="Name another file (--out, out=), or replace it (--overwrite, overwrite=True).",
    )


def write_scores(out: Path, table: bytes, *, overwrite: bool) -> None:
    """Write the table for its owner alone; a file that came meanwhile is kept.

    Raises:
        OutputInTheWay: it is there, or cannot be written.
    """
    if overwrite:
        write_atomic(out, table)
    elif not create_secret(out, table):
        raise _taken(out)


def write_masks(folder: Path, images: Sequence[Accepted], masks: NDArray[np.bool_]) -> None:
    """Write the segmentation masks into a new folder, which appears when it is complete.

    Args:
        folder: not there, or empty.
        images: what was segmented.
        masks: of each image, (N, S, S).

    Raises:
        OutputInTheWay: it is not empty, or cannot be written.
    """
    from PIL import Image

    taken = OutputInTheWay(f"{folder} is not empty.", remedy="Name another folder (--out, out=).")
    try:
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise taken
        building = Path(tempfile.mkdtemp(prefix=".masks-", dir=folder.absolute().parent))
    except OSError as error:
        raise OutputInTheWay(
            f"{folder} cannot be written.",
            why=(error.strerror or "The system gave no reason") + ".",
            remedy="Name a folder that you may write to.",
        ) from None
    try:
        keep_out_of_git(building)
        written: Counter[str] = Counter()
        for one, mask in zip(images, masks, strict=True):
            # Two patients may have an image each under one UID.
            written[name := one.keys.sop_instance] += 1
            name += f"-{written[name]}" if written[name] > 1 else ""
            image = Image.fromarray(mask.astype(np.uint8) * 255)
            size = (one.facts.columns, one.facts.rows)
            file = io.BytesIO()
            image.resize(size, Image.Resampling.NEAREST).save(file, "PNG")
            write_atomic(building / f"{name}.png", file.getvalue())
        building.replace(folder)
    except OSError:
        raise taken from None
    finally:
        shutil.rmtree(building, ignore_errors=True)
