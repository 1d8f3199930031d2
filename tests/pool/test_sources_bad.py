"""What is damaged, oversized, empty or malicious is a drop that tells where and why."""

from __future__ import annotations

import base64
import gzip
import io
import os
import tarfile
from pathlib import Path

import pyarrow
import pyarrow.parquet
import pytest
from tests.pool.made_sources import bomb, everything, lines, only, pairs, picture, tar

from sparing.core.errors import RequestError
from sparing.pool.sources import open_source


@pytest.mark.parametrize(
    ("data", "told"),
    [
        (b"", r"empty \(0 bytes\)"),
        (b"GIF, or so it says", "no image that can be read"),
        (picture()[:20], "no image that can be read"),
        (bomb(60_000, 60_000), "oversized"),  # Pillow's own error
        (bomb(10_000, 10_000), "oversized: 10,000 x 10,000 pixels"),  # below it: ours
    ],
)
def test_images_that_cannot_be_taken(tmp_path: Path, data: bytes, told: str):
    (tmp_path / "a.png").write_bytes(data)
    (tmp_path / "b.png").write_bytes(picture())
    drop = only(tmp_path)
    assert drop.key == "a.png"
    with pytest.raises(AssertionError, match=told):
        raise AssertionError(drop.detail)


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF"])
def test_images_of_each_format(tmp_path: Path, form: str):
    (tmp_path / "a.PNG").write_bytes(picture(3, form=form))
    items, drops = everything(open_source(tmp_path))
    assert not drops
    assert items[0].image == picture(3, form=form)
    assert items[0].kind == "image"


def test_limits_are_options(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture(size=(20, 20)))
    assert "at most 399 are taken" in only(tmp_path, pixels=399).detail
    assert "at most 9 are taken" in only(tmp_path, bytes=9).detail
    assert not everything(open_source(tmp_path, pixels=400))[1]


def test_links_in_a_folder_do_not_lead_outside(tmp_path: Path):
    (tmp_path / "secret.png").write_bytes(picture(1))
    place = tmp_path / "images"
    place.mkdir()
    (place / "a.png").write_bytes(picture(2))
    (place / "b.png").symlink_to("a.png")
    (place / "c.png").symlink_to("../secret.png")
    (place / "d.png").symlink_to("nowhere.png")
    (place / "round").symlink_to(".")
    os.mkfifo(place / "e.png")
    items, drops = everything(open_source(place))
    assert [item.key for item in items] == ["a.png", "b.png"]
    assert [drop.key for drop in drops] == ["c.png", "d.png", "e.png"]
    assert "points outside" in drops[0].detail
    assert "cannot be read" in drops[1].detail
    assert "is no file" in drops[2].detail


