"""Rows of the packed cache in Triton: what byte_layout.py stored, as operands of the tensor cores."""

from __future__ import annotations

import triton
import triton.language as tl

from qat_kernels.triton.nvfp4 import INTERPRET

UNPACK_SCALE = tl.constexpr(2.0**-14)
"""What `unpack` returns is code * scale * UNPACK_SCALE. A code's three magnitude bits at bits 9 to 11 of a float16 are the code
times 2^-14, subnormals included, and its product with an E4M3 scale is a multiple of 2^-24: exact in float16."""

# $8: a word of eight codes, $9: the byte of their scale. Two codes at a time are brought to where a float16 has its sign and
# magnitude, in the upper byte of each half: the first codes of bytes 1 and 3 stand there, and those of bytes 0 and 2 a byte
# below. `y` has the second codes so: magnitudes from the word shifted right, signs from the word shifted left. Elements
# 2 p and 2 p + 1 of the word leave as one register cut in two.
_SCALE = "prmt.b32 m, $9, 0, 0x4400; cvt.u16.u32 h, m; cvt.rn.f16x2.e4m3x2 f, h;"
# Before sm_89: shifted to bits 7 to 13, the scale is 2^-8 times too small; the scale NaN (0x7F) carries into bit 7.
_SCALE_BEFORE_SM_89 = """
    mul.lo.u32 m, $9, 0x00010001; shl.b32 f, m, 7; mul.f16x2 f, f, c;
    add.u32 m, m, 0x00010001; and.b32 m, m, 0x00800080; mul.lo.u32 m, m, 0xF8; or.b32 f, f, m;
"""
_DECODE = """
    and.b32 m, $8, 0x8E008E00; mul.f16x2 m, m, f; mov.b32 {$4, $5}, m;
    shl.b32 m, $8, 8; and.b32 m, m, 0x8E008E00; mul.f16x2 m, m, f; mov.b32 {$0, $1}, m;
    shr.b32 y, $8, 3; shl.b32 m, $8, 7; lop3.b32 y, y, m, 0x0E0E0E0E, 0xE4;
    and.b32 m, y, 0x8E008E00; mul.f16x2 m, m, f; mov.b32 {$6, $7}, m;
    shl.b32 m, y, 8; and.b32 m, m, 0x8E008E00; mul.f16x2 m, m, f; mov.b32 {$2, $3}, m;
"""
_REGISTERS = ".reg .b32 m, y, f, c; .reg .b16 h; mov.b32 c, 0x5C005C00;"
_ASM = tl.constexpr("{" + _REGISTERS + _SCALE + _DECODE + "}")
_ASM_BEFORE_SM_89 = tl.constexpr("{" + _REGISTERS + _SCALE_BEFORE_SM_89 + _DECODE + "}")
_CONSTRAINTS = tl.constexpr(",".join(["=&h"] * 8 + ["r", "r"]))

# The same for words of two rows, $8 and $9, with scales $10 and $11: the even elements of both lie in their lower halves, the odd
# ones in the upper. An element of both leaves as one register.
_SCALES = "prmt.b32 m, $10, $11, 0x5540; cvt.u16.u32 h, m; cvt.rn.f16x2.e4m3x2 f, h;"
_SCALES_BEFORE_SM_89 = _SCALE_BEFORE_SM_89.replace("mul.lo.u32 m, $9, 0x00010001;", "prmt.b32 m, $10, $11, 0x5410;")


def _decode_two() -> str:
    lines = ""
    for odd, halves in ((0, "0x5410"), (1, "0x7632")):
        lines += f"prmt.b32 w, $8, $9, {halves};"
        part = _DECODE.replace("$8", "w")
        for pair in range(4):
            part = part.replace(f"m, m, f; mov.b32 {{${2 * pair}, ${2 * pair + 1}}}, m;", f"out{2 * pair + odd}, m, f;")
        lines += part
    return lines.replace("out", "$")


_TWO_REGISTERS = _REGISTERS.replace(".b32 m", ".b32 w, m")
_TWO_ASM = tl.constexpr("{" + _TWO_REGISTERS + _SCALES + _decode_two() + "}")
_TWO_ASM_BEFORE_SM_89 = tl.constexpr("{" + _TWO_REGISTERS + _SCALES_BEFORE_SM_89 + _decode_two() + "}")
_TWO_CONSTRAINTS = tl.constexpr(",".join(["=&r"] * 8 + ["r", "r", "r", "r"]))


