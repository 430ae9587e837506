"""Commands `cloister client fetch`, `freeze`, `quarantine`, `find` and `data-report`.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cloister_fl.cli.confirm import Yes, ask_hidden, confirm
from cloister_fl.cli.folder_option import FolderTyper, dir_option
from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.client.cli.progress_bar import progress_bar
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.errors import ArchiveAnswerInvalid, DataError, OptionInvalid
from cloister_fl.system.optional import require
from cloister_fl.system.text import printable

if TYPE_CHECKING:
    from cloister_fl.client.data.quarantine import Decision, QuarantinedFile
    from cloister_fl.client.site.folder import Site
    from cloister_fl.client.steward.reidentify import Named

app = FolderTyper(invoke_without_command=True)

Name = Annotated[str, typer.Argument(metavar="ID", help="A file's id, as listed.")]
Why = Annotated[
    str,
    typer.Option(help="Why. Written to this site's audit log: name no patient. Not sent."),
]


def freeze(
    study: Annotated[Path, typer.Argument(help="The study file.")],
    folder: Folder = Path(),
    again: Annotated[bool, typer.Option("--again", help="Replace the frozen data.")] = False,
    why: Annotated[
        str,
        typer.Option(help="Why it is frozen again. Written to the audit log: name no patient."),
    ] = "",
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one JSON object, with all that does not fit."),
    ] = False,
    yes: Yes = False,
) -> None:
    """Freeze a study's training data, which later runs check.

    Every image, patient and label is listed, and the list is signed. `approve` does so by itself.
    """
    require("client", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls")
    from cloister_fl.client.admission.approvals import judge, judgements
    from cloister_fl.client.data import frozen_dataset, loading
    from cloister_fl.client.data.reading import Reading, fault_as_dict
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.study.file import load_study

    site = open_site(site_folder(folder))
    judged_by = load_study(study)
    if again:
        frozen_dataset.require_reason(why)
        confirm(
            f"The data frozen for {judged_by.study.name}, {judged_by.digest[:16]}, are replaced "
            "for good by the present data.",
            owner=f"site {site.name}",
            folder=site.root,
            command=("cloister", "client", "freeze", str(study), "--again", "--why", why),
            yes=yes,
        )
    told: dict[str, Any] = {"site": site.name, "study": judged_by.study.name, "frozen": False}
    readings: list[Reading] = []
    try:
        with progress_bar("Reading images") as progress:
            found = loading.freeze(
                site, judged_by, again=again, why=why, progress=progress, looked=readings.append
            )
    except DataError as error:
        if as_json:
            faults = [*dict.fromkeys([error, *(one for each in readings for one in each.faults)])]
            typer.echo(json.dumps({**told, "faults": [fault_as_dict(one) for one in faults]}))
        raise
    left_out = [one for each in readings for one in each.left_out]
    held = judgements(site).get(judged_by.digest)
    if held is not None and held.counts and held.data:
        # The steward has looked at these data, too: the approval is for them from now on.
        judge(site, judged_by, held.decision, why=held.why, data=found.digest_at(site.name))
    patients = frozen_dataset.patients_in(found)
    if as_json:
        told |= {"frozen": True, "images": len(found.items), "patients": patients}
        rest = [fault_as_dict(one) for one in left_out]
        typer.echo(json.dumps({**told, "faults": [], "left_out": rest}))
        return
    for one in left_out:
        typer.echo(f"Left out, as site.toml says: {one}")
    typer.echo(
        f"Frozen at {site.name}: {judged_by.study.name}, {judged_by.digest[:16]}, "
        f"{len(found.items)} images of {patients} patients."
    )


def fetch(
    folder: Folder = Path(),
    ask_secret: Annotated[
        bool, typer.Option("--ask-secret", help="Set the archive's password or token first.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Fetch missing images from the archive in site.toml.

    Each file is kept sealed (encrypted) in the site folder. The exit status is 0 where all that
    fits is here.
    """
    require("client", "httpx", "numpy", "pydicom", "pynetdicom")
    from cloister_fl.client.pacs import fetch
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    if ask_secret:
        if sys.stdin.isatty():
            secret = ask_hidden("Password or token", err=True)
        else:
            secret = sys.stdin.read(8192)
        fetch.set_secret(site, secret)
    with progress_bar("Fetching images") as progress:
        done = fetch.fetch(site, progress=progress)
    missing = done.too_large + done.not_sent
    if as_json:
        typer.echo(json.dumps(fetch.as_dict(done)))
        raise typer.Exit(ArchiveAnswerInvalid.exit_status if missing else 0)
    typer.echo(f"{done.found} images match: {done.new} fetched, {done.there} already stored.")
    if done.too_large:
        typer.echo(f"Too large, and left out: {done.too_large}.")
    if done.not_sent:
        typer.echo(
            f"The archive could not send: {done.not_sent}. Ask the archive's administrator.",
            err=True,
        )
    if missing:
        raise typer.Exit(ArchiveAnswerInvalid.exit_status)


