"""Wrong on purpose: a name that is not public is unknown to mypy, also where names come late."""

from cloister_fl import simulation

simulation.simulat  # noqa: B018
