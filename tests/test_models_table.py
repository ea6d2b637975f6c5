"""docs/MODELS.md is what the tests say."""

import models_table
import test_diffusers_families
import test_transformers_families
from diffusers_families import FAMILIES as DIFFUSERS
from transformers_families import FAMILIES as TRANSFORMERS


def test_the_file_is_fresh():
    assert models_table.FILE.read_text(encoding="utf-8") == models_table.render(), "run python tests/models_table.py"


def test_every_cell_has_a_test():
    for families, tests in ((DIFFUSERS, test_diffusers_families), (TRANSFORMERS, test_transformers_families)):
        cells = [tuple(cell.values) for cell in tests.cells()]
        assert cells == [(family, mode) for family in families for mode in tests.MODES]
        for family in families:
            assert {*family.refused_modes, *family.not_applicable} <= tests.MODES.keys()
