"""Which kernel serves a call on Hopper: one list for forward and backward, by Triton version."""

import itertools

import torch

from qat_kernels import QuantSpec
from qat_kernels.triton import tiles

NOTHING = {"bounds": False, "softcap": False}


def served(arch=90, head_dim=128, causal=False, gluon=(3, 6), spec=None, **call):
    """The kernels of hopper/ that run."""
    options = tiles.options_of(spec or QuantSpec(), **{**NOTHING, **call})
    chosen = tiles.choose(arch, head_dim, causal, options, gluon)
    return {name for name, tile in chosen._asdict().items() if isinstance(tile, tiles.HopperTile)}


ALL = {"forward", "grad_query", "grad_key_value"}
BACKWARD = ALL - {"forward"}


def test_what_has_been_compared_on_a_gpu_runs_in_gluon():
    rotated = {"spec": QuantSpec(rotate=True), "k_shift": True}
    irregular = {"bounds": True, "irregular": True}
    for head_dim, causal in itertools.product((64, 128), (False, True)):
        shape = {"head_dim": head_dim, "causal": causal}
        for call in ({}, irregular)[: 1 + causal]:
            assert served(**shape, **call) == ALL
            assert "forward" in served(**shape, **call, with_gradient=False)
        assert served(**shape, packed=True, k_shift=head_dim == 128) == ({"forward"} if head_dim == 128 else ALL)
        assert served(**shape, packed=True) >= BACKWARD
        for call in ({}, {"packed": True}):
            assert served(**shape, **call, spec=QuantSpec(rotate=True)) == ALL
        assert served(**shape, **rotated) == served(**shape, **rotated, with_gradient=False) == {"forward"}
        for call in ({"sinks": True}, {"key_mask": True}):
            assert served(**shape, **call) == BACKWARD
    for head_dim in (64, 128):
        assert served(head_dim=head_dim, causal=True, bounds=True) == ALL
        assert served(head_dim=head_dim, causal=True, sinks=True, bounds=True) == BACKWARD
    for call in ({}, irregular):
        assert served(**{"causal": True, "bounds": True, "packed": True} | call) == ALL
    for head_dim, causal in itertools.product((40, 80, 96), (False, True)):
        assert served(head_dim=head_dim, causal=causal) == BACKWARD


def test_what_has_not_been_compared_on_a_gpu_runs_in_triton():
    for call in (
        {"head_dim": 64, "causal": True, "bounds": True, "packed": True},
        {"causal": True, "bounds": True, "key_mask": True},
        {"causal": True, "packed": True, "sinks": True},
        {"head_dim": 96, "key_mask": True},
        {"spec": QuantSpec(preset="nvfp4_qk")},
        {"head_dim": 48},
    ):
        assert served(**call) == set(), call
        shape = {"head_dim": 128, "causal": False} | {name: call[name] for name in ("head_dim", "causal") if name in call}
        rest = {name: x for name, x in call.items() if name not in shape}
        options = tiles.options_of(**{"spec": QuantSpec(), **NOTHING, **rest})
        reason = tiles.why_not_hopper("grad_query", (3, 6), *shape.values(), options)
        assert reason and ("compared" in reason or "does not compute bf16_pv" in reason)
    assert served(causal=True, packed=True, with_gradient=False, bounds=True) == set()


def test_what_hopper_does_not_compute_runs_in_triton(monkeypatch):
    monkeypatch.setattr(tiles, "is_compared", lambda *_: True)
    tiles.choose.cache_clear()
    try:
        for call in ({"softcap": True}, {"spec": QuantSpec(preset="sage3")}):
            assert served(**call) == set()
        assert served(causal=True, bounds=True) == ALL
        for call in ({"key_mask": True}, {"sinks": True}, {"head_dim": 96}, {"head_dim": 40}):
            assert served(**call) == BACKWARD
        assert served(spec=QuantSpec(rotate=True)) == ALL
        for call in ({"spec": QuantSpec(preset="nvfp4_qk")}, {"k_shift": True}):
            assert served(**call) == {"forward"}
        for head_dim in (16, 32, 192, 256):
            assert served(head_dim=head_dim) == set()
    finally:
        tiles.choose.cache_clear()


def test_few_keys_that_all_queries_see():
    for head_dim, options in itertools.product((64, 128), ((), ("out_hp",))):
        assert tiles.to_all_of(head_dim, False, options, 1024)
        assert not tiles.to_all_of(head_dim, False, options, 1025)
        assert not tiles.to_all_of(head_dim, True, options, 512)
    for options in (("packed",), ("key_mask", "out_hp"), ("bounds",), ("k_shift",), ("bf16_pv",), ("rotate",)):
        assert not tiles.to_all_of(128, False, options, 512)
    assert not tiles.to_all_of(96, False, (), 512)


def test_the_hardware_copies_bfloat16_in_rows_of_16_bytes():
    from qat_kernels.triton.forward_launch import hardware_copies
    from qat_kernels.triton.operands import Layout

    q = torch.empty(2, 9, 4, 64, dtype=torch.bfloat16)
    good = q.transpose(1, 2)
    assert hardware_copies(Layout.of(good), good.stride())
    assert hardware_copies(Layout.of(good[..., :64]), good.stride())
    for bad in (
        good.half(), good.mT.contiguous().mT, good[:, :1].expand(2, 4, 9, 64), q.new_empty(2, 4, 9, 66)[..., :64],
        q.flatten()[1:-63].view(-1, 1, 1, 64),
    ):  # fmt: skip
        assert not hardware_copies(Layout.of(bad), good.stride())
    assert not hardware_copies(Layout.of(good), good.mT.contiguous().mT.stride())


def test_q_is_rounded_by_the_forward_where_it_is_rounded_plainly():
    from qat_kernels.mask import Mask
    from qat_kernels.triton.forward_launch import rounds_plainly
    from qat_kernels.triton.problem import Problem

    def plain(scale=0.1, **spec):
        shape = torch.Size((1, 2, 9, 64))
        return rounds_plainly(Problem.of(shape, shape, None, spec=QuantSpec(**spec), mask=Mask(causal=False), scale=scale))

    assert plain()
    assert not plain(scale=-0.1) and not plain(rotate=True) and not plain(four_over_six=True)


def test_other_gpus_and_other_tritons_run_in_triton():
    for arch in (80, 89, 100, 120):
        assert served(arch) == set()
    for version in ((3, 7), (3, 8), (3, 9), (3, 10), None):
        assert served(gluon=version) == set()


def test_tiles_of_the_forward_depend_on_what_it_computes(monkeypatch):
    monkeypatch.setattr(tiles, "is_compared", lambda *_: True)
    tiles.choose.cache_clear()
    try:
        plain, causal = (tiles.choose(90, 128, causal, (), (3, 6)).forward for causal in (False, True))
        with_out_hp = tiles.choose(90, 128, False, ("out_hp",), (3, 6)).forward
    finally:
        tiles.choose.cache_clear()
    assert (plain, causal, with_out_hp) == ((3, 128, 2), (3, 64, 4), (2, 128, 2))
