"""Added tokens, special tokens and chat templates from every file that may hold them: AutoTokenizer is the oracle."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fuzz_gguf
import gguf
import gguf_builder as b
import pytest
from cases import slow_but
from chats import CHAT
from paths import DATA
from vocabularies import LETTERS, MERGES, WORDS

from localrun.convert import Options, make_plan, pretokenizers
from localrun.convert.metadata import Metadata
from localrun.convert.read_back import read_back_vocabulary
from localrun.convert.vocabulary import add_vocabulary
from localrun.errors import LocalrunError
from localrun.gguf.file import open_gguf
from localrun.text.chat_template import ChatTemplate, chat_template
from localrun.text.prompt import chat_ids
from localrun.text.tokenizer import Tokenizer

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

N_VOCAB = 280
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
VOCAB = {text: id for id, text in enumerate([*LETTERS, *WORDS])}  # 259 of them
PAD_NAME = f"[PAD{N_VOCAB - 1}]"
NO_FLAGS = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}


def token(content: str, special: bool = True, **more: Any) -> dict[str, Any]:
    return NO_FLAGS | {"content": content, "special": special} | more


def tokenizer_json(*added: dict[str, Any], **more: Any) -> dict[str, Any]:
    """GPT-2's way of splitting; added tokens follow the words unless they have an id."""
    model = {"type": "BPE", "vocab": VOCAB, "merges": MERGES, "dropout": None, "unk_token": None}
    model |= {"continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False}
    listed = [{"id": len(VOCAB) + index} | each for index, each in enumerate(added)]
    sections = dict.fromkeys(("truncation", "padding", "normalizer", "post_processor"))
    return (
        {"version": "1.0", "added_tokens": listed, "model": model}
        | sections
        | {"pre_tokenizer": BYTES, "decoder": BYTES, **more}
    )


def write(folder: Path, files: dict[str, Any]) -> Path:
    for name, content in ({"config.json": {"model_type": "llama"}} | files).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
    return folder


def planned(folder: Path, pre: str | None = None) -> tuple[Metadata, list[str]]:
    """The keys of a folder's vocabulary, read back; and what is said."""
    metadata = Metadata("llama")
    metadata.u32(".vocab_size", N_VOCAB)
    config = json.loads((folder / "config.json").read_text())
    warnings = add_vocabulary(metadata, SimpleNamespace(path=folder, config=config, files=[]), pre)
    return metadata, warnings + read_back_vocabulary(metadata, folder)


def opened(metadata: Metadata, path: Path) -> tuple[Tokenizer, str | None]:
    """The tokenizer and the template that generate will have."""
    writer = gguf.GGUFWriter(path, metadata.architecture)
    metadata.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with open_gguf(path) as file:
        tokenizer = Tokenizer(path, file)
        template = chat_template(file, tokenizer)
    return tokenizer, template.source if template else None


CONFIG, JSON, ADDED, MAP = "tokenizer_config.json", "tokenizer.json", "added_tokens.json", "special_tokens_map.json"
FAST = {"tokenizer_class": "PreTrainedTokenizerFast"}
TEXT = "a<a>he the<b>x<e> [PAD279] \u2581x x he<c>\n\n"
PLAIN = [token("<a>"), token("<b>", False)]
OBJECT = token("<c>", __type="AddedToken")
MERGES_TXT = "#version: 0.2\nh e\r\n\u0120 t\n\u010a \u010a\n"
CASES: dict[str, tuple[dict[str, Any], list[str]]] = {  # files, and what is said of them
    "in tokenizer.json": ({JSON: tokenizer_json(*PLAIN)}, []),
    "by id": ({JSON: tokenizer_json(), CONFIG: {"added_tokens_decoder": {"259": PLAIN[0], "260": PLAIN[1]}}}, []),
    "in added_tokens.json": ({JSON: tokenizer_json(), ADDED: {"<a>": 259, "<b>": 260}}, []),
    "in added_tokens.json and named": (
        {JSON: tokenizer_json(), ADDED: {"<e>": 259, "<b>": 260}, CONFIG: FAST | {"eos_token": "<e>"}},
        [],
    ),
    "in added_tokens.json, which does not count": (
        {JSON: tokenizer_json(), ADDED: {"<b>": 260}, CONFIG: FAST | {"added_tokens_decoder": {"259": PLAIN[0]}}},
        [],
    ),
    "in both, otherwise": ({JSON: tokenizer_json(*PLAIN), ADDED: {"<a>": 259, "<c>": 261}}, []),
    "in special_tokens_map.json": (
        {JSON: tokenizer_json(*PLAIN), MAP: {"eos_token": token("<e>"), "additional_special_tokens": ["<b>", "<c>"]}},
        [],
    ),
    "in special_tokens_map.json, which does not count": (
        {JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"added_tokens_decoder": {}}, MAP: {"eos_token": "<b>"}},
        [],
    ),
    "named": ({JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"eos_token": "<e>", "bos_token": OBJECT}}, []),
    "named, not special in tokenizer.json": ({JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"eos_token": "<b>"}}, []),
    "named, a word": ({JSON: tokenizer_json(), CONFIG: FAST | {"eos_token": "he"}}, []),
    "named by the model": ({JSON: tokenizer_json(), CONFIG: FAST | {"image_token": "<c>"}}, []),
    "extra": ({JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"additional_special_tokens": ["<b>", OBJECT]}}, []),
    "extra with names": (
        {JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"extra_special_tokens": {"image_token": "<b>", "x": "<c>"}}},
        [],
    ),
    "special by id alone": (
        {JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"added_tokens_decoder": {"260": token("<b>")}}},
        [],
    ),
    "not special by id alone": (
        {JSON: tokenizer_json(*PLAIN), CONFIG: FAST | {"added_tokens_decoder": {"259": token("<a>", False)}}},
        [],
    ),
    "a word again": ({JSON: tokenizer_json(*PLAIN, token("he", False))}, ["added token 'he': .* but 256"]),
    "a second id": ({JSON: tokenizer_json(*PLAIN, token("<a>"))}, ["added token '<a>': .* but 259"]),
    "a name of the padding": ({JSON: tokenizer_json(*PLAIN, token(PAD_NAME))}, []),
    "an underscore and a space": ({JSON: tokenizer_json(token("\u2581x", False), token(" x", False))}, []),
    "without a text": ({JSON: tokenizer_json(*PLAIN, token(""))}, []),
    "a far id": ({JSON: tokenizer_json(*PLAIN, token("<c>", id=270))}, ["added token '<c>': .* but 261"]),
    "far ids by id": (
        {JSON: tokenizer_json(), CONFIG: FAST | {"added_tokens_decoder": {"265": PLAIN[0], "270": PLAIN[1]}}},
        ["added token '<a>' and 1 more: .* but 259"],
    ),
    "behind the embedding": (
        {JSON: tokenizer_json(*PLAIN, *(token(f"<{n}>") for n in range(20)))},
        ["added token '<19>': behind config.json's vocab_size, 280; left out"],
    ),
    "of the class GPT2Tokenizer": (
        {"vocab.json": VOCAB | {"<e>": 259, "<|endoftext|>": 260}, "merges.txt": MERGES_TXT,
         CONFIG: {"tokenizer_class": "GPT2Tokenizer", "eos_token": "<e>"}},
        [],
    ),
    "of the class Qwen2Tokenizer": (
        {"vocab.json": VOCAB | {"<|endoftext|>": 259}, "merges.txt": "h e\n\u0120 t\n\u010a \u010a\n",
         ADDED: {"<b>": 260}, CONFIG: {"tokenizer_class": "Qwen2Tokenizer"}},
        [],
    ),
}  # fmt: skip


