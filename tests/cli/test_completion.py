"""localrun completion: the scripts, and what they get when they ask."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from cli.main import run

ASKS = {  # what each shell's script sets, for "localrun pul"
    "bash": {"COMP_WORDS": "localrun pul", "COMP_CWORD": "1"},
    "zsh": {"_TYPER_COMPLETE_ARGS": "localrun pul"},
    "fish": {"_TYPER_COMPLETE_ARGS": "localrun pul", "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


@pytest.mark.parametrize("shell", ASKS)
def test_the_script_is_sound_and_is_answered(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["completion", shell]) == 0
    script = capsys.readouterr().out
    assert f"_LOCALRUN_COMPLETE=complete_{shell}" in script
    if shutil.which(shell):
        subprocess.run([shell, "-n"], input=script, text=True, check=True)
    asked = os.environ | ASKS[shell] | {"_LOCALRUN_COMPLETE": f"complete_{shell}"}
    answer = subprocess.run([sys.executable, "-m", "cli.main"], env=asked, capture_output=True, text=True, check=True)
    assert "pull" in answer.stdout and "generate" not in answer.stdout and not answer.stderr
