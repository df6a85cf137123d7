"""Files with interleaved rows (convert --pack) and experts interleaved at load (--repack), against the plain file."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import gguf
import llama_cpp_oracle
import numpy as np
import pytest
import tiny_models
from cases import slow_but
from conversions import plan_for, write_imatrix

import localrun
from cli.main import run
from localrun import hardware
from localrun.bundled import model_path
from localrun.convert import convert
from localrun.convert.mixes import parse_override
from localrun.engine import Engine
from localrun.errors import GGUFError, LocalrunError
from localrun.generate.saved import fingerprint
from localrun.gguf import types as tensor_types
from localrun.gguf.file import Tensor, open_gguf
from quant.formats import registry
from quant.target import isa, tuning

# Integer dot products are the same in both layouts; a step's sums of blocks in float32 are in another order. A token
# alone is 1e-7 off, but where that tips an activation's rounding to 8 bits (one of 20 tokens); through the cache all
# that follow see it. What lies behind is that of another rounding, as steps and prompts of one file are, which are 0.7
# to 1.3% apart: of 40 prompts of 20 tokens the farthest token is 0.4 to 1.1% off.
TOLERANCE, ROUNDING_TOLERANCE = 2e-2, 1e-6
EXPERTS = "blk.1.ffn_up_exps.weight"


@pytest.fixture(autouse=True)
def _paying() -> Iterator[None]:
    """Interleaved rows are made on this CPU, too."""
    with tuning.using(replace(tuning.current(), interleaving_pays=True)):
        yield


@pytest.fixture(scope="module", name="plain")
def plain_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return converted("wide", tmp_path_factory.mktemp("plain") / "plain.gguf")


@pytest.fixture(scope="module")
def packed(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("packed") / "packed.gguf"
    convert(plan_for(plain, path, "Q4_K_M", pack=True))
    return path


def converted(variant: tiny_models.Variant, path: Path) -> Path:
    """A tiny model in the converter's mix."""
    convert(plan_for(tiny_models.shared(variant), path, "Q4_K_M"))
    return path


def logits(path: Path, ids: list[int], **options: object) -> np.ndarray:
    with localrun.load(path, device="cpu", threads=2, ctx=256, **options) as model:
        return model.logits(ids)


def far(found: np.ndarray, expected: np.ndarray) -> float:
    """The largest difference as a fraction of the range."""
    return float(np.abs(found - expected).max() / np.ptp(expected))


def same(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether prompts' logits are: to the bit where both layouts become the same panels."""
    return np.array_equal(found, expected) if isa.has("avx2") else far(found, expected) < TOLERANCE


def close(found: np.ndarray, expected: np.ndarray) -> bool:
    """Whether most logits of tokens alone are."""
    return bool(np.median([far(a, b) for a, b in zip(found, expected, strict=True)]) < ROUNDING_TOLERANCE)


def interleaved_by_hand(blocks: np.ndarray, words: list[tuple[int, int]]) -> np.ndarray:
    """uint8 (rows, blocks, bytes) as the layout says: 16 rows, a block of each, field by field, word by word."""
    out = []
    for top in range(0, len(blocks), 16):
        for column in range(blocks.shape[1]):
            at = 0
            for size, count in words:
                for _ in range(count):
                    out += [blocks[top + row, column, at : at + size] for row in range(16)]
                    at += size
    return np.concatenate(out)


def test_what_is_packed_and_how(plain: Path, packed: Path) -> None:
    """Everything that is multiplied row by row; the plain blocks come from the gguf package."""
    expected = {tensor.name: tensor for tensor in gguf.GGUFReader(plain).tensors}
    with open_gguf(packed) as file:
        found = {name: tensor.type.name for name, tensor in file.tensors.items()}
        blocks = expected[EXPERTS].data.reshape(-1, 1, 144)
        words = [(2, 1), (2, 1), (4, 3), (4, 32)]  # Q4_K: d, dmin, scales, quants
        assert np.array_equal(file.tensors[EXPERTS].data, interleaved_by_hand(blocks, words))
        assert file.file_size == plain.stat().st_size
    by_row = [f"blk.{layer}.attn_{part}_b.weight" for layer in range(3) for part in "kv"]
    for name, tensor in expected.items():
        was = tensor.tensor_type.name
        stays = was not in ("Q4_K", "Q5_K", "Q6_K") or name in ("token_embd.weight", *by_row)
        assert found[name] == (was if stays else f"{was}_R16"), name
    assert found["output.weight"] == "Q6_K_R16"
    assert found["blk.0.attn_q_a.weight"] == "Q4_K_R16"


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["wide", "llama-wide"])
def test_logits_are_the_plain_files(variant: str, tmp_path: Path) -> None:
    plain, ids = converted(variant, tmp_path / "plain.gguf"), tiny_models.prompt(variant)
    convert(plan_for(plain, tmp_path / "packed.gguf", "Q4_K_M", pack=True))
    found = logits(tmp_path / "packed.gguf", ids)
    assert same(found, logits(plain, ids))
    # llama.cpp rounds activations more coarsely (Q8_K): as in test_logits.py for quantised files
    assert far(found, llama_cpp_oracle.logits(plain, ids)) < 0.05


