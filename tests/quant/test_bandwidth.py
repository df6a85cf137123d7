"""The stream-read kernel: every word is read once, by any number of workers, and the rate is a rate."""

import re
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from quant.errors import QuantError
from quant.threads import bandwidth
from quant.threads.pool import Pool


@pytest.fixture(params=[1, 2, 5])
def pool(request: pytest.FixtureRequest):
    pool = Pool(request.param)
    yield pool
    pool.close()


@pytest.mark.parametrize("n_bytes", [0, 256, 4096, (256 << 10) - 256, (256 << 10) + 256, 3 << 20])
def test_every_word_is_read_once(pool: Pool, n_bytes: int) -> None:
    words = np.random.default_rng(n_bytes).integers(-(2**63), 2**63, n_bytes // 8 + 1, np.int64)
    assert bandwidth.read(pool, words.ctypes.data, n_bytes) == np.bitwise_xor.reduce(words[: n_bytes // 8], initial=0)


def test_a_rest_is_refused_not_skipped(pool: Pool) -> None:
    with pytest.raises(QuantError, match="1000 bytes to read; expected a multiple of 256"):
        bandwidth.read(pool, 0, 1000)
    with pytest.raises(QuantError, match="too little"):
        bandwidth.read_bandwidth(pool, 0, 255)


@pytest.mark.parametrize("as_mapped", [False, True])
def test_no_page_of_the_buffer_is_like_another(pool: Pool, as_mapped: bool) -> None:
    array = bandwidth.buffer(pool, (1 << 20) + 100, as_mapped)
    assert array.ctypes.data % 64 == 0 and array.nbytes == (1 << 20) + 100
    pages = array[: 1 << 20].reshape(-1, 4096)
    assert len(np.unique(pages, axis=0)) == 256
    assert (pages.view(np.int64)[:, ::8] != 0).all()  # every line written to


@pytest.mark.skipif(sys.platform != "linux", reason="smaps is Linux's")
def test_pages_as_of_a_map_are_small(pool: Pool) -> None:
    array = bandwidth.buffer(pool, 64 << 20, as_mapped=True)
    found = re.findall(
        r"^([0-9a-f]+)-([0-9a-f]+) .*?^AnonHugePages: +(\d+)", Path("/proc/self/smaps").read_text(), re.M | re.S
    )
    own = [int(kib) for start, end, kib in found if int(start, 16) <= array.ctypes.data < int(end, 16)]
    assert own == [0]


@pytest.mark.serial
def test_the_rate_is_bytes_by_seconds(pool: Pool) -> None:
    array = bandwidth.buffer(pool, 64 << 20)
    start = time.perf_counter()
    found = bandwidth.read_bandwidth(pool, array.ctypes.data, array.nbytes, passes=4)
    seconds = time.perf_counter() - start
    assert 0 < found.median <= found.best
    # 5 passes took `seconds`; half of the spans are at most as fast as the median, the others at least as slow as best.
    assert 5 * array.nbytes / seconds <= found.best
    # NumPy on one thread reads as fast as a core can; no machine's core is a hundred times as fast as that.
    words = array.view(np.int64)
    start = time.perf_counter()
    words.max()
    assert found.best < 100 * pool.n_workers * array.nbytes / (time.perf_counter() - start)


def test_nothing_is_optimised_away() -> None:
    """The loop holds vector loads: without an effect LLVM would drop it, and report an absurd rate."""
    script = (
        "import tempfile, os; os.environ['LOCALRUN_CACHE'] = tempfile.mkdtemp();"  # no assembly of cached kernels
        "from quant.threads import bandwidth; asm = bandwidth._read.compiled._library.get_asm_str();"
        "print(asm.count('prefetch'), asm.count('xor'))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    n_prefetches, n_xors = map(int, done.stdout.split())
    assert n_prefetches >= 1 and n_xors >= 4, done.stderr
