"""Phases of the mixture of experts: gate and up of the chosen experts, then down with the weighted sum.

The router's logits come from a rows phase before them; router.py says how experts are chosen and grouped.
"""

from dataclasses import dataclass, replace

import numpy as np

from quant.decode.linear import Input, item_rows, multiply, set_token, token_tables
from quant.decode.parts import Part
from quant.decode.program import HEADER, MOST_TOKENS, PHASE, Phase, padded, tokens_of
from quant.decode.router import CHOICE, ROUTER, Choice, Router, choose, is_here
from quant.decode.streams import NO_STREAMS, STREAMS, Streams, write_streams
from quant.gemv.activations import q8_bytes, write_q8
from quant.matrix import MATRIX, ExpertMatrices, QuantMatrix
from quant.simd.gated import ACTIVATION, SWIGLU, Activation, gated
from quant.simd.memory import store_f32
from quant.simd.struct import address, boolean, f32, i64, struct
from quant.simd.vectors import copy, rms_norm, scale_add
from quant.target.jit import inline, kernel
from quant.threads.atomics import call_2

# A worker's memory: of each token its vector and that one's q8 row, then a CHOICE.
GATE_UP = struct(
    "ExpertsGateUp",
    phase=PHASE,
    router=ROUTER,
    x=address,  # float32 (MOST_TOKENS, hidden)
    norm=address,  # its weight, or 0
    epsilon=f32,
    hidden=i64,
    inner=i64,
    integer=boolean,  # whether gate or up wants q8 rows
    q8=i64,  # where in a token's memory
    token_bytes=i64,
    choice=i64,  # where in a worker's memory
    gate_out=address,  # float32 (pairs, inner)
    up_out=address,
    item_rows=i64,
    gate_bias=address,  # float32 (experts, inner), or 0
    up_bias=address,
    send=address,  # void(phase, work): what the first item does, where other ranks have a share; or 0
    exchange=address,  # of it, an EXCHANGE
    layer=i64,  # by the other ranks' count
    gate=MATRIX,
    up=MATRIX,
)

# A worker's memory: q8 rows of all pairs, then of the shared expert of all tokens; at `temporary` a vector, or rows of
# all pairs' results; a CHOICE.
DOWN = struct(
    "ExpertsDown",
    phase=PHASE,
    router=ROUTER,
    hidden=i64,
    inner=i64,
    integer=boolean,
    q8_bytes=i64,
    temporary=i64,
    choice=i64,
    gate_out=address,
    up_out=address,
    out=address,  # float32 (MOST_TOKENS, hidden)
    replaces=boolean,  # whether out is replaced by the sum, not added to
    item_rows=i64,
    shared_inner=i64,  # 0 without a shared expert
    shared_integer=boolean,
    shared_gate_out=address,
    shared_up_out=address,
    activation=ACTIVATION,
    shared_activation=ACTIVATION,
    streams=STREAMS,  # that the sum is written to, from out
    down_bias=address,  # float32 (experts, hidden), or 0
    down=MATRIX,
    shared_down=MATRIX,
)


@kernel("void(int64, int64)")
def _prepare_gate_up(phase, work):
    """The vectors, normed if there is a norm, and the choice."""
    a = GATE_UP(phase)
    for t in range(tokens_of(a)):
        own, x = work + a.token_bytes * t, a.x + 4 * a.hidden * t
        if a.norm != 0:
            rms_norm(x, a.norm, a.epsilon, a.hidden, own)
        else:
            copy(x, a.hidden, own)
        if a.integer:
            write_q8(own, 0, a.hidden, a.hidden, True, own + a.q8)
    choose(a, work + a.choice)


