"""The Renyi filter of the lifetime budget, valid where later studies depend on earlier results.

A study's own epsilon assumes that its parameters were fixed beforehand. Over a lifetime they are
not: whoever proposes the next study has seen the last model. Feldman and Zrnic 2021 ("Individual
Privacy Accounting via a Renyi Filter", Theorem 4.3) show that plain addition still holds there, as
long as one stops before the sum of Renyi divergences at a fixed order passes a fixed limit.

Here a finite set of orders is fixed when a ledger is made, and delta is split evenly over them. For
each order there is the moment at which its own filter would stop; the process stops at the latest
of these moments. The divergence at that moment is at most the sum of the divergences at each
order's moment (E[(1 - exp(epsilon - loss))+] is a sum of non-negative terms over which of them came
last), each at most delta / number of orders, so the whole is (epsilon, delta)-differentially
private: a union bound, and no order needs to be chosen in advance.

The proof covers the limit of the gate. ``lifetime_epsilon`` is what the gate compares with it: a
statement of account, not a bound for a reader who would stop because of what it shows.
"""

from __future__ import annotations

import math

from cloister_fl.privacy.accounting import rdp_of
from cloister_fl.privacy.dp_events import Composition, compose

ORDERS: tuple[float, ...] = (2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 24.0, 64.0)
"""Orders of a new ledger. Whole numbers: the divergence is then a finite sum, the same in every
implementation. From 2 (epsilon above 15) to 64 (epsilon below 0.5)."""


def would_fit(
    spent: Composition,
    proposed: Composition,
    epsilon: float,
    delta: float,
    *,
    orders: tuple[float, ...] = ORDERS,
) -> bool:
    """Whether ``proposed`` may still be run under the lifetime limit (epsilon, delta).

    Args:
        spent: everything reserved or started so far.
        proposed: what is asked for.
        epsilon: the limit, 0 or more.
        delta: of the ledger, above 0 and below 1.
        orders: of the ledger, each above 1.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not epsilon >= 0:
        raise ValueError("the limit must be 0 or more")
    return lifetime_epsilon(compose(spent, proposed), delta, orders=orders) <= epsilon


def lifetime_epsilon(
    spent: Composition, delta: float, *, orders: tuple[float, ...] = ORDERS
) -> float:
    """Smallest limit under which the filter would have let ``spent`` pass; 0 for nothing.

    The conversion at each order is that of Canonne, Kamath, Steinke 2020 (Proposition 12), which
    bounds the hockey-stick divergence itself, as the union bound needs.

    Raises:
        ValueError: an argument is outside its range.
    """
    if not 0 < delta < 1:
        raise ValueError("delta must be above 0 and below 1")
    if not orders or any(not (math.isfinite(order) and order > 1) for order in orders):
        raise ValueError("orders must be finite and above 1, and there must be one")
    if not compose(spent):
        return 0.0
    share = delta / len(orders)
    return min(
        _convert(order, divergence, share)
        for order, divergence in zip(orders, rdp_of(spent, orders), strict=True)
    )


def _convert(order: float, divergence: float, delta: float) -> float:
    epsilon = divergence + math.log1p(-1 / order) - math.log(delta * order) / (order - 1)
    return max(0.0, epsilon)
