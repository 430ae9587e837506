"""The model that a session is bound to, by its bytes as they travel."""

from __future__ import annotations

import numpy as np
import pytest

from cloister_fl.protocol import sessions
from cloister_fl.secagg import model_hash
from cloister_fl.simulation.demo_data import STUDY
from cloister_fl.study.file import parse_study


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


def test_a_weight_is_the_study_s_and_1_where_it_names_none() -> None:
    asked = parse_study(STUDY)
    given = asked.aggregation.model_copy(update={"weights": {"a": 3.0, "z": 5.0}})
    session = sessions.update_session(
        asked.model_copy(update={"aggregation": given}),
        ("a", "b", "c"),
        round_number=1,
        attempt=0,
        model=np.zeros(6, np.float32),
    )
    assert session.weights == (("a", 3.0), ("b", 1.0), ("c", 1.0))
    assert session.weight_range == (1.0, 3.0)
