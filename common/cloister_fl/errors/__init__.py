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
    │   ├── FetchUnfinished        CLO-253
    │   ├── PatientsUndecided      CLO-254
    │   ├── PatientsFileInvalid    CLO-255
    │   ├── TooMuchLeftOut         CLO-256
    │   └── LabelsAmbiguous        CLO-257
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
    │   ├── ReleaseAlreadySpent    CLO-311
    │   ├── LedgerUnlinked         CLO-312
    │   └── RunUnverified          CLO-313
    ├── ModelError                 4xx, exit 5: networks, vectors and model files
    │   ├── NetworkUnfit           CLO-401
    │   ├── ModelFileInvalid       CLO-402
    │   ├── UpdateInvalid          CLO-403
    │   ├── WeightsUnfit           CLO-404
    │   └── InitialModelUnfit      CLO-405
    ├── RunError                   5xx, exit 6: rounds and the federation
    │   ├── TooFewSites            CLO-501
    │   ├── MessageInvalid         CLO-502
    │   ├── ResumeMismatch         CLO-503
    │   ├── NothingToResume        CLO-504
    │   ├── BundleRefused          CLO-505
    │   ├── RunUnknown             CLO-506
    │   ├── RunStopped             CLO-507
    │   └── SumOutsideBound        CLO-508
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
    │   ├── IdentityInvalid        CLO-726
    │   └── TooManyComplaints      CLO-727
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
    │   ├── CertificateExpired     CLO-816
    │   ├── ServiceState           CLO-820
    │   └── LocalSocketRefused     CLO-825
    └── InternalError              CLO-901, exit 70: an internal error

The families are classes. An error under them is a class where the program catches it or tests for
its type; otherwise it is an ``ErrorKind``, whose call returns an instance of the family with the
kind's code and title.

A message says what happened, why, and what to do. It never carries a patient's data, a path
inside a site's data folder, or the text of a library's exception: such text quotes values.
Files that are rejected one by one do not raise; they carry a ``Reject`` reason, which has a
number and a page of its own.

``families`` has the base, the families and ``ErrorKind``; ``numbered`` the errors with a number;
``reject_codes`` those of rejected files.
"""

# Whoever raises or catches an error names this package. What is new stands in one of its modules
# and in the drawing above, and in no list of names beside them.
from cloister_fl.errors.families import *  # noqa: F403
from cloister_fl.errors.families import (
    CloisterError,
    DataError,
    DeploymentError,
    InputError,
    InstallError,
    ModelError,
    PrivacyError,
    RunError,
    SecureAggregationError,
)
from cloister_fl.errors.faulty_file import Fault as Fault
from cloister_fl.errors.numbered import *  # noqa: F403
from cloister_fl.errors.numbered import InternalError, StudyInvalid
from cloister_fl.errors.reject_codes import Reject as Reject

__all__ = [
    "CloisterError",
    "DataError",
    "DeploymentError",
    "Fault",
    "InputError",
    "InstallError",
    "InternalError",
    "ModelError",
    "PrivacyError",
    "RunError",
    "SecureAggregationError",
    "StudyInvalid",
]
"""What a program catches: a family, or ``CloisterError``, and then asks for the ``code``."""
