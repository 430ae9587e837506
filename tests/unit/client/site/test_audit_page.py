"""The tables of docs/audit.md list every message that leaves a site, with all its fields."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

from cloister_fl.client.site.audit_log import WHY
from cloister_fl.protocol.round_messages import Refused, message_kinds
from cloister_fl.secagg.messages import complaints, participant_messages
from cloister_fl.secagg.messages.message_base import Message
from cloister_fl.server.rounds.messenger import TYPES

PAGE = Path(__file__).parents[4] / "docs" / "audit.md"


def table(heading: str) -> dict[str, list[str]]:
    """Of a table under "What leaves a site": the second column's words by the first's."""
    section = PAGE.read_text("utf-8").partition("## What leaves a site\n")[2].partition("\n## ")[0]
    rows = section.partition(f"| {heading} |")[2].partition("\n\n")[0]
    return {
        name: re.findall(r"`(\w+)`", fields)
        for name, fields in re.findall(r"^\| `([\w-]+)` \| ([^|]*) \|", rows, re.MULTILINE)
    }


def test_each_kind_of_message_is_listed_with_its_fields() -> None:
    kinds = message_kinds()
    real = {name: [field.name for field in dataclasses.fields(kinds[name])] for name in WHY}
    assert table("kind") == real


def test_the_log_can_hold_whatever_a_site_answers() -> None:
    """A kind that it did not know let each site fail at the end of a run that ended early."""
    assert set(WHY) == set(message_kinds()) - set(TYPES)


def test_each_message_of_secure_aggregation_is_listed_with_its_fields() -> None:
    real = {
        kind.NAME: [field.name for field in dataclasses.fields(kind)]  # type: ignore[arg-type]
        for kind in (vars(participant_messages) | vars(complaints)).values()
        if isinstance(kind, type) and issubclass(kind, Message) and "NAME" in vars(kind)
    }
    assert len(real) == 8
    assert table("message") == real


def test_each_reason_of_a_refusal_is_listed() -> None:
    (row,) = re.findall(r"^\| `refusal` \|.*$", PAGE.read_text("utf-8"), re.MULTILINE)
    assert {reason.value for reason in Refused} <= set(re.findall(r"`([\w-]+)`", row))
