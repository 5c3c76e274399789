"""Labelled images, wherever they lie. A source is a sequence that opens any of its images by number: so an epoch can be
in any order, and a run can go on in the middle of one."""

from __future__ import annotations

import glob
import io
import os
import tarfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import numpy as np
from PIL import Image

from mobilemamba.predict import image_suffixes, reason

_TRAIN, _VAL = ("train", "training"), ("val", "valid", "validation", "test")
_PACKED = (".tar", ".parquet")


class Source(Protocol):
    """Labelled images.

    Attributes:
        classes: names of the classes.
        labels: the class of every image.
    """

    classes: list[str]
    labels: np.ndarray

    def name(self, index: int) -> str:
        """What messages call the image."""

    def open(self, index: int) -> BinaryIO | Path:
        """What ``PIL.Image.open`` takes."""


class ImageFolder:
    """A folder for each class, with the images anywhere below it, but for hidden files and folders."""

    def __init__(self, root: Path, classes: list[str]) -> None:
        self.classes = classes
        self._paths: list[str] = []
        counts = []
        for name in classes:
            before = len(self._paths)
            self._paths += _images_below(root / name)
            counts.append(len(self._paths) - before)
        self.labels = np.repeat(np.arange(len(classes)), counts)

    def name(self, index: int) -> str:
        return self._paths[index]

    def open(self, index: int) -> Path:
        return Path(self._paths[index])


def _images_below(root: Path) -> Iterator[str]:
    """Files, through links too, but each folder once: a link to a folder above it would have no end."""
    suffixes, seen = image_suffixes(), set()
    for folder, folders, files in os.walk(root, onerror=_raise, followlinks=True):
        place = os.path.realpath(folder)
        if place in seen:
            folders.clear()
            continue
        seen.add(place)
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(files):
            if not name.startswith(".") and os.path.splitext(name)[1].lower() in suffixes:
                yield os.path.join(folder, name)


def _raise(error: OSError) -> None:
    raise error


class Shards:
    """WebDataset's tar files: the members of a name belong together, an image and ``.cls``, the number of its class.

    Only the members' places are kept; an image is read where it lies. ``classes.txt`` beside the shards may name the
    classes, one a line.
    """

    def __init__(self, shards: list[Path], classes: list[str]) -> None:
        suffixes = image_suffixes()
        self._shards, self._places, labels = shards, [], []
        for number, shard in enumerate(shards):
            images: dict[str, tuple[int, int, int, str]] = {}
            labelled: dict[str, int] = {}
            try:
                with open(shard, "rb") as file, tarfile.open(fileobj=file, mode="r:") as tar:
                    for member in tar:
                        folder, slash, name = member.name.rpartition("/")
                        stem, _, suffix = name.partition(".")
                        key = folder + slash + stem
                        if suffix == "cls":
                            content = tar.extractfile(member)
                            labelled[key] = int(content.read()) if content else -1
                        elif member.isfile() and f".{suffix.lower()}" in suffixes:
                            images[key] = (number, member.offset_data, member.size, member.name)
                    file.seek(tar.offset)
                    if file.read(512) != bytes(512):  # tarfile takes what it cannot read for the end
                        raise ValueError(f"it is truncated or damaged at byte {tar.offset}")
            except (tarfile.TarError, ValueError) as error:
                raise ValueError(f"{shard} is no uncompressed tar of images and their .cls: {error}") from error
            if unlabelled := images.keys() - labelled.keys():
                raise ValueError(f"{shard} has no .cls, the number of a class, for {_and_others(sorted(unlabelled))}")
            self._places += list(images.values())
            labels += [labelled[key] for key in images]
        self.labels = np.array(labels, np.int64)
        self.classes = classes or numbers(0, int(self.labels.max(initial=-1)) + 1)

    def name(self, index: int) -> str:
        shard, _, _, member = self._places[index]
        return f"{self._shards[shard]}:{member}"

    def open(self, index: int) -> BinaryIO:
        shard, offset, size, _ = self._places[index]
        with open(self._shards[shard], "rb") as file:
            file.seek(offset)
            return io.BytesIO(file.read(size))


