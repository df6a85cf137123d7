"""A layer's routed experts that live in VRAM, some of them or all: down of gate x and up x, weighted and summed.

Between them stands SwiGLU, plain or with bounds (quant.simd.gated), and each of the three may have a bias an expert.

Which expert a pair (token, choice) goes to is read from device memory by the kernels, and every shape follows from
the number of tokens alone: a CUDA graph can hold it, and nothing waits for the host. Pairs of experts that are not
here, and ids of -1, count nothing. Few tokens: each pair reads its expert's rows. Many: pairs are sorted by expert,
and tiles of one expert's pairs are multiplied on tensor cores.
Letters: T tokens, D hidden size, I expert's inner size, E experts of the layer, S slots (experts here), K choices a
token, P = T * K pairs.
"""

from collections.abc import Callable, Sequence

import torch
import triton
import triton.language as tl

from localrun.gpu import tiles
from localrun.gpu.matrices import gemm, gemv
from localrun.gpu.matrices.gemm import tile_products
from localrun.gpu.matrices.gemv import row_sums
from localrun.gpu.matrices.matrix import Matrix, upload
from localrun.gpu.tiles import Few, Many
from quant.matrix import ExpertMatrices
from quant.simd.gated import Activation

_GATED = 1024  # values of a program
_PAIR_ROWS = 16  # of a tile in GEMV: few, so that the rows of a handful of pairs occupy the whole device
_PAIRS_BYTES = 256 << 20  # what the results of pairs may take before they are summed


@triton.jit
def _slot(ids, slot_of, pair):
    """Where the expert of a pair lies, -1 if not here."""
    expert = tl.load(ids + pair)
    return tl.where(expert >= 0, tl.load(slot_of + tl.maximum(expert, 0)), -1)


@triton.jit
def _gated(gate, up, alpha, limit, offset, BOUNDED: tl.constexpr):
    """As quant.simd.gated has it."""
    if BOUNDED:
        gate = tl.minimum(gate, limit)
        up = tl.maximum(tl.minimum(up, limit), -limit) + offset
        return up * (gate / (1.0 + tl.exp(-alpha * gate)))
    else:
        return gate / (1.0 + tl.exp(-gate)) * up


@triton.jit
def gated_kernel(gate, up, out, n, alpha, limit, offset, BOUNDED: tl.constexpr, BLOCK: tl.constexpr):
    """Program (values): these of n."""
    i = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    g, u = tl.load(gate + i, mask=i < n, other=0.0), tl.load(up + i, mask=i < n, other=0.0)
    tl.store(out + i, _gated(g, u, alpha, limit, offset, BOUNDED), mask=i < n)