def test_a_session_of_a_packed_file_steps_and_reads_prompts(plain: Path, packed: Path) -> None:
    """Token by token and all at once: the decode step's kernels and the panels'."""
    ids = tiny_models.token_ids("wide", 70)
    greedy = localrun.Sampling(temperature=0.0)
    rows, alone = [], []
    for path in (plain, packed):
        with localrun.load(path, device="cpu", threads=2, ctx=256) as model:
            rows.append(stepped(model, ids[:20]))
            alone.append(singly(model, ids[:20]))
            assert len(list(model.generate(ids, greedy, max_tokens=5))) > 0
    assert far(rows[1], rows[0]) < TOLERANCE
    assert close(alone[1], alone[0])


def test_a_gguf_keeps_its_types(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of a mix that is none of the converter's; no weight is packed anew."""
    types = {"attn": "Q5_K", "_down": "Q6_K", "output": "Q8_0", "": "Q4_K"}
    source, packed, again = tiny_models.shared("wide", type=types), tmp_path / "packed.gguf", tmp_path / "again.gguf"
    assert run(["convert", str(source), str(packed), "--pack"]) == 0
    with open_gguf(source) as before, open_gguf(packed) as after:
        assert all(
            tensor_types.plain(after.tensors[name].type) == tensor.type for name, tensor in before.tensors.items()
        )
        assert {"Q4_K_R16", "Q5_K_R16", "Q6_K_R16"} <= {tensor.type.name for tensor in after.tensors.values()}
        assert dict(before.metadata) == dict(after.metadata)
    assert run(["convert", str(packed), str(again)]) == 0
    for ours, theirs in zip(gguf.GGUFReader(again).tensors, gguf.GGUFReader(source).tensors, strict=True):
        assert ours.tensor_type == theirs.tensor_type
        assert np.array_equal(ours.data, theirs.data)
    assert run(["convert", str(source), str(tmp_path / "x.gguf"), "--pack", "--tensor-type", "attn=Q8_0"]) == 1
    assert "--tensor-type and --imatrix need it" in capsys.readouterr().err


def test_it_can_be_unpacked(plain: Path, packed: Path, tmp_path: Path) -> None:
    for source, mix in ((packed, "Q4_K_M"), (plain, "Q4_K_M"), (packed, "F32"), (plain, "F32")):
        destination = tmp_path / f"{mix} of {source.stem}.gguf"
        convert(plan_for(source, destination, mix, allow_requantize=True))
    for mix in ("Q4_K_M", "F32"):
        found, expected = ((tmp_path / f"{mix} of {source.stem}.gguf").read_bytes() for source in (packed, plain))
        assert found == expected


@pytest.mark.parametrize("split", slow_but([0, 8_000_000], [8_000_000]))
def test_text_is_text(split: int, tmp_path: Path) -> None:
    """The vocabulary is read by llama.cpp, which refuses the file: of a file with its keys alone."""
    plain, greedy, text = model_path("miniature"), localrun.Sampling(temperature=0.0), "Once upon a time"
    convert(plan_for(plain, tmp_path / "x.gguf", "Q5_K_M", pack=True, split_max_bytes=split))
    packed = sorted(tmp_path.glob("x*.gguf"))
    assert (len(packed) > 1) == bool(split)
    replies = []
    for path in (plain, packed[0]):
        with localrun.load(path, threads=2) as model:
            assert model.file.is_interleaved == (path != plain)
            ids = model.tokenizer.encode(text)
            replies.append((ids, model.tokenizer.decode(list(model.generate(ids, greedy, max_tokens=24)))))
    assert replies[0] == replies[1]


def test_other_tools_refuse_it(packed: Path, capfd: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ValueError, match="is not a valid GGMLQuantizationType"):
        gguf.GGUFReader(packed)
    with pytest.raises(llama_cpp_oracle.OracleError):
        llama_cpp_oracle.logits(packed, [1, 2])
    assert run(["generate", str(packed), "-p", "x", "--backend", "llama.cpp"]) == 1
    assert capfd.readouterr().err == f"localrun: {packed}: has interleaved rows, which only the native backend reads\n"


def test_a_damaged_scale_is_found(packed: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_gguf(packed) as file:
        offset = file.tensors[EXPERTS].data.ctypes.data - file.spans[0][0]
    data = bytearray(packed.read_bytes())
    data[offset + 2 * 5 : offset + 2 * 5 + 2] = b"\x00\x7e"  # d of the block in row 5
    broken = tmp_path / "broken.gguf"
    broken.write_bytes(data)
    assert run(["inspect", str(broken), "--verify"]) == 1
    assert f"tensor '{EXPERTS}' (Q4_K_R16): the scale of block 5 " in "".join(capsys.readouterr())
    assert run(["inspect", str(packed), "--verify", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["types"]["Q4_K_R16"]["tensors"] > 0


def test_rows_must_be_whole_groups(tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "x.gguf", "llama")
    info = np.zeros((24, 144), np.uint8)
    writer.add_tensor_info("x", (24, 256), np.dtype(np.float32), info.nbytes, tensor_types.InterleavedType.Q4_K_R16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with (tmp_path / "x.gguf").open("ab") as file:
        file.write(bytes(8192))
    with pytest.raises(GGUFError, match="expected a multiple of 16 rows for Q4_K_R16"):
        open_gguf(tmp_path / "x.gguf")


def test_rows_that_are_read_singly_must_be_plain(packed: Path, tmp_path: Path) -> None:
    """A table of embeddings whose header says that it is interleaved."""
    data, name = bytearray(packed.read_bytes()), b"token_embd.weight"
    at = data.index(name) + len(name) + 4 + 2 * 8  # number of dimensions, and these
    assert int.from_bytes(data[at : at + 4], "little") == gguf.GGMLQuantizationType.Q4_K
    data[at : at + 4] = tensor_types.InterleavedType.Q4_K_R16.to_bytes(4, "little")
    (tmp_path / "x.gguf").write_bytes(data)
    with pytest.raises(LocalrunError, match=r"tensor 'token_embd\.weight' has type Q4_K_R16, not native"):
        localrun.load(tmp_path / "x.gguf", threads=1)


# --- at load


def test_repacked_experts(plain: Path, packed: Path) -> None:
    ids = tiny_models.prompt("wide")
    with localrun.load(plain, device="cpu", threads=2, ctx=256) as model:
        expected, alone = stepped(model, ids), singly(model, ids)
    with localrun.load(plain, device="cpu", threads=2, ctx=256, repack=True) as model:
        types = {name: tensor.type.name for name, tensor in model.file.tensors.items() if "_exps" in name}
        assert types
        assert all(type_.endswith("_R16") for type_ in types.values())
        assert not any(t.type.name.endswith("_R16") for n, t in model.file.tensors.items() if "_exps" not in n)
        assert same(model.logits(ids), logits(plain, ids))
        assert far(stepped(model, ids), expected) < TOLERANCE
        assert close(singly(model, ids), alone)


@pytest.mark.parametrize("type_", ["IQ1_S", "IQ1_M"])
def test_widened_experts(type_: str, tmp_path: Path) -> None:
    """Even where interleaving does not pay, and then no others."""
    ids, plain, lines = tiny_models.prompt("wide"), tmp_path / "plain.gguf", []
    overrides = [parse_override(f"ffn_(gate|up)_exps={type_}")]
    source = tiny_models.shared("wide")
    with open_gguf(source) as file:
        shapes = {n: t.shape for n, t in file.tensors.items() if n.endswith(("gate_exps.weight", "up_exps.weight"))}
    importances = {name: np.ones((shape[0], shape[2])) for name, shape in shapes.items()}
    counts = {name: np.ones((shape[0], 1)) for name, shape in shapes.items()}
    imatrix = write_imatrix(tmp_path / "i.gguf", importances, counts)
    convert(plan_for(source, plain, "Q4_K_M", overrides=overrides, imatrix=imatrix))
    with localrun.load(plain, device="cpu", threads=2, ctx=256) as model:
        expected, of_steps, alone = model.logits(ids), stepped(model, ids), singly(model, ids)
    with (
        tuning.using(replace(tuning.current(), interleaving_pays=False)),
        localrun.load(plain, device="cpu", threads=2, ctx=256, repack=True, notice=lines.append) as model,
    ):
        laid_out = {name: t for name, t in model.file.tensors.items() if t.type.name.endswith("_R16")}
        assert same(model.logits(ids), expected)
        assert far(stepped(model, ids), of_steps) < TOLERANCE
        assert close(singly(model, ids), alone)
    with open_gguf(plain) as file:
        assert {name for name, t in file.tensors.items() if t.type.name == type_} == set(laid_out)
        for name, tensor in laid_out.items():
            assert np.array_equal(unpacked(tensor), unpacked(file.tensors[name]))
    assert laid_out
    assert not any("no effect" in line for line in lines)


def stepped(model: Engine, ids: list[int]) -> np.ndarray:
    """Logits, a token at a time."""
    cache = model.new_cache()
    return np.array([model.model.forward([token], cache)[0] for token in ids])


def singly(model: Engine, ids: list[int]) -> np.ndarray:
    """Logits of each token alone."""
    return np.array([model.model.forward([token], model.new_cache())[0] for token in ids])


def unpacked(tensor: Tensor) -> np.ndarray:
    """float32, of its shape."""
    format_ = registry.get(tensor.type.name)
    return format_.unpack(tensor.data.reshape(*tensor.shape[:2], -1)).reshape(tensor.shape)


def test_sessions_are_good_for_both(plain: Path, tmp_path: Path) -> None:
    with localrun.load(plain, threads=1, repack=True) as model:
        name = fingerprint(model)
    with localrun.load(plain, threads=1) as model:
        assert fingerprint(model) == name


def test_only_what_fits_is_repacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Room for the experts of one of the two layers, and then for none."""
    plain = converted(replace(tiny_models.VARIANTS["wide"], first_k_dense_replace=0), tmp_path / "plain.gguf")
    with open_gguf(plain) as file:
        sizes = {layer: sum(t.n_bytes for n, t in file.tensors.items() if f"blk.{layer}.ffn_" in n and "_exps" in n)
                 for layer in (0, 1)}  # fmt: skip
    with localrun.load(plain, threads=1, ctx=64) as model:
        rest = model.placement.needed["RAM"] - sum(sizes.values())
    for free, count in ((sizes[0] + sizes[1] - 1, 1), (sizes[0] - 1, 0)):
        monkeypatch.setattr(hardware, "free_ram", lambda free=free: free + rest + (1 << 29))
        lines: list[str] = []
        with localrun.load(plain, threads=1, ctx=64, repack=True, notice=lines.append) as model:
            done = {n for n, t in model.file.tensors.items() if t.type.name.endswith("_R16")}
        assert len(done) == 3 * count
        assert any(line.startswith(f"--repack: experts of {count} of 2 layers; ") for line in lines)


def test_where_it_does_not_pay_rows_stay_as_they_are(
    plain: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    why, lines = f"on this CPU ({tuning.cpu()}) replies are no faster with interleaved rows", []
    with tuning.using(replace(tuning.current(), interleaving_pays=False)):
        with localrun.load(plain, threads=1, ctx=64, repack=True, notice=lines.append) as model:
            assert not any(isinstance(t.type, tensor_types.InterleavedType) for t in model.file.tensors.values())
        assert f"--repack has no effect: {why}" in lines
        assert run(["convert", str(plain), str(tmp_path / "x.gguf"), "--pack"]) == 0
    assert f"localrun: --pack has no effect: {why}" in capsys.readouterr().err
    with open_gguf(plain) as before, open_gguf(tmp_path / "x.gguf") as after:
        assert {name: t.type for name, t in after.tensors.items()} == {
            name: t.type for name, t in before.tensors.items()
        }


def test_nothing_to_repack(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["generate", "smollm2", "-p", "x", "-n", "1", "--repack"]) == 0
    assert "--repack has no effect: no routed experts" in capsys.readouterr().err
    assert run(["generate", "smollm2", "-p", "x", "-n", "1", "--repack", "--backend", "llama.cpp"]) == 0
    assert "llama.cpp lays weights out itself: --repack has no effect" in capsys.readouterr().err


def test_the_gpu_takes_plain_rows_only(plain: Path, packed: Path) -> None:
    with pytest.raises(LocalrunError, match="--repack with device 'cuda': interleaved rows run on the CPU only"):
        localrun.load(plain, device="cuda", repack=True)
    with pytest.raises(LocalrunError, match="device 'cuda': interleaved rows run on the CPU only"):
        localrun.load(packed, device="cuda")


def test_a_failed_repacking_ends_its_threads(plain: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import threading

    from localrun.cpu import repack

    def fail(*_: object) -> None:
        raise MemoryError

    monkeypatch.setattr(repack, "interleave", fail)
    before = threading.active_count()
    with pytest.raises(MemoryError):
        localrun.load(plain, threads=2, repack=True)
    assert threading.active_count() == before
    assert os.path.exists(plain)
