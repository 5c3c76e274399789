"""Labelled images from everywhere, and the batches that training and validation make of them."""

import io
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image

pytest.importorskip("lightning", reason="needs the extra train")
pytest.importorskip("timm", reason="needs the extra train")

import mobilemamba
from mobilemamba.training.data import training_loader, validation_loader
from mobilemamba.training.recipe import Recipe
from mobilemamba.training.sources import Arrays, Subset, digits, numbers, open_data, open_images, split

BATCH, IMAGES, STEPS = 4, 34, 8  # of an epoch
CFG = mobilemamba.create_model("mobilemamba_t2", widths=(16, 32, 32), depths=(1, 1, 1)).default_cfg | {
    "input_size": (3, 32, 32)
}
RECIPE = Recipe.paper("mobilemamba_t2", image_size=32, batch_size=BATCH, epochs=3)


def encoded(shade, suffix=".png"):
    file = io.BytesIO()
    Image.new("RGB", (10, 12), (shade, 0, 0)).save(file, Image.registered_extensions()[suffix.lower()])
    return file.getvalue()


def write_images(folder, *names, shade=0):
    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(encoded(shade, path.suffix))


def write_shard(path, samples, mode="w"):
    """Samples are (key, content of .cls or None)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as tar:
        for number, (key, label) in enumerate(samples):
            contents = {"png": encoded(number)} | ({} if label is None else {"cls": str(label).encode()})
            for suffix, content in contents.items():
                member = tarfile.TarInfo(f"{key}.{suffix}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def shades(source):
    """The red of every image, which tells where it comes from."""
    return [Image.open(source.open(index)).convert("RGB").getpixel((3, 3))[0] for index in range(len(source.labels))]


def assert_refused(data, sentence, function=open_data):
    with pytest.raises((ValueError, OSError)) as caught:
        function(data)
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


# --- folders ---------------------------------------------------------------------------------------------------------


def test_folder_has_a_folder_for_each_class(tmp_path):
    write_images(tmp_path / "cat", "b.png", "a.JPG", "deep/er/c.webp", ".hidden.png", ".cache/d.png")
    write_images(tmp_path / "dog", "a.bmp")
    (tmp_path / "cat" / "notes.txt").write_text("no image")
    (tmp_path / "readme.txt").write_text("no class")
    write_images(tmp_path / ".git", "a.png")
    source = open_images(tmp_path)
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 0, 1]
    assert source.labels.dtype == np.int64
    names = [source.name(index) for index in range(4)]
    assert names == [str(tmp_path / name) for name in ("cat/a.JPG", "cat/b.png", "cat/deep/er/c.webp", "dog/a.bmp")]


def test_links_are_followed_but_not_for_ever(tmp_path):
    write_images(tmp_path / "elsewhere" / "dogs", "a.png", "b.png")
    write_images(tmp_path / "data" / "cat", "a.png")
    (tmp_path / "data" / "dog").symlink_to(tmp_path / "elsewhere" / "dogs")
    (tmp_path / "data" / "cat" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cat" / "one.png").symlink_to(tmp_path / "elsewhere" / "dogs" / "a.png")
    source = open_images(tmp_path / "data")
    assert source.classes == ["cat", "dog"]
    assert source.labels.tolist() == [0, 0, 0, 0, 1, 1]  # "again" is the whole of data, once


def test_class_without_images_keeps_its_number(tmp_path):
    for name in ("cat", "dog", "eel"):
        (tmp_path / name).mkdir()
    write_images(tmp_path, "cat/a.png", "eel/a.png")
    source = open_images(tmp_path)
    assert (source.classes, source.labels.tolist()) == (["cat", "dog", "eel"], [0, 2])


@pytest.mark.parametrize("names", [("train", "val"), ("training", "validation"), ("train", "test")])
def test_folders_to_train_and_to_validate_on(tmp_path, names):
    for part, name in enumerate(names):
        write_images(tmp_path / name, "cat/a.png", "dog/b.png", shade=part)
    for part, source in enumerate(open_data(tmp_path)):
        assert (source.classes, source.labels.tolist(), shades(source)) == (["cat", "dog"], [0, 1], [part, part])
    assert shades(open_images(tmp_path)) == [1, 1]


def test_images_to_validate_on_are_those_of_val_before_test(tmp_path):
    for part in ("train", "test", "val"):
        write_images(tmp_path / part, "cat/a.png", "dog/a.png", shade=ord(part[0]))
        write_shard(tmp_path / "shards" / f"{part}-0.tar", [(part, 0), ("b", 1)])
    assert shades(open_data(tmp_path)[1]) == [ord("v")] * 2
    assert open_data(tmp_path / "shards")[1].name(0).endswith("val-0.tar:val.png")


def test_undivided_folder_is_split(tmp_path):
    write_images(tmp_path, *(f"cat/{i}.png" for i in range(10)), *(f"dog/{i}.png" for i in range(30)), "eel/0.png")
    one, two, other = (open_data(tmp_path, 0.2, seed) for seed in (0, 0, 1))
    parts = [[source.name(index) for index in range(len(source.labels))] for source in (*one, *two, *other)]
    assert parts[:2] == parts[2:4] != parts[4:]
    assert sorted(parts[0] + parts[1]) == sorted(parts[4] + parts[5])
    assert len({*parts[0], *parts[1]}) == 41
    assert np.bincount(one[1].labels).tolist() == [2, 6]
    assert np.bincount(one[0].labels).tolist() == [8, 24, 1]
    assert len(open_images(tmp_path).labels) == 41
    (tmp_path / "other" / "train").mkdir(parents=True)
    for name in ("cat", "dog"):
        (tmp_path / name).rename(tmp_path / "other" / "train" / name)
    assert [len(source.labels) for source in open_data(tmp_path / "other", 0.2)] == [32, 8]
    assert len(open_images(tmp_path / "other").labels) == 4


def test_class_may_be_called_like_a_part(tmp_path):
    write_images(tmp_path, *(f"{name}/{i}.png" for name in ("valid", "broken") for i in range(5)))
    assert open_images(tmp_path).classes == ["broken", "valid"]
    assert [len(source.labels) for source in open_data(tmp_path, 0.2)] == [8, 2]


def test_data_that_cannot_be_used(tmp_path):
    assert_refused(tmp_path / "missing", f"must be a folder or 'digits', but {tmp_path / 'missing'} is neither")
    assert_refused(tmp_path / "missing", "must be a folder or 'digits'", open_images)
    assert_refused(tmp_path, f"{tmp_path} holds no labelled images: expected a folder for each class")
    write_images(tmp_path, "a.png", "b.png")
    assert_refused(tmp_path, "holds no labelled images", open_images)
    write_images(tmp_path, "cat/a.png", "cat/b.png")
    assert_refused(tmp_path, "must have images of two classes or more to train on, but has ['cat']")
    write_images(tmp_path / "flat", "train/a.png", "val/a.png")
    assert_refused(tmp_path / "flat", f"{tmp_path / 'flat' / 'train'} holds no labelled images")
    write_images(tmp_path / "half", "val/cat/a.png", "val/dog/a.png")
    assert_refused(tmp_path / "half", "has images to validate on, val, but none to train on")
    assert open_images(tmp_path / "half").classes == ["cat", "dog"]
    write_images(tmp_path / "differ", "train/cat/a.png", "train/dog/a.png", "val/cat/a.png", "val/eel/a.png")
    assert_refused(tmp_path / "differ", "must have the same classes, but theirs differ in dog and 1 more")
    for fraction in (0, 1, -0.5, 0.01):
        with pytest.raises(ValueError, match=r"between 0 and 1, but is|leaves none to validate on"):
            split(open_images(tmp_path / "half"), fraction, 0)


# --- shards ----------------------------------------------------------------------------------------------------------


def test_shards(tmp_path):
    webdataset = pytest.importorskip("webdataset")
    for shard, labels in enumerate([(2, 0), (1,)]):
        with webdataset.TarWriter(str(tmp_path / f"images-{shard:04}.tar")) as tar:
            for number, label in enumerate(labels):
                image = {"jpg" if label else "png": Image.new("RGB", (5, 5), (100 * label, 0, 0))}
                tar.write({"__key__": f"a/{shard}{number}", **image, "cls": label, "json": {"more": 1}})
    source = open_images(tmp_path)
    assert source.labels.tolist() == [2, 0, 1]
    assert source.classes == ["0", "1", "2"]
    assert shades(source) == pytest.approx([200, 0, 100], abs=2)
    assert source.name(0) == f"{tmp_path}/images-0000.tar:a/00.jpg"
    (tmp_path / "classes.txt").write_text("cat\ndog\n eel \n\n")
    assert open_images(tmp_path).classes == ["cat", "dog", "eel"]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    assert_refused(tmp_path, f"{tmp_path}: labels must be from 0 to 1, but one is 2")


def test_shards_to_train_and_to_validate_on(tmp_path):
    write_shard(tmp_path / "train-0.tar", [("a", 0), ("b", 1), ("c", 2)])
    write_shard(tmp_path / "val-0.tar", [("a", 1)])
    (tmp_path / "classes.txt").write_text("cat\ndog\neel\n")
    train, val = open_data(tmp_path)
    assert train.classes == val.classes == open_images(tmp_path).classes == ["cat", "dog", "eel"]
    (tmp_path / "classes.txt").unlink()
    train, val = open_data(tmp_path)
    assert train.classes == val.classes == ["0", "1", "2"]
    write_shard(tmp_path / "val-1.tar", [("a", 5)])
    assert_refused(tmp_path, "validation has class 5, training has 3")
    for part, names in (("train", "cat\ndog\n"), ("val", "dog\ncat\n")):
        write_shard(tmp_path / "named" / part / "0.tar", [("a", 0), ("b", 1)])
        (tmp_path / "named" / part / "classes.txt").write_text(names)
    assert_refused(tmp_path / "named", "must have the same classes, but theirs are in another order")


@pytest.mark.parametrize(
    ("samples", "sentence"),
    [
        ([("a", 0), ("folder/b", None)], "has no .cls, the number of a class, for folder/b"),
        ([("a", None), ("b", None)], "for a and 1 more"),
        ([("a", 0), ("b", "cat")], "is no uncompressed tar of images and their .cls: invalid literal"),
        ([("a", 0), ("b", -1)], "labels must be from 0 to 0, but one is -1"),
        ([], "holds no labelled images"),
    ],
)
def test_shards_that_cannot_be_used(tmp_path, samples, sentence):
    write_shard(tmp_path / "0.tar", samples)
    assert_refused(tmp_path, sentence, open_images)


def test_compressed_shards_are_refused(tmp_path):
    write_shard(tmp_path / "0.tar", [("a", 0)], "w:gz")
    assert_refused(tmp_path, f"{tmp_path / '0.tar'} is no uncompressed tar", open_images)
    (tmp_path / "0.tar").rename(tmp_path / "0.tar.gz")
    assert_refused(tmp_path, "expected a folder for each class, uncompressed tar shards (.tar)", open_images)


def test_truncated_shards_are_refused_wherever_they_end(tmp_path):
    path = tmp_path / "0.tar"
    write_shard(path, [("a", 0), ("b", 1), ("c", 0)])
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        end = max(member.offset_data + 512 for member in tar)
    for length in range(0, end + 1, 256):
        path.write_bytes(whole[:length])
        assert_refused(tmp_path, str(path), open_images)
    path.write_bytes(whole[:1024] + bytes([1]) * 512 + whole[1536:])  # a header in the middle
    assert_refused(tmp_path, "truncated or damaged at byte 1024", open_images)


# --- Parquet ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def parquet(tmp_path, monkeypatch):
    """A folder, and a function that writes columns into one of its files."""
    pytest.importorskip("datasets")
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "images [1]"  # a name that a pattern could trip over
    folder.mkdir()
    return folder, lambda name, **columns: pq.write_table(pa.table(columns), folder / name)


def test_parquet_of_datasets(parquet):
    import datasets

    folder, _ = parquet
    features = datasets.Features({"picture": datasets.Image(), "kind": datasets.ClassLabel(names=["cat", "dog"])})
    for part, labels in (("train", [1, 0, 1]), ("validation", [0, 1])):
        images = [Image.new("RGB", (5, 5), (100 * label, 0, 0)) for label in labels]
        table = datasets.Dataset.from_dict({"picture": images, "kind": labels}, features=features)
        table.to_parquet(folder / f"{part}-00000-of-00001.parquet")
    train, val = open_data(folder)
    assert train.classes == val.classes == ["cat", "dog"]
    assert (train.labels.tolist(), shades(train)) == ([1, 0, 1], [100, 0, 100])
    assert (val.labels.tolist(), shades(val)) == ([0, 1], [0, 100])
    assert val.name(1) == f"{folder}/validation-00000-of-00001.parquet: row 1"


@pytest.mark.parametrize("column", ["bytes", "struct", "struct with paths"])
def test_plain_parquet(parquet, column):
    folder, write = parquet
    for file, labels in enumerate([[0, 2], [1]]):
        images = [encoded(10 * file + row) for row in range(len(labels))]
        if column != "bytes":
            images = [{"bytes": image} | ({"path": "x.png"} if "paths" in column else {}) for image in images]
        write(f"{file}.parquet", image=images, label=labels)
    source = open_images(folder)
    assert source.classes == ["0", "1", "2"]
    assert (source.labels.tolist(), shades(source)) == ([0, 2, 1], [0, 1, 10])
    assert [source.name(index).rpartition("/")[2] for index in range(3)] == [
        "0.parquet: row 0", "0.parquet: row 1", "1.parquet: row 0",
    ]  # fmt: skip


def test_parquet_that_cannot_be_used(parquet):
    folder, write = parquet
    images = [encoded(0), encoded(1)]
    for columns, sentence in [
        ({"image": images, "label": ["cat", "dog"]}, "column label must hold integers, but is string, 0 empty"),
        ({"image": images, "label": [0, None]}, "column label must hold integers, but is int64, 1 empty"),
        ({"image": images, "label": [0.5, 1.0]}, "column label must hold integers, but is double"),
        ({"image": images, "label": [0, -1]}, "labels must be from 0 to 0, but one is -1"),
        ({"image": [1, 2], "label": [0, 1]}, "cannot be used: Unsupported cast"),
        ({"pixels": images, "label": [0, 1]}, "it has no columns of images and labels, but pixels, label"),
    ]:
        write("0.parquet", **columns)
        assert_refused(folder, sentence, open_images)
    (folder / "0.parquet").write_bytes(b"no Parquet")
    assert_refused(folder, f"{folder / '0.parquet'} cannot be used: ", open_images)


def test_parquet_rows_without_an_image_are_skipped(parquet):
    folder, write = parquet
    write("0.parquet", image=[encoded(0), None, b"no image"], label=[0, 1, 1])
    (batch,) = validation_loader(open_images(folder), CFG, 4, 0)
    assert batch.labels.tolist() == [0]
    assert batch.unreadable == [
        f"{folder}/0.parquet: row 1: the row holds no bytes",
        f"{folder}/0.parquet: row 2: it is no image",
    ]


# --- digits ----------------------------------------------------------------------------------------------------------


def test_digits():
    parts = digits()
    assert [len(source.labels) for source in parts] == [1347, 450]
    assert open_data("digits")[1].labels.tolist() == open_images("digits").labels.tolist() == parts[1].labels.tolist()
    pictures = [Image.open(source.open(index)) for source in parts for index in (0, 1)]
    assert {(picture.size, picture.mode) for picture in pictures} == {((8, 8), "L")}
    for source in parts:
        assert source.classes == numbers(0, 10)
        counts = np.bincount(source.labels)
        assert counts.min() > 0.95 * counts.max() - 1


# --- what cannot be read ---------------------------------------------------------------------------------------------


@pytest.fixture
def faulty(tmp_path):
    """Eight images of two classes, with four files in between that are none."""
    whole = encoded(0, ".jpg")
    bad = {"1.png": b"text", "3.jpg": whole[: len(whole) // 2], "5.png": b"", "6.png": None}
    write_images(tmp_path, *(f"cat/{i}.png" for i in (0, 2, 4)), *(f"dog/{i}.png" for i in range(5)), shade=200)
    for name, content in bad.items():
        path = tmp_path / "cat" / name
        if content is None:
            path.symlink_to(tmp_path / "gone.png")
        else:
            path.write_bytes(content)
    return tmp_path, [str(tmp_path / "cat" / name) for name in bad]


def assert_named(unreadable, paths):
    assert [why.partition(": ")[0] for why in unreadable] == paths
    assert all(
        reason and "\n" not in why and "0x" not in why for why in unreadable for _, _, reason in [why.partition(": ")]
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_are_left_out_of_validation(faulty, workers):
    folder, paths = faulty
    batches = list(validation_loader(open_images(folder), CFG, 3, workers))
    assert torch.cat([batch.labels for batch in batches]).tolist() == [0] * 3 + [1] * 5
    assert sum(len(batch.images) for batch in batches) == 8
    assert_named([why for batch in batches for why in batch.unreadable], paths)


def test_batch_without_readable_images_is_empty(faulty):
    folder, paths = faulty
    batches = list(validation_loader(Subset(open_images(folder), np.array([1, 3, 0])), CFG, 2, 0))
    assert [len(batch.labels) for batch in batches] == [0, 1]
    assert_named(batches[0].unreadable, paths[:2])


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_images_give_their_place_to_the_next(faulty, workers):
    folder, paths = faulty
    loader = training_loader(
        open_images(folder), Recipe.paper("mobilemamba_t2", image_size=32, batch_size=6), CFG, workers
    )
    for _ in range(2):
        batches = take(loader, 2)
        assert all(batch.images.shape == (6, 3, 32, 32) for batch in batches)
        assert sum(batch.labels.tolist().count(1) for batch in batches) == 7  # both missing ones before the dogs too
        assert_named(sorted({why for batch in batches for why in batch.unreadable}), paths)


@pytest.mark.parametrize("workers", [0, 2])
def test_unreadable_data_ends_in_a_sentence(tmp_path, workers):
    for name in ("cat/a.png", "cat/b.png", "dog/a.png"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"no image")
    loader = training_loader(
        open_images(tmp_path), Recipe.paper("mobilemamba_t2", image_size=32, batch_size=2), CFG, workers
    )
    with pytest.raises(
        OSError, match=r"^3 images in a row cannot be read, such as .*png: it is no image: repair"
    ) as caught:
        take(loader, 1)
    assert "\n" not in str(caught.value)


def test_the_same_fault_has_the_same_name_every_time(tmp_path):
    """Shards' images have no file whose address could get into the message."""
    write_shard(tmp_path / "0.tar", [("a", 0), ("b", 1)])
    data = (tmp_path / "0.tar").read_bytes()
    (tmp_path / "0.tar").write_bytes(data.replace(encoded(1), bytes(len(encoded(1)))))
    loader = validation_loader(open_images(tmp_path), CFG, 2, 0)
    assert [batch.unreadable for _ in range(2) for batch in loader] == [[f"{tmp_path}/0.tar:b.png: it is no image"]] * 2