@kernel("void(int64, int64, int64)")
def _run_gate_up(phase, item, work):
    """Rows of gate or up of one group: items go group by group, gate before up, as they lie in memory.

    Before them there is one a token more where other ranks are to be told; that of the first token does it.
    """
    a = GATE_UP(phase)
    if a.send != 0:
        if item == 0:
            call_2(a.send, phase, work)
        item -= tokens_of(a)
        if item < 0:
            return
    c, inner, rows = CHOICE(work + a.choice), a.inner, a.item_rows
    per_matrix = (inner + rows - 1) // rows
    group, rest = item // (2 * per_matrix), item % (2 * per_matrix)
    first = rest % per_matrix * rows
    begin, end = c.starts[group], c.starts[group + 1]
    if begin == end:
        return
    matrix, bias, out = (a.gate, a.gate_bias, a.gate_out) if rest < per_matrix else (a.up, a.up_bias, a.up_out)
    q8, tables = a.q8 if a.integer else 0, token_tables()
    for i in range(begin, end):
        pair = c.members[i]
        own = work + a.token_bytes * (pair // a.router.top_k)
        set_token(tables, i - begin, own + q8, out + 4 * (inner * pair + first))
    expert, n_rows = c.ids[c.members[begin]], min(rows, inner - first)
    multiply(matrix, expert, first, n_rows, a.hidden, tables, end - begin)
    if bias != 0:
        for i in range(begin, end):
            scale_add(1.0, bias + 4 * (inner * expert + first), n_rows, out + 4 * (inner * c.members[i] + first))


@kernel("void(int64, int64)")
def _prepare_down(phase, work):
    """silu(gate) * up, or the like, of all pairs and of the shared expert as q8 rows, and the choice.

    Every worker does all of it and makes the choice again: that takes microseconds, a phase of its own would more.
    """
    a = DOWN(phase)
    inner, shared, temporary = a.inner, a.shared_inner, work + a.temporary
    c, n_tokens, top_k = choose(a, work + a.choice), tokens_of(a), a.router.top_k
    for pair in range(top_k * n_tokens):
        if is_here(a.router, c, pair):
            at = 4 * inner * pair
            gated(a.activation, a.gate_out + at, a.up_out + at, inner, temporary)
            write_q8(temporary, 0, inner, inner, a.integer, work + a.q8_bytes * pair)
    if shared > 0:
        for t in range(n_tokens):
            at = 4 * shared * t
            gated(a.shared_activation, a.shared_gate_out + at, a.shared_up_out + at, shared, temporary)
            q8 = work + a.q8_bytes * (top_k * n_tokens + t)
            write_q8(temporary, 0, shared, shared, a.shared_integer, q8)


@inline
def _down_rows(a, c, first, n_rows, work):
    """Rows of down of all groups, float32 (n_rows,) a pair, item_rows apart, at `temporary`."""
    tables = token_tables()
    for group in range(a.router.top_k * tokens_of(a)):
        begin, end = c.starts[group], c.starts[group + 1]
        if begin == end:
            break
        for i in range(begin, end):
            pair = c.members[i]
            out = work + a.temporary + 4 * a.item_rows * pair
            set_token(tables, i - begin, work + a.q8_bytes * pair, out)
        multiply(a.down, c.ids[c.members[begin]], first, n_rows, a.inner, tables, end - begin)


@inline
def _add_shared(a, first, n_rows, work):
    """out += rows of the shared expert's down."""
    n_tokens, tables, temporary = tokens_of(a), token_tables(), work + a.temporary
    for t in range(n_tokens):
        q8 = work + a.q8_bytes * (a.router.top_k * n_tokens + t)
        set_token(tables, t, q8, temporary + 4 * a.item_rows * t)
    multiply(a.shared_down, 0, first, n_rows, a.shared_inner, tables, n_tokens)
    for t in range(n_tokens):
        scale_add(1.0, temporary + 4 * a.item_rows * t, n_rows, a.out + 4 * (a.hidden * t + first))


@kernel("void(int64, int64, int64)")
def _run_down(phase, item, work):
    """Output rows: what is there, or 0, plus the weighted sum of the chosen experts' down rows and the shared one's."""
    a = DOWN(phase)
    c, hidden, rows, top_k = CHOICE(work + a.choice), a.hidden, a.item_rows, a.router.top_k
    first, n_tokens = rows * item, tokens_of(a)
    n_rows, out, temporary = min(rows, hidden - first), a.out + 4 * first, work + a.temporary
    _down_rows(a, c, first, n_rows, work)
    if a.replaces:
        for t in range(n_tokens):
            for r in range(n_rows):
                store_f32(out + 4 * (hidden * t + r), np.float32(0.0))
    for pair in range(top_k * n_tokens):
        if is_here(a.router, c, pair):
            sums = out + 4 * hidden * (pair // top_k)
            scale_add(c.weights[pair], temporary + 4 * rows * pair, n_rows, sums)
            if a.down_bias != 0:
                scale_add(c.weights[pair], a.down_bias + 4 * (hidden * c.ids[pair] + first), n_rows, sums)
    if a.shared_inner > 0:
        _add_shared(a, first, n_rows, work)
    if a.streams.x != 0:
        for t in range(n_tokens):
            write_streams(a.streams, t, first, n_rows, hidden, out + 4 * hidden * t)


@dataclass(frozen=True)
class Told:
    """What of a layer goes to other ranks.

    Attributes:
        send: address of a kernel void(phase, work), which finds arguments of gate and up, and a worker's memory.
        exchange: address of what it goes by.
        layer: what the others call it.
    """

    send: int = 0
    exchange: int = 0
    layer: int = 0


NOBODY = Told()


def expert_phases(
    input_: Input,
    router: Router | Choice,
    experts: ExpertMatrices,
    gate_out: int,
    up_out: int,
    shared: tuple[int, int, QuantMatrix] | None,
    out: int,
    n_workers: int,
    replaces: bool = False,
    shared_activation: Activation = SWIGLU,
    into: Streams | None = None,
    told: Told = NOBODY,
) -> tuple[Phase, Phase]:
    """The two phases of a layer's experts, from their input to the sum added to `out`. T: MOST_TOKENS.

    Args:
        input_: normed, or as it is.
        gate_out, up_out: addresses of float32 (T, K, inner) between the phases.
        shared: addresses of the shared expert's gate and up outputs (T, shared inner), computed before, and its down.
        out: address of float32 (T, hidden), where the experts' sum is added.
        replaces: whether the sum replaces what is there.
        shared_activation: what the shared expert's gate and up become.
        into: streams that the sum is then written to.
        told: other ranks, which compute shares of their own meanwhile.
    """
    gate_up = _gate_up_phase(input_, router, experts, gate_out, up_out, n_workers, told)
    down = _down_phase(
        router, experts, gate_out, up_out, shared, out, n_workers, replaces, shared_activation.struct,
        into.struct if into else NO_STREAMS,
    )  # fmt: skip
    return gate_up, down


def _gate_up_phase(
    input_: Input, router: Router | Choice, experts: ExpertMatrices, gate_out: int, up_out: int, n_workers: int,
    told: Told,
) -> Phase:  # fmt: skip
    gate, up, biases, top_k = experts.gate, experts.up, experts.bias_addresses, router.num_experts_per_tok
    hidden, inner = gate.n_cols, gate.n_rows
    rows = min(item_rows([gate, up] * top_k, n_workers))  # one size for gate and up: items are numbered alike
    q8, token_bytes = padded(4 * hidden), padded(4 * hidden) + q8_bytes(hidden)
    choice = MOST_TOKENS * token_bytes
    arguments = GATE_UP.pack(
        phase=HEADER, router=router.struct, x=input_.x, norm=input_.norm, epsilon=input_.epsilon,
        hidden=hidden, inner=inner, integer=gate.format.integer or up.format.integer,
        q8=q8, token_bytes=token_bytes, choice=choice, gate_out=gate_out, up_out=up_out, item_rows=rows,
        gate_bias=biases["gate_bias"], up_bias=biases["up_bias"],
        send=told.send, exchange=told.exchange, layer=told.layer, gate=gate.struct, up=up.struct,
    )  # fmt: skip
    per_matrix, work_bytes = -(-inner // rows), choice + router.choice_bytes
    phase = Phase(_prepare_gate_up, _run_gate_up, 2 * top_k * per_matrix, arguments, work_bytes, per_token=True)
    if told.send:  # its item comes first: rows of several ranks are not shared out by NUMA node
        return replace(phase, n_items=phase.n_items + 1)
    return replace(phase, period=per_matrix, weights=(Part(gate, rows), Part(up, rows)))


def _down_phase(
    router: Router | Choice, experts: ExpertMatrices, gate_out: int, up_out: int,
    shared: tuple[int, int, QuantMatrix] | None, out: int, n_workers: int, replaces: bool,
    shared_activation: np.ndarray, streams: np.ndarray,
) -> Phase:  # fmt: skip
    down, top_k = experts.down, router.num_experts_per_tok
    hidden, inner = down.n_rows, down.n_cols
    shared_gate_out, shared_up_out, shared_down = shared or (0, 0, None)
    shared_inner = shared_down.n_cols if shared_down else 0
    (rows,) = item_rows([down], n_workers)
    per_pair = q8_bytes(max(inner, shared_inner))
    temporary = per_pair * MOST_TOKENS * (top_k + 1)
    choice = temporary + padded(4 * max(rows * MOST_TOKENS * top_k, inner, shared_inner))
    arguments = DOWN.pack(
        phase=HEADER, router=router.struct, hidden=hidden, inner=inner, integer=down.format.integer,
        q8_bytes=per_pair, temporary=temporary, choice=choice, gate_out=gate_out, up_out=up_out,
        out=out, replaces=replaces, item_rows=rows, shared_inner=shared_inner,
        shared_integer=bool(shared_down and shared_down.format.integer),
        shared_gate_out=shared_gate_out, shared_up_out=shared_up_out,
        activation=experts.activation.struct, shared_activation=shared_activation, streams=streams,
        down_bias=experts.bias_addresses["down_bias"],
        down=down.struct, shared_down=shared_down.struct if shared_down else MATRIX.zeros(),
    )  # fmt: skip
    parts = [Part(matrix, rows) for matrix in (down, shared_down) if matrix]
    work_bytes = choice + router.choice_bytes
    return Phase(_prepare_down, _run_down, -(-hidden // rows), arguments, work_bytes, weights=parts)
