"""`cloister client privacy-audit`: attack the installed training step, and say what came of it.

Everything heavy is imported inside the command, so that ``--help`` is quick.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from cloister_client.cli_steward import site_folder
from cloister_common.errors import OptionInvalid, PrivacyError
from cloister_common.extras import require

Folder = Annotated[Path, typer.Option("--dir", help="The site folder.")]
_NOISE = 1.0
_DELTA = 1e-5


def privacy_audit(
    draws: Annotated[
        int, typer.Option(min=40, max=1_000_000, help="How often the step is attacked; even.")
    ] = 2_000,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    folder: Folder = Path(),
) -> None:
    """Attack the installed training step: does it leak more of one patient than it claims?

    It trains on made-up patients and spends no budget. The exit status is 0 where the claim stands.
    """
    require("client", "numpy", "torch", "opacus", "dp_accounting", "pydicom")
    from cloister_client.audit import log_of
    from cloister_client.privacy_audit.canary import audit_step
    from cloister_client.privacy_audit.words import as_dict, render
    from cloister_client.site import open_site

    if draws % 2:
        raise OptionInvalid("The number of draws is odd.", remedy="Give an even number.")
    site = open_site(site_folder(folder))
    found = audit_step(draws, noise_multiplier=_NOISE, delta=_DELTA)
    # The log holds no fractions.
    told = {"claimed": found.claimed_epsilon, "audited": found.audited_epsilon}
    words = {name: f"{epsilon:.4f}" for name, epsilon in told.items()}
    log_of(site).append("audited", draws=draws, passed=found.passed, **words)
    typer.echo(json.dumps(as_dict(found)) if as_json else render(found))
    if not found.passed:
        raise typer.Exit(PrivacyError.exit_status)
