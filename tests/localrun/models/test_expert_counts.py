"""Experts' usage from importance matrices: counts against transformers' routers, what is placed by them, bad files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import gguf
import hf_oracle
import numpy as np
import pytest
import tiny_models
import torch

import localrun
from cli.main import run
from localrun.errors import GGUFError
from localrun.gguf.file import open_gguf
from localrun.measure import imatrix
from localrun.models.expert_counts import read_usage
from localrun.models.reader import read_config
from localrun.placement import available, devices
from localrun.placement.available import Gpu
from localrun.placement.devices import DeviceRequest
from localrun.placement.placement import GPU, Placement

N_CTX = 20
GIB = 1 << 30


@pytest.fixture(scope="module")
def collected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny V3's importances of two chunks of text."""
    path = tmp_path_factory.mktemp("usage") / "v3.gguf"
    with localrun.load(tiny_models.shared("v3"), threads=2, device="cpu") as engine:
        imatrix.write(path, imatrix.collect(engine, tiny_models.prompt("v3")[: 2 * N_CTX], N_CTX), "random ids")
    return path


def chosen_by_transformers(variant: str) -> dict[int, list[int]]:
    """Layer -> how often its router sends a token to each expert, in the same two chunks."""
    model, counts = hf_oracle.model(tiny_models.shared(variant)), {}
    for index, layer in enumerate(model.model.layers):
        if hasattr(layer.mlp, "experts"):
            n_experts = len(layer.mlp.experts.down_proj)

            def look(_: torch.nn.Module, args: tuple, index: int = index, n_experts: int = n_experts) -> None:
                here = np.bincount(args[1].numpy().ravel(), minlength=n_experts)
                counts[index] = here + counts.get(index, 0)

            layer.mlp.experts.register_forward_pre_hook(look)
    ids = tiny_models.prompt(variant)
    with torch.no_grad():
        for start in (0, N_CTX):
            model(torch.tensor([ids[start : start + N_CTX]]))
    return {index: each.tolist() for index, each in counts.items()}


def test_counts_are_the_routers_choices(collected: Path) -> None:
    expected = chosen_by_transformers("v3")
    assert read_usage(collected, list(expected), 16) == expected
    assert all(sum(counts) == 2 * N_CTX * 4 and min(counts) < max(counts) for counts in expected.values())


def placed(monkeypatch: pytest.MonkeyPatch, free: int, **where: object) -> Placement:
    """On a card with so much memory."""
    card = Gpu("Acme 5000", (8, 9), 24 * GIB, free, "570.86", "12.8")
    monkeypatch.setattr(available, "find", lambda *at: card)
    with open_gguf(tiny_models.shared("v3")) as file:
        return devices.choose(DeviceRequest("cuda", **where), file, read_config(file), 64, False, pytest.fail)


def test_the_most_used_experts_go_to_the_gpu(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = chosen_by_transformers("v3")
    some = placed(monkeypatch, 20 * GIB, gpu_experts=3, expert_usage=collected)
    for layer, counts in usage.items():
        here = some.experts[layer]
        assert len(here) == 3 and min(counts[e] for e in here) >= max(counts[e] for e in set(range(16)) - set(here))
    # Room for 10 of all layers' experts: none of those left out is used more than one of these.
    whole = placed(monkeypatch, 20 * GIB)
    expert = whole.n_bytes("VRAM", "routed experts") // (len(usage) * 16)
    free = whole.needed["VRAM"] - len(usage) * 16 * expert + 10 * expert
    few = placed(monkeypatch, free, expert_usage=collected)
    here = {(layer, e) for layer, ids in few.experts.items() for e in ids}
    assert len(here) == 10
    count = {(layer, e): n for layer, counts in usage.items() for e, n in enumerate(counts)}
    assert min(count[each] for each in here) >= max(count[each] for each in count.keys() - here)
    assert few.device == GPU and any(0 < len(ids) < 16 for ids in few.experts.values())


# --- files that are none


def rewritten(change: Callable[[str, np.ndarray], np.ndarray | None], kind: str = "imatrix") -> Callable[..., Path]:
    """Makes an importance matrix whose tensors are changed, or left out."""

    def make(collected: Path, path: Path) -> Path:
        writer = gguf.GGUFWriter(path, "")
        writer.kv_data[0].clear()
        writer.add_string("general.type", kind)
        with open_gguf(collected) as file:
            for name, tensor in file.tensors.items():
                data = change(name, tensor.data.view(np.float32).reshape(tensor.shape))
                if data is not None:
                    writer.add_tensor(name, np.ascontiguousarray(data))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return path

    return make


def as_text(collected: Path, path: Path) -> Path:
    path.write_text("layer 1: 3 5 8")
    return path


def _counts_as(data: Callable[[np.ndarray], np.ndarray]) -> Callable[[str, np.ndarray], np.ndarray]:
    return lambda name, x: data(x) if name == "blk.3.ffn_down_exps.weight.counts" else x


BAD = {
    "no such file": (lambda collected, path: path, "no such file"),
    "a model": (lambda collected, path: tiny_models.shared("v3"), "is no importance matrix: key 'general.type' is"),
    "another type": (rewritten(lambda name, x: x, "adapter"), "key 'general.type' is 'adapter', expected 'imatrix'"),
    "text": (as_text, "GGUF"),
    "a layer less": (
        rewritten(lambda name, x: None if name.startswith("blk.3.") else x),
        "counts experts of layer 4; this model has them in 2 layers, 3 to 4",
    ),
    "a dense model's": (
        rewritten(lambda name, x: None if "exps" in name else x), "counts experts of no layer; this model has them in"
    ),
    "fewer experts": (
        rewritten(_counts_as(lambda x: x[:8])),
        "'blk.3.ffn_down_exps.weight.counts' is F32 of shape (8, 1), expected F32 of shape (16, 1)",
    ),
    "halves": (rewritten(_counts_as(lambda x: x.astype(np.float16))), "is F16 of shape (16, 1), expected F32"),
    "no numbers": (rewritten(_counts_as(lambda x: x * np.nan)), "holds numbers that are no counts"),
    "below 0": (rewritten(_counts_as(lambda x: x - 1e6)), "holds numbers that are no counts"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_profile_of_the_model(
    name: str, collected: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Said before anything is loaded, whether there is a GPU that would heed it or not."""
    make, message = BAD[name]
    path = make(collected, tmp_path / "used.gguf")
    with pytest.raises(GGUFError) as error:
        read_usage(path, [3, 4], 16)
    assert message in str(error.value) and str(path) in str(error.value)
    assert run(["generate", str(tiny_models.shared("v3")), "-p", "x", "--expert-usage", str(path)]) == 1
    assert capsys.readouterr() == ("", f"localrun: {error.value}\n")


def test_an_option_without_effect_says_so(collected: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notices: list[str] = []
    monkeypatch.setattr(available, "card", lambda *at: "")
    with open_gguf(tiny_models.shared("v3")) as file:
        where = DeviceRequest(expert_usage=collected)
        assert devices.choose(where, file, read_config(file), 64, False, notices.append).device == "cpu"
    assert len(notices) == 1 and "--expert-usage" in notices[0] and "no effect" in notices[0]
