"""AttnQATConfig: JSON round trip, strict keys, patterns."""

import dataclasses
import json

import pytest

from qat_patch import AttnQATConfig, QuantSpec, patch_model
from support.models.tiny_qwen3 import tiny_qwen3


def test_json_round_trip():
    config = AttnQATConfig(
        spec=QuantSpec(preset="nvfp4_qk", rotate=True, four_over_six=True), include=["*.attn1"], exclude=("a", "b")
    )
    config = dataclasses.replace(config, overrides={"c": QuantSpec(rotate=True)}, exclude_first_blocks=1, exclude_last_blocks=2)
    assert AttnQATConfig.from_json(config.to_json()) == config
    assert AttnQATConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert AttnQATConfig.from_dict({}) == AttnQATConfig()


def test_frozen_and_keyword_only():
    with pytest.raises(dataclasses.FrozenInstanceError):
        AttnQATConfig().spec = QuantSpec(rotate=True)
    with pytest.raises(TypeError):
        AttnQATConfig(QuantSpec())


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"exclud": []}, "unknown key 'exclud'; expected one of spec, overrides, include, .*; did you mean 'exclude'"),
        ({"spec": {"rotat": True}}, "unknown key 'rotat'.*did you mean 'rotate'"),
        ({"spec": {"preset": "fp4"}}, "QuantSpec.preset: expected one of nvfp4, nvfp4_qk, .*, got 'fp4'"),
        ({"spec": {"rotate": 1}}, "QuantSpec.rotate: expected True or False, got 1"),
        ({"spec": "nvfp4"}, "spec: expected a QuantSpec, got 'nvfp4'"),
        ({"include": "*.attn1"}, "include: expected a sequence of module name patterns"),
        ({"exclude": [1]}, "exclude: expected a sequence of module name patterns"),
        ({"overrides": {"a": "nvfp4"}}, "overrides: expected a mapping of patterns to QuantSpecs"),
        ({"overrides": {"a": {"rotat": True}}}, r"overrides\['a'\]: unknown key 'rotat'"),
        ({"exclude_first_blocks": -1}, "exclude_first_blocks: expected a number of blocks from 0 up, got -1"),
        ({"exclude_last_blocks": True}, "exclude_last_blocks: expected a number of blocks from 0 up, got True"),
        ([], "expected a mapping"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        AttnQATConfig.from_dict(values)


def test_patterns():
    config = AttnQATConfig(include=["blocks.*"], exclude=["*.0.*"])
    reasons = config.reasons_to_skip(["blocks.0.attn1", "blocks.1.attn1", "head.attn"])
    assert reasons == {"blocks.0.attn1": "excluded by '*.0.*'", "head.attn": "matches no include pattern"}
    config.check_patterns(["blocks.0.attn1"])
    with pytest.raises(ValueError, match=r"exclude: the pattern '\*.0.\*' matches no attention module; there are blocks.1"):
        config.check_patterns(["blocks.1.attn1"])


def test_first_and_last_blocks():
    names = [f"transformer_blocks.{i}.attn{n}" for i in range(3) for n in (1, 2)] + ["refiner.attn", "single_blocks.0.attn"]
    reasons = AttnQATConfig(exclude_first_blocks=2, exclude_last_blocks=1).reasons_to_skip(names)
    assert list(reasons) == [*names[:4], "single_blocks.0.attn"]
    assert reasons[names[3]] == "in one of the first 2 blocks"
    assert reasons["single_blocks.0.attn"] == "in one of the last 1 blocks"
    assert AttnQATConfig().reasons_to_skip(names) == {}
    with pytest.raises(ValueError, match="expected attention modules in numbered blocks; there are refiner.attn"):
        AttnQATConfig(exclude_last_blocks=1).check_patterns(["refiner.attn"])


def test_overrides():
    rotate, bf16 = QuantSpec(rotate=True), QuantSpec(preset="nvfp4_qk")
    config = AttnQATConfig(overrides={"*.attn2": rotate, "blocks.0.*": bf16})
    specs = [config.spec_of(name) for name in ("blocks.0.attn2", "blocks.0.attn1", "blocks.1.attn1")]
    assert specs == [rotate, bf16, QuantSpec()]
    config.check_overrides(["blocks.0.attn2", "blocks.0.attn1"])
    with pytest.raises(ValueError, match=r"'blocks.0.\*' applies to no patched module"):
        config.check_overrides(["blocks.0.attn2", "blocks.1.attn1"])
    with pytest.raises(ValueError, match="overrides: the pattern 'blocks.0.*' matches no attention module"):
        config.check_patterns(["blocks.1.attn2"])


@pytest.mark.parametrize("config", [QuantSpec(preset="kv_nvfp4"), "kv_nvfp4", {"spec": {}}], ids=str)
def test_what_is_not_a_config_is_refused(config):
    with pytest.raises(ValueError, match=r"patch_model: config: expected an AttnQATConfig, got .*; for a preset"):
        patch_model(tiny_qwen3(), config)


def test_where_nothing_is_left_no_exclusion_is_advised():
    with pytest.raises(ValueError, match="causal with preset='sage3' is True.*; no other is left$"):
        patch_model(tiny_qwen3(), AttnQATConfig(spec=QuantSpec(preset="sage3")))
