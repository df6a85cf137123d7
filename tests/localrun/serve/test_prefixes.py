"""What is kept of finished conversations, and the same replies whatever was."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import tiny_models
import torch
from caches import kinds

import localrun
from localrun.engine import Engine
from localrun.errors import LocalrunError
from localrun.generate.sampling import Sampling
from localrun.generate.session import Session
from localrun.network.cache import Cache
from localrun.serve import store as store_module
from localrun.serve.prefixes import Prefixes
from localrun.serve.store import Store

GREEDY = Sampling(temperature=0.0)
ids = tiny_models.prompt("llama")


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with localrun.load(tiny_models.shared("llama"), threads=2, ctx=96) as model:
        yield model


def used(
    engine: Engine, prefixes: Prefixes, prompt: list[int], n: int = 4, running: Sequence[Session] = ()
) -> tuple[int, list[int]]:
    """A reply on what the prefixes have: tokens reused, and the reply, which is always the right one."""
    session = prefixes.take(prompt, running)
    reply = list(session.tokens(prompt, GREEDY, max_tokens=n))
    assert reply == list(engine.session().tokens(prompt, GREEDY, max_tokens=n))
    reused = session.stats.reused_tokens
    prefixes.keep(session)
    return reused, reply


def test_the_longest_prefix_wins_and_a_short_question_costs_no_conversation(engine: Engine) -> None:
    prefixes = Prefixes(engine, 1 << 30, 2)
    reused, reply = used(engine, prefixes, ids[:30])
    assert reused == 0
    aside = [*ids[:8], *ids[30:33]]  # shares eight tokens
    reused, answer = used(engine, prefixes, aside)
    assert reused == 8 and answer == list(engine.session().tokens(aside, GREEDY, max_tokens=4))
    on = [*ids[:30], *reply, 5]
    reused, after = used(engine, prefixes, on)
    assert reused == 33  # as if nobody had asked; the reply's last token was never evaluated
    assert after == list(engine.session().tokens(on, GREEDY, max_tokens=4))


def test_a_running_conversation_is_copied_from(engine: Engine) -> None:
    running = engine.session()
    tokens = running.tokens(ids[:20], GREEDY, max_tokens=6)
    begun = [next(tokens), next(tokens)]
    copy = Prefixes(engine, 1 << 30, 2).take(ids[:22], [running])
    assert copy.ids == ids[:20]
    assert [*begun, *tokens] == list(engine.session().tokens(ids[:20], GREEDY, max_tokens=6))
    assert list(copy.tokens(ids[:22], GREEDY, max_tokens=4)) == list(
        engine.session().tokens(ids[:22], GREEDY, max_tokens=4)
    )


def test_those_used_least_recently_go(engine: Engine) -> None:
    one = engine.session()
    list(one.tokens(ids[:20], GREEDY, max_tokens=4))
    room = 2 * one.cache.n_bytes
    assert room >= 2 * 23 * engine.config.kv_bytes_per_token  # whole pages
    prefixes = Prefixes(engine, room, 2)
    other, third = [token ^ 1 for token in ids[:20]], [token ^ 2 for token in ids[:20]]
    for prompt in (ids[:20], other, third):
        used(engine, prefixes, prompt)
        assert prefixes.n_bytes <= room
    assert used(engine, prefixes, third)[0] == 19
    assert used(engine, prefixes, other)[0] == 19
    assert used(engine, prefixes, ids[:20])[0] == 0


def test_nothing_is_kept_where_there_is_no_room(engine: Engine) -> None:
    prefixes = Prefixes(engine, 0, 2)
    used(engine, prefixes, ids[:20])
    assert prefixes.n_bytes == 0 and used(engine, prefixes, ids[:20])[0] == 0


def test_what_goes_on_is_taken_and_what_turns_off_is_copied(engine: Engine) -> None:
    prefixes = Prefixes(engine, 1 << 30, 2)
    _, reply = used(engine, prefixes, ids[:30])
    (kept,) = prefixes._kept
    assert prefixes.take([*ids[:30], *reply, 7], []) is kept
    prefixes.keep(kept)
    beside = prefixes.take([*ids[:20], 7], [])
    assert beside is not kept and beside.ids == ids[:20] and len(kept.ids) == 33
    prefixes._most_bytes = prefixes.n_bytes  # no room for both
    assert prefixes.take([*ids[:20], 7], []) is kept


@pytest.mark.parametrize(("written", "wanted", "kept"), [(6, 4, 4), (2103, 2100, 2100), (2103, 54, 54), (2103, 53, 0)])
def test_a_copy_holds_what_forgetting_would_leave(written: int, wanted: int, kept: int) -> None:
    """Layers of 3 and 2 values a row; the second one sees 5 tokens, and its ring has room for 2053."""
    cache, copy, loaded = (Cache([kinds(3), kinds(2, 2, window=5)], 3000, np.float16) for _ in range(3))
    rows = [np.random.default_rng(width).random((written, width)).astype(np.float16) for width in (3, 2, 2)]
    cache.append(0, torch.from_numpy(rows[0]))
    cache.append(1, torch.from_numpy(rows[1]), torch.from_numpy(rows[2]))
    cache.advance(written)
    assert cache.kept(wanted) == kept
    copy.copy(cache, wanted)
    cache.truncate(wanted)
    assert copy.length == cache.length == kept and copy.n_bytes <= cache.n_bytes
    expected = cache.save()
    loaded.load(expected, kept)
    for saved in (copy.save(), loaded.save()):
        assert saved.keys() == expected.keys() and all((saved[name] == expected[name]).all() for name in saved)


# ----------------------------------------------------------------------------------------------- on the disk


@pytest.fixture
def dropped() -> list[str]:
    return []


def kept_in(
    engine: Engine, folder: Path, dropped: list[str], most_bytes: int = 1 << 30, ram: int = 1 << 30
) -> Prefixes:
    return Prefixes(engine, ram, 2, Store(engine, folder, most_bytes, dropped.append))


def files(folder: Path) -> list[Path]:
    return sorted(folder.iterdir())


def test_a_restart_finds_conversations_again(engine: Engine, tmp_path: Path, dropped: list[str]) -> None:
    before = kept_in(engine, tmp_path / "new", dropped)
    _, reply = used(engine, before, ids[:30])
    before.close()
    assert before.n_bytes == 0 and (tmp_path / "new").stat().st_mode & 0o77 == 0
    (file,) = files(tmp_path / "new")
    assert file.stat().st_mode & 0o77 == 0
    after = kept_in(engine, tmp_path / "new", dropped)
    longer = [*ids[:30], *reply, *ids[30:50]]
    assert used(engine, after, longer)[0] == 33
    assert used(engine, after, [*ids[:9], 7])[0] == 9  # too little to read a file for; it is copied
    after.close()
    assert file not in files(tmp_path / "new")  # the longer one holds it
    assert used(engine, kept_in(engine, tmp_path / "new", dropped), longer)[0] == len(longer) - 1
    assert not dropped


def test_what_ram_has_no_room_for_goes_to_the_disk_and_the_oldest_from_there(
    engine: Engine, tmp_path: Path, dropped: list[str]
) -> None:
    prefixes = kept_in(engine, tmp_path, dropped, ram=0)
    used(engine, prefixes, ids[:30])
    prefixes.close()
    size = files(tmp_path)[0].stat().st_size
    prefixes = kept_in(engine, tmp_path, dropped, most_bytes=2 * size + 100, ram=0)
    other, third = [token ^ 1 for token in ids[:30]], [token ^ 2 for token in ids[:30]]
    for prompt in (other, third):
        assert used(engine, prefixes, prompt)[0] == 0
    prefixes.close()
    prefixes = kept_in(engine, tmp_path, dropped)
    assert [used(engine, prefixes, prompt)[0] for prompt in (third, other, ids[:30])] == [29, 29, 0]
    assert not dropped


DAMAGES = {
    "a bit of a key": lambda data: data[:-5] + bytes([data[-5] ^ 1]) + data[-4:],
    "a bit of the tokens": lambda data: data.replace(b'"ids": [', b'"ids": [1'),
    "its end": lambda data: data[:-100],
    "its head": lambda data: b"x" + data[1:],
    "another model's": lambda data: data.replace(b'"good_for": "', b'"good_for": "f'),
    "a type": lambda data: data.replace(b'"<f2"', b'"|O8"'),
    "all of it": lambda data: b"",
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_entry_is_dropped_with_a_line(
    engine: Engine, tmp_path: Path, dropped: list[str], damage: Callable[[bytes], bytes]
) -> None:
    prefixes = kept_in(engine, tmp_path, dropped)
    used(engine, prefixes, ids[:30])
    prefixes.close()
    (file,) = files(tmp_path)
    data = file.read_bytes()
    assert damage(data) != data
    file.write_bytes(damage(data))
    assert used(engine, kept_in(engine, tmp_path, dropped), ids[:32])[0] == 0
    (line,) = dropped
    assert line.startswith(f"{file}: dropped: ") and not files(tmp_path)


def test_others_files_stay_and_half_written_ones_go(
    engine: Engine, tmp_path: Path, dropped: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "notes").write_text("a")
    (tmp_path / f"{'0' * 16}-1.conversation").write_text("of another model")
    (tmp_path / ".localrun-1.tmp").write_text("half")
    kept_in(engine, tmp_path, dropped).close()
    assert len(files(tmp_path)) == 3
    monkeypatch.setattr(store_module, "_ABANDONED_S", -1.0)
    kept_in(engine, tmp_path, dropped).close()
    assert len(files(tmp_path)) == 2 and not dropped


def test_a_folder_that_cannot_be_used_is_a_line(engine: Engine, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("a")
    for folder in (tmp_path / "file", tmp_path / "no" / "folder"):
        with pytest.raises(LocalrunError, match=str(folder)):
            Store(engine, folder, 1 << 30, print)