@triton.jit
def _value(word, scale, ELEMENT: tl.constexpr):
    """The float16 of an element of a word and an E4M3 byte, times UNPACK_SCALE.

    The interpreter runs this, because it rounds conversions from E4M3 wrongly.
    """
    byte = word >> (8 * (ELEMENT // 4 + 2 * (ELEMENT % 2)))
    if ELEMENT % 4 >= 2:  # the second code of the byte, brought to where the first one is
        byte = ((byte >> 3) & 0x0E) | ((byte & 1) << 7)
    code = ((byte >> 1) & 7) | ((byte >> 4) & 8)
    magnitude = ((code & 7) << 9).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    factor = (scale << 7).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32) * 256.0
    factor = tl.where(scale == 0x7F, float("nan"), factor)
    return (tl.where(code > 7, -magnitude, magnitude) * factor).to(tl.float16)


@triton.jit
def _decode(words, scale, BEFORE_SM_89: tl.constexpr, TWO: tl.constexpr = False):
    """int32 [R, C] each -> float16 [R, C, 8]: the elements of every word. TWO: a lane decodes two words at a time."""
    if INTERPRET:
        x0, x1 = _value(words, scale, 0), _value(words, scale, 1)
        x2, x3 = _value(words, scale, 2), _value(words, scale, 3)
        x4, x5 = _value(words, scale, 4), _value(words, scale, 5)
        x6, x7 = _value(words, scale, 6), _value(words, scale, 7)
    else:
        asm: tl.constexpr = _ASM_BEFORE_SM_89 if BEFORE_SM_89 else _ASM
        two: tl.constexpr = _TWO_ASM_BEFORE_SM_89 if BEFORE_SM_89 else _TWO_ASM
        x0, x1, x2, x3, x4, x5, x6, x7 = tl.inline_asm_elementwise(
            two if TWO else asm, _TWO_CONSTRAINTS if TWO else _CONSTRAINTS, [words, scale], is_pure=True, pack=2 if TWO else 1,
            dtype=(tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16, tl.int16),
        )  # fmt: skip
    odd = tl.join(tl.join(x1, x5), tl.join(x3, x7))
    even = tl.join(tl.join(x0, x4), tl.join(x2, x6))
    x = tl.reshape(tl.join(even, odd), (words.shape[0], words.shape[1], 8))
    return x if INTERPRET else x.to(tl.float16, bitcast=True)


@triton.jit
def _scale_of_words(scales, COUNT: tl.constexpr):
    """E4M3 bytes [R, 2 I] -> int32 [R, 4 I]."""
    scales = tl.reshape(scales.to(tl.int32), (scales.shape[0], 2, 1, COUNT))
    return tl.reshape(tl.broadcast_to(scales, (scales.shape[0], 2, 2, COUNT)), (scales.shape[0], 4 * COUNT))


@triton.jit
def unpack(words, scales, BEFORE_SM_89: tl.constexpr):
    """Rows of the cache, int32 [R, 4 I] and E4M3 bytes [R, 2 I] -> float16 [R, 32 I], times UNPACK_SCALE.

    The lane that loads a word is the one that feeds its elements to the tensor cores: no data moves between lanes.
    """
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1] // 4
    x = tl.reshape(_decode(words, _scale_of_words(scales, count), BEFORE_SM_89), (rows, 4, count, 8))
    return tl.reshape(tl.permute(x, (0, 2, 1, 3)), (rows, 32 * count))


@triton.jit
def unpack_tokens(words, scales, BEFORE_SM_89: tl.constexpr):
    """Rows of the cache -> float16 [32 I, R], times UNPACK_SCALE, for a product over the rows; `token_columns` has their order.

    Such a product takes an element of two rows in one register. In that order a lane decodes the words of two rows together. If a
    warp takes eight words of a row, no data moves between lanes here either.
    """
    rows: tl.constexpr = words.shape[0]
    count: tl.constexpr = words.shape[1] // 4
    x = _decode(words, _scale_of_words(scales, count), BEFORE_SM_89, True)
    return tl.trans(tl.reshape(tl.permute(x, (0, 2, 1)), (rows, 32 * count)))


@triton.jit
def token_columns(BLOCK_WORDS: tl.constexpr):
    """Which element of a row each column of `unpack_tokens` is: the first of every word, then the second, and so on."""
    column = tl.arange(0, 32 * BLOCK_WORDS)
    word = column % (4 * BLOCK_WORDS)
    return word % BLOCK_WORDS * 32 + word // BLOCK_WORDS * 8 + column // (4 * BLOCK_WORDS)


@triton.jit
def load_rows(codes_ptr, scales_ptr, rows, present, WORDS: tl.constexpr, BLOCK_WORDS: tl.constexpr):
    """Words and scales of rows in memory, with zeros up to 32 BLOCK_WORDS elements. Rows that are not `present` are zeros
    (None: all are present)."""
    word, group = tl.arange(0, 4 * BLOCK_WORDS), tl.arange(0, 2 * BLOCK_WORDS)
    word_mask = rows[:, None] >= 0
    group_mask = word_mask
    if WORDS != BLOCK_WORDS:
        word_mask = word_mask & ((word % BLOCK_WORDS) < WORDS)[None, :]
        group_mask = group_mask & ((group % BLOCK_WORDS) < WORDS)[None, :]
        word = word // BLOCK_WORDS * WORDS + word % BLOCK_WORDS
        group = group // BLOCK_WORDS * WORDS + group % BLOCK_WORDS
    word_ptrs = codes_ptr.to(tl.pointer_type(tl.int32)) + rows[:, None] * (4 * WORDS) + word[None, :]
    group_ptrs = scales_ptr + rows[:, None] * (2 * WORDS) + group[None, :]
    if present is not None:
        words = tl.load(word_ptrs, mask=word_mask & present[:, None], other=0)
        scales = tl.load(group_ptrs, mask=group_mask & present[:, None], other=0)
    elif WORDS != BLOCK_WORDS:
        words = tl.load(word_ptrs, mask=word_mask, other=0)
        scales = tl.load(group_ptrs, mask=group_mask, other=0)
    else:
        words = tl.load(word_ptrs)
        scales = tl.load(group_ptrs)
    return words, scales
