"""Files that are whole or absent: atomic writes, checksums, JSON, mapped arrays."""

from __future__ import annotations

import json
import os
import shutil
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

_HEADERS = threading.Lock()  # numpy reads them by ast, which CPython 3.11 cannot do in several threads at once (its issue 106905)


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success sync it to disk and rename it, on error delete it.

    A reader of `path` sees the old file or the whole new one, also when the process is killed in between.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.chmod(temporary, 0o644)  # some writers make private files
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with suppress(OSError):
            temporary.unlink()
        raise
    sync_folder(path.parent)


def clear_leftovers(*folders: Path, prefix: str = "") -> None:
    """Delete the temporary files that killed processes of this machine left in some folders, of names that begin so."""
    for folder in folders:
        for file in folder.glob(f".{prefix}*.tmp"):
            number = file.name.split(".")[-2]
            if number.isdecimal() and not is_running(int(number)):
                file.unlink(missing_ok=True)


def is_running(process: int) -> bool:
    """Tell whether a process of this machine runs."""
    try:
        os.kill(process, 0)
    except ProcessLookupError:
        return False
    except OSError:
        pass  # somebody else's
    return True


def free_bytes(folder: Path) -> int:
    """Give the bytes that may still be written to the file system of a folder."""
    return shutil.disk_usage(folder).free


def sync_folder(folder: Path) -> None:
    """Make the names in a folder durable, where the system can."""
    with suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def write_json(path: str | Path, value: Mapping[str, Any]) -> None:
    """Write a JSON object atomically, readable by people."""
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_json(path: str | Path) -> dict[str, Any]:
    """Read a JSON object; OSError and ValueError are the caller's to put into its own words."""
    value = json.loads(Path(path).read_text(encoding="utf-8"))
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds {type(value).__name__}, not an object")
    return value


def checksum(path: str | Path) -> str:
    """Give the XXH3-128 digest of a file's bytes, read in blocks of 4 MiB: 32 hexadecimal digits."""
    digest = xxhash.xxh3_128()
    with open(path, "rb") as file:
        while block := file.read(1 << 22):
            digest.update(block)
    return digest.hexdigest()


def map_array(path: Path) -> npt.NDArray[Any]:
    """Map an npy file into memory, to read; any number of threads may.

    Raises: OSError if it cannot be read, ValueError if it is no such file.
    """
    with _HEADERS:
        array: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    return array.view(np.ndarray)