def gated(activation: Activation, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """As network.moe.gated, in one launch."""
    gate, up, a = gate.contiguous(), up.contiguous(), activation
    out = torch.empty_like(gate)
    gated_kernel[(triton.cdiv(gate.numel(), _GATED),)](
        gate, up, out, gate.numel(), a.alpha, a.limit, a.offset, a.limit != 0, _GATED, num_warps=4
    )
    return out


@triton.jit
def _biases(biases, expert, row, inside, n_rows):
    """Of some rows of an expert's matrix."""
    return tl.load(biases + expert * n_rows + row, mask=inside, other=0.0)


@triton.jit
def _gate_and_up(
    gate, up, gate_scales, up_scales, x, ids, slot_of, h, n_rows, n_cols, n_units, gate_stride, up_stride, gate_bytes,
    up_bytes, n_choices, gate_biases, up_biases, alpha, limit, offset,
    BIASED: tl.constexpr, BOUNDED: tl.constexpr,
    GATE: tl.constexpr, GATE_BYTES: tl.constexpr, GATE_WORD: tl.constexpr, GATE_U: tl.constexpr,
    UP: tl.constexpr, UP_BYTES: tl.constexpr, UP_WORD: tl.constexpr, UP_U: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """h[pair, r] of gate[r] . x and up[r] . x. Grid: tiles of rows, pairs."""
    row0, pair = tl.program_id(0) * R, tl.program_id(1)
    slot = _slot(ids, slot_of, pair).to(tl.int64)
    if slot >= 0:
        i = tl.arange(0, R)
        row = tl.minimum(i, n_rows - row0 - 1)
        x += pair // n_choices * n_cols
        gate += slot * gate_bytes + row0.to(tl.int64) * gate_stride * GATE_BYTES
        up += slot * up_bytes + row0.to(tl.int64) * up_stride * UP_BYTES
        g, _, _, _, _, _, _, _ = row_sums(
            gate, row, 0, n_units, gate_stride, n_cols, gate_scales, x, 0, GATE, GATE_WORD, 1, R, GATE_U
        )
        u, _, _, _, _, _, _, _ = row_sums(
            up, row, 0, n_units, up_stride, n_cols, up_scales, x, 0, UP, UP_WORD, 1, R, UP_U
        )
        inside = row0 + i < n_rows
        if BIASED:
            expert = tl.load(ids + pair)
            g += _biases(gate_biases, expert, row0 + i, inside, n_rows)
            u += _biases(up_biases, expert, row0 + i, inside, n_rows)
        tl.store(h + pair * n_rows + row0 + i, _gated(g, u, alpha, limit, offset, BOUNDED), mask=inside)


@triton.jit
def _down(
    down, scales, h, ids, slot_of, weights, out, n_rows, n_cols, n_units, stride, group_bytes, n_choices, biases,
    BIASED: tl.constexpr,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr, U: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out[t, r] = sum over the token's pairs of weight * down[r] . h[pair], in order. Grid: tiles of rows, tokens."""
    row0, t = tl.program_id(0) * R, tl.program_id(1)
    i = tl.arange(0, R)
    row = tl.minimum(i, n_rows - row0 - 1)
    total = tl.zeros((R,), tl.float32)
    for k in range(n_choices):
        pair = t * n_choices + k
        slot = _slot(ids, slot_of, pair).to(tl.int64)
        if slot >= 0:
            w = down + slot * group_bytes + row0.to(tl.int64) * stride * BYTES
            y, _, _, _, _, _, _, _ = row_sums(
                w, row, 0, n_units, stride, n_cols, scales, h + pair * n_cols, 0, FORMAT, WORD, 1, R, U
            )
            if BIASED:
                y += _biases(biases, tl.load(ids + pair), row0 + i, row0 + i < n_rows, n_rows)
            total += tl.load(weights + pair) * y
    tl.store(out + t * n_rows + row0 + i, total, mask=row0 + i < n_rows)


@triton.jit
def _group_gate_and_up(
    gate, up, gate_scales, up_scales, a_gate, a_up, a_scale, order, tile_slot, tile_first, tile_end, h, n_slots,
    n_rows, n_cols, n_units, gate_padded, up_padded, gate_stride, up_stride, gate_bytes, up_bytes, n_choices, ids,
    gate_biases, up_biases, alpha, limit, offset,
    BIASED: tl.constexpr, BOUNDED: tl.constexpr,
    GATE: tl.constexpr, GATE_BYTES: tl.constexpr, GATE_WORD: tl.constexpr, GATE_U: tl.constexpr,
    UP: tl.constexpr, UP_BYTES: tl.constexpr, UP_WORD: tl.constexpr, UP_U: tl.constexpr,
    BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """h[p, r] of the p-th pair by expert. Grid: tiles of one expert's pairs, tiles of rows."""
    tile, row0 = tl.program_id(0), tl.program_id(1) * R
    slot = tl.load(tile_slot + tile)
    if slot < n_slots:
        i, p = tl.arange(0, R), tl.load(tile_first + tile) + tl.arange(0, BT)
        end = tl.load(tile_end + tile)
        row = tl.minimum(i, n_rows - row0 - 1)
        token = tl.load(order + tl.minimum(p, end - 1)) // n_choices
        gate += slot * gate_bytes + row0.to(tl.int64) * gate_stride * GATE_BYTES
        up += slot * up_bytes + row0.to(tl.int64) * up_stride * UP_BYTES
        at_gate, at_up = token * gate_padded, token * up_padded
        g = tile_products(
            gate, row, gate_stride, n_cols, n_units, gate_scales, a_gate, at_gate, GATE, GATE_WORD, BT, R, GATE_U
        )
        u = tile_products(up, row, up_stride, n_cols, n_units, up_scales, a_up, at_up, UP, UP_WORD, BT, R, UP_U)
        scale = tl.load(a_scale + token)[None, :]
        g, u = g * scale, u * scale
        if BIASED:
            expert = tl.load(ids + tl.load(order + tl.load(tile_first + tile)))
            g += _biases(gate_biases, expert, row0 + i, row0 + i < n_rows, n_rows)[:, None]
            u += _biases(up_biases, expert, row0 + i, row0 + i < n_rows, n_rows)[:, None]
        here = (row0 + i < n_rows)[:, None] & (p < end)[None, :]
        out = _gated(g, u, alpha, limit, offset, BOUNDED)
        tl.store(h + (p * n_rows)[None, :] + (row0 + i)[:, None], out, mask=here)


@triton.jit
def _group_down(
    down, scales, a, a_scale, order, weights, tile_slot, tile_first, tile_end, out, n_slots, n_rows, n_cols, n_units,
    n_padded, stride, group_bytes, ids, biases,
    BIASED: tl.constexpr,
    FORMAT: tl.constexpr, BYTES: tl.constexpr, WORD: tl.constexpr, U: tl.constexpr, BT: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """out[pair, r] = weight * down[r] . h of the pair. Grid: tiles of one expert's pairs, tiles of rows."""
    tile, row0 = tl.program_id(0), tl.program_id(1) * R
    slot = tl.load(tile_slot + tile)
    if slot < n_slots:
        i, p = tl.arange(0, R), tl.load(tile_first + tile) + tl.arange(0, BT)
        end = tl.load(tile_end + tile)
        row, at = tl.minimum(i, n_rows - row0 - 1), tl.minimum(p, end - 1)
        down += slot * group_bytes + row0.to(tl.int64) * stride * BYTES
        y = tile_products(down, row, stride, n_cols, n_units, scales, a, at * n_padded, FORMAT, WORD, BT, R, U)
        pair = tl.load(order + at)
        weight = tl.load(weights + pair)[None, :]
        y *= tl.load(a_scale + at)[None, :] * weight
        if BIASED:
            expert = tl.load(ids + tl.load(order + tl.load(tile_first + tile)))
            y += weight * _biases(biases, expert, row0 + i, row0 + i < n_rows, n_rows)[:, None]
        here = (row0 + i < n_rows)[:, None] & (p < end)[None, :]
        tl.store(out + (pair * n_rows)[None, :] + (row0 + i)[:, None], y, mask=here)


class Between:
    """What stands around the matrices of a layer's experts: biases of all of them, on a device, and the activation."""

    def __init__(self, experts: ExpertMatrices, device: torch.device):
        a, nothing = experts.activation, torch.zeros(1, device=device)
        self.is_biased, self.is_bounded = experts.biases is not None, a.limit != 0
        biases = [torch.from_numpy(bias).to(device) for bias in experts.biases or ()]
        self.gate, self.up, self.down = biases or [nothing] * 3
        self.activation = a.alpha, a.limit, a.offset


class Experts:
    """The routed experts of a layer that are on a device.

    Attributes:
        slot_of: int32 (E,) on the device: where each expert lies, -1 for those that are elsewhere.
    """

    def __init__(self, experts: ExpertMatrices, device: torch.device, here: Sequence[int] | None = None):
        """Uploads the experts `here`, all by default."""
        n_experts = experts.gate.n_groups
        here = range(n_experts) if here is None else here
        self.gate, self.up, self.down = (upload(w, device, here) for w in (experts.gate, experts.up, experts.down))
        self.between = Between(experts, device)
        slot_of = torch.full((n_experts,), -1, dtype=torch.int32)
        slot_of[list(here)] = torch.arange(len(here), dtype=torch.int32)
        self.slot_of = slot_of.to(device)

    @classmethod
    def of(cls, gate: Matrix, up: Matrix, down: Matrix, slot_of: torch.Tensor, between: Between) -> "Experts":
        """Experts that are on the device already."""
        experts = cls.__new__(cls)
        experts.gate, experts.up, experts.down, experts.slot_of = gate, up, down, slot_of
        experts.between = between
        return experts

    def begin(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Queue the work; what comes back gives its result.

        Args:
            x: float32 (T, D).
            ids: int64 (T, K), -1 for pairs that are not this device's.
            weights: float32 (T, K).

        Returns:
            A function that returns float32 (T, D): the weighted sums over the experts that are here.
        """
        x, ids, weights = x.to(torch.float32).contiguous(), ids.contiguous(), weights.contiguous()
        if x.shape[0] == 0 or self.gate.n_groups == 0:
            out = torch.zeros_like(x)
        elif x.shape[0] <= gemv.MOST_TOKENS:
            out = self._few(x, ids, weights)
        else:
            step = max(1, _PAIRS_BYTES // (4 * ids.shape[1] * x.shape[1]))
            parts = zip(x.split(step), ids.split(step), weights.split(step), strict=True)
            out = torch.cat([self._many(*part) for part in parts])
        return lambda: out

    def __call__(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        """begin() and its result."""
        return self.begin(x, ids, weights)()

    def _few(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up, down, between = self.gate, self.up, self.down, self.between
        n_tokens, n_choices = ids.shape
        h, tile = torch.empty(ids.numel(), gate.n_rows, device=x.device), tiles.of(x.device).few
        _gate_and_up[-(-gate.n_rows // _PAIR_ROWS), ids.numel()](
            gate.data, up.data, gate.scale_pointer, up.scale_pointer, x, ids, self.slot_of, h, gate.n_rows, gate.n_cols,
            gate.n_units, gate.stride, up.stride, gate.group_bytes, up.group_bytes, n_choices, between.gate, between.up,
            *between.activation, between.is_biased, between.is_bounded,
            *_format(gate, tile), *_format(up, tile), _PAIR_ROWS, num_warps=tile.warps,
        )  # fmt: skip
        out = torch.empty_like(x)
        _down[-(-down.n_rows // _PAIR_ROWS), n_tokens](
            down.data, down.scale_pointer, h, ids, self.slot_of, weights, out, down.n_rows, down.n_cols, down.n_units,
            down.stride, down.group_bytes, n_choices, between.down, between.is_biased, *_format(down, tile),
            _PAIR_ROWS, num_warps=tile.warps,
        )  # fmt: skip
        return out

    def _many(self, x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        gate, up, down, between = self.gate, self.up, self.down, self.between
        n_pairs, n_choices = ids.numel(), ids.shape[1]
        tile = tiles.of(x.device).many
        tokens = gemm.tile_tokens(tile, n_pairs // gate.n_groups)
        order, *pairs = self._tiles(ids, tokens)
        n_tiles = pairs[0].shape[0]
        a_gate, scale = gemm.arrange(x, gate.layout)
        a_up = a_gate if up.layout == gate.layout else gemm.arrange(x, up.layout)[0]
        h = torch.zeros(n_pairs, gate.n_rows, device=x.device)
        options = {"num_warps": tile.warps, "num_stages": tile.stages}
        _group_gate_and_up[n_tiles, -(-gate.n_rows // tile.rows)](
            gate.data, up.data, gate.scale_pointer, up.scale_pointer, a_gate, a_up, scale, order, *pairs, h,
            gate.n_groups, gate.n_rows, gate.n_cols, gate.n_units, a_gate.shape[1], a_up.shape[1], gate.stride,
            up.stride, gate.group_bytes, up.group_bytes, n_choices, ids, between.gate, between.up, *between.activation,
            between.is_biased, between.is_bounded, *_format(gate, tile), *_format(up, tile), tokens,
            tile.rows, **options,
        )  # fmt: skip
        a, scale = gemm.arrange(h, down.layout)
        out = torch.zeros(n_pairs, down.n_rows, device=x.device)
        _group_down[n_tiles, -(-down.n_rows // tile.rows)](
            down.data, down.scale_pointer, a, scale, order, weights, *pairs, out, down.n_groups, down.n_rows,
            down.n_cols, down.n_units, a.shape[1], down.stride, down.group_bytes, ids, between.down, between.is_biased,
            *_format(down, tile), tokens, tile.rows, **options,
        )  # fmt: skip
        return out.view(*ids.shape, -1).sum(1)

    def _tiles(self, ids: torch.Tensor, tokens: int) -> tuple[torch.Tensor, ...]:
        """Pairs by slot, and tiles of `tokens` pairs of one slot each: slot, first and end of its pairs, all int64.

        There are as many tiles as there could be; the slot of those left over is the number of slots.
        """
        n_pairs, n_slots = ids.numel(), self.gate.n_groups
        slot = self.slot_of[ids.clamp_min(0)].long()
        slot, order = slot.masked_fill((ids < 0) | (slot < 0), n_slots).flatten().sort(stable=True)
        bounds = torch.searchsorted(slot, torch.arange(n_slots + 1, device=ids.device))
        last_tile = ((bounds.diff() + tokens - 1) // tokens).cumsum(0)
        tile = torch.arange(n_pairs // tokens + min(n_slots, n_pairs), device=ids.device)
        tile_slot = torch.searchsorted(last_tile, tile, right=True)
        known = tile_slot.clamp_max(n_slots - 1)
        before = last_tile - (bounds.diff() + tokens - 1) // tokens
        first = bounds[known] + (tile - before[known]) * tokens
        return order, tile_slot, first, bounds[known + 1]


def _format(matrix: Matrix, tile: Few | Many) -> tuple[str, int, int, int]:
    """What kernels take for a matrix's format: its name, bytes of a block and of a word, units of a tile."""
    layout = matrix.layout
    return layout.name, layout.block_bytes, layout.word, gemv.units_of(tile, layout)
