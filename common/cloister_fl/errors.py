"""Tree of all errors that Cloister raises on purpose.

::

    CloisterError
    ├── InputError                 1xx, exit 2: a file or an option that a person wrote
    │   ├── StudyInvalid           CLO-101
    │   ├── SiteFileInvalid        CLO-102
    │   ├── FileUnreadable         CLO-103
    │   ├── OutputInTheWay         CLO-104
    │   ├── TooFewSitesGiven       CLO-105
    │   └── OptionInvalid          CLO-106
    ├── DataError                  2xx, exit 3: the images and labels of a site
    │   ├── LabelMissing           CLO-201
    │   ├── LabelWithoutImage      CLO-202
    │   ├── SiteEmpty              CLO-203
    │   ├── OneClassOnly           CLO-204
    │   ├── FolderUnreadable       CLO-205
    │   ├── LabelsInvalid          CLO-206
    │   ├── CohortTooSmall         CLO-207
    │   ├── DecoderUnfit           CLO-208
    │   ├── DataChanged            CLO-209
    │   ├── ArchiveUnreachable     CLO-250
    │   ├── ArchiveRefused         CLO-251
    │   ├── ArchiveAnswerInvalid   CLO-252
    │   └── FetchUnfinished        CLO-253
    ├── PrivacyError               3xx, exit 4: the ledger, the budget, the site's policy
    │   ├── BudgetExhausted        CLO-301
    │   ├── LedgerDamaged          CLO-302
    │   ├── PolicyRefused          CLO-303
    │   ├── EpsilonUnreachable     CLO-304
    │   ├── RoundAlreadySpent      CLO-305
    │   ├── AuditLogDamaged        CLO-306
    │   ├── StudyNotApproved       CLO-307
    │   ├── OutsideHours           CLO-308
    │   ├── LedgerRolledBack       CLO-309
    │   ├── CertificateInvalid     CLO-310
    │   └── ReleaseAlreadySpent    CLO-311
    ├── ModelError                 4xx, exit 5: networks, vectors and model files
    │   ├── NetworkUnfit           CLO-401
    │   ├── ModelFileInvalid       CLO-402
    │   ├── UpdateInvalid          CLO-403
    │   └── WeightsUnfit           CLO-404
    ├── RunError                   5xx, exit 6: rounds and the federation
    │   ├── TooFewSites            CLO-501
    │   ├── MessageInvalid         CLO-502
    │   ├── ResumeMismatch         CLO-503
    │   ├── NothingToResume        CLO-504
    │   ├── BundleRefused          CLO-505
    │   ├── RunUnknown             CLO-506
    │   └── RunStopped             CLO-507
    ├── InstallError               6xx, exit 7: what is installed
    │   └── ExtraMissing           CLO-601
    ├── SecureAggregationError     7xx, exit 8: what a party refused, and whom it blames
    │   ├── ParameterRefused       CLO-701
    │   ├── RosterMismatch         CLO-702
    │   ├── SignatureInvalid       CLO-703
    │   ├── EpochReused            CLO-704
    │   ├── KeyReused              CLO-705
    │   ├── LowOrderKey            CLO-706
    │   ├── OwnRecordAltered       CLO-707
    │   ├── BoxTampered            CLO-708
    │   ├── DealerBlamed           CLO-709
    │   ├── ShareMismatch          CLO-710
    │   ├── SplitView              CLO-711
    │   ├── OverlapRefused         CLO-712
    │   ├── UpdateReuse            CLO-713
    │   ├── TooFewSurvivors        CLO-714
    │   ├── StageRepeated          CLO-715
    │   ├── StageOutOfOrder        CLO-716
    │   ├── SessionUnknown         CLO-717
    │   ├── SessionMismatch        CLO-718
    │   ├── EncodingOverflow       CLO-719
    │   ├── NotFinite              CLO-720
    │   ├── WeightAboveCap         CLO-721
    │   ├── WireInvalid            CLO-722
    │   ├── TranscriptMismatch     CLO-723
    │   ├── SiteAborted            CLO-724
    │   ├── RosterInvalid          CLO-725
    │   └── IdentityInvalid        CLO-726
    ├── DeploymentError            8xx, exit 9: the coordinator's server, and joining it
    │   ├── ServerFolderInvalid    CLO-801
    │   ├── InviteInvalid          CLO-802
    │   ├── EnrolmentRefused       CLO-803
    │   ├── CoordinatorUnreachable CLO-804
    │   ├── CoordinatorUnproven    CLO-805
    │   ├── SiteStateInvalid       CLO-806
    │   ├── ListenRefused          CLO-807
    │   ├── ServerState            CLO-808
    │   ├── ProxyUnusable          CLO-811
    │   ├── ProxyLoginRefused      CLO-812
    │   ├── ProxyForbids           CLO-813
    │   ├── ClockOrDates           CLO-814
    │   ├── VersionsDiffer         CLO-815
    │   └── ServiceState           CLO-820
    └── InternalError              CLO-901, exit 70: an internal error

The families are classes. An error under them is a class where the program catches it or tests for
its type; otherwise it is an ``ErrorKind``, whose call returns an instance of the family with the
kind's code and title.

A message says what happened, why, and what to do. It never carries a patient's data, a path
inside a site's data folder, or the text of a library's exception: such text quotes values.
Files that are rejected one by one do not raise; they carry a ``Reject`` reason, which has a
number and a page of its own.
"""

