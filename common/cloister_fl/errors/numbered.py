"""All errors that have a number: classes where the program catches them, kinds where not."""

from __future__ import annotations

from collections.abc import Iterator

from cloister_fl.errors.families import (
    CloisterError,
    DataError,
    DeploymentError,
    ErrorKind,
    InputError,
    InstallError,
    ModelError,
    PrivacyError,
    RunError,
    SecureAggregationError,
)
from cloister_fl.errors.faulty_file import _FaultyFile


class StudyInvalid(_FaultyFile):
    """A study has faults: ``faults`` has all of them, each a ``Fault``."""

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
OptionInvalid = ErrorKind(InputError, "CLO-106", "An option or an argument is not valid")


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


CohortTooSmall = ErrorKind(DataError, "CLO-207", "The site has too few patients")


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
PatientsUndecided = ErrorKind(
    DataError, "CLO-254", "Several patient numbers may belong to one person"
)


class PatientsFileInvalid(DataError):
    code = "CLO-255"
    title = "The patients file is not valid"


TooMuchLeftOut = ErrorKind(DataError, "CLO-256", "Too much of the data would be left out")
LabelsAmbiguous = ErrorKind(DataError, "CLO-257", "An examination or an image has two labels")


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


LedgerUnlinked = ErrorKind(
    PrivacyError, "CLO-312", "Another ledger of this machine counts the same patients"
)
RunUnverified = ErrorKind(
    PrivacyError, "CLO-313", "A run's records do not give its sums or its model"
)


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


class InitialModelUnfit(ModelError):
    code = "CLO-405"
    title = "The initial model is not the one that the study states"


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


class SumOutsideBound(RunError):
    code = "CLO-508"
    title = "Two rounds in a row have a sum that no honest sites can give"


ExtraMissing = ErrorKind(InstallError, "CLO-601", "A component of Cloister is not installed")


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


TooManyComplaints = ErrorKind(
    SecureAggregationError, "CLO-727", "More sites complain of a dealer than may lie"
)


class RosterInvalid(SecureAggregationError):
    code = "CLO-725"
    title = "The roster cannot be used"


class IdentityInvalid(SecureAggregationError):
    code = "CLO-726"
    title = "An identity key cannot be used"


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
CertificateExpired = ErrorKind(
    DeploymentError, "CLO-816", "A certificate of the coordinator has expired"
)
ServiceState = ErrorKind(
    DeploymentError, "CLO-820", "The site's service is already running, or is not running"
)


class LocalSocketRefused(DeploymentError):
    code = "CLO-825"
    title = "The socket between Cloister's own processes cannot be used"


class InternalError(CloisterError):
    """An internal error, which is to be reported."""

    code = "CLO-901"
    title = "Internal error"
    exit_status = 70


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
