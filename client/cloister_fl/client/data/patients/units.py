"""Units of privacy: which patient a record is of.

A unit is a function of the record's own fields and of what the steward decided, never of other
records: whether a patient is protected must not depend on who else is there. What loses nothing
that tells people apart is normalised; what could join two people (zeros, capitals, issuers) is the
steward's to decide.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from cloister_fl.client.site.folder import pseudonym
from cloister_fl.client.site.patient_settings import KINDS
from cloister_fl.system.text import is_blank

_LABEL = b"cloister/patients/v1"
_PADDING = re.compile(r"^([^\W\d_][^\d]*|)0+(?=\d)")
_PUNCTUATION = re.compile(r"[^\w^]+|_+")


@dataclass(frozen=True, order=True)
class Record:
    """A patient number as it is compared, and who issued it; empty where nobody is named."""

    issuer: str = field(repr=False)
    number: str = field(repr=False)


def normalised(issuer: str, number: str) -> Record:
    """Undo what a device or a program does to a number without making it another one.

    Compatibility forms of characters become the plain ones (Unicode NFKC), decimal digits of any
    script the ASCII ones, and what cannot be seen at the ends goes. An issuer's case goes too.
    """
    return Record(_plain(issuer).casefold(), _plain(number))


def folded(record: Record, kinds: Iterable[str]) -> Record:
    """Undo differences of some ``KINDS`` too; equal results differ in these alone."""
    issuer, number = record.issuer, record.number
    if "components" in kinds:
        # ID^check digit^scheme^assigning authority (HL7 v2, CX)
        head, *rest = number.split("^")
        if head.strip():
            authority = rest[2].partition("&")[0].strip() if len(rest) > 2 else ""
            issuer, number = issuer or authority.casefold(), head.strip()
    if "punctuation" in kinds:
        number = _PUNCTUATION.sub("", number) or number
    if "case" in kinds:
        number = number.casefold()
    if "padding" in kinds:
        number = _PADDING.sub(r"\1", number)
    return Record("" if "issuers" in kinds else issuer, number)


def _plain(text: str) -> str:
    plain = unicodedata.normalize("NFKC", text)
    plain = "".join(str(unicodedata.decimal(one)) if one.isdecimal() else one for one in plain)
    start, end = 0, len(plain)
    while start < end and is_blank(plain[start]):
        start += 1
    while end > start and is_blank(plain[end - 1]):
        end -= 1
    return plain[start:end]


@dataclass(frozen=True, order=True)
class Row:
    """A row of the steward's mapping, as keyed hashes of 64 hexadecimal digits.

    Attributes:
        record: of the number and its issuer.
        number: of the number alone.
        person: of the person.
    """

    record: str
    number: str
    person: str


@dataclass(frozen=True)
class Decisions:
    """What the steward decided, without a number or a name: what a study is frozen with.

    Attributes:
        settings: ``[data.patients]``: key and value, the mapping left out.
        rows: of the mapping.
    """

    settings: Mapping[str, str] = field(default_factory=dict)
    rows: tuple[Row, ...] = ()

    @property
    def same(self) -> frozenset[str]:
        """The kinds of difference that make no other patient."""
        return frozenset(kind for kind in KINDS if self.settings.get(kind) == "same")

    @property
    def words(self) -> str:
        """The settings that are a decision, such as ``case=same padding=different``."""
        decided = [item for item in sorted(self.settings.items()) if item[1] != "ask"]
        return " ".join(f"{kind}={decision}" for kind, decision in decided)

    @property
    def digest(self) -> str:
        """SHA-256 of all of it, 64 hexadecimal digits; keyed as far as it is about patients."""
        told = hashlib.sha256(_LABEL)
        words = [word for item in sorted(self.settings.items()) for word in item]
        words += [word for row in self.rows for word in (row.record, row.number, row.person)]
        for word in words:
            told.update(len(word.encode()).to_bytes(8, "big") + word.encode())
        return told.hexdigest()


class Units:
    """Names the patients of a site's records.

    Args:
        key: the site's pseudonym key, 32 bytes.
        decisions: what the steward decided.
    """

    def __init__(self, key: bytes, decisions: Decisions) -> None:
        self._key = key
        self._same = decisions.same
        self._persons = {row.record: row.person for row in decisions.rows}
        numbers: dict[str, dict[str, None]] = defaultdict(dict)
        for row in decisions.rows:
            numbers[row.person][row.number] = None
        self._numbers = {person: tuple(each) for person, each in numbers.items()}

    def record(self, issuer: str, number: str) -> Record:
        """A record as it is compared at this site."""
        return folded(normalised(issuer, number), self._same)

    def pseudonym(self, study_digest: str, issuer: str, number: str) -> str:
        """Name the patient of a record within one study; see ``folder.pseudonym``."""
        return pseudonym(self._key, study_digest, *self.unit(issuer, number))

    def unit(self, issuer: str, number: str) -> tuple[str, ...]:
        """What stands for the patient: the record, or the person of the mapping."""
        record = self.record(issuer, number)
        person = self._persons.get(self._record_hash(record))
        return (record.issuer, record.number) if person is None else ("", "person", person)

    def number(self, text: str) -> str:
        """A keyed hash of a number without its issuer, as a labels file has it."""
        return keyed(self._key, "number", self.record("", text).number)

    def numbers(self, issuer: str, number: str) -> tuple[str, ...]:
        """Keyed hashes of all numbers that the patient of a record has, the record's own first."""
        record = self.record(issuer, number)
        own = keyed(self._key, "number", record.number)
        person = self._persons.get(self._record_hash(record), "")
        return tuple(dict.fromkeys((own, *self._numbers.get(person, ()))))

    def row(self, record: Record, person: str) -> Row:
        """A row of the mapping, for ``Decisions``."""
        return Row(
            self._record_hash(record),
            keyed(self._key, "number", record.number),
            keyed(self._key, "person", person),
        )

    def _record_hash(self, record: Record) -> str:
        return keyed(self._key, "record", record.issuer, record.number)


def keyed(key: bytes, *words: str) -> str:
    """HMAC-SHA-256 over words, each behind its length: 64 hexadecimal digits."""
    message = bytearray(_LABEL)
    for word in words:
        data = word.encode("utf-8", "surrogatepass")
        message += len(data).to_bytes(8, "big") + data
    return hmac.new(key, bytes(message), hashlib.sha256).hexdigest()
