"""The inline assembly of `unpack`, which no interpreter of Triton runs: instruction by instruction, for every code and scale."""

import re

import numpy as np
import pytest
import torch

from qat_kernels.decode import unpack
from qat_kernels.decode.byte_layout import unpack_rows

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])


def halves(x: np.ndarray) -> np.ndarray:
    return x.astype(np.uint32)[:, None].view(np.float16)


def whole(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, np.float16).view(np.uint32)[:, 0].astype(np.uint64)


def choose(a: np.ndarray, b: np.ndarray, c: np.ndarray, table: np.ndarray) -> np.ndarray:
    """lop3: bit 4 a + 2 b + c of the table."""
    terms = [(a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c) for i in range(8) if int(table[0]) >> i & 1]
    return np.bitwise_or.reduce(terms)


def permute(a: np.ndarray, b: np.ndarray, selector: np.ndarray) -> np.ndarray:
    both = a | b << np.uint64(32)
    picked = [both >> np.uint64(8 * (int(selector[0]) >> 4 * i & 7)) & np.uint64(255) for i in range(4)]
    return sum(x << np.uint64(8 * i) for i, x in enumerate(picked))


def convert(pair: np.ndarray) -> np.ndarray:
    values = torch.from_numpy(pair.astype(np.uint16)[:, None].view(np.uint8)).view(torch.float8_e4m3fn)
    return whole(values.to(torch.float16).numpy())


INSTRUCTIONS = {
    "and.b32": np.bitwise_and,
    "or.b32": np.bitwise_or,
    "shl.b32": np.left_shift,
    "shr.b32": np.right_shift,
    "add.u32": np.add,
    "mul.lo.u32": np.multiply,
    "mul.f16x2": lambda a, b: whole(halves(a) * halves(b)),
    "lop3.b32": choose,
    "prmt.b32": permute,
    "cvt.u16.u32": lambda a: a & np.uint64(0xFFFF),
    "cvt.rn.f16x2.e4m3x2": convert,
    "mov.b32": lambda a: a,
}
"""PTX ISA, by name: uint64 arrays of register contents, of which 32 bits are kept."""


def run(assembly: str, inputs: list[np.ndarray]) -> list[np.ndarray]:
    """The eight outputs; the inputs are $8 and on."""
    registers = {f"${8 + i}": x.astype(np.uint64) for i, x in enumerate(inputs)}
    for line in assembly.strip("{}").split(";"):
        name, _, operands = line.strip().partition(" ")
        if not name or name == ".reg":
            continue
        target, *sources = re.findall(r"\{[^}]*\}|[^\s,]+", operands)
        values = [registers[x] if x in registers else np.full(len(inputs[0]), int(x, 0), np.uint64) for x in sources]
        value = INSTRUCTIONS[name](*values) & np.uint64(0xFFFFFFFF)
        if target.startswith("{"):
            low, high = target.strip("{}").split(", ")
            registers |= {low: value & np.uint64(0xFFFF), high: value >> np.uint64(16)}
        else:
            registers[target] = value
    return [registers[f"${i}"] for i in range(8)]


def expected(words: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """float16 [N, 8], by byte_layout.py: the words as the first lane's of rows of 32 elements."""
    rows = torch.zeros(len(words), 16, dtype=torch.uint8)
    rows[:, :4] = torch.from_numpy(words.astype(np.uint32)[:, None].view(np.uint8))
    codes, _ = unpack_rows(rows, torch.zeros(len(words), 2, dtype=torch.uint8), 8)
    factors = torch.from_numpy(scales.astype(np.uint8)).view(torch.float8_e4m3fn).float()
    return (E2M1[codes.long()] * factors[:, None] * unpack.UNPACK_SCALE.value).half().numpy()


@pytest.mark.parametrize("before_sm_89", [False, True])
def test_every_code_and_scale_is_decoded(before_sm_89):
    generator = np.random.default_rng(0)
    scales = np.tile(np.arange(128), 512)  # 0x7F is NaN
    words, others = (generator.integers(0, 2**32, len(scales)) for _ in range(2))
    other_scales = generator.permutation(scales)
    with np.errstate(invalid="ignore"):
        one = run((unpack._ASM_BEFORE_SM_89 if before_sm_89 else unpack._ASM).value, [words, scales])
        two = unpack._TWO_ASM_BEFORE_SM_89 if before_sm_89 else unpack._TWO_ASM
        both = run(two.value, [words, others, scales, other_scales])
    wanted = expected(words, scales)
    np.testing.assert_array_equal(np.stack(one, 1).astype(np.uint16).view(np.float16), wanted)
    np.testing.assert_array_equal(np.stack([halves(x)[:, 0] for x in both], 1), wanted)
    np.testing.assert_array_equal(np.stack([halves(x)[:, 1] for x in both], 1), expected(others, other_scales))
