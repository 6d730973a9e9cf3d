"""Images as examples: IDX files, columns of images, preparation, answers, public images."""

from __future__ import annotations

import gzip
import io
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from pictures import CLASSES, drawn_pictures, idx_bytes, write_idx

from meerkat.config import MaskSection, TaskSection
from meerkat.data.images import Image, ImageEncoder, as_png, idx_rows, image_of, prepared
from meerkat.data.public_images import public_images
from meerkat.data.sources import load_examples
from meerkat.errors import DataError
from meerkat.tasks import Example, Task, resolve_task

TASK = Task("t", "", "", ("zero", "uno", "3"), image="image")


def test_idx_files_give_the_pixels_and_labels_that_were_written(tmp_path: Path) -> None:
    write_idx(tmp_path)
    for split, count, seed in (("train", 60, 1), ("test", 24, 2)):
        rows = list(idx_rows(tmp_path, split))
        pictures, labels = drawn_pictures(count, seed)
        assert np.array_equal([row["image"].pixels for row in rows], pictures)
        assert [row["label"] for row in rows] == labels.tolist()


def _spoilt(content: bytes, how: str) -> bytes:
    return {
        "cut": content[:-1],
        "longer": content + b"0",
        "header": content[:6],
        "type": bytes((0, 0, 13)) + content[3:],
        "dimensions": content[:3] + b"\x01" + content[4:],
        "empty": b"",
    }[how]


@pytest.mark.parametrize("how", ["cut", "longer", "header", "type", "dimensions", "empty"])
def test_a_damaged_idx_file_is_refused_in_one_line(tmp_path: Path, how: str) -> None:
    file = write_idx(tmp_path) / "t10k-images-idx3-ubyte"
    file.write_bytes(_spoilt(file.read_bytes(), how))
    with pytest.raises(DataError, match=r"t10k-images-idx3-ubyte is (damaged|no IDX)") as raised:
        list(idx_rows(tmp_path, "test"))
    assert "\n" not in str(raised.value)


def test_idx_files_that_are_missing_or_do_not_belong_together_are_refused(tmp_path: Path) -> None:
    write_idx(tmp_path)
    with pytest.raises(DataError, match="splits are train and test, not 'validation'"):
        list(idx_rows(tmp_path, "validation"))
    gz = tmp_path / "train-labels-idx1-ubyte.gz"
    whole = gzip.compress(bytes(range(200)))
    changed = bytes([*whole[:12], whole[12] ^ 0xFF, *whole[13:]])
    for content in (whole[:40], changed, changed[:40]):
        gz.write_bytes(content)
        with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz cannot be read"):
            list(idx_rows(tmp_path, "train"))
    gz.write_bytes(b"no gzip")
    with pytest.raises(DataError, match=r"train-labels-idx1-ubyte.gz cannot be read"):
        list(idx_rows(tmp_path, "train"))
    gz.unlink()
    with pytest.raises(DataError, match="no IDX file of train labels"):
        list(idx_rows(tmp_path, "train"))
    labels = tmp_path / "t10k-labels-idx1-ubyte"
    labels.write_bytes(idx_bytes(np.zeros(7, np.uint8)))
    with pytest.raises(DataError, match="24 images and 7 labels"):
        list(idx_rows(tmp_path, "test"))


def test_a_column_of_images_takes_what_datasets_gives() -> None:
    pixels = drawn_pictures(1)[0][0]
    for value in (
        Image(pixels),
        PIL.Image.fromarray(pixels),
        {"bytes": as_png(Image(pixels)), "path": None},
    ):
        assert np.array_equal(image_of(value, "row 1").pixels, pixels)
    deep = PIL.Image.fromarray(pixels.astype(np.uint16) << 8)
    assert np.array_equal(image_of(deep, "row 1").pixels, pixels)
    colour = PIL.Image.fromarray(np.stack([pixels] * 3, 2)).convert("RGBA")
    assert image_of(colour, "row 1").pixels.shape == (12, 12, 3)
    for value in ("a text", {"bytes": b"no image", "path": None}, {"path": "/nowhere.png"}, 3):
        with pytest.raises(DataError, match=r"^row 1: "):
            image_of(value, "row 1")


def test_images_are_equal_by_their_pixels_alone() -> None:
    pixels = drawn_pictures(2)[0]
    assert str(Image(pixels[0])) == str(Image(pixels[0].copy())) != str(Image(pixels[1]))
    assert str(Image(pixels[0])) != str(Image(pixels[0].reshape(6, 24)))


def test_the_middle_square_is_taken() -> None:
    pixels = np.zeros((10, 30), np.uint8)
    pixels[:, 10:20] = 200
    assert prepared(Image(pixels), 5).tolist() == [[[200] * 5] * 5]
    assert prepared(Image(np.zeros((9, 7, 3), np.uint8)), 8).shape == (3, 8, 8)


