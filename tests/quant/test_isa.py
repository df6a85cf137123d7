"""ISA levels: detection, forcing, and kernel tests again at every level that this CPU can be limited to."""

import levels
import pytest
from paths import TESTS

from quant.target import isa


def test_detected_level_has_all_its_features():
    assert isa.FEATURES[isa.detect()] <= isa.host_features()


def run_marked(level: str, *options: str) -> None:
    """The tests marked `levels`, in one process, which compiles each kernel once."""
    done = levels.run(level, "-m", "pytest", "-q", "-x", "-n0", "-p", "no:cacheprovider", "-m", "levels", *options)
    assert done.returncode == 0, done.stdout[-3000:]


# The slow test has these at the next lower level: packing is compared in test_quantize.py anyway, experts are products
# of the same kernels, and files with interleaved rows are made by those who ask for them.
LEFT_OUT = [f"--ignore={TESTS / 'quant' / name}" for name in ("test_quantize.py", "test_experts.py", "test_r16.py")]
LEFT_OUT_WITHOUT_VECTORS = LEFT_OUT[1:]


@pytest.mark.first
@levels.next_lower
def test_a_sample_at_a_lower_level(level: str) -> None:
    """Kernels, each with one of the sizes that its tests know. Whole steps and all levels are the slow test's."""
    run_marked(level, "--sample", "factories", *LEFT_OUT, str(TESTS / "quant"))


@pytest.mark.slow
@pytest.mark.first
@levels.lower
def test_steps_and_packing_at_a_lower_level(level: str) -> None:
    """One of each kind, as the source that deals with sizes is the same; without vectors that of formats is, too."""
    options = ["factories", *LEFT_OUT_WITHOUT_VECTORS] if level == "generic" else ["formats"]
    run_marked(level, "--sample", *options, str(TESTS / "quant"), str(TESTS / "localrun" / "cpu"))


@levels.lower
def test_a_forced_level_narrows_the_compile_target(level, tmp_path):
    """AVX-512 registers must not appear in kernels for AVX2, nor AVX ones in generic kernels."""
    # An empty kernel cache: Numba shows no assembly of cached kernels.
    script = (
        "from quant.target import isa; from quant.formats import q8_0;"
        "asm = q8_0._gemv.compiled._library.get_asm_str();"
        "print(isa.LEVEL, 'zmm' in asm, 'ymm' in asm)"
    )
    expected = {"generic": "generic False False", "avx2": "avx2 False True", "avx512_vnni": "avx512_vnni"}
    done = levels.run(level, "-c", script, LOCALRUN_CACHE=str(tmp_path))
    assert done.stdout.strip().startswith(expected[level]), done.stderr


@pytest.mark.parametrize("level", ["sse9", "amx" if isa.detect() != "amx" else "none"])
def test_levels_that_are_not_there_are_refused(level):
    done = levels.run(level, "-c", "import quant.target.isa")
    assert done.returncode == 1
    assert f"QuantError: LOCALRUN_ISA={level}" in done.stderr.splitlines()[-1]
