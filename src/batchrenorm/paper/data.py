"""Images and labels, split into train, validation and test, and the way from them to minibatches."""

from __future__ import annotations

import hashlib
import io
import json
import random
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from . import sources
from .sources import Files, Remote

NAMES = ("digits", "pairs-100", "fashion-mnist", "omniglot", "tiny-imagenet", "imagefolder")

_SPLIT_SEED = 1702_03275
# Of the 1,797 images. Settings are chosen on validation; test is looked at once, at the end of a run.
_DIGITS = {"train": 1000, "validation": 297, "test": 500}
_PAIRS_PER_CLASS = {"train": 100, "validation": 20, "test": 50}

_FASHION_URL = "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/"
_FASHION = {
    "train": (
        Remote(_FASHION_URL + "train-images-idx3-ubyte.gz", "8d4fb7e6c68d591d4c3dfef9ec88bf0d"),
        Remote(_FASHION_URL + "train-labels-idx1-ubyte.gz", "25c81989df183df01b3e8a0aad5dffbe"),
    ),
    "test": (
        Remote(_FASHION_URL + "t10k-images-idx3-ubyte.gz", "bef4ecab320f06d8554ea6380940ec79"),
        Remote(_FASHION_URL + "t10k-labels-idx1-ubyte.gz", "bb300cfdad3c16e7a12a480ee83cd310"),
    ),
}
_FASHION_VALIDATION = 500  # of each class

_OMNIGLOT = Remote(
    "https://raw.githubusercontent.com/brendenlake/omniglot/master/python/images_background.zip",
    "68d2efa1b9178cc56df9314c21c6e718",
)
_OMNIGLOT_BITS = "images_background_105x105_bits.npz"
_OMNIGLOT_PIXELS = 105
# Each of the 20 people drew every character once; a character is learnt from some and recognised from others.
_OMNIGLOT_DRAWERS = {"train": range(1, 15), "validation": range(15, 17), "test": range(17, 21)}


_TINY = Remote("http://cs231n.stanford.edu/tiny-imagenet-200.zip", "90528d7ca1a48142e341f4ef8d21d0de")
_TINY_VALIDATION = 25  # of each class

# Of an image folder 1 in 20 of each class, at least one and at most 10: of ImageNet's 1000 classes 10,000 images, which
# tell an accuracy to half a point, cost less than one in a hundred for training, and can be looked at often.
_FOLDER_VALIDATION_SHARE, _FOLDER_VALIDATION_MOST = 20, 10

# Of ImageNet's training images, as everybody who trains on them takes them.
_IMAGENET_MEAN = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1) * 255
_IMAGENET_STD = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1) * 255


