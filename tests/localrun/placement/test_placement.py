"""Who lives where: every byte once, nothing above a limit, the most useful experts in VRAM, refusals that help.

The golden tables (tests/golden/placement.json) hold what is placed on common cards for three models. Written by

    PYTHONPATH=tests/support python tests/localrun/placement/test_placement.py

and a change of them is a change of what users get: read the difference before it is committed.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

import pytest
import tiny_models
from hypothesis import given, settings
from hypothesis import strategies as st
from paths import TESTS

from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.models.config import Config
from localrun.models.reader import read_config
from localrun.placement import memory_table, placement, sizes
from localrun.placement.context_fit import refusal, settings_that_fit
from localrun.placement.placement import DraftFile, Request, lay_out
from localrun.plan.shapes import ModelShape, load_model

GIB = 1 << 30
GOLDEN = TESTS / "golden" / "placement.json"
CARDS = (8, 12, 16, 24, 32, 48)  # GB
SEVERAL = ((12, 12), (8, 24), (16, 16, 16))
DRIVER = 0.6 * GIB  # what the planner's machines take for it
RAM_OF = {"deepseek-v2-lite": 16 * GIB, "deepseek-v3": 512 * GIB, "kimi-k2": 640 * GIB}


@cache
def shape(name: str) -> ModelShape:
    return load_model(name)


def request(name: str = "deepseek-v3", vram_gib: float | None = 24, **changes: Any) -> Request:
    model = shape(name)
    vram = None if vram_gib is None else int(vram_gib * GIB)
    return replace(Request(model.tensors, model.config, 4096, ram=RAM_OF[name], vram=vram), **changes)


@dataclass(frozen=True)
class Plain:
    """A tensor of a model made up."""

    name: str
    n_bytes: int
    shape: tuple[int, ...] = ()


CONFIG = Config(
    architecture="deepseek2",
    attention="mla",
    rope="pairs",
    hidden_size=64,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=2,
    vocab_size=100,
    max_position_embeddings=4096,
    rms_norm_eps=1e-6,
    rope_theta=1e4,
    rope_scaling=None,
    qk_rope_head_dim=8,
    v_head_dim=16,
    kv_lora_rank=24,
    qk_nope_head_dim=16,
    n_routed_experts=4,
    num_experts_per_tok=2,
    moe_intermediate_size=32,
)
BASE = sizes.gpu_work_bytes(CONFIG) + sizes.RESERVE_BYTES  # of VRAM, whatever the tensors


def toy(*expert_bytes: int, vram: int, others: int = 0, **changes: Any) -> Request:
    """Four experts a layer of so many bytes each in layers 1, 2, ..., and `others` bytes of attention; 1 token."""
    tensors = [Plain("blk.0.attn_output.weight", others)]
    tensors += [Plain(f"blk.{i}.ffn_up_exps.weight", 4 * size) for i, size in enumerate(expert_bytes, 1)]
    vram += BASE + CONFIG.kv_bytes_per_token
    return replace(Request(tuple(tensors), CONFIG, 1, ram=1 << 40, vram=vram), **changes)


# --- who goes where


def home_by_rule(name: str, n_layers: int) -> str:
    """The issue's rule, without experts in VRAM."""
    layer = re.match(r"blk\.(\d+)\.", name)
    return "cpu" if "_exps." in name or (layer and int(layer[1]) >= n_layers) else "cuda"


@pytest.mark.parametrize("name", RAM_OF)
def test_only_routed_experts_and_the_prediction_layer_stay_in_ram(name: str) -> None:
    found = lay_out(request(name, gpu_experts=0))
    n_layers = shape(name).config.num_hidden_layers
    assert dict(found.tensors) == {t.name: home_by_rule(t.name, n_layers) for t in shape(name).tensors}
    assert found.device == "cuda" and not any(found.experts.values())


