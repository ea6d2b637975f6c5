"""Masks of autoregressive video models: causal by frames or chunks of frames, in a window, with padding; read once each."""

import gc
import weakref

import pytest
import torch
from diffusers import SkyReelsV2Transformer3DModel
from torch.overrides import TorchFunctionMode

from qat_kernels import attention
from qat_patch import calibrate, patch_model, sensitivity
from qat_patch.hosts.diffusers import masks
from support.families.diffusers_reference import oracle_in, outputs, reference
from support.families.diffusers_video_families import WAN, video
from support.families.families import lively, relative
from tests.patch.diffusers.test_diffusers_dispatch import direct, dispatch, qkv

FRAMES, BLOCK, AREA = 6, 2, 12
SEEN = torch.arange(FRAMES * AREA) // (BLOCK * AREA)


def skyreels(dtype=torch.float64, **changes):
    """Diffusion forcing by chunks of two frames, as SkyReels V2 sets it: 6 frames of 12 tokens."""
    torch.manual_seed(0)
    config = WAN | {"num_layers": 2, "num_frame_per_block": BLOCK} | changes
    return lively(SkyReelsV2Transformer3DModel(**config)).to(dtype).eval()


def inputs(dtype=torch.float64, change=None, frames=FRAMES):
    hidden = torch.randn(2, 4, frames, 8, 6, generator=torch.Generator().manual_seed(1)).to(dtype)
    if change is not None:
        hidden[:, :, change] += 1.0
    text = torch.randn(2, 9, 16, generator=torch.Generator().manual_seed(2)).to(dtype)
    timestep = (torch.arange(frames - 1, -1, -1) // 2 * 400 + 100).expand(2, -1)
    return video() | {
        "hidden_states": hidden,
        "encoder_hidden_states": text,
        "timestep": timestep,
        "enable_diffusion_forcing": True,
    }


def by_blocks(queries, keys, block, window=None):
    place = torch.arange(keys)
    last = ((torch.arange(queries) + keys - queries) // block + 1) * block - 1
    first = torch.zeros(queries) if window is None else last - window + 1
    return (place <= last[:, None]) & (place >= first[:, None])


def test_skyreels_by_chunks_of_frames_is_the_oracle(calls):
    stock = skyreels()
    model, given = skyreels(), inputs()
    handle = patch_model(model)
    with torch.no_grad():
        found = outputs(model, given)
        expected = reference(stock, list(handle.patched), given)
        assert relative(found, expected) < 1e-9
        with handle.disabled():
            assert torch.equal(outputs(model, given), outputs(stock, given))
    bounds = [call["bounds"] for call in calls if call["bounds"] is not None]
    assert len(bounds) == 2 and all(lower is bounds[0][0] for lower, _ in bounds)  # of one mask, which both blocks get
    assert bounds[0][0].unique().tolist() == [0]
    assert torch.equal(bounds[0][1][0], (SEEN.int() + 1) * BLOCK * AREA - 1)


def test_no_frame_sees_a_later_chunk():
    model = skyreels()
    patch_model(model)
    with torch.no_grad():
        before, after = (model(**inputs(change=change)).sample for change in (None, 4))
    assert torch.equal(before[:, :, :4], after[:, :, :4])
    assert not torch.equal(before[:, :, 4:], after[:, :, 4:])


PUBLISHED = {"num_attention_heads": 12, "attention_head_dim": 128, "num_layers": 1, "num_frame_per_block": 5}
"""SkyReels V2 DF 1.3B, by chunks of five frames."""


@pytest.mark.parametrize(("changes", "frames"), [({}, FRAMES), (PUBLISHED, 10)], ids=["tiny", "published"])
def test_gradients_are_the_oracles_also_with_checkpointing(changes, frames):
    model, given = skyreels(**changes).train(), inputs(frames=frames)
    given = {name: x[:1] if isinstance(x, torch.Tensor) else x for name, x in given.items()}
    handle = patch_model(model)

    def gradients(model):
        model.zero_grad()
        outputs(model, given).square().mean().backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    found = gradients(model)
    model.enable_gradient_checkpointing()
    assert torch.equal(gradients(model), found)
    stock = skyreels(**changes).train()
    with torch.no_grad(), handle.disabled():
        plain = outputs(stock, given)
        assert torch.equal(outputs(model, given), plain)
    with oracle_in(stock, list(handle.patched)):
        assert relative(found, gradients(stock)) < 1e-9
        with torch.no_grad():
            expected = outputs(stock, given)
            assert relative(outputs(model, given), expected) < 1e-9 and relative(plain, expected) > 1e-3


def test_calibration_and_sensitivity_see_the_bounds():
    model = skyreels(torch.float32)
    handle = patch_model(model)
    report = sensitivity(model, [inputs(torch.float32)])
    assert all(0 < layer.error < 0.4 for layer in report.layers)
    calibrate(model, [inputs(torch.float32)])
    assert handle.k_shift.keys() == handle.patched.keys()


@pytest.mark.parametrize(
    ("mask", "upper"),
    [
        (by_blocks(53, 53, 7), None),
        (by_blocks(40, 53, 7), None),
        (by_blocks(53, 53, 7, window=20), None),
        (by_blocks(53, 53, 1, window=5), None),
        (torch.ones(40, 53, dtype=torch.bool).tril(), 39),
        (by_blocks(53, 53, 7) & (torch.arange(53) != 30), None),
        (by_blocks(53, 53, 7) & (torch.arange(53) >= 9) & (torch.arange(53) >= 9)[:, None], None),
        (by_blocks(53, 53, 7) & (torch.arange(53) < 45) & (torch.arange(53) < 45)[:, None], 44),
    ],
    ids=["blocks", "a part of the queries", "window", "narrow window", "tril", "hole", "left padding", "right padding"],
)
@pytest.mark.parametrize("additive", [False, True])
def test_bounds_say_what_the_mask_says(mask, upper, additive):
    q, k, v = qkv(queries=mask.shape[0])
    given = mask[None, None]
    if additive:
        given = torch.zeros(given.shape).masked_fill(~given, -torch.inf)
    found = masks.read(None, given, 2, *mask.shape)
    assert upper is None or found.bounds[1].max() == upper
    place = torch.arange(53)
    shown = (place >= found.bounds[0][..., None]) & (place <= found.bounds[1][..., None])
    shown = shown if found.key_mask is None else shown & found.key_mask[:, None]
    shown = shown if found.query_mask is None else shown & found.query_mask[..., None]
    assert torch.equal(shown, mask.expand(shown.shape))
    out = dispatch(q, k, v, given)
    ours = direct(q, k, v, key_mask=found.key_mask, bounds=found.bounds)
    assert torch.equal(out[:, mask.any(1)], ours[:, mask.any(1)])
    assert not out[:, ~mask.any(1)].any()


def test_causal_blocks_are_the_kernels_own():
    q, k, v = qkv(queries=53)
    out = dispatch(q, k, v, by_blocks(53, 53, 7)[None, None])
    own = attention(*(x.transpose(1, 2) for x in (q, k, v)), causal=True, block_size=7).transpose(1, 2)
    assert torch.equal(out, own)


def test_a_mask_for_each_sample():
    """Chunks of other lengths in one batch."""
    both = torch.stack([by_blocks(53, 53, 7), by_blocks(53, 53, 11)])[:, None]
    q, k, v = qkv(queries=53)
    out = dispatch(q, k, v, both)
    for row in range(2):
        alone = dispatch(*(x[row, None] for x in (q, k, v)), both[row, None])
        assert torch.equal(out[row, None], alone)


@pytest.mark.parametrize(
    "mask",
    [
        by_blocks(53, 53, 7).flip(0),  # bounds that fall
        by_blocks(53, 53, 7) & ~((torch.arange(53)[:, None] > 30) & (torch.arange(53) == 3)),  # a hole for some queries
        (torch.arange(53)[:, None] + torch.arange(53)) % 2 == 0,
    ],
    ids=["falls", "hole", "checks"],
)
def test_what_bounds_cannot_say_is_refused(mask):
    with pytest.raises(ValueError, match=r"blocks.0.attn1.*got another mask for each query, which is not one of such bounds"):
        dispatch(*qkv(queries=53), mask[None, None])


def test_a_mask_is_read_once_and_forgotten_with_it(monkeypatch):
    reads = []
    by_values = masks._by_values
    monkeypatch.setattr(masks, "_by_values", lambda *args: reads.append(1) or by_values(*args))
    q, k, v = qkv(queries=53)
    mask = by_blocks(53, 53, 7)[None, None].clone()
    first = dispatch(q, k, v, mask)
    assert torch.equal(dispatch(q, k, v, mask), first) and len(reads) == 1
    mask.copy_(by_blocks(53, 53, 11))  # written to: read again
    assert torch.equal(dispatch(q, k, v, mask), dispatch(q, k, v, by_blocks(53, 53, 11)[None, None])) and len(reads) == 3
    with torch.inference_mode():  # nobody counts what is written to
        unknown = mask.clone()
        dispatch(q, k, v, unknown), unknown.fill_(True)
        assert torch.equal(dispatch(q, k, v, unknown), direct(q, k, v))
    padding = (torch.arange(53) <= 40).repeat(2, 4, 1, 1)  # one for each head
    dispatch(q, k, v, padding)
    gone = [weakref.ref(mask), weakref.ref(padding)]
    before = len(masks._SEEN)
    del mask, padding
    gc.collect()
    assert [ref() for ref in gone] == [None, None] and len(masks._SEEN) == before - 2


def test_what_was_read_without_gradients_serves_a_training_step():
    q, k, v = (x.requires_grad_() for x in qkv(queries=53))
    mask = by_blocks(53, 53, 7)[None, None]
    with torch.inference_mode():
        dispatch(*(x.detach() for x in (q, k, v)), mask)
    dispatch(q, k, v, mask).sum().backward()
    assert q.grad.any()


class Listens(TorchFunctionMode):
    """Hears what attention is asked, and lets it pass."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is torch.nn.functional.scaled_dot_product_attention:
            self.mask = kwargs["attn_mask"]
        return func(*args, **(kwargs or {}))


def test_code_that_listens_for_attention_gets_the_mask():
    q, k, v = qkv(queries=53)
    mask = by_blocks(53, 53, 7)[None, None]
    with Listens() as listens:
        out = dispatch(q, k, v, mask)
    assert listens.mask is mask and torch.equal(out, dispatch(q, k, v, mask))


def test_inside_a_graph_it_is_refused_by_name():
    run = torch.compile(dispatch, fullgraph=True, backend="aot_eager")
    with pytest.raises(RuntimeError, match="torch.compile cannot look for the bounds in it"):
        run(*qkv(queries=53), by_blocks(53, 53, 7)[None, None])


def test_masks_of_flex_attention_are_refused_by_name():
    from torch.nn.attention.flex_attention import create_block_mask

    block_mask = create_block_mask(lambda b, h, i, j: i >= j, None, None, 53, 53, device="cpu")
    with pytest.raises(ValueError, match=r"blocks.0.attn1\): attn_mask: .* got a BlockMask of flex attention; exclude"):
        dispatch(*qkv(queries=53), block_mask)


def test_the_oracle_notices_another_mask():
    """Without its mask the reference is another: the first test could fail."""
    stock, given = skyreels(), inputs()
    names = [f"blocks.{block}.attn1" for block in range(2)]
    with torch.no_grad(), oracle_in(stock, names):
        whole = outputs(stock, given)
        stock.register_to_config(num_frame_per_block=1)
        assert relative(outputs(stock, given), whole) > 1e-2
