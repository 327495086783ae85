"""Image folders: files that worker processes decode and augment while the training goes on."""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from . import sources
from .sources import Entry, Files, say

_IMAGES = (".jpg", ".jpeg", ".png", ".bmp", ".ppm", ".pgm", ".tif", ".tiff", ".webp")
# Decoded by a worker at once. A minibatch is put together from such pieces, so that all workers share even a large one
# and what waits in shared memory stays small: 4.3 MB a piece at 299 pixels.
_PIECE = 16
_AHEAD = 4  # pieces that each worker decodes before they are asked for


class Tree(NamedTuple):
    """The images under train/ and val/."""

    files: Files
    train: Tensor  # (n,) labels of the first n files
    val: Tensor  # (m,) labels of the others
    classes: list[str]


def tree(root: Path | None, cache: Path, workers: int, skip_corrupt: bool) -> Tree:
    """Find and check all images of a folder or archive.

    Args:
        root: has train/CLASS/IMAGE and val/CLASS/IMAGE, itself or one directory further down; or is a zip or tar that
            does; or holds nothing but one such archive.
        cache: remembers which images can be decoded, and has a plain copy of a compressed tar.
        workers: processes that look at the images the first time.
        skip_corrupt: leave out images that cannot be decoded.

    Raises:
        ValueError: no such folders, classes that differ or have no images, or images that cannot be decoded.
        FileNotFoundError: no such directory or archive.
    """
    path, inner, entries = _locate(root, cache)
    images, classes = _classified(path, inner, entries)
    unreadable = _unreadable(path, images, cache, workers)
    refuse_unreadable(path, unreadable, len(images), skip_corrupt)
    images = [entry for entry in images if entry.name not in unreadable]
    labels = {name: label for label, name in enumerate(classes)}
    y: dict[str, list[int]] = {"train": [], "val": []}
    for entry in images:
        part, name = _place(entry.name, inner)[:2]
        y[part].append(labels[name])
    train, val = (torch.tensor(y[part], dtype=torch.int64) for part in y)
    enough(path, val, classes, 1)
    return Tree(Files(path, images), train, val, classes)


def _locate(root: Path | None, cache: Path) -> tuple[Path, str, list[Entry]]:
    """The directory or plain archive, what stands before train/ and val/ in its names, and its listing."""
    if root is None:
        raise ValueError("expected the place of the image folder, got none; name it with --data DIR")
    root = Path(root)
    if not root.exists():
        raise FileNotFoundError(
            f"expected an image folder or archive, got {root}, which does not exist; correct --data"
        )
    if root.is_dir():
        places = [root, *sorted(path for path in root.iterdir() if path.is_dir())]
        for path in places:
            if (path / "train").is_dir() and (path / "val").is_dir():
                return path, "", sources.listing(path, ["train", "val"])
        archives = [path for path in sorted(root.iterdir()) if path.name.endswith(sources.ARCHIVES)]
        if len(archives) != 1:
            there = ", ".join(sorted(path.name for path in root.iterdir())[:5]) or "nothing"
            raise ValueError(
                f"expected folders train and val in {root} or one further down, got {there}; correct --data"
            )
        root = archives[0]
    elif not root.name.endswith(sources.ARCHIVES):
        raise ValueError(f"expected a directory or an archive ({', '.join(sources.ARCHIVES)}), got {root}")
    stat = root.stat()
    key = _digest([str(root.resolve()), stat.st_size, stat.st_mtime_ns])
    path = root
    if sources.is_compressed_tar(root):

        def unpack(directory: Path) -> None:
            say(f"unpacking {path} into {cache}, this once")
            sources.plain_tar(path, directory)

        root = next(sources.made_once(cache / f"unpacked-{key}", unpack).iterdir())
    entries = sources.listing(root)
    parts = [entry.name.split("/") for entry in entries]
    found = {"/".join(names[:depth]) + "/" for names in parts for depth in (1, 2) if len(names) > depth}
    firsts = sorted(name for name in found if name.count("/") == 1)
    for inner in ("", *firsts):
        if f"{inner}train/" in found and f"{inner}val/" in found:
            return root, inner, entries
    raise ValueError(
        f"expected folders train and val in {root} or one further down, got {', '.join(firsts[:5]) or 'no folders'}; "
        "correct --data"
    )