@pytest.mark.parametrize("variant", tiny_models.VARIANTS)
@pytest.mark.parametrize("vram", [None, 0, 600 << 20, 1 << 34])
def test_every_byte_of_a_file_is_in_one_place(variant: str, vram: int | None) -> None:
    """Split or joint kv_b, tied heads, prediction layers, fused gates; weights in VRAM and RAM sum to the file's."""
    with open_gguf(tiny_models.shared(variant)) as file:
        tensors, config = tuple(file.tensors.values()), read_config(file)
        for mtp in (False, True):
            found = lay_out(Request(tensors, config, 64, ram=GIB, vram=vram, mtp=mtp))
            assert set(found.tensors) == set(file.tensors)
            total = weight_bytes(found)
            unused = sum(t.n_bytes for t in tensors if is_nextn(t.name, config))
            assert total == sum(t.n_bytes for t in tensors) - (0 if mtp else unused)
            by_home = {home: sum(t.n_bytes for t in tensors if found.tensors[t.name] == home) for home in ("cuda",)}
            assert by_home["cuda"] <= weight_bytes(found, "VRAM")


def is_nextn(name: str, config: Config) -> bool:
    layer = re.match(r"blk\.(\d+)\.", name)
    return layer is not None and int(layer[1]) >= config.num_hidden_layers


def weight_bytes(found: placement.Placement, *where: str) -> int:
    """Of all rows that are weights, the head that is read twice left out."""
    besides = {
        "KV cache",
        memory_table.MARKS,
        "work memory",
        "reserve",
        "the runner itself",
        "head, for multi-token prediction",
    }
    return sum(row.n_bytes for row in found.rows if row.what not in besides and (not where or row.where in where))


def test_a_tied_head_is_counted_once() -> None:
    with open_gguf(tiny_models.shared("v3-tied")) as file:
        found = lay_out(Request(tuple(file.tensors.values()), read_config(file), 64, ram=GIB, vram=GIB))
        assert found.n_bytes("VRAM", "head") == file.tensors["token_embd.weight"].n_bytes
        assert found.n_bytes("VRAM", "embedding") == 0 and found.tensors["token_embd.weight"] == "cuda"


def test_a_prediction_layer_without_a_head_needs_the_models_in_ram() -> None:
    """The one thing that is in both memories, and only while drafts are made."""
    tensors = (Plain("token_embd.weight", 10), Plain("output.weight", 20), Plain("blk.4.nextn.eh_proj.weight", 5))
    asked = Request(tensors, CONFIG, 1, ram=GIB, vram=GIB, mtp=True)
    assert lay_out(asked).n_bytes("RAM", "head, for multi-token prediction") == 20
    assert lay_out(asked).n_bytes("RAM", "multi-token prediction") == 5
    own = (*tensors, Plain("blk.4.nextn.shared_head_head.weight", 7))
    assert lay_out(replace(asked, tensors=own)).n_bytes("RAM", "head, for multi-token prediction") == 0
    tied = tuple(t for t in tensors if t.name != "output.weight")
    assert lay_out(replace(asked, tensors=tied)).n_bytes("RAM", "head, for multi-token prediction") == 10
    for quiet in (replace(asked, mtp=False), replace(asked, vram=None)):
        assert lay_out(quiet).n_bytes("RAM", "head, for multi-token prediction") == 0
    assert lay_out(replace(asked, mtp=False)).n_bytes("RAM", "multi-token prediction") == 0


@pytest.mark.parametrize("needs_head", [True, False])
def test_what_drafts_from_a_file_of_its_own_is_in_ram(needs_head: bool) -> None:
    """Whatever the model's file has for multi-token prediction stays on the disk."""
    tensors = (Plain("token_embd.weight", 10), Plain("output.weight", 20), Plain("blk.4.nextn.eh_proj.weight", 5))
    asked = Request(tensors, CONFIG, 1, ram=GIB, vram=GIB, mtp=True, draft_file=DraftFile(7, needs_head))
    for vram, head in ((GIB, 20 * needs_head), (None, 0)):
        found = lay_out(replace(asked, vram=vram))
        assert found.n_bytes("RAM", "multi-token prediction") == 7
        assert found.n_bytes("RAM", "head, for multi-token prediction") == head


