"""Behind diffusers' attention dispatcher: what becomes of its masks and other arguments, and which are refused."""

import inspect
import itertools

import pytest
import torch
from diffusers import HunyuanVideoTransformer3DModel
from diffusers.models.attention_dispatch import AttentionBackendName, dispatch_attention_fn
from diffusers.models.transformers import transformer_wan

from qat_kernels import attention
from qat_patch import patch_model
from qat_patch.hosts.diffusers import adapter as diffusers_adapter
from qat_patch.layer import AttentionLayer
from support.models.lively_wan import SPECS, sdpa, tiny_wan

pytestmark = pytest.mark.usefixtures("default_backend_stays")


def qkv(batch=2, queries=40, keys=53, heads=4, key_heads=4, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = [(batch, queries, heads, 32), (batch, keys, key_heads, 32), (batch, keys, key_heads, 32)]
    return [torch.randn(shape, generator=generator) for shape in shapes]


def dispatch(q, k, v, mask=None, spec=SPECS[0], k_shift=None, q_shift=None, **kwargs):
    layer = AttentionLayer(name="blocks.0.attn1", spec=spec, original=None, k_shift=k_shift, q_shift=q_shift)
    return diffusers_adapter._knowing_layers(dispatch_attention_fn)(q, k, v, mask, backend=layer, **kwargs)


def direct(q, k, v, **kwargs):
    return attention(*(x.transpose(1, 2) for x in (q, k, v)), **kwargs).transpose(1, 2)


@pytest.mark.parametrize("shape", [(2, 53), (1, 53), (2, 1, 1, 53), (1, 1, 1, 53), (2, 4, 1, 53)])
@pytest.mark.parametrize("excluded", [False, -10000.0, -torch.inf])
def test_key_mask(shape, excluded):
    q, k, v = qkv()
    allowed = torch.rand(shape[0], 53, generator=torch.Generator().manual_seed(1)) < 0.7
    mask = allowed.view(shape[0], *[1] * (len(shape) - 2), 53).expand(shape).contiguous()
    if excluded is not False:
        mask = torch.zeros(shape, dtype=torch.bfloat16).masked_fill(~mask, excluded)
    out = dispatch(q, k, v, mask)
    assert torch.equal(out, direct(q, k, v, key_mask=allowed.expand(2, 53)))
    assert not torch.equal(out, dispatch(q, k, v))
    k[~allowed.expand(2, 53)] = torch.nan
    assert torch.equal(dispatch(q, k, v, mask), out)


def test_outer_product_of_what_is_no_padding():
    """As HunyuanVideo 1.5 masks: padding sees nothing and is not seen."""
    q, k, v = qkv(queries=53)
    allowed = torch.rand(2, 53, generator=torch.Generator().manual_seed(1)) < 0.7
    outer = (allowed[:, :, None] & allowed[:, None])[:, None]
    out = dispatch(q, k, v, outer)
    assert torch.equal(out[allowed], direct(q, k, v, key_mask=allowed)[allowed])
    assert not out[~allowed].any()


def test_masks_are_checked_inside_a_graph():
    run = torch.compile(dispatch, fullgraph=True, backend="aot_eager")
    q, k, v = qkv()
    mask = torch.zeros(2, 1, 1, 53).masked_fill(torch.arange(53) > 40, -10000.0)
    assert torch.equal(run(q, k, v, mask), dispatch(q, k, v, mask))
    with pytest.raises(RuntimeError, match="expected a key mask, got an additive mask with other values"):
        run(q, k, v, mask / 100)


def test_causal_scale_groups_of_heads_and_contiguity():
    q, k, v = qkv(keys=40, key_heads=2)
    out = dispatch(q, k, v, enable_gqa=True, is_causal=True, scale=0.3)
    assert torch.equal(out, direct(q, k, v, causal=True, scale=0.3))
    assert out.is_contiguous()
    q, k, v = qkv()
    fused = torch.cat([k, v], dim=2).chunk(2, dim=2)  # as fuse_qkv_projections leaves them
    assert not fused[0].is_contiguous()
    assert torch.equal(dispatch(q, *fused), dispatch(q, k, v))


def test_autocast_casts_what_arrives_in_other_dtypes():
    q, k, v = qkv()
    with torch.autocast("cpu", torch.bfloat16):
        out = dispatch(q, k, v.bfloat16())
    assert out.dtype == torch.bfloat16
    assert torch.equal(out, direct(q.bfloat16(), k.bfloat16(), v.bfloat16()))


@pytest.mark.parametrize(
    ("mask", "kwargs", "message"),
    [
        (None, {"dropout_p": 0.1}, "dropout_p: expected 0, got 0.1"),
        (None, {"is_causal": True}, "as many queries as keys, got 40 queries and 53 keys"),
        (None, {"attention_kwargs": {"return_lse": True}}, "return_lse"),
        (
            torch.full((2, 1, 1, 53), -1.0),
            {},
            r"a key mask \[2, 1, 1, 53\] or \[2, 53\].* got an additive mask with other",
        ),
        (torch.eye(4, 53, dtype=torch.bool).expand(2, 1, 4, 53).mT.mT.transpose(1, 2), {}, "got another mask for each head"),
        (torch.ones(2, 1, 40, 53, dtype=torch.bool).tril().flip(2), {}, "got another mask for each query"),
        (torch.ones(2, 1, 39, 53, dtype=torch.bool), {}, r"got torch.bool \(2, 1, 39, 53\)"),
        (torch.ones(40, 53, dtype=torch.bool), {}, r"got torch.bool \(40, 53\)"),
    ],
)
def test_refused_arguments(mask, kwargs, message):
    with pytest.raises(ValueError, match=message):
        dispatch(*qkv(), mask, **kwargs)


def test_every_argument_of_the_dispatcher_is_declared():
    ours = inspect.signature(diffusers_adapter._knowing_layers(dispatch_attention_fn), follow_wrapped=False).parameters
    assert list(ours) == list(inspect.signature(dispatch_attention_fn).parameters)


def test_calls_without_a_layer_go_to_the_stock_dispatcher():
    wrapped = diffusers_adapter._knowing_layers(dispatch_attention_fn)
    q, k, v = qkv()
    mask = torch.ones(2, 1, 1, 53, dtype=torch.bool)
    for backend in (None, "native", AttentionBackendName._NATIVE_MATH):
        stock = dispatch_attention_fn(q, k, v, mask, scale=0.3, backend=backend)
        assert torch.equal(wrapped(q, k, v, mask, scale=0.3, backend=backend), stock)
    patch_model(tiny_wan())
    first = vars(transformer_wan)["dispatch_attention_fn"]
    patch_model(tiny_wan())
    assert vars(transformer_wan)["dispatch_attention_fn"] is first  # wrapped once


@pytest.mark.parametrize("which", [("k_shift",), ("q_shift",), ("k_shift", "q_shift")])
def test_each_spec_and_shift_reaches_attention(which):
    generator = torch.Generator().manual_seed(3)
    shifts = {each: torch.randn(4, 32, generator=generator) for each in which}
    outputs = []
    for spec in SPECS:
        outputs.append(dispatch(*qkv(), spec=spec, **shifts))
        assert torch.equal(outputs[-1], direct(*qkv(), spec=spec, **shifts))
        assert not torch.equal(outputs[-1], direct(*qkv(), spec=spec))
    assert not any(torch.equal(a, b) for a, b in itertools.combinations(outputs, 2))


def tiny_hunyuan():
    torch.manual_seed(0)
    return HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        patch_size_t=1,
        text_embed_dim=16,
        pooled_projection_dim=8,
        rope_axes_dim=(4, 6, 6),
    ).eval()


def test_another_model_of_the_dispatcher_with_key_masks(calls, monkeypatch):
    model = tiny_hunyuan()
    inputs = {
        "hidden_states": torch.randn(1, 4, 2, 4, 4),
        "timestep": torch.tensor([500]),
        "encoder_hidden_states": torch.randn(1, 9, 16),
        "pooled_projections": torch.randn(1, 8),
        "encoder_attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0, 0, 0]]),
        "guidance": torch.tensor([6.0]),
    }
    with torch.no_grad():
        before = model(**inputs).sample
        handle = patch_model(model)
        assert not torch.equal(model(**inputs).sample, before)
        monkeypatch.setattr(diffusers_adapter, "attention", sdpa)
        assert torch.equal(model(**inputs).sample, before)
    assert len(handle.patched) == len(calls) == 2
    assert all(call["key_mask"].sum() == 32 + 6 for call in calls)
    assert len(handle.skipped) == 1
    assert "does not go through diffusers' attention dispatcher" in next(iter(handle.skipped.values()))