@pytest.mark.parametrize(("files", "said"), CASES.values(), ids=CASES)
def test_added_tokens_are_transformers(files: dict[str, Any], said: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path / "model", {CONFIG: FAST} | files)
    metadata, warnings = planned(folder)
    tokenizer, _ = opened(metadata, tmp_path / "v.gguf")
    oracle = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode(TEXT, parse_special=True) == oracle(TEXT, add_special_tokens=False)["input_ids"]
    special = {token.content for token in oracle.added_tokens_decoder.values() if token.special}
    special |= set(oracle.all_special_tokens)
    expected = {text: oracle.convert_tokens_to_ids(text) for text in special if text in oracle.get_vocab()}
    assert tokenizer.controls == {text: id for text, id in expected.items() if id < N_VOCAB}
    for kind in ("bos", "eos", "pad"):
        named = getattr(oracle, f"{kind}_token_id")
        assert metadata.get(f"tokenizer.ggml.{ {'pad': 'padding'}.get(kind, kind) }_token_id") == named
    *others, about_chat = warnings
    assert "no chat template" in about_chat and len(others) == len(said)
    for line, pattern in zip(others, said, strict=True):
        assert re.search(pattern, line)


TEMPLATES: dict[str, tuple[dict[str, Any], list[str]]] = {  # files, and the names of other templates
    "of the config": ({CONFIG: {"chat_template": "config"}}, []),
    "a file before the config": ({CONFIG: {"chat_template": "config"}, "chat_template.jinja": "file"}, []),
    "a list": (
        {CONFIG: {"chat_template": [{"name": n, "template": f"T {n}"} for n in ("tool-use", "default", "rag")]}},
        ["rag", "tool_use"],
    ),
    "files": (
        {"chat_template.jinja": "file", "additional_chat_templates/rag.jinja": "R", CONFIG: {"chat_template": "c"}},
        ["rag"],
    ),
    "no default": ({CONFIG: {"chat_template": [{"name": "rag", "template": "R"}]}}, ["rag"]),
    "another file alone": ({"additional_chat_templates/rag.jinja": "R", CONFIG: {"chat_template": "c"}}, ["rag"]),
    "none": ({}, []),
}