class Parquet:
    """Hugging Face's Parquet files, with a column of images (bytes, or a struct of them) and one of integer labels.

    Read by the package ``datasets``, which keeps a copy in its cache that can be read at any place.
    """

    def __init__(self, files: list[Path]) -> None:
        try:
            import datasets
        except ModuleNotFoundError as error:
            raise RuntimeError(f"Parquet needs {error.name}: pip install mobilemamba[train]") from error
        import pyarrow as pa
        from pyarrow.parquet import read_metadata

        try:
            self._files, self._ends = files, np.cumsum([read_metadata(file).num_rows for file in files])
            paths = [glob.escape(str(file)) for file in files]
            table: Any = datasets.load_dataset("parquet", data_files=paths, split="train")
            columns = table.features.items()
            images = [n for n, f in columns if isinstance(f, datasets.Image) or n in ("image", "img", "jpg")]
            labels = [n for n, f in columns if isinstance(f, datasets.ClassLabel) or n in ("label", "cls")]
            if not images or not labels:
                raise ValueError(f"it has no columns of images and labels, but {', '.join(table.features)}")
            self._column, feature = images[0], table.features[labels[0]]
            self._images = table.select_columns(images[:1]).cast_column(self._column, datasets.Image(decode=False))
            column = table.data.column(labels[0])
            if column.null_count or not pa.types.is_integer(column.type):
                raise ValueError(
                    f"column {labels[0]} must hold integers, but is {column.type}, {column.null_count} empty"
                )
        except Exception as error:  # datasets and Arrow raise many kinds of their own
            why = reason(error.__cause__ or error)
            raise ValueError(f"{_and_others(files)} cannot be used: {why}") from error
        self.labels = column.to_numpy().astype(np.int64)
        named = isinstance(feature, datasets.ClassLabel)
        self.classes = feature.names if named else numbers(0, int(self.labels.max(initial=-1)) + 1)

    def name(self, index: int) -> str:
        file = int(np.searchsorted(self._ends, index, "right"))
        return f"{self._files[file]}: row {index - (self._ends[file - 1] if file else 0)}"

    def open(self, index: int) -> BinaryIO:
        image = self._images[index][self._column]
        if not image or image["bytes"] is None:
            raise OSError("the row holds no bytes")
        return io.BytesIO(image["bytes"])


class Arrays:
    """Images in memory, (n, height, width) or (n, height, width, 3), uint8."""

    def __init__(self, images: np.ndarray, labels: np.ndarray, classes: list[str]) -> None:
        self._images, self.labels, self.classes = images, labels.astype(np.int64), classes

    def name(self, index: int) -> str:
        return f"image {index}"

    def open(self, index: int) -> BinaryIO:
        file = io.BytesIO()
        Image.fromarray(self._images[index]).save(file, "bmp")
        file.seek(0)
        return file


class Subset:
    """Some images of a source."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self._source, self._indices = source, indices
        self.classes, self.labels = source.classes, source.labels[indices]

    def name(self, index: int) -> str:
        return self._source.name(int(self._indices[index]))

    def open(self, index: int) -> BinaryIO | Path:
        return self._source.open(int(self._indices[index]))


def digits() -> tuple[Source, Source]:
    """scikit-learn's 1797 scans of handwritten digits (Alpaydin and Kaynak 1998), 8×8, a quarter held out."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = np.round(data.images * (255 / 16)).astype(np.uint8)
    return split(Arrays(images, data.target, numbers(0, 10)), 0.25, seed=0)


