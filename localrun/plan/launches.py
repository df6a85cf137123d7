"""What a card queues for a layer of a decoding step, beside what hands experts to the CPU: kernels, small ones most.

Counted, and held against what a step queues (tests/support/gpu_launches.py). Of other models than
DeepSeek-V4's and V3's kinds nothing is counted: a machine's layer_s is theirs.
"""

from localrun.models.config import Config

OF_LAYER_S = 20  # of which a machine's layer_s is the time (plan/data/machines.json)
SHARED = 4  # of the shared experts: gate, up, their activation, down
_FEED_FORWARD = 3  # router, choice, the shared experts' sum; each layer's norm and sum are with the residual's
_DENSE = 4


def of_layer(config: Config, index: int) -> int | None:
    """All of a layer's, those of its shared experts included; None where nothing is counted."""
    c = config
    if c.attention != "compressed" and (c.attention != "mla" or c.index_topk):
        return None
    is_moe = c.n_routed_experts > 0 and index >= c.first_k_dense_replace
    shared = SHARED if c.n_shared_experts else -1  # without them there is nothing to add
    feed_forward = _FEED_FORWARD + shared if is_moe else _DENSE
    if c.attention == "mla":
        queries = 1 if c.q_lora_rank is None else 3
        # Keys and values, turns and rows, k_b, attention and its sum, v_b, output; two norms and two sums around.
        return queries + 7 + 4 + feed_forward
    ratio = c.compress_ratio(index)
    # The first projections, compressors' by themselves; the queries' norm and projection, turns, rows, pooled rows,
    # attention and its sum, output in groups and together.
    attention = (2 if ratio else 1) + 4 + (1 if ratio else 0) + 4
    hashed = 1 if index < c.num_hash_layers else 0  # ids from the table
    return attention + 2 * 3 + hashed + feed_forward  # streams: their product, what is read of them, their mixture
