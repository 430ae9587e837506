"""Which folders a simulation takes for sites, and what it says of the others."""

from __future__ import annotations

from pathlib import Path

import pytest

from cloister_fl.errors import OptionInvalid
from cloister_fl.simulation.simulated_run import find_sites
from support.errors import raises
from support.federations import study


@pytest.mark.parametrize(
    ("names", "told"),
    [
        (("a",), "a in {} is not a site folder. "),
        (("a", "b"), "a and b in {} are not site folders. "),
        (tuple("abcdefg"), "a, b, c, d, e and 2 more in {} are not site folders. "),
    ],
)
def test_what_is_not_a_site_folder_is_named(
    tmp_path: Path, names: tuple[str, ...], told: str
) -> None:
    (tmp_path / "site" / "dicom").mkdir(parents=True)
    for name in names:
        (tmp_path / name).mkdir()
    with raises(OptionInvalid) as error:
        find_sites(tmp_path, study())
    assert str(error.value).startswith("CLO-106: " + told.format(tmp_path))
