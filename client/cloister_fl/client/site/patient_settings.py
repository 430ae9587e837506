"""Settings in ``site.toml`` of what makes two patient numbers one patient's.

::

    [data.patients]
    padding = "same"
    issuers = "different"
    mapping = "patients.csv"

Cloister decides none of this by itself: a wrong guess would either protect one person as two, or
join two people.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from cloister_fl.system.toml import FileModel

Decision = Literal["ask", "same", "different"]

KINDS = ("issuers", "components", "padding", "case", "punctuation")
"""In what two numbers may differ and still be one patient's, each a key of ``[data.patients]``."""


class PatientSettings(FileModel):
    """The table ``[data.patients]``: the steward's decisions.

    ``ask`` is no decision: where the data hold such a pair, checks of the data and freezing stop.
    """

    issuers: Decision = "ask"
    """One number under several values of IssuerOfPatientID, or with one and without."""
    components: Decision = "ask"
    """A number alone, and followed by ``^`` and more, as in HL7's CX."""
    padding: Decision = "ask"
    """With and without leading zeros, also behind letters: 0012 and 12, P0012 and P12."""
    case: Decision = "ask"
    """In capitals and small letters: AB12 and ab12."""
    punctuation: Decision = "ask"
    """With other spaces, hyphens, dots or slashes: 12-34, 12 34 and 1234."""
    names: Literal["ask", "different"] = "ask"
    """One name and birth date under several numbers; ``different`` where both are placeholders.
    That they prove one person is for the mapping to say, pair by pair."""
    mapping: Annotated[str, Field(max_length=4096)] = ""
    """A CSV file that says whose number is whose; empty for none."""

    @property
    def same(self) -> frozenset[str]:
        """The kinds of difference that make no other patient."""
        return frozenset(kind for kind in KINDS if getattr(self, kind) == "same")
