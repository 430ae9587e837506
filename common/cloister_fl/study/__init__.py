"""The study: what a federation trains, on which data, under which privacy.

A study is a TOML file and holds configuration only. ``cloister study new`` writes a commented
example with every key; docs/studies has others. What is loaded here is what a site would approve:
all faults of a file are found at once, and the study has a digest, which sites sign::

    from cloister_fl import study

    asked = study.load("docs/studies/pneumonia.toml")
    stricter = study.replace(asked, privacy={"epsilon": 1.0})
    cost = study.privacy_cost(stricter)
    assert cost is not None and cost.epsilon() <= 1.0
    print(cost.step.noise_multiplier, "times the clipping norm, at", cost.steps, "steps")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.study.cost import Charges, privacy_cost
    from cloister_fl.study.file import load_study as load
    from cloister_fl.study.file import parse_study as parse
    from cloister_fl.study.file import replace
    from cloister_fl.study.schema import Study
    from cloister_fl.study.study_network import build_for as build_network
else:
    from cloister_fl.system.libraries.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Charges": "cost:Charges",
            "Study": "schema:Study",
            "build_network": "study_network:build_for",
            "load": "file:load_study",
            "parse": "file:parse_study",
            "privacy_cost": "cost:privacy_cost",
            "replace": "file:replace",
        },
        extra="client",
    )

__all__ = ["Charges", "Study", "build_network", "load", "parse", "privacy_cost", "replace"]
