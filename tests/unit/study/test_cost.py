"""The whole of a study: training and release together stay within its epsilon."""

from __future__ import annotations

import pytest

from cloister_fl.errors import EpsilonUnreachable
from cloister_fl.privacy.accounting import calibrate, epsilon_of, epsilon_pld, epsilon_prv_of
from cloister_fl.study.cost import charges, release_mechanism
from cloister_fl.study.schema import Study
from support import studies
from support.errors import raises


def study(rate: float, rounds: int, release: float, epsilon: float = 3.0) -> Study:
    return studies.study(
        training={"rounds": rounds, "sampling_rate": rate},
        privacy={"epsilon": epsilon},
        evaluation={"release_epsilon": release},
    )


@pytest.mark.long
@pytest.mark.parametrize(
    ("rate", "rounds", "release"), [(1.0, 60, 1.0), (0.25, 16, 1.0), (0.02, 300, 2.0)]
)
def test_the_whole_is_within_epsilon_and_within_0_02_of_prv(
    rate: float, rounds: int, release: float
) -> None:
    asked = study(rate, rounds, release)
    found = charges(asked)
    assert found.release is not None
    assert 2.98 < found.epsilon() <= 3.0
    assert found.epsilon() == epsilon_of(found.composition(), 1e-5)
    assert found.epsilon() == pytest.approx(epsilon_prv_of(found.composition(), 1e-5), abs=0.02)
    # Each part costs less than the whole, and the release what the study says.
    assert found.epsilon(released=False) < 3.0
    assert release - 1e-3 < found.epsilon(0) <= release
    assert found.composition(0, released=False) == ()
    assert found.epsilon(rounds - 1) < found.epsilon()


def test_a_step_less_noisy_breaks_the_promise() -> None:
    found = charges(study(1.0, 60, 1.0))
    assert found.release is not None
    sigma = found.step.noise_multiplier
    beside = ((found.release, 1),)
    assert sigma == calibrate(3.0, 1e-5, 1.0, 60, beside) > calibrate(3.0, 1e-5, 1.0, 60)
    # Full participation composes to one Gaussian: 1/s^2 adds up.
    whole = (60 / sigma**2 + 1 / found.release.noise_multiplier**2) ** -0.5
    assert epsilon_pld(whole, 1.0, 1, 1e-5) == pytest.approx(found.epsilon(), abs=1e-6)
    less = (60 / (sigma - 1e-3) ** 2 + 1 / found.release.noise_multiplier**2) ** -0.5
    assert epsilon_pld(less, 1.0, 1, 1e-5) > 3.0


def test_without_a_release_all_is_as_before() -> None:
    asked = study(0.25, 16, 0.0)
    found = charges(asked)
    assert release_mechanism(asked) is found.release is None
    assert found.step.noise_multiplier == calibrate(3.0, 1e-5, 0.25, 16)
    assert found.epsilon(8) == epsilon_pld(found.step.noise_multiplier, 0.25, 8, 1e-5)


def test_a_release_that_leaves_nothing_is_refused() -> None:
    release = release_mechanism(study(1.0, 5, 2.999))
    assert release is not None
    with raises(EpsilonUnreachable, match="uses all of epsilon 2"):
        calibrate(2.0, 1e-5, 1.0, 5, ((release, 1),))
