"""Where the files of a data set are: on disk, in the cache, in an archive, or still to be downloaded."""

from __future__ import annotations

import gzip
import hashlib
import http.client
import lzma
import os
import shutil
import struct
import sys
import tarfile
import time
import urllib.error
import urllib.request
import uuid
import zipfile
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

_CHUNK = 1 << 20
# What Python's decoders raise about a damaged archive; gzip's is an OSError.
_DAMAGED = (EOFError, zipfile.BadZipFile, zlib.error, lzma.LZMAError, tarfile.TarError, OSError)
_SECONDS = 30.0  # without a byte, until a download is given up

ARCHIVES = (".zip", ".tar", ".tar.gz", ".tgz", ".tar.xz", ".txz")
_ZIP_HEADER = 30


class Remote(NamedTuple):
    """A file of the internet, with the checksum that its authors published."""

    url: str
    md5: str

    @property
    def name(self) -> str:
        """The file's own name."""
        return self.url.rsplit("/", 1)[-1]


def say(text: str) -> None:
    """Tell the user something that is no result: standard error is not piped into files."""
    print(text, file=sys.stderr, flush=True)


def cache_directory(cache: Path | None = None) -> Path:
    """`cache`; or ``$XDG_CACHE_HOME/batchrenorm``; or ``~/.cache/batchrenorm``. It may not exist yet."""
    if cache is not None:
        return Path(cache)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "batchrenorm"


def find(root: Path, places: Sequence[str], patterns: Sequence[str]) -> Path:
    """The directory that holds a data set.

    Args:
        root: what the user named.
        places: directories under it to look into, "" for itself; the first that has something wins.
        patterns: of file names, any of which is enough.

    Raises:
        FileNotFoundError: there is no such directory, or nothing in it.
    """
    root = Path(root)
    if not root.is_dir():
        raise FileNotFoundError(f"expected a directory of data, got {root}, which is none; correct --data DIR")
    for place in places:
        if any(next((root / place).glob(pattern), None) for pattern in patterns):
            return root / place
    looked = ", ".join(str(root / place) for place in places)
    raise FileNotFoundError(
        f"expected {' or '.join(patterns)} in one of {looked}, got nothing there; correct --data DIR, or leave it out "
        "to download the data"
    )


def read(path: Path, remote: Remote) -> bytes:
    """All of an official file, after its checksum was found right.

    Raises:
        FileNotFoundError: it is not there.
        ValueError: it is damaged.
    """
    if not path.is_file():
        raise FileNotFoundError(f"expected {path}, got no such file; download it from {remote.url}")
    content = path.read_bytes()
    found = hashlib.md5(content, usedforsecurity=False).hexdigest()
    if found != remote.md5:
        raise ValueError(
            f"expected MD5 {remote.md5} of {path}, got {found}; the file is damaged, replace it by {remote.url}"
        )
    return content


def digest(path: Path) -> str:
    """The MD5 of a file of any size, in hexadecimal."""
    found = hashlib.md5(usedforsecurity=False)
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            found.update(chunk)
    return found.hexdigest()