from __future__ import annotations

import enum
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Generic, Self, TypeVar, overload


class CloisterError(Exception):
    """Base of all intended errors.

    Args:
        what: what happened, one sentence.
        why: the cause, as far as it is known.
        remedy: what the reader can do about it.
    """

    code: str = "CLO-900"
    title: str = "Cloister error"
    exit_status: ClassVar[int] = 1

    def __init__(self, what: str, *, why: str = "", remedy: str = "") -> None:
        self.what = what
        self.why = why
        self.remedy = remedy
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what, self.why, self.remedy]
        return f"{self.code}: " + " ".join(part for part in parts if part)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    @property
    def kind(self) -> ErrorKind[Self]:
        """What makes another error of this code."""
        return ErrorKind(type(self), self.code, self.title)

    def __reduce__(self) -> tuple[object, ...]:
        # Ray carries errors between processes; the default would drop the keyword arguments.
        return (_rebuild, (self.kind, self.what, self.why, self.remedy), dict(self.__dict__))


_ErrorT_co = TypeVar("_ErrorT_co", bound=CloisterError, covariant=True)


@dataclass(frozen=True)
class ErrorKind(Generic[_ErrorT_co]):
    """An error with a code of its own and no class; a call returns an exception of its family.

    Attributes:
        family: class of the exceptions.
        code: their code, ``CLO-nnn``.
        title: title of the code's page.
    """

    family: type[_ErrorT_co]
    code: str
    title: str

    @property
    def exit_status(self) -> int:
        """Status with which the commands exit on it."""
        return self.family.exit_status

    @overload
    def __call__(
        self: ErrorKind[SecureAggregationError],
        what: str,
        *,
        why: str = "",
        remedy: str = "",
        blamed: str = "",
    ) -> SecureAggregationError: ...

    @overload
    def __call__(self, what: str, *, why: str = "", remedy: str = "") -> _ErrorT_co: ...

    def __call__(self, what: str, *, why: str = "", remedy: str = "", **more: str) -> CloisterError:
        error = self.family(what, why=why, remedy=remedy, **more)
        error.code, error.title = self.code, self.title
        return error


def _rebuild(kind: ErrorKind[CloisterError], what: str, why: str, remedy: str) -> CloisterError:
    return kind(what, why=why, remedy=remedy)


