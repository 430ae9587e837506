"""Settings in ``site.toml`` of the PACS that images are fetched from.

::

    [data.query]
    modality = ["DX", "CR"]
    study_date = "20200101-20211231"

    [data.dicomweb]
    url = "https://pacs.hospital.example/dicom-web"
    user = "research"

The password or token lies in ``keys/archive.secret``, never in this file.
"""

from __future__ import annotations

import re
from ipaddress import ip_address
from typing import Annotated, Literal
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from cloister_fl.study.schema import Modality
from cloister_fl.system.toml import FileModel, KeyedValueError

SECRET = "archive.secret"  # noqa: S105 - a file's name
UID = re.compile(r"(?=.{1,64}$)[0-9]+(\.[0-9]+)*")
"""A UID that an archive names (PS3.5 section 9.1). It becomes a part of a path: no dot alone."""
_DATES = re.compile(r"(\d{8})?-(\d{8})?|\d{8}")
_AE_TITLE = r"^[A-Za-z0-9_.-]{1,16}$"
_Path = Annotated[str, Field(max_length=4096)]


class NotSent(Exception):
    """The archive has the instance, and cannot send it in any form that this site reads."""


def is_loopback(host: str) -> bool:
    """Whether nobody is between this process and the host."""
    try:
        return ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return host == "localhost"


class Query(FileModel):
    """Which studies are fetched; matching of PS3.4 section C.2.2.2."""

    modality: Annotated[
        tuple[Modality | Literal["SEG"], ...], Field(strict=False, min_length=1)
    ] = ("CR", "DX")
    """``SEG`` gets the segmentations of images, for a study that segments."""
    study_date: Annotated[str, Field(max_length=17)] = ""
    """A day, or a range such as 20200101-20211231; either end may be left out."""
    study_description: Annotated[str, Field(max_length=64)] = ""
    """May hold ``*`` and ``?``, as far as the archive matches them."""

    @field_validator("study_date")
    @classmethod
    def _is_range(cls, value: str) -> str:
        if value and (value == "-" or not _DATES.fullmatch(value)):
            raise ValueError("must be a day such as 20200131, or a range 20200101-20211231.")
        return value


class DicomWeb(FileModel):
    """An archive that speaks QIDO-RS and WADO-RS (PS3.18)."""

    url: Annotated[str, Field(min_length=1, max_length=2048)]
    """Where its services begin; https, or http on this machine."""
    auth: Literal["none", "basic", "token"] = "none"
    """``basic``: ``user`` and the secret as password; ``token``: the secret as bearer token."""
    user: Annotated[str, Field(max_length=256)] = ""
    ca: _Path = ""
    """PEM file of the authority that signed the archive's certificate; empty: the system's."""

    @field_validator("url")
    @classmethod
    def _is_url(cls, value: str) -> str:
        try:
            parts = urlsplit(value)
            sound = bool(parts.hostname) and (parts.port is None or parts.port > 0)
        except ValueError:
            raise ValueError("must be https://HOST[:PORT]/PATH.") from None
        local = parts.scheme == "http" and is_loopback(parts.hostname or "")
        if not sound or not (parts.scheme == "https" or local):
            raise ValueError("must be https://HOST[:PORT]/PATH; http on this machine alone.")
        if parts.query or parts.fragment or parts.username is not None or not value.isprintable():
            raise ValueError("has no place for a query, a fragment, a user or a password.")
        return value.rstrip("/")

    @model_validator(mode="after")
    def _user_fits(self) -> DicomWeb:
        if (self.auth == "basic") != bool(self.user) or ":" in self.user:
            raise KeyedValueError("user", "is needed for auth = 'basic', and only there.")
        return self


class CGet(FileModel):
    """An archive that speaks C-FIND and C-GET (PS3.4 annex C)."""

    host: Annotated[str, Field(min_length=1, max_length=253)]
    port: Annotated[int, Field(ge=1, le=65535)] = 2762
    called: Annotated[str, Field(pattern=_AE_TITLE)]
    """The archive's AE title."""
    calling: Annotated[str, Field(pattern=_AE_TITLE)] = "CLOISTER"
    """The AE title by which the archive knows this site."""
    tls: bool = True
    """May be false on this machine alone."""
    ca: _Path = ""
    """As for DICOMweb."""
    certificate: _Path = ""
    """PEM file with this site's certificate, where the archive asks for one."""
    key: _Path = ""
    """PEM file with its key, mode 0600."""

    @model_validator(mode="after")
    def _safe(self) -> CGet:
        if not self.tls and not is_loopback(self.host):
            raise KeyedValueError("tls", "may be false for an archive on this machine alone.")
        if bool(self.certificate) != bool(self.key):
            raise KeyedValueError("key", "is needed with 'certificate', and only with it.")
        return self
