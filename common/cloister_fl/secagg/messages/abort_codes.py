"""The closed list of codes with which a site may abort a key epoch."""

from __future__ import annotations

from cloister_fl.errors import EncodingOverflow, NotFinite, SecureAggregationError, all_errors

LOCAL_FAULTS = (EncodingOverflow, NotFinite)
"""Errors whose cause may depend on the site's data: they leave it under one common code."""

ABORT_CODES = frozenset(
    kind.code
    for kind in all_errors()
    if issubclass(kind.family, SecureAggregationError) and not issubclass(kind.family, LOCAL_FAULTS)
)
"""The closed list of codes that an abort may carry."""
