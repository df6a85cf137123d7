"""Phases of matrix rows: up to four matrices times one vector, which is taken as it is, normed, or gated first."""

from dataclasses import dataclass

from quant.activations import record_bytes, write_record
from quant.atomics import call_5
from quant.errors import QuantError
from quant.jit import inline, kernel
from quant.linear import Weight
from quant.rows import ADDRESS, GEMV, GROUP_BYTES, MATRIX_BYTES, ROW_BYTES
from quant.simd import bits_to_f32, load_f32, load_f32x16, load_i64, store_f32, store_f32x16
from quant.step import ARGUMENTS, PHASE_BYTES, Phase, float_bits, padded
from quant.vectors import rms_norm, scale_add, swiglu

_UNIT_BYTES = 1 << 19  # weights that a worker takes at a time: long enough to stream, short enough to share out
_UNITS_PER_WORKER = 4  # at least, so that workers end together

# Arguments: the vector; a norm's weight or a gate's other half; then the matrices.
X, SECOND, EPSILON, N_COLS, RECORD, ROUNDED, RESIDUAL, TEMPORARY, N_MATRICES = range(ARGUMENTS, ARGUMENTS + 72, 8)
MATRICES = ARGUMENTS + 72
# A matrix: rows.py's fields, then these.
N_ROWS, UNIT_ROWS, FIRST_UNIT, OUT, INTEGER = range(MATRIX_BYTES, MATRIX_BYTES + 40, 8)
MATRIX_SIZE = MATRIX_BYTES + 40
MOST_MATRICES = (PHASE_BYTES - MATRICES) // MATRIX_SIZE


@inline
def gemv(matrix, group, first, n_rows, n_cols, record, out):
    """out[r] = row first+r of a group of the matrix times the record."""
    w = load_i64(matrix + ADDRESS) + load_i64(matrix + GROUP_BYTES) * group + load_i64(matrix + ROW_BYTES) * first
    call_5(load_i64(matrix + GEMV), w, n_rows, n_cols, record, out)


@inline
def _round(phase, work):
    """The activation record of the vector at `work`, if a matrix of the phase wants one."""
    n_cols = load_i64(phase + N_COLS)
    if load_i64(phase + ROUNDED) != 0:
        write_record(work, 0, n_cols, n_cols, True, work + load_i64(phase + RECORD))


@kernel("void(int64, int64)")
def _prepare_plain(phase, work):
    x, n_cols = load_i64(phase + X), load_i64(phase + N_COLS)
    for i in range(0, n_cols // 16 * 16, 16):
        store_f32x16(work + 4 * i, load_f32x16(x + 4 * i))
    for i in range(n_cols // 16 * 16, n_cols):
        store_f32(work + 4 * i, load_f32(x + 4 * i))
    _round(phase, work)


@kernel("void(int64, int64)")
def _prepare_norm(phase, work):
    epsilon = bits_to_f32(load_i64(phase + EPSILON))
    rms_norm(load_i64(phase + X), load_i64(phase + SECOND), epsilon, load_i64(phase + N_COLS), work)
    _round(phase, work)


@kernel("void(int64, int64)")
def _prepare_gated(phase, work):
    swiglu(load_i64(phase + X), load_i64(phase + SECOND), load_i64(phase + N_COLS), work)
    _round(phase, work)


@kernel("void(int64, int64, int64)")
def _run(phase, unit, work):
    matrix = phase + MATRICES
    for _ in range(1, load_i64(phase + N_MATRICES)):
        if unit < load_i64(matrix + MATRIX_SIZE + FIRST_UNIT):
            break
        matrix += MATRIX_SIZE
    first = (unit - load_i64(matrix + FIRST_UNIT)) * load_i64(matrix + UNIT_ROWS)
    n_rows = min(load_i64(matrix + UNIT_ROWS), load_i64(matrix + N_ROWS) - first)
    record = work + load_i64(phase + RECORD) if load_i64(matrix + INTEGER) != 0 else work
    out, n_cols = load_i64(matrix + OUT) + 4 * first, load_i64(phase + N_COLS)
    if load_i64(phase + RESIDUAL) == 0:
        gemv(matrix, 0, first, n_rows, n_cols, record, out)
        return
    temporary = work + load_i64(phase + TEMPORARY)
    gemv(matrix, 0, first, n_rows, n_cols, record, temporary)
    scale_add(1.0, temporary, n_rows, out)


@dataclass(frozen=True)
class Input:
    """The vector of a phase: x, or rms_norm(x) * weight, or silu(x) * up; addresses of float32 (n_cols,)."""

    x: int
    norm: int = 0
    epsilon: float = 0.0
    up: int = 0


def unit_rows(weight: Weight, n_bytes: int, n_workers: int) -> int:
    """Rows that a worker takes at a time in a phase of n_bytes of weights, a multiple of 8."""
    wanted = min(_UNIT_BYTES, n_bytes // (_UNITS_PER_WORKER * n_workers))
    return max(8, wanted // weight.row_bytes // 8 * 8)


def rows_phase(input_: Input, matrices: list[tuple[Weight, int]], n_workers: int, residual: bool = False) -> Phase:
    """A phase that computes W x of each (W, address of its float32 output), or adds it there if `residual`.

    Raises QuantError if there are more matrices than a phase holds, or their columns differ.
    """
    n_cols = matrices[0][0].n_cols
    if len(matrices) > MOST_MATRICES or any(weight.n_cols != n_cols for weight, _ in matrices):
        raise QuantError(f"{len(matrices)} matrices do not share a phase")
    n_bytes = sum(weight.n_rows * weight.row_bytes for weight, _ in matrices)
    record = padded(4 * n_cols)
    temporary = record + record_bytes(n_cols)
    rounded = any(weight.format.integer for weight, _ in matrices)
    words, n_units, most_rows = [], 0, 0
    for weight, out in matrices:
        rows = unit_rows(weight, n_bytes, n_workers)
        words += [*weight.fields, weight.n_rows, rows, n_units, out, weight.format.integer]
        n_units += -(-weight.n_rows // rows)
        most_rows = max(most_rows, rows)
    prepare = _prepare_norm if input_.norm else _prepare_gated if input_.up else _prepare_plain
    head = [
        input_.x, input_.norm or input_.up, float_bits(input_.epsilon), n_cols,
        record, rounded, residual, temporary, len(matrices),
    ]  # fmt: skip
    return Phase(prepare.address, _run.address, n_units, [*head, *words], temporary + padded(4 * most_rows))
