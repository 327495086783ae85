"""The data of the experiments: the right images in the right splits, the same in every process, and clear refusals."""

from __future__ import annotations

import functools
import gzip
import hashlib
import http.server
import io
import itertools
import pickle
import shutil
import sys
import tarfile
import threading
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision_shim import allow_torchvision

np = pytest.importorskip("numpy", reason="needs the extra: pip install 'batchrenorm[paper]'")
pytest.importorskip("sklearn", reason="needs the extra: pip install 'batchrenorm[paper]'")

from batchrenorm.paper import data, folders, sampling, sources  # noqa: E402
from batchrenorm.paper.experiment import Labels  # noqa: E402
from batchrenorm.paper.sources import Remote  # noqa: E402

REAL = Path(__file__).resolve().parents[2] / "shared" / "data"
CALTECH = REAL / "caltech101_subset" / "caltech101_99x10.zip"
TINY = REAL / "tiny_imagenet_200"

needs = {
    name: pytest.mark.skipif(not (REAL / name).exists(), reason=f"no real data in {REAL / name}")
    for name in ("fashion_mnist", "omniglot", "tiny_imagenet_200", "caltech101_subset")
}


def vision() -> None:
    """Skip without Pillow and torchvision."""
    allow_torchvision()
    pytest.importorskip("PIL", reason="needs the extra: pip install 'batchrenorm[vision]'")
    pytest.importorskip("torchvision", reason="needs the extra: pip install 'batchrenorm[vision]'")


