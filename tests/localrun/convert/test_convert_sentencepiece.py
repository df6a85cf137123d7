"""SentencePiece's BPE: ids of the converted vocabulary (llama.cpp's code) against sentencepiece and tokenizers."""

from __future__ import annotations

import io
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import gguf
import pytest
import sentencepiece
import tokenizers
from gguf import TokenType
from paths import DATA
from tokenizers import decoders, normalizers, pre_tokenizers

from localrun.convert.metadata import Metadata
from localrun.convert.read_back import read_back_vocabulary
from localrun.convert.vocabulary import add_vocabulary
from localrun.errors import LocalrunError
from localrun.text.tokenizer import Tokenizer

os.environ |= {"TRANSFORMERS_VERBOSITY": "error", "HF_HUB_OFFLINE": "1"}

N_VOCAB = 700
WORDS = (DATA / "text/wikitext2.txt").read_text(encoding="utf-8")
TEXTS = [
    "Hello world",
    " leading and   inner    spaces  \n\n  and\tlines \r\n end ",
    "Größe naïve café Ελληνικά кириллица",
    "你好世界123今天 ひらがなカタカナ 한국어",
    "if (a!=b) { c+=3.14159; } // done\n",
    "emoji 😀👩‍👩‍👧 and «quotes» … — ¿qué?",
    "a <s> that is text, <mask> and▁this<tool>",
    "",
    " ",
    "\n",
]


def trained(**options: Any) -> bytes:
    """A tokenizer.model as Llama's are made: every byte has a piece, and texts stay as they are."""
    settings = {
        "model_type": "bpe",
        "vocab_size": 600,
        "byte_fallback": True,
        "normalization_rule_name": "identity",
        "remove_extra_whitespaces": False,
        "user_defined_symbols": ["<tool>"],
        "minloglevel": 2,
    } | options
    out = io.BytesIO()
    lines = iter(WORDS[:30_000].split("\n"))
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_writer=out, **settings)
    return out.getvalue()


@pytest.fixture(scope="module")
def model() -> bytes:
    return trained()


@pytest.fixture
def folder(model: bytes, tmp_path: Path) -> Path:
    (tmp_path / "tokenizer.model").write_bytes(model)
    (tmp_path / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }}{% endfor %}")
    return tmp_path


def planned(folder: Path, **config: Any) -> tuple[Metadata, list[str]]:
    """The keys of a folder's vocabulary, read back; and what is said."""
    metadata = Metadata("llama")
    metadata.u32(".vocab_size", N_VOCAB)
    warnings = add_vocabulary(metadata, SimpleNamespace(path=folder, config=config, files=[]), None)
    return metadata, warnings + read_back_vocabulary(metadata, folder)


def opened(metadata: Metadata, folder: Path) -> Tokenizer:
    writer = gguf.GGUFWriter(folder / "v.gguf", metadata.architecture)
    metadata.write(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return Tokenizer(folder / "v.gguf")


@pytest.mark.parametrize("adds_space", [True, False])
def test_ids_are_sentencepieces(adds_space: bool, folder: Path) -> None:
    if not adds_space:
        (folder / "tokenizer.model").write_bytes(trained(add_dummy_prefix=False, user_defined_symbols=["<tool>", "▁▁"]))
    original = sentencepiece.SentencePieceProcessor(str(folder / "tokenizer.model"))
    metadata, said = planned(folder)
    tokenizer = opened(metadata, folder)
    assert not said and tokenizer.add_bos
    for text in [*TEXTS, *map(str.strip, WORDS[30_000:].split("\n"))]:
        ids = tokenizer.encode(text, add_special=False)
        assert ids == original.encode(text), text
        decoder = tokenizer.stream_decoder()
        streamed = "".join(map(decoder.push, ids)) + decoder.flush()
        assert streamed == tokenizer.decode(ids) == (" " if adds_space and text else "") + text.replace("▁", " ")
    assert tokenizer.encode("")[:1] == [tokenizer.bos_id] == [original.bos_id()]
    types = metadata.get("tokenizer.ggml.token_type")
    assert [types[id] for id in (0, 1, original.piece_to_id("<tool>"), original.piece_to_id("<0x41>"), 699)] == [
        TokenType.UNKNOWN,
        TokenType.CONTROL,
        TokenType.USER_DEFINED,
        TokenType.BYTE,
        TokenType.UNUSED,
    ]


def fast(folder: Path, **config: Any) -> tokenizers.Tokenizer:
    """The tokenizer.json that transformers makes of a tokenizer.model, in place of it."""
    from transformers import LlamaTokenizer

    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    LlamaTokenizer.from_pretrained(folder).save_pretrained(folder)
    (folder / "tokenizer.model").unlink()
    return tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))