@pytest.mark.parametrize(("files", "others"), TEMPLATES.values(), ids=TEMPLATES)
def test_chat_templates_are_transformers(files: dict[str, Any], others: list[str], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = write(tmp_path / "model", {JSON: tokenizer_json(), CONFIG: {}} | files)
    metadata, warnings = planned(folder)
    _, template = opened(metadata, tmp_path / "v.gguf")
    try:
        expected = AutoTokenizer.from_pretrained(folder).get_chat_template()
    except ValueError:  # of several none is the default, or there is none
        expected = None
        assert "chat continues texts" in warnings[0]
    assert template == expected
    assert metadata.get("tokenizer.chat_templates", []) == others


def test_a_template_for_models_that_see_comes_last(tmp_path: Path) -> None:
    folder = write(tmp_path, {JSON: tokenizer_json(), CONFIG: {}, "chat_template.json": {"chat_template": "x"}})
    assert planned(folder)[0].get("tokenizer.chat_template") == "x"
    write(folder, {CONFIG: {"chat_template": "config"}})
    assert planned(folder)[0].get("tokenizer.chat_template") == "config"


def test_a_template_that_no_chat_can_use_is_said(tmp_path: Path) -> None:
    folder = write(tmp_path, {JSON: tokenizer_json(), CONFIG: {}, "chat_template.jinja": "{% for %}"})
    assert "the chat template failed: Expected an expression" in planned(folder)[1][-1]
    (folder / "chat_template.jinja").write_text("x" * 2**19)
    with pytest.raises(LocalrunError, match="the chat template has 524288 characters, expected at most"):
        planned(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff")
    with pytest.raises(LocalrunError, match=r"chat_template\.jinja: is not UTF-8 text"):
        planned(folder)


# --- ids of special tokens


def ids_of(folder: Path) -> tuple[dict[str, Any], list[str]]:
    metadata, warnings = planned(folder)
    keys = {key.removeprefix("tokenizer.ggml."): entry.value for key, entry in metadata.entries.items()}
    return {key: value for key, value in keys.items() if key.endswith("_token_id") or key.startswith("add_")}, warnings


BOS_FIRST = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<a>"}}, {"Sequence": {"id": "A"}}]}


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({CONFIG: {"bos_token": "<a>", "add_bos_token": True}}, {"bos_token_id": 259, "add_bos_token": True}),
        ({CONFIG: {"add_bos_token": True}}, {}),  # Qwen's files
        ({CONFIG: {"bos_token": "<a>"}}, {"bos_token_id": 259}),
        ({"config.json": {"bos_token_id": 5, "pad_token_id": -1}}, {"bos_token_id": 5}),  # Llama's files
        ({"config.json": {"bos_token_id": 5}, CONFIG: {"bos_token": "<a>"}}, {"bos_token_id": 259}),
        ({"config.json": {"bos_token_id": 10**6}}, {}),
        ({"config.json": {"eos_token_id": [7, 8, 9]}}, {"eos_token_id": 7, "eot_token_id": 8, "eom_token_id": 9}),
        (
            {"config.json": {"eos_token_id": 7}, "generation_config.json": {"eos_token_id": [8, 7]}},
            {"eos_token_id": 7, "eot_token_id": 8},
        ),
        (
            {"config.json": {"eos_token_id": [7, 8]}, CONFIG: {"eos_token": "<a>"}, "generation_config.json": "broken"},
            {"eos_token_id": 259, "eot_token_id": 7, "eom_token_id": 8},
        ),
        (
            {JSON: tokenizer_json(*PLAIN, post_processor=BOS_FIRST), CONFIG: {"bos_token": "<a>"}},
            {"bos_token_id": 259, "add_bos_token": True},
        ),
        (
            {JSON: tokenizer_json(*PLAIN, post_processor={"type": "Sequence", "processors": [BYTES, BOS_FIRST]})},
            {"bos_token_id": 259, "add_bos_token": True},
        ),
    ],
)
def test_ids_of_special_tokens(files: dict[str, Any], expected: dict[str, Any], tmp_path: Path) -> None:
    found, _ = ids_of(write(tmp_path, {JSON: tokenizer_json(*PLAIN)} | files))
    assert found == {"add_bos_token": False, "add_eos_token": False} | expected


