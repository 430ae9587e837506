"""Every attack test goes red once its check is gone; slow, for it runs pytest for each."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

_SPEC = importlib.util.spec_from_file_location(
    "secagg_mutants", Path(__file__).with_name("mutants.py")
)
assert _SPEC is not None
assert _SPEC.loader is not None
mutants = importlib.util.module_from_spec(_SPEC)
sys.modules["secagg_mutants"] = mutants
_SPEC.loader.exec_module(mutants)


@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_patch_fits(mutant: mutants.Mutant) -> None:
    with mutants.mutated(mutant) as copy:
        compile((copy / mutant.file).read_text(), mutant.file, "exec")


@pytest.mark.slow
@pytest.mark.parametrize("mutant", mutants.MUTANTS, ids=lambda mutant: mutant.name)
def test_attack_goes_red(mutant: mutants.Mutant) -> None:
    assert mutants.verdict(mutant) == "red"