def test_labels_of_a_folder(tmp_path: Path):
    for name in ("dog/1.png", "cat/2.png", "cat/deep/3.png", "4.png"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(picture())
    (tmp_path / ".hidden.png").write_bytes(b"")
    items, drops = everything(open_source(tmp_path, labels=True))
    assert {item.key: item.label for item in items} == {
        "cat/2.png": 0,
        "cat/deep/3.png": 0,
        "dog/1.png": 1,
    }
    assert "4.png: it lies in no sub-folder" in drops[0].detail
    items, drops = everything(open_source(tmp_path, labels=True, classes=("emu", "dog")))
    assert [(item.key, item.label) for item in items] == [("dog/1.png", 1)]
    assert 'sub-folder "cat" is none of the classes' in drops[1].detail
    items, drops = everything(open_source(tmp_path))
    assert [item.label for item in items] == [-1] * 4
    assert not drops


def test_lines_that_cannot_be_taken(tmp_path: Path):
    place = tmp_path / "a.jsonl"
    place.write_bytes(
        b"\xef\xbb\xbf"
        + b'{"text": "good", "label": "1"}\n'
        + b'{"text": "bad \xe9", "label": 1}\n'
        + b'{"text": "cut\n'
        + b'["a list"]\n'
        + b'{"text": "  "}\n'
        + b'{"text": 5}\n'
        + b'{"label": 1}\n'
        + b'{"text": "x", "label": "cat"}\n'
        + b'{"text": "\\ud800"}\n'
        + b'{"text": "x", "n": ' + b"9" * 5000 + b"}\n"
        + b"[" * 200_000 + b"\n"
        + b'{"text": "good too"}'
    )  # fmt: skip
    items, drops = everything(open_source(place))
    assert [(item.key, item.text, item.label) for item in items] == [
        ("a.jsonl:1", "good", 1),
        ("a.jsonl:12", "good too", -1),
    ]
    wanted = {
        2: "not UTF-8: byte 15 is 0xe9",
        3: "not JSON (Invalid control character",
        4: "a JSON list, no object",
        5: "the caption is empty",
        6: "the caption is a int, no text",
        7: "the caption is missing",
        8: "the label 'cat' is no number; name the classes",
        9: "half a surrogate pair",
        10: "not JSON that can be read",
        11: "not JSON",
    }
    assert [drop.key for drop in drops] == [f"a.jsonl:{number}" for number in wanted]
    for drop, words in zip(drops, wanted.values(), strict=True):
        assert drop.detail.startswith(f"{drop.key}: ")
        assert words in drop.detail


def test_classes_by_name(tmp_path: Path):
    rows = [{"text": "a", "label": "dog"}, {"text": "b", "label": 0}, {"text": "c", "label": 2}]
    place = lines(tmp_path / "a.jsonl", rows)
    items, drops = everything(open_source(place, classes=("cat", "dog")))
    assert [item.label for item in items] == [1, 0]
    assert "the label 2 is not in 0 .. 1" in drops[0].detail


def test_a_line_without_end_is_not_held(tmp_path: Path):
    place = tmp_path / "a.jsonl"
    place.write_text('{"text": "first"}\n{"text": "' + "x" * 5000 + '"}\n{"text": "last"}\n')
    items, drops = everything(open_source(place, bytes=1000))
    assert [item.text for item in items] == ["first", "last"]
    assert "a.jsonl:2: the line has more than 1,000 bytes" in drops[0].detail


def test_utf_16_is_told_at_once(tmp_path: Path):
    place = tmp_path / "a.jsonl"
    place.write_bytes('{"text": "x"}\n'.encode("utf-16"))
    with pytest.raises(RequestError, match="UTF-16; write it in UTF-8"):
        open_source(place)


def test_a_compressed_file_that_is_cut(tmp_path: Path):
    rows = b"".join(b'{"text": "text %d %d"}\n' % (n, n * 7919) for n in range(2000))
    place = tmp_path / "a.jsonl.gz"
    place.write_bytes(gzip.compress(rows)[:-4000])
    items, drops = everything(open_source(place))
    assert 100 < len(items) < 2000
    assert f"cut short or damaged after line {len(items)}" in drops[0].detail
    *_, last = open_source(place).chunks()
    assert not list(open_source(place).chunks(last.cursor))  # the cut is told once


def test_images_of_lines(tmp_path: Path):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").write_bytes(picture(1))
    held = base64.b64encode(picture(2)).decode()
    rows = [
        {"file_name": "images/a.png", "text": "a"},
        {"file_name": f"data:image/png;base64,{held}", "text": "b"},
        {"file_name": {"bytes": held}, "text": "c"},
        {"file_name": "../../etc/passwd", "text": "d"},
        {"file_name": "/etc/passwd", "text": "e"},
        {"file_name": "images/none.png", "text": "f"},
        {"file_name": "images", "text": "g"},
        {"file_name": {"bytes": "%%"}, "text": "h"},
        {"file_name": "images/a.png", "text": ""},
        {"file_name": None, "text": "a caption without image"},
        {"file_name": "nul\0.png", "text": "x"},
    ]
    items, drops = everything(open_source(lines(tmp_path / "metadata.jsonl", rows), kind="jsonl"))
    assert [(item.kind, item.text) for item in items] == [
        ("image-text", "a"),
        ("image-text", "b"),
        ("image-text", "c"),
    ]
    assert [item.image for item in items] == [picture(1), picture(2), picture(2)]
    told = "\n".join(drop.detail for drop in drops)
    for words in (
        "metadata.jsonl:4: ../../etc/passwd points outside",
        "metadata.jsonl:5: /etc/passwd points outside",
        "images/none.png cannot be read (No such file",
        "images is no file",
        "base64 is damaged",
        "metadata.jsonl:9: the caption is empty",
        "metadata.jsonl:10: the image is missing",
        "metadata.jsonl:11: nul",
    ):
        assert words in told


def test_columns_that_are_missing(tmp_path: Path):
    place = lines(tmp_path / "a.jsonl", [{"captoin": "x", "url": "y"}])
    with pytest.raises(RequestError, match=r"no column of images or texts.*captoin, url"):
        open_source(place)
    with pytest.raises(RequestError, match='no column "caption"; did you mean "captoin"'):
        open_source(place, text="caption")
    assert everything(open_source(place, text="captoin"))[0][0].text == "x"
    with pytest.raises(RequestError, match=r"no column of images.*image=\.\.\."):
        open_source(place, text="captoin", content="image-text")
    table = pyarrow.table({"caption": ["x"], "image_bytes": [b"y"]})
    pyarrow.parquet.write_table(table, tmp_path / "b.parquet")
    with pytest.raises(RequestError, match='no column "img_bytes"; did you mean "image_bytes"'):
        open_source(tmp_path / "b.parquet", image="img_bytes")


def test_keys_of_rows(tmp_path: Path):
    rows = [{"id": 7, "text": "a"}, {"id": "x", "text": "b"}, {"id": [], "text": "c"}]
    items, drops = everything(open_source(lines(tmp_path / "a.jsonl", rows)))
    assert [item.key for item in items] == ["7", "x"]
    assert drops[0].key == "a.jsonl:3"


def test_parquet_of_pairs_with_damaged_cells(tmp_path: Path):
    texts = pyarrow.array([b"a", b"\xff\xfe", None, b"d"]).cast(pyarrow.binary())
    captions = pyarrow.Array.from_buffers(pyarrow.string(), 4, texts.buffers())
    images = [{"bytes": picture(n), "path": None} for n in range(3)] + [{"bytes": b"", "path": ""}]
    table = pyarrow.table({"image": images, "caption": captions, "label": [0, 1, 2, None]})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    items, drops = everything(open_source(tmp_path / "a.parquet"))
    assert [(item.key, item.text, item.label) for item in items] == [("a.parquet:0", "a", 0)]
    assert items[0].image == picture(0)
    assert [drop.key for drop in drops] == [f"a.parquet:{n}" for n in (1, 2, 3)]
    assert "not UTF-8: line 1, byte 1 is 0xff" in drops[0].detail
    assert "caption is missing" in drops[1].detail
    assert "image is missing" in drops[2].detail


def test_parquet_with_paths_and_dictionaries(tmp_path: Path):
    (tmp_path / "a.png").write_bytes(picture(4))
    words = pyarrow.array(["x", "y"]).dictionary_encode()
    table = pyarrow.table({"image_path": ["a.png", "../a.png"], "caption": words})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    items, drops = everything(open_source(tmp_path / "a.parquet"))
    assert (items[0].image, items[0].text) == (picture(4), "x")
    assert "../a.png points outside" in drops[0].detail


def test_parquet_that_is_cut_or_damaged(tmp_path: Path):
    table = pyarrow.table({"text": [f"text {n * 7919}" for n in range(3000)]})
    place = tmp_path / "rows"
    place.mkdir()
    for name in ("a", "b", "c"):
        pyarrow.parquet.write_table(table, place / f"{name}.parquet", row_group_size=1000)
    whole = (place / "a.parquet").read_bytes()
    (place / "a.parquet").write_bytes(whole[: len(whole) // 2])
    about = pyarrow.parquet.read_metadata(place / "b.parquet").row_group(1).column(0)
    start = about.dictionary_page_offset or about.data_page_offset
    hurt = bytearray(whole)
    hurt[start : start + 40] = b"\xff" * 40
    (place / "b.parquet").write_bytes(hurt)
    items, drops = everything(open_source(place))
    assert [drop.key for drop in drops] == ["a.parquet", "b.parquet:1000"]
    assert "cut short: its end, which says where the rows are, is missing" in drops[0].detail
    assert "rows 1000 to 1999 are damaged" in drops[1].detail
    assert len(items) == 2000 + 3000
    (place / "d.parquet").write_bytes(b"text,label\n")
    with pytest.raises(RequestError, match="is no Parquet: it begins with b'text'"):
        open_source(place)


def test_a_tar_of_every_kind_of_member(tmp_path: Path):
    place = tmp_path / "a.tar"
    with tarfile.open(place, "w") as out:

        def put(name: str, data: bytes = b"", kind: bytes = tarfile.REGTYPE, to: str = "") -> None:
            info = tarfile.TarInfo(name)
            info.size, info.type, info.linkname = len(data), kind, to
            out.addfile(info, io.BytesIO(data))

        put("folder", kind=tarfile.DIRTYPE)
        put("folder/ok.jpg", picture(1, form="JPEG"))
        put("folder/ok.json", b'{"caption": "words", "label": 3}')
        put(".DS_Store", b"x")
        put("two.png", picture(2))
        put("two.jpg", picture(2, form="JPEG"))
        put("two.txt", b"x")
        put("../../outside.png", picture(3))
        put("/etc/absolute.png", picture(3))
        put("soft.png", kind=tarfile.SYMTYPE, to="/etc/passwd")
        put("soft.txt", b"x")
        put("hard.png", kind=tarfile.LNKTYPE, to="two.png")
        put("device.png", kind=tarfile.CHRTYPE)
        put("lone.txt", b"a caption")
        put("bare.png", picture(4))
        put("empty.png", picture(5))
        put("empty.txt", b" \n")
        put("latin.png", picture(6))
        put("latin.txt", b"caf\xe9")
        put("json.png", picture(7))
        put("json.json", b'{"caption": ')
        put("label.png", picture(8))
        put("label.txt", b"x")
        put("label.cls", b"dog")
        put("odd.npy", b"x")
        put("hurt.png", b"hurt")
        put("hurt.txt", b"x")
        put("big.png", b"\0" * 5000)
        put("last.png", picture(9))
        put("last.txt", "last ✓".encode())
        put("last.cls", b"2\n")
    items, drops = everything(open_source(place, bytes=4999))
    assert [(item.key, item.kind, item.text, item.label) for item in items] == [
        ("a.tar:folder/ok", "image-text", "words", 3),
        ("a.tar:last", "image-text", "last ✓", 2),
    ]
    wanted = {
        "two": "it has 2 image members: two.png, two.jpg",
        "../../outside": "member ../../outside.png points outside the tar",
        "/etc/absolute": "points outside the tar",
        "soft": "is a symbolic link to '/etc/passwd'",
        "hard": "is a hard link to 'two.png'",
        "device": "is no file (a device or pipe)",
        "lone": "a caption without image",
        "bare": "an image without caption",
        "empty": "empty.txt: the caption is empty",
        "latin": "latin.txt: the caption is not UTF-8: line 1, byte 4 is 0xe9",
        "json": "json.json is not JSON in UTF-8",
        "label": "the label 'dog' is no number",
        "odd": "no image (.jpg, .jpeg, .png",
        "hurt": "hurt.png: no image that can be read",
        "big": "member big.png has 5,000 bytes; at most 4,999 are taken",
    }
    assert [drop.key for drop in drops] == [f"a.tar:{name}" for name in wanted]
    for drop, words in zip(drops, wanted.values(), strict=True):
        assert words in drop.detail
        assert drop.detail.startswith(f"{drop.key}: ")


def test_tars_of_texts_and_of_labelled_images(tmp_path: Path):
    texts = tar(tmp_path / "a.tar", [(f"{n}.txt", b"text %d" % n) for n in range(3)])
    items, drops = everything(open_source(texts))
    assert [item.kind for item in items] == ["text"] * 3
    assert not drops
    members = [
        member
        for n in range(3)
        for member in ((f"{n}.webp", picture(n, form="WEBP")), (f"{n}.cls", b"%d" % n))
    ]
    items, drops = everything(open_source(tar(tmp_path / "b.tar", members)))
    assert [(item.kind, item.label) for item in items] == [("image", n) for n in range(3)]
    assert not drops
    items, _ = everything(open_source(tar(tmp_path / "c.tar", pairs(2)), content="image"))
    assert [item.kind for item in items] == ["image"] * 2


@pytest.mark.parametrize("ending", [".tar", ".tar.gz"])
def test_a_tar_cut_at_any_byte_keeps_what_stands_before(tmp_path: Path, ending: str):
    members = [
        (f"{n}.{kind}", data)
        for n in range(4)
        for kind, data in (("png", picture(n)), ("txt", b"text"), ("cls", b"1"))
    ]
    place = tar(tmp_path / f"a{ending}", members, "w:gz" if ending == ".tar.gz" else "w")
    whole = place.read_bytes()
    before = 0
    used = 24 * 512 if ending == ".tar" else len(whole)
    for size in range(1, used, 171 if ending == ".tar" else 13):
        place.write_bytes(whole[:size])
        items, drops = everything(open_source(place))
        assert [item.key for item in items] == [f"a{ending}:{n}" for n in range(len(items))]
        assert len(items) >= before
        before = len(items)
        assert drops[-1].key == place.name
        assert "what stands before is taken" in drops[-1].detail
        # the first sample alone may lack its label: nothing tells then that there are any
        assert all(item.label == 1 and item.text == "text" for item in items[1:])
    assert before >= 3


def test_a_cut_between_two_members_and_an_empty_file_are_told(tmp_path: Path):
    place = tar(tmp_path / "a.tar", pairs(3))
    place.write_bytes(place.read_bytes()[: 4 * 1024])
    assert len(everything(open_source(place))[0]) == 2
    assert "without a tar's mark of its end" in only(place).detail
    place.write_bytes(b"")
    assert "is empty" in only(place).detail
    place.write_bytes(b"this is no tar" * 100)
    assert "cut short or damaged at byte 0" in only(place).detail


def test_a_damaged_header_is_told_and_the_rest_is_not_guessed(tmp_path: Path):
    place = tar(tmp_path / "a.tar", pairs(4))
    data = bytearray(place.read_bytes())
    data[2 * 2048 + 148] ^= 0xFF  # the checksum of the third image's header
    place.write_bytes(data)
    items, drops = everything(open_source(place))
    assert len(items) == 2
    assert "damaged at byte 4,096 (a header is damaged)" in drops[0].detail


def test_tars_put_behind_one_another_are_read_on(tmp_path: Path):
    first, second = tar(tmp_path / "a.tar", pairs(2)), tar(tmp_path / "b.tar", pairs(3)[4:])
    first.write_bytes(first.read_bytes() + second.read_bytes())
    items, drops = everything(open_source(first))
    assert [item.key for item in items] == ["a.tar:0000", "a.tar:0001", "a.tar:0002"]
    assert not drops


def test_a_sample_of_very_many_members_is_not_held(tmp_path: Path):
    place = tar(tmp_path / "a.tar", [(f"x.{n}.png", picture(n)) for n in range(40)] + pairs(1))
    items, drops = everything(open_source(place))
    assert [item.key for item in items] == ["a.tar:0000"]
    assert "is one of more than 16 of one name" in drops[0].detail


def test_long_names_and_a_restart_behind_them(tmp_path: Path):
    members = [(f"{'long/' * 60}{n}.txt", b"text") for n in range(3)]
    place = tar(tmp_path / "a.tar", members)
    chunks = list(open_source(place).chunks(size=1))
    again = [next(open_source(place).chunks(chunk.cursor, 1)) for chunk in chunks[:-1]]
    assert [chunk.items for chunk in chunks[1:]] == [chunk.items for chunk in again]
    assert chunks[2].items[0].key.endswith("long/2")


def test_what_is_no_source(tmp_path: Path):
    with pytest.raises(RequestError, match="there is no source at"):
        open_source(tmp_path / "none.tar")
    with pytest.raises(RequestError, match="holds no images"):
        open_source(tmp_path)
    (tmp_path / "a.csv").write_text("x")
    with pytest.raises(RequestError, match="no source by its name"):
        open_source(tmp_path / "a.csv")
    with pytest.raises(RequestError, match='has no option "label_column"; did you mean "label"'):
        open_source(tmp_path, label_column="x")
    with pytest.raises(RequestError, match='unknown kind of source "tars"; did you mean "tar"'):
        open_source(tmp_path, kind="tars")
    with pytest.raises(RequestError, match="unknown content"):
        open_source(tmp_path, content="images")
    os.mkfifo(tmp_path / "pipe.jsonl")
    with pytest.raises(RequestError, match="is no file: sources are read again"):
        open_source(tmp_path / "pipe.jsonl")
    lines(tmp_path / "b.jsonl", [{"text": "x"}])
    tar(tmp_path / "c.tar", pairs(1))
    with pytest.raises(RequestError, match=r"several kinds \(1 jsonl, 1 tar\)"):
        open_source(tmp_path)
    assert len(everything(open_source(tmp_path, kind="tar"))[0]) == 1
    with pytest.raises(RequestError, match=r"no files of \.parquet"):
        open_source(tmp_path, kind="parquet")
    (tmp_path / "a.png").write_bytes(picture())
    with pytest.raises(RequestError, match="a folder holds images alone"):
        open_source(tmp_path, kind="folder", content="image-text")
    with pytest.raises(RequestError, match="has no sub-folders with images"):
        open_source(tmp_path, kind="folder", labels=True)
