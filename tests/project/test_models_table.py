"""docs/MODELS.md is what the tests say."""

from support.families import models_table
from support.families.diffusers_families import FAMILIES as DIFFUSERS
from support.families.transformers_families import FAMILIES as TRANSFORMERS
from tests.patch.diffusers import test_diffusers_families
from tests.patch.transformers import test_transformers_families


def test_the_file_is_fresh():
    command = "PYTHONPATH=.:tests python tests/support/families/models_table.py"
    assert models_table.FILE.read_text(encoding="utf-8") == models_table.render(), f"run {command}"


def test_every_cell_has_a_test():
    for families, tests in ((DIFFUSERS, test_diffusers_families), (TRANSFORMERS, test_transformers_families)):
        cells = [tuple(cell.values) for cell in tests.cells()]
        assert cells == [(family, mode) for family in families for mode in tests.MODES]
        for family in families:
            assert {*family.refused_modes, *family.not_applicable} <= tests.MODES.keys()
