"""Vocabularies: ids of a converted tokenizer (llama.cpp's code) against the tokenizers library on the original."""

from __future__ import annotations

import base64
import json
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import gguf
import hf_checkpoints as hf
import pytest
import tokenizers
from gguf import TokenType

import localrun
from localrun.convert import Options, convert, make_plan
from localrun.convert.errors import CheckpointError
from localrun.errors import LocalrunError
from localrun.text.tokenizer import Tokenizer

N_VOCAB = 700
CORPUS = [
    "The quick brown fox jumps over the lazy dog; it's 12345 times faster than we'd thought, isn't it?",
    "def main(argv):\n\tfor i in range(100):\n\t\tprint(f'{i:>4} {i**2}')\r\n\r\n",
    "Größe, naïve café, Ελληνικά, кириллица, 你好世界，今天天气很好。ひらがなカタカナ한국어",
    "x += 1; y == 2 != 3 // $4.50 (5%) [6] {7} <8> «9» — “10”…",
] * 20
TEXTS = [
    "Hello world",
    "I'm SURE we'LL see 7 of 1234567 things, don't you?",
    "  leading and   inner    spaces  \n\n  and\tlines \r\n end ",
    "Größe naïve café Ελληνικά кириллица",
    "你好世界123今天 ひらがなカタカナ 한국어",
    "if (a!=b) { c+=3.14159; } // done\n",
    "emoji 😀👩‍👩‍👧 and «quotes» … — ¿qué?",
    "",
    " ",
    "\n",
]

WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|"
REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# As the published tokenizer.json files have them; DeepSeek-LLM's list of letters cut down to those of TEXTS.
SPLITS: dict[str, list[str]] = {
    "gpt-2": [],
    "smollm": ["digits"],
    "llama-bpe": [WORDS + r"\p{N}{1,3}" + REST],
    "qwen2": [WORDS + r"\p{N}" + REST],
    "deepseek-llm": [
        "[\r\n]",
        r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿͰ-ͳΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁ]+",
        r"\s?[!-/:-~！-／：-～‘-‟　-。]+",
        r"\s+$",
        "[一-龥ࠀ-一가-퟿]+",
        "digits",
    ],
    "deepseek-coder": ["[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[一-龥ࠀ-一가-퟿]+", "digits"],
    "deepseek-v3": [
        r"\p{N}{1,3}",
        "[一-龥぀-ゟ゠-ヿ]+",
        "[!\"#$%&'()*+,\\-./:;<=>?@\\[\\\\\\]^_`{|}~][A-Za-z]+|[^\r\n\\p{L}\\p{P}\\p{S}]?[\\p{L}\\p{M}]+"
        "| ?[\\p{P}\\p{S}]+[\r\n]*|\\s*[\r\n]+|\\s+(?!\\S)|\\s+",
    ],
}


def train(pre: str) -> tokenizers.Tokenizer:
    from tokenizers import Regex, decoders, models, pre_tokenizers, trainers

    tokenizer = tokenizers.Tokenizer(models.BPE(ignore_merges=pre == "llama-bpe"))
    steps: list[Any] = [
        pre_tokenizers.Digits(individual_digits=True)
        if pattern == "digits"
        else pre_tokenizers.Split(Regex(pattern), "isolated")
        for pattern in SPLITS[pre]
    ]
    whole_words = pre in ("gpt-2", "smollm")
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=whole_words))
    tokenizer.pre_tokenizer = steps[0] if len(steps) == 1 else pre_tokenizers.Sequence(steps)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<|begin|>", "<|end|>"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=alphabet, special_tokens=special, show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens([tokenizers.AddedToken("<think>", normalized=False)])
    return tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = hf.LLAMA | {"vocab_size": N_VOCAB, "num_hidden_layers": 1}
    return hf.save(hf.make("Llama", config), tmp_path_factory.mktemp("llama") / "model")


@pytest.fixture(scope="module")
def trained() -> dict[str, tokenizers.Tokenizer]:
    return {pre: train(pre) for pre in SPLITS}


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    return shutil.copytree(model, tmp_path / "model")


def write_config(folder: Path, **settings: Any) -> None:
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def converted(folder: Path, **options: Any) -> Path:
    path = folder.with_suffix(".gguf")
    convert(make_plan(folder, path, Options(**({"mix": "F32"} | options))))
    return path


