"""What a model is: its sizes and settings, under Hugging Face's config.json names.

Read from a GGUF by localrun.models.reader, from a config.json by localrun.convert.settings.
"""

from dataclasses import dataclass

KV_BYTES = 2  # the cache holds 16-bit values
# Tokens that a sliding layer keeps behind its window, so that the end of a text can be taken back: drafts, a chunk of a
# prompt, and a reply, whose reasoning chat templates drop from the next prompt. Of gpt-oss-20b they take 50 MB.
WINDOW_SPARE = 2048
FULL, SLIDING = "full_attention", "sliding_attention"  # layer_types


@dataclass(frozen=True)
class RopeScaling:
    """How positions beyond the training length are reached.

    Attributes:
        type: "linear" or "yarn".
        factor: how many times longer.
        original_max_position_embeddings: the training length (yarn).
        mscale_all_dim: YaRN's attention temperature; None where the file does not say.
        beta_fast, beta_slow: rotations over the training length between which yarn blends.
        truncate: whether the blend's borders are whole pairs (yarn).
    """

    type: str
    factor: float
    original_max_position_embeddings: int = 0
    mscale_all_dim: float | None = None
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclass(frozen=True)
class Config:
    """Sizes and settings of a model; fields that its architecture has no use for are None, 0 or False.

    Attributes:
        attention: "mla", one latent a token (DeepSeek-V2), or "gqa", keys and values that query heads share.
        rope: what is rotated together: "pairs" of neighbours, or dimension i and i + R/2 of two "halves".
        qk_norm: whether queries and keys are normed before they are rotated (gqa): each head by itself.
        qk_norm_whole: whether all heads of a token are normed as one vector instead.
        attention_bias: whether queries, keys and values have biases (gqa).
        layer_types: of each layer's attention, "full_attention" or "sliding_attention"; none if all are full.
        sliding_window: tokens that a sliding layer sees, the one at hand included.
        hidden_act: the activation of gates, in dense layers and experts.
        swiglu_alpha, swiglu_limit: of experts with a bounded activation (quant.simd.gated); 0 without one.
        qk_rope_head_dim: R, how many of a head's dimensions are rotated.
        n_routed_experts: 0 if all layers are dense.
        index_topk: tokens that a query attends to, at most, chosen by an indexer (DeepSeek-V3.2); 0 for all.
        indexer_types: of each layer: "full", with an indexer of its own, or "shared", with the choice of the last one.
        indexer_rope: what the indexer rotates together, as `rope`.
        lacks_indexer: whether the file has none of the indexer's tensors, although its keys speak of it.
        first_k_dense_replace: leading dense layers of a model with experts. A GGUF's tensors count, not this.
        shared_intermediate_size: inner width of all shared experts together.
        has_selection_bias: whether a bias moves the choice of experts (noaux_tc).
        scoring_func: the router's: "softmax", "sigmoid" or "softmax_after_topk".
    """

    architecture: str
    attention: str
    rope: str
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    vocab_size: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: RopeScaling | None
    qk_rope_head_dim: int
    v_head_dim: int
    tie_word_embeddings: bool = False
    hidden_act: str = "silu"
    # grouped-query attention
    num_key_value_heads: int = 0
    head_dim: int = 0
    qk_norm: bool = False
    qk_norm_whole: bool = False
    attention_bias: bool = False
    layer_types: tuple[str, ...] = ()
    sliding_window: int = 0
    # multi-head latent attention
    q_lora_rank: int | None = None
    kv_lora_rank: int = 0
    qk_nope_head_dim: int = 0
    num_nextn_predict_layers: int = 0
    # its sparse form
    index_n_heads: int = 0
    index_head_dim: int = 0
    index_topk: int = 0
    indexer_types: tuple[str, ...] = ()
    indexer_rope: str = ""
    lacks_indexer: bool = False
    # mixture of experts
    n_routed_experts: int = 0
    num_experts_per_tok: int = 0
    moe_intermediate_size: int = 0
    swiglu_alpha: float = 0.0
    swiglu_limit: float = 0.0
    first_k_dense_replace: int = 0
    n_shared_experts: int = 0
    shared_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "softmax"
    has_selection_bias: bool = False
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0

    def window(self, index: int) -> int:
        """Tokens that layer `index` sees, at most; 0 for all."""
        return self.sliding_window if self.layer_types[index : index + 1] == (SLIDING,) else 0

    def _kv_bytes_of(self, index: int) -> int:
        """Bytes of cache that one token takes in layer `index`."""
        if self.attention == "mla":
            width = self.kv_lora_rank + self.qk_rope_head_dim
        else:
            width = self.num_key_value_heads * (self.head_dim + self.v_head_dim)
        return (width + self._index_width(index)) * KV_BYTES

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token more takes in all layers, where windows are full."""
        return sum(self._kv_bytes_of(index) for index in range(self.num_hidden_layers) if not self.window(index))

    @property
    def kv_window_bytes(self) -> int:
        """Bytes of cache that layers with a window take, once they are full."""
        windows = [(index, self.window(index)) for index in range(self.num_hidden_layers)]
        return sum(self._kv_bytes_of(index) * (window + WINDOW_SPARE) for index, window in windows if window)

    def kv_bytes(self, n_tokens: int) -> int:
        """Bytes of a cache for so many tokens."""
        layers = range(self.num_hidden_layers)
        return sum(self._kv_bytes_of(index) * cache_rows(self.window(index), n_tokens) for index in layers)

    def kv_bytes_read(self, n_tokens: float) -> float:
        """Bytes of the cache that one token's attention reads where so many are in it."""
        layers, scored = range(self.num_hidden_layers), n_tokens if 0 < self.index_topk < n_tokens else 0
        keys = sum(self._index_width(index) for index in layers) * KV_BYTES
        rows = sum(
            (self._kv_bytes_of(index) - self._index_width(index) * KV_BYTES) * self._attended(index, n_tokens)
            for index in layers
        )
        return rows + keys * scored

    def attended(self, n_tokens: float) -> float:
        """Cached tokens that one token's attention goes over, of so many, in all layers together."""
        return sum(self._attended(index, n_tokens) for index in range(self.num_hidden_layers))

    def _attended(self, index: int, n_tokens: float) -> float:
        return min(n_tokens, self.window(index) or self.index_topk or n_tokens)

    def has_indexer(self, index: int) -> bool:
        """Whether layer `index` has an indexer's tensors, used or not; of multi-token prediction it may have them."""
        return index < len(self.indexer_types) and self.indexer_types[index] == "full"

    def _index_width(self, index: int) -> int:
        """Values of an indexer's key that layer `index` keeps of a token."""
        return self.index_head_dim if self.chooses_rows(index) else 0

    def chooses_rows(self, index: int) -> bool:
        """Whether layer `index` chooses the tokens that it and the next ones attend to."""
        return self.index_topk > 0 and self.has_indexer(index)


def cache_rows(window: int, capacity: int) -> int:
    """Tokens whose rows a layer keeps in a cache for `capacity`; window: how many it sees, 0 for all."""
    return min(capacity, window + WINDOW_SPARE) if window else capacity