@dataclass(frozen=True, order=True)
class Fault:
    """One fault in a file that a person wrote.

    Attributes:
        line: 1-based line in the file, or 0 where no line can be named.
        key: dotted path of the key, such as ``training.rounds``.
        message: what is wrong with it.
        hint: what to write instead; may be empty.
    """

    line: int
    key: str
    message: str
    hint: str = ""

    def __str__(self) -> str:
        where = f"line {self.line}: " if self.line else ""
        hint = f" {self.hint}" if self.hint else ""
        return f"{where}{self.key}: {self.message}{hint}"


class InputError(CloisterError):
    title = "Bad input"
    exit_status = 2


class _FaultyFile(InputError):
    """A file with faults, all of them in one message."""

    faults: tuple[Fault, ...] = ()

    @classmethod
    def of(cls, name: str, faults: Sequence[Fault]) -> _FaultyFile:
        ordered = tuple(sorted(faults))
        count = "1 fault" if len(ordered) == 1 else f"{len(ordered)} faults"
        listing = "\n".join(f"  {fault}" for fault in ordered)
        error = cls(f"{name} has {count}:\n{listing}")
        error.faults = ordered
        return error


class StudyInvalid(_FaultyFile):
    code = "CLO-101"
    title = "The study file is not valid"


class SiteFileInvalid(_FaultyFile):
    code = "CLO-102"
    title = "The site file is not valid"


class FileUnreadable(InputError):
    code = "CLO-103"
    title = "A file cannot be read"


class OutputInTheWay(InputError):
    code = "CLO-104"
    title = "The output exists already or cannot be written"


TooFewSitesGiven = ErrorKind(InputError, "CLO-105", "Fewer sites than the study requires")
OptionInvalid = ErrorKind(InputError, "CLO-106", "A value on the command line is not valid")


class DataError(CloisterError):
    title = "The site's data cannot be used"
    exit_status = 3


LabelMissing = ErrorKind(DataError, "CLO-201", "Images have no label")


class LabelWithoutImage(DataError):
    code = "CLO-202"
    title = "Labels without an image"


SiteEmpty = ErrorKind(DataError, "CLO-203", "The site has no usable image")
OneClassOnly = ErrorKind(DataError, "CLO-204", "All patients of the site have the same class")


class FolderUnreadable(DataError):
    code = "CLO-205"
    title = "The data folder cannot be read"


class LabelsInvalid(DataError):
    code = "CLO-206"
    title = "The labels file is not valid"


CohortTooSmall = ErrorKind(DataError, "CLO-207", "The site has too few patients of a class")


class DecoderUnfit(DataError):
    code = "CLO-208"
    title = "An image decoder failed its self-test"


DataChanged = ErrorKind(DataError, "CLO-209", "The site's data changed after the study was frozen")


class ArchiveUnreachable(DataError):
    code = "CLO-250"
    title = "The archive cannot be reached"


ArchiveRefused = ErrorKind(DataError, "CLO-251", "The archive refused access")
ArchiveAnswerInvalid = ErrorKind(DataError, "CLO-252", "The archive's response is not valid")
FetchUnfinished = ErrorKind(DataError, "CLO-253", "A fetch from the archive is not complete")


class PrivacyError(CloisterError):
    title = "Refused to protect privacy"
    exit_status = 4


class BudgetExhausted(PrivacyError):
    code = "CLO-301"
    title = "The privacy budget is not sufficient"


LedgerDamaged = ErrorKind(PrivacyError, "CLO-302", "The privacy ledger is damaged")


class PolicyRefused(PrivacyError):
    code = "CLO-303"
    title = "The site's policy does not allow the study"


EpsilonUnreachable = ErrorKind(
    PrivacyError, "CLO-304", "No noise level meets the requested epsilon"
)


class RoundAlreadySpent(PrivacyError):
    code = "CLO-305"
    title = "The round was already charged"


class AuditLogDamaged(PrivacyError):
    code = "CLO-306"
    title = "The audit log is damaged"


class StudyNotApproved(PrivacyError):
    code = "CLO-307"
    title = "The study is not approved at this site"


