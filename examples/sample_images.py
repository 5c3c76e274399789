"""Labelled images to try training on, from what scikit-learn brings with it: handwritten digits and two photographs.

    python examples/sample_images.py images
    mobilemamba train images/digits --output run …

OUT/digits has the digits in train and val, OUT/photos pieces of the photographs, which overlap nowhere, to be split.
"""

import argparse
import io
from pathlib import Path

import datasets
import numpy as np
import webdataset
from PIL import Image
from sklearn.datasets import load_sample_images

from mobilemamba.training.sources import Source, digits

ROWS, COLUMNS = 8, 12  # of pieces of a photograph

parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
parser.add_argument("out", type=Path, help="folder to write to")
parser.add_argument("--size", type=int, default=64, help="pixels of a side (default: 64)")
parser.add_argument("--shards", action="store_true", help="write the digits as WebDataset's tar shards too")
parser.add_argument("--parquet", action="store_true", help="write the digits as Hugging Face's Parquet files too")
options = parser.parse_args()
if options.size < 1:
    parser.error(f"--size must be at least 1, but is {options.size}")
side = (options.size, options.size)


def png(source: Source, index: int) -> bytes:
    file = io.BytesIO()
    Image.open(source.open(index)).resize(side, Image.Resampling.BICUBIC).save(file, "png")
    return file.getvalue()


parts = dict(zip(("train", "val"), digits(), strict=True))
for part, source in parts.items():
    names = [source.classes[label] for label in source.labels]
    images = [png(source, index) for index in range(len(names))]
    for number, (image, name) in enumerate(zip(images, names, strict=True)):
        path = options.out / "digits" / part / name / f"{number:04}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(image)
    print(f"{len(images)} digits in {options.out / 'digits' / part}")
    if options.shards:
        shards = options.out / "digits-shards"
        shards.mkdir(parents=True, exist_ok=True)
        (shards / "classes.txt").write_text("\n".join(source.classes) + "\n")
        with webdataset.TarWriter(str(shards / f"{part}-0000.tar"), mtime=0) as tar:
            for number, image in enumerate(images):
                tar.write({"__key__": f"{number:04}", "png": image, "cls": int(source.labels[number])})
        print(f"{len(images)} digits in {shards / f'{part}-0000.tar'}")
    if options.parquet:
        features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=source.classes)})
        columns = {"image": [{"bytes": image, "path": None} for image in images], "label": source.labels}
        path = options.out / "digits-parquet" / f"{part}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        datasets.Dataset.from_dict(columns, features=features).to_parquet(path)
        print(f"{len(images)} digits in {path}")

photographs = load_sample_images()
for photograph, name in zip(photographs.images, photographs.filenames, strict=True):
    folder = options.out / "photos" / Path(name).stem
    folder.mkdir(parents=True, exist_ok=True)
    height, width = photograph.shape[0] // ROWS, photograph.shape[1] // COLUMNS
    for row, column in np.ndindex(ROWS, COLUMNS):
        piece = photograph[row * height : (row + 1) * height, column * width : (column + 1) * width]
        image = Image.fromarray(piece).resize(side, Image.Resampling.BICUBIC)
        image.save(folder / f"{row:02}-{column:02}.jpg", quality=95)
    print(f"{ROWS * COLUMNS} pieces of a photograph in {folder}")
