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