def test_answers_are_classes_by_number_name_or_one_of_several_names() -> None:
    pixels = drawn_pictures(1)[0][0]
    encoded = ImageEncoder(TASK, 8, CLASSES).encode(Example({"image": Image(pixels)}, 2))
    assert encoded.answers == (1, 2, 3)
    assert encoded.label == 2


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        (("zero", "crane"), "several classes"),
        (("zero", "nothing"), "no class"),
        (("zero", "6"), "no class"),
        (("uno", "2"), "another label has"),
    ],
)
def test_answers_that_are_not_each_one_class_are_refused(
    words: tuple[str, ...], reason: str
) -> None:
    with pytest.raises(DataError, match=rf"task.verbalizers: .*{reason}"):
        ImageEncoder(Task("t", "", "", words, image="image"), 8, CLASSES)


def test_a_task_is_over_images_or_over_texts() -> None:
    given = {"name": "custom", "source": "x", "image": "image", "verbalizers": ("a", "b")}
    assert resolve_task(TaskSection(**given)).fields == ("image",)
    with pytest.raises(DataError, match=r"task\.prompt = '\{text\}' is for texts"):
        resolve_task(TaskSection(**given, prompt="{text}"))
    with pytest.raises(DataError, match=r"task\.image_size = 32"):
        resolve_task(TaskSection(name="sst2", image_size=32))
    with pytest.raises(DataError, match=r"task\.source is missing"):
        resolve_task(TaskSection(name="custom", image="image", verbalizers=("a", "b")))


def test_a_folder_of_images_by_class_and_its_parquet_give_the_same(tmp_path: Path) -> None:
    pictures, labels = drawn_pictures(12, 5)
    for split, part in (("train", slice(0, 8)), ("test", slice(8, 12))):
        for number, (picture, label) in enumerate(zip(pictures[part], labels[part], strict=True)):
            folder = tmp_path / "photos" / split / ("zero", "uno", "two")[label]
            folder.mkdir(parents=True, exist_ok=True)
            PIL.Image.fromarray(picture).save(folder / f"{number}.png")
    words = {"zero": "zero", "uno": "uno", "two": "two"}
    section = TaskSection(
        name="custom",
        source=str(tmp_path / "photos"),
        image="image",
        verbalizers=words,
        test_split="test",
    )
    found = load_examples(resolve_task(section), section)
    expected = {str(Image(p)): int(label) for p, label in zip(pictures, labels, strict=True)}
    every = (*found.train, *found.test)
    assert len(found.test) == 4
    assert {str(e.fields["image"]): e.label for e in every} == expected


def test_debians_data_set_names_its_package(monkeypatch: pytest.MonkeyPatch) -> None:
    section = TaskSection(name="fashion_mnist")
    monkeypatch.setattr("pathlib.Path.is_dir", lambda path: False)
    with pytest.raises(DataError, match="Debian's package dataset-fashion-mnist"):
        load_examples(resolve_task(section), section)


def test_public_images_are_whole_where_there_are_enough_and_parts_else(tmp_path: Path) -> None:
    pictures, _ = drawn_pictures(3, 7)
    for number, picture in enumerate(pictures):
        (tmp_path / f"{number}.png").write_bytes(as_png(Image(picture)))
    (tmp_path / "readme.txt").write_text("no image")
    section = MaskSection(corpus=str(tmp_path))
    whole = public_images(section, 3, 0, "mask.corpus")
    assert {str(i) for i in whole} == {str(Image(p)) for p in pictures}
    parts = public_images(section, 9, 0, "mask.corpus")
    assert [str(i) for i in parts] == [str(i) for i in public_images(section, 9, 0, "mask.corpus")]
    assert [str(i) for i in parts] != [str(i) for i in public_images(section, 9, 1, "mask.corpus")]
    assert all(3 <= i.pixels.shape[0] == i.pixels.shape[1] <= 12 for i in parts)
    with pytest.raises(DataError, match=r"mask\.corpus: 'nowhere' is no file and no folder"):
        public_images(MaskSection(corpus="nowhere"), 3, 0, "mask.corpus")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"mask\.corpus = .* has no image"):
        public_images(MaskSection(corpus=str(tmp_path / "empty")), 3, 0, "mask.corpus")
    (tmp_path / "bad.png").write_bytes(b"")
    with pytest.raises(DataError, match=r"bad\.png: the image cannot be read"):
        public_images(section, 3, 0, "mask.corpus")


def test_png_keeps_every_pixel() -> None:
    picture = drawn_pictures(1)[0][0]
    with PIL.Image.open(io.BytesIO(as_png(Image(picture)))) as found:
        assert np.array_equal(np.asarray(found), picture)
