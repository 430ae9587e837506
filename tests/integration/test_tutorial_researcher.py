"""The tutorial for researchers, as it stands: its commands, one after the other."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from cloister_fl.simulation.result import read_result
from support.dicom import write_dicom
from support.federations import picture, write_cohort
from support.workbooks import write_workbook

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "tutorial-researcher.md"
WORDS = ("o. B.", "Rundherd")


def _hospital(folder: Path, rng: np.random.Generator, first: int) -> None:
    rows: list[list[object]] = [["Patienten-ID", "Befund", "Datum"]]
    for number in range(first, first + 24):
        patient, label = f"{number:04d}", number % 2
        rows.append([patient, WORDS[label], 45000 + number])
        path = folder / "dicom" / patient / "0.dcm"
        write_dicom(path, picture(rng, label), patient_id=patient, bits_stored=12)
    write_workbook(folder / "befunde.xlsx", {"Tabelle1": rows})


@pytest.mark.slow
def test_a_researcher_comes_from_a_table_of_excel_to_scores(tmp_path: Path) -> None:
    rng = np.random.default_rng(7)
    for place, name in enumerate(("nord", "sued", "ost", "west", "mitte")):
        _hospital(tmp_path / "sites" / name, rng, 17 + 100 * place)
    held = write_cohort(tmp_path / "holdout", rng, "HOLD", patients=40)
    table = held / "labels.csv"
    words = {"no": "normal", "yes": "nodule"}
    head, *lines = table.read_text().splitlines()
    told = [f"{key},{words[said]}" for key, said in (line.split(",") for line in lines)]
    table.write_text("\n".join([head, *told]) + "\n")
    for number in range(3):
        path = tmp_path / "neu" / f"{number}.dcm"
        write_dicom(path, picture(rng, number % 2), patient_id=f"N{number}", bits_stored=12)
    blocks = re.findall(r"^```bash\n(.*?)^```$", PAGE.read_text("utf-8"), re.M | re.S)
    assert len(blocks) == 6
    bin_folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", "\n".join(blocks)],
        cwd=tmp_path,
        check=False,
        capture_output=True,
        text=True,
        env={**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    private, plain = read_result(tmp_path / "run"), read_result(tmp_path / "run-open")
    assert private.epsilon == pytest.approx(3.0, abs=0.05)
    assert plain.epsilon is None
    for one in (private, plain):
        assert one.metrics is not None
        assert (one.metrics.patients, one.metrics.images) == (20, 20)
        assert one.report.is_file()
    scores = (tmp_path / "scores.csv").read_bytes()
    assert scores.startswith(b"\xef\xbb\xbf")
    assert len(scores.splitlines()) == 4
    assert "planned 3.00; 8 of 8 rounds started" in done.stdout
