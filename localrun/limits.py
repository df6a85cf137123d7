"""How much is done at a time: bounds on work memory, which placement reckons with and whoever works keeps to."""

PREFILL_CHUNK = 512  # tokens of a prompt evaluated at a time: enough to use the cores well, and a bound on work memory
# The same where each chunk rebuilds the keys and values of all tokens before it, with latent attention: the first of
# these that the prompt is longer than.
LONG_PREFILL_CHUNKS = 4096, 2048
# Keys and values that attention rebuilds at a time: heads are handled in groups that fit.
ATTENTION_WORK_BYTES = 1 << 26
GPU_ATTENTION_WORK_BYTES = 1 << 28  # fills the largest card with 512 tokens of V3

# Marks of a cache that cannot go back to every length: tokens between two, at most, unless they take more bytes than
# these, and tokens that may be gone back from one that was asked for.
MARK_EVERY, MARK_BYTES, MARK_SPARE = 1024, 1 << 28, 32


def cut(n_tokens: int, size: int | None = None) -> list[int]:
    """Pieces of n_tokens: of a size, PREFILL_CHUNK unless given, and what is left."""
    size = PREFILL_CHUNK if size is None else size
    return [min(size, n_tokens - first) for first in range(0, n_tokens, size)]
