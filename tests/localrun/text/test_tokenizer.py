"""Token ids against llama.cpp's own test vectors and its high-level binding; streaming, long runs, faulty vocabularies.

The vectors (tests/data/vocab) are llama.cpp's: each .inp holds texts, the .out beside it their ids, no BOS added.
"""

import random
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import gguf
import pytest
from paths import DATA

from localrun.bundled import model_path
from localrun.errors import GGUFError, LocalrunError
from localrun.text.tokenizer import MAX_TOKEN_BYTES, Tokenizer

VOCABULARIES = DATA / "vocab"
NAMES = ("deepseek-coder", "deepseek-llm", "gpt-2", "llama-spm")
SEPARATOR = "\n__ggml_vocab_test__\n"

CORPUS = [
    "",
    " ",
    "The quick brown fox jumps over the lazy dog.",
    "  leading, trailing  \t\r\n\n\n and   inner   spaces ",
    "don't you've I'M they'LL 's 'S",
    "3.14159 1,234,567 0x7f 1e-9 ½ Ⅷ ٣٤٥ १२३ 四百",
    "🚀 👍🏽 🇩🇪🇫🇷 1️⃣ ☎️",
    "👨‍👩‍👧‍👦 👩🏾‍💻 🏳️‍🌈 🧑‍🤝‍🧑",  # joined by U+200D
    "中文字符，日本語のカナ、한국어 텍스트。",
    "𠜎𠜱 𝔘𝔫𝔦𝔠𝔬𝔡𝔢 𓀀",  # outside the basic plane
    "e\u0301 n\u0303 a\u0308\u0323 Z" + "\u0351\u036b\u0343" * 20,  # combining marks
    "שלום עולם مرحبا بالعالم \u202eabc\u202c \u200f",  # right to left, with controls
    "हिन्दी ไทย བོད་ ខ្មែរ",
    "\u00a0\u2003\u3000\u200b\ufeff\u2028\u2029\x85",  # spaces that are not ASCII
    "\x00\x01\x07\x1b[31m\x7f\x80\x9f",
    "\ufffd \uffff \ue000 \U0010ffff",
    "<s> </s> <unk> <|im_start|>user<|im_end|> <|endoftext|> <｜begin▁of▁sentence｜> <｜User｜> <0x41> [INST]",
    "▁ ▁▁a Ġ Ċ",  # the letters that vocabularies write spaces with
    "def f(x):\n\tif x:\n        return {'a': [x] * 3}  # note\n",
    "a" * 3000,
    " " * 3000 + "x",
    "\n" * 3000,
    "=" * 3000,
    "7" * 3000,
    "漢" * 3000,
    "ab\u0300" * 1000,
]
INVALID = [
    b"\xff\xfe\xfd",
    b"\x80\x81 lone continuations",
    b"\xc3",  # cut off
    b"ok \xe2\x82 cut inside",
    b"\xf0\x9f\x98",
    b"\xc0\xaf \xe0\x80\xaf overlong",
    b"\xed\xa0\x80\xed\xb0\x80",  # surrogates
    b"\xf8\x88\x80\x80\x80 five bytes",
    bytes(range(256)),
    random.Random(0).randbytes(2000).translate(None, b"\xf4\xf5\xf6\xf7"),  # those can spell past U+10FFFF, see below
]


PATHS = {name: VOCABULARIES / f"ggml-vocab-{name}.gguf" for name in NAMES} | {"smollm2": model_path("smollm2")}


@pytest.fixture(scope="module", params=PATHS)
def path(request: pytest.FixtureRequest) -> Path:
    return PATHS[request.param]


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> Iterator[Tokenizer]:
    tokenizer = Tokenizer(path)
    yield tokenizer
    tokenizer.close()


@pytest.mark.parametrize("name", NAMES)
def test_ids_equal_llama_cpps_vectors(name: str) -> None:
    path = VOCABULARIES / f"ggml-vocab-{name}.gguf"
    texts = path.with_suffix(".gguf.inp").read_text(encoding="utf-8").removesuffix(SEPARATOR).split(SEPARATOR)
    lines = path.with_suffix(".gguf.out").read_text().splitlines()
    assert len(texts) == len(lines) == 46
    tokenizer = Tokenizer(path)
    for text, line in zip(texts, lines, strict=True):
        assert tokenizer.encode(text, add_special=False) == [int(id) for id in line.split()], repr(text)
    tokenizer.close()


