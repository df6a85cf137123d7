"""Every broken file of the reader's table through the commands: exit 1, one line, nothing else."""

from pathlib import Path

import gguf_cases
import pytest

from cli.main import run


@pytest.mark.parametrize("case", gguf_cases.BROKEN)
@pytest.mark.parametrize("command", [["inspect"], ["generate", "-p", "Hello"]], ids=["inspect", "generate"])
def test_a_broken_file_is_one_line_and_exit_1(
    command: list[str], case: str, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    files, expected = gguf_cases.BROKEN[case]
    path = gguf_cases.write(tmp_path, files)
    assert run([command[0], str(path), *command[1:]]) == 1
    out, err = capfd.readouterr()  # of the process, not only of Python: llama.cpp writes too
    assert out == ""
    assert err.startswith("localrun: ") and err.count("\n") == 1
    assert expected in err