# --- batches ---------------------------------------------------------------------------------------------------------


def source(count=IMAGES):
    """Images whose label is their number."""
    images = np.random.default_rng(0).integers(0, 256, (count, 12, 12, 3), np.uint8)
    return Arrays(images, np.arange(count), numbers(0, count))


def loader(workers=0, rank=0, processes=1, recipe=RECIPE, **options):
    return training_loader(source(), recipe, CFG, workers, rank, processes, **options)


def take(loader, count):
    """The next batches, counted as a run counts them."""
    taken = []
    while len(taken) < count:
        for batch in loader:
            loader.position += 1
            taken.append(batch)
            if len(taken) == count:
                break
    return taken


@pytest.fixture(scope="module")
def batches():
    """Two epochs of the one process, and one batch more."""
    return take(loader(), 2 * STEPS + 1)


def assert_same(found, expected):
    assert len(found) == len(expected)
    for a, b in zip(found, expected, strict=True):
        assert a.labels.tolist() == b.labels.tolist()
        assert torch.equal(a.images, b.images)


def test_batches(batches):
    assert [batch.number for batch in batches] == list(range(2 * STEPS + 1))
    for batch in batches:
        assert (batch.images.shape, batch.images.dtype) == ((BATCH, 3, 32, 32), torch.float32)
        assert (batch.labels.dtype, batch.unreadable) == (torch.int64, [])


