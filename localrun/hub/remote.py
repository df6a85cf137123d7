"""Repositories of Hugging Face's hub: which files there are, and their bytes, by huggingface_hub.

The hub is HF_ENDPOINT, the user's token the library's own affair. What goes wrong is one LocalrunError. Bytes are asked
for in pieces, at any offset: huggingface_hub 2.4 itself starts a file anew when it was interrupted.

Source: hf_api.py and file_download.py of https://github.com/huggingface/huggingface_hub 2.4.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from localrun.errors import LocalrunError
from localrun.hub.names import File

if TYPE_CHECKING:
    from types import ModuleType

PIECE = 4 << 30  # bytes asked for at once; the hub's servers give no more than 50 GB
_CHUNK = 1 << 20
_HEADER_BYTES = 16 << 20  # that hold a vocabulary's keys and all tensors' names
_TIMEOUT_S = 30.0  # without a byte
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")


class ConnectionBroken(LocalrunError):
    """The hub could not be reached, or went away: to try again is of use."""


class Repository:
    """A repository at the commit that it had when it was opened.

    Attributes:
        name: OWNER/NAME.
        files: all of its files.
    """

    def __init__(self, name: str) -> None:
        """Raises LocalrunError if it does not exist, is not open to the user, or the hub cannot be reached."""
        self._library = _library()
        self.name, self._endpoint = name, os.environ.get("HF_ENDPOINT") or None
        api = self._library.HfApi(endpoint=self._endpoint)
        with self._explained():
            info = api.model_info(name, files_metadata=True, timeout=_TIMEOUT_S)
        self._commit = info.sha
        self.files = [self._file(sibling) for sibling in info.siblings or ()]

    def _file(self, sibling: Any) -> File:
        sha256 = sibling.lfs.sha256 if sibling.lfs else None
        return File(sibling.rfilename, sibling.size or 0, sha256, sibling.blob_id)

    def read(self, file: File, start: int, stop: int) -> Iterator[bytes]:
        """Bytes start..stop of a file, in chunks; fewer if the connection breaks, which raises ConnectionBroken.

        Raises LocalrunError if the hub has another file by now, or gives none.
        """
        hub = self._library
        url = hub.hf_hub_url(self.name, file.path, revision=self._commit, endpoint=self._endpoint)
        headers = hub.utils.build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}", "Accept-Encoding": "identity"}
        with (
            self._explained(),
            hub.get_session().stream(
                "GET", url, headers=headers, timeout=_TIMEOUT_S, follow_redirects=True
            ) as response,
        ):
            hub.utils.hf_raise_for_status(response)
            self._check(response, file, start)
            left = stop - start
            for chunk in response.iter_bytes(_CHUNK):
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return
        if left > 0:
            raise ConnectionBroken(f"{self.name}: the connection ended early, {left:,} bytes before the end of a piece")

    def _check(self, response: Any, file: File, start: int) -> None:
        """Raises LocalrunError unless a response has these bytes of this file."""
        found = _RANGE.fullmatch(response.headers.get("content-range", ""))
        if response.status_code == 200 and start == 0:  # the whole file
            n_bytes = response.headers.get("content-length")
        elif response.status_code == 206 and found and int(found[1]) == start:
            n_bytes = found[3]
        else:
            raise LocalrunError(f"{self.name}: the hub gives no part of {file.path!r} (status {response.status_code})")
        if n_bytes != str(file.n_bytes):
            raise LocalrunError(
                f"{self.name}: {file.path!r} has {n_bytes} bytes there, expected {file.n_bytes}, as the hub lists it"
            )

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """The library's errors as one line each."""
        import httpx2

        errors = self._library.errors
        try:
            yield
        except errors.GatedRepoError:
            page = f"{self._endpoint or 'https://huggingface.co'}/{self.name}"
            raise LocalrunError(f"{self.name}: is gated; accept its terms at {page}, then run: hf auth login") from None
        except errors.RepositoryNotFoundError:
            raise LocalrunError(f"{self.name}: no such repository, or a private one; hf auth login names you") from None
        except errors.HfHubHTTPError as error:
            status = error.response.status_code
            kind = ConnectionBroken if status >= 500 or status in (408, 429) else LocalrunError
            raise kind(f"{self.name}: the hub answers with status {status}") from None
        except errors.OfflineModeIsEnabled:
            raise LocalrunError(f"{self.name}: HF_HUB_OFFLINE is set; unset it to pull") from None
        except errors.HFValidationError as error:
            raise LocalrunError(f"{self.name}: {error}") from None
        except httpx2.HTTPError as error:
            what = str(error) or type(error).__name__
            raise ConnectionBroken(f"{self.name}: the hub cannot be reached: {what}") from None
        except (KeyError, TypeError, ValueError, AttributeError) as error:  # an answer that is no hub's
            raise LocalrunError(f"{self.name}: the answer is not a hub's: {type(error).__name__}: {error}") from None


def _library() -> ModuleType:
    try:
        import huggingface_hub
        import huggingface_hub.errors
        import huggingface_hub.utils
    except ImportError:
        raise LocalrunError("pull needs the package huggingface_hub: pip install 'localrun[hub]'") from None
    huggingface_hub.utils.logging.set_verbosity_error()  # its lines are about retries, which are ours
    return huggingface_hub


@contextmanager
def header_of(repository: Repository, file: File) -> Iterator[Path]:
    """A file as long as that one, with its beginning and zeros behind, which goes when the block ends.

    Raises LocalrunError if the beginning cannot be had; what reads headers does if the header is longer than that.
    """
    with tempfile.TemporaryDirectory(prefix="localrun-") as folder:
        path = Path(folder) / "header.gguf"
        with path.open("wb") as out:
            for chunk in repository.read(file, 0, min(_HEADER_BYTES, file.n_bytes)):
                out.write(chunk)
            out.truncate(file.n_bytes)
        yield path