@pytest.mark.parametrize("vram_gib", [None, 24])
def test_of_shared_experts_a_rank_has_its_part(vram_gib: float | None) -> None:
    """But of layers in VRAM all, of which other ranks have nothing; of what drafts its part, too."""
    whole, part = (lay_out(request(vram_gib=vram_gib, mtp=True, share=share)) for share in (1.0, 0.25))
    assert part.experts == whole.experts and any(whole.experts.values()) == (vram_gib is not None)
    assert part.n_bytes("VRAM", "routed experts") == whole.n_bytes("VRAM", "routed experts")
    in_ram = whole.n_bytes("RAM", "routed experts")
    assert part.n_bytes("RAM", "routed experts") == pytest.approx(in_ram / 4, abs=1)
    drafts = sum(t.n_bytes for t in shape("deepseek-v3").groups()["mtp"] if "_exps" in t.name)
    saved = [each.n_bytes("RAM", "multi-token prediction") for each in (whole, part)]
    assert saved[0] - saved[1] == pytest.approx(0.75 * drafts, abs=1)


def test_without_a_gpu_all_is_in_ram() -> None:
    found = lay_out(request(vram_gib=None, cache_bits=8))
    assert set(found.tensors.values()) == {"cpu"} and found.device == "cpu" and list(found.needed) == ["RAM"]
    assert found.n_bytes("RAM", "KV cache") == 4096 * 61 * (512 + 4 + 2 * 64) and found.cache_bits == 8


# --- bytes


def test_v3_by_hand() -> None:
    """16 G weights beside the experts (11.4 + 2.6 + 1.2 + 0.93, and 0.93 of embedding), 70,272 bytes a token."""
    found = lay_out(request(gpu_experts=0))
    n_weights = 256 * 2048 * 7168  # of a layer's gate, up or down
    q4_k, q6_k = n_weights * 144 // 256, n_weights * 210 // 256  # 26 of 58 layers have down at Q6_K
    weights = sum(
        row.n_bytes for row in found.rows if row.where == "VRAM" and row.what not in ("work memory", "reserve")
    )
    assert found.n_bytes("VRAM", "KV cache") == 4096 * 70_272
    assert weights - 4096 * 70_272 == sum(
        t.n_bytes for t in shape("deepseek-v3").tensors if home_by_rule(t.name, 61) == "cuda"
    )
    assert found.n_bytes("RAM", "routed experts") == 58 * 3 * q4_k + 26 * (q6_k - q4_k)


def test_a_cache_of_128k_tokens_fits_24_gb() -> None:
    found = lay_out(request(ctx=131_072))
    assert found.n_bytes("VRAM", "KV cache") == 131_072 * 70_272 == 9_210_691_584  # the 9.2 GB of the paper's table


@pytest.mark.parametrize(("bits", "n_bytes"), [(16, 61 * 576 * 2), (8, 61 * (512 + 2 * 64 + 4))])
def test_cache_bits(bits: int, n_bytes: int) -> None:
    assert sizes.gpu_cache_bytes(shape("deepseek-v3").config, bits, 1) == n_bytes
    for batch in (1, 3):
        found = lay_out(request(cache_bits=bits, batch=batch, ctx=100, gpu_experts=0))
        assert found.n_bytes("VRAM", "KV cache") == 100 * batch * n_bytes


@pytest.mark.parametrize("bits", [16, 8])
def test_the_cache_of_sparse_attention(bits: int) -> None:
    """Keys of the indexers have 16 bits, whatever the latents have."""
    config = shape("deepseek-v3").config
    sparse = replace(config, index_head_dim=128, index_n_heads=64, index_topk=2048, indexer_types=("full",) * 61)
    more = sizes.gpu_cache_bytes(sparse, bits, 10) - sizes.gpu_cache_bytes(config, bits, 10)
    assert placement.runs_on_gpu(sparse) and more == 10 * 61 * 256


