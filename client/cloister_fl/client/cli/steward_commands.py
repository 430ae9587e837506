"""Commands `cloister client review`, `approve` and `deny`: the data steward's decisions.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.confirm import ask
from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.cli.folder_option import dir_option
from cloister_fl.client.cli.join_commands import Accept, offer
from cloister_fl.client.cli.progress_bar import progress_bar
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.errors import (
    ClockOrDates,
    CloisterError,
    CoordinatorUnreachable,
    OptionInvalid,
    ProxyForbids,
    ProxyLoginRefused,
    ProxyUnusable,
    StudyNotApproved,
)
from cloister_fl.system.optional import require
from cloister_fl.system.text import counted

if TYPE_CHECKING:
    from cloister_fl.client.admission.approvals import Judgement
    from cloister_fl.client.site.folder import Site

_NO_WAY = (CoordinatorUnreachable, ClockOrDates, ProxyUnusable, ProxyLoginRefused, ProxyForbids)
"""What keeps a site from asking, and is no reason to mistrust who would answer."""


def review(
    study: Annotated[
        str | None, typer.Argument(help="A study file, or a hash from the list; else the list.")
    ] = None,
    folder: Folder = Path(),
) -> None:
    """List the proposed studies, or show one in words."""
    require("client", "numpy", "pydicom")
    from cloister_fl.client.admission import approvals
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import review

    site = open_site(site_folder(folder))
    if study is None:
        typer.echo(review.listing(approvals.judgements(site)))
        return
    typer.echo(review.review(site, _proposed(site, study)))


def approve(
    study: Annotated[
        str | None,
        typer.Argument(help="A study file, or a hash that review lists; else the pending one."),
    ] = None,
    folder: Folder = Path(),
    accept_roster: Accept = None,
) -> None:
    """Approve a study at this site, and no other study.

    The approval is for the study's hash, which covers everything in it. The site's data are
    checked first, as `check --study` does, and shown: a study that they cannot serve is not
    approved. They are frozen with the approval. Where the roster has changed since it was
    accepted, it is shown too: a study is trained with the sites on the accepted roster alone.
    """
    require("client", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls", "httpx")
    from cloister_fl.client.data.frozen_dataset import patients_in
    from cloister_fl.client.preflight.data_check import inspect, render
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import approval
    from cloister_fl.client.steward import review as words
    from cloister_fl.study.binding import require_bound
    from cloister_fl.study.gradient_engines import require_sound_engine

    site = open_site(site_folder(folder))
    found = _only_one(site, folder) if study is None else _proposed(site, study)
    typer.echo(words.review(site, found))
    # It could never be trained, and an approval would say that its epsilon was accepted.
    require_sound_engine(found.study)
    require_bound(found.study)
    with progress_bar("Reading images") as progress:
        report = inspect(site, found.study, progress=progress)
    typer.echo(render(report, site.root))
    if report.faults:
        raise _unfit(site, found, report.faults[0], folder)
    assert report.reading is not None
    if study is None and not ask("Approve the study at this site?"):
        command = f"cloister client deny {found.study.digest[:16]}{dir_option(folder)} --why '...'"
        typer.echo(f"Not approved; the study stays pending. To deny it: {command}")
        raise typer.Exit(StudyNotApproved.exit_status)
    _settle_roster(site, accept_roster, folder)
    frozen = approval.approve(site, found.study, report.reading)
    typer.echo(
        f"Approved at {site.name}: {found.study.study.name}, {found.study.digest[:16]}, with "
        f"{counted(len(frozen.items), 'image')} of {counted(patients_in(frozen), 'patient')}."
    )


def deny(
    study: Annotated[str, typer.Argument(help="A study file, or a hash that review lists.")],
    why: Annotated[str, typer.Option(help="For this site's own records; it is not sent.")],
    folder: Folder = Path(),
) -> None:
    """Keep this site out of a study; it can be approved later."""
    require("client", "numpy", "pydicom")
    from cloister_fl.client.admission.approvals import Decision, judge
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    found = _proposed(site, study)
    judge(site, found.study, Decision.DENIED, why=why)
    typer.echo(f"Denied at {site.name}: {found.study.study.name}, {found.study.digest[:16]}.")


def _unfit(site: Site, found: Judgement, fault: CloisterError, folder: Path) -> CloisterError:
    """The error of a study that the site's data cannot serve; an earlier decision stands."""
    from cloister_fl.client.admission.approvals import Decision
    from cloister_fl.client.site.data_notice import note_look

    note_look(site.root, found.study.digest, [fault])
    digest = found.study.digest[:16]
    standing = found.decision is Decision.APPROVED and found.counts
    said = (
        " The earlier approval stays in force, and rounds are answered with what is left of the "
        f"data. To take it back: cloister client deny {digest}{dir_option(folder)} --why '...'."
        if standing
        else ""
    )
    again = f"Then approve it: cloister client approve {digest}{dir_option(folder)}"
    return fault.kind(
        fault.what, why=f"{fault.why}{said}".strip(), remedy=f"{fault.remedy} {again}".strip()
    )


def _proposed(site: Site, name: str) -> Judgement:
    """A study by its file, or by the hash of one that was proposed.

    Raises:
        OptionInvalid: no study, or more than one, has this hash.
        FileUnreadable, StudyInvalid: the file cannot be used.
    """
    from cloister_fl.client.admission.approvals import Decision, Judgement, find, judgements
    from cloister_fl.study.file import load_study

    if Path(name).suffix or Path(name).exists():
        study = load_study(Path(name))
        return judgements(site).get(study.digest, Judgement(study, Decision.PENDING))
    return find(site, name)


def _only_one(site: Site, folder: Path) -> Judgement:
    """The study that waits for the steward, where a person can be asked about it."""
    from cloister_fl.client.admission.approvals import Decision, judgements

    waiting = [one for one in judgements(site).values() if one.decision is Decision.PENDING]
    if len(waiting) != 1:
        raise OptionInvalid(
            f"{len(waiting)} studies are waiting for a decision."
            if waiting
            else "No study is waiting for a decision.",
            remedy=f"List them: cloister client review{dir_option(folder)}. Then name one: "
            f"cloister client approve HASH{dir_option(folder)}"
            if waiting
            else "Ask the coordinator to propose one: cloister server run STUDY",
        )
    if not sys.stdin.isatty():
        raise OptionInvalid(
            "Not a terminal: pass the study's hash.",
            why="Without a hash, the approval is asked for at the terminal.",
            remedy="Read the study, then run: "
            f"cloister client approve {waiting[0].study.digest[:16]}{dir_option(folder)}",
        )
    return waiting[0]


def _settle_roster(site: Site, accept_roster: str | None, folder: Path) -> None:
    """Offer the present roster to a site that is a member; it is shown where it differs."""
    from cloister_fl.client.network.join import MEMBERSHIP, look

    if not (site.root / MEMBERSHIP).exists() and accept_roster is None:
        return
    try:
        joined = look(site)
    except _NO_WAY as error:
        if accept_roster is not None:
            raise
        typer.echo(f"The roster was not checked: {error.what}", err=True)
        typer.echo(f"Check it later: cloister client roster{dir_option(folder)}", err=True)
        return
    if joined.state == "pending":
        typer.echo("The coordinator has not approved this site yet, so there is no roster.")
        return
    offer(site, joined, accept_roster, folder)