def edit(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    document = json.loads(path.read_text())
    change(document)
    path.write_text(json.dumps(document))


@pytest.mark.parametrize("pre", SPLITS)
def test_ids_are_the_original_tokenizers(pre: str, trained: dict[str, tokenizers.Tokenizer], folder: Path) -> None:
    original = trained[pre]
    original.save(str(folder / "tokenizer.json"))
    write_config(folder, bos_token="<|begin|>", eos_token="<|end|>", add_bos_token=True)
    path = converted(folder)
    with localrun.gguf.file.open_gguf(path) as file:
        assert file.string("tokenizer.ggml.pre") == pre
    tokenizer = Tokenizer(path)
    assert tokenizer.n_vocab == N_VOCAB
    assert tokenizer.bos_id == original.token_to_id("<|begin|>")
    assert tokenizer.eos_id == original.token_to_id("<|end|>")
    assert tokenizer.add_bos
    for text in TEXTS:
        expected = original.encode(text, add_special_tokens=False).ids
        assert tokenizer.encode(text, add_special=False) == expected, text
        assert tokenizer.decode(expected) == text
    assert tokenizer.encode("a<think>b<|end|>", parse_special=True)[1:] == original.encode("a<think>b<|end|>").ids
    tokenizer.close()


def test_kinds_of_tokens(trained: dict[str, tokenizers.Tokenizer], folder: Path) -> None:
    original = trained["gpt-2"]
    original.save(str(folder / "tokenizer.json"))
    with localrun.gguf.file.open_gguf(converted(folder)) as file:
        tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    kinds = dict(zip(tokens, types.tolist(), strict=True))
    assert kinds["<|begin|>"] == TokenType.CONTROL
    assert kinds["<think>"] == TokenType.USER_DEFINED
    assert kinds["Ġ"] == TokenType.NORMAL
    assert kinds[f"[PAD{N_VOCAB - 1}]"] == TokenType.UNUSED
    edit(folder / "tokenizer.json", lambda d: d["added_tokens"][-1].update(special=True))
    plan = make_plan(folder, folder.with_suffix(".x"), Options(mix="F32"))
    think = original.token_to_id("<think>")
    assert plan.metadata.get("tokenizer.ggml.token_type")[think] == TokenType.CONTROL
    assert types.tolist().count(TokenType.UNUSED) == N_VOCAB - original.get_vocab_size()


def test_merges_as_pairs_are_merges_as_text(trained: dict[str, tokenizers.Tokenizer], folder: Path) -> None:
    path = folder / "tokenizer.json"
    trained["gpt-2"].save(str(path))
    plans = []
    for as_text in (False, True):
        edit(
            path, lambda d, t=as_text: d["model"].update(merges=[" ".join(m) if t else m for m in d["model"]["merges"]])
        )
        plans.append(make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32")))
    assert plans[0].metadata.get("tokenizer.ggml.merges") == plans[1].metadata.get("tokenizer.ggml.merges")


# --- chat templates, special tokens


def test_recommended_sampling(trained: dict[str, tokenizers.Tokenizer], folder: Path) -> None:
    recommended = {"do_sample": True, "temperature": 0.6, "top_p": 0.95, "top_k": 20}
    (folder / "generation_config.json").write_text(json.dumps(recommended))
    with localrun.gguf.file.open_gguf(converted(folder)) as file:
        sampling = localrun.Sampling.recommended(file.metadata)
    assert (sampling.temperature, sampling.top_p, sampling.top_k) == (pytest.approx(0.6), pytest.approx(0.95), 20)
    (folder / "generation_config.json").write_text(json.dumps(recommended | {"do_sample": False}))
    plan = make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))
    assert not [key for key in plan.metadata.entries if key.startswith("general.sampling")]


# --- none, others, broken


def test_a_folder_without_a_tokenizer_is_warned_of(folder: Path) -> None:
    plan = make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))
    assert "no vocabulary, ids only" in plan.warnings[0]
    assert plan.metadata.get("tokenizer.ggml.model") == "none"
    assert plan.metadata.get(".vocab_size") == N_VOCAB


