"""Git LFS pointers: the short texts that a clone without git-lfs has where large files belong.

Format: https://github.com/git-lfs/git-lfs/blob/main/docs/spec.md.
"""

LONGEST = 1024  # bytes of a pointer
ADVICE = "is a Git LFS pointer, not the file itself; `git lfs pull` in its folder fetches that"


def is_pointer(start: bytes) -> bool:
    """Whether a file that starts so is a pointer."""
    return start.startswith(b"version https://git-lfs.github.com/spec/")
