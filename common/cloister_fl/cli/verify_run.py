"""`cloister verify` of a run's folder.

The server's own steps are taken again, so what checks a run is the server's. It is found as an
entry point, for the root command imports neither side.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import typer

from cloister_fl.errors import ExtraMissing, RunUnverified
from cloister_fl.membership.identity import fingerprint
from cloister_fl.system.installation import install_command, own_entry_points
from cloister_fl.system.text import counted

GROUP = "cloister_fl.verify"
NAME = "run"
_SHOWN = 40


class Verdict(Protocol):
    """What is used of ``server.results.run_verification.RunVerdict``."""

    @property
    def study(self) -> str: ...
    @property
    def run(self) -> str: ...
    @property
    def rounds(self) -> int: ...
    @property
    def sums(self) -> int: ...
    @property
    def discarded(self) -> Sequence[int]: ...
    @property
    def lost(self) -> Sequence[int]: ...
    @property
    def sites(self) -> dict[str, str]: ...
    @property
    def rosters(self) -> Sequence[str]: ...
    @property
    def has_model_file(self) -> bool: ...
    @property
    def findings(self) -> Sequence[str]: ...


def verify_run(folder: Path, *, as_json: bool) -> None:
    """Check the folder of a run and say what was found.

    Raises:
        RunUnverified: something in it does not hold.
        FileUnreadable: it is no run, or its sums were not kept.
        ExtraMissing: the server of Cloister is not installed.
    """
    verdict = _load()(folder)
    if as_json:
        typer.echo(json.dumps(_as_dict(verdict)))
    else:
        typer.echo(_in_words(verdict))
    if verdict.findings:
        raise RunUnverified(
            f"The run in {folder} is not what its records give.",
            why=f"{counted(len(verdict.findings), 'finding')}, above.",
            remedy="Ask for a new copy of the run's folder; if it has the same findings, do not "
            "rely on its model.",
        )


def _load() -> Callable[[Path], Verdict]:
    missing = ExtraMissing(
        "A run is checked with the server of Cloister, which is not installed.",
        remedy=f"Run: {install_command('server')}",
    )
    found = [entry for entry in own_entry_points(GROUP) if entry.name == NAME]
    if not found:
        raise missing
    try:
        check: Callable[[Path], Verdict] = found[0].load()
    except ModuleNotFoundError:
        raise missing from None
    return check


def _as_dict(verdict: Verdict) -> dict[str, object]:
    return {
        "holds": not verdict.findings,
        "findings": list(verdict.findings),
        "study": verdict.study,
        "run": verdict.run,
        "rounds": verdict.rounds,
        "sums": verdict.sums,
        "discarded": list(verdict.discarded),
        "lost": list(verdict.lost),
        "sites": dict(verdict.sites),
        "rosters": list(verdict.rosters),
        "has_model_file": verdict.has_model_file,
    }


def _in_words(verdict: Verdict) -> str:
    lines = [
        f"Run {verdict.run} of study {verdict.study[:16]}: {counted(verdict.rounds, 'round')}, "
        f"{counted(verdict.sums, 'sum')} computed again from what the sites signed"
    ]
    for what, rounds in (("discarded", verdict.discarded), ("lost", verdict.lost)):
        if rounds:
            lines.append(f"  {what:<10} " + ", ".join(str(number) for number in rounds))
    lines += [f"  {site}  {fingerprint(bytes.fromhex(key))}" for site, key in verdict.sites.items()]
    lines += [f"  {found}" for found in verdict.findings[:_SHOWN]]
    if len(verdict.findings) > _SHOWN:
        lines.append(f"  and {len(verdict.findings) - _SHOWN} more")
    if not verdict.findings:
        model = (
            "the model file is that model"
            if verdict.has_model_file
            else "no model of a finished run is here"
        )
        lines += [
            "Each sum follows from the sites' signed vectors, each model from the sum before it;",
            f"{model}. The keys are those of the folder's rosters: compare the",
            "fingerprints with the hospitals'. A sum does not tell what a site put into it.",
        ]
    return "\n".join(lines)