def find(
    what: Annotated[
        list[str],
        typer.Argument(
            metavar="ID...",
            help="Ids of files, images or patients, or codes such as CLO-211, as a message lists "
            "them.",
        ),
    ],
    study: Annotated[
        Path | None,
        typer.Option(help="The study of the message: a patient's id is valid for one study."),
    ] = None,
    folder: Folder = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Re-identify the files and patients behind ids or codes.

    Such ids and codes are in this site's messages. The answer names patients and stays here. The
    exit status is 0 where something was found.
    """
    require("client", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import reidentify
    from cloister_fl.study.file import load_study

    site = open_site(site_folder(folder))
    judged_by = None if study is None else load_study(study)
    with progress_bar("Reading images") as progress:
        found = reidentify.find(site, " ".join(what), judged_by, progress=progress)
    unknown = [one for one in reidentify.words_of(" ".join(what)) if not _is_met(one, found)]
    if as_json:
        told = [
            {
                "file": one.short_id,
                "path": one.path,
                "patient_id": one.patient,
                "code": None if one.reason is None else one.reason.value,
                "asked": list(one.asked),
            }
            for one in found
        ]
        typer.echo(json.dumps({"found": told, "not_found": unknown}))
        raise typer.Exit(0 if found else OptionInvalid.exit_status)
    if not found:
        raise OptionInvalid(
            f"No file or patient at this site matches {' '.join(what)}.",
            why="Ids are valid at this site only; a patient's id for one study only.",
            remedy="Give the study of the message: "
            f"cloister client find {shlex.join(what)} --study STUDY{dir_option(folder)}",
        )
    for one in found:
        why = "" if one.reason is None else f"  {one.reason.value}  {one.reason.title}"
        # A path and an identifier can hold what a terminal obeys.
        whose = f"  PatientID {printable(one.patient)}" if one.patient else ""
        typer.echo(f"{one.short_id}{why}{whose}")
        typer.echo(f"              {printable(one.path)}")
    if unknown:
        typer.echo(f"Nothing matches {', '.join(unknown)}.", err=True)
    typer.echo("This names patients: keep it at this site.", err=True)


def _is_met(word: str, found: list[Named]) -> bool:
    return any(word in one.asked for one in found)


def data_report(
    out: Annotated[Path, typer.Option(help="The folder to write to.")],
    study: Annotated[Path | None, typer.Option(help="Read the data as this study does.")] = None,
    folder: Folder = Path(),
) -> None:
    """Write a report on the site's data, as HTML and JSON.

    It has counts, images and patients that may be one patient. It shows patients and stays here.
    """
    require("client", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls", "PIL")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import data_report as reports
    from cloister_fl.study.file import load_study

    site = open_site(site_folder(folder))
    judged_by = None if study is None else load_study(study)
    # Here already: nothing is read for a report that could not be written.
    reports.prepare(out)
    with progress_bar("Reading images") as progress:
        report = reports.survey(site, judged_by, progress=progress)
    reports.write(report, out)
    typer.echo(
        f"Wrote {out / reports.HTML} and {reports.JSON}. They show patients: keep them at this "
        "site."
    )
    twice = len(report.same_pixels) + len(report.same_person)
    if twice:
        typer.echo(f"Sets of patient identifiers that may be one patient: {twice}; see the report.")
    if report.held:
        command = f"cloister client quarantine{dir_option(folder)}"
        typer.echo(f"Quarantined files: {report.held}; review them: {command}")


@app.callback()
def quarantine(
    context: typer.Context,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    folder: Folder = Path(),
) -> None:
    """List the quarantined files, which a person must review.

    Each has the reason for which it is quarantined.
    """
    if context.invoked_subcommand is not None:
        return
    from cloister_fl.client.data import quarantine

    site, found = _quarantined(folder)
    if as_json:
        typer.echo(json.dumps({"held": [one.as_dict() for one in found]}))
        return
    typer.echo(quarantine.render(found, site.root))


@app.command()
def show(
    name: Name,
    png: Annotated[Path | None, typer.Option(help="Write the image here, as PNG.")] = None,
    folder: Folder = Path(),
) -> None:
    """Show the path and the image of a quarantined file. Both can name a patient."""
    from cloister_fl.client.data import quarantine
    from cloister_fl.system.files import write_atomic
    from cloister_fl.system.git_ignore import keep_file_out_of_git

    if png is not None:
        keep_file_out_of_git(png)
    site, found = _quarantined(folder)
    one = _named(found, name, folder)
    path, data = quarantine.look(site, one)
    typer.echo(quarantine.render([one], site.root).splitlines()[0])
    # A path can hold what a terminal obeys.
    typer.echo(f"Path: {printable(str(path))}")
    if png is not None:
        write_atomic(png, quarantine.picture(data))
        typer.echo(f"Wrote its image to {png}. It may show a patient's name: keep it at this site.")


@app.command()
def release(name: Name, why: Why, folder: Folder = Path(), yes: Yes = False) -> None:
    """Release a quarantined file that shows no name, for use.

    Look at it first: `cloister client quarantine show ID`.
    """
    from cloister_fl.client.data.quarantine import Decision

    _decide("release", name, why, folder, Decision.RELEASED, yes=yes)


@app.command()
def keep(name: Name, why: Why, folder: Folder = Path(), yes: Yes = False) -> None:
    """Keep a file out for good, or take back its release."""
    from cloister_fl.client.data.quarantine import Decision

    _decide("keep", name, why, folder, Decision.KEPT, yes=yes)


def _decide(verb: str, name: str, why: str, folder: Path, decision: Decision, *, yes: bool) -> None:
    from cloister_fl.client.data import quarantine

    quarantine.require_reason(why)
    site, found = _quarantined(folder)
    one = _named(found, name, folder)
    held_for = (
        "" if one.reason is None else f", quarantined for {one.reason.value} ({one.reason.title}),"
    )
    effect = {
        quarantine.Decision.RELEASED: "is released: studies are trained on it from now on.",
        quarantine.Decision.KEPT: "is kept out of every study.",
    }
    confirm(
        f"The file {name}{held_for} {effect[decision]}",
        owner=f"site {site.name}",
        folder=site.root,
        command=("cloister", "client", "quarantine", verb, name, "--why", why),
        yes=yes,
    )
    quarantine.decide(site, one, decision, why=why)
    typer.echo(f"{decision.value.capitalize()} at {site.name}: {name}.")


def _quarantined(folder: Path) -> tuple[Site, list[QuarantinedFile]]:
    require("client", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls", "PIL")
    from cloister_fl.client.data import quarantine
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    with progress_bar("Reading images") as progress:
        return site, list(quarantine.quarantined_files(site, progress=progress))


def _named(found: list[QuarantinedFile], name: str, folder: Path) -> QuarantinedFile:
    for one in found:
        if one.short_id == name:
            return one
    raise OptionInvalid(
        f"No quarantined file has the id {name!r}.",
        remedy=f"List them: cloister client quarantine{dir_option(folder)}",
    )
