"""Link of two ledgers of the same patients: the new one counts what the old one spends.

First the old ledger is told that it reserves nothing more, then all that it may still come to spend
is written into the new one. Whatever ends the command between the two, nothing is counted too
little: the old one is shut, and the command can be repeated.
"""

from __future__ import annotations

from pathlib import Path

from cloister_fl.client.ledger.machine_registry import Registry, RegistryUnusableError, ledger_id
from cloister_fl.client.ledger.site_session import SiteSession
from cloister_fl.client.site.audit_log import log_of
from cloister_fl.client.site.folder import Site, open_site
from cloister_fl.errors import OptionInvalid, OutputInTheWay
from cloister_fl.system.text import is_reason


def open_other(site: Site, folder: Path) -> Site:
    """Open the site folder whose ledger is to be linked, or not to be.

    Raises:
        OptionInvalid: it is this site's own folder, or has no ledger.
        SiteFileInvalid, FileUnreadable: see ``open_site``.
    """
    other = open_site(folder)
    if other.root.resolve() == site.root.resolve():
        raise OptionInvalid(
            f"{folder} is this site's own folder.",
            remedy="Name the other folder: " + site.command("budget link OTHER"),
        )
    if not ledger_id(other.ledger):
        raise OptionInvalid(
            f"The site folder {folder} has no ledger.",
            why="Nothing was spent in it.",
            remedy="Remove that folder, or say that its patients are others: "
            + site.command("budget separate OTHER --why '...'"),
        )
    return other


def link(site: Site, other: Site) -> bool:
    """Count another ledger's spending at a site, for good, and shut the other for reservations.

    Args:
        site: whose ledger counts it.
        other: whose ledger is continued; its runs go on within what they reserved.

    Returns:
        Whether it was not linked before.

    Raises:
        OptionInvalid: the two are copies of one ledger.
        PolicyRefused: the other is continued in a third one, or this one in another.
        LedgerRolledBack, LedgerDamaged, AuditLogDamaged: a ledger is not the newest, or damaged.
    """
    here, there = SiteSession(site), SiteSession(other)
    for session in (here, there):
        session.require_newest()
    ledger = here.ledger
    own, theirs = ledger_id(site.ledger), ledger_id(other.ledger)
    if own == theirs:
        raise OptionInvalid(
            "The two ledgers are copies of one.",
            why="What they have in common would be counted twice, and each forgets the other's.",
            remedy="Keep the folder whose ledger has more entries, and remove the other.",
        )
    if ledger.continued():
        raise OptionInvalid(
            "This site's ledger is continued in another site folder itself.",
            remedy="Link the other ledger there.",
        )
    for session in (here, there):
        if not session.is_noted():
            # Before the entry: a kill behind it must not look like notes that were deleted.
            session.note()
    there.ledger.continue_in(own)
    there.log.append("continued", ledger=own, by="steward")
    there.note()
    new = ledger.link(theirs, there.ledger.spending())
    if new:
        here.log.append("linked", ledger=theirs, by="steward")
        here.note()
    here.close()
    there.close()
    return new


def separate(site: Site, folder: Path, why: str) -> None:
    """Note a steward's word that the patients of another folder are others.

    Args:
        site: whose steward says so.
        folder: the other site folder; need not exist any more.
        why: the reason, for the audit log.

    Raises:
        OptionInvalid: no reason is given, it has several lines, or more than 500 characters; or
            no registry is kept.
        OutputInTheWay: the registry cannot be written.
        AuditLogDamaged: the log cannot be written.
    """
    if not is_reason(why):
        raise OptionInvalid(
            "No reason is given.",
            remedy="Say why they are other patients, in one line of at most 500 characters: "
            "--why '...'. It is written to the audit log: name no patient.",
        )
    try:
        registry = Registry.open()
        if registry is None:
            raise OptionInvalid(
                "No registry of ledgers is kept on this machine.",
                why="CLOISTER_STATE switches it off.",
                remedy="Nothing is to be said: no ledger is looked for.",
            )
        log_of(site).append("separate", why=why.strip(), by="steward")
        registry.separate(site.root, site.name, folder)
    except RegistryUnusableError as error:
        raise OutputInTheWay(
            "The machine's registry of ledgers cannot be used.",
            why=f"{error}.",
            remedy="Check its permissions, or name another folder in CLOISTER_STATE.",
        ) from None
