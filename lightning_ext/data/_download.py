"""Files from the web: fetched with a progress bar, checked, and only then given their name."""

import hashlib
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

__all__ = ["download"]

_CHUNK = 1 << 20
_TIMEOUT = 30.0


def download(urls: Sequence[str], target: Path, checksum: str) -> None:
    """Fetch a file from the first address that works.

    Args:
        urls: The same file at several places.
        target: Where it goes; its folder is created. An interrupted download leaves nothing under this name.
        checksum: ``"<algorithm>:<hexadecimal digest>"``, an algorithm of :mod:`hashlib`.

    Raises:
        FileNotFoundError: No address can be reached.
        RuntimeError: What came is not the expected file; it is deleted.
    """
    partial = target.with_name(f"{target.name}.partial")
    target.parent.mkdir(parents=True, exist_ok=True)
    algorithm, wanted = checksum.split(":")
    reasons = []
    for url in urls:
        try:
            found = _fetch(url, partial, algorithm)
        except (urllib.error.URLError, TimeoutError, ConnectionError) as error:
            partial.unlink(missing_ok=True)
            reasons.append(f"{url}: {getattr(error, 'reason', error)}")
            continue
        if found != wanted:
            partial.unlink()
            raise RuntimeError(
                f"{url} is not the expected file: its {algorithm} is {found} instead of {wanted}. It was deleted; try "
                "again, or fetch the file by other means."
            )
        partial.replace(target)
        return
    raise FileNotFoundError(
        f"{target.name} could not be downloaded ({'; '.join(reasons)}). Without a connection, put the file in "
        f"{target.parent} yourself."
    )


def _fetch(url: str, target: Path, algorithm: str) -> str:
    """Write what stands at ``url`` to ``target``; return its digest."""
    digest = hashlib.new(algorithm, usedforsecurity=False)
    with urllib.request.urlopen(url, timeout=_TIMEOUT) as response, target.open("wb") as file:
        size = int(response.headers.get("Content-Length") or 0) or None
        name = target.name.removesuffix(".partial")
        with tqdm(total=size, unit="B", unit_scale=True, desc=name, leave=False, disable=None) as bar:
            while chunk := response.read(_CHUNK):
                file.write(chunk)
                digest.update(chunk)
                bar.update(len(chunk))
    return digest.hexdigest()