def everything(split: data.Split, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return next(split.minibatches([range(len(split.y))], **options))


def items(split: data.Split, plan: list[list[int]], **options: Any) -> list[torch.Tensor]:
    return [x for x, _ in split.minibatches(plan, **options)]


def same(one: list[torch.Tensor], other: list[torch.Tensor]) -> bool:
    return len(one) == len(other) and all(torch.equal(a, b) for a, b in zip(one, other))


# scikit-learn's digits


@pytest.mark.parametrize(
    ("name", "known", "classes", "inputs"),
    [
        ("digits", "1301f827f28d66825e295ba9bbe9dbed85f7bcf1b53bde3771b4fe90ad0d9be8", 10, 64),
        ("pairs-100", "93a964d20ca95d0c64a103f3d955cd06cbd2e662fe46699e2e282bea1ea1e5b5", 100, 128),
    ],
)
def test_the_digits_of_committed_results_stay_what_they_were(name: str, known: str, classes: int, inputs: int) -> None:
    found = data.load(name)
    assert (found.classes, found.shape) == (classes, (inputs,))
    pixels = hashlib.sha256()
    for split in found[:3]:
        x, y = everything(split)
        # The values 0 to 16 that scikit-learn has, since the last bit of a mean may differ between machines.
        pixels.update(((x - x.min()) / (x.max() - x.min()) * 16).round().to(torch.uint8).numpy().tobytes())
        pixels.update(y.numpy().tobytes())
    assert pixels.hexdigest() == known
    x, _ = everything(data.load("digits").train)
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.std().item() == pytest.approx(1, abs=1e-5)


# Fashion-MNIST


@functools.cache
def fashion() -> data.Data:
    return data.load("fashion-mnist", root=REAL)


def official_fashion(part: str) -> Any:
    return np.frombuffer(gzip.open(REAL / "fashion_mnist" / f"{part}-images-idx3-ubyte.gz").read()[16:], np.uint8)


@needs["fashion_mnist"]
def test_fashion_mnist_is_the_official_one_and_its_splits_are_balanced() -> None:
    found = fashion()
    assert (found.classes, found.shape) == (10, (1, 28, 28))
    assert [split.y.bincount().tolist() for split in found[:3]] == [[5500] * 10, [500] * 10, [1000] * 10]
    official = official_fashion("train").reshape(60000, -1)
    (train, _), (validation, _), (test, _) = map(everything, found[:3])
    assert train.mean().item() == pytest.approx(0, abs=1e-5)
    assert train.double().std().item() == pytest.approx(1, abs=1e-5)
    low, step = train.min(), (train.max() - train.min()) / 255

    def bytes_of(x: torch.Tensor) -> Any:
        return ((x - low) / step).round().to(torch.uint8).flatten(1).numpy()

    assert (bytes_of(test).flatten() == official_fashion("t10k")).all()
    ours = np.concatenate([bytes_of(train), bytes_of(validation)])
    assert (np.sort(ours.view("V784").flatten()) == np.sort(official.copy().view("V784").flatten())).all()


@needs["fashion_mnist"]
@pytest.mark.parametrize("place", ["", "fashion_mnist", "FashionMNIST/raw"])
def test_fashion_mnist_is_found_where_others_put_it(place: str, tmp_path: Path) -> None:
    (tmp_path / place).parent.mkdir(parents=True, exist_ok=True)
    root = REAL / "fashion_mnist" if place == "" else tmp_path
    if place:
        (tmp_path / place).symlink_to(REAL / "fashion_mnist")
    plan = [[0, 54_999]]
    assert same(items(data.load("fashion-mnist", root=root).train, plan), items(fashion().train, plan))


@needs["fashion_mnist"]
def test_damaged_and_missing_files_are_named(tmp_path: Path) -> None:
    for file in (REAL / "fashion_mnist").glob("*.gz"):
        shutil.copy(file, tmp_path / file.name)
        (tmp_path / file.name).chmod(0o644)
    labels = tmp_path / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.write_bytes(whole[:-100])
    with pytest.raises(ValueError, match=r"expected MD5 bb300\w+ of .*t10k-labels-idx1-ubyte.gz, got \w+; .*http"):
        data.load("fashion-mnist", root=tmp_path)
    labels.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected .*t10k-labels-idx1-ubyte.gz, got no such file; download"):
        data.load("fashion-mnist", root=tmp_path)


# Omniglot


@needs["omniglot"]
def test_omniglot_splits_by_the_people_who_drew() -> None:
    found = data.load("omniglot", root=REAL)
    assert (found.classes, found.shape) == (964, (1, 28, 28))
    assert [split.y.bincount().unique().tolist() for split in found[:3]] == [[14], [2], [4]]
    assert {len(split.y.unique()) for split in found[:3]} == {964}
    x, _ = everything(found.train)
    assert x.mean().item() == pytest.approx(0, abs=1e-5)
    assert x.double().std().item() == pytest.approx(1, abs=1e-5)


@needs["omniglot"]
def test_omniglot_pixels_are_the_share_of_ink() -> None:
    found = data.load("omniglot", root=REAL / "omniglot", size=15)
    raw = np.load(REAL / "omniglot" / "images_background_105x105_bits.npz")
    low = min(everything(split)[0].min() for split in found[:3])
    for split, drawers in zip(found[:3], (range(1, 15), (15, 16), (17, 18, 19, 20))):
        rows = np.isin(raw["drawer"], list(drawers))
        ink = np.unpackbits(raw["packed"][rows], axis=-1, count=105).reshape(-1, 15, 7, 15, 7).mean((2, 4))
        x, y = everything(split)
        assert (y.numpy() == raw["label"][rows]).all()
        shown = (x - low).double()[:, 0].numpy()
        # Half a step of 1/255, the bytes in which they are kept, both ways of the scale.
        assert abs(shown / shown.max() - ink / ink.max()).max() <= 1 / 255


@needs["omniglot"]
def test_omniglots_official_archive_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    vision()
    from PIL import Image

    raw = np.load(REAL / "omniglot" / "images_background_105x105_bits.npz")
    few = raw["label"] < 3
    few |= raw["label"] == 40
    (tmp_path / "bits").mkdir()
    label = np.where(raw["label"] == 40, 3, raw["label"])[few]
    np.savez(
        tmp_path / "bits" / "images_background_105x105_bits.npz",
        packed=raw["packed"][few],
        label=label,
        drawer=raw["drawer"][few],
    )
    archive = tmp_path / "zip" / "images_background.zip"
    archive.parent.mkdir()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        pixels = np.unpackbits(raw["packed"][few], axis=-1, count=105).astype(bool)
        # The official order is no order.
        for item in np.random.default_rng(0).permutation(few.sum()):
            buffer = io.BytesIO()
            Image.fromarray(~pixels[item]).save(buffer, "png")
            original = raw["label"][few][item]
            name = (
                f"images_background/{raw['class_name'][original]}/{original + 1:04}_{raw['drawer'][few][item]:02}.png"
            )
            file.writestr(name, buffer.getvalue())
    monkeypatch.setattr(data, "_OMNIGLOT", data._OMNIGLOT._replace(md5=sources.digest(archive)))
    one = data.load("omniglot", root=tmp_path / "bits")
    cache = tmp_path / "cache"
    for other in (data.load("omniglot", root=tmp_path / "zip", cache=cache) for _ in range(2)):
        assert other.classes == one.classes == 4
        for a, b in zip(one[:3], other[:3]):
            assert torch.equal(a.y, b.y)
            assert torch.equal(everything(a)[0], everything(b)[0])
    monkeypatch.setattr(data, "_OMNIGLOT", data._OMNIGLOT._replace(md5="0" * 32))
    with pytest.raises(ValueError, match="expected MD5 0000"):
        data.load("omniglot", root=tmp_path / "zip", cache=cache)


@needs["omniglot"]
def test_a_truncated_npz_is_named(tmp_path: Path) -> None:
    name = "images_background_105x105_bits.npz"
    content = (REAL / "omniglot" / name).read_bytes()
    for broken in (content[:-1000], content[:30] + bytes(1000) + content[1030:], b"no archive"):
        (tmp_path / name).write_bytes(broken)
        with pytest.raises(ValueError, match=rf"expected .*{name} to be whole, got a damaged file"):
            data.load("omniglot", root=tmp_path)


# Minibatches in memory


def a_split(n: int = 40, pad: int | None = 3) -> data.InMemory:
    x = torch.randint(256, (n, 3, 8, 8), dtype=torch.uint8)
    mean, std = torch.tensor([10.0, 20, 30]).view(3, 1, 1), torch.tensor([2.0, 3, 4]).view(3, 1, 1)
    return data.InMemory(x, torch.arange(n) % 4, torch.arange(n - 5), mean=mean, std=std, pad=pad)


def test_augmentation_is_a_function_of_seed_step_and_place() -> None:
    split = a_split()
    plan = [torch.randperm(35)[:12].tolist() for _ in range(6)]
    whole = items(split, plan, augment=5)
    assert same(items(split, plan, augment=5), whole)
    assert same(items(split, plan, augment=5, start=4), whole[4:])
    for share in (slice(0, 4), slice(4, 12), slice(1, None, 2), slice(12, None)):
        assert same(items(split, plan, augment=5, share=share), [x[share] for x in whole])
    # A longer minibatch moves nobody.
    assert torch.equal(items(split, [plan[0] + plan[1]], augment=5)[0][:12], whole[0])
    assert not torch.equal(items(split, plan, augment=6)[0], whole[0])
    assert not torch.equal(items(split, [plan[0], plan[0]], augment=5)[1], whole[0])
    assert not torch.equal(items(split, plan)[0], whole[0])


def test_items_are_normalised_and_keep_their_labels() -> None:
    split = a_split()
    plan = [[3, 1, 34], [0, 0, 7]]
    for (x, y), batch in zip(split.minibatches(plan), plan):
        raw = split._x[batch].double()
        for channel, (mean, std) in enumerate(((10, 2), (20, 3), (30, 4))):
            assert torch.allclose(x[:, channel].double(), (raw[:, channel] - mean) / std, rtol=1e-6, atol=1e-5)
        assert x.dtype == torch.float32
        assert y.tolist() == [index % 4 for index in batch]


def test_crops_are_windows_of_the_padded_image() -> None:
    pad, x = 2, torch.randint(1, 256, (50, 2, 5, 5), dtype=torch.uint8)
    out = data.crop_and_mirror(x, torch.arange(50), pad).numpy()
    for drawn, (image, cropped) in enumerate(zip(x.numpy(), out)):
        padded = np.pad(image, ((0, 0), (pad, pad), (pad, pad)))
        windows = [padded[:, i : i + 5, j : j + 5] for i, j in itertools.product(range(5), range(5))]
        expected = windows[drawn // 2]
        assert (cropped == (expected[:, :, ::-1] if drawn % 2 else expected)).all()


def test_every_crop_is_drawn_equally_often() -> None:
    drawn = torch.cat([data._draw(3, step, 100, 50) for step in range(100)])
    counts = drawn.bincount(minlength=50)
    # 10,000 draws of 50 kinds: chi-squared of 49 degrees of freedom exceeds 85.4 once in 1000 seeds; this one is fixed.
    assert ((counts - 200.0) ** 2 / 200).sum() < 85.4


def test_minibatches_of_a_plan() -> None:
    labels = torch.arange(40) % 4
    # The seeds of committed results.
    assert list(sampling.plan(8, Labels(2, 4, spread=2), labels, 2, 5)) == [
        [9, 21, 19, 3, 5, 33, 7, 35],
        [14, 26, 4, 28, 18, 2, 12, 20],
    ]
    iid = sampling.plan(3, None, torch.zeros(7), 3, 1)
    assert list(iid) == [[0, 6, 1], [3, 5, 2], [0, 6, 1]]
    # In any order, as a resumed training asks.
    long = sampling.plan(3, None, torch.zeros(7), 9, 1)
    batches = list(long)
    assert [long[i] for i in (8, 0, 5, 5, 3)] == [batches[i] for i in (8, 0, 5, 5, 3)]
    assert batches[:3] == list(iid)
    with pytest.raises(ValueError, match="expected at least 8 items"):
        sampling.plan(8, None, torch.zeros(7), 1, 0)
    for batch in sampling.plan(24, Labels(2, 4), labels, 5, 0):
        assert len(batch) == 24
        assert [len(labels[batch[k : k + 4]].unique()) for k in range(0, 24, 4)] == [1] * 6


def test_held_out_items_are_few_of_each_class_and_always_the_same() -> None:
    y = torch.randint(5, (300,))
    rest, held = data.hold_out(y, torch.tensor([1, 2, 3, 4, 5]))
    assert y[held].bincount().tolist() == [1, 2, 3, 4, 5]
    assert torch.cat([rest, held]).sort().values.tolist() == list(range(300))
    torch.manual_seed(77)
    assert torch.equal(data.hold_out(y, torch.tensor([1, 2, 3, 4, 5]))[1], held)


@pytest.mark.parametrize(
    ("name", "options", "error", "text"),
    [
        ("mnist", {}, ValueError, "expected data, one of digits, .*imagefolder, got 'mnist'; "),
        ("digits", {"size": 9}, ValueError, "expected size 8 for digits, got 9; "),
        ("fashion-mnist", {"size": 32}, ValueError, "expected size 28 for fashion-mnist, got 32; "),
        ("omniglot", {"size": 106}, ValueError, "expected size 1 to 105 for omniglot, got 106; "),
        ("tiny-imagenet", {"size": 56}, ValueError, "expected size 64 for tiny-imagenet, got 56; "),
        ("fashion-mnist", {"root": Path("nowhere")}, FileNotFoundError, "got nowhere, which is none; correct --data"),
        ("omniglot", {"root": Path(__file__).parent}, FileNotFoundError, "got nothing there; correct --data DIR"),
        ("tiny-imagenet", {"root": Path(__file__).parent}, FileNotFoundError, "got nothing there; correct --data DIR"),
    ],
)
def test_refusals(name: str, options: dict[str, Any], error: type[Exception], text: str) -> None:
    with pytest.raises(error, match=text):
        data.load(name, **options)


# Downloads, from a server in this process


CONTENT = bytes(range(256)) * 20_000


class Server(http.server.BaseHTTPRequestHandler):
    """/good, /dies (half of it), /ranged (knows ranges), /wrong (another content), /lost (404)."""

    asked: list[tuple[str, str | None]] = []  # noqa: RUF012

    def do_GET(self) -> None:
        begin = self.headers["Range"]
        self.asked.append((self.path, begin))
        if self.path == "/lost":
            self.send_error(404)
            return
        content, start = b"!" + CONTENT[1:] if self.path == "/wrong" else CONTENT, 0
        if self.path == "/ranged" and begin:
            start = int(begin.removeprefix("bytes=").removesuffix("-"))
            self.send_response(206 if start < len(content) else 416)
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(max(0, len(content) - start)))
        self.end_headers()
        self.wfile.write(content[start : len(content) // 2] if self.path == "/dies" else content[start:])

    def log_message(self, *_: Any) -> None:
        """Say nothing."""


@pytest.fixture
def url(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.setattr(Server, "asked", [])
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server) as server:
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


def remote(url: str) -> Remote:
    return Remote(url, hashlib.md5(CONTENT).hexdigest())


def test_a_download_happens_once(url: str, tmp_path: Path) -> None:
    told: list[str] = []
    path = sources.fetch(remote(url + "good"), tmp_path / "new", told.append)
    assert path.read_bytes() == CONTENT
    assert url + "good" in told[0]
    assert sources.fetch(remote(url + "good"), tmp_path / "new", told.append) == path
    assert len(Server.asked) == 1
    assert list(path.parent.iterdir()) == [path]


def test_a_wrong_checksum_leaves_nothing_behind(url: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"expected MD5 \w+ of http.*/wrong, got \w+; .*by hand .*--data DIR"):
        sources.fetch(remote(url + "wrong"), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_broken_download_goes_on_where_it_stopped(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"expected .*run it again to go on, or download .*/dies by hand"):
        sources.fetch(remote(url + "dies"), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["dies.part"]
    half = (tmp_path / "dies.part").stat().st_size
    assert half == len(CONTENT) // 2
    (tmp_path / "dies.part").rename(tmp_path / "ranged.part")
    assert sources.fetch(remote(url + "ranged"), tmp_path).read_bytes() == CONTENT
    assert Server.asked[-1] == ("/ranged", f"bytes={half}-")
    assert [path.name for path in tmp_path.iterdir()] == ["ranged"]


@pytest.mark.parametrize("part", [b"of something else", CONTENT, CONTENT + b"and more", CONTENT[:100]])
@pytest.mark.parametrize("name", ["good", "ranged"])  # the first server knows no ranges and sends all
def test_whatever_was_left_the_file_comes_right(url: str, name: str, part: bytes, tmp_path: Path) -> None:
    (tmp_path / f"{name}.part").write_bytes(part)
    assert sources.fetch(remote(url + name), tmp_path).read_bytes() == CONTENT
    assert [path.name for path in tmp_path.iterdir()] == [name]
    assert len(Server.asked) == 1 or name == "ranged"


def test_no_such_file_and_no_network(url: str, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match=r"expected .*/lost, got HTTP status 404; download .* by hand and pass"):
        sources.fetch(remote(url + "lost"), tmp_path)
    with pytest.raises(ConnectionError, match=r"got no whole answer \(.*refused\).* by hand and pass .*--data DIR"):
        sources.fetch(remote("http://127.0.0.1:9/file"), tmp_path)


@needs["fashion_mnist"]
def test_without_a_directory_the_files_come_from_the_cache_or_the_net(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    served = {f"/{file.name}": file.read_bytes() for file in (REAL / "fashion_mnist").glob("*.gz")}

    def get(self: Server) -> None:
        self.asked.append((self.path, None))
        self.send_response(200)
        self.end_headers()  # and no length
        self.wfile.write(served[self.path])

    monkeypatch.setattr(Server, "do_GET", get)
    here = {part: tuple(Remote(url + one.name, one.md5) for one in remotes) for part, remotes in data._FASHION.items()}
    monkeypatch.setattr(data, "_FASHION", here)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for _ in range(2):
        found = data.load("fashion-mnist")
        assert same(items(found.train, [[5]]), items(fashion().train, [[5]]))
    assert len(Server.asked) == 4
    assert (tmp_path / "batchrenorm" / "fashion-mnist").is_dir()


# Tiny ImageNet: real images of two classes, in all the ways in which they come


@pytest.fixture(scope="module")
def two_classes() -> dict[str, dict[str, bytes]]:
    """CLASS -> NAME -> JPEG, 50 of each."""
    found: dict[str, dict[str, bytes]] = {}
    with tarfile.open(TINY / "val.tar.xz", "r|xz") as tar:
        for member in tar:
            if member.isfile():
                _, name, file = member.name.split("/")
                if name not in found and len(found) == 2:
                    break
                content = tar.extractfile(member)
                assert content is not None
                found.setdefault(name, {})[file] = content.read()
    assert [len(images) for images in found.values()] == [50, 50]
    return found


def add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))


def tiny_layout(root: Path, layout: str, classes: dict[str, dict[str, bytes]]) -> None:
    """40 images of each class for training, of which 25 are held out, and 10 for testing."""
    train = {(name, file): content for name, of in classes.items() for file, content in list(of.items())[:40]}
    val = {(name, file): content for name, of in classes.items() for file, content in list(of.items())[40:]}
    if layout == "archives":
        directory = root / "tiny_imagenet_200"
        directory.mkdir()
        for number in range(2):
            with tarfile.open(directory / f"train_{number}.tar.xz", "w:xz") as tar:
                for (name, file), content in list(train.items())[number::2]:
                    add(tar, f"train/{name}/{file}", content)
        with tarfile.open(directory / "val.tar.xz", "w:xz") as tar:
            for (name, file), content in val.items():
                add(tar, f"val/{name}/{file}", content)
        return
    official = {f"train/{name}/images/{file}": content for (name, file), content in train.items()}
    official |= {f"val/images/{file}": content for (_, file), content in val.items()}
    rows = [f"{file}\t{name}\t0\t0\t63\t63\n" for name, file in val]
    official["val/val_annotations.txt"] = "".join(rows).encode()
    official["test/images/test_0.JPEG"] = b"no labels, no matter"
    if layout == "zip":
        with zipfile.ZipFile(root / "tiny-imagenet-200.zip", "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in reversed(official.items()):
                archive.writestr(f"tiny-imagenet-200/{name}", content)
    else:
        for name, content in official.items():
            path = root / "tiny-imagenet-200" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)


@needs["tiny_imagenet_200"]
@pytest.mark.parametrize("layout", ["archives", "zip", "tree"])
def test_tiny_imagenet_in_every_layout(
    layout: str,
    two_classes: dict[str, dict[str, bytes]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    vision()
    from PIL import Image

    tiny_layout(tmp_path, layout, two_classes)
    if layout == "zip":
        with pytest.raises(ValueError, match="expected MD5 90528"):
            data.load("tiny-imagenet", root=tmp_path, cache=tmp_path / "cache")
        md5 = sources.digest(tmp_path / "tiny-imagenet-200.zip")
        monkeypatch.setattr(data, "_TINY", data._TINY._replace(md5=md5))
    found = data.load("tiny-imagenet", root=tmp_path, cache=tmp_path / "cache")
    assert "this once" in capsys.readouterr().err
    assert (found.classes, found.shape) == (2, (3, 64, 64))
    assert [split.y.bincount().tolist() for split in found[:3]] == [[15, 15], [25, 25], [10, 10]]
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])[:, None, None, :]
    expected: list[tuple[int, Any]] = []
    for label, name in enumerate(sorted(two_classes)):
        for file in sorted(list(two_classes[name])[40:]):
            pixels = np.asarray(Image.open(io.BytesIO(two_classes[name][file])).convert("RGB")) / 255
            expected.append((label, (pixels - mean) / std))
    x, y = everything(found.test)
    assert y.tolist() == [label for label, _ in expected]
    assert abs(x.permute(0, 2, 3, 1).numpy() - np.stack([image for _, image in expected])).max() < 1e-5
    # Decoded once, the same whatever the way; augmented in training alone.
    again = data.load("tiny-imagenet", root=tmp_path, cache=tmp_path / "cache")
    assert capsys.readouterr().err == ""
    assert same([everything(again.train)[0]], [everything(found.train)[0]])
    assert not same([everything(found.train, augment=1)[0]], [everything(found.train)[0]])
    assert same([everything(found.test, augment=1)[0]], [everything(found.test)[0]])
    assert not list((tmp_path / "cache").rglob("*.tar"))


@needs["tiny_imagenet_200"]
def test_tiny_imagenet_with_what_is_wrong(two_classes: dict[str, dict[str, bytes]], tmp_path: Path) -> None:
    vision()
    load = functools.partial(data.load, "tiny-imagenet", root=tmp_path, cache=tmp_path / "cache")
    first, second = sorted(two_classes)
    broken = {name: dict(of) for name, of in two_classes.items()}
    file = next(iter(broken[first]))
    broken[first][file] = broken[first][file][:300]
    tiny_layout(tmp_path, "archives", broken)
    with pytest.raises(ValueError, match=rf"1 of 100 images .*train/{first}/{file} \(.*runcated.*skip_corrupt"):
        load()
    assert load(skip_corrupt=True).train.y.bincount().tolist() == [14, 15]
    with pytest.raises(ValueError, match="1 of 100 images"):  # also out of the cache
        load()
    val = tmp_path / "tiny_imagenet_200" / "val.tar.xz"
    content = val.read_bytes()
    val.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"expected {val} to be whole, got a damaged file"):
        load()
    val.unlink()
    with pytest.raises(FileNotFoundError, match=r"expected val.tar.xz beside .*train_0"):
        load()
    shutil.rmtree(tmp_path / "tiny_imagenet_200")
    tiny_layout(tmp_path, "archives", {**two_classes, second: dict(list(two_classes[second].items())[:40])})
    with pytest.raises(ValueError, match=rf"got {second} in train alone; remove them there or add them to val"):
        load()
    assert not list((tmp_path / "cache").glob("*.part"))


# Image folders


@pytest.fixture(scope="module")
def photographs() -> dict[str, bytes]:
    """train/CLASS/IMAGE and val/CLASS/IMAGE: 2 classes with 8 and 1 JPEGs, pieces of scikit-learn's two photographs."""
    vision()
    from PIL import Image
    from sklearn.datasets import load_sample_images

    generator, files = np.random.default_rng(0), {}
    for name, photograph in zip(("china", "flower"), load_sample_images().images):
        height, width = photograph.shape[:2]
        for item in range(9):
            top, left = generator.integers(height - 150), generator.integers(width - 170)
            buffer = io.BytesIO()
            piece = Image.fromarray(photograph[top : top + 120 + item, left : left + 140])
            odd = {3: piece.convert("L"), 4: piece.convert("CMYK"), 5: piece.resize((5, 5))}
            odd.get(item, piece).save(buffer, "jpeg")
            files[f"{'train' if item < 8 else 'val'}/{name}/{item}.{'JPEG' if item % 2 else 'jpg'}"] = buffer.getvalue()
    return files


def write_tree(root: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(content)
    return root


def write_zip(path: Path, files: dict[str, bytes], method: int = zipfile.ZIP_STORED, prefix: str = "") -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name, content in files.items():
            archive.writestr(prefix + name, content)
    return path


def write_tar(path: Path, files: dict[str, bytes], mode: Any, prefix: str = "") -> Path:
    with tarfile.open(path, mode) as tar:
        for name, content in files.items():
            add(tar, prefix + name, content)
    return path


WAYS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "one further down": lambda root, files: write_tree(root / "photographs", files).parent,
    "zip": lambda root, files: write_zip(root / "a.zip", files),
    "deflated zip, one further down": lambda root, files: write_zip(root / "a.zip", files, zipfile.ZIP_DEFLATED, "in/"),
    "directory of a zip": lambda root, files: write_zip(root / "a.zip", files).parent,
    "tar": lambda root, files: write_tar(root / "a.tar", files, "w"),
    "tar of ., one further down": lambda root, files: write_tar(root / "a.tar", files, "w", "./in/"),
    "tar.gz": lambda root, files: write_tar(root / "a.tar.gz", files, "w:gz"),
    "tar.xz, one further down": lambda root, files: write_tar(root / "a.tar.xz", files, "w:xz", "in/"),
}


@pytest.fixture(scope="module")
def folder(photographs: dict[str, bytes], tmp_path_factory: pytest.TempPathFactory) -> data.Data:
    root = tmp_path_factory.mktemp("folder")
    return data.load("imagefolder", root=write_tree(root / "tree", photographs), cache=root / "cache", size=56)


PLAN = [[0, 13, 5, 7, 2, 2], [9, 1, 3, 12, 11, 4], [6, 10, 8, 0, 1, 2]]


@pytest.mark.parametrize("way", WAYS)
def test_a_folder_is_the_same_in_every_wrapping(
    way: str, photographs: dict[str, bytes], folder: data.Data, tmp_path: Path
) -> None:
    hidden = {"train/china/._0.jpg": b"", "train/china/notes.txt": b"", "val/.cache/0.jpg": b"", "read.me": b""}
    (tmp_path / "data").mkdir()
    root = WAYS[way](tmp_path / "data", {**photographs, **hidden})
    before = sorted(path for path in root.rglob("*"))
    found = data.load("imagefolder", root=root, cache=tmp_path / "cache", size=56)
    assert (found.classes, found.shape) == (2, (3, 56, 56))
    assert [split.y.tolist() for split in found[:3]] == [[0] * 7 + [1] * 7, [0, 1], [0, 1]]
    assert same(items(found.train, PLAN, augment=1), items(folder.train, PLAN, augment=1))
    for one, other in zip(found[:3], folder[:3]):
        assert same([everything(one)[0]], [everything(other)[0]])
    assert sorted(path for path in root.rglob("*")) == before  # nothing is written beside the data


def test_prediction_sees_the_middle_of_the_image(tmp_path: Path) -> None:
    vision()
    from PIL import Image
    from sklearn.datasets import load_sample_images

    files = {}
    photographs = load_sample_images().images
    for part, name, item in itertools.product(("train", "val"), ("a", "b"), range(2)):
        buffer = io.BytesIO()
        top = 100 * item + 50 * (part == "val")
        Image.fromarray(photographs[name == "b"][top : top + 64, 300:364]).save(buffer, "png")
        files[f"{part}/{name}/{item}.png"] = buffer.getvalue()
    root = write_tree(tmp_path / "tree", files)
    found = data.load("imagefolder", root=root, cache=tmp_path / "cache", size=56)  # 56 * 256 / 224 = 64: no resizing
    x, _ = next(found.test.minibatches([[0, 1, 2, 3]]))
    mean, std = np.array([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]])
    for row, (name, item) in enumerate(itertools.product((0, 1), (0, 1))):
        top = 100 * item + 50
        middle = photographs[name][top + 4 : top + 60, 304:360] / 255
        assert abs(x[row].permute(1, 2, 0).numpy() - (middle - mean) / std).max() < 1e-5


def test_augmentation_of_files_is_a_function_of_seed_step_and_place(folder: data.Data) -> None:
    state = torch.get_rng_state()
    whole = items(folder.train, PLAN, augment=5)
    assert same(items(folder.train, PLAN, augment=5), whole)
    assert torch.equal(torch.get_rng_state(), state)
    assert same(items(folder.train, PLAN, augment=5, start=2), whole[2:])
    for share in (slice(0, 2), slice(2, None), slice(1, None, 3), slice(6, None)):
        assert same(items(folder.train, PLAN, augment=5, share=share), [x[share] for x in whole])
    assert not torch.equal(whole[0][4], whole[0][5])  # one file at two places
    assert not torch.equal(items(folder.train, PLAN, augment=6)[0], whole[0])
    assert not torch.equal(items(folder.train, [PLAN[0], PLAN[0]], augment=5)[1], whole[0])
    assert not torch.equal(items(folder.train, PLAN)[0], whole[0])


@pytest.mark.slow
def test_workers_change_nothing(photographs: dict[str, bytes], folder: data.Data, tmp_path: Path) -> None:
    root = write_zip(tmp_path / "a.zip", photographs, zipfile.ZIP_DEFLATED)
    data.load("imagefolder", root=root, cache=tmp_path / "cache", size=56)
    found = data.load("imagefolder", root=root, cache=tmp_path / "cache", size=56, workers=2)
    long = PLAN * 8
    large = [[k % 14 for k in range(40)]]  # more than a worker takes at once
    state = torch.get_rng_state()
    training = found.train.minibatches(long, augment=5)
    seen = [next(training)[0]]
    # A look at the test images amid the training, and one that is broken off.
    assert same(items(found.test, [[1, 0]]), items(folder.test, [[1, 0]]))
    broken_off = found.train.minibatches(long, augment=9)
    next(broken_off)
    del broken_off
    assert same(items(found.train, large), items(folder.train, large))
    seen += [x for x, _ in training]
    assert same(seen, items(folder.train, long, augment=5))
    assert torch.equal(torch.get_rng_state(), state)
    assert len(found.train._loaders._idle) == 2  # both pairs of workers are still there, for the next


def test_files_pickle_small_and_read_the_same(photographs: dict[str, bytes], tmp_path: Path) -> None:
    for root in (
        write_tree(tmp_path / "tree", photographs),
        write_zip(tmp_path / "a.zip", photographs, zipfile.ZIP_DEFLATED),
        write_tar(tmp_path / "a.tar", photographs, "w"),
    ):
        entries = [entry for entry in sources.listing(root) if not entry.name.endswith("/")]
        files = pickle.loads(pickle.dumps(sources.Files(root, entries)))
        assert len(files) == len(photographs)
        assert {files.name(k): files.read(k) for k in range(len(files))} == photographs
        assert len(pickle.dumps(files)) < 5000


def test_unreadable_images_are_found_once_and_left_out_only_if_told(
    photographs: dict[str, bytes], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = dict(photographs)
    broken["train/flower/1.JPEG"] = broken["train/flower/1.JPEG"][:-800]
    broken["train/china/2.jpg"] = b"a page that says 404"
    root = write_tree(tmp_path / "tree", broken)
    load = functools.partial(data.load, "imagefolder", root=root, cache=tmp_path / "cache", size=56)
    with pytest.raises(ValueError, match=r"2 of 18 images .*the first train/china/2.jpg \(cannot identify .*skip_corr"):
        load()
    assert "looking at all 18 images" in capsys.readouterr().err
    found = load(skip_corrupt=True)
    said = capsys.readouterr().err
    assert "left out: 2 of 18 images" in said
    assert "looking at all" not in said
    assert [split.y.bincount().tolist() for split in found[:3]] == [[6, 6], [1, 1], [1, 1]]
    everything(found.train)
    for name in ("train/flower/1.JPEG", "train/china/2.jpg"):
        (root / name).write_bytes(photographs[name])
    assert load().train.y.bincount().tolist() == [7, 7]
    assert "looking at all 18 images" in capsys.readouterr().err  # they have changed
    (root / "val/flower/8.jpg").write_bytes(b"")
    with pytest.raises(ValueError, match=r"expected at least 1 images of every class in .*, got 0 of flower; "):
        load(skip_corrupt=True)


def without(files: dict[str, bytes], *starts: str) -> dict[str, bytes]:
    return {name: content for name, content in files.items() if not name.startswith(starts)}


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda f: without(f, "val/china"), "got china in train alone; remove them there or add them to val"),
        (lambda f: without(f, "train/china"), "got china in val alone; remove them there or add them to train"),
        (lambda f: {**without(f, "train/china"), "train/china/a.txt": b""}, "got none in .*tree/train/china; add some"),
        (lambda f: without(f, "val"), "expected folders train and val in .* got train; correct --data"),
        (lambda f: without(f, "train/china", "val/china"), "expected two classes or more"),
        (lambda f: without(f, *(f"train/china/{k}" for k in range(1, 8))), "at least 2 images .*, got 1 of china"),
    ],
)
def test_trees_that_cannot_be_right_are_refused(
    change: Callable[[dict[str, bytes]], dict[str, bytes]], text: str, photographs: dict[str, bytes], tmp_path: Path
) -> None:
    root = write_tree(tmp_path / "tree", change(photographs))
    with pytest.raises(ValueError, match=text):
        data.load("imagefolder", root=root, cache=tmp_path / "cache", size=56)


