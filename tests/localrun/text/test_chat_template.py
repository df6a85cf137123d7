"""Chat templates: real ones against transformers' renderer, hostile ones against the limits."""

import time
from pathlib import Path

import gguf
import pytest
from chats import BOS, CHAT, EOS, TEMPLATES, template, transformers_text
from paths import DATA

from localrun.errors import GGUFError, LocalrunError
from localrun.gguf.file import open_gguf
from localrun.text import template_child
from localrun.text.chat_template import CHATML, MAX_SOURCE, TemplateError, chat_template, text_of
from localrun.text.prompt import chat_ids
from localrun.text.tokenizer import Tokenizer

VOCABULARY = DATA / "vocab" / "ggml-vocab-gpt-2.gguf"


def test_all_templates_are_there() -> None:
    assert len(TEMPLATES) == 14


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.stem)
def test_real_templates_render_as_transformers_does(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    chats = [CHAT[1:2], CHAT[:2], CHAT[1:], CHAT]
    for add_generation_prompt in (True, False):
        expected = [transformers_text(source, messages, add_generation_prompt) for messages in chats]
        answers = template(source).answers(chats, add_generation_prompt)
        assert [text_of(answer) for answer in answers] == expected


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "DeepSeek-R1",
            f'{BOS}You are terse.<｜User｜>Is 1 < 2 & "3" > 2?\n<｜Assistant｜>Yes, 👍.{EOS}'
            "<｜User｜>Why?<｜Assistant｜>",
        ),
        (
            "DeepSeek-V2",
            f'{BOS}You are terse.\n\nUser: Is 1 < 2 & "3" > 2?\n\n\nAssistant: <think>Yes.</think>Yes, 👍.{EOS}'
            "User: Why?\n\nAssistant:",
        ),
    ],
)
def test_deepseek_by_hand(name: str, expected: str) -> None:
    """Written out from the models' first releases: R1 drops an earlier answer's thinking, V2 keeps all text."""
    source = next(path for path in TEMPLATES if path.stem == name).read_text(encoding="utf-8")
    assert template(source).render(CHAT) == expected


def test_chatml_by_hand() -> None:
    assert template(CHATML).render(CHAT[:2]) == (
        '<|im_start|>system\nYou are terse.<|im_end|>\n<|im_start|>user\nIs 1 < 2 & "3" > 2?\n<|im_end|>\n'
        "<|im_start|>assistant\n"
    )


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        ("{{ messages[1] | tojson }}", '{"role": "user", "content": "Is 1 < 2 & \\"3\\" > 2?\\n"}'),
        ("{{ {'b': 'é', 'a': 1} | tojson(indent=1, sort_keys=true) }}", '{\n "a": 1,\n "b": "é"\n}'),
        ("{% for m in messages %}{% if loop.index == 2 %}{% break %}{% endif %}{{ m.role }}{% endfor %}", "system"),
        ("a{% generation %}b{{ messages[3].content }}{% endgeneration %}c", "abWhy?c"),
        ("{{ strftime_now('%Y') }}", time.strftime("%Y")),
        ("{% if tools is none and documents is none %}ok{% endif %}", "ok"),
        ("x\n    {% if true %}\n    y\n    {% endif %}\nz", "x\n    y\nz"),
    ],
)
def test_what_templates_rely_on(source: str, expected: str) -> None:
    assert template(source).render(CHAT) == expected == transformers_text(source, CHAT, True)