def test_ids_equal_llama_cpps_on_a_unicode_corpus(path: Path, tokenizer: Tokenizer) -> None:
    import llama_cpp

    oracle = llama_cpp.Llama(str(path), vocab_only=True, verbose=False)
    for text in [text.encode() for text in CORPUS] + INVALID:
        for add_special in (False, True):
            for parse_special in (False, True):
                expected = oracle.tokenize(text, add_bos=add_special, special=parse_special)
                found = tokenizer.encode(text, add_special=add_special, parse_special=parse_special)
                assert found == expected, (text[:60], add_special, parse_special)
    assert (tokenizer.n_vocab, tokenizer.eos_id) == (oracle.n_vocab(), oracle.token_eos())
    assert tokenizer.bos_id == oracle.token_bos()
    oracle.close()


@pytest.mark.parametrize("data", [b"\xf4\x90\x80\x80", b"\xf5\x80\x80\x80", b"\xf7\xbf\xbf\xbf"])
def test_code_points_past_unicode_are_invalid_bytes(tokenizer: Tokenizer, data: bytes) -> None:
    """llama.cpp itself aborts on these with a byte pair vocabulary, so it is no oracle here."""
    as_invalid = b"a" + b"\xff" * 4 + b" b"
    if not tokenizer.path.endswith("llama-spm.gguf"):
        assert tokenizer.encode(b"a" + data + b" b") == tokenizer.encode(as_invalid)
    assert tokenizer.encode(b"\xf4\x8f\xbf\xbf") == tokenizer.encode("\U0010ffff")