def split(source: Source, fraction: float, seed: int) -> tuple[Source, Source]:
    """Training and validation images, as many of each class in proportion; every class keeps one to train on.

    Raises:
        ValueError: the share is not between 0 and 1, or nothing would be left to validate on.
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the share to validate on must be between 0 and 1, but is {fraction}")
    random = np.random.default_rng(seed)
    held_out: list[int] = []
    for label in range(len(source.classes)):
        of_class = random.permutation(np.flatnonzero(source.labels == label))
        held_out += list(of_class[: min(round(fraction * len(of_class)), max(0, len(of_class) - 1))])
    if not held_out:
        raise ValueError(f"a share of {fraction} of {len(source.labels)} images leaves none to validate on")
    rest = np.setdiff1d(np.arange(len(source.labels)), held_out)
    return Subset(source, rest), Subset(source, np.sort(np.array(held_out)))


def open_data(data: str | os.PathLike[str], val_fraction: float = 0.1, seed: int = 0) -> tuple[Source, Source]:
    """Training and validation images of a folder.

    Args:
        data: "digits", or a folder with ``train`` and ``val`` in it, each of which has a folder for each class, tar
            shards (WebDataset) or Parquet files (Hugging Face); shards and Parquet files may also lie together, their
            names starting with ``train`` and ``val``. ``valid``, ``validation`` and ``test`` stand for ``val`` where
            there is none. A folder without these two is split.
        val_fraction: the share to validate on, where the data do not say.
        seed: of that split.

    Raises:
        OSError: the folder cannot be read.
        ValueError: there are no labelled images in it, or training and validation do not fit each other.
    """
    if str(data) == "digits" and not Path(data).exists():
        return digits()
    root = Path(data)
    if not root.is_dir():
        raise ValueError(f"DATA must be a folder or 'digits', but {root} is neither")
    train_part, val_part = _parts(root)
    if val_part and not train_part:
        raise ValueError(f"{root} has images to validate on, {val_part[0].name}, but none to train on: expected train")
    train = _open(train_part or [root])
    if len(train.classes) < 2:
        raise ValueError(f"{root} must have images of two classes or more to train on, but has {train.classes}")
    if not val_part:
        return split(train, val_fraction, seed)
    val = _open(val_part)
    unnamed = not isinstance(val, ImageFolder) and val.classes == numbers(0, len(val.classes))
    if unnamed and len(val.classes) > len(train.classes):
        raise ValueError(f"{root}: validation has class {val.labels.max()}, training has {len(train.classes)}")
    if not unnamed and val.classes != train.classes:
        differ = sorted(set(train.classes) ^ set(val.classes))
        how = f"differ in {_and_others(differ)}" if differ else "are in another order"
        raise ValueError(f"{root}: training and validation must have the same classes, but theirs {how}")
    val.classes = train.classes
    return train, val


def open_images(data: str | os.PathLike[str]) -> Source:
    """The images to validate on: those of :func:`open_data`, or all of a folder that is not divided.

    Raises:
        OSError, ValueError: as :func:`open_data`.
    """
    root = Path(data)
    if not root.is_dir():
        return open_data(data)[1]
    train_part, val_part = _parts(root)
    return open_data(data)[1] if train_part and not val_part else _open(val_part or [root])


def _parts(root: Path) -> tuple[list[Path], list[Path]]:
    """What there is to train and to validate on, each a folder or files; nothing where the folder is not divided."""
    train, val = _part(root, _TRAIN), _part(root, _VAL)
    if not (train and val):  # one alone, of images and not of folders or shards, is a class of such a name
        train, val = ([] if part and part[0].is_dir() and not _is_data(part[0]) else part for part in (train, val))
    return train, val


def _part(root: Path, names: tuple[str, ...]) -> list[Path]:
    packed = sorted(path for path in root.iterdir() if path.suffix in _PACKED)
    for name in names:
        if (root / name).is_dir():
            return [root / name]
        if files := [path for path in packed if path.name.startswith(name)]:
            return files
    return []


def _is_data(folder: Path) -> bool:
    return any(path.is_dir() or path.suffix in _PACKED for path in folder.iterdir())


def numbers(start: int, stop: int) -> list[str]:
    """Names for classes that have none."""
    return [str(number) for number in range(start, stop)]


def _and_others(names: Sequence[Any]) -> str:
    return f"{names[0]} and {len(names) - 1} more" if len(names) > 1 else str(names[0])


def _open(places: list[Path]) -> Source:
    root = places[0] if places[0].is_dir() else places[0].parent
    files = sorted(root.iterdir()) if places[0].is_dir() else places
    if shards := [file for file in files if file.suffix == ".tar"]:
        names = root / "classes.txt"
        lines = names.read_text("utf-8-sig").splitlines() if names.is_file() else []
        source: Source = Shards(shards, [line.strip() for line in lines if line.strip()])
    elif parquet := [file for file in files if file.suffix == ".parquet"]:
        source = Parquet(parquet)
    else:
        source = ImageFolder(root, [file.name for file in files if file.is_dir() and not file.name.startswith(".")])
    if not len(source.labels):
        raise ValueError(
            f"{root} holds no labelled images: expected a folder for each class, uncompressed tar shards (.tar) or "
            "Parquet files (.parquet)"
        )
    wrong = source.labels[(source.labels < 0) | (source.labels >= len(source.classes))]
    if len(wrong):
        raise ValueError(f"{root}: labels must be from 0 to {len(source.classes) - 1}, but one is {wrong[0]}")
    return source
