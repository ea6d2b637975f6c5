"""The forward where all queries see all keys, in Gluon for Hopper: Q is read and rounded by the kernel itself.

A program goes through many tiles of queries. While one is stored, the next one is loaded: with few keys, loads and stores take
most of the time. Everything else is as in forward.py.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from qat_kernels.triton.layout import PAD
from qat_kernels.triton.nvfp4 import P_GLOBAL_SCALE

from .forward import attend_halves, attend_in_halves, attend_quantized, store_statistics
from .pipeline import WARP_GROUP_ROWS, accumulator, load_step, new_barriers, new_ring
from .queries import quantize
from .softmax import no_keys_yet

_PAD = gl.constexpr(PAD)
_PLACES = gl.constexpr(2)
"""Of queries in shared memory: those of this tile, where O goes when it is done, and those of the next one."""


@gluon.jit
def _tile_of(turn, sizes, num_blocks):
    """Batch, head and block of queries of this turn of the program."""
    tile = gl.program_id(0) + turn * gl.num_programs(0)
    batch_head = tile // num_blocks
    return batch_head // sizes[0], batch_head % sizes[0], tile % num_blocks


@gluon.jit
def _turns(sizes, num_blocks):
    """How many tiles the program has."""
    return gl.cdiv(sizes[1] * num_blocks - gl.program_id(0), gl.num_programs(0))


@gluon.jit
def _store_tile(values, tile, desc, where):
    """values [64, D] to the tile in shared memory, and from there to `where` in the background."""
    tile.store(values.to(desc.dtype))
    fence_async_shared()
    tma.async_copy_shared_to_global(desc, where, tile.reshape((1, 1, WARP_GROUP_ROWS, values.shape[1])))


@gluon.jit
def _store_codes(codes, scales, pointers, first, stop):
    """Codes and scales of the 64 rows from `first` on, those before `stop`."""
    codes_ptr, scales_ptr = pointers
    rows = first + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, codes.type.layout))
    columns = gl.arange(0, codes.shape[1], gl.SliceLayout(0, codes.type.layout))
    offsets = rows.to(gl.int64)[:, None] * codes.shape[1] + columns[None, :]
    gl.store(codes_ptr + offsets, codes, mask=(rows < stop)[:, None])
    rows = first + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, scales.type.layout))
    columns = gl.arange(0, scales.shape[1], gl.SliceLayout(0, scales.type.layout))
    offsets = rows.to(gl.int64)[:, None] * scales.shape[1] + columns[None, :]
    gl.store(scales_ptr + offsets, scales, mask=(rows < stop)[:, None])


@gluon.jit
def _consumer(common, WG: gl.constexpr, WARP_GROUPS: gl.constexpr):
    """A warp group: the WG-th 64 queries of every tile of the program."""
    rings, descs, pointers, sizes, num_blocks, lse_stride, q_rows, softmax_scale_log2 = common
    q_tiles, q_full, q_empty, hp_tiles, k_ring, v_ring = rings
    out_desc, out_hp_desc = descs
    lse_ptr, stats_ptr, codes_ptr, scales_ptr = pointers
    OUT_HP: gl.constexpr = out_hp_desc is not None
    N: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    _, _, seqlen_q, seqlen_k = sizes
    steps = gl.cdiv(seqlen_k, N)
    for turn in range(_turns(sizes, num_blocks)):
        place = turn % _PLACES * WARP_GROUPS + WG
        q = q_tiles.index(place)
        mbarrier.wait(q_full.index(place), (turn // _PLACES) & 1)
        codes, scales = quantize(q, codes_ptr is not None)
        fence_async_shared()
        if codes_ptr is not None:
            batch, head, block = _tile_of(turn, sizes, num_blocks)
            first_row = (batch * sizes[0] + head) * q_rows
            first = block * (WARP_GROUPS * WARP_GROUP_ROWS) + WG * WARP_GROUP_ROWS
            _store_codes(codes, scales, (codes_ptr, scales_ptr), first_row + first, first_row + q_rows)
        # What was stored in the turn before has been read by now.
        tma.store_wait(0)
        mbarrier.arrive(q_empty.index((turn + 1) % _PLACES * WARP_GROUPS + WG), count=1, pred=turn > 0)
        out = gl.zeros((WARP_GROUP_ROWS, D), gl.float32, accumulator(D))
        out_hp = out
        row_max, row_sum = no_keys_yet(N)
        begin = turn * steps
        order = (0, begin + steps, begin + steps)
        cut = gl.where(seqlen_k % N != 0, 1, 0)
        upper = gl.zeros((WARP_GROUP_ROWS,), gl.int32, gl.SliceLayout(1, accumulator(N))) + seqlen_k
        seen = (upper, 0, 0, order, begin + cut, begin)
        if N == 128:
            # The first tile stands alone: in a loop that may have no turn, ptxas would compute what the next loop needs.
            out, out_hp, row_max, row_sum = attend_in_halves(
                out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, begin, softmax_scale_log2,
                True, True, OUT_HP, 0, None,
            )  # fmt: skip
            out, out_hp, row_max, row_sum = attend_halves(
                out, out_hp, row_max, row_sum, q, k_ring, v_ring, seen, begin + 1, begin + steps, softmax_scale_log2,
                False, True, OUT_HP, 0, None,
            )  # fmt: skip
        else:
            gl.static_assert(not OUT_HP)
            out, row_max, row_sum = attend_quantized(
                out, row_max, row_sum, q, k_ring, v_ring, seen, begin, begin + steps, softmax_scale_log2,
                False, True, 0, None,
            )  # fmt: skip
        batch, head, block = _tile_of(turn, sizes, num_blocks)
        first = block * (WARP_GROUPS * WARP_GROUP_ROWS) + WG * WARP_GROUP_ROWS
        rows = first + gl.arange(0, WARP_GROUP_ROWS, gl.SliceLayout(1, accumulator(D)))
        head_row = batch * sizes[0] + head
        inverse = store_statistics(
            row_max, row_max, row_sum, rows, seqlen_q, lse_ptr, head_row.to(gl.int64) * lse_stride, None, 0.0,
            stats_ptr, (head_row * q_rows).to(gl.int64), sizes[1] * q_rows, D,
        )  # fmt: skip
        where = [batch, head, first, 0]
        if OUT_HP:
            _store_tile(out_hp * inverse[:, None], hp_tiles.index(WG), out_hp_desc, where)
        inverse = inverse * (1.0 / P_GLOBAL_SCALE)
        _store_tile(out * inverse[:, None], q, out_desc, where)
    tma.store_wait(0)


@gluon.jit
def _producer(loads, WARP_GROUPS: gl.constexpr):
    """Copies for each tile the queries, and then K and V of each step."""
    q_desc, k_desc, v_desc, rings, sizes, num_blocks, k_rows, heads_per_key = loads
    q_tiles, q_full, q_empty, _, k_ring, v_ring = rings
    N: gl.constexpr = k_ring[0].shape[1]
    D: gl.constexpr = k_ring[0].shape[2]
    steps = gl.cdiv(sizes[3], N)
    for turn in range(_turns(sizes, num_blocks)):
        batch, head, block = _tile_of(turn, sizes, num_blocks)
        for group in gl.static_range(WARP_GROUPS):
            place = turn % _PLACES * WARP_GROUPS + group
            mbarrier.wait(q_empty.index(place), ((turn // _PLACES) & 1) ^ 1)
            mbarrier.expect(q_full.index(place), q_desc.block_type.nbytes)
            tile = q_tiles.index(place).reshape((1, 1, WARP_GROUP_ROWS, D))
            row = (block * WARP_GROUPS + group) * WARP_GROUP_ROWS
            tma.async_copy_global_to_shared(q_desc, [batch, head, row, 0], q_full.index(place), tile)
        row = (batch * (sizes[0] // heads_per_key) + head // heads_per_key) * k_rows
        for step in range(steps):
            load_step(k_desc, row + (steps - 1 - step) * N, k_ring, turn * steps + step)
            load_step(v_desc, row + (steps - 1 - step) * N, v_ring, turn * steps + step)


# Without this every length would be compiled.
@gluon.jit(
    do_not_specialize=[
        "lse_stride",
        "q_rows",
        "k_rows",
        "batch_heads",
        "num_heads",
        "heads_per_key",
        "seqlen_q",
        "seqlen_k",
        "num_blocks",
    ]
)
def dense_forward_kernel(
    q_desc, k_desc, v_desc, out_desc, out_hp_desc, pointers,
    lse_stride, q_rows, k_rows, batch_heads, num_heads, heads_per_key, seqlen_q, seqlen_k, num_blocks, softmax_scale_log2,
    WARP_GROUPS: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Programs, of which there may be any number, that share blocks of WARP_GROUPS times 64 queries.

    q, out, out_hp: Q, O and O' themselves, [batch, heads, tokens, D], in tiles of 64 queries. k, v: operands (layout.py) in tiles
    of N keys, permuted with ORDER 64. pointers: lse, stats, and codes and scales of Q; all but lse may be None, like out_hp.
    lse_stride of heads; q_rows, k_rows: rows of a head of the operands.
    """
    D: gl.constexpr = k_desc.block_shape[1]
    REGISTERS: gl.constexpr = 240 if WARP_GROUPS == 2 else 160  # of each thread that multiplies
    memory: gl.constexpr = gl.NVMMASharedLayout.get_default_for([WARP_GROUP_ROWS, D], gl.bfloat16)
    sizes = (num_heads, batch_heads, seqlen_q, seqlen_k)
    q_tiles = gl.allocate_shared_memory(gl.bfloat16, [_PLACES * WARP_GROUPS, WARP_GROUP_ROWS, D], memory)
    hp_tiles = q_tiles
    if out_hp_desc is not None:
        hp_tiles = gl.allocate_shared_memory(gl.bfloat16, [WARP_GROUPS, WARP_GROUP_ROWS, D], memory)
    q_full, q_empty = new_barriers(_PLACES * WARP_GROUPS, 1), new_barriers(_PLACES * WARP_GROUPS, 1)
    k_ring, v_ring = new_ring(k_desc, STAGES, WARP_GROUPS), new_ring(v_desc, STAGES, WARP_GROUPS)
    fence_async_shared()
    rings = (q_tiles, q_full, q_empty, hp_tiles, k_ring, v_ring)
    common = (rings, (out_desc, out_hp_desc), pointers, sizes, num_blocks, lse_stride, q_rows, softmax_scale_log2)
    loads = (q_desc, k_desc, v_desc, rings, sizes, num_blocks, k_rows, heads_per_key)
    if WARP_GROUPS == 2:
        gl.warp_specialize(
            [
                (_consumer, (common, gl.constexpr(0), WARP_GROUPS)),
                (_consumer, (common, gl.constexpr(1), WARP_GROUPS)),
                (_producer, (loads, WARP_GROUPS)),
            ],
            [4, 1],
            [REGISTERS, 24],
        )
    else:
        gl.warp_specialize(
            [
                (_consumer, (common, gl.constexpr(0), WARP_GROUPS)),
                (_consumer, (common, gl.constexpr(1), WARP_GROUPS)),
                (_consumer, (common, gl.constexpr(2), WARP_GROUPS)),
                (_producer, (loads, WARP_GROUPS)),
            ],
            [4, 4, 1],
            [REGISTERS, REGISTERS, 24],
        )