def test_the_cache_of_pooled_rows() -> None:
    """V4-Flash: 6,880 bytes a token beside 12.2 MB of rings and 14 MB of spare rows; marks, which are in RAM."""
    model = load_model("deepseek-v4-flash")
    found = lay_out(Request(model.tensors, model.config, 131_072, ram=200 * GIB, vram=24 * GIB, gpu_experts=0))
    assert placement.runs_on_gpu(model.config) and not found.short
    assert found.n_bytes("VRAM", "KV cache") == model.config.kv_bytes(131_072) >= 131_072 * 6880
    assert found.n_bytes("RAM", memory_table.MARKS) == sizes.mark_bytes(model.config, 131_072) > 0


def test_the_cache_of_grouped_attention() -> None:
    model = load_model("llama-3.1-405b")
    assert sizes.gpu_cache_bytes(model.config, 16, 1) == 516_096
    assert not placement.runs_on_gpu(model.config) and placement.runs_on_gpu(shape("kimi-k2").config)
    windows = load_model("gpt-oss-20b").config  # in half of 24 layers, of 128 tokens and 2048 more; 2048 bytes a token
    assert placement.runs_on_gpu(windows)
    assert sizes.gpu_cache_bytes(windows, 16, 131_072) == 12 * 2048 * (131_072 + 2176)
    model = load_model("qwen3-30b-a3b")
    assert placement.runs_on_gpu(model.config) and sizes.gpu_cache_bytes(model.config, 16, 1) == 98_304
    both = {"tensors": model.tensors, "config": model.config, "ctx": 64, "ram": 1 << 40, "vram": 1 << 40}
    assert lay_out(Request(**both)).n_bytes("VRAM", "KV cache") == 64 * 98_304
    with pytest.raises(LocalrunError, match="a cache of 8 bits on a GPU is for latent attention"):
        lay_out(Request(**both, cache_bits=8))
    on_cpu = lay_out(Request(**both | {"vram": None}, cache_bits=8))
    assert on_cpu.n_bytes("RAM", "KV cache") == 64 * 48 * 2 * 4 * (128 + 4)


# --- experts in VRAM


@pytest.mark.parametrize(
    ("room", "layers"),
    [(0, []), (39, []), (40, [1]), (79, [1]), (80, [1, 2]), (119, [1, 2]), (120, [1, 2, 3]), (10**6, [1, 2, 3])],
)
def test_whole_layers_while_there_is_room(room: int, layers: list[int]) -> None:
    found = lay_out(toy(10, 10, 10, vram=room))
    assert dict(found.experts) == {i: (0, 1, 2, 3) if i in layers else () for i in (1, 2, 3)}
    assert found.n_bytes("VRAM", "routed experts") == 40 * len(layers)
    assert found.n_bytes("RAM", "routed experts") == 40 * (3 - len(layers))


def test_a_smaller_layer_may_fit_where_a_larger_does_not() -> None:
    assert [i for i, ids in lay_out(toy(10, 5, 4, vram=38)).experts.items() if ids] == [2, 3]


def test_the_most_used_experts_of_all_layers() -> None:
    usage = {1: [5, 0, 9, 1], 2: [0, 8, 0, 7]}
    found = lay_out(toy(10, 10, 10, vram=35, usage=usage))
    assert dict(found.experts) == {1: (2,), 2: (1, 3), 3: ()}
    assert found.tensors["blk.1.ffn_up_exps.weight"] == "both" and found.tensors["blk.3.ffn_up_exps.weight"] == "cpu"
    everything = lay_out(toy(10, 10, 10, vram=120, usage=usage))
    assert set(everything.tensors.values()) == {"cuda"}


