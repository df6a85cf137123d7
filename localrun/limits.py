"""How much is done at a time, and pauses: bounds on work memory, which placement and plans reckon with and whoever
works keeps to."""

PREFILL_CHUNK = 512  # tokens of a prompt evaluated at a time: enough to use the cores well, and a bound on work memory
# Where each chunk rebuilds the keys and values of all tokens before it, with latent attention.
LONG_PREFILL_CHUNKS = 4096, 2048, 1024
# Keys and values that attention rebuilds at a time: heads are handled in groups that fit.
ATTENTION_WORK_BYTES = 1 << 26
GPU_ATTENTION_WORK_BYTES = 1 << 28  # fills the largest card with 512 tokens of V3

# Marks of a cache that cannot go back to every length: tokens between two, at most, unless they take more bytes than
# these, and tokens that may be gone back from one that was asked for.
MARK_EVERY, MARK_BYTES, MARK_SPARE = 1024, 1 << 28, 32

# Between two looks for what another process takes long to send: threads of this one compute meanwhile.
READER_PAUSE_S = 1e-3


def prefill_chunk(n_tokens: int, rebuilds_keys: bool) -> int:
    """Tokens at a time of a prompt: where chunks rebuild keys half of it at most, so that progress shows."""
    sizes = LONG_PREFILL_CHUNKS if rebuilds_keys else ()
    return next((size for size in sizes if 2 * size <= n_tokens), PREFILL_CHUNK)


def cut(n_tokens: int, size: int | None = None) -> list[int]:
    """Pieces of n_tokens: of a size, PREFILL_CHUNK unless given, and what is left."""
    size = PREFILL_CHUNK if size is None else size
    return [min(size, n_tokens - first) for first in range(0, n_tokens, size)]
