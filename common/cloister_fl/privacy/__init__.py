"""Differential-privacy accounting: pure functions of public constants.

Patient-level, for neighbouring data sets that differ by one patient with all of that patient's
images (add or remove one). What a whole study costs is asked of ``study.privacy_cost``; here is the
arithmetic behind it, for any noise multiplier, sampling rate and number of steps::

    from cloister_fl.privacy import calibrate, epsilon_pld

    noise = calibrate(epsilon=3.0, delta=1e-5, q=0.1, steps=200)
    assert 2.99 < epsilon_pld(noise, 0.1, 200, 1e-5) <= 3.0
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cloister_fl.privacy.accounting import (
        calibrate,
        epsilon_of,
        epsilon_pld,
        epsilon_prv_of,
        epsilon_rdp_of,
        epsilon_trajectory,
    )
    from cloister_fl.privacy.dp_events import Composition, Mechanism, compose
else:
    from cloister_fl.system.libraries.lazy_names import lazy_names

    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "Composition": "dp_events:Composition",
            "Mechanism": "dp_events:Mechanism",
            "calibrate": "accounting:calibrate",
            "compose": "dp_events:compose",
            "epsilon_of": "accounting:epsilon_of",
            "epsilon_pld": "accounting:epsilon_pld",
            "epsilon_prv_of": "accounting:epsilon_prv_of",
            "epsilon_rdp_of": "accounting:epsilon_rdp_of",
            "epsilon_trajectory": "accounting:epsilon_trajectory",
        },
        extra="client",
    )

__all__ = [
    "Composition",
    "Mechanism",
    "calibrate",
    "compose",
    "epsilon_of",
    "epsilon_pld",
    "epsilon_prv_of",
    "epsilon_rdp_of",
    "epsilon_trajectory",
]
