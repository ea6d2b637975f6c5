"""AttnQATConfig: JSON round trip, strict keys, patterns."""

import dataclasses
import json

import pytest

from qat_patch import AttnQATConfig, QuantSpec


def test_json_round_trip():
    config = AttnQATConfig(spec=QuantSpec(pv="bf16", rotate=True, four_over_six=True), include=["*.attn1"], exclude=("a", "b"))
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
        ({"exclud": []}, "unknown key 'exclud'; expected one of spec, include, exclude; did you mean 'exclude'"),
        ({"spec": {"rotat": True}}, "unknown key 'rotat'.*did you mean 'rotate'"),
        ({"spec": {"pv": "fp4"}}, "QuantSpec.pv: expected one of nvfp4, bf16, got 'fp4'"),
        ({"spec": {"rotate": 1}}, "QuantSpec.rotate: expected True or False, got 1"),
        ({"spec": "nvfp4"}, "spec: expected a QuantSpec, got 'nvfp4'"),
        ({"include": "*.attn1"}, "include: expected a sequence of module name patterns"),
        ({"exclude": [1]}, "exclude: expected a sequence of module name patterns"),
        ([], "expected a mapping"),
    ],
)
def test_bad_values(values, message):
    with pytest.raises(ValueError, match=message):
        AttnQATConfig.from_dict(values)


def test_patterns():
    config = AttnQATConfig(include=["blocks.*"], exclude=["*.0.*"])
    assert config.reason_to_skip("blocks.1.attn1") is None
    assert config.reason_to_skip("blocks.0.attn1") == "excluded by '*.0.*'"
    assert config.reason_to_skip("head.attn") == "matches no include pattern"
    config.check_patterns(["blocks.0.attn1"])
    with pytest.raises(ValueError, match=r"exclude: the pattern '\*.0.\*' matches no attention module; there are blocks.1"):
        config.check_patterns(["blocks.1.attn1"])
