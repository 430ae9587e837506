"""The model that a session is bound to, by its bytes as they travel."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.errors import RosterMismatch
from cloister_fl.protocol import sessions
from cloister_fl.secagg import model_hash
from cloister_fl.simulation.demo_data import STUDY
from cloister_fl.study.file import parse_study
from support.secagg import roster_of, site_names


@pytest.mark.parametrize(
    "held",
    [
        np.arange(6, dtype=np.float32),
        np.arange(12, dtype=np.float32)[::2] / 2,
        np.arange(6, dtype=">f4"),
    ],
)
def test_the_model_is_hashed_by_its_bytes_however_it_is_held(held: np.ndarray) -> None:
    session = sessions.histogram_session(
        parse_study(STUDY), ("a", "b", "c"), round_number=1, attempt=0, model=held
    )
    assert session.model == model_hash(np.arange(6, dtype="<f4").tobytes())


def test_a_weight_is_the_study_s_or_the_roster_s_and_of_no_stranger() -> None:
    roster = roster_of(site_names(5), {"site-02": 2.5})
    asked = parse_study(STUDY)
    given = asked.aggregation.model_copy(update={"weights": {"site-01": 3.0, "site-09": 3.0}})
    asked = asked.model_copy(update={"aggregation": given})
    weights = [
        sessions.weight_of(asked, roster, name) for name in ("site-01", "site-02", "site-03")
    ]
    assert weights == [3.0, 2.5, 1.0]
    with pytest.raises(RosterMismatch):
        sessions.weight_of(asked, roster, "site-09")