def test_a_way_of_splitting_that_is_not_known_needs_a_name(
    trained: dict[str, tokenizers.Tokenizer], folder: Path
) -> None:
    path = folder / "tokenizer.json"
    trained["deepseek-v3"].save(str(path))
    edit(path, lambda d: d["pre_tokenizer"]["pretokenizers"][0].update(behavior="Removed"))
    with pytest.raises(
        CheckpointError, match=r"tokenizer\.json: splits text in a way not known here; --pre .*deepseek-v3"
    ):
        make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))
    plan = make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32", pre="deepseek-v3"))
    assert plan.metadata.get("tokenizer.ggml.pre") == "deepseek-v3"
    with pytest.raises(CheckpointError, match="--pre 'x': expected one of"):
        make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32", pre="x"))


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "another model": (lambda d: d["model"].update(type="Unigram"), "the kind of its model is 'Unigram'; only"),
    "byte fallback": (lambda d: d["model"].update(byte_fallback=True), "pre_tokenizer splits texts"),
    "no model": (lambda d: d.pop("model"), "the kind of its model is missing; only"),
    "no vocabulary": (lambda d: d["model"].pop("vocab"), "vocab is missing; expected an object"),
    "a word without an id": (
        lambda d: d["model"]["vocab"].update(a="b"),
        "the id of 'a' is 'b'; expected a whole number",
    ),
    "one id for two words": (lambda d: d["model"]["vocab"].update(zzz=300), "id 300 is both .* and 'zzz'"),
    "a merge of three": (lambda d: d["model"].update(merges=["a b c"]), "merge 'a b c'; expected two texts"),
    "a merge with a space": (lambda d: d["model"].update(merges=[["a", "b c"]]), "expected two texts without spaces"),
    "merges that are none": (lambda d: d["model"].update(merges={}), "merges is {}; expected a list"),
    "an added token that is none": (lambda d: d["added_tokens"].append(7), "added token 7; expected an object"),
    "an added token without an id": (lambda d: d["added_tokens"][0].pop("id"), "id is missing"),
    "added tokens that are none": (lambda d: d.update(added_tokens=7), "added_tokens is 7; expected a list"),
    "another prefix": (
        lambda d: d["model"].update(continuing_subword_prefix="##"),
        "continuing_subword_prefix is '##'; a GGUF cannot say that",
    ),
    "lower case": (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer is 'Lowercase'; it changes texts"),
    "one normalizer of two": (
        lambda d: d.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Strip"}]}),
        "normalizer is 'Strip'",
    ),
    "half a character": (lambda d: d["model"]["vocab"].update({"\ud800": 690}), "is not Unicode text"),
    "an id too large": (lambda d: d["model"]["vocab"].update(zzz=N_VOCAB), "the tokenizer has id 700; config.json's"),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_tokenizer_is_one_line(case: str, trained: dict[str, tokenizers.Tokenizer], folder: Path) -> None:
    change, expected = BROKEN[case]
    trained["gpt-2"].save(str(folder / "tokenizer.json"))
    edit(folder / "tokenizer.json", change)
    with pytest.raises(LocalrunError, match=expected):
        make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))


@pytest.mark.parametrize(
    ("name", "content", "expected"),
    [
        ("tokenizer_config.json", "{", "tokenizer_config.json: is not JSON"),
        ("tokenizer_config.json", "[1]", "tokenizer_config.json: holds no JSON object"),
        (
            "tokenizer_config.json",
            '{"chat_template": [{"template": 1}]}',
            "chat_template None is 1; expected names and",
        ),
        ("tokenizer_config.json", '{"chat_template": [3]}', "chat_template None is None; expected names and texts"),
        ("tokenizer_config.json", '{"chat_template": 3}', "chat_template 'default' is 3; expected names and texts"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"x": {}}}', "has the id 'x'; expected a whole number"),
        ("tokenizer_config.json", '{"added_tokens_decoder": {"5": {}}}', "content is missing; expected text"),
        (
            "tokenizer_config.json",
            '{"added_tokens_decoder": [1]}',
            "added_tokens_decoder is \\[1\\]; expected an object",
        ),
        ("tokenizer_config.json", '{"extra_special_tokens": "x"}', "extra_special_tokens is 'x'; expected a list"),
        ("added_tokens.json", '{"<x>": "y"}', "the id of '<x>' is 'y'; expected a whole number"),
        ("special_tokens_map.json", "x", "special_tokens_map.json: is not JSON"),
        ("chat_template.json", '{"chat_template": 3}', "chat_template.json: chat_template 'default' is 3"),
        ("config.json", None, "config.json: bos_token_id is -3; expected ids of tokens"),
    ],
)
def test_broken_special_tokens_are_one_line(
    name: str, content: str | None, expected: str, trained: dict[str, tokenizers.Tokenizer], folder: Path
) -> None:
    trained["gpt-2"].save(str(folder / "tokenizer.json"))
    if content is None:
        hf.edit_config(folder, bos_token_id=-3)
    else:
        (folder / name).write_text(content)
    with pytest.raises(CheckpointError, match=expected) as caught:
        make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))
    assert "\n" not in str(caught.value)


