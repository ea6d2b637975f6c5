"""Every transformer class of the installed Diffusers: the stock model, the oracle, or a refusal (docs/MODELS.md).

All of them run with -m slow; those in the sample always.
"""

import dataclasses

import diffusers
import pytest

from support.families import every_transformer

SAMPLE = (
    "AnyFlowFARTransformer3DModel",
    "Cosmos3OmniTransformer",
    "CosmosTransformer3DModel",
    "Flux3Transformer2DModel",
    "HunyuanVideoFramepackTransformer3DModel",
    "MiniMaxH3Transformer3DModel",
    "WanAnimate2Transformer3DModel",
    "WanAnimateTransformer3DModel",
    "WanTransformer3DModel (Wan 2.1 FLF2V)",
)


def classes():
    for name in every_transformer.names():
        yield pytest.param(name, marks=[] if name in SAMPLE else [pytest.mark.slow])


@pytest.mark.parametrize("name", list(classes()))
def test_class_is_as_the_table_says(name):
    """`examine` compares with the stock model and with the float64 oracle, and raises where numbers differ."""
    found = dataclasses.asdict(every_transformer.examine(name))
    if diffusers.__version__ == every_transformer.version():
        assert found == every_transformer.load()[name]


def test_the_table_is_of_all_classes():
    """Where the versions are the same: no class may be forgotten."""
    rows = every_transformer.load()
    if diffusers.__version__ == every_transformer.version():
        assert set(every_transformer.names()) == rows.keys()
    assert {row["outcome"] for row in rows.values()} == {"exact", "partly", "refused", "not examined"}
