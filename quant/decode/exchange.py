"""A layer's experts over several ranks, in a step: what goes out, what other ranks do, and how their sums come in.

Rank 0 sends as the first item of its own gate and up, computes its share, and then adds the others' sums in the order
of ranks, so that results do not depend on who was first. Another rank's thread waits for messages in serve(), which
runs the layer's two phases on that rank's workers. No Python and no lock on either side.
"""

from collections.abc import Sequence

import numpy as np

from quant.batch import MOST_TOKENS
from quant.decode.experts import GATE_UP
from quant.decode.host_node import ExpertNodes
from quant.decode.message_sizes import HEADER_BYTES, PAIR_BYTES, back_bytes, message_bytes, vector_bytes
from quant.decode.messages import BACK, HEADER, STEP, TO, VectorType
from quant.decode.program import HEADER as PHASE_HEADER
from quant.decode.program import NOTHING, PHASE, Phase, padded, tokens_of
from quant.decode.router import CHOICE, expert_at
from quant.decode.streams import NO_STREAMS, STREAMS, Streams, write_streams
from quant.matrix import ExpertMatrices
from quant.simd.memory import load_f32, load_i64, store_f32, store_i64
from quant.simd.struct import address, i64, pointer, struct
from quant.simd.vectors import scale_add
from quant.target.jit import inline, kernel
from quant.threads.atomics import call_1, call_3
from quant.threads.links import (
    BROKEN,
    LATE,
    LINKS,
    SPIN_NS,
    LinkError,
    Links,
    clock_ns,
    finish,
    is_broken,
    start_receive,
    start_send,
)
from quant.threads.pool import Pool, aligned_bytes

N_TIMES = 4096  # exchanges whose times are kept

# What rank 0 knows of an exchange.
EXCHANGE = struct(
    "Exchange",
    links=LINKS,
    n_others=i64,
    requests=address,  # int64 (2, n_others): sends, then receives
    out=address,  # messages, out_bytes apart; one for all where that is 0
    out_bytes=i64,
    back=address,  # those back, back_bytes apart
    back_bytes=i64,
    pack=address,
    unpack=address,
    vector_bytes=i64,
    back_vector_bytes=i64,
    number=i64,  # exchanges so far
    sent_bytes=i64,
    received_bytes=i64,
    failed=i64,  # the first rank that did not answer, 0 for none
    error=i64,  # LATE, or MPI's
    began=i64,
    sent=i64,
    times=pointer(i64),  # (N_TIMES, 4): see Exchange.times
)

COLLECT = struct("Collect", phase=PHASE, exchange=address, out=address, hidden=i64, streams=STREAMS)

# What another rank knows.
SERVED = struct(
    "Served",
    links=LINKS,
    requests=address,  # int64 (2,): a receive, a send
    is_waiting=i64,  # whether the receive was begun
    message=address,
    message_bytes=i64,
    back=address,
    run=address,  # of ExpertNodes
    nodes=pointer(i64),  # (n_layers, MOST_TOKENS): their arguments
    n_layers=i64,
    hidden=i64,
    top_k=i64,
    x=address,
    ids=address,
    weights=address,
    sums=address,
    pack=address,
    unpack=address,
    vector_bytes=i64,
    back_vector_bytes=i64,
    error=i64,
    n_served=i64,
)


@inline
def _fail(e, rank, error):
    if e.failed == 0:
        e.failed = rank
        e.error = error


@inline
def _write_message(a, e, other, choice, x, n_tokens):
    """A header, what the router chose (of it what that rank is to compute, where experts have owners), vectors at x."""
    n_pairs, r, at = a.router.top_k * n_tokens, a.router, e.out + e.out_bytes * other
    header = HEADER(at)
    header.kind = STEP
    header.layer = a.layer
    header.n_tokens = n_tokens
    header.number = e.number
    weights = at + HEADER_BYTES + 8 * n_pairs
    for pair in range(n_pairs):
        chosen = choice.ids[pair]
        if e.out_bytes > 0:
            chosen = expert_at(r, chosen, other + 1)
        store_i64(at + HEADER_BYTES + 8 * pair, chosen)
        store_f32(weights + 4 * pair, choice.weights[pair])
    for t in range(n_tokens):
        call_3(e.pack, x + a.token_bytes * t, a.hidden, weights + 4 * n_pairs + e.vector_bytes * t)


