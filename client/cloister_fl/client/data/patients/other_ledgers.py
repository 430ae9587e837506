"""Other ledgers of this machine that count a site's patients.

Checks of the data and the freezing of a study by a person stop where another ledger has spent on
some of the same patients and is not linked. A run never stops for it, and says it to the site's own
people alone (``site.data_notice``): an entry of the audit log, whose head travels, would tell. What
cannot be looked at stops nothing either, and is told.
"""

from __future__ import annotations

import shlex
from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass

from cloister_fl.client.ledger.ledger import Ledger
from cloister_fl.client.ledger.machine_registry import (
    Entry,
    Overlap,
    Registry,
    RegistryUnusableError,
    Trait,
    continued_in,
    has_spending,
    ledger_id,
)
from cloister_fl.client.site.folder import LEDGER, THROWAWAY, Site
from cloister_fl.errors import CloisterError, LedgerUnlinked
from cloister_fl.system.text import counted


@dataclass(frozen=True)
class Looked:
    """What was found.

    Attributes:
        error: what stops a check, or None.
        remark: what could not be looked at, in words; empty where all could.
    """

    error: CloisterError | None = None
    remark: str = ""


def look(site: Site, traits: Collection[Trait]) -> Looked:
    """Look for other ledgers of a site's patients; nothing is written.

    Args:
        site: the opened site.
        traits: of its patients.
    """
    if is_throwaway(site):
        return Looked()
    own = ledger_id(site.ledger)
    continued, linked = "", frozenset[str]()
    if own:
        ledger = Ledger.open(site.ledger, delta=site.policy.ledger_delta)
        continued, linked = ledger.continued(), ledger.linked()
        ledger.shut()
    if continued:
        return Looked(_continued(site))
    try:
        registry = Registry.open()
        if registry is None:
            return Looked(remark="No registry of ledgers is kept on this machine: CLOISTER_STATE.")
        entries = registry.entries()
        for entry in entries:
            path = entry.folder / LEDGER
            if own and entry.folder != site.root.resolve() and ledger_id(path) == own:
                return Looked(_copy(site, str(entry.folder)))
        # Own: this very ledger, where its folder was before it was moved.
        counted_here = linked | ({own} if own else set())
        found = [
            one
            for one in registry.overlaps(site.root, traits)
            if not _is_counted(one.entry, entries, counted_here) and _may_have_spent(one)
        ]
    except RegistryUnusableError as error:
        return Looked(remark=f"The machine's registry of ledgers cannot be used: {error}.")
    return Looked(_unlinked(site, found) if found else None)


def register(site: Site, traits: Collection[Trait]) -> Looked:
    """Note whose patients the site's ledger counts; a registry that cannot be used stops nothing.

    Returns:
        What ``look`` finds, and whether the registry could be written.
    """
    if is_throwaway(site):
        return Looked()
    looked = Looked()
    # A ledger that is damaged is refused where something is charged, and not here.
    with suppress(CloisterError):
        looked = look(site, traits)
    try:
        registry = Registry.open()
        if registry is not None:
            registry.register(site.root, site.name, ledger_id(site.ledger), traits)
    except RegistryUnusableError as error:
        remark = f"The machine's registry of ledgers cannot be written: {error}."
        return Looked(looked.error, remark)
    return looked


def note_ledger(site: Site) -> None:
    """Note which ledger a registered site has, once it has one; nothing else is looked at."""
    own = ledger_id(site.ledger)
    if not own or is_throwaway(site):
        return
    with suppress(RegistryUnusableError):
        registry = Registry.open()
        known = () if registry is None else registry.entries()
        if registry is not None and any(
            one.folder == site.root.resolve() and one.ledger != own for one in known
        ):
            registry.register(site.root, site.name, own, ())


def is_throwaway(site: Site) -> bool:
    """Whether the site was made for a simulation, and goes with it."""
    return (site.root / THROWAWAY).exists()


def _is_counted(one: Entry, entries: Sequence[Entry], here: Collection[str]) -> bool:
    """Whether a folder's ledger is counted here, or continued in one that is."""
    folders = {ledger_id(each.folder / LEDGER): each.folder for each in entries}
    folder, own = one.folder, ledger_id(one.folder / LEDGER) or one.ledger
    seen: set[str] = set()
    while own and own not in seen:
        if own in here:
            return True
        seen.add(own)
        own = continued_in(folder / LEDGER)
        folder = folders.get(own, folder)
    return False


def _may_have_spent(one: Overlap) -> bool:
    """Whether a ledger has spent, or is not there to be asked."""
    path = one.entry.folder / LEDGER
    if path.exists():
        return has_spending(path)
    return bool(one.entry.ledger) or not one.entry.folder.exists()


def _unlinked(site: Site, found: Collection[Overlap]) -> CloisterError:
    told = "".join(
        f"\n  {one.entry.folder} (site {one.entry.site}): {counted(one.patients, 'patient')}"
        + ("" if one.entry.folder.exists() else "; the folder is gone")
        for one in found
    )
    others = [shlex.quote(str(one.entry.folder)) for one in found]
    return LedgerUnlinked(
        f"Patients of this site are counted by {counted(len(found), 'other ledger')} of this "
        f"machine:{told}\n",
        why="Neither ledger knows what the other has spent on them.",
        remedy="Use that site folder; or count its spending here, for good: "
        + site.command(f"budget link {others[0]}")
        + ". If they are other patients: "
        + site.command(f"budget separate {' '.join(others)} --why '...'"),
    )


def _copy(site: Site, other: str) -> CloisterError:
    return LedgerUnlinked(
        f"This site's ledger is a copy of that in {other}, or that one of this.",
        why="Each copy forgets what the other spends on the same patients.",
        remedy="Keep the folder whose ledger has more entries, and remove the other. See both: "
        f"{site.command('budget')} and cloister client budget --dir {shlex.quote(other)}",
    )


def _continued(site: Site) -> CloisterError:
    return LedgerUnlinked(
        "This site's ledger is continued in another site folder.",
        why="The steward linked it there; nothing more can be reserved here.",
        remedy=f"Use that folder. When it was linked: {site.command('audit')}",
    )