def test_archives_that_cannot_be_right_are_refused(photographs: dict[str, bytes], tmp_path: Path) -> None:
    load = functools.partial(data.load, "imagefolder", cache=tmp_path / "cache", size=56)
    with pytest.raises(ValueError, match="expected the place of the image folder, got none; name it with --data DIR"):
        load()
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        load(root=tmp_path / "nothing.zip")
    with pytest.raises(ValueError, match="expected a directory or an archive"):
        load(root=Path(__file__))
    with pytest.raises(ValueError, match=r"expected folders train and val in .* got train/; correct"):
        load(root=write_zip(tmp_path / "half.zip", without(photographs, "val")))
    for path in (
        write_zip(tmp_path / "a.zip", photographs),
        write_tar(tmp_path / "a.tar", photographs, "w"),
        write_tar(tmp_path / "a.tar.gz", photographs, "w:gz"),
        write_tar(tmp_path / "a.tar.xz", photographs, "w:xz"),
    ):
        content = path.read_bytes()
        lengths = [len(content) // 2, len(content) - 30]
        if path.suffix == ".tar":
            with tarfile.open(path) as tar:  # between two files, in a header, in a file
                lengths = [tar.getmembers()[9].offset + more for more in (0, 100, 600)]
        for length in lengths:
            path.write_bytes(content[:length])
            with pytest.raises(
                ValueError, match=rf"expected {path} to be whole, got a damaged file \(.+\); replace it"
            ):
                load(root=path)
    path = write_zip(tmp_path / "b.zip", photographs)
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1  # within an image
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"1 of 18 images .* has another checksum"):
        load(root=path)
    assert not list((tmp_path / "cache").glob("*.part"))