@kernel("void(int64, int64)")
def _send(phase, work):
    """The first item of gate and up: what this worker has prepared, to all other ranks."""
    a = GATE_UP(phase)
    e, choice, n_tokens = EXCHANGE(a.exchange), CHOICE(work + a.choice), tokens_of(a)
    if e.failed == 0 and is_broken(e.links):
        _fail(e, 1, BROKEN)  # for some rank: which one, World.error waits for
    if e.failed != 0:
        return
    e.began = clock_ns()
    e.number += 1
    n_out = HEADER_BYTES + n_tokens * (PAIR_BYTES * a.router.top_k + e.vector_bytes)
    n_back = HEADER_BYTES + n_tokens * e.back_vector_bytes
    for other in range(e.n_others):
        if other == 0 or e.out_bytes > 0:
            _write_message(a, e, other, choice, work, n_tokens)
        back, request = e.back + e.back_bytes * other, e.requests + 8 * other
        error = start_receive(e.links, back, n_back, other + 1, BACK, request + 8 * e.n_others)
        if error == 0:
            error = start_send(e.links, e.out + e.out_bytes * other, n_out, other + 1, TO, request)
        if error != 0:
            _fail(e, other + 1, error)
            return
    e.sent_bytes += n_out * e.n_others
    e.received_bytes += n_back * e.n_others
    e.sent = clock_ns()


@inline
def _add_sums(a, e, other, n_tokens, work):
    """out += another rank's sums."""
    sums = e.back + e.back_bytes * other + HEADER_BYTES
    for t in range(n_tokens):
        call_3(e.unpack, sums + e.back_vector_bytes * t, a.hidden, work)
        scale_add(1.0, work, a.hidden, a.out + 4 * a.hidden * t)


@inline
def _note_times(e, asked, busy):
    """When this exchange's message was out, when its answers were asked for and there; the busiest rank's time."""
    times = e.times + 4 * (e.number % N_TIMES)
    times[0] = e.sent - e.began
    times[1] = asked - e.sent
    times[2] = clock_ns() - asked
    times[3] = busy


@kernel("void(int64, int64, int64)")
def _collect(phase, item, work):
    """The only item: the others' sums, in the order of ranks."""
    a = COLLECT(phase)
    e, n_tokens, asked, busy = EXCHANGE(a.exchange), tokens_of(a), clock_ns(), 0
    for other in range(e.n_others):
        if e.failed == 0:
            requests = e.requests + 8 * other
            error = finish(e.links, requests + 8 * e.n_others, e.links.limit_ns, SPIN_NS)
            if error == 0:
                error = finish(e.links, requests, e.links.limit_ns, SPIN_NS)
            if error != 0:
                _fail(e, other + 1, error)
    if e.failed == 0:
        for other in range(e.n_others):
            busy = max(busy, HEADER(e.back + e.back_bytes * other).busy_ns)
            _add_sums(a, e, other, n_tokens, work)
        _note_times(e, asked, busy)
    if a.streams.x != 0:
        for t in range(n_tokens):
            write_streams(a.streams, t, 0, a.hidden, a.hidden, a.out + 4 * a.hidden * t)