def test_what_is_said_of_special_tokens(tmp_path: Path) -> None:
    files = {JSON: tokenizer_json(token("<a>", lstrip=True)), CONFIG: {"add_bos_token": True}}
    _, warnings = ids_of(write(tmp_path, files | {"config.json": {"eos_token_id": [7, 8, 9, 10, 11]}}))
    assert "take in the spaces beside them" in warnings[0]
    assert "2 more token(s) end a reply than a GGUF has keys for, 10 the first" in warnings[1]
    assert "add_bos_token is true, but there is no such token" in warnings[2]


def test_bytes_without_a_token_are_said(tmp_path: Path) -> None:
    """transformers loses such bytes without a word; so do the readers of the file."""
    from transformers import AutoTokenizer

    document = tokenizer_json()
    few = {word: id for id, word in enumerate([*"acdefghijklm", "he"])}
    document["model"] |= {"vocab": few, "merges": ["h e"]}
    folder = write(tmp_path / "model", {JSON: document, CONFIG: FAST})
    metadata, warnings = planned(folder)
    tokenizer, _ = opened(metadata, tmp_path / "v.gguf")
    oracle = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.encode("abhe") == oracle("abhe")["input_ids"] == [few["a"], few["he"]]
    assert "244 of the 256 bytes have no token" in warnings[0]


# --- vocab.json and merges.txt, and others


@pytest.mark.parametrize("class_name", [None, "PreTrainedTokenizerFast", "LlamaTokenizer"])
def test_words_alone_do_not_say_how_text_is_split(class_name: str | None, tmp_path: Path) -> None:
    files = {"vocab.json": VOCAB, "merges.txt": "h e\n", CONFIG: {"tokenizer_class": class_name}}
    folder = write(tmp_path, files)
    with pytest.raises(
        LocalrunError, match=r"vocab\.json: splits text in a way not known here; --pre names the nearest"
    ):
        planned(folder)
    assert planned(folder, "gpt-2")[0].get("tokenizer.ggml.pre") == "gpt-2"
    write(folder, {"config.json": {"model_type": "qwen3_moe"}, CONFIG: {}})
    assert planned(folder)[0].get("tokenizer.ggml.pre") == "qwen2"


@pytest.mark.parametrize("name", ["spiece.model", "tekken.json", "vocab.json", "vocab.txt"])
def test_a_tokenizer_of_another_kind_is_not_left_out(name: str, tmp_path: Path) -> None:
    with pytest.raises(LocalrunError, match=f"{name}: .* cannot be converted; expected byte-level BPE"):
        planned(write(tmp_path, {name: "{}"}))


def test_a_gguf_with_a_broken_vocabulary_is_not_converted(tmp_path: Path) -> None:
    """Its keys are copied, so what generate would refuse in the source it would refuse in the result."""
    model = fuzz_gguf.bases()["llama"].copy()
    model.keys = [key for key in model.keys if not key.name.startswith(b"tokenizer.")]
    tokens = [b"a"] * 48
    model.keys += [
        fuzz_gguf.Key(b"tokenizer.ggml.model", b.STRING, b"gpt2"),
        fuzz_gguf.Key(b"tokenizer.ggml.tokens", b.ARRAY, tokens, b.STRING),
        fuzz_gguf.Key(b"tokenizer.ggml.merges", b.ARRAY, [b"a a"], b.STRING),
    ]
    (tmp_path / "a.gguf").write_bytes(model.build())
    with pytest.raises(LocalrunError, match=r"a\.gguf: key 'tokenizer\.ggml\.tokens' has 48 tokens but 1"):
        make_plan(tmp_path / "a.gguf", tmp_path / "b.gguf", Options(mix="F32"))
    assert [path.name for path in tmp_path.iterdir()] == ["a.gguf"]