class OutsideHours(PrivacyError):
    code = "CLO-308"
    title = "Outside the site's training window"


LedgerRolledBack = ErrorKind(
    PrivacyError, "CLO-309", "The privacy ledger may have been rolled back"
)
CertificateInvalid = ErrorKind(
    PrivacyError, "CLO-310", "A privacy certificate or ledger export is not valid"
)


class ReleaseAlreadySpent(PrivacyError):
    code = "CLO-311"
    title = "The noised evaluation was already charged"


class ModelError(CloisterError):
    title = "The model cannot be used"
    exit_status = 5


class NetworkUnfit(ModelError):
    code = "CLO-401"
    title = "The network cannot be trained as the study asks"


ModelFileInvalid = ErrorKind(ModelError, "CLO-402", "The file is not a Cloister model")


class UpdateInvalid(ModelError):
    code = "CLO-403"
    title = "A weight or update vector is not valid"


WeightsUnfit = ErrorKind(
    ModelError, "CLO-404", "Pretrained weights are missing or do not match the study"
)


class RunError(CloisterError):
    title = "The run cannot go on"
    exit_status = 6


class TooFewSites(RunError):
    code = "CLO-501"
    title = "Too few sites take part"


class MessageInvalid(RunError):
    code = "CLO-502"
    title = "A message is malformed"


ResumeMismatch = ErrorKind(RunError, "CLO-503", "The run to resume belongs to another study")
NothingToResume = ErrorKind(RunError, "CLO-504", "There is no run to resume")


class BundleRefused(RunError):
    code = "CLO-505"
    title = "The site refused the run's application bundle"


class RunUnknown(RunError):
    code = "CLO-506"
    title = "No such run, or its state does not allow the command"


class RunStopped(RunError):
    code = "CLO-507"
    title = "The run was stopped"


class InstallError(CloisterError):
    title = "Something is not installed"
    exit_status = 7


ExtraMissing = ErrorKind(InstallError, "CLO-601", "A component of Cloister is not installed")


class SecureAggregationError(CloisterError):
    """A check of the protocol failed; no secret was sent.

    Args:
        blamed: id of the site that the evidence speaks against; empty where it is the server
            or nobody.
    """

    title = "Secure aggregation was refused"
    exit_status = 8

    def __init__(self, what: str, *, why: str = "", remedy: str = "", blamed: str = "") -> None:
        super().__init__(what, why=why, remedy=remedy)
        self.blamed = blamed


ParameterRefused = ErrorKind(
    SecureAggregationError, "CLO-701", "A parameter is outside what the site or the protocol allows"
)


class RosterMismatch(SecureAggregationError):
    code = "CLO-702"
    title = "A site is not on the trusted roster, or the roster differs"


SignatureInvalid = ErrorKind(
    SecureAggregationError, "CLO-703", "A signature does not match the trusted roster's key"
)
EpochReused = ErrorKind(SecureAggregationError, "CLO-704", "A key epoch was used before")
KeyReused = ErrorKind(SecureAggregationError, "CLO-705", "A key was sent twice")
LowOrderKey = ErrorKind(SecureAggregationError, "CLO-706", "A key is of low order or not canonical")
OwnRecordAltered = ErrorKind(
    SecureAggregationError, "CLO-707", "The site's own record came back altered or is missing"
)
BoxTampered = ErrorKind(
    SecureAggregationError, "CLO-708", "Encrypted shares are not those that their dealer signed"
)
DealerBlamed = ErrorKind(
    SecureAggregationError, "CLO-709", "A dealer sent shares that do not match its secret"
)
ShareMismatch = ErrorKind(
    SecureAggregationError, "CLO-710", "A share is not the one that was dealt"
)
SplitView = ErrorKind(SecureAggregationError, "CLO-711", "The sites do not agree on what is summed")
OverlapRefused = ErrorKind(
    SecureAggregationError, "CLO-712", "A set of surviving sites was refused"
)
UpdateReuse = ErrorKind(
    SecureAggregationError, "CLO-713", "The round was already answered for another set of sites"
)


