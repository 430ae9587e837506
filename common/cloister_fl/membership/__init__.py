"""Who belongs to a federation: identities, enrolment, the roster."""