def test_what_the_readers_refuse_is_refused_before_it_is_written(tmp_path: Path) -> None:
    metadata, _ = planned(write(tmp_path, {JSON: tokenizer_json(*PLAIN)}))
    metadata.get("tokenizer.ggml.tokens")[3] = "he"
    with pytest.raises(LocalrunError, match=f"^{tmp_path}: .*280 tokens but 279 different ones"):
        read_back_vocabulary(metadata, tmp_path)


# --- families: how text is split, what ends a reply, a chat by the published template


LLAMA_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
QWEN_SPLIT = LLAMA_SPLIT.replace("{1,3}", "")
UPPER_LOWER = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_HY = ":opensource"
# How text is split, whether merges are ignored, control tokens, names in tokenizer_config.json, what ends a reply, and
# llama.cpp's name for the first two.
GLM = (
    LLAMA_SPLIT, True,
    ["<|endoftext|>", "[gMASK]", "<sop>", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"],
    {"eos_token": "<|endoftext|>"}, ["<|endoftext|>", "<|user|>", "<|observation|>"], "glm4",
)  # fmt: skip
FAMILIES: dict[str, tuple[Any, ...]] = {
    "GLM-4.6": GLM,
    "GLM-4.7-Flash": GLM,
    "MiniMax-M2": (
        UPPER_LOWER, False, ["]!d~[", "]!p~[", "]~!b[", "]~b]", "[e~["],
        {"bos_token": "]~!b[", "eos_token": "[e~["}, ["[e~["], "minimax-m2",
    ),
    "tencent-Hy3": (
        None, False, [f"<｜hy_{name}{_HY}｜>" for name in ("begin_of_sentence", "eos", "User", "Assistant", "pad")]
        + [f"<｜reasoning_mode{_HY}｜>"],
        {"bos_token": f"<｜hy_begin_of_sentence{_HY}｜>", "eos_token": f"<｜hy_eos{_HY}｜>"}, [f"<｜hy_eos{_HY}｜>"],
        "deepseek-v3",
    ),
    "Qwen3-Coder": (
        QWEN_SPLIT, False, ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], {"eos_token": "<|im_end|>"},
        ["<|im_end|>", "<|endoftext|>"], "qwen2",
    ),
}  # fmt: skip
REASONING = {"as it is": "", "on": "{%- set enable_thinking = true %}", "off": "{%- set enable_thinking = false %}"}


@pytest.mark.parametrize("reasoning", slow_but(REASONING, {"as it is"}))
@pytest.mark.parametrize("family", FAMILIES)
def test_a_chat_of_a_family_is_transformers(family: str, reasoning: str, tmp_path: Path) -> None:
    """Ids of a chat by the published template, how its text is split, and what ends a reply."""
    from transformers import AutoTokenizer

    split, ignore_merges, controls, named, ends, pre = FAMILIES[family]
    steps = [
        {"type": "Split", "pattern": {"Regex": p}, "behavior": "Isolated", "invert": False} for p in _splits(split)
    ]
    document = tokenizer_json(*map(token, controls))
    document["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [*steps, BYTES | {"use_regex": False}]}
    document["model"]["ignore_merges"] = ignore_merges
    template = REASONING[reasoning] + (DATA / "templates" / f"{family}.jinja").read_text(encoding="utf-8")
    ids = [len(VOCAB) + controls.index(text) for text in ends]
    files = {JSON: document, CONFIG: FAST | named, "chat_template.jinja": template}
    folder = write(tmp_path / "model", files | {"generation_config.json": {"eos_token_id": ids}})
    metadata, _ = planned(folder)
    tokenizer, source = opened(metadata, tmp_path / "v.gguf")
    assert metadata.get("tokenizer.ggml.pre") == pre
    assert source == template and set(ids) <= set(tokenizer.eog_ids)
    oracle = AutoTokenizer.from_pretrained(folder)
    renderer = ChatTemplate(source, bos_token=named.get("bos_token", ""), eos_token=named["eos_token"])
    for messages in (CHAT[1:2], CHAT):
        expected = oracle.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert chat_ids(renderer, tokenizer, messages) == expected
        assert not set(ids) & {expected[-1]}


def _splits(pattern: str | None) -> list[str]:
    """One pattern, or DeepSeek-V3's three, which llama.cpp takes for Hy3 as well."""
    return [pattern] if pattern else [step for step in pretokenizers._STEPS["deepseek-v3"] if step != "ByteLevel"]