class TooFewSurvivors(SecureAggregationError):
    code = "CLO-714"
    title = "Too few sites are left for secure aggregation"


StageRepeated = ErrorKind(
    SecureAggregationError, "CLO-715", "A stage was requested again with other content"
)
StageOutOfOrder = ErrorKind(SecureAggregationError, "CLO-716", "A stage was requested out of order")
SessionUnknown = ErrorKind(
    SecureAggregationError,
    "CLO-717",
    "The site has no such key epoch or secure-aggregation session",
)
SessionMismatch = ErrorKind(
    SecureAggregationError,
    "CLO-718",
    "A secure-aggregation session does not match the approved study",
)


class EncodingOverflow(SecureAggregationError):
    code = "CLO-719"
    title = "An update's value lies outside the agreed range"


class NotFinite(SecureAggregationError):
    code = "CLO-720"
    title = "An update is not finite"


WeightAboveCap = ErrorKind(
    SecureAggregationError, "CLO-721", "A weight lies outside the allowed range"
)


class WireInvalid(SecureAggregationError):
    code = "CLO-722"
    title = "A secure-aggregation message is malformed"


class TranscriptMismatch(SecureAggregationError):
    code = "CLO-723"
    title = "A transcript does not replay to its stated result"


SiteAborted = ErrorKind(SecureAggregationError, "CLO-724", "A site aborted secure aggregation")


class RosterInvalid(SecureAggregationError):
    code = "CLO-725"
    title = "The roster cannot be used"


class IdentityInvalid(SecureAggregationError):
    code = "CLO-726"
    title = "An identity key cannot be used"


class DeploymentError(CloisterError):
    title = "The deployment is not as it must be"
    exit_status = 9


ServerFolderInvalid = ErrorKind(
    DeploymentError, "CLO-801", "The coordinator's folder cannot be used"
)
InviteInvalid = ErrorKind(DeploymentError, "CLO-802", "The invite cannot be used")


class EnrolmentRefused(DeploymentError):
    code = "CLO-803"
    title = "The coordinator refused the site"


class CoordinatorUnreachable(DeploymentError):
    code = "CLO-804"
    title = "The coordinator cannot be reached"


CoordinatorUnproven = ErrorKind(
    DeploymentError, "CLO-805", "The coordinator's identity could not be verified"
)
SiteStateInvalid = ErrorKind(
    DeploymentError, "CLO-806", "The site's enrolment state does not allow the command"
)


class ListenRefused(DeploymentError):
    code = "CLO-807"
    title = "The program cannot listen on an address"


ServerState = ErrorKind(
    DeploymentError, "CLO-808", "The server is already running, or is not running"
)


class ProxyUnusable(DeploymentError):
    code = "CLO-811"
    title = "The proxy cannot be used"


class ProxyLoginRefused(DeploymentError):
    code = "CLO-812"
    title = "The proxy refused the login"


class ProxyForbids(DeploymentError):
    code = "CLO-813"
    title = "The proxy does not allow the connection to the coordinator"


class ClockOrDates(DeploymentError):
    code = "CLO-814"
    title = "A clock is wrong, or a certificate is not valid now"


VersionsDiffer = ErrorKind(
    DeploymentError, "CLO-815", "Site and coordinator run different versions"
)
ServiceState = ErrorKind(
    DeploymentError, "CLO-820", "The site's service is already running, or is not running"
)


class InternalError(CloisterError):
    code = "CLO-901"
    title = "Internal error"
    exit_status = 70


