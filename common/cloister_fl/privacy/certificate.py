"""The privacy certificate: the privacy cost of a run for a site's patients, signed by the site.

It says what was charged, not what a server claims: the numbers are the ledger's. Everything in it
is public or about the study, so it may be handed to an ethics board or the coordinator; what the
patients paid in a lifetime is not in it. Whoever has the file can recompute epsilon and check the
signature without the site: ``verify`` in ``certificate_check``.

The file is canonical JSON (keys sorted, two blanks of indent, ASCII, one line feed at the end),
and a reader demands these very bytes: a file that was changed anywhere is not read.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
)

import cloister_fl
from cloister_fl.errors import CertificateInvalid, PrivacyError
from cloister_fl.membership.identity import Identity, usable_public_key, verify

LABEL = "cloister/certificate/v2"

_Hex64 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
_Count = Annotated[int, Field(ge=0, le=10**12)]
_Finite = Annotated[float, Field(allow_inf_nan=False, ge=0)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")


class Left(_Part):
    """Messages of one kind that left the site in the run: how many, and their payload in bytes."""

    message: Annotated[str, Field(max_length=64)]
    count: _Count
    bytes: _Count


class Release(_Part):
    """The study's noised evaluation, after training.

    Attributes:
        noise_multiplier: sigma of the one Gaussian, over the sensitivity.
        sensitivity: most that one patient moves the sums by, in units, in L2.
        charged: whether this run charged it; then it is spent, whether or not it left.
        charged_of_study: whether any run of the study here did.
    """

    noise_multiplier: _Finite
    sensitivity: _Finite
    charged: bool
    charged_of_study: bool


class Certificate(_Part):
    """What is signed.

    Attributes:
        made: when, UTC, ISO 8601.
        site: the site's name.
        key: the site's public key (Ed25519), 64 hexadecimal digits.
        roster: digest of the roster that the site accepted; empty in a study of one site.
        study: the study in canonical form; its hash is ``study_hash``.
        run: the run.
        relation: neighbours differ by one patient, with all of the patient's images.
        noise_multiplier: sigma of a step; q is ``sampling_rate``, C ``clipping_norm``.
        grid_bits: gradients and noise are whole multiples of C / 2^grid_bits.
        steps_reserved: T that the run may take here.
        steps_started: T that it has started; they are spent.
        steps_of_study: T of all runs of the study here.
        delta: the study's.
        release: the study's release; None, and left out of the file, where the study has none.
        epsilon_run, epsilon_study: privacy-loss distribution, of the steps started, and the release
            where it was charged, by the run and by all runs of the study here.
        ledger, log: hashes of the last entries of the site's privacy ledger and audit log when this
            was made; without their numbers, which would count what else was decided there.
        left: what left the site in this run, up to that entry of the audit log.
        version: Cloister's.
        code: ``code_hash`` of the code that made this.
    """

    label: Literal["cloister/certificate/v2"] = "cloister/certificate/v2"
    made: Annotated[str, Field(pattern=r"^[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9:]{8}\+00:00$")]
    site: Annotated[str, Field(max_length=64)]
    key: _Hex64
    roster: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")]
    study: Annotated[str, Field(max_length=1 << 20)]
    study_hash: _Hex64
    run: Annotated[str, Field(pattern=r"^[!-~]{1,128}$")]
    unit: Literal["patient"] = "patient"
    relation: Literal["add or remove one patient"] = "add or remove one patient"
    mechanism: Literal["Poisson-subsampled Gaussian"] = "Poisson-subsampled Gaussian"
    noise_multiplier: _Finite
    sampling_rate: _Finite
    clipping_norm: _Finite
    grid_bits: Literal[30] = 30
    steps_reserved: _Count
    steps_started: _Count
    steps_of_study: _Count
    release: Release | None = None
    delta: _Finite
    epsilon_run: _Finite
    epsilon_study: _Finite
    ledger: _Hex64
    log: _Hex64
    left: list[Left]
    version: Annotated[str, Field(max_length=64)]
    code: _Hex64

    @model_serializer(mode="wrap")
    def _as_before(self, dump: SerializerFunctionWrapHandler) -> dict[str, Any]:
        # A certificate without a release keeps the bytes that were signed before there was one.
        held: dict[str, Any] = dump(self)
        if self.release is None:
            held.pop("release", None)
        return held

    def canonical(self) -> str:
        """The bytes that are signed, as text."""
        return _canonical(self.model_dump(mode="json"))


def sign(certificate: Certificate, identity: Identity) -> bytes:
    """The file: the certificate with its signature."""
    signature = identity.sign(LABEL, certificate.canonical().encode())
    return _canonical(
        {**certificate.model_dump(mode="json"), "signature": signature.hex()}
    ).encode()


def read(data: bytes, *, key: bytes | None = None) -> Certificate:
    """Read a certificate, and believe nothing of it that the site did not sign.

    Args:
        data: the file.
        key: the public key that must have signed; else the one in the file.

    Raises:
        CertificateInvalid: it is no certificate, not in canonical form, or not signed so.
    """
    try:
        held = json.loads(data)
        signature = bytes.fromhex(held.pop("signature"))
        certificate = Certificate.model_validate(held)
        form = certificate.model_dump(mode="json")
        whole = _canonical({**form, "signature": signature.hex()}).encode()
    except (ValueError, AttributeError, KeyError, TypeError, RecursionError, ValidationError):
        raise _invalid("It is not in the format of a certificate.") from None
    if whole != data:
        raise _invalid("It is not in canonical form: it was changed, or saved by another program.")
    public = bytes.fromhex(certificate.key)
    if key is not None and key != public:
        raise _invalid("It is signed by another key than the given one.")
    if not usable_public_key(public) or not verify(
        public, signature, LABEL, certificate.canonical().encode()
    ):
        raise _invalid("Its signature does not match its content and the site's key.")
    return certificate


def code_hash() -> str:
    """SHA-256 over names and contents of all Python files of Cloister that are installed here."""
    contents: dict[str, bytes] = {}
    # A namespace: a checkout has it in three folders, a wheel in one, and both hash alike.
    for root in (Path(each) for each in cloister_fl.__path__):
        for path in root.rglob("*.py"):
            name = path.relative_to(root.parent).as_posix()
            # As imports do, the first folder wins.
            contents.setdefault(name, path.read_bytes())
    digest = hashlib.sha256()
    for name, content in sorted(contents.items()):
        digest.update(f"{name} {hashlib.sha256(content).hexdigest()}\n".encode())
    return digest.hexdigest()


def _canonical(held: dict[str, object]) -> str:
    return json.dumps(held, sort_keys=True, indent=2, allow_nan=False) + "\n"


def _invalid(why: str) -> PrivacyError:
    return CertificateInvalid(
        "The certificate is not valid.",
        why=why,
        remedy="Ask the site for a new copy of the file, and compare the key by telephone.",
    )
