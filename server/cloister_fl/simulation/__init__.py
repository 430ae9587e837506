"""A federation on one machine: simulation, demo, generated DICOM. Only it starts both sides.

``simulate`` runs the server and the sites of a deployment in this process, on folders of DICOM, and
returns the figures; ``generate_sites`` draws such folders where there are no images at hand.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.simulation.from_python import GeneratedSites, generate_sites, simulate
    from cloister_fl.simulation.result import Result, Round, read_result
    from cloister_fl.simulation.shown_progress import Progress, ProgressCallback
else:
    from cloister_fl.system.libraries.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "GeneratedSites": "from_python:GeneratedSites",
            "Progress": "shown_progress:Progress",
            "ProgressCallback": "shown_progress:ProgressCallback",
            "Result": "result:Result",
            "Round": "result:Round",
            "generate_sites": "from_python:generate_sites",
            "read_result": "result:read_result",
            "simulate": "from_python:simulate",
        },
        extra="simulation",
    )

__all__ = [
    "GeneratedSites",
    "Progress",
    "ProgressCallback",
    "Result",
    "Round",
    "generate_sites",
    "read_result",
    "simulate",
]