@contextmanager
def damage_named(path: Path, *others: type[Exception]) -> Iterator[None]:
    """What the decoders of archives raise about a damaged one, as one sentence that names it.

    Raises:
        ValueError: in their place, and in place of `others`.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, (*_DAMAGED, *others)):
            raise
        if isinstance(error, OSError) and error.errno is not None:
            raise  # the disk's, with a name and a reason of its own
        raise ValueError(
            f"expected {path} to be whole, got a damaged file ({error}); replace it by a good copy"
        ) from error


class Entry(NamedTuple):
    """One file of a directory or archive."""

    name: str  # with "/" between directories; ends in "/" where it is one
    offset: int  # in the archive
    size: int  # there, which is less than the file's where a zip has deflated it
    version: int  # time of change in ns; in a zip CRC-32
    deflated: bool = False


def listing(path: Path, under: Sequence[str] = ("",)) -> list[Entry]:
    """All files and directories, sorted by name, of a directory, a zip or a tar that is not compressed.

    Args:
        path: of the directory or archive.
        under: in a directory, the sub-directories to look into. An archive is listed whole.

    Raises:
        ValueError: the archive is damaged, or a zip has a compression other than the usual one.
    """
    entries: list[Entry] = []
    if path.is_dir():
        for name in under:
            entries += _walk(path / name, f"{name}/" if name else "")
    elif path.name.endswith(".zip"):
        with damage_named(path), zipfile.ZipFile(path) as archive:
            for item in archive.infolist():
                if item.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                    raise ValueError(f"expected deflate as compression in {path}, got {item.filename}; zip it anew")
                deflated = item.compress_type == zipfile.ZIP_DEFLATED
                entries.append(Entry(item.filename, item.header_offset, item.compress_size, item.CRC, deflated))
    else:
        with damage_named(path), tarfile.open(path, "r:") as tar:
            for member in tar:
                name = member.name.removeprefix("./")
                if member.isdir():
                    entries.append(Entry(name + "/", 0, 0, 0))
                elif member.isreg():
                    entries.append(Entry(name, member.offset_data, member.size, int(member.mtime * 1e9)))
            # Cut off between two files, or amid the header of one, a tar would pass for a shorter one but for its end.
            with path.open("rb") as file:
                file.seek(tar.offset)
                if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
                    raise EOFError("its end is missing")
    return sorted(entries)


def _walk(directory: Path, prefix: str) -> Iterator[Entry]:
    with os.scandir(directory) as found:
        for item in found:
            if item.is_dir():  # also through a link, as trees of links into ImageNet are usual
                yield Entry(f"{prefix}{item.name}/", 0, 0, 0)
                yield from _walk(Path(item.path), f"{prefix}{item.name}/")
            else:
                stat = item.stat()
                yield Entry(prefix + item.name, 0, stat.st_size, stat.st_mtime_ns)


class Files:
    """Files of a directory, zip or tar, read where they lie.

    Nothing is open between two reads, and the names are tensors: a copy for another process costs little, even with a
    million files, and shares their memory.

    Args:
        path: of the directory or archive.
        entries: from its `listing`.
    """

    def __init__(self, path: Path, entries: Sequence[Entry]) -> None:
        names = [os.fsencode(entry.name) for entry in entries]
        self.path = path
        self._kind = "directory" if path.is_dir() else "zip" if path.name.endswith(".zip") else "tar"
        self._text = torch.frombuffer(bytearray(b"".join(names) or b" "), dtype=torch.uint8)
        self._ends = torch.tensor([0, *map(len, names)]).cumsum(0)
        self._places = torch.tensor([entry[1:] for entry in entries], dtype=torch.int64)

    def __len__(self) -> int:
        """How many."""
        return len(self._places)

    def name(self, index: int) -> str:
        """The name that one has in its directory or archive."""
        start, end = self._ends[index : index + 2].tolist()
        return os.fsdecode(bytes(self._text[start:end].tolist()))

    def read(self, index: int) -> bytes:
        """The content of one.

        Raises:
            ValueError: the archive is damaged there.
        """
        if self._kind == "directory":
            return (self.path / self.name(index)).read_bytes()
        offset, size, version, deflated = self._places[index].tolist()
        with self.path.open("rb") as file, damage_named(self.path):
            file.seek(offset)
            if self._kind == "zip":
                header = file.read(_ZIP_HEADER)
                # A header of its own stands before each file: 30 bytes, its name, and extras, whose lengths close it.
                file.seek(sum(struct.unpack("<HH", header[-4:].rjust(4, b"\0"))), os.SEEK_CUR)
            content = file.read(size)
            if len(content) < size:
                raise EOFError(f"{self.name(index)} is cut off")
            if deflated:
                content = zlib.decompress(content, -zlib.MAX_WBITS)
            if self._kind == "zip" and zlib.crc32(content) != version:
                raise EOFError(f"{self.name(index)} has another checksum")
        return content


_OPENERS: dict[str, Callable[[Path], Any]] = {"gz": gzip.open, "tgz": gzip.open, "xz": lzma.open, "txz": lzma.open}


def is_compressed_tar(path: Path) -> bool:
    """It can be read from its beginning only."""
    return path.is_file() and path.name.rsplit(".", 1)[-1] in _OPENERS


def plain_tar(path: Path, directory: Path) -> Path:
    """A copy of a compressed tar that is not compressed.

    Raises:
        ValueError: the archive is damaged.
    """
    plain = directory / f"{path.name}.tar"
    with damage_named(path), _OPENERS[path.name.rsplit(".", 1)[-1]](path) as packed, plain.open("wb") as file:
        shutil.copyfileobj(packed, file, _CHUNK)
    return plain


def made_once(directory: Path, make: Callable[[Path], None]) -> Path:
    """A directory of the cache: filled the first time, and never seen half full.

    Args:
        directory: its name says all that its content depends on.
        make: fills the directory that it is given.
    """
    if directory.exists():
        return directory
    unfinished = directory.with_name(f"{directory.name}.{uuid.uuid4().hex[:8]}.part")
    unfinished.mkdir(parents=True)
    try:
        make(unfinished)
        try:
            unfinished.rename(directory)
        except OSError:
            if not directory.exists():  # otherwise another process was faster, with the same content
                raise
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return directory


def fetch(remote: Remote, directory: Path, say: Callable[[str], None] = say) -> Path:
    """A file from the internet, downloaded the first time; goes on where a download was broken off.

    Args:
        remote: what.
        directory: where to; made if it is not there.
        say: told about the progress every few seconds.

    Raises:
        ConnectionError: it could not be downloaded.
        ValueError: what came has the wrong checksum, twice where a part was there from before.
    """
    path = directory / remote.name
    if path.exists():
        return path
    directory.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    # Renaming gives the part to one process alone; another that downloads at the same time begins a part of its own.
    mine = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")
    try:
        part.rename(mine)
    except FileNotFoundError:
        mine.touch()
    by_hand = f"download {remote.url} by hand and pass its directory with --data DIR"
    try:
        resumed = mine.stat().st_size > 0
        _download(remote, mine, say, by_hand)
        if resumed and digest(mine) != remote.md5:
            mine.write_bytes(b"")  # the part was of something else
            _download(remote, mine, say, by_hand)
        if (found := digest(mine)) != remote.md5:
            mine.unlink()
            raise ValueError(f"expected MD5 {remote.md5} of {remote.url}, got {found}; try again later, or {by_hand}")
        mine.replace(path)
    finally:
        if mine.exists():
            mine.replace(part)
    return path


def _download(remote: Remote, path: Path, say: Callable[[str], None], by_hand: str) -> None:
    have = path.stat().st_size
    request = urllib.request.Request(remote.url, headers={"Range": f"bytes={have}-"} if have else {})
    try:
        with urllib.request.urlopen(request, timeout=_SECONDS) as answer:
            if answer.status != 206:  # the whole file, whatever was asked for
                have = 0
            length = answer.headers.get("Content-Length")
            total = None if length is None else have + int(length)
            of = "" if total is None else f" of {total / 1e6:.1f}"
            say(f"downloading {remote.url} to {path.parent}")
            told = time.monotonic()
            with path.open("ab" if have else "wb") as file:
                while chunk := answer.read(_CHUNK):
                    file.write(chunk)
                    have += len(chunk)
                    if time.monotonic() - told > 5:
                        told = time.monotonic()
                        say(f"  {have / 1e6:.1f}{of} MB")
    except urllib.error.HTTPError as error:
        error.close()
        if error.code == 416:  # nothing comes after the part: it is whole, or of something else, as its checksum tells
            return
        raise ConnectionError(f"expected {remote.url}, got HTTP status {error.code}; {by_hand}") from error
    except (OSError, http.client.HTTPException) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        raise ConnectionError(
            f"expected {remote.url}, got no whole answer ({reason}); run it again to go on, or {by_hand}"
        ) from error
    if total is not None and have < total:
        raise ConnectionError(
            f"expected {total} bytes of {remote.url}, got {have}; run it again to go on, or {by_hand}"
        )
