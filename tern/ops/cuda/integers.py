"""Tiles of whole numbers of 4 and 8 bits, from words of `tern.ops.gpu_weights.RowPackedWeight` to floats.

Knows the order in words and how bits become floats; knows no products. The order is that of the tensor cores' operands:
what a thread loads is what it multiplies, so that nothing moves between threads.

bfloat16 is made two numbers at a time: seven bits under the exponent of 128 are 128 and themselves, from which one
fused step gets the number times its factor, exactly. Other types, and the interpreter, take the plain way.
"""

from __future__ import annotations

from tern.ops.cuda.launch import tl, triton

# In: a word of four factors. Out: for each, twice the factor as bfloat16, and twice -136 times it.
_FACTORS = tl.constexpr("""{
.reg .b32 w, m, c, z, one;
mov.b32 m, 0x43434343;
mov.b32 c, 0xC340C340;
mov.b32 z, 0;
mov.b32 one, 0x3F803F80;
and.b32 w, $8, 0x7F7F7F7F;
xor.b32 w, w, 0x40404040;
prmt.b32 $0, w, m, 0x4040;
prmt.b32 $1, w, m, 0x4141;
prmt.b32 $2, w, m, 0x4242;
prmt.b32 $3, w, m, 0x4343;
fma.rn.bf16x2 $0, $0, one, c;
fma.rn.bf16x2 $1, $1, one, c;
fma.rn.bf16x2 $2, $2, one, c;
fma.rn.bf16x2 $3, $3, one, c;
mov.b32 c, 0xC308C308;
fma.rn.bf16x2 $4, $0, c, z;
fma.rn.bf16x2 $5, $1, c, z;
fma.rn.bf16x2 $6, $2, c, z;
fma.rn.bf16x2 $7, $3, c, z;
}""")
_FACTORS_REGISTERS = tl.constexpr("=&r,=&r,=&r,=&r,=&r,=&r,=&r,=&r,r")

# In: a word, and what comes of its factors. Out: factor * q of nibbles 0 and 4, 1 and 5, 2 and 6, 3 and 7.
_NIBBLES = tl.constexpr("""{
.reg .b32 a, b, c, d;
shr.u32 b, $8, 4;
shr.u32 c, $8, 8;
shr.u32 d, $8, 12;
lop3.b32 a, $8, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 b, b, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 c, c, 0x000F000F, 0x43004300, 0xEA;
lop3.b32 d, d, 0x000F000F, 0x43004300, 0xEA;
fma.rn.bf16x2 a, a, $9, $13;
fma.rn.bf16x2 b, b, $10, $14;
fma.rn.bf16x2 c, c, $11, $15;
fma.rn.bf16x2 d, d, $12, $16;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
mov.b32 {$4, $5}, c;
mov.b32 {$6, $7}, d;
}""")
_NIBBLES_REGISTERS = tl.constexpr("=&h,=&h,=&h,=&h,=&h,=&h,=&h,=&h,r,r,r,r,r,r,r,r,r")

# In: a word. Out: bytes 0 and 2, 1 and 3. A byte is its seven low bits, less 128 if its sign is set.
_BYTES = tl.constexpr("""{
.reg .b32 a, b, c, d, one;
mov.b32 one, 0x3F803F80;
shr.u32 b, $4, 8;
lop3.b32 a, $4, 0x007F007F, 0x43004300, 0xEA;
lop3.b32 c, $4, 0x00800080, 0xC300C300, 0xEA;
lop3.b32 d, b, 0x00800080, 0xC300C300, 0xEA;
lop3.b32 b, b, 0x007F007F, 0x43004300, 0xEA;
fma.rn.bf16x2 a, a, one, c;
fma.rn.bf16x2 b, b, one, d;
mov.b32 {$0, $1}, a;
mov.b32 {$2, $3}, b;
}""")
_BYTES_REGISTERS = tl.constexpr("=&h,=&h,=&h,=&h,r")


@triton.jit
def nibbles(words, factors, dtype: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr):
    """factor * q [BLOCK_N, 128] of `words` [BLOCK_N, 16], whose four factors each are a word of `factors` [BLOCK_N]."""
    factors = factors[:, None]
    if dtype == tl.bfloat16 and not INTERPRETED:
        f0, f1, f2, f3, n0, n1, n2, n3 = tl.inline_asm_elementwise(
            _FACTORS, _FACTORS_REGISTERS, [factors], (tl.int32,) * 8, is_pure=True, pack=1
        )
        a0, a1, b0, b1, c0, c1, d0, d1 = tl.inline_asm_elementwise(
            _NIBBLES, _NIBBLES_REGISTERS, [words, f0, f1, f2, f3, n0, n1, n2, n3], (tl.int16,) * 8, is_pure=True, pack=1
        )
        a, b, c, d = tl.join(a0, a1), tl.join(b0, b1), tl.join(c0, c1), tl.join(d0, d1)
        pairs = tl.join(tl.join(a, b), tl.join(c, d)).to(tl.bfloat16, bitcast=True)
    else:
        a = _two_nibbles(words, factors, 0, dtype)
        b = _two_nibbles(words, factors, 1, dtype)
        c = _two_nibbles(words, factors, 2, dtype)
        d = _two_nibbles(words, factors, 3, dtype)
        pairs = tl.join(tl.join(a, b), tl.join(c, d))
    ordered = tl.permute(tl.reshape(pairs, (BLOCK_N, 4, 2, 2, 2, 2, 2)), (0, 6, 5, 3, 2, 1, 4))
    return tl.reshape(ordered, (BLOCK_N, 128))


@triton.jit
def integers(words, dtype: tl.constexpr, BLOCK_N: tl.constexpr, INTERPRETED: tl.constexpr):
    """v [BLOCK_N, 128] of `words` [BLOCK_N, 32]."""
    if dtype == tl.bfloat16 and not INTERPRETED:
        a0, a1, b0, b1 = tl.inline_asm_elementwise(
            _BYTES, _BYTES_REGISTERS, [words], (tl.int16,) * 4, is_pure=True, pack=1
        )
        pairs = tl.join(tl.join(a0, a1), tl.join(b0, b1)).to(tl.bfloat16, bitcast=True)
    else:
        a = tl.join((words << 24) >> 24, (words << 8) >> 24)
        b = tl.join((words << 16) >> 24, words >> 24)
        pairs = tl.join(a, b).to(tl.float32).to(dtype)
    ordered = tl.permute(tl.reshape(pairs, (BLOCK_N, 4, 2, 4, 2, 2)), (0, 5, 3, 2, 1, 4))
    return tl.reshape(ordered, (BLOCK_N, 128))


@triton.jit
def _two_nibbles(words, factors, PLACE: tl.constexpr, dtype: tl.constexpr):
    """factor * q of the nibbles PLACE and PLACE + 4 of every word, the last axis of the result."""
    factor = (factors << (24 - 8 * PLACE)) >> 24
    low, high = (words >> (4 * PLACE)) & 15, (words >> (16 + 4 * PLACE)) & 15
    return (tl.join(low - 8, high - 8) * factor[:, :, None]).to(tl.float32).to(dtype)