def test_an_epoch_has_every_image_at_most_once(batches):
    epochs = [torch.cat([batch.labels for batch in batches[start : start + STEPS]]).tolist() for start in (0, STEPS)]
    for epoch in epochs:
        assert len(set(epoch)) == STEPS * BATCH
    assert epochs[0] != epochs[1]
    assert set(epochs[0]) != set(epochs[1])  # those left over are others
    once, again = (
        {int(n): i for b in part for n, i in zip(b.labels, b.images, strict=True)}
        for part in (batches[:STEPS], batches[STEPS:])
    )
    assert not any(torch.equal(once[n], again[n]) for n in once.keys() & again.keys())


@pytest.mark.parametrize("options", [{}, {"persistent_workers": True}])
def test_workers_do_not_matter(batches, options):
    assert_same(take(loader(workers=2, **options), len(batches)), batches)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_share_the_batches_of_one(batches, processes):
    steps = IMAGES // (BATCH * processes)
    for rank in range(processes):
        first = take(loader(0, rank, processes), 2 * steps)
        assert_same(first[:steps], [batches[step * processes + rank] for step in range(steps)])
        assert_same(first[steps:], [batches[STEPS + step * processes + rank] for step in range(steps)])
        assert [batch.number for batch in first] == [step * processes + rank for step in range(2 * steps)]


