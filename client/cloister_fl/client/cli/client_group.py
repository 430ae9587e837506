"""Commands `cloister client` (its groups, `init`, `check`, `audit`) and `cloister predict`.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cloister_fl.cli.folder_option import FolderTyper, dir_option, folder_option, one_folder
from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.client.cli import budget_commands, data_commands
from cloister_fl.client.cli.certificate_commands import certificate
from cloister_fl.client.cli.join_commands import address, join, proxy, renew, roster
from cloister_fl.client.cli.patient_commands import patients
from cloister_fl.client.cli.privacy_audit_commands import privacy_audit
from cloister_fl.client.cli.progress_bar import progress_bar
from cloister_fl.client.cli.service_commands import start, status, stop
from cloister_fl.client.cli.site_folder import PatientsAtMost, site_folder
from cloister_fl.client.cli.steward_commands import approve, deny, review
from cloister_fl.errors import FolderUnreadable, OptionInvalid, SiteEmpty
from cloister_fl.system.optional import require
from cloister_fl.system.text import counted, printable

if TYPE_CHECKING:
    from cloister_fl.client.predict import Prediction

_ORDER = (
    *("init", "join", "check", "start", "stop", "status", "renew"),
    *("fetch", "quarantine", "patients", "data-report", "freeze"),
    *("review", "approve", "deny", "roster"),
    *("budget", "certificate", "audit", "find"),
    *("privacy-audit", "proxy", "address"),
)
"""Commands as a site's day needs them: service, data, studies, accounts, the rest."""


app = FolderTyper(order=_ORDER, no_args_is_help=True)


app.command()(join)
app.command()(renew)
app.command()(roster)
app.command()(proxy)
app.command()(address)
app.command()(start)
app.command()(stop)
app.command()(status)
app.command()(review)
app.command()(approve)
app.command()(deny)
app.command()(certificate)
app.command(name="privacy-audit")(privacy_audit)
app.command()(data_commands.fetch)
app.command()(patients)
app.command()(data_commands.freeze)
app.command(name="data-report")(data_commands.data_report)
app.command()(data_commands.find)
app.add_typer(data_commands.app, name="quarantine")
app.add_typer(budget_commands.app, name="budget")


@app.callback()
def client(folder: Folder = Path()) -> None:
    """Run a hospital's site: set-up, service, approvals, accounts."""
    del folder  # of the commands; see FolderTyper


@app.command()
def init(
    positional: Annotated[
        Path | None, typer.Argument(metavar="DIR", help="The site folder.", show_default="here")
    ] = None,
    name: Annotated[str | None, typer.Option(help="The site's name; else the folder's.")] = None,
    dicom: Annotated[
        Path | None, typer.Option(help="Folder of the images, absolute or from the site folder.")
    ] = None,
    labels: Annotated[
        Path | None, typer.Option(help="The labels file, CSV, absolute or from the site folder.")
    ] = None,
    patients_at_most: PatientsAtMost = None,
    option: Annotated[Path | None, folder_option("The site folder, as DIR.")] = None,
) -> None:
    """Create a site folder and its keys.

    In a folder that exists already, what is missing is created and nothing is replaced.
    """
    folder = one_folder(positional, option) or Path()
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import SITE_FILE, init_site, require_as_written
    from cloister_fl.client.site.policy import bound_missing, policy_for
    from cloister_fl.system.git_ignore import uncovered_by_git_ignore

    new = not (folder / SITE_FILE).exists()
    policy = policy_for(patients_at_most)
    site = init_site(folder, name=name, dicom=dicom, labels=labels, policy=policy)
    require_as_written(
        site, name=name, dicom=dicom, labels=labels, patients_at_most=patients_at_most
    )
    if gap := uncovered_by_git_ignore(folder):
        typer.echo(gap, err=True)
    if new:
        for path, what in (
            (site.dicom, "folder of images"),
            (site.labels, "labels file (not needed for segmentation)"),
        ):
            if not path.exists():
                typer.echo(f"There is no {what} yet: {path}")
        policy = site.policy
        typer.echo(
            f"Budget of a patient: epsilon {policy.max_epsilon_study:g} in one study, "
            f"{policy.max_epsilon_lifetime:g} in all together, which is what binds. A lifetime of "
            "8 is four studies of epsilon 3."
        )
        if missing := bound_missing(site.policy):
            typer.echo(missing)
        typer.echo(f"Site {site.name} is ready. Edit {folder / SITE_FILE}, then run:")
        typer.echo(f"  cloister client check{dir_option(folder)}")
    else:
        typer.echo(f"Site {site.name} exists already; its site.toml and keys are unchanged.")


