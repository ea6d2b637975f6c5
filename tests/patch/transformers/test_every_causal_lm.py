"""Every causal language model of the installed Transformers: the stock model, the oracle, or a refusal (docs/MODELS.md).

All of them run with -m slow; those in the sample always, and others in test_published_models.py.
"""

import dataclasses

import pytest
import transformers

from support.families import every_causal_lm

SAMPLE = ("bart", "minimax_m3_vl_text", "qwen3_next")


def types():
    for model_type in every_causal_lm.model_types():
        yield pytest.param(model_type, marks=[] if model_type in SAMPLE else [pytest.mark.slow])


@pytest.mark.parametrize("model_type", list(types()))
def test_class_is_as_the_table_says(model_type):
    """`examine` compares with the stock model and with the float64 oracle, and raises where numbers differ."""
    found = dataclasses.asdict(every_causal_lm.examine(model_type))
    if transformers.__version__ == every_causal_lm.version():
        known = every_causal_lm.load()[found["name"]]
        judged = ("outcome", "patched", "others", "cache") if known["outcome"] != "not built" else ()
        assert {name: found[name] for name in judged} == {name: known[name] for name in judged}, found["why"]


def test_the_table_is_of_all_classes():
    """Where the versions are the same: no class may be forgotten."""
    if transformers.__version__ == every_causal_lm.version():
        names = {every_causal_lm.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type] for model_type in every_causal_lm.model_types()}
        assert names == every_causal_lm.load().keys()
    outcomes = {row["outcome"] for row in every_causal_lm.load().values()}
    assert outcomes == {"exact", "refused", "not built"}