class Reject(enum.Enum):
    """Why one file was rejected; the value is its stable code.

    A reject is counted and listed for the steward at the site; it never stops an ingest.
    """

    NOT_DICOM = "CLO-210"
    TRUNCATED = "CLO-211"
    NO_PIXELS = "CLO-212"
    TRANSFER_SYNTAX = "CLO-213"
    SOP_CLASS = "CLO-214"
    MODALITY = "CLO-215"
    TOO_LARGE = "CLO-216"
    FRAMES = "CLO-217"
    COLOUR = "CLO-218"
    PREAMBLE = "CLO-219"
    PIXEL_FORMAT = "CLO-220"
    DECODE_FAILED = "CLO-221"
    NO_PATIENT = "CLO-222"
    BURNED_IN = "CLO-223"
    DUPLICATE = "CLO-224"
    UNREADABLE = "CLO-225"
    OUTSIDE_ROOT = "CLO-226"
    EXHAUSTED = "CLO-227"
    VOLUME_INCOMPLETE = "CLO-228"
    VOLUME_UNPLACED = "CLO-229"
    VOLUME_MIXED = "CLO-230"
    VOLUME_DOUBLED = "CLO-231"
    VOLUME_TILTED = "CLO-232"
    VOLUME_UNEVEN = "CLO-233"
    CAPTURE = "CLO-234"
    SEGMENT = "CLO-235"
    SEGMENTATION = "CLO-236"

    @property
    def title(self) -> str:
        return _REJECT_TITLES[self]

    @property
    def held(self) -> bool:
        """Whether the file is quarantined, until a person looks at it and may release it."""
        return self in _HELD


_HELD = frozenset((Reject.PREAMBLE, Reject.BURNED_IN, Reject.CAPTURE))

_REJECT_TITLES = {
    Reject.NOT_DICOM: "not a DICOM file",
    Reject.TRUNCATED: "truncated or damaged DICOM file",
    Reject.NO_PIXELS: "no pixel data",
    Reject.TRANSFER_SYNTAX: "transfer syntax not accepted",
    Reject.SOP_CLASS: "SOP class not accepted",
    Reject.MODALITY: "modality not asked for by the study",
    Reject.TOO_LARGE: "file or image too large",
    Reject.FRAMES: "multi-frame image",
    Reject.COLOUR: "colour image",
    Reject.PREAMBLE: "preamble is neither empty nor TIFF",
    Reject.PIXEL_FORMAT: "pixel description missing or inconsistent",
    Reject.DECODE_FAILED: "pixel data cannot be decoded",
    Reject.NO_PATIENT: "PatientID is missing",
    Reject.BURNED_IN: "text may be burned into the pixels",
    Reject.DUPLICATE: "duplicate image",
    Reject.UNREADABLE: "file cannot be opened",
    Reject.OUTSIDE_ROOT: "symbolic link out of the data folder",
    Reject.EXHAUSTED: "reading exceeded the limit of memory or time",
    Reject.VOLUME_INCOMPLETE: "slice of a series too short for a volume",
    Reject.VOLUME_UNPLACED: "slice of a series without valid position or orientation",
    Reject.VOLUME_MIXED: "slice of a series with several orientations or pixel grids",
    Reject.VOLUME_DOUBLED: "slice of a series with two slices at one position",
    Reject.VOLUME_TILTED: "slice of a series whose stack is tilted or sheared",
    Reject.VOLUME_UNEVEN: "slice of a series with uneven slice spacing",
    Reject.CAPTURE: "secondary capture or ultrasound, which may show a name",
    Reject.SEGMENT: "segmentation without the study's segment",
    Reject.SEGMENTATION: "segmentation without usable references to its images",
}


def all_errors() -> Iterator[ErrorKind[CloisterError]]:
    """Yield every error that has a code, classes as kinds too, in the order of the codes."""
    found: dict[str, ErrorKind[CloisterError]] = {}
    for value in tuple(globals().values()):
        if isinstance(value, ErrorKind):
            found[value.code] = value
        elif isinstance(value, type) and issubclass(value, CloisterError) and "code" in vars(value):
            found[value.code] = ErrorKind(value, value.code, value.title)
    del found[CloisterError.code]
    for code in sorted(found):
        yield found[code]
