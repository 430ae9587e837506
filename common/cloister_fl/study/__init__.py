"""The study: what a federation trains, on which data, under which privacy.

A study is a TOML file and holds configuration only. ``cloister study new`` writes a commented
example with every key; docs/studies has others. What is loaded here is what a site would approve:
all faults of a file are found at once, and the study has a digest, which sites sign. Functions
that take a study take the path of its file, too::

    from cloister_fl import study

    asked = study.load("docs/studies/pneumonia.toml")
    stricter = study.replace(asked, privacy={"epsilon": 1.0})
    cost = study.privacy_cost(stricter)
    assert cost is not None and cost.epsilon() <= 1.0
    print(cost.step.noise_multiplier, "times the clipping norm, at", cost.steps, "steps")
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.study.cost import Charges
    from cloister_fl.study.file import load_study as load
    from cloister_fl.study.file import parse_study as parse
    from cloister_fl.study.file import replace
    from cloister_fl.study.given_studies import (
        bind,
        build_network,
        load_signatures,
        privacy_cost,
    )
    from cloister_fl.study.schema import Study
else:
    from cloister_fl.system.libraries.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Charges": "cost:Charges",
            "Study": "schema:Study",
            "bind": "given_studies:bind",
            "build_network": "given_studies:build_network",
            "load": "file:load_study",
            "load_signatures": "given_studies:load_signatures",
            "parse": "file:parse_study",
            "privacy_cost": "given_studies:privacy_cost",
            "replace": "file:replace",
        },
        extra="client",
    )

__all__ = [
    "Charges",
    "Study",
    "bind",
    "build_network",
    "load",
    "load_signatures",
    "parse",
    "privacy_cost",
    "replace",
]
