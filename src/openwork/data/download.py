"""Downloads: by pooch, checked, retried with growing pauses, under a temporary name until they are whole."""

from __future__ import annotations

import contextlib
import ipaddress
import logging
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urljoin, urlsplit

from openwork.data.entry import File

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

CHUNK = 1 << 16


class Failure(Exception):
    """A file could not be had; the text says in a few words why."""


def fetch(file: File, folder: Path, *, attempts: int = 4, pause: float = 1.0) -> Path:
    """Download `file` into `folder` and return its path; nothing stands under its name unless it is whole and right.

    Every home is asked in turn, up to `attempts` times, with a pause of `pause`, 2 `pause`, 4 `pause` ... seconds
    between the rounds. A home that refuses (4xx), leads to plain http or has another file is not asked again.

    Raises:
        Failure: if no home gives the file, or the folder cannot be written.
    """
    homes, reasons = list(file.homes), dict[str, str]()
    with _progress() as progress:
        for attempt in range(attempts):
            if attempt:
                time.sleep(pause * 2 ** (attempt - 1))
            for home in tuple(homes):
                try:
                    return _once(file, home, folder, progress)
                except _Final as error:
                    homes.remove(home)
                    reasons[home] = str(error)
                except Failure as error:
                    reasons[home] = str(error)
            if not homes:
                break
    raise Failure("; ".join(f"{home}: {reason}" for home, reason in reasons.items()))


def secure(address: str) -> bool:
    """Tell whether an address is https, or stays on this machine."""
    parts = urlsplit(address)
    if parts.scheme == "https":
        return True
    try:
        return parts.scheme == "http" and ipaddress.ip_address(parts.hostname or "").is_loopback
    except ValueError:
        return False


class _Final(Failure):
    """A failure that a second attempt would not mend."""


class _Bar:
    """A line of the progress display, with the four names that pooch expects; stops a file that is too long."""

    def __init__(self, progress: Progress, task: TaskID, size: int) -> None:
        self.progress, self.task, self.size = progress, task, size
        self.total = size
        self.seen = 0

    def update(self, amount: int) -> None:
        self.seen += amount
        if self.seen > self.size + CHUNK:  # pooch counts whole chunks
            raise _Final(f"it is longer than {self.size:,} bytes")
        self.progress.update(self.task, completed=min(self.seen, self.size))

    def reset(self) -> None:
        self.seen = 0

    def close(self) -> None:
        self.progress.update(self.task, completed=self.seen)


def _once(file: File, home: str, folder: Path, progress: Progress) -> Path:
    import pooch
    from requests.exceptions import HTTPError, RequestException

    if not secure(home):
        raise _Final("it is not https")
    task = progress.add_task(file.name, total=file.size)
    downloader = pooch.HTTPDownloader(
        progressbar=_Bar(progress, task, file.size),
        chunk_size=CHUNK,
        headers={"Accept-Encoding": "identity"},
        hooks={"response": _refuse_plain},
    )
    try:
        with _quiet(pooch.get_logger()):
            path = pooch.retrieve(home, f"sha256:{file.sha256}", file.name, folder, downloader=downloader)
    except HTTPError as error:
        status = 0 if error.response is None else error.response.status_code
        kind = _Final if 400 <= status < 500 and status not in (408, 429) else Failure
        raise kind(f"status {status}") from error
    except RequestException as error:
        raise Failure(type(error).__name__) from error
    except OSError as error:
        raise _Final(f"cannot write {str(folder)!r}: {error.strerror or error}") from error
    except ValueError as error:
        raise _Final("the file there has another checksum") from error
    finally:
        progress.remove_task(task)
    return Path(path)


def _refuse_plain(response: Any, *_args: Any, **_more: Any) -> None:
    """Stop before a redirect that leaves https."""
    if response.is_redirect and not secure(urljoin(response.url, response.headers["location"])):
        raise _Final("it redirects to an address that is not https")


@contextlib.contextmanager
def _progress() -> Iterator[Progress]:
    """Yield a display on the error stream, silent where that is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn

    console = Console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as progress:
        yield progress


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    level = logger.level
    logger.setLevel(logging.WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)