def _digest(value: Any) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def _place(name: str, inner: str) -> list[str]:
    """Part, class and the rest of a name; [] of what is no image folder's, or hidden."""
    if not name.startswith(inner):
        return []
    parts = name[len(inner) :].split("/")
    if len(parts) < 3 or parts[0] not in ("train", "val") or any(part.startswith(".") for part in parts):
        return []
    return parts


def _classified(path: Path, inner: str, entries: list[Entry]) -> tuple[list[Entry], list[str]]:
    """The images, those of train first, and the names of the classes."""
    count: dict[str, dict[str, int]] = {"train": {}, "val": {}}
    images: list[Entry] = []
    for entry in entries:
        if place := _place(entry.name, inner):
            part, name = place[:2]
            is_image = place[-1].lower().endswith(_IMAGES)
            count[part][name] = count[part].get(name, 0) + is_image
            if is_image:
                images.append(entry)
    for part in count:
        for name, images_of_class in count[part].items():
            if images_of_class == 0:
                raise ValueError(
                    f"expected images ({' '.join(_IMAGES)}) in every class, got none in {path}/{inner}{part}/{name}; "
                    "add some or remove the folder"
                )
    same_classes(path, count["train"].keys(), count["val"].keys())
    return images, sorted(count["train"])


def same_classes(path: Path, train: Iterable[str], val: Iterable[str]) -> None:
    """Refuse data whose classes are not the same in training and test.

    Raises:
        ValueError: they differ, or there are none.
    """
    train, val = set(train), set(val)
    for here, there, missing in (("train", "val", train - val), ("val", "train", val - train)):
        if missing:
            names = ", ".join(sorted(missing)[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
            raise ValueError(
                f"expected the same classes in train and val of {path}, got {names} in {here} alone; "
                f"remove them there or add them to {there}"
            )
    if len(train) < 2:
        raise ValueError(f"expected two classes or more in {path}, got {len(train)}; put images into train/CLASS")


def enough(path: Path, y: Tensor, classes: Sequence[str], least: int) -> None:
    """Refuse a class with too few images that can be decoded.

    Raises:
        ValueError: there is one.
    """
    counts = y.bincount(minlength=len(classes))
    if counts.min() < least:
        rare = int(counts.argmin())
        raise ValueError(
            f"expected at least {least} images of every class in {path}, got {int(counts[rare])} of {classes[rare]}; "
            "add images, or remove the class from train and val"
        )


def refuse_unreadable(path: Path, unreadable: dict[str, str], images: int, skip_corrupt: bool) -> None:
    """Say that images cannot be decoded.

    Args:
        path: where they are.
        unreadable: the reason for each name.
        images: how many there are in all.
        skip_corrupt: they will be left out.

    Raises:
        ValueError: there are some, and they are not to be left out.
    """
    if not unreadable:
        return
    name, reason = next(iter(unreadable.items()))
    found = f"{len(unreadable)} of {images} images in {path} cannot be decoded, the first {name} ({reason})"
    if not skip_corrupt:
        raise ValueError(
            f"expected images, got files of which {found}; replace or delete them, or leave them out with skip_corrupt"
        )
    say(f"left out: {found}")


def pillow() -> Any:
    """The module ``PIL.Image``.

    Raises:
        RuntimeError: the extra is missing.
    """
    try:
        from PIL import Image
    except ImportError as error:
        raise RuntimeError(
            "expected the extra 'vision' to be installed, got no Pillow; run: pip install 'batchrenorm[vision]'"
        ) from error
    return Image


def decode(content: bytes) -> Any:
    """The image in a file of any format, as Pillow's RGB."""
    with pillow().open(io.BytesIO(content)) as image:
        return image.convert("RGB")


def transforms(size: int) -> tuple[Callable[[Any], Any], Callable[[Any], Any]]:
    """ImageNet's usual augmentation, and its usual preparation for prediction: torchvision's.

    Args:
        size: of the square that comes out, pixels.

    Raises:
        RuntimeError: the extra is missing, or torchvision is not the one for this torch.
    """
    try:
        from torchvision.transforms import v2
    except ImportError as error:
        raise RuntimeError(
            "expected the extra 'vision' to be installed, got no torchvision; run: pip install 'batchrenorm[vision]'"
        ) from error
    except RuntimeError as error:  # its operators are of another build of torch
        raise RuntimeError(
            f"expected a torchvision for torch {torch.__version__}, got one that does not fit ({error}); "
            "install the one of the same release and kind"
        ) from error
    augment = v2.Compose([v2.RandomResizedCrop(size, antialias=True), v2.RandomHorizontalFlip(), v2.PILToTensor()])
    resize = v2.Resize(round(size * 256 / 224), antialias=True)
    return augment, v2.Compose([resize, v2.CenterCrop(size), v2.PILToTensor()])


class _Key(NamedTuple):
    """One item of one minibatch."""

    file: int
    seed: int | None  # of the augmentation
    step: int
    place: int


class _Decoder(Dataset[Tensor]):
    """Files to uint8 tensors; a copy of it is in every worker."""

    def __init__(self, files: Files, size: int) -> None:
        self._files, self._size = files, size
        self._transforms: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_transforms": None}

    def __getitem__(self, key: _Key) -> Tensor:
        """``(3, size, size)``."""
        if self._transforms is None:
            self._transforms = transforms(self._size)
        augment, prepare = self._transforms
        image = decode(self._files.read(key.file))
        if key.seed is None:
            return prepare(image)
        # torchvision draws from torch's own generator, of which a training in this process must see nothing.
        state = torch.get_rng_state()
        try:
            seed = random.Random(f"{key.seed} {key.step} {key.place}").getrandbits(63)
            torch.default_generator.manual_seed(seed)
            return augment(image)
        finally:
            torch.set_rng_state(state)


class _Checker(Dataset[tuple[str, str]]):
    """Decodes files to see whether that can be done."""

    def __init__(self, files: Files) -> None:
        self._files = files

    def __getitem__(self, index: int) -> tuple[str, str]:
        """The name, and why it cannot; "" where it can."""
        opener = pillow()
        try:
            content = self._files.read(index)
            with opener.open(io.BytesIO(content)) as image:
                # Small, which reads all of a JPEG in half the time.
                image.draft("RGB", (max(1, image.width // 8), max(1, image.height // 8)))
                image.convert("RGB")
        except Exception as error:  # whatever a decoder says, and they say a lot
            return self._files.name(index), str(error) or type(error).__name__
        return self._files.name(index), ""


def _unreadable(path: Path, images: list[Entry], cache: Path, workers: int) -> dict[str, str]:
    """The images that cannot be decoded, and why; looked for the first time, then remembered."""
    known = cache / f"decodable-{_digest([str(path.resolve()), path.stat().st_size, images])}" / "unreadable.json"

    def check(directory: Path) -> None:
        say(f"looking at all {len(images)} images of {path}, this once")
        pieces = [list(range(start, min(start + 64, len(images)))) for start in range(0, len(images), 64)]
        loader = _loader(_Checker(Files(path, images)), _Pieces(pieces), workers, _as_it_is)
        found: dict[str, str] = {}
        told = time.monotonic()
        for done, piece in enumerate(loader, 1):
            found.update((name, reason) for name, reason in piece if reason)
            if time.monotonic() - told > 10:
                told = time.monotonic()
                say(f"  {100 * done // len(pieces)} %")
        (directory / known.name).write_text(json.dumps(found), encoding="utf-8")

    sources.made_once(known.parent, check)
    return json.loads(known.read_text(encoding="utf-8"))


class _Pieces:
    """What a loader is to decode next: set before each iteration."""

    def __init__(self, pieces: Iterable[Any] = ()) -> None:
        self.pieces = pieces

    def __iter__(self) -> Iterator[Any]:
        return iter(self.pieces)


def _as_it_is(items: list[Any]) -> list[Any]:
    return items


def _loader(
    dataset: Dataset[Any], pieces: _Pieces, workers: int, collate: Callable[[list[Any]], Any], **more: Any
) -> DataLoader[Any]:
    if workers:
        # A fork of a process with threads, which training is, may hang.
        more |= {"num_workers": workers, "multiprocessing_context": "spawn", "prefetch_factor": _AHEAD}
    # Without a generator of its own a loader would draw from torch's, and so change the training.
    generator = torch.Generator().manual_seed(0)
    return DataLoader(dataset, batch_sampler=pieces, collate_fn=collate, generator=generator, **more)


class Loaders:
    """Worker processes that decode the files of a data set, for all of its splits and as long as it is there.

    Args:
        files: all files of the set.
        size: height and width of the decoded images, pixels.
        workers: processes; 0 decodes in this one.
        device: where the images will go to.
    """

    def __init__(self, files: Files, size: int, workers: int, device: torch.device) -> None:
        self._decoder = _Decoder(files, size)
        self._workers = workers
        self._pin = device.type == "cuda"
        self._idle: list[tuple[_Pieces, DataLoader[Tensor]]] = []
        self.size = size

    @contextmanager
    def decoding(self, pieces: Iterable[list[_Key]]) -> Iterator[Iterator[Tensor]]:
        """Decode, ahead of what is asked for; in the order asked for. Several may go on at the same time.

        Yields:
            ``(items, 3, size, size)`` uint8 of each piece.
        """
        # An evaluation amid the training has workers of its own, which the next evaluation finds ready.
        sampler, loader = self._idle.pop() if self._idle else self._new()
        sampler.pieces = pieces
        try:
            yield iter(loader)
        finally:
            self._idle.append((sampler, loader))

    def _new(self) -> tuple[_Pieces, DataLoader[Tensor]]:
        sampler = _Pieces()
        loader = _loader(
            self._decoder,
            sampler,
            self._workers,
            torch.stack,
            pin_memory=self._pin,
            persistent_workers=self._workers > 0,
        )
        return sampler, loader


class Decoded:
    """Images in files, decoded as they are taken.

    Args:
        loaders: of the whole set.
        files: ``(n,)``, which of its files make up this split.
        y: ``(n,)`` int64, on the CPU.
        finish: from ``(n, 3, size, size)`` uint8 to what a net takes.
        device: where minibatches go to.
    """

    def __init__(
        self, loaders: Loaders, files: Tensor, y: Tensor, finish: Callable[[Tensor], Tensor], device: torch.device
    ) -> None:
        self.y = y
        self._loaders, self._files, self._finish, self._device = loaders, files, finish, device

    def minibatches(
        self,
        plan: Sequence[Sequence[int]],
        *,
        augment: int | None = None,
        start: int = 0,
        share: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `data.Split.minibatches` says."""

        def pieces() -> Iterator[list[_Key]]:
            for step in range(start, len(plan)):
                places = range(len(plan[step]))[share]
                keys = [_Key(int(self._files[plan[step][place]]), augment, step, place) for place in places]
                for begin in range(0, len(keys), _PIECE):
                    yield keys[begin : begin + _PIECE]

        with self._loaders.decoding(pieces()) as decoded:
            for step in range(start, len(plan)):
                index = torch.as_tensor(plan[step][share], dtype=torch.int64)
                x = torch.zeros(0, 3, self._loaders.size, self._loaders.size, dtype=torch.uint8, device=self._device)
                parts = [
                    next(decoded).to(self._device, non_blocking=True) for _ in range(math.ceil(len(index) / _PIECE))
                ]
                if parts:
                    x = torch.cat(parts)
                yield self._finish(x), self.y[index].to(self._device)
