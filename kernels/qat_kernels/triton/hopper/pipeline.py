"""What the Hopper kernels share, in Gluon: tiles that one warp copies while warp groups multiply, and layouts.

A **ring** has STAGES places for tiles. Step i of a kernel uses place i % STAGES. A place has two barriers: its tile has arrived
(full), and every warp group is done with it (empty).
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

WARP_GROUP_ROWS = gl.constexpr(64)
"""Rows of a tile that one warp group holds: those of one wgmma instruction."""
MULTIPROCESSORS = 132
"""Of an H100 or H200."""
_HEADS = gl.constexpr(16)
"""Heads whose blocks take turns."""


@gluon.jit
def place(num_blocks, LONGEST_FIRST: gl.constexpr):
    """The head, counted through all sequences, and the block of this program.

    Without LONGEST_FIRST the blocks of a head follow one another, and then those of the next head. With it those of some heads
    take turns, the first blocks first: at the end of the kernel only short ones are left, and the last multiprocessors end at
    about the same time. Not those of all heads: what they read together has to fit the cache.
    """
    program = gl.program_id(0)
    if not LONGEST_FIRST:
        return program // num_blocks, program % num_blocks
    turn = _HEADS * num_blocks
    first, place_in_turn = program // turn * _HEADS, program % turn
    heads = gl.minimum(gl.num_programs(0) // num_blocks - first, _HEADS)
    return first + place_in_turn % heads, place_in_turn // heads


@gluon.constexpr_function
def accumulator(columns):
    """The layout of an accumulator [64, columns] of one warp group."""
    return gl.NVMMADistributedLayout(version=[3, 0], warps_per_cta=[4, 1], instr_shape=[16, columns, 16])


@gluon.jit
def left_operand(tile, D: gl.constexpr):
    """A tile [64, k] as the first operand of a product with D columns. No value leaves its register."""
    layout: gl.constexpr = gl.DotOperandLayout(0, accumulator(D), 2)
    return gl.convert_layout(tile, layout, assert_trivial=True)


@gluon.jit
def new_barriers(COUNT: gl.constexpr, ARRIVALS: gl.constexpr):
    """COUNT barriers that open after this many arrivals. `fence_async_shared` must follow the last ones."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(COUNT):
        mbarrier.init(barriers.index(i), count=ARRIVALS)
    return barriers


@gluon.jit
def new_ring(desc, STAGES: gl.constexpr, WARP_GROUPS: gl.constexpr):
    """A ring of tiles of a descriptor: the tiles [STAGES, rows, columns], and the barriers full and empty.

    Each has memory of its own: in shared memory that is one, Triton would put barriers between accesses to different places.
    """
    shape: gl.constexpr = [STAGES, desc.block_shape[0], desc.block_shape[1]]
    tiles = gl.allocate_shared_memory(desc.dtype, shape, desc.layout)
    return tiles, new_barriers(STAGES, 1), new_barriers(STAGES, WARP_GROUPS)


@gluon.jit
def tile_at(ring, step):
    """The tile of this step."""
    STAGES: gl.constexpr = ring[0].shape[0]
    return ring[0].index(step % STAGES)


@gluon.jit
def wait_full(ring, step, pred=True):
    """Until the tile of this step has arrived."""
    STAGES: gl.constexpr = ring[0].shape[0]
    mbarrier.wait(ring[1].index(step % STAGES), (step // STAGES) & 1, pred=pred)


@gluon.jit
def release(ring, step):
    """This warp group is done with the tile of this step."""
    STAGES: gl.constexpr = ring[0].shape[0]
    mbarrier.arrive(ring[2].index(step % STAGES), count=1)


@gluon.jit
def skip(k_ring, v_ring, step):
    """A step whose tiles this warp group does not need."""
    wait_full(k_ring, step)
    release(k_ring, step)
    wait_full(v_ring, step)
    release(v_ring, step)


@gluon.jit
def load_step(desc, row, ring, step):
    """Copies the tile from `row` on into the place of this step, when all warp groups are done with what was there."""
    tiles, full, empty = ring
    STAGES: gl.constexpr = tiles.shape[0]
    place = step % STAGES
    mbarrier.wait(empty.index(place), ((step // STAGES) & 1) ^ 1)
    load(desc, row, tiles.index(place), full.index(place))


@gluon.jit
def load(desc, row, tile, full):
    """Copies the tile from `row` on; `full` opens when it is there."""
    mbarrier.expect(full, desc.block_type.nbytes)
    tma.async_copy_global_to_shared(desc, [row, 0], full, tile)