def test_so_many_of_each_layer() -> None:
    asked = toy(10, 10, 10, vram=60, gpu_experts=2)
    assert dict(lay_out(asked).experts) == dict.fromkeys((1, 2, 3), (0, 1))
    used = replace(asked, usage={1: [5, 0, 9, 1], 2: [0, 8, 0, 7]})
    assert dict(lay_out(used).experts) == {1: (0, 2), 2: (1, 3), 3: (0, 1)}  # ties by number
    assert dict(lay_out(replace(asked, gpu_experts=4)).experts) == dict.fromkeys((1, 2, 3), (0, 1, 2, 3))


def test_a_cache_of_experts_has_slots_in_every_layer_and_all_experts_in_ram() -> None:
    asked = toy(10, 10, 10, vram=65, expert_cache=True, usage={1: [5, 0, 9, 1], 2: [0, 8, 0, 7]})
    found = lay_out(asked)
    assert found.expert_slots == 2 and dict(found.experts) == {1: (0, 2), 2: (1, 3), 3: (0, 1)}
    assert (found.n_bytes("VRAM", "routed experts"), found.n_bytes("RAM", "routed experts")) == (60, 120)
    assert {found.tensors[f"blk.{i}.ffn_up_exps.weight"] for i in (1, 2, 3)} == {"cpu"}
    assert lay_out(replace(asked, gpu_experts=1)).expert_slots == 1
    for changes in (
        {"gpu_experts": 0},
        {"gpu_experts": 4},
        {"vram": asked.vram - 36},
    ):  # none, all, no room for one each
        other = lay_out(replace(asked, **changes))
        assert other.expert_slots == 0
        assert other.n_bytes("VRAM", "routed experts") + other.n_bytes("RAM", "routed experts") == 120
    assert settings_that_fit(replace(asked, gpu_experts=3))[0] == "--gpu-experts cache:2"
    assert "--gpu-experts auto" in settings_that_fit(replace(asked, ram=lay_out(asked).needed["RAM"] - 50))


@settings(max_examples=60)
@given(
    sizes=st.lists(st.integers(1, 50), min_size=1, max_size=3),
    room=st.integers(0, 700),
    counts=st.none() | st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=3, max_size=3),
)
def test_room_is_used_and_never_exceeded(sizes: list[int], room: int, counts: list[list[int]] | None) -> None:
    usage = None if counts is None else dict(zip(range(1, len(sizes) + 1), counts, strict=False))
    found = lay_out(toy(*sizes, vram=room, usage=usage))
    in_vram = found.n_bytes("VRAM", "routed experts")
    assert in_vram <= room and not found.short
    assert in_vram + found.n_bytes("RAM", "routed experts") == 4 * sum(sizes)
    if usage is None:
        left_out = [4 * size for i, size in enumerate(sizes, 1) if not found.experts[i]]
    else:
        left_out = [size for i, size in enumerate(sizes, 1) if len(found.experts[i]) < 4]
    assert all(size > room - in_vram for size in left_out)
    assert lay_out(toy(*sizes, vram=room + 1, usage=usage)).n_bytes("VRAM", "routed experts") >= in_vram or usage


# --- refusals


def test_what_fits_is_not_refused() -> None:
    assert refusal(request()) == ""


def test_a_shorter_context_or_the_cpu() -> None:
    asked = request(vram_gib=11.5, ctx=8192)
    text = refusal(asked)
    assert text.startswith("a context of 8192 tokens needs 11.7 GiB of VRAM (11.5 GiB usable); -c ")
    assert text.endswith(" or --device cpu would fit") and "\n" not in text
    ctx = int(text.split("-c ")[1].split()[0])
    assert not lay_out(replace(asked, ctx=ctx)).short and lay_out(replace(asked, ctx=ctx + 256)).short


def test_fewer_experts() -> None:
    asked = toy(10, 10, 10, vram=75, gpu_experts=4, ram=0)
    assert not any("experts" in option for option in settings_that_fit(asked))  # there is no RAM for the others
    asked = replace(asked, ram=1 << 40)
    assert settings_that_fit(asked)[0] == "--gpu-experts 2"
    none_at_all = replace(asked, vram=asked.vram - 70)
    assert settings_that_fit(none_at_all)[0] == "--gpu-experts 0"


