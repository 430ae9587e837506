"""Settings of `site.toml`: its tables and what each value may be."""

from __future__ import annotations

import contextlib
import ipaddress
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, field_validator, model_validator

from cloister_fl.client.site.archive_settings import CGet, DicomWeb, Query
from cloister_fl.client.site.label_settings import LabelSettings
from cloister_fl.client.site.patient_settings import PatientSettings
from cloister_fl.client.site.policy import Policy
from cloister_fl.errors import OptionInvalid
from cloister_fl.membership.enrolment import split_address
from cloister_fl.study.schema import Name
from cloister_fl.system.toml import FileModel, KeyedValueError

_FilePath = Annotated[str, Field(min_length=1, max_length=4096)]


def _is_loopback(value: str) -> str:
    host, _, port = value.rpartition(":")
    try:
        fits = ipaddress.ip_address(host.strip("[]")).is_loopback and 0 <= int(port) < 2**16
    except ValueError:
        fits = False
    if not fits:
        raise ValueError("is not a loopback address and port such as 127.0.0.1:9090")
    return value


class _About(FileModel):
    name: Name


class _Data(FileModel):
    dicom: _FilePath = "dicom"
    labels: LabelSettings = LabelSettings()
    on_mismatch: Literal["refuse", "leave out"] = "refuse"
    """What is done when data are frozen and images have no label, or rows of labels no image."""
    left_out_at_most: Annotated[float, Field(ge=0, le=100)] = 5.0
    """Of images and rows without an image, the most that may be left out, in percent."""
    patients: PatientSettings = PatientSettings()
    query: Query = Query()
    dicomweb: DicomWeb | None = None
    cget: CGet | None = None

    @model_validator(mode="after")
    def _one_archive(self) -> _Data:
        if self.dicomweb is not None and self.cget is not None:
            raise KeyedValueError("cget", "stands beside 'dicomweb'; name one archive.")
        return self


class _Service(FileModel):
    health: Annotated[str, Field(max_length=64), AfterValidator(_is_loopback)] = "127.0.0.1:0"
    """Where grpc.health.v1 is served; port 0 takes a free one."""


class Network(FileModel):
    """The table ``[network]`` of a site file: how the hospital's network is left."""

    proxy: str = ""
    """``http://HOST:PORT`` of the outbound proxy, which must pass CONNECT on; empty for none."""
    proxy_user: Annotated[str, Field(max_length=256)] = ""
    """Who the proxy is told that this is; empty where it asks nobody. See ``proxy``."""

    @field_validator("proxy")
    @classmethod
    def _is_proxy(cls, value: str) -> str:
        if value and (
            not value.startswith("http://")
            or split_address(value.removeprefix("http://").removesuffix("/")) is None
        ):
            # No password here: people copy, mail and back up this file.
            raise ValueError("must be http://HOST:PORT, without a user or password.")
        return value

    @field_validator("proxy_user")
    @classmethod
    def _is_user(cls, value: str) -> str:
        if ":" in value or not value.isprintable():
            raise ValueError("must be one line without a colon.")
        return value


def network_of(proxy: str, user: str = "") -> Network:
    """The table ``[network]`` from a command's options.

    Raises:
        OptionInvalid: the proxy or the user cannot be used.
    """
    if proxy:
        with contextlib.suppress(ValueError):
            return Network(proxy=proxy, proxy_user=user)
    raise OptionInvalid(
        "The proxy or its user cannot be used.",
        remedy="Write --proxy http://HOST:PORT, and --proxy-user NAME where it asks for one.",
    )


class SiteFile(FileModel):
    """The file ``site.toml``; paths are relative to its folder, or absolute."""

    site: _About
    data: _Data = _Data()
    service: _Service = _Service()
    network: Network = Network()
    policy: Policy = Policy()