class Split(Protocol):
    """One part of a data set."""

    y: Tensor
    """``(n,)`` int64, on the CPU."""

    def minibatches(
        self,
        plan: Sequence[Sequence[int]],
        *,
        augment: int | None = None,
        start: int = 0,
        share: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """The items of one minibatch after another.

        Args:
            plan: the indices of the items of each minibatch.
            augment: seed of the random augmentation; None for none. What happens to an item is a function of this
                seed, the step, and the place of the item in the whole minibatch: a training that starts in the middle,
                or that shares its minibatches between processes, sees bitwise the same items. Sets that have no
                augmentation give the items as they are.
            start: the step to begin with: an index into `plan`.
            share: the places of each minibatch that are wanted.

        Yields:
            x, float32 and normalised, and y, int64; both on the split's device.
        """
        ...


class Data(NamedTuple):
    """A data set."""

    train: Split
    validation: Split
    test: Split
    classes: int
    shape: tuple[int, ...]  # of one item: (inputs,) or (channels, height, width)


def load(
    name: str,
    *,
    root: Path | None = None,
    cache: Path | None = None,
    size: int | None = None,
    device: torch.device | str = "cpu",
    workers: int = 0,
    skip_corrupt: bool = False,
) -> Data:
    """A data set by its name in a preset.

    Args:
        name: "digits", scikit-learn's 8x8 images of 10 digits, float32; "pairs-100", two of them side by side;
            "fashion-mnist"; "omniglot", the 964 background characters; "tiny-imagenet", 200 classes; or "imagefolder",
            any images in folders train/CLASS and val/CLASS.
        root: where its files are; None downloads them into the cache.
        cache: directory for what is downloaded or decoded once; None is ``~/.cache/batchrenorm``.
        size: height and width of an image; None is the set's own: 28, 28 and 64 pixels, and 224 for an image folder.
        device: where minibatches go to, and the images too where the whole set fits in memory.
        workers: processes that decode the images of a folder; 0 decodes in this one.
        skip_corrupt: leave out images that cannot be decoded.

    Raises:
        ValueError: an unknown name, a size that the set does not have, a damaged file, classes without images.
        FileNotFoundError: a file that should be in `root` is not.
        ConnectionError: a download failed.
        RuntimeError: the extra 'vision' is missing, which image files need.
    """
    device = torch.device(device)
    cache = sources.cache_directory(cache)
    if name in ("digits", "pairs-100"):
        return _digits(name, size, device)
    if name == "fashion-mnist":
        return _fashion_mnist(root, cache, size, device)
    if name == "omniglot":
        return _omniglot(root, cache, size, device)
    if name == "tiny-imagenet":
        return _tiny_imagenet(root, cache, size, device, skip_corrupt)
    if name == "imagefolder":
        return _image_folder(root, cache, 224 if size is None else size, device, workers, skip_corrupt)
    raise ValueError(f"expected data, one of {', '.join(NAMES)}, got {name!r}; correct the preset")


class InMemory:
    """Items in memory, on a device; those of uint8 are normalised as they are taken.

    Args:
        x: ``(m, ...)``, float32 as it is to be, or ``(m, channels, height, width)`` uint8.
        y: ``(m,)`` int64, on the CPU.
        rows: ``(n,)`` int64, on the CPU: which of them make up this split; None for all.
        mean, std: ``(channels, 1, 1)`` float32, of the uint8 values.
        pad: augmentation crops at random from the image with so many black pixels on each side, and mirrors at random;
            None for no augmentation.
    """

    def __init__(
        self,
        x: Tensor,
        y: Tensor,
        rows: Tensor | None = None,
        *,
        mean: Tensor | None = None,
        std: Tensor | None = None,
        pad: int | None = None,
    ) -> None:
        self.y = y if rows is None else y[rows]
        self._x = x
        self._rows = torch.arange(len(y)) if rows is None else rows
        self._mean = None if mean is None else mean.to(x.device)
        self._std = None if std is None else std.to(x.device)
        self._pad = pad

    def minibatches(
        self,
        plan: Sequence[Sequence[int]],
        *,
        augment: int | None = None,
        start: int = 0,
        share: slice = slice(None),
    ) -> Iterator[tuple[Tensor, Tensor]]:
        """As `Split.minibatches` says."""
        for step in range(start, len(plan)):
            index = torch.as_tensor(plan[step][share], dtype=torch.int64)
            x = self._x[self._rows[index].to(self._x.device)]
            if augment is not None and self._pad is not None:
                drawn = _draw(augment, step, len(plan[step]), 2 * (2 * self._pad + 1) ** 2)[share]
                x = crop_and_mirror(x, drawn.to(x.device), self._pad)
            if self._mean is not None and self._std is not None:
                x = normalised(x, self._mean, self._std)
            yield x, self.y[index].to(x.device)


def _draw(seed: int, step: int, places: int, end: int) -> Tensor:
    # On the CPU, one after another: place i gets the same number on every device, however many places there are.
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {step}").getrandbits(63))
    return torch.randint(end, (places,), generator=generator)


def crop_and_mirror(x: Tensor, drawn: Tensor, pad: int) -> Tensor:
    """Shift each image by up to `pad` pixels in both directions, with black coming in, and mirror half of them.

    Args:
        x: ``(n, channels, height, width)`` uint8.
        drawn: ``(n,)`` integers in [0, 2 * (2 * pad + 1)^2), on the device of x; each stands for one of the outcomes.
        pad: pixels.
    """
    n, _, height, width = x.shape
    shifts = 2 * pad + 1
    mirrored, shift = (drawn % 2).bool(), drawn // 2
    # (n, channels, shifts, shifts, height, width), of which nothing is copied but the windows that were drawn.
    windows = F.pad(x, (pad,) * 4).unfold(2, height, 1).unfold(3, width, 1)
    x = windows[torch.arange(n, device=x.device), :, shift // shifts, shift % shifts]
    return torch.where(mirrored[:, None, None, None], x.flip(-1), x)


def normalised(x: Tensor, mean: Tensor, std: Tensor) -> Tensor:
    """``(x - mean) / std`` in float32."""
    return x.to(torch.float32).sub_(mean).div_(std)


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    # Of all values together, by counting them: exact, however many there are.
    counts = torch.bincount(x.flatten(), minlength=256).double()
    values = torch.arange(256, dtype=torch.float64)
    mean = (counts * values).sum() / counts.sum()
    std = ((counts * (values - mean) ** 2).sum() / counts.sum()).sqrt()
    return mean.float().view(1, 1, 1), std.float().view(1, 1, 1)


def hold_out(y: Tensor, per_class: int | Tensor) -> tuple[Tensor, Tensor]:
    """Two parts of the items: all but a few of each class, and these few; the same whenever the labels are the same.

    Args:
        y: ``(n,)`` labels 0, 1, ...
        per_class: how many are held out; or ``(classes,)``, how many of each.

    Returns:
        The indices of the remaining and of the held out items, both rising.
    """
    generator = torch.Generator().manual_seed(_SPLIT_SEED)
    held = torch.zeros(len(y), dtype=torch.bool)
    counts = torch.as_tensor(per_class).expand(int(y.max()) + 1).tolist()
    for label, count in enumerate(counts):
        items = (y == label).nonzero().flatten()
        held[items[torch.randperm(len(items), generator=generator)[:count]]] = True
    return (~held).nonzero().flatten(), held.nonzero().flatten()


def _only_size(name: str, size: int | None, own: int) -> None:
    if size not in (None, own):
        raise ValueError(f"expected size {own} for {name}, got {size}; its images have no other, leave it out")


def _digits(name: str, size: int | None, device: torch.device) -> Data:
    from sklearn.datasets import load_digits  # an extra, needed here only

    _only_size(name, size, 8)
    images, labels = load_digits(return_X_y=True)
    x = torch.as_tensor(images, dtype=torch.float32) / 16
    y = torch.as_tensor(labels, dtype=torch.int64)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(_SPLIT_SEED))
    parts = dict(zip(_DIGITS, order.split(list(_DIGITS.values()))))
    std, mean = torch.std_mean(x[parts["train"]])
    items = {part: ((x[index] - mean) / std, y[index]) for part, index in parts.items()}
    if name == "pairs-100":
        # After the split: no image of a training pair occurs in a test pair.
        items = {
            part: _pairs(*items[part], per_class, seed)
            for seed, (part, per_class) in enumerate(_PAIRS_PER_CLASS.items())
        }
    splits = {part: InMemory(x.to(device), y) for part, (x, y) in items.items()}
    inputs = items["train"][0].shape[1]
    return Data(**splits, classes=100 if name == "pairs-100" else 10, shape=(inputs,))


def _pairs(x: Tensor, y: Tensor, per_class: int, seed: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(_SPLIT_SEED + seed)
    of_digit = [(y == digit).nonzero().flatten() for digit in range(10)]
    images, labels = [], []
    for label in range(100):
        sides = [of_digit[digit] for digit in divmod(label, 10)]
        drawn = [side[torch.randint(len(side), (per_class,), generator=generator)] for side in sides]
        # (n, 64) and (n, 64) -> (n, 128): for a fully connected net the order of the pixels does not matter.
        images.append(torch.cat([x[index] for index in drawn], 1))
        labels.append(torch.full((per_class,), label))
    return torch.cat(images), torch.cat(labels)


def _fashion_mnist(root: Path | None, cache: Path, size: int | None, device: torch.device) -> Data:
    _only_size("fashion-mnist", size, 28)
    if root is None:
        directory = cache / "fashion-mnist"
        for remote in (*_FASHION["train"], *_FASHION["test"]):
            sources.fetch(remote, directory)
    else:
        directory = sources.find(root, ("", "fashion_mnist", "FashionMNIST/raw", "raw"), ["*-idx?-ubyte.gz"])
    items = {
        part: tuple(_idx(directory / remote.name, remote) for remote in remotes) for part, remotes in _FASHION.items()
    }
    (x, y), (test_x, test_y) = items["train"], items["test"]
    train, validation = hold_out(y.long(), _FASHION_VALIDATION)
    mean, std = _moments(x[train])
    x, test_x = x[:, None].to(device), test_x[:, None].to(device)
    return Data(
        InMemory(x, y.long(), train, mean=mean, std=std, pad=2),
        InMemory(x, y.long(), validation, mean=mean, std=std),
        InMemory(test_x, test_y.long(), mean=mean, std=std),
        classes=10,
        shape=(1, 28, 28),
    )


def _idx(path: Path, remote: Remote) -> Tensor:
    import gzip

    packed = sources.read(path, remote)
    with sources.damage_named(path):
        content = gzip.decompress(packed)
    # Big-endian: two zeros, 8 for unsigned bytes, the number of dimensions, each dimension; then the values.
    shape = [int.from_bytes(content[4 + 4 * k : 8 + 4 * k], "big") for k in range(content[3])]
    return torch.frombuffer(bytearray(content[4 + 4 * len(shape) :]), dtype=torch.uint8).view(shape)


def _omniglot(root: Path | None, cache: Path, size: int | None, device: torch.device) -> Data:
    size = 28 if size is None else size
    if not 1 <= size <= _OMNIGLOT_PIXELS:
        raise ValueError(f"expected size 1 to {_OMNIGLOT_PIXELS} for omniglot, got {size}; its images have no more")
    bits, y, drawer = _omniglot_bits(root, cache)
    x = _ink(bits, size)
    rows = {
        part: torch.isin(drawer, torch.tensor(drawers)).nonzero().flatten()
        for part, drawers in _OMNIGLOT_DRAWERS.items()
    }
    mean, std = _moments(x[rows["train"]])
    x = x.to(device)
    splits = {part: InMemory(x, y, index, mean=mean, std=std) for part, index in rows.items()}
    return Data(**splits, classes=int(y.max()) + 1, shape=(1, size, size))


def _omniglot_bits(root: Path | None, cache: Path) -> tuple[Any, Tensor, Tensor]:
    """(n, 105, 14) uint8, 8 pixels in each, 1 is ink; labels; drawers, from 1."""
    import numpy as np  # of the extra, as below

    if root is None:
        path = sources.fetch(_OMNIGLOT, cache / "omniglot")
    else:
        names = (_OMNIGLOT_BITS, _OMNIGLOT.name)
        directory = sources.find(root, ("", "omniglot", "omniglot-py", "omniglot/python", "python"), names)
        path = next(directory / name for name in names if (directory / name).exists())
    if path.suffix == ".zip":
        sources.read(path, _OMNIGLOT)
        made = sources.made_once(
            cache / f"omniglot-{_OMNIGLOT.md5[:12]}", lambda directory: _pack(path, directory / _OMNIGLOT_BITS)
        )
        path = made / _OMNIGLOT_BITS
    with path.open("rb") as content, sources.damage_named(path, ValueError, KeyError), np.load(content) as file:
        return file["packed"], *(torch.as_tensor(file[key].astype("int64")) for key in ("label", "drawer"))


def _pack(archive: Path, target: Path) -> None:
    """The bits of the official archive of PNG files, ALPHABET/CHARACTER/NUMBER_DRAWER.png."""
    import numpy as np

    from . import folders

    image_files = folders.pillow()
    sources.say(f"decoding {archive}, this once")
    images: list[tuple[str, int, Any]] = []
    entries = sources.listing(archive)
    files = sources.Files(archive, entries)
    for index, entry in enumerate(entries):
        if found := re.fullmatch(r"images_background/(\w.*/character\d+)/\d+_(\d+)\.png", entry.name):
            with image_files.open(io.BytesIO(files.read(index))) as image:
                ink = ~np.asarray(image.convert("1"))  # black on white
            images.append((found[1], int(found[2]), np.packbits(ink, axis=-1)))
    classes = sorted({name for name, _, _ in images})
    np.savez_compressed(
        target,
        packed=np.stack([bits for _, _, bits in images]),
        label=np.array([classes.index(name) for name, _, _ in images], dtype=np.int16),
        drawer=np.array([drawer for _, drawer, _ in images], dtype=np.uint8),
    )


def _ink(bits: Any, size: int) -> Tensor:
    """(n, 1, size, size) uint8: the share of each area that is ink, 255 for all of it."""
    import numpy as np

    x = torch.empty(len(bits), 1, size, size, dtype=torch.uint8)
    for start in range(0, len(bits), 1000):  # 44 MB of float32 at a time
        pixels = np.unpackbits(bits[start : start + 1000], axis=-1, count=_OMNIGLOT_PIXELS)
        areas = F.adaptive_avg_pool2d(torch.as_tensor(pixels[:, None]).float(), size)
        x[start : start + 1000] = (areas * 255).round_()
    return x


def _tiny_imagenet(root: Path | None, cache: Path, size: int | None, device: torch.device, skip_corrupt: bool) -> Data:
    import numpy as np

    from . import folders

    _only_size("tiny-imagenet", size, 64)
    parts = _tiny_parts(root, cache)
    # Changed files have another key. A checksum is quicker than its archive is unpacked; of a tree the list has to do.
    key = [(part.name, part.stat().st_size, sources.digest(part)) if part.is_file() else "" for part in parts]
    if parts[0].name == _TINY.name and key[0][2] != _TINY.md5:
        raise ValueError(
            f"expected MD5 {_TINY.md5} of {parts[0]}, got {key[0][2]}; it is damaged, replace it by {_TINY.url}"
        )
    listed = [sources.listing(part, ["train", "val"]) for part in parts if part.is_dir()]
    name = hashlib.sha256(repr((key, listed)).encode()).hexdigest()[:16]
    made = sources.made_once(cache / f"tiny-imagenet-{name}", lambda directory: _decode_tiny(parts, directory))
    index = json.loads((made / "index.json").read_text(encoding="utf-8"))
    folders.refuse_unreadable(parts[0].parent, index["unreadable"], len(index["names"]), skip_corrupt)
    with (made / "images.npy").open("rb") as file:
        while file.read(1 << 24):  # once in order: a cold disk takes a hundred times as long at random
            pass
    # Mapped, privately to this process: several processes on one machine share the memory.
    x = torch.from_numpy(np.load(made / "images.npy", mmap_mode="c")).to(device)
    y = torch.tensor(index["labels"])
    good = torch.tensor([name not in index["unreadable"] for name in index["names"]])
    is_train = torch.tensor([name.startswith("train/") for name in index["names"]])
    rows = (good & is_train).nonzero().flatten()
    folders.enough(parts[0].parent, y[rows], index["classes"], _TINY_VALIDATION + 1)
    train, validation = (rows[held] for held in hold_out(y[rows], _TINY_VALIDATION))
    test = (good & ~is_train).nonzero().flatten()
    folders.enough(parts[0].parent, y[test], index["classes"], 1)
    return Data(
        InMemory(x, y, train, mean=_IMAGENET_MEAN, std=_IMAGENET_STD, pad=8),
        InMemory(x, y, validation, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
        InMemory(x, y, test, mean=_IMAGENET_MEAN, std=_IMAGENET_STD),
        classes=len(index["classes"]),
        shape=(3, 64, 64),
    )


def _tiny_parts(root: Path | None, cache: Path) -> list[Path]:
    """The official archive, the tree that is in it, or archives of train/CLASS and val/CLASS."""
    if root is None:
        return [sources.fetch(_TINY, cache / "tiny-imagenet")]
    patterns = (_TINY.name, "train*.tar*", "train/n*")
    directory = sources.find(root, ("", "tiny_imagenet_200", "tiny-imagenet-200"), patterns)
    if (directory / _TINY.name).exists():
        return [directory / _TINY.name]
    if (directory / "train").is_dir():
        return [directory]
    parts = sorted(path for path in directory.glob("*.tar*") if path.name.startswith(("train", "val")))
    if not any(path.name.startswith("val") for path in parts):
        raise FileNotFoundError(
            f"expected val.tar.xz beside {parts[0]}, got none; put it there, for it is the test set"
        )
    return parts


def _decode_tiny(parts: list[Path], directory: Path) -> None:
    """All images as one array, images.npy, (n, 3, 64, 64) uint8, and what they are, index.json."""
    import numpy as np

    from . import folders

    folders.pillow()
    sources.say(f"decoding Tiny ImageNet from {parts[0].parent}, this once")
    found: list[tuple[str, Files, int]] = []  # train/CLASS/IMAGE or val/CLASS/IMAGE
    for part in parts:
        path = sources.plain_tar(part, directory) if sources.is_compressed_tar(part) else part
        entries = sources.listing(path, ["train", "val"])
        names = [entry.name.removeprefix("tiny-imagenet-200/") for entry in entries]
        files = Files(path, entries)
        classes = _tiny_val_classes(path, names, files)
        for item, name in enumerate(names):
            if name.startswith("val/images/") and name.endswith(".JPEG"):
                image = name.removeprefix("val/images/")
                found.append((f"val/{classes[image]}/{image}", files, item))
            elif place := re.fullmatch(r"(train|val)/(\w+)/(?:images/)?(\w+\.JPEG)", name):
                found.append(("/".join(place.groups()), files, item))
    found.sort(key=lambda image: image[0])  # the same from every source
    names = [name for name, _, _ in found]
    of_part = {part: {n.split("/")[1] for n in names if n.startswith(part)} for part in ("train/", "val/")}
    folders.same_classes(parts[0].parent, *of_part.values())
    labels = {name: label for label, name in enumerate(sorted(of_part["train/"]))}
    x = np.lib.format.open_memmap(directory / "images.npy", "w+", np.uint8, (len(found), 3, 64, 64))
    unreadable: dict[str, str] = {}
    for row, (name, files, item) in enumerate(found):
        try:
            image = folders.decode(files.read(item))
            if image.size != (64, 64):
                raise ValueError(f"{image.size} pixels, not (64, 64)")
            x[row] = np.asarray(image).transpose(2, 0, 1)
        except Exception as error:  # whatever a decoder says, and they say a lot
            unreadable[name] = str(error) or type(error).__name__
        if row % 20_000 == 19_999:
            sources.say(f"  {row + 1} of {len(found)} images")
    x.flush()
    for plain in directory.glob("*.tar"):
        plain.unlink()
    index = {
        "names": names,
        "labels": [labels[name.split("/")[1]] for name in names],
        "classes": sorted(labels),
        "unreadable": unreadable,
    }
    (directory / "index.json").write_text(json.dumps(index), encoding="utf-8")


def _tiny_val_classes(path: Path, names: list[str], files: Files) -> dict[str, str]:
    """The class of each image of val, which the official archive has in a table; {} where the folders say it."""
    if "val/val_annotations.txt" not in names:
        if any(name.startswith("val/images/") for name in names):
            raise ValueError(f"expected val/val_annotations.txt in {path}, got no such file; unpack the archive anew")
        return {}
    lines = files.read(names.index("val/val_annotations.txt")).decode().splitlines()
    return dict(line.split("\t")[:2] for line in lines)


def _image_folder(
    root: Path | None, cache: Path, size: int, device: torch.device, workers: int, skip_corrupt: bool
) -> Data:
    from . import folders

    if size < 1:
        raise ValueError(f"expected size >= 1, got {size}; it is the height and width of an image in pixels")
    folders.transforms(size)  # fails now if torchvision is missing, and not in a worker
    files, y, test_y, classes = folders.tree(root, cache, workers, skip_corrupt)
    folders.enough(files.path, y, classes, 2)
    counts = y.bincount(minlength=len(classes))
    train, validation = hold_out(y, (counts // _FOLDER_VALIDATION_SHARE).clamp(1, _FOLDER_VALIDATION_MOST))
    mean, std = _IMAGENET_MEAN.to(device), _IMAGENET_STD.to(device)
    loaders = folders.Loaders(files, size, workers, device)

    def split(rows: Tensor, labels: Tensor) -> folders.Decoded:
        return folders.Decoded(loaders, rows, labels, lambda x: normalised(x, mean, std), device)

    test = torch.arange(len(y), len(y) + len(test_y))
    return Data(
        split(train, y[train]),
        split(validation, y[validation]),
        split(test, test_y),
        classes=len(classes),
        shape=(3, size, size),
    )