def test_more_vram_if_the_card_has_it() -> None:
    asked = request(vram_gib=8, vram_free=24 * GIB, ram=RAM_OF["deepseek-v3"])
    option = settings_that_fit(asked)[0]
    assert re.fullmatch(r"--vram 11\.\d", option)
    least = float(option.split()[1])
    assert not lay_out(replace(asked, vram=int(least * GIB))).short
    assert lay_out(replace(asked, vram=int((least - 0.1) * GIB))).short
    assert not any("--vram" in o for o in settings_that_fit(replace(asked, vram_free=10 * GIB)))
    assert not any("--vram" in o for o in settings_that_fit(replace(asked, vram_free=None)))


def test_experts_that_ram_has_no_room_for() -> None:
    """V2-Lite's need 8.9 GiB; with as many as fit on the card the rest fits."""
    asked = request("deepseek-v2-lite", 8, gpu_experts=0, ram=6 * GIB)
    assert lay_out(asked).short == ("RAM",)
    assert settings_that_fit(asked) == ["--gpu-experts auto"]
    assert "9.0 GiB of RAM (6.0 GiB usable); --gpu-experts auto would fit" in refusal(asked)
    less = replace(asked, gpu_experts="auto", vram=2 * GIB, vram_free=8 * GIB)
    assert re.fullmatch(r"--vram [45]\.\d", settings_that_fit(less)[0])


def test_eight_bits_where_they_are_enough() -> None:
    asked = request(vram_gib=17, ctx=131_072)
    assert settings_that_fit(asked)[1:] == ["--cache-bits 8", "--device cpu"]
    assert not any("bits" in option for option in settings_that_fit(replace(asked, cache_bits=8)))


