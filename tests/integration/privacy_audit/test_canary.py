"""The canary audit: sound code passes, and each of five faults is patched in and accused.

Draws and chances are stated for each fault. A sound step is accused with a chance of at most 1 %
(confidence 99 %); for Gaussian noise it is about 0.01 %, for both error rates would have to be
estimated too low by 2.6 standard deviations together. "Missed" is the chance that the fault is not
noticed, from the normal approximation of the two error rates. Keys are fixed, so that each test
comes out the same every time.
"""

from __future__ import annotations

import hashlib
import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from cloister_fl.client.privacy_audit.canary import _lower_epsilon, _upper_rate, audit_step
from cloister_fl.client.training import csprng, local_training
from cloister_fl.client.training.csprng import SecureRandom
from cloister_fl.client.training.sampling import Bag
from cloister_fl.errors import StudyInvalid
from cloister_fl.privacy.accounting import epsilon_pld

NOISE = 1.14
DELTA = 1e-5
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def counted_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    count = itertools.count()
    monkeypatch.setattr(
        csprng, "_fresh_key", lambda: hashlib.sha256(b"canary%d" % next(count)).digest()
    )


def audited(draws: int, engine: local_training.Engine = "patients") -> float:
    """Audited epsilon over the claimed one: above 1 the code is accused."""
    found = audit_step(draws, noise_multiplier=NOISE, delta=DELTA, engine=engine)
    assert found.claimed_epsilon == pytest.approx(epsilon_pld(NOISE, 1.0, 2, DELTA))
    assert found.draws == draws
    assert found.passed == (found.audited_epsilon <= found.claimed_epsilon)
    return found.audited_epsilon / found.claimed_epsilon


def test_the_installed_step_passes_and_the_audit_sees_much_of_it() -> None:
    assert 0.45 < audited(800) < 1


@pytest.mark.slow
def test_the_engine_of_opacus_passes() -> None:
    assert 0.45 < audited(800, "opacus") < 1


def test_book_keeping_is_not_audited() -> None:
    with pytest.raises(StudyInvalid, match="can move its sum of clipped gradients"):
        audited(40, "book-keeping")


@pytest.mark.slow
def test_more_draws_see_more() -> None:
    assert 0.7 < audited(10_000) < 1


def weaken(monkeypatch: pytest.MonkeyPatch, factor: float) -> None:
    honest = SecureRandom.normal

    def normal(self: SecureRandom, n: int, std: float = 1.0, **rest: Any) -> torch.Tensor:
        return honest(self, n, factor * std, **rest)

    monkeypatch.setattr(SecureRandom, "normal", normal)


@pytest.mark.slow
def test_half_the_noise_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """800 draws; missed with a chance below 1e-4."""
    weaken(monkeypatch, 0.5)
    assert audited(800) > 1


@pytest.mark.slow
def test_15_percent_too_little_noise_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """10,000 draws; missed with a chance of about 1e-4."""
    weaken(monkeypatch, 0.85)
    assert audited(10_000) > 1


@pytest.mark.slow
def test_sigma_split_over_the_layers_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """3,000 draws; missed with a chance below 1e-5: two layers, each with sigma / sqrt(2)."""
    honest = SecureRandom.normal

    def normal(self: SecureRandom, n: int, std: float = 1.0, **rest: Any) -> torch.Tensor:
        layers = (n - 16, 16)
        parts = [honest(self, size, std / math.sqrt(len(layers)), **rest) for size in layers]
        return torch.cat(parts)

    monkeypatch.setattr(SecureRandom, "normal", normal)
    assert audited(3_000) > 1


@pytest.mark.slow
def test_images_clipped_one_by_one_are_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """400 draws; missed with a chance below 1e-5: the canary weighs five times as much."""
    honest = local_training.draw_bags

    def draw(*given: Any, **named: Any) -> list[Bag]:
        return [Bag(np.array([image])) for bag in honest(*given, **named) for image in bag.images]

    monkeypatch.setattr(local_training, "draw_bags", draw)
    assert audited(400) > 1


def test_a_seed_reset_in_each_round_is_accused(monkeypatch: pytest.MonkeyPatch) -> None:
    """200 draws; never missed: two rounds with the same noise tell the canary without error."""
    monkeypatch.setattr(csprng, "_fresh_key", lambda: bytes(32))
    assert audited(200) > 1


def test_bounds_of_rates_are_those_of_the_beta_distribution() -> None:
    from scipy.stats import beta

    for count, of in ((0, 50), (3, 50), (531, 2_000), (1_999, 2_000)):
        exact = beta.ppf(1 - 0.005, count + 1, of - count)
        assert _upper_rate(count, of, 0.005) == pytest.approx(exact, rel=1e-9)
    assert _upper_rate(50, 50, 0.005) == 1


def test_what_is_not_told_apart_is_epsilon_zero() -> None:
    assert _lower_epsilon(500, 500, 1_000, DELTA, 0.99) == 0
    assert _lower_epsilon(1_000, 0, 1_000, DELTA, 0.99) == 0
    assert _lower_epsilon(0, 0, 1_000, DELTA, 0.99) > 20


@pytest.mark.parametrize(("draws", "confidence"), [(38, 0.99), (41, 0.99), (40, 1.0), (40, 0.0)])
def test_arguments_are_checked(draws: int, confidence: float) -> None:
    with pytest.raises(ValueError):
        audit_step(draws, noise_multiplier=NOISE, delta=DELTA, confidence=confidence)
