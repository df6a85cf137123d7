"""How many bytes ranks send each other for a layer's experts (messages.py says what is in them). Loads no Numba."""

HEADER_BYTES, PAIR_BYTES = 64, 12  # of a message; of a token's expert: an id and a weight
TILE = 128  # columns that share a scale in fp8
_COLUMN_BYTES = {"f32": 4, "bf16": 2, "fp8": 1}
TYPES = tuple(_COLUMN_BYTES)
BACK = {"f32": "f32", "bf16": "bf16", "fp8": "bf16"}  # as what sums come back


def vector_bytes(type_: str, hidden: int) -> int:
    """Of a token's vector as it travels."""
    return _COLUMN_BYTES[type_] * hidden + (4 * -(-hidden // TILE) if type_ == "fp8" else 0)


def message_bytes(type_: str, hidden: int, top_k: int, n_tokens: int) -> int:
    """Of a message to a rank, top_k experts a token."""
    return HEADER_BYTES + n_tokens * (PAIR_BYTES * top_k + vector_bytes(type_, hidden))


def back_bytes(type_: str, hidden: int, n_tokens: int) -> int:
    """Of a message back."""
    return HEADER_BYTES + n_tokens * vector_bytes(BACK[type_], hidden)
