"""The audit log: requests, actions and refusals, in a hash chain that both sides attest."""

from __future__ import annotations

from cloister_fl.audit_log.entries import EMPTY, MAX_LINE, Entry, Head, Value
from cloister_fl.audit_log.examination import Finding, Verdict, examine
from cloister_fl.audit_log.heads import Noted, heads_told, name_of, parse_note, told_heads
from cloister_fl.audit_log.log import AuditLog
from cloister_fl.audit_log.segments import holds_entries, is_begun, read

__all__ = [
    "EMPTY",
    "MAX_LINE",
    "AuditLog",
    "Entry",
    "Finding",
    "Head",
    "Noted",
    "Value",
    "Verdict",
    "examine",
    "heads_told",
    "holds_entries",
    "is_begun",
    "name_of",
    "parse_note",
    "read",
    "told_heads",
]
