"""Loads of the numbers that blocks are made of."""

import triton
import triton.language as tl


@triton.jit
def u16(address):
    """16 bits at an address, as uint32."""
    return tl.load(address).to(tl.uint32)


@triton.jit
def f16(address):
    """f16, loaded as 16 bits, in float32."""
    return tl.load(address).to(tl.float16, bitcast=True).to(tl.float32)


@triton.jit
def f16_pair(word):
    """The two f16 in a 32-bit word, in float32."""
    low = (word & 0xFFFF).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    high = (word >> 16).to(tl.uint16).to(tl.float16, bitcast=True).to(tl.float32)
    return low, high


@triton.jit
def float_bits(bits):
    """The float32 that these 32 bits are."""
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def byte(address):
    """A byte at an address, as uint32."""
    return tl.load(address).to(tl.uint32)