@pytest.mark.parametrize("position", [1, 7, 8, 11])
def test_going_on_is_as_if_never_stopped(batches, position):
    stopped = loader()
    take(stopped, position)
    resumed = loader(workers=2 if position == 7 else 0)
    resumed.position = stopped.position
    assert_same(take(resumed, len(batches) - position), batches[position:])


def test_seed_decides(batches):
    other = Recipe.paper("mobilemamba_t2", image_size=32, batch_size=BATCH, epochs=3, seed=1)
    assert take(loader(recipe=other), 1)[0].labels.tolist() != batches[0].labels.tolist()


def test_images_of_one_channel():
    cfg = CFG | {"input_size": (1, 32, 32), "mean": (0.5,), "std": (0.5,)}
    recipe = Recipe.paper("mobilemamba_t2", image_size=32, batch_size=BATCH, in_chans=1)
    for batch in take(training_loader(digits()[0], recipe, cfg, 0), 8):
        assert batch.images.shape == (BATCH, 1, 32, 32)
    (batch, *_) = validation_loader(digits()[1], cfg, 4, 0)
    assert batch.images.shape == (4, 1, 32, 32)


def test_too_few_images_for_a_step():
    with pytest.raises(ValueError, match=r"34 training images are fewer than a step's 4 × 16: lower the batch size"):
        loader(processes=16)


@pytest.mark.parametrize("processes", [1, 3])
def test_validation_has_every_image_once(processes):
    found = [
        label
        for rank in range(processes)
        for batch in validation_loader(source(), CFG, BATCH, 0, rank, processes)
        for label in batch.labels.tolist()
    ]
    assert sorted(found) == list(range(IMAGES))