def test_without_the_extra_one_sentence_says_so(
    photographs: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = write_tree(tmp_path / "tree", photographs)
    monkeypatch.setitem(sys.modules, "torchvision.transforms", None)
    with pytest.raises(RuntimeError, match=r"got no torchvision; run: pip install 'batchrenorm\[vision\]'"):
        data.load("imagefolder", root=root, cache=tmp_path)
    monkeypatch.setitem(sys.modules, "PIL", None)
    with pytest.raises(RuntimeError, match=r"got no Pillow; run: pip install 'batchrenorm\[vision\]'"):
        folders.pillow()


@needs["caltech101_subset"]
def test_real_photographs_of_every_size(tmp_path: Path) -> None:
    vision()
    found = data.load("imagefolder", root=CALTECH, cache=tmp_path, size=64)
    assert (found.classes, found.shape) == (99, (3, 64, 64))
    assert [split.y.bincount().unique().tolist() for split in found[:3]] == [[7], [1], [2]]
    x, y = next(found.train.minibatches([list(range(0, 693, 10))], augment=0))
    assert y.tolist() == [k // 7 for k in range(0, 693, 10)]
    # Of ImageNet's mean and deviation, and these are photographs too.
    assert abs(x.mean()) < 0.5
    assert 0.7 < x.std() < 1.4
