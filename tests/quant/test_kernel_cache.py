"""Compiled kernels are found again while nothing changed, and nothing but them is ever run."""

import errno
import importlib
import os
import pickle
import pkgutil
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from paths import ROOT

import quant
from quant.decode import linear, program
from quant.target import jit, kernel_cache
from quant.target.kernel import Kernel
from quant.target.kernel_cache import Folder

# ---- the folder's name covers all of quant: a stale kernel would give wrong numbers without a word ------------------


def fingerprint(folder: Path) -> str:
    code = "from quant.target import kernel_cache; print(kernel_cache._fingerprint())"
    done = subprocess.run([sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout


@pytest.fixture(scope="module")
def copy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("copy")
    shutil.copytree(ROOT / "quant", folder / "quant", ignore=shutil.ignore_patterns("__pycache__"))
    return folder


def test_the_same_sources_give_the_same_name(copy: Path) -> None:
    assert fingerprint(copy) == fingerprint(ROOT)


@pytest.mark.parametrize("name", ["errors.py", "simd/core.py", "formats/q8_0.py", "decode/attention.py"])
def test_a_changed_file_in_any_folder_changes_the_name(copy: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_PACKAGE", copy / "quant")
    path = copy / "quant" / name
    before, text = kernel_cache._fingerprint(), path.read_text(encoding="utf-8")
    path.write_text(text + "\n# changed\n", encoding="utf-8")
    assert kernel_cache._fingerprint() != before
    path.write_text(text, encoding="utf-8")


def test_a_file_more_or_under_another_name_changes_the_name(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel_cache, "_PACKAGE", copy / "quant")
    path = copy / "quant" / "gemm" / "new.py"
    before = kernel_cache._fingerprint()
    path.touch()
    added = kernel_cache._fingerprint()
    path = path.rename(copy / "quant" / "gemv" / "new.py")
    assert len({before, added, kernel_cache._fingerprint()}) == 3
    path.unlink()


def test_another_cpu_has_another_name(monkeypatch: pytest.MonkeyPatch) -> None:
    """A home folder may be shared by several machines."""
    before = kernel_cache._fingerprint()
    codegen = kernel_cache.registry.cpu_target.target_context.codegen()
    monkeypatch.setattr(type(codegen), "magic_tuple", lambda self: ("x86_64", "another", ""))
    assert kernel_cache._fingerprint() != before


def test_every_kernel_has_a_name_of_its_own() -> None:
    """The files are named after them."""
    modules = [importlib.import_module(found.name) for found in pkgutil.walk_packages(quant.__path__, "quant.")]
    kernels = {id(value): value for module in modules for value in vars(module).values() if isinstance(value, Kernel)}
    names = [f"{kernel.function.__module__}.{kernel.__name__}" for kernel in kernels.values()]
    assert len(names) > 50 and len(names) == len(set(names))


# ---- a kernel's file -------------------------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty kernel cache, and no line said yet."""
    kernel_cache._say_once.cache_clear()
    monkeypatch.setattr(kernel_cache, "folder", lambda: Folder(tmp_path))
    yield tmp_path
    kernel_cache._say_once.cache_clear()


def compiled_hits() -> int:
    """1 if the kernel was found, 0 if it was compiled. It runs either way."""
    compiled = jit._compile(program._nothing)
    compiled.ctypes(0, 0, 0)
    return compiled.cache_hits


def kept(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.kernel"))


def test_a_kernel_is_found_again(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    assert [compiled_hits(), compiled_hits()] == [0, 1]
    assert [path.name for path in kept(folder)] == ["quant.decode.program._nothing.kernel"]
    assert kept(folder)[0].stat().st_mode & 0o022 == 0
    assert kernel_cache.kept() == 1 and kernel_cache.damaged() == 0
    assert not caplog.messages


def test_a_kernel_with_structs_is_found_again(folder: Path) -> None:
    """Types of this package stand in what is pickled."""
    assert [jit._compile(linear._norm_row).cache_hits for _ in range(2)] == [0, 1]


class Payload:
    """Creates a file when it is unpickled."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Callable, tuple]:
        return os.mkdir, (str(self.path),)


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:20],
        lambda content: content[:-1],
        lambda content: content + b"\0",
        lambda content: content[:1000] + bytes([content[1000] ^ 1]) + content[1001:],
        lambda content: bytes(len(content)),
    ],
    ids=["empty", "cut in the digest", "cut", "longer", "a bit", "zeros"],
)
def test_a_damaged_kernel_is_compiled_anew_with_one_line(
    folder: Path, caplog: pytest.LogCaptureFixture, damage: Callable[[bytes], bytes]
) -> None:
    compiled_hits()
    path = kept(folder)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert kernel_cache.damaged() == 1
    assert [compiled_hits(), compiled_hits()] == [0, 1]
    assert caplog.messages == [f"compiled kernels in {folder} were damaged; they are compiled anew"]


def test_nothing_is_unpickled_that_was_not_written_here(folder: Path) -> None:
    compiled_hits()
    path = kept(folder)[0]
    content = path.read_bytes()
    path.write_bytes(content[:32] + pickle.dumps(Payload(folder / "ran")) + content[32:])
    assert compiled_hits() == 0 and not (folder / "ran").exists()


def test_another_kernels_file_is_not_taken(folder: Path) -> None:
    compiled_hits()
    other = folder / "quant.decode.linear._norm_row.kernel"
    shutil.copy(kept(folder)[0], other)
    assert jit._compile(linear._norm_row).cache_hits == 0


@pytest.mark.parametrize("owner, mode, refused", [(0, 0, ""), (0, 0o002, "write"), (0, 0o020, "write"), (1, 0, "user")])
def test_code_is_run_from_files_of_ones_own(folder: Path, owner: int, mode: int, refused: str) -> None:
    status = list(os.stat(folder))
    status[0], status[4] = 0o40755 | mode, os.geteuid() + owner
    assert refused in kernel_cache._refusal(os.stat_result(status))


def test_a_file_that_others_may_write_to_is_not_used(folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    compiled_hits()
    kept(folder)[0].chmod(0o666)
    assert [compiled_hits(), compiled_hits()] == [0, 1]  # it is replaced
    assert caplog.messages == [f"compiled kernels in {folder} are not used: others may write to it"]


@pytest.mark.parametrize("failing", ["tempfile.mkstemp", "os.replace", "os.fchmod"])
def test_a_kernel_that_cannot_be_kept_serves_this_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, failing: str
) -> None:
    def full(*args: object, **options: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(failing, full)
    assert [compiled_hits(), compiled_hits()] == [0, 0]
    assert len(caplog.messages) == 1 and "No space left on device" in caplog.messages[0]
    assert {path.name for path in folder.iterdir()} <= {"compiling.lock"}


def test_kernels_outside_the_package_are_not_kept(folder: Path) -> None:
    """The folder's name does not cover their source."""

    @jit.kernel("void()")
    def elsewhere():
        pass

    assert elsewhere.address and not kept(folder)


def test_a_refused_folder_is_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that another user has put there would be followed."""
    monkeypatch.setattr(kernel_cache, "folder", lambda: Folder(tmp_path, "others may write to it"))
    assert compiled_hits() == 0 and not list(tmp_path.iterdir())


# ---- where the folder is ---------------------------------------------------------------------------------------------


@pytest.fixture
def chosen(monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Folder]:
    """The folder with $LOCALRUN_CACHE set."""

    def choose(base: str) -> Folder:
        monkeypatch.setenv("LOCALRUN_CACHE", base)
        return kernel_cache.folder.__wrapped__()

    return choose


def test_the_folder_is_made_for_its_owner(chosen: Callable[[str], Folder], tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        made = chosen(str(tmp_path / "new"))
    finally:
        os.umask(before)
    assert not made.refusal and made.path.stat().st_mode & 0o022 == 0


def test_a_folder_that_others_may_write_to_is_refused(chosen: Callable[[str], Folder], tmp_path: Path) -> None:
    chosen(str(tmp_path)).path.chmod(0o777)
    assert chosen(str(tmp_path)).refusal == "others may write to it"


def test_a_folder_that_cannot_be_made_is_refused(chosen: Callable[[str], Folder], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert chosen(str(tmp_path / "file")).refusal == "Not a directory"
    assert chosen("/proc/no").refusal


def test_without_a_home_no_folder_is_made(
    chosen: Callable[[str], Folder], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("os.path.expanduser", lambda path: path)  # as where HOME and the user's entry are missing
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert chosen("").refusal == "there is no home folder"
    assert not list(tmp_path.iterdir())
