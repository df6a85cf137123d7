"""Names of files as users write them, and files that come whole, private where they should be, and replace no other."""

import errno
import os
import stat
import tempfile
from pathlib import Path
from typing import Any

import pytest

from localrun.errors import LocalrunError
from localrun.files import check_place, nameless_file, read_bytes, replacing, user_path


@pytest.mark.parametrize("name", ["~nosuchuser", "~nosuchuser/x", "~model.gguf", "x/~", " x", "x ", "'x'"])
def test_what_is_no_home_is_a_name(name: str) -> None:
    assert str(user_path(name)) == name


def test_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/somewhere")
    assert user_path("~/x") == Path("/somewhere/x") and user_path("~") == Path("/somewhere")


@pytest.mark.parametrize("name", ["", "a\0b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(LocalrunError, match="is no file name"):
        user_path(name)


def test_reading_has_an_end(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(bytes(1000))
    assert len(read_bytes(tmp_path / "x", "x", 1000)) == 1000
    with pytest.raises(LocalrunError, match=r"^x: is larger than 999 bytes$"):
        read_bytes(tmp_path / "x", "x", 999)
    with pytest.raises(LocalrunError, match="larger than 10,000 bytes"):
        read_bytes(Path("/dev/zero"), "zero", 10_000)


@pytest.mark.parametrize(("private", "mode"), [(True, 0o600), (False, 0o640)])
def test_replacing(private: bool, mode: int, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        for text in ("old", "new"):
            with replacing(tmp_path / "x", private=private) as path:
                path.write_text(text)
                assert not (tmp_path / "x").exists() or (tmp_path / "x").read_text() == "old"
    finally:
        os.umask(before)
    assert [(p.name, p.read_text(), stat.S_IMODE(p.stat().st_mode)) for p in tmp_path.iterdir()] == [("x", "new", mode)]


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt(), KeyError()])
def test_a_block_that_fails_leaves_the_old_file(error: BaseException, tmp_path: Path) -> None:
    (tmp_path / "x").write_text("old")
    kind = LocalrunError if isinstance(error, OSError) else type(error)
    with pytest.raises(kind) as caught, replacing(tmp_path / "x") as path:
        path.write_text("half")
        raise error
    if isinstance(error, OSError):
        assert str(caught.value) == f"{tmp_path / 'x'}: cannot be written: No space left on device"
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("x", "old")]


@pytest.mark.parametrize("act", [check_place, lambda path: replacing(path).__enter__()])
def test_what_cannot_be_replaced(act: Any, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("nowhere")
    (tmp_path / "self").symlink_to("self")
    places = {
        str(tmp_path / "pipe"): "is a device, a pipe",
        str(tmp_path / "link"): "broken link",
        str(tmp_path / "self"): "cannot be written: Too many levels|broken link",
        str(tmp_path): "is a folder",
        str(tmp_path / "no" / "x"): "folder .* does not exist",
        str(tmp_path / "pipe" / "x"): "folder .* does not exist",
        str(tmp_path / ("x" * 300)): "cannot be written: File name too long",
        "/proc/x": "cannot be written: ",
    }
    for place, message in places.items():
        with pytest.raises(LocalrunError, match=message) as caught:
            act(Path(place))
        assert str(caught.value).startswith(f"{place}: ")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["link", "pipe", "self"]


def test_a_place_that_is_looked_at_stays_empty(tmp_path: Path) -> None:
    check_place(tmp_path / "x")
    assert not list(tmp_path.iterdir())


def test_a_nameless_file_needs_no_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "tempdir", "/nowhere")
    with nameless_file() as file:
        file.write(b"abc")
        file.seek(0)
        assert file.read() == b"abc"
    monkeypatch.delattr(os, "memfd_create")
    with pytest.raises(LocalrunError, match="No such file or directory; set TMPDIR"):
        nameless_file()