def older(tokenizer: tokenizers.Tokenizer) -> None:
    """As Llama 2's and Mixtral's file spell spaces."""
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])


def without_a_space(tokenizer: tokenizers.Tokenizer) -> None:
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never", split=False)


FORMS: dict[str, Callable[[tokenizers.Tokenizer], None]] = {
    "as it is": lambda _: None,
    "older": older,
    "without a space": without_a_space,
}


@pytest.mark.parametrize("form", FORMS)
def test_ids_are_those_of_tokenizer_json(form: str, folder: Path) -> None:
    original = fast(folder)
    FORMS[form](original)
    original.save(str(folder / "tokenizer.json"))
    metadata, said = planned(folder)
    tokenizer = opened(metadata, folder)
    assert [line[:31] for line in said] == (["a text that begins with a space"] if form == "as it is" else [])
    for text in [*TEXTS, *map(str.strip, WORDS[30_000:].split("\n"))]:
        is_named = "<s>" in text or "<tool>" in text or (bool(said) and text.startswith(" "))
        if not is_named:  # by the line above, or a control token there and text here
            assert tokenizer.encode(text, add_special=False) == original.encode(text, add_special_tokens=False).ids
    assert tokenizer.encode("a<s>")[1:] != tokenizer.encode("a<s>", parse_special=True)[1:]


def lacks_a_merge(document: dict[str, Any]) -> None:
    document["model"]["merges"].pop(7)


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "lower case": (lambda d: d.update(normalizer={"type": "Lowercase"}), "normalizer is 'Lowercase'; it changes texts"),
    "words apart": (lambda d: d["pre_tokenizer"].update(split=True), "pre_tokenizer splits texts; expected Metaspace"),
    "no spaces": (lambda d: d.update(pre_tokenizer=None), "spells spaces in a way not known here"),
    "another scheme": (lambda d: d["pre_tokenizer"].update(prepend_scheme="x"), "prepend_scheme is 'x'; expected"),
    "a byte less": (lambda d: d["model"]["vocab"].pop("<0xFF>"), "has no token for the byte 0xff"),
    "Unigram": (lambda d: d["model"].update(type="Unigram"), "the kind of its model is 'Unigram'; only"),
}


def test_a_tokenizer_json_that_reads_texts_otherwise_is_one_line(folder: Path) -> None:
    fast(folder)
    path = folder / "tokenizer.json"
    sound = path.read_text(encoding="utf-8")
    for case, (change, expected) in BROKEN.items():
        document = json.loads(sound)
        change(document)
        path.write_text(json.dumps(document))
        with pytest.raises(LocalrunError) as error:
            pytest.fail(f"{case}: {planned(folder)[1]}")
        assert expected in str(error.value)
    document = json.loads(sound)
    lacks_a_merge(document)
    path.write_text(json.dumps(document))
    assert "1 merges are not in SentencePiece's order" in planned(folder)[1][-1]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (lambda: trained(model_type="unigram"), "is SentencePiece's Unigram; of its kinds only BPE"),
        (lambda: b"{}", "is no SentencePiece model"),
        (lambda: b"", "is no SentencePiece model, or has no pieces"),
        (lambda: trained(byte_fallback=False), "no token for the byte"),
    ],
)
def test_a_model_of_another_kind_is_one_line(content: Callable[[], bytes], expected: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(content())
    with pytest.raises(LocalrunError, match=expected) as error:
        planned(tmp_path)
    assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


def test_texts_that_are_changed_first_are_named(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes(trained(normalization_rule_name="nmt_nfkc"))
    assert "changes texts first ('nmt_nfkc')" in planned(tmp_path)[1][0]


def test_without_the_package_the_line_names_it(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(LocalrunError, match=r"needs the package sentencepiece; pip install 'localrun\[convert\]'"):
        planned(folder)