def test_str_and_bytes_are_the_same_text(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        assert tokenizer.encode(text) == tokenizer.encode(text.encode())


def test_byte_level_text_comes_back(tokenizer: Tokenizer) -> None:
    for text in CORPUS:
        expected = text
        if tokenizer.path.endswith("llama-spm.gguf") and text:
            expected = " " + text.replace("▁", " ")  # it puts a space first, and writes spaces as that letter
        ids = tokenizer.encode(text, add_special=False)
        assert tokenizer.decode(ids, special=True) == expected


def test_streamed_text_equals_decoded_text(tokenizer: Tokenizer) -> None:
    for text in [*CORPUS, *INVALID]:
        ids = tokenizer.encode(text, parse_special=True)
        decoder = tokenizer.stream_decoder()
        pieces = [decoder.push(id) for id in ids]
        assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_streaming_never_splits_a_character(tokenizer: Tokenizer) -> None:
    text = "👨‍👩‍👧‍👦 漢字 e\u0301 🚀" * 3
    ids = tokenizer.encode(text, add_special=False)
    assert any(b"\xf0" in piece and not piece.decode("utf-8", "ignore") for piece in map(tokenizer.piece, ids))
    decoder = tokenizer.stream_decoder()
    assert "\ufffd" not in "".join(map(decoder.push, ids)) + decoder.flush()


def test_flush_shows_a_cut_off_character_and_starts_afresh(tokenizer: Tokenizer) -> None:
    first = next(id for id in range(tokenizer.n_vocab) if tokenizer.piece(id) == b"\xf0")
    decoder = tokenizer.stream_decoder()
    assert decoder.push(first) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_control_tokens_have_text_only_when_asked_for(tokenizer: Tokenizer) -> None:
    assert tokenizer.piece(tokenizer.eos_id) == b""
    assert tokenizer.piece(tokenizer.eos_id, special=True) in (
        b"<|im_end|>",
        b"</s>",
        b"<|endoftext|>",
        "<｜end▁of▁sentence｜>".encode(),
    )
    assert tokenizer.eos_id in tokenizer.eog_ids


@pytest.mark.parametrize("id", [-1, -(2**31), 10**6, 2**32])
def test_an_id_outside_the_vocabulary_is_refused(tokenizer: Tokenizer, id: int) -> None:
    with pytest.raises(LocalrunError, match=f"token id {id} is not in the vocabulary"):
        tokenizer.piece(id)


def test_runs_that_would_overflow_the_usual_stack() -> None:
    """100,000 letters take some 40 MB of stack in llama.cpp's splitter; a thread gets 8 MB by default."""
    tokenizer = Tokenizer(VOCABULARIES / "ggml-vocab-deepseek-llm.gguf")
    for text in ("a" * 100_000, "!" * 100_000, "漢" * 100_000):
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == text
    with pytest.raises(LocalrunError, match="5000000 bytes without a break"):
        tokenizer.encode("a" * 5_000_000)


def test_logs_nothing() -> None:
    paths = [str(path) for path in PATHS.values()]
    code = f"from localrun.text.tokenizer import Tokenizer\nfor path in {paths!r}: Tokenizer(path).encode('a')"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")


Extra = Callable[[gguf.GGUFWriter], None]
BYTES = [f"<0x{byte:02X}>" for byte in range(256)]


def write(
    path: Path, kind: str, tokens: list[str] | None = None, merges: list[str] | None = None, *extra: Extra
) -> Path:
    """A GGUF file that is only a vocabulary."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model(kind)
    if tokens:
        writer.add_token_list(tokens)
    if merges:
        writer.add_token_merges(merges)
    for add in extra:
        add(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_long_pieces(tmp_path: Path) -> None:
    """Pieces longer than the 32 bytes of llama-cpp-python's own detokenize."""
    long = "x" * 1000
    path = write(tmp_path / "long.gguf", "llama", ["<unk>", "<s>", "</s>", *BYTES, long])
    tokenizer = Tokenizer(path)
    assert tokenizer.decode([259, 259]) == long * 2


def test_no_vocabulary(tmp_path: Path) -> None:
    path = write(tmp_path / "none.gguf", "none", None, None, lambda writer: writer.add_vocab_size(77))
    tokenizer = Tokenizer(path)
    assert (tokenizer.n_vocab, tokenizer.bos_id, tokenizer.eos_id, tokenizer.add_bos) == (77, None, None, False)
    assert tokenizer.eog_ids == frozenset()
    for use in (lambda: tokenizer.encode("a"), lambda: tokenizer.decode([1])):
        with pytest.raises(LocalrunError, match=r"none\.gguf: the file has no vocabulary"):
            use()


FAULTY: list[tuple[str, str, list[str], list[str] | None, Extra | None, str]] = [
    ("a token twice", "gpt2", ["a", "b", "a"], ["a b"], None, "3 tokens but 2 different ones"),
    ("a token twice up to a NUL", "gpt2", ["a", "b", "a\0c"], ["a b"], None, "3 tokens but 2 different ones"),
    ("the name of an empty token", "gpt2", ["[EMPTY_1]", "\0"], ["a b"], None, "2 tokens but 1 different ones"),
    ("no merges", "gpt2", ["a", "b"], None, None, "cannot find tokenizer merges"),
    ("no byte tokens", "llama", ["<unk>", "<s>", "</s>", "a"], None, None, "no token for the byte 0x00"),
    ("few scores", "llama", BYTES, None, lambda w: w.add_token_scores([0.0]), "'tokenizer.ggml.scores' has 1 items"),
    ("few types", "llama", BYTES, None, lambda w: w.add_token_types([1]), "'tokenizer.ggml.token_type' has 1 items"),
    ("unknown kind", "bert", ["a"], None, None, "'tokenizer.ggml.model' is 'bert'"),
    (
        "unknown splitter",
        "gpt2",
        ["a"],
        ["a a"],
        lambda w: w.add_tokenizer_pre("zz"),
        "unknown pre-tokenizer type: 'zz'",
    ),
    ("huge token", "gpt2", ["a" * (MAX_TOKEN_BYTES + 1)], ["a a"], None, "a token of 65537 bytes"),
    ("no BOS to add", "gpt2", ["a"], ["a a"], lambda w: w.add_add_bos_token(True), "there is no bos token"),
    ("no tokens", "gpt2", [], ["a a"], None, "'tokenizer.ggml.tokens' .* is missing"),
]


@pytest.mark.parametrize(
    ("kind", "tokens", "merges", "extra", "message"), [f[1:] for f in FAULTY], ids=[f[0] for f in FAULTY]
)
def test_faulty_vocabularies_are_refused(
    tmp_path: Path, kind: str, tokens: list[str], merges: list[str] | None, extra: Extra | None, message: str
) -> None:
    path = write(tmp_path / "faulty.gguf", kind, tokens, merges, *([extra] if extra else []))
    with pytest.raises(LocalrunError, match=message) as caught:
        Tokenizer(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_not_a_gguf_file(tmp_path: Path) -> None:
    (tmp_path / "text").write_text("hello world, this is no model")
    with pytest.raises(GGUFError, match="not a GGUF file"):
        Tokenizer(tmp_path / "text")
