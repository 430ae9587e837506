"""Membership of a federation: identities, enrolment, the roster."""
