"""The ServerApp: the one that a deployment, the simulation and the tests all run.

Its configuration is Flower's run configuration: ``study`` (canonical JSON), ``out`` (folder of
the run), ``federation`` (folder of the root key and the roster), ``expected`` (sites to wait for),
``resume``, and ``signatures`` under the study (hexadecimal; may be absent).
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import replace
from pathlib import Path

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp

from cloister_fl.server.coordinator.federation import Federation
from cloister_fl.server.results.artifacts import write_outputs
from cloister_fl.server.results.so_far import SoFar
from cloister_fl.server.rounds.checkpoint import CHECKPOINT_FOLDER, Checkpoints
from cloister_fl.server.rounds.events import Hooks
from cloister_fl.server.rounds.messenger import Messenger
from cloister_fl.server.rounds.run import Run
from cloister_fl.study.gradient_engines import require_sound_engine
from cloister_fl.study.schema import study_from_canonical


def build(hooks: Hooks | None = None) -> ServerApp:
    """Make the ServerApp; a simulation adds hooks for its hold-out and its progress display."""
    server_app = ServerApp()
    used = hooks or Hooks()

    @server_app.main()
    def main(grid: Grid, context: Context) -> None:
        config = context.run_config
        study = study_from_canonical(str(config["study"]))
        # A study from a file was judged, but not that of a run which an earlier version began.
        require_sound_engine(study)
        out = Path(str(config["out"]))
        began = time.monotonic()
        so_far = SoFar(out, study)
        hooks = replace(used, saved=so_far)
        federation = Federation(Path(str(config["federation"])))
        run = Run(
            Messenger(grid, log=federation.log, timeout=used.timeout, check=used.check),
            study,
            Checkpoints(out / CHECKPOINT_FOLDER),
            hooks,
            expected=int(config["expected"]),
            roster=federation.roster() if study.aggregation.secure else None,
            signatures=bytes.fromhex(str(config.get("signatures", ""))),
        )
        with contextlib.closing(so_far):
            outcome = run.execute(resume=bool(config["resume"]))
        seconds = time.monotonic() - began
        write_outputs(out, study, outcome, seconds=seconds, holdout=used.holdout)

    return server_app


app = build()
