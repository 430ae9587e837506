"""What the operators of the sites would read, in the error that ends a simulation."""

from __future__ import annotations

from pathlib import Path

from cloister_fl.client.site.folder import init_site
from cloister_fl.client.site.last_refusal import keep_last_refusal
from cloister_fl.errors import EpochReused, LabelMissing
from cloister_fl.simulation.simulated_run import _with_notices
from support import studies
from support.errors import is_of

STUDY = studies.study()


def test_an_error_keeps_its_code_and_is_followed_by_each_sites_last_refusal(tmp_path: Path) -> None:
    sites = [init_site(tmp_path / name, name=name) for name in ("birke", "linde")]
    error = EpochReused("What.", why="Why.", remedy="Remedy.")
    assert _with_notices(error, sites, STUDY) is error
    keep_last_refusal(sites[1].root, LabelMissing("Images have no label."))
    told = _with_notices(error, sites, STUDY)
    assert is_of(told, EpochReused)
    assert str(told) == "CLO-704: What. Why. Remedy.\n  linde: CLO-201: Images have no label."
