"""The audit log: requests, actions and refusals, in a hash chain that both sides attest."""

from __future__ import annotations

from cloister_fl.audit_log.examination import Finding, Verdict, examine
from cloister_fl.audit_log.log import (
    EMPTY,
    MAX_LINE,
    AuditLog,
    Entry,
    Head,
    Value,
    heads_told,
    holds_entries,
    name_of,
    parse_note,
    read,
    told_heads,
)

__all__ = [
    "EMPTY",
    "MAX_LINE",
    "AuditLog",
    "Entry",
    "Finding",
    "Head",
    "Value",
    "Verdict",
    "examine",
    "heads_told",
    "holds_entries",
    "name_of",
    "parse_note",
    "read",
    "told_heads",
]