ENDLESS = "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}"
ENDS = "{% endfor %}" * 3
HOSTILE = {
    "endless loop": (ENDLESS + ENDS, "takes more than 0.5 s"),
    "endless text": (ENDLESS + "spam " * 20 + ENDS, "writes more than 16777216 characters"),
    "slow filter": ("{{ lipsum(n=100000) }}", "takes more than 0.5 s"),
    "long string": ("{{ 'a' * 10**10 }}", "too much memory"),
    "long string at run time": ("{{ 'a' * (messages | length * 10**10) }}", "too much memory"),
    "wide format": ("{{ '%999999999d' % 1 }}", "too much memory"),
    "wide filter": ("{{ 'a' | center(10**10) }}", "too much memory"),
    "huge list": ("{{ ['a'] * 10**9 }}", "too much memory"),
    "huge range": ("{{ range(10**9) | list }}", "Range too big"),
    "recursive macro": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion depth"),
    "deep nesting": ("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "recursion depth"),
    "class of a string": ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
    "cycler": ("{{ cycler.__init__.__globals__.os.system('id') }}", "unsafe"),
    "joiner": ("{{ joiner.__init__.__globals__ }}", "unsafe"),
    "namespace": ("{{ namespace.__init__.__globals__ }}", "unsafe"),
    "function globals": ("{{ raise_exception.__globals__.sys.exit() }}", "unsafe"),
    "changed messages": ("{{ messages.append(1) }}", "unsafe"),
    "other files": ("{% include '/etc/passwd' %}", "no loader"),
}


@pytest.mark.parametrize(("source", "message"), HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_templates_end_in_one_line(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if "0.5 s" in message:
        monkeypatch.setattr("localrun.text.chat_template.TIME_S", 0.5)
    start = time.monotonic()
    with pytest.raises(TemplateError, match=message) as caught:
        template(source).render(CHAT)
    assert time.monotonic() - start < 10  # the limit of 5 s, start-up, and a busy machine
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "source",
    [
        "{{ '' | attr('__class__') }}",
        "{{ '{0.__class__}'.format('') }}",
        "{{ messages | map(attribute='__class__') | join }}",
    ],
)
def test_quiet_escapes_yield_nothing(source: str) -> None:
    assert template(source).render(CHAT) == ""


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('Roles must\n  alternate!') }}", "failed: Roles must alternate!$"),
        ("{% for %}", "Expected an expression"),
        ("{{ nothing.here }}", "'nothing' is undefined"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{% nosuchtag %}", "unknown tag 'nosuchtag'"),
    ],
)
def test_broken_templates_end_in_one_line(source: str, message: str) -> None:
    with pytest.raises(TemplateError, match=message):
        template(source).render(CHAT)


def test_a_child_that_dies_silently_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("localrun.text.chat_template.sys.executable", "/bin/false")
    with pytest.raises(TemplateError, match="ended its process"):
        template("a").render(CHAT)
    monkeypatch.setattr("localrun.text.chat_template.sys.executable", "/nowhere/python")
    with pytest.raises(TemplateError, match="cannot be run: /nowhere/python"):
        template("a").render(CHAT)


def test_works_from_any_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')")
    monkeypatch.chdir(tmp_path)
    assert template("{{ messages | length }}").render(CHAT) == "4"


def test_source_too_long() -> None:
    assert template("a" * MAX_SOURCE).render([]) == "a" * MAX_SOURCE
    with pytest.raises(LocalrunError, match=f"{MAX_SOURCE + 1} characters"):
        template("a" * (MAX_SOURCE + 1))


def test_the_limits_are_set_in_the_child_alone() -> None:
    """A wrong argument order would still pass the tests above: here the numbers themselves."""
    resource = pytest.importorskip("resource", reason="this system has no resource limits")
    calls = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resource, "setrlimit", lambda kind, value: calls.update({kind: value}))
        template_child.limit(1000, 200, 30)
    assert calls[resource.RLIMIT_AS] == (1000, 1000)
    assert calls[resource.RLIMIT_FSIZE] == (200, 200)
    assert calls[resource.RLIMIT_CPU] == (30, 30)


def with_template(path: Path, source: str | int) -> Path:
    """A file with a small vocabulary and a template, or a number in its place."""
    tokens = ["<unk>", BOS, EOS, *(f"<0x{byte:02X}>" for byte in range(256))]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_types([2, 3, 3] + [6] * 256)
    writer.add_add_space_prefix(False)
    if isinstance(source, str):
        writer.add_chat_template(source)
    else:
        writer.add_uint32("tokenizer.chat_template", source)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_the_files_template_with_the_files_tokens(tmp_path: Path) -> None:
    path = with_template(tmp_path / "a.gguf", "{{ bos_token }}|{{ messages[0].content }}{{ eos_token }}")
    with open_gguf(path) as file:
        tokenizer = Tokenizer(path, file)
        found = chat_template(file, tokenizer)
    assert found is not None and found.render([{"role": "user", "content": "x"}]) == f"{BOS}|x{EOS}"
    ids = chat_ids(found, tokenizer, [{"role": "user", "content": "x"}])
    assert ids == [tokenizer.bos_id, *tokenizer.encode("|x", add_special=False), tokenizer.eos_id]
    plain = template("{{ messages[0].content }}")  # without BOS: the vocabulary adds it
    assert chat_ids(plain, tokenizer, [{"role": "user", "content": "x"}]) == tokenizer.encode("x", add_special=True)


def test_a_file_without_a_template(tmp_path: Path) -> None:
    with open_gguf(VOCABULARY) as file:
        assert chat_template(file, Tokenizer(VOCABULARY, file)) is None
    path = with_template(tmp_path / "blank.gguf", " \n")
    with open_gguf(path) as file:
        assert chat_template(file, Tokenizer(path, file)) is None
    path = with_template(tmp_path / "number.gguf", 1)
    with open_gguf(path) as file, pytest.raises(GGUFError, match=r"tokenizer\.chat_template"):
        chat_template(file, Tokenizer(path, file))