def test_a_vocabulary_alone_is_nothing_to_convert(folder: Path, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(tmp_path / "v.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(LocalrunError, match=r"v\.gguf: holds no tensors"):
        make_plan(tmp_path / "v.gguf", folder.with_suffix(".gguf"), Options(mix="F32"))


# --- Kimi-K2's tiktoken file


def write_tiktoken(folder: Path, original: tokenizers.Tokenizer) -> None:
    """The merges of a trained BPE as tiktoken has them: byte strings in the order in which they came to be."""
    from tokenizers.pre_tokenizers import ByteLevel

    letters = sorted(ByteLevel.alphabet())
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(chr(256 + i) for i in range(256))
    byte_of = {chr(byte) if byte in plain else next(others): byte for byte in range(256)}
    assert sorted(byte_of) == letters
    merges = json.loads(original.to_str())["model"]["merges"]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [bytes(byte_of[letter] for letter in left + right) for left, right in merges]
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for rank, token in enumerate(tokens[:400])]
    (folder / "tiktoken.model").write_text("".join(lines))


def rank_merge(ranks: dict[bytes, int], word: bytes) -> list[int]:
    """tiktoken's algorithm: merge the neighbours of the lowest rank until none merge."""
    parts = [bytes([byte]) for byte in word]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks]
        if not pairs:
            return [ranks[part] for part in parts]
        at = min(pairs)[1]
        parts[at : at + 2] = [parts[at] + parts[at + 1]]


def test_kimis_ranks_become_merges(trained: dict[str, tokenizers.Tokenizer], folder: Path) -> None:
    write_tiktoken(folder, trained["deepseek-v3"])
    named = {"400": {"content": "[BOS]", "special": True}, "405": {"content": "<|im_end|>", "special": True}}
    write_config(folder, tokenizer_class="TikTokenTokenizer", added_tokens_decoder=named)
    path = converted(folder)
    lines = (folder / "tiktoken.model").read_text().splitlines()
    ranks = {base64.b64decode(token): int(rank) for token, rank in map(str.split, lines)}
    tokenizer = Tokenizer(path)
    for words in (["Hello", " world"], ["The", " quick", " brown"], ["你好"], [" café"], ["123"], ["456"]):
        expected = [id for word in words for id in rank_merge(ranks, word.encode())]
        assert tokenizer.encode("".join(words), add_special=False) == expected
    assert tokenizer.encode("[BOS]<|im_end|>", add_special=False, parse_special=True) == [400, 405]
    tokenizer.close()
    with localrun.gguf.file.open_gguf(path) as file:
        tokens, types = file.metadata["tokenizer.ggml.tokens"], file.metadata["tokenizer.ggml.token_type"]
    assert tokens[401] == "<|reserved_token_401|>"
    assert tokens[400 + 256] == "[PAD656]"
    assert set(types[400:656].tolist()) == {int(TokenType.CONTROL)}


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("YQ== 0\n!!! 1\n", "line 2 is no base64 token"),
        ("YQ==\n", "line 1 is no"),
        ("YQ== 0\nYg== 2\n", "ranks are not 0 to 1"),
    ],
)
def test_a_broken_tiktoken_file_is_one_line(content: str, expected: str, folder: Path) -> None:
    (folder / "tiktoken.model").write_text(content)
    write_config(folder, tokenizer_class="TikTokenTokenizer")
    with pytest.raises(CheckpointError, match=expected):
        make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))


def test_another_models_tiktoken_file_needs_a_name(folder: Path) -> None:
    (folder / "tiktoken.model").write_text("YQ== 0\n")
    write_config(folder, tokenizer_class="QWenTokenizer")
    with pytest.raises(CheckpointError, match="--pre names the way to split text"):
        make_plan(folder, folder.with_suffix(".gguf"), Options(mix="F32"))
