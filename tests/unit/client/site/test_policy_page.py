"""Each key of the policy is documented with its default, and offered in a new ``site.toml``."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from cloister_fl.client.site.policy import Policy
from cloister_fl.client.site.settings import Network
from cloister_fl.client.site.template import site_text

PAGE = Path(__file__).parents[4] / "docs" / "policy.md"
KEYS = list(Policy.model_fields)


def documented(page: str) -> dict[str, object]:
    """The keys of the page's first table, and the defaults that it gives."""
    table = page[page.index("| key | default |") :].partition("\n\n")[0]
    rows = [[cell.strip() for cell in row.split("|")[1:3]] for row in table.splitlines()[2:]]
    return {key.strip("`"): tomllib.loads(f"x = {default_of(cell)}")["x"] for key, cell in rows}


def default_of(cell: str) -> str:
    """The value of a cell such as ```[]`: all``."""
    return re.sub(r": .*", "", cell).replace("`", "")


def test_the_page_documents_the_keys_that_there_are_in_their_order() -> None:
    assert list(documented(PAGE.read_text("utf-8"))) == KEYS


def test_the_page_gives_their_defaults() -> None:
    told = Policy.model_validate(documented(PAGE.read_text("utf-8")))
    assert told == Policy()


def test_the_template_offers_the_keys_that_there_are_in_their_order() -> None:
    offered = tomllib.loads(site_text("north", "d", "l", Policy(), Network()))["policy"]
    assert list(offered) == KEYS
    assert Policy.model_validate(offered) == Policy()


@pytest.mark.parametrize("key", KEYS)
def test_the_template_writes_what_a_key_is_given(key: str) -> None:
    """A key whose default alone is written would be lost where ``init_site`` is given another."""
    other = {
        "max_epsilon_study": 1.25, "max_epsilon_lifetime": 9.5, "ledger_delta": 1e-6,
        "patients_at_most": 77, "min_noise_multiplier": 0.5,
        "min_patients": 4, "min_patients_per_class": 3, "min_patients_per_class_without_privacy": 0,
        "require_secure_aggregation": False,
        "colluders": 2, "min_sites": 7, "max_weight_ratio": 2.5, "max_rounds": 9,
        "allow_without_privacy": True,
        "networks": ["filter-bank"], "modalities": ["CT"], "metrics": ["score-histograms"],
        "hours": ["20:00-06:00"], "release_unstarted": True,
        "approve": "listed", "approved_hashes": ["0" * 64],
        "trusted_signers": ["d75a980182b10ab7d54bfed3c964073a0ee172f3daa62325af021a68f707511a"],
    }  # fmt: skip
    given = {key: other[key], **({"approved_hashes": ["0" * 64]} if key == "approve" else {})}
    policy = Policy.model_validate(given)
    assert policy != Policy()
    offered = tomllib.loads(site_text("north", "d", "l", policy, Network()))["policy"]
    assert Policy.model_validate(offered) == policy