@app.command()
def check(
    folder: Folder = Path(),
    study: Annotated[Path | None, typer.Option(help="Check the data against this study.")] = None,
    offline: Annotated[bool, typer.Option(help="Skip the network checks.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    sheet: Annotated[
        Path | None,
        typer.Option("--contact-sheet", help="Write the preprocessed images, as PNG."),
    ] = None,
) -> None:
    """Check the network, this machine and the site's data.

    With a study, the data are checked as its runs check them: where they are frozen, what changed
    since is a failure. The exit status is 0 where nothing failed, else that of the first failure.
    """
    require("client", "httpx", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls", "PIL")
    from cloister_fl.client.admission.approvals import judgements
    from cloister_fl.client.preflight import findings as preflight
    from cloister_fl.client.preflight.data_check import inspect, render
    from cloister_fl.client.preflight.network_check import network
    from cloister_fl.client.site.data_notice import note_look
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward.contact_sheet import contact_sheet
    from cloister_fl.study.file import load_study
    from cloister_fl.system.files import write_atomic
    from cloister_fl.system.git_ignore import keep_file_out_of_git

    site = open_site(site_folder(folder))
    judged_by = load_study(study) if study is not None else None
    if sheet is not None:
        keep_file_out_of_git(sheet)
    findings = [*network(site, offline=offline), *preflight.machine(site)]
    with progress_bar("Reading images") as progress:
        report = inspect(site, judged_by, progress=progress)
    findings += preflight.data(report)
    if judged_by is not None and judged_by.digest in judgements(site):
        note_look(site.root, judged_by.digest, report.faults)
    if as_json:
        told = [finding.as_dict() for finding in findings]
        typer.echo(json.dumps({**report.as_dict(), "findings": told}))
    else:
        typer.echo(f"{preflight.render(findings)}\n\n{render(report, site.root)}")
    if sheet is not None and report.cohort is not None:
        shown, png = contact_sheet(report.cohort, judged_by.task if judged_by else None)
        write_atomic(sheet, png)
        typer.echo(
            f"Wrote {shown} images to {sheet}. They show patients: keep them at this site.",
            err=True,
        )
    raise typer.Exit(preflight.exit_status(findings))


@app.command()
def audit(
    folder: Folder = Path(),
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Show what left this site, to whom and why.

    It is read from the site's audit log.
    """
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.audit_log import as_dict, entries_of, render
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    entries = entries_of(site)
    typer.echo(json.dumps(as_dict(site, entries)) if as_json else render(site, entries))


def predict(
    model: Annotated[Path, typer.Argument(help="A model that Cloister wrote.")],
    folder: Annotated[Path, typer.Argument(help="The images, DICOM, in any structure.")],
    out: Annotated[
        Path | None,
        typer.Option(
            help="The CSV file to write, outside FOLDER; for a model that segments, a new folder.",
            show_default="scores.csv or masks",
        ),
    ] = None,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    patient_ids: Annotated[
        bool, typer.Option("--patient-ids", help="Add a column with PatientID.")
    ] = False,
    bom: Annotated[
        bool, typer.Option("--bom", help="Begin the CSV with a byte order mark, for Excel.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace a CSV file that is there.")
    ] = False,
    list_rejected: Annotated[
        bool,
        typer.Option("--list-rejected", help="Show the paths of files that cannot be used."),
    ] = False,
    strict: Annotated[
        bool, typer.Option("--strict", help="Exit with 3 if a file cannot be used.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
) -> None:
    """Score or segment a folder of images with a finished model.

    It runs on this machine, and nothing is sent. A row has an image's scores, the mean scores of
    its patient, and what the patient is called: of two classes at the model's operating point,
    where the model has one, else at a score of 0.5; of more, the class with the highest mean. The
    last lines say which.

    Patients have pseudonyms that hold within the file alone. The exit status is 0 where the output
    is written, 3 where no file can be used, and with --strict also where some cannot.
    """
    require("client", "torch", "numpy", "pydicom", "imagecodecs", "openjpeg", "jpeg_ls")
    from cloister_fl.client import predict as prediction

    with progress_bar("Reading images") as progress:
        try:
            done = prediction.predict(
                model,
                folder,
                out,
                device=device,
                patient_ids=patient_ids,
                bom=bom,
                overwrite=overwrite,
                progress=progress,
            )
        except FolderUnreadable as error:
            raise OptionInvalid(
                f"The images in {folder} cannot be read.",
                why=error.why,
                remedy="Name a folder with DICOM files, and check its permissions.",
            ) from None
    _tell(done, list_rejected=list_rejected, as_json=as_json)
    if strict and done.rejects:
        raise typer.Exit(SiteEmpty.exit_status)


def _tell(done: Prediction, *, list_rejected: bool, as_json: bool) -> None:
    if as_json:
        typer.echo(json.dumps(done.as_dict()))
    else:
        what = "segmentation masks" if done.masks else "scores"
        images, patients = counted(done.images, "image"), counted(done.patients, "patient")
        typer.echo(f"Wrote the {what} of {images} of {patients} to {done.out}.")
        if done.calls:
            # A class is a text of whoever wrote the model.
            typer.echo(printable(done.calls))
    if done.rejects:
        number = counted(sum(done.rejects.values()), "file")
        typer.echo(f"Could not use {number}:", err=True)
    for reason, count in done.rejects.items():
        typer.echo(f"  rejected: {count} ({reason.value}, {reason.title})", err=True)
    for path, reason in sorted(done.rejected.items()) if list_rejected else ():
        typer.echo(f"  {reason.value}  {printable(path)}", err=True)