class Exchange:
    """Rank 0's side, for all layers of a model: one exchange at a time. K: experts per token.

    Attributes:
        address: of the EXCHANGE.
        times: int64 (N_TIMES, 4), nanoseconds of the last exchanges: until the message was out, until the answers were
            asked for, until they were there, and how long the busiest of the others worked.
    """

    def __init__(self, links: Links, n_others: int, type_: VectorType, hidden: int, top_k: int, differ: bool):
        """differ: whether each rank is told of experts of its own."""
        self.hidden, self.times = hidden, np.zeros((N_TIMES, 4), np.int64)
        out_bytes = padded(message_bytes(type_.name, hidden, top_k, MOST_TOKENS))
        one_back = padded(back_bytes(type_.name, hidden, MOST_TOKENS))
        buffers = aligned_bytes(out_bytes * (n_others if differ else 1)), aligned_bytes(one_back * n_others)
        memory = [np.zeros(2 * n_others, np.int64), *buffers]
        links.keep(memory)
        requests, out, back = (array.ctypes.data for array in memory)
        self._words = EXCHANGE.pack(
            links=links.struct, n_others=n_others, requests=requests,
            out=out, out_bytes=out_bytes if differ else 0, back=back, back_bytes=one_back,
            pack=type_.pack.address, unpack=type_.back.unpack.address,
            vector_bytes=vector_bytes(type_.name, hidden), back_vector_bytes=vector_bytes(type_.back.name, hidden),
            number=0, sent_bytes=0, received_bytes=0, failed=0, error=0, began=0, sent=0, times=self.times.ctypes.data,
        )  # fmt: skip
        self.address = self._words.ctypes.data

    @property
    def send(self) -> int:
        """Address of what gate and up are to begin with."""
        return _send.address

    def _field(self, name: str) -> int:
        return int(self._words[EXCHANGE.offset(name) // 8])

    @property
    def n_exchanges(self) -> int:
        """So far."""
        return self._field("number")

    @property
    def n_bytes(self) -> tuple[int, int]:
        """Sent and received so far."""
        return self._field("sent_bytes"), self._field("received_bytes")

    @property
    def failure(self) -> tuple[int, int] | None:
        """The first rank that did not answer, and the error; None while all do."""
        return (self._field("failed"), self._field("error")) if self._field("failed") else None

    def collect_phase(self, out: int, into: Streams | None = None) -> Phase:
        """Adds the others' sums to float32 (T, hidden) at `out`, behind the layer's own; into: streams it goes to."""
        arguments = COLLECT.pack(
            phase=PHASE_HEADER, exchange=self.address, out=out, hidden=self.hidden,
            streams=into.struct if into else NO_STREAMS,
        )  # fmt: skip
        return Phase(NOTHING, _collect, 1, arguments, 4 * self.hidden)


# ---- the other ranks -------------------------------------------------------------------------------------------------


@inline
def _answer(s):
    """Run the experts of the layer that the message names on its tokens, and send the sums; an error's code."""
    header, n_tokens, began = HEADER(s.message), HEADER(s.message).n_tokens, clock_ns()
    n_pairs, at = s.top_k * n_tokens, s.message + HEADER_BYTES
    for pair in range(n_pairs):
        store_i64(s.ids + 8 * pair, load_i64(at + 8 * pair))
        store_f32(s.weights + 4 * pair, load_f32(at + 8 * n_pairs + 4 * pair))
    for t in range(n_tokens):
        call_3(s.unpack, at + PAIR_BYTES * n_pairs + s.vector_bytes * t, s.hidden, s.x + 4 * s.hidden * t)
    call_1(s.run, s.nodes[MOST_TOKENS * header.layer + n_tokens - 1])
    for t in range(n_tokens):
        at = s.back + HEADER_BYTES + s.back_vector_bytes * t
        call_3(s.pack, s.sums + 4 * s.hidden * t, s.hidden, at)
    back = HEADER(s.back)
    back.number = header.number
    back.busy_ns = clock_ns() - began
    n_bytes = HEADER_BYTES + s.back_vector_bytes * n_tokens
    error = start_send(s.links, s.back, n_bytes, 0, BACK, s.requests + 8)
    if error == 0:
        error = finish(s.links, s.requests + 8, s.links.limit_ns, SPIN_NS)
    s.n_served += 1
    return error


@inline
def _is_step(s):
    """Whether the message is a step's that this rank can answer."""
    header = HEADER(s.message)
    is_known = header.layer >= 0 and header.layer < s.n_layers
    return header.kind == STEP and is_known and header.n_tokens >= 1 and header.n_tokens <= MOST_TOKENS


@kernel("void(int64, int64)")
def _serve(address, limit_ns):
    """Answer messages until there is another, an error, or nothing for so long."""
    s = SERVED(address)
    s.error = 0
    spin_ns = 0 if s.is_waiting != 0 else SPIN_NS
    while True:
        if s.is_waiting == 0:
            s.error = start_receive(s.links, s.message, s.message_bytes, 0, TO, s.requests)
            s.is_waiting = 1
        if s.error == 0:
            s.error = finish(s.links, s.requests, limit_ns, spin_ns)
        if s.error != 0:
            return
        s.is_waiting, spin_ns = 0, SPIN_NS
        if not _is_step(s):
            return
        s.error = _answer(s)
        if s.error != 0:
            return


class Served:
    """Another rank's side: layers' experts that rank 0 asks for. K: experts per token.

    Attributes:
        header: int64 (8,), of the last message.
    """

    def __init__(self, links: Links, pool: Pool, layers: Sequence[ExpertMatrices], type_: VectorType, top_k: int):
        """layers: by the number that messages have; they must stay."""
        hidden = layers[0].gate.n_cols
        self._pool = pool
        floats = aligned_bytes(4 * MOST_TOKENS * (2 * hidden + top_k)).view(np.float32)
        x = floats.ctypes.data
        sums = x + 4 * MOST_TOKENS * hidden
        weights = sums + 4 * MOST_TOKENS * hidden
        ids, requests = np.zeros(MOST_TOKENS * top_k, np.int64), np.zeros(2, np.int64)
        self._nodes = ExpertNodes(pool, layers, top_k, x, ids.ctypes.data, weights, sums)
        table = np.array(
            [[self._nodes.argument(layer, n + 1) for n in range(MOST_TOKENS)] for layer in range(len(layers))], np.int64
        )
        n_bytes = message_bytes(type_.name, hidden, top_k, MOST_TOKENS)
        message, back = aligned_bytes(n_bytes), aligned_bytes(back_bytes(type_.name, hidden, MOST_TOKENS))
        self.header = message[:HEADER_BYTES].view(np.int64)
        self._serve = _serve.ctypes  # compiled now: rank 0 does not wait for it
        self._memory = [floats, ids, table]
        links.keep([requests, message, back])
        self._words = SERVED.pack(
            links=links.struct, requests=requests.ctypes.data, is_waiting=0, message=message.ctypes.data,
            message_bytes=n_bytes, back=back.ctypes.data, run=self._nodes.function, nodes=table.ctypes.data,
            n_layers=len(layers), hidden=hidden, top_k=top_k, x=x, ids=ids.ctypes.data, weights=weights, sums=sums,
            pack=type_.back.pack.address, unpack=type_.unpack.address, vector_bytes=vector_bytes(type_.name, hidden),
            back_vector_bytes=vector_bytes(type_.back.name, hidden), error=0, n_served=0,
        )  # fmt: skip

    def serve(self, limit_s: float) -> bool:
        """Answer until a message comes that is no step's, which `header` shows; False if nothing came for so long.

        Raises LinkError: rank 0 can't be reached.
        """
        with self._pool.exclusive():
            self._serve(self._words.ctypes.data, int(1e9 * limit_s))
        error, is_waiting = (int(self._words[SERVED.offset(name) // 8]) for name in ("error", "is_waiting"))
        if error and not (error == LATE and is_waiting):
            raise LinkError(error)
        return not error
