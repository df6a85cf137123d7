"""How many tokens at a time the kernels are made for. Loads no Numba: who predicts their times reads it as well."""

MAX_BATCH = 5  # tokens of one gemv_batch, whose sums are kept in memory: a step's token with four drafted ones
MOST_TOKENS = 8  # of a step; more than one gemv_batch takes read a work item's weights again, from the cache by then
# Repacking a row pays from here on; several passes of a few tokens are cheaper where rows are interleaved.
PACKED_FROM, PACKED_FROM_INTERLEAVED = 4, 8
ATTENTION_TOKENS = 32  # of a prompt, that see the same part of the cache
