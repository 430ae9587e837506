"""Admission rules of the ledger: both limits, and parameters that stay.

No file is touched here; the ledger asks inside its transaction.
"""

from __future__ import annotations

from cloister_fl.client.ledger.replay import Account, State
from cloister_fl.errors import BudgetExhausted, PolicyRefused
from cloister_fl.privacy.accounting import epsilon_of
from cloister_fl.privacy.dp_events import Composition, compose
from cloister_fl.privacy.renyi_filter import lifetime_epsilon, would_fit


def others_of(state: State, wanted: Account, study: str | None) -> Composition:
    """What is reserved beside ``wanted``, of a study or of all: without what it would take over."""
    idle = idle_of(state, wanted)
    return state.reserved.of(study, less=() if idle is None else idle.reserved)


def require_gates(state: State, wanted: Account, study_limit: float, lifetime_limit: float) -> None:
    """Refuse what would pass the study's limit or the lifetime's; all that is reserved counts.

    Raises:
        BudgetExhausted: says what was asked, what is left, and the limit.
    """
    before, asked = others_of(state, wanted, wanted.study), wanted.reserved
    cost = epsilon_of(compose(before, asked), wanted.delta)
    if not cost <= study_limit:
        raise _exhausted(
            "study",
            asked=epsilon_of(asked, wanted.delta),
            left=study_limit - epsilon_of(before, wanted.delta),
            limit=study_limit,
        )
    before = others_of(state, wanted, None)
    if not would_fit(before, asked, lifetime_limit, state.delta, orders=state.orders):
        raise _exhausted(
            "lifetime",
            asked=lifetime_epsilon(asked, state.delta, orders=state.orders),
            left=lifetime_limit - lifetime_epsilon(before, state.delta, orders=state.orders),
            limit=lifetime_limit,
        )


def _exhausted(gate: str, *, asked: float, left: float, limit: float) -> BudgetExhausted:
    again = gate == "study" and asked <= limit
    return BudgetExhausted(
        f"The {gate} budget does not suffice: the study asks for epsilon {asked:.3f}, "
        f"{max(0.0, left):.3f} of {limit:.3f} is left.",
        why="This study was run at this site before. " * again
        + "Everything reserved or started counts, and nothing is refunded.",
        remedy="For trials, use public or generated data: cloister demo. Another study has its own "
        "budget within the lifetime budget; only the site's steward can raise a limit."
        if again
        else "Ask for a study with a smaller epsilon; only the site's steward can raise a limit.",
    )


def idle_of(state: State, wanted: Account) -> Account | None:
    """The reservation that ``wanted`` takes over: the study's oldest on the same terms of which
    nothing was started."""
    return next((one for one in state.of(wanted.study) if one.idle and _same(one, wanted)), None)


def _same(one: Account, other: Account) -> bool:
    return (one.mechanism, one.steps, one.delta, one.release) == (
        other.mechanism,
        other.steps,
        other.delta,
        other.release,
    )


def require_same(held: Account, wanted: Account) -> None:
    """Refuse a run whose privacy parameters differ from those that it reserved.

    Raises:
        PolicyRefused: they are others.
    """
    if not _same(held, wanted):
        raise PolicyRefused(
            "The run asks for other noise, sampling rate, steps or delta than it reserved.",
            why="These never change within a run.",
            remedy="Start a new run.",
        )
