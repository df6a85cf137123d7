"""The recording of a chat: thoughts shown, folded, interrupted, resumed, saved and loaded, on a real terminal."""

import subprocess
import sys

import pytest
from paths import SCRIPTS


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_everything_is_seen() -> None:
    """The script ends with 1 where something is not."""
    done = subprocess.run(
        [sys.executable, str(SCRIPTS / "record_chat.py")], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    for caption in ("fold to a line", "Ctrl-C in the thoughts", "goes on from there", "saved", "pasted"):
        assert f"--- {caption}" in done.stdout or caption in done.stdout
