"""Files that are whole or not there: written beside their name, brought to the disk, renamed, and the folder brought to the disk too, so
that neither a kill nor a power loss leaves half of one. What a process that is gone has left beside them is removed by the next that writes
there. Lines of a file that a full disk does not take are kept until it does. What is read back may have become anything: `read_object` and
`read_records` make one error of it.

Temporary names are .tmp-NAME--HOST-PID-START, START being the tick of the machine at which the process began: they say whether their maker
still lives. Of a maker on another machine one only knows when it last wrote.
"""

import contextlib
import errno
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

DISK_ERRORS = frozenset(
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM, errno.EIO, errno.ESTALE)
)
"""What a write meets where a disk is full, a limit is reached, it is read-only, forbidden or failing."""
FORBIDDEN = frozenset((errno.EACCES, errno.EPERM))
"""Of those, what stays as it is until somebody gives the rights."""
PATH_ERRORS = frozenset(
    (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENOTEMPTY, errno.ELOOP, errno.ENAMETOOLONG)
)
"""What a path meets that leads to nothing, or to something of another kind."""
ABANDONED_SECONDS = 86400.0
"""Without a write, after which what another machine has left counts as abandoned."""
_TEMPORARY = re.compile(r"\.tmp-.+?--(?P<host>.+)-(?P<pid>[0-9]+)-(?P<start>[0-9]+)")
_ASIDE = ".tmp-old-"


def describe_os_error(error: OSError, path: str | os.PathLike[str] | None = None) -> str:
    """In a sentence: which file, what is wrong, the way out."""
    where = error.filename if path is None else path
    text = f"{where or 'a file'}: {error.strerror or error}"
    with contextlib.suppress(OSError, TypeError, ValueError):
        if where and error.errno in (errno.ENOSPC, errno.EDQUOT):
            folder = Path(os.fsdecode(where)).absolute()
            while not folder.is_dir():
                folder = folder.parent
            text += f" ({shutil.disk_usage(folder).free:,} bytes free)"
    ways: dict[int | None, str] = {
        errno.ENOSPC: "Make room",
        errno.EDQUOT: "Make room in the quota",
        errno.EFBIG: "A limit of the file's size (ulimit -f) is reached; raise it",
        errno.EROFS: "Mount it writable",
        errno.EACCES: "Give the rights to read and write there",
        errno.EPERM: "Give the rights to read and write there",
    }
    if error.errno in PATH_ERRORS:
        return f"{text}. Give another path, or move what is in its way."
    return f"{text}. {ways.get(error.errno, 'Look at the disk')} and try again."


def write_atomically(path: str | Path, content: str | bytes) -> None:
    """Writes a small file in one act, with the mode that the umask gives; through a link, and into a pipe or a device as they are. Raises
    OSError, and then leaves what was there."""
    path, content = Path(os.path.realpath(path)), content.encode() if isinstance(content, str) else content
    if path.exists() and not path.is_file() and not path.is_dir():
        path.write_bytes(content)
        return
    with new_file(path) as partial, open(partial, "wb") as file:
        file.write(content)


@contextlib.contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """The name of a file beside `final` that becomes it when what was written there is on the disk; nothing is left of it if that fails,
    and what was there before stays."""
    partial = temporary(final)
    try:
        yield partial
        publish_file(partial, final)
    except BaseException:
        with contextlib.suppress(OSError):
            partial.unlink()
        raise


def publish_file(partial: Path, final: Path) -> None:
    """A file that is written becomes `final`, down to the disk."""
    _sync(partial)
    os.replace(partial, final)
    sync_directory(final.parent)


