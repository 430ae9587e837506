"""Accountants of one mechanism alone, to compare ``accounting.epsilon_pld`` with."""

from __future__ import annotations

from cloister_fl.privacy.accounting import epsilon_prv_of, epsilon_rdp_of
from cloister_fl.privacy.dp_events import Mechanism, compose


def epsilon_rdp(sigma: float, q: float, steps: int, delta: float) -> float:
    """Epsilon by Renyi accounting of ``steps`` Poisson-subsampled Gaussian steps."""
    return epsilon_rdp_of(compose(((Mechanism(sigma, q), steps),)), delta)


def epsilon_prv(sigma: float, q: float, steps: int, delta: float) -> float:
    """Epsilon by Opacus' PRV accountant of ``steps`` Poisson-subsampled Gaussian steps."""
    return epsilon_prv_of(compose(((Mechanism(sigma, q), steps),)), delta)
