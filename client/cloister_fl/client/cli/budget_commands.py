"""Commands `cloister client budget`: the privacy budget, spent and left.

Everything heavy is imported inside the commands, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cloister_fl.cli.confirm import Yes, confirm
from cloister_fl.cli.folder_option import FolderTyper
from cloister_fl.cli.folder_option import SiteFolder as Folder
from cloister_fl.client.cli.site_folder import site_folder
from cloister_fl.system.optional import require
from cloister_fl.system.text import counted

app = FolderTyper(invoke_without_command=True)


@app.callback()
def budget(
    context: typer.Context,
    study: Annotated[Path | None, typer.Option(help="Say what this study would cost.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    folder: Folder = Path(),
) -> None:
    """Show the privacy budget: epsilon spent, reserved and left.

    The table has a line for each study, and the patients' lifetime figure.
    """
    if context.invoked_subcommand is not None:
        return
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import budget
    from cloister_fl.study.file import load_study

    site = open_site(site_folder(folder))
    asked = budget.proposal(site, load_study(study)) if study is not None else None
    told = budget.judged_statement(site)
    if as_json:
        typer.echo(json.dumps(budget.as_dict(told, asked)))
        return
    typer.echo(budget.render(told, site.root))
    if asked is not None:
        typer.echo(budget.render_proposal(asked))


@app.command()
def export(
    out: Annotated[Path, typer.Option(help="The file to write, JSON Lines.")],
    folder: Folder = Path(),
) -> None:
    """Export the ledger to a file, its head signed by this site."""
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import budget

    count = budget.export(open_site(site_folder(folder)), out)
    typer.echo(f"Wrote {count} entries and the signed head to {out}.")


@app.command()
def close(
    study: Annotated[str, typer.Argument(metavar="HASH", help="A hash that budget lists.")],
    folder: Folder = Path(),
    yes: Yes = False,
) -> None:
    """Close a study at this site for good.

    The steps that it reserved and has not started are released.
    """
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import budget

    site = open_site(site_folder(folder))
    digest = budget.find(site, study)
    (account,) = [one for one in budget.statement(site).studies if one.study == digest]
    if account.closed:
        typer.echo(f"The study {digest[:16]} was closed at {site.name} already.")
        return
    confirm(
        f"The study {account.name or 'without a name'}, {digest[:16]}, is closed for good: "
        f"{counted(account.steps_reserved, 'step')} reserved and not started are released.",
        owner=f"site {site.name}",
        folder=site.root,
        command=("cloister", "client", "budget", "close", study),
        yes=yes,
    )
    released = budget.close(site, digest)
    typer.echo(f"Closed at {site.name}: {digest[:16]}. Steps released: {released}.")


@app.command(name="accept-ledger")
def accept_ledger(folder: Folder = Path(), yes: Yes = False) -> None:
    """Accept a ledger that fails rollback detection.

    It is the newest from then on; the ledger and the audit log record it.
    """
    require("client", "numpy", "pydicom")
    from cloister_fl.client.ledger.site_session import SiteSession
    from cloister_fl.client.site.folder import open_site

    site = open_site(site_folder(folder))
    session = SiteSession(site)
    found = session.disagreements()
    if not found:
        typer.echo(f"The ledger of {site.name} matches ledger.high and the audit log.")
        return
    confirm(
        f"The ledger is accepted as the newest, for good, although: {' '.join(found)}",
        owner=f"site {site.name}",
        folder=site.root,
        command=("cloister", "client", "budget", "accept-ledger"),
        yes=yes,
    )
    session.accept_ledger()
    typer.echo(f"Accepted at {site.name}, and logged.")


@app.command()
def link(
    other: Annotated[Path, typer.Argument(metavar="OTHER", help="The other site folder.")],
    folder: Folder = Path(),
    yes: Yes = False,
) -> None:
    """Count another folder's spending on the same patients.

    It counts in this site's ledger from then on. That folder's runs go on within what they
    reserved, and it reserves nothing more.
    """
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import ledger_link

    site = open_site(site_folder(folder))
    linked = ledger_link.open_other(site, other)
    confirm(
        f"The spending of site {linked.name} in {linked.root} counts here, for good, and nothing "
        "more can be reserved there.",
        owner=f"site {site.name}",
        folder=site.root,
        command=("cloister", "client", "budget", "link", str(other)),
        yes=yes,
    )
    new = ledger_link.link(site, linked)
    typer.echo(f"Linked at {site.name}." if new else f"Linked at {site.name} already.")


@app.command()
def separate(
    others: Annotated[
        list[Path], typer.Argument(metavar="OTHER...", help="The other site folders.")
    ],
    why: Annotated[
        str, typer.Option(help="Why. Written to this site's audit log: name no patient. Not sent.")
    ],
    folder: Folder = Path(),
) -> None:
    """Say that other site folders' patients are others.

    Their spending does not count here, although numbers or names are the same.
    """
    require("client", "numpy", "pydicom")
    from cloister_fl.client.site.folder import open_site
    from cloister_fl.client.steward import ledger_link

    site = open_site(site_folder(folder))
    for other in others:
        ledger_link.separate(site, other, why)
        typer.echo(f"Noted at {site.name}: the patients of {other} are others.")