def test_nothing_fits() -> None:
    asked = request(vram_gib=8, ram=100 * GIB)
    assert settings_that_fit(asked) == []
    assert refusal(asked).endswith(
        "; with 256 tokens it is still 11.2 GiB of VRAM (8.0 GiB usable), 366.4 GiB of RAM (100.0 GiB usable)"
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"gpu_experts": 257}, "257 experts of each layer on the GPU; expected auto, or 0 to 256"),
        ({"gpu_experts": -1}, "-1 experts"),
        ({"gpu_experts": "all"}, "all experts"),
        ({"cache_bits": 4}, "a cache of 4 bits; expected 16 or 8"),
        ({"cache_bits": 8, "config": shape("deepseek-v4-flash").config, "vram": None}, "of DeepSeek-V4 keep 16; leave"),
        ({"ctx": 0}, "1 contexts of 0 tokens"),
        ({"batch": 0}, "0 contexts"),
        ({"usage": {0: [1] * 256}}, "256 counts for layer 0"),
        ({"usage": {3: [1] * 255}}, "255 counts for layer 3"),
        ({"usage": {3: [-1] * 256}}, "usage does not fit"),
        ({"usage": {3: []}}, "0 counts for layer 3"),
    ],
)
def test_settings_without_sense(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(LocalrunError, match=re.escape(message)):
        lay_out(request(**changes))


def test_a_model_without_experts() -> None:
    model = load_model("llama-3.1-405b")
    asked = Request(model.tensors, model.config, 4096, ram=400 * GIB, vram=300 * GIB)
    assert lay_out(asked).experts == {}
    with pytest.raises(LocalrunError, match="expected auto, or 0 to 0"):
        lay_out(replace(asked, gpu_experts=1))


# --- several cards


def test_layers_are_split_by_what_cards_have_room_for() -> None:
    """The end with the head has fewer; a card with little memory has few; all are about equally full."""
    for vram in ((12, 12), (6, 12), (12, 6, 9)):
        rooms = [int(size * GIB) for size in vram]
        asked = request(
            "deepseek-v3", vram[0], more_vram=tuple(rooms[1:]), cards=tuple(range(len(vram))), gpu_experts=0
        )
        found = lay_out(asked)
        assert not found.short and [i for here in found.layers for i in here] == list(range(61))
        used = [found.needed[memory_table.vram_of(place)] for place in range(len(vram))]
        full = [n_bytes / room for n_bytes, room in zip(used, rooms, strict=True)]
        assert max(full) - min(full) < 0.25  # of one layer, and of what each card needs whatever it has
        assert sum(n for n in used) > lay_out(request("deepseek-v3", 24, gpu_experts=0)).needed["VRAM"]
        assert all(found.spare(place) >= 0 for place in range(len(vram)))


def test_layers_that_share_a_choice_stay_together() -> None:
    config = replace(CONFIG, index_topk=8, index_head_dim=8, indexer_types=("full", "shared", "shared", "full"))
    tensors, room = tuple(Plain(f"blk.{i}.attn_output.weight", 1 << 20) for i in range(4)), BASE + (5 << 19)
    asked = Request(tensors, CONFIG, 1, ram=GIB, vram=room, more_vram=(room,), cards=(0, 1))
    assert lay_out(asked).layers == (range(2), range(2, 4)) and not lay_out(asked).short
    assert lay_out(replace(asked, config=config)).layers == (range(3), range(3, 4))


def test_a_cache_of_experts_is_for_one_card() -> None:
    with pytest.raises(LocalrunError, match="a cache of experts is for one card"):
        lay_out(request(expert_cache=True, more_vram=(GIB,), cards=(0, 1)))


# --- golden tables


def golden(name: str) -> dict[str, Any]:
    """A model's tables by card."""
    tables, drafts = {}, shape(name).config.num_nextn_predict_layers > 0
    for card in CARDS:
        asked = request(name, ctx=8192, vram=int(card * GIB - DRIVER), mtp=drafts)
        tables[f"{card} GB"] = lay_out(asked).document() | {"refusal": refusal(asked) or None}
    for cards in SEVERAL:
        first, *others = (int(card * GIB - DRIVER) for card in cards)
        asked = request(name, ctx=8192, vram=first, more_vram=tuple(others), cards=tuple(range(len(cards))))
        found = lay_out(asked).document() | {"refusal": refusal(asked) or None}
        tables[f"{' + '.join(map(str, cards))} GB"] = found
    return tables


@pytest.mark.parametrize("name", RAM_OF)
def test_golden_tables(name: str) -> None:
    expected, found = json.loads(GOLDEN.read_text())[name], golden(name)
    for card in expected:
        assert found[card] == expected[card], card
    assert list(found) == list(expected)


def test_the_golden_tables_follow_from_each_other() -> None:
    """What no placement may break, whatever the files say: sums, and larger cards that take no less."""
    for name, cards in json.loads(GOLDEN.read_text()).items():
        before = 0
        for table in cards.values():
            n_cards = len(table["cards"])
            rows = {(row["where"], row["what"]): row["bytes"] for row in table["rows"]}
            for where, needed in table["needed"].items():
                assert needed == sum(size for (at, _), size in rows.items() if at == where)
            fits = all(table["needed"][where] <= table["available"][where] for where in table["needed"])
            assert fits == (table["refusal"] is None) == table["fits"]
            in_vram = sum(size for (where, what), size in rows.items() if "VRAM" in where and what == "routed experts")
            experts = sum(t.n_bytes for t in shape(name).tensors if "_exps." in t.name and not shape(name).is_nextn(t))
            assert in_vram + rows.get(("RAM", "routed experts"), 0) == experts
            assert in_vram >= before or n_cards > 1
            before = in_vram


if __name__ == "__main__":
    GOLDEN.parent.mkdir(exist_ok=True)
    GOLDEN.write_text(json.dumps({name: golden(name) for name in RAM_OF}, indent=1) + "\n")