@contextlib.contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder beside `final` that becomes it when all that was written there is on the disk; nothing is left of it if that fails.

    Raises:
        FileExistsError, OSError: if `final` exists by then; a folder that is empty is replaced.
    """
    remove_abandoned(final.parent)
    partial = temporary(final)
    partial.mkdir(parents=True)
    try:
        yield partial
        for folder, _, names in os.walk(partial, topdown=False):
            for name in names:
                _sync(Path(folder) / name)
            sync_directory(Path(folder))
        os.rename(partial, final)
    except BaseException:
        remove(partial)
        raise
    sync_directory(final.parent)


def remove(path: Path) -> None:
    """Removes whatever has the name: a folder with all that is in it, as far as that can be done, a file, a link, a pipe. Raises OSError
    if something that is no folder stays."""
    with contextlib.suppress(FileNotFoundError):
        if stat.S_ISDIR(path.lstat().st_mode):
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink()


def publish_folder(partial: Path, final: Path) -> None:
    """A folder whose files are on the disk becomes `final`. What has that name is set aside first, never half removed under it:
    `restore_folder` brings it back after a kill in between."""
    aside = final.parent / f"{_ASIDE}{final.name}"
    remove(aside)
    if os.path.lexists(final):
        os.rename(final, aside)
    os.rename(partial, final)
    sync_directory(final.parent)
    remove(aside)


def restore_folders(parent: Path) -> None:
    """What was set aside for a folder that did not come has its name again."""
    for aside in parent.glob(f"{_ASIDE}*"):
        final = parent / aside.name.removeprefix(_ASIDE)
        if not final.exists():
            os.rename(aside, final)


def _sync(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def sync_directory(directory: Path) -> None:
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def temporary(path: Path) -> Path:
    """A name beside `path` that tells who made it. One process makes one at a time for a path."""
    return path.with_name(f".tmp-{path.name}--{_machine()}-{os.getpid()}-{_start_of(os.getpid())}")


def _machine() -> str:
    """Where a process number means this one: the host, and in it the container."""
    try:
        space = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        space = 0
    return f"{socket.gethostname()}.{space}"


def remove_abandoned(folder: Path) -> list[str]:
    """Removes what processes that are gone have left in a folder under temporary names. Returns the names."""
    removed = []
    try:
        entries = list(folder.iterdir())
    except OSError:
        return []
    for path in entries:
        if (found := _TEMPORARY.fullmatch(path.name)) and _is_abandoned(path, **found.groupdict()):
            with contextlib.suppress(OSError):
                remove(path)
                removed.append(path.name)
    return removed


def _is_abandoned(path: Path, host: str, pid: str, start: str) -> bool:
    if host == _machine():
        return _start_of(int(pid)) != int(start)
    try:
        newest = max(each.lstat().st_mtime for each in [path, *path.rglob("*")])
    except OSError:  # somebody removes it
        return False
    return time.time() - newest > ABANDONED_SECONDS


def _start_of(pid: int) -> int:
    """Ticks after boot at which a process began; 0 where the system does not say and it lives, -1 if it is gone."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return -1 if state in "ZX" else int(fields[18])
    except (OSError, IndexError, ValueError):
        pass
    if Path("/proc/self/stat").exists():
        return -1
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return -1
    except OSError:
        pass
    return 0


class JsonError(ValueError):
    """What should be a JSON object is none, whatever it is instead."""


@dataclass(frozen=True)
class Record:
    """A line of a file of records. Attributes: number: of the line, from 1. row: None where the line is damaged. line: without its end."""

    number: int
    row: dict[str, Any] | None
    line: bytes


def parse_object(content: str | bytes) -> dict[str, Any]:
    """A JSON object.

    Raises:
        JsonError: for anything else: bytes that are no UTF-8, other JSON, numbers and nesting beyond what Python reads.
    """
    try:
        found = json.loads(content.decode() if isinstance(content, bytes) else content)
    except RecursionError:
        raise JsonError("its JSON is nested too deeply") from None
    except (ValueError, OverflowError) as error:
        raise JsonError(f"it is no JSON ({error})" if content.strip() else "it is empty") from None
    if not isinstance(found, dict):
        raise JsonError(f"it holds a {type(found).__name__}, not an object")
    return found


def read_object(path: str | Path, most_bytes: int = 1 << 24) -> dict[str, Any]:
    """The JSON object in a file.

    Raises:
        JsonError: if there is none, or the file is longer than `most_bytes`. OSError: if it cannot be read, or is no plain file.
    """
    with open_plain(path) as file:
        content = file.read(most_bytes + 1)
    if len(content) > most_bytes:
        raise JsonError(f"it has more than {most_bytes:,} bytes")
    return parse_object(content)


