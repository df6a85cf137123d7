"""What a model is: its sizes and settings, under Hugging Face's config.json names.

Read from a GGUF by localrun.models.reader, from a config.json by localrun.convert.settings.
"""

from dataclasses import dataclass

from localrun.models.rows import GROUP, KV_BYTES, Rows

# Tokens that a sliding layer keeps behind its window, so that the end of a text can be taken back: drafts, a chunk of a
# prompt, and a reply, whose reasoning chat templates drop from the next prompt. Of gpt-oss-20b they take 50 MB.
WINDOW_SPARE = 2048
# The same of layers with pooled rows, whose rings hold far more of a token: drafts, and how a template ends a prompt.
# Of DeepSeek-V4-Flash they take 14 MB. What lies further back is gone back to by what was kept at a mark.
OPEN_SPARE = 32
INDEXED_RATIO = 4  # tokens of a pooled row, where an indexer chooses among them
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
        attention: "mla", one latent a token (DeepSeek-V2), "gqa", keys and values that query heads share, or
            "compressed", one row a token, key and value of all heads, and pooled rows (DeepSeek-V4).
        rope: what is rotated together: "pairs" of neighbours, or dimension i and i + R/2 of two "halves".
        qk_norm: whether queries and keys are normed before they are rotated (gqa): each head by itself.
        qk_norm_whole: whether all heads of a token are normed as one vector instead.
        attention_bias: whether queries, keys and values have biases (gqa).
        layer_types: of each layer's attention, "full_attention" or "sliding_attention"; none if all are full.
        sliding_window: tokens that a sliding layer sees, the one at hand included.
        hidden_act: the activation of gates, in dense layers and experts.
        swiglu_alpha, swiglu_limit, swiglu_offset: of a bounded activation (quant.simd.gated); a limit of 0 for none.
        qk_rope_head_dim: R, how many of a head's dimensions are rotated.
        n_routed_experts: 0 if all layers are dense.
        index_topk: tokens that a query attends to, at most, chosen by an indexer (DeepSeek-V3.2); 0 for all.
        indexer_types: of each layer: "full", with an indexer of its own, or "shared", with the choice of the last one.
        indexer_rope: what the indexer rotates together, as `rope`.
        lacks_indexer: whether the file has none of the indexer's tensors, although its keys speak of it.
        first_k_dense_replace: leading dense layers of a model with experts. A GGUF's tensors count, not this.
        shared_intermediate_size: inner width of all shared experts together.
        has_selection_bias: whether a bias moves the choice of experts (noaux_tc).
        scoring_func: the router's: "softmax", "sigmoid", "softmax_after_topk" or "sqrtsoftplus".
        num_hash_layers: leading layers whose experts follow from the token's id.
        compress_ratios: of each layer: tokens that a pooled row stands for, 4 or 128; 0 without pooled rows.
        compress_rope_theta: rope_theta of layers with a ratio, which alone have the scaling.
        o_groups, o_lora_rank: groups of heads whose outputs are projected apart, and to how many values each.
        hc_mult: streams of hidden values that hyper-connections mix; 0 for a plain residual.
        hc_sinkhorn_iters, hc_eps: how often their matrix is normed, and what each norm adds.
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
    swiglu_offset: float = 0.0
    first_k_dense_replace: int = 0
    n_shared_experts: int = 0
    shared_intermediate_size: int = 0
    n_group: int = 1
    topk_group: int = 1
    scoring_func: str = "softmax"
    has_selection_bias: bool = False
    norm_topk_prob: bool = False
    routed_scaling_factor: float = 1.0
    num_hash_layers: int = 0
    # compressed rows and hyper-connections
    compress_ratios: tuple[int, ...] = ()
    compress_rope_theta: float = 0.0
    o_groups: int = 0
    o_lora_rank: int = 0
    hc_mult: int = 0
    hc_sinkhorn_iters: int = 0
    hc_eps: float = 0.0

    def window(self, index: int) -> int:
        """Tokens whose rows layer `index` sees, at most; 0 for all."""
        slides = self.attention == "compressed" or self.layer_types[index : index + 1] == (SLIDING,)
        return self.sliding_window if slides else 0

    def rows(self, index: int) -> tuple[Rows, ...]:
        """What layer `index` keeps of tokens; beyond the last, the layer for multi-token prediction.

        Latents, and the indexer's keys; or keys, and values; or rows of the window, pooled rows, what the next one is
        pooled of (a token's values and, behind them, their weights), and the indexer's like these.
        """
        window = self.window(index)
        if self.attention == "mla":
            width = self.kv_lora_rank + self.qk_rope_head_dim
            latent = Rows(width, group=self.kv_lora_rank, is_scaled=width % GROUP == 0)
            key = Rows(self.index_head_dim)
            return (latent, key) if self.chooses_rows(index) else (latent,)
        if self.attention == "gqa":
            widths, n_heads = (self.head_dim, self.v_head_dim), self.num_key_value_heads
            return tuple(Rows(n_heads * each, window=window, spare=WINDOW_SPARE, group=each) for each in widths)
        rows, ratio = Rows(self.head_dim, window=window, spare=OPEN_SPARE), self.compress_ratio(index)
        indexed = _pooled(self.index_head_dim, ratio) if ratio == INDEXED_RATIO else ()
        return rows, *(_pooled(self.head_dim, ratio) if ratio else ()), *indexed

    @property
    def rebuilds_keys(self) -> bool:
        """Whether a prompt's attention rebuilds the keys and values of all tokens in the cache."""
        return self.attention == "mla" and not self.index_topk

    @property
    def why_not_8_bits(self) -> str:
        """Why the CPU keeps no cache of 8 bits; "" if it does."""
        if self.attention == "compressed":
            return "pooled rows and windows of DeepSeek-V4 keep 16"
        if any(rows.group % GROUP for rows in self.rows(0)):
            return f"its heads' values are no multiple of {GROUP}"
        return ""

    @property
    def kv_bytes_per_token(self) -> int:
        """Bytes of cache that one token more takes in all layers, where windows are full."""
        return self.kv_token_bytes()

    def kv_token_bytes(self, bits: int = 16) -> int:
        """The same of a cache of so many bits."""
        return sum(rows.row_bytes(bits) // rows.ratio for rows in self._all_rows() if not rows.window)

    @property
    def kv_window_bytes(self) -> int:
        """Bytes of cache that layers with a window take, once they are full."""
        return sum(rows.row_bytes() * (rows.window + rows.spare) for rows in self._all_rows() if rows.window)

    def kv_bytes(self, n_tokens: int, bits: int = 16) -> int:
        """Bytes of a cache of so many bits for so many tokens."""
        return sum(rows.row_bytes(bits) * rows.count(n_tokens) for rows in self._all_rows())

    def kv_bytes_read(self, n_tokens: float) -> float:
        """Bytes of the cache that one token's attention reads where so many are in it."""
        width = self.rows(self.num_hidden_layers)[0].width  # of a row that attention goes over
        if self.attention == "gqa":
            width += self.num_key_value_heads * self.v_head_dim
        return (width * self.attended(n_tokens) + self._scored(n_tokens)) * KV_BYTES

    def attended(self, n_tokens: float) -> float:
        """Cached rows that one token's attention goes over, of so many tokens, in all layers together."""
        return sum(self._attended(index, n_tokens) for index in range(self.num_hidden_layers))

    def _all_rows(self) -> list[Rows]:
        return [rows for index in range(self.num_hidden_layers) for rows in self.rows(index)]

    def _attended(self, index: int, n_tokens: float) -> float:
        if self.attention == "compressed":
            ratio = self.compress_ratio(index)
            pooled = n_tokens / ratio if ratio else 0
            chosen = self.index_topk if ratio == INDEXED_RATIO else pooled
            return min(n_tokens, self.sliding_window) + min(pooled, chosen)
        return min(n_tokens, self.window(index) or self.index_topk or n_tokens)

    def _scored(self, n_tokens: float) -> float:
        """Values of indexers' keys that one token is compared with."""
        n_keys = n_tokens / (INDEXED_RATIO if self.attention == "compressed" else 1)
        if not 0 < self.index_topk < n_keys:
            return 0
        return n_keys * sum(self.index_head_dim for index in range(self.num_hidden_layers) if self.chooses_rows(index))

    def compress_ratio(self, index: int) -> int:
        """Tokens that a pooled row of layer `index` stands for; 0 without pooled rows."""
        return self.compress_ratios[index] if index < len(self.compress_ratios) else 0

    def has_indexer(self, index: int) -> bool:
        """Whether layer `index` has an indexer's tensors, used or not; of multi-token prediction it may have them."""
        if self.compress_ratios:
            return self.compress_ratio(index) == INDEXED_RATIO
        return index < len(self.indexer_types) and self.indexer_types[index] == "full"

    def chooses_rows(self, index: int) -> bool:
        """Whether layer `index` chooses the tokens that it and the next ones attend to."""
        return self.index_topk > 0 and self.has_indexer(index)


def _pooled(width: int, ratio: int) -> tuple[Rows, Rows]:
    """Pooled rows, and what they are pooled of: of ratio 4 each token has a part in two, its own and the next."""
    n_parts = 2 if ratio == INDEXED_RATIO else 1
    open_rows = Rows(2 * n_parts * width, window=n_parts * ratio, spare=OPEN_SPARE, pools=ratio, is_exact=True)
    return Rows(width, ratio), open_rows