def read_records(path: str | Path, most_bytes: int = 1 << 20) -> Iterator[Record]:
    """JSON objects, one a line. What a kill left unfinished at the end is left out.

    Args:
        most_bytes: of a line; a longer one is damaged.
    Raises:
        OSError: if it cannot be read, or is no plain file.
    """
    with open_plain(path) as file:
        for number in itertools.count(1):
            line = file.readline(most_bytes)
            if not line:
                return
            ended = line.endswith(b"\n")
            too_long = not ended and len(line) == most_bytes
            while too_long and not ended and (rest := file.readline(most_bytes)):
                ended = rest.endswith(b"\n")
            row = None
            if not too_long:
                with contextlib.suppress(JsonError):
                    row = parse_object(line)
            if row is not None or (ended and line.strip()):
                yield Record(number, row, line.rstrip(b"\n"))


def open_plain(path: str | Path) -> BinaryIO:
    """A file to read. Raises OSError for whatever else has the name, without waiting for it as a pipe would have one do."""
    handle = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    mode = os.fstat(handle).st_mode
    if not stat.S_ISREG(mode):
        os.close(handle)
        raise OSError(errno.EISDIR if stat.S_ISDIR(mode) else errno.EINVAL, "is no plain file", str(path))
    return open(handle, "rb")


def sealed(content: dict[str, Any]) -> str:
    """JSON of a dictionary with its own CRC32 in it."""
    return json.dumps({"crc32": crc_of(content), **content})


def unsealed(content: Any) -> dict[str, Any]:
    """The dictionary that was sealed, from its parsed JSON.

    Raises:
        ValueError: if it is another, or none.
    """
    if not isinstance(content, dict) or "crc32" not in content:
        raise ValueError("it has no checksum")
    rest = {key: value for key, value in content.items() if key != "crc32"}
    if content["crc32"] != crc_of(rest):
        raise ValueError(f"its CRC32 is {crc_of(rest)}, it says {content['crc32']!r}")
    return rest


def crc_of(content: dict[str, Any]) -> int:
    """CRC32 of a dictionary as JSON."""
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


class Journal:
    """A file to which records are added. While the disk takes none they are kept, and written before the next that it takes.

    Args:
        tell: called with what went wrong when that begins, and with "" when all is written again.
    Attributes:
        problem: why nothing is written at present; "" if it is. waiting: records that are kept. kept: how many
            the last write held. lost: records that were too many to keep.
    """

    KEPT = 20_000

    def __init__(self, path: Path, tell: Callable[["Journal", str], None]):
        self.path, self.tell = path, tell
        self.problem, self.kept, self.lost = "", 0, 0
        self.waiting: list[bytes] = []
        self._sound: int | None = None
        """Bytes up to which the file is whole, where a write was left unfinished."""

    def add(self, record: bytes) -> None:
        self.waiting.append(record)
        if len(self.waiting) > self.KEPT:
            self.waiting.pop(0)
            self.lost += 1
        self.flush()

    def flush(self) -> bool:
        """Writes what waits. Returns whether nothing waits any more."""
        if not self.waiting:
            return True
        try:
            self._write(b"".join(self.waiting))
        except OSError as error:
            before, self.problem = self.problem, error.strerror or str(error)
            if not before:
                self.tell(self, self.problem)
            return False
        before, self.problem, self.kept, self.waiting = self.problem, "", len(self.waiting), []
        if before:
            self.tell(self, "")
        return True

    def _write(self, content: bytes) -> None:
        self.path.parent.mkdir(exist_ok=True)
        handle = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NONBLOCK, 0o666)
        try:
            size = os.fstat(handle).st_size
            if self._sound is not None and self._sound < size:  # half a line is worse than none
                os.ftruncate(handle, self._sound)
                size = self._sound
            self._sound = size
            while content:
                content = content[os.write(handle, content) :]
        finally:
            os.close(handle)  # of a network's file system may say that nothing was written: tried again from there
        self._sound = None
