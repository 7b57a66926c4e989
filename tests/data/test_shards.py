"""Shards of every kind give what a folder of the same pictures gives, and say in one line what is wrong with a file."""

import io
import itertools
import logging
import math
import random
import re
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from diffusion_jax import paths
from diffusion_jax.data import copies, rows, shards, sources, tables
from diffusion_jax.data.crops import crop
from diffusion_jax.data.loader import loader, one_epoch
from diffusion_jax.data.transforms import BadRecord
from tests.data import odd

LIMIT = 1e9
WRITERS = {"tar": odd.tars, "parquet": odd.parquets, "array_record": odd.array_records}


def read(source, index):
    try:
        return source[index]
    except BadRecord as error:
        return str(error)


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(with captions, with classes)"""
    place = tmp_path_factory.mktemp("folders")
    return sources.folder(odd.captioned_folder(place / "captions")), sources.folder(
        odd.classes_folder(place / "classes")
    )


@pytest.fixture(scope="module")
def patterns(tmp_path_factory):
    place = tmp_path_factory.mktemp("shards")
    return {kind: write(place / kind) for kind, write in WRITERS.items()}


@pytest.mark.parametrize("kind", WRITERS)
def test_odd_records_are_those_of_a_folder(kind, folders, patterns, tmp_path):
    captioned, with_classes = folders
    source = shards.shards(kind, patterns[kind], tmp_path, LIMIT)
    assert len(source) == odd.COUNT and source.num_classes == len(odd.CLASSES)
    assert list(source.captions) == list(captioned.captions) and set(source.captions) == {
        c.strip() for c in odd.CAPTIONS
    }
    of_file = {file.rpartition("/")[2]: index for index, file in enumerate(with_classes.files)}
    broken = 0
    for index in range(odd.COUNT):
        record, expected = read(source, index), read(captioned, index)
        if isinstance(expected, str):
            broken += 1
            assert record == expected
            continue
        np.testing.assert_array_equal(record["image"], expected["image"])
        assert record["caption"] == expected["caption"]
        assert record["label"] == with_classes[of_file[captioned.files[index].rpartition("/")[2]]]["label"]
    assert broken == len([n for n in range(odd.COUNT) if n % 31 == 0])


def test_img2dataset_writes_parquet_too(folders, tmp_path):
    source = shards.shards("parquet", odd.img2datasets(tmp_path / "data"), tmp_path, LIMIT)
    assert source.num_classes == 0 and list(source.captions) == list(folders[0].captions)
    np.testing.assert_array_equal(source[1]["image"], folders[0][1]["image"])


@pytest.mark.parametrize("kind", WRITERS)
def test_two_hosts_share_an_epoch_and_another_number_of_hosts_goes_on_with_it(kind, patterns, tmp_path):
    source, transform = shards.shards(kind, patterns[kind], tmp_path, LIMIT), crop(8, 8)

    def batches(size, hosts, host, start=0):
        return loader(source, size, 3, transform, start, process_index=host, process_count=hosts)

    whole = list(itertools.islice(batches(20, 1, 0), 12))
    halves = [list(itertools.islice(batches(10, 2, host), 6)) for host in range(2)]
    later = [list(itertools.islice(batches(5, 4, host, start=6), 6)) for host in range(4)]
    for step, batch in enumerate(whole):
        parts = [half[step] for half in halves] if step < 6 else [quarter[step - 6] for quarter in later]
        for key in ("image", "caption", "label"):
            np.testing.assert_array_equal(np.concatenate([part[key] for part in parts]), batch[key])


def test_the_index_is_made_once_and_again_when_a_shard_changes(patterns, tmp_path, monkeypatch):
    pattern = odd.tars(tmp_path / "data")
    first = shards.shards("tar", pattern, tmp_path, LIMIT)
    with monkeypatch.context() as patch:
        patch.setattr(shards, "_index", None)
        again = shards.shards("tar", pattern, tmp_path, LIMIT)
    assert again.name == first.name and list(again.captions) == list(first.captions)
    odd.write_tar(tmp_path / "data" / "00001.tar", [("1.png", odd.record(1).picture), ("1.txt", b"new")])
    changed = shards.shards("tar", pattern, tmp_path, LIMIT)
    assert changed.name != first.name and len(changed) == odd.COUNT - odd.COUNT // odd.SHARDS + 1
    assert "new" in list(changed.captions)


@pytest.mark.parametrize("kind", WRITERS)
def test_processes_find_what_one_finds(kind, patterns, tmp_path, monkeypatch):
    alone = shards.shards(kind, patterns[kind], tmp_path / "alone", LIMIT)
    monkeypatch.setattr(shards, "LARGE", 0)
    together = shards.shards(kind, patterns[kind], tmp_path / "together", LIMIT)
    tables = [next(tmp_path.glob(f"{name}/index/*.arrow")).read_bytes() for name in ("alone", "together")]
    assert tables[0] == tables[1] and len(alone) == len(together)
    (tmp_path / "cut").write_bytes(b"nothing" * 1000)
    with pytest.raises(ValueError, match=rf"^{tmp_path}/cut: expected ") as error:
        shards.shards(kind, f"{tmp_path}/cut", tmp_path, LIMIT)
    assert "\n" not in str(error.value)


def test_what_a_killed_process_left_of_an_index_is_removed(tmp_path):
    base = tmp_path / "index" / "name"
    base.parent.mkdir()
    left, others = base.with_name("name.arrow.0123.partial"), base.with_name("names.arrow.0123.partial")
    left.touch()
    others.touch()
    with tables.alone(base):
        assert not left.exists() and others.exists()


def test_of_several_processes_one_makes_the_index(tmp_path, monkeypatch):
    pattern, made, index = odd.tars(tmp_path / "data"), [], shards._index

    def slow(*arguments):
        made.append(arguments)
        time.sleep(0.3)
        return index(*arguments)

    monkeypatch.setattr(shards, "_index", slow)
    with ThreadPoolExecutor(3) as threads:  # a lock of a file is as good between threads as between hosts
        found = list(threads.map(lambda _: shards.shards("tar", pattern, tmp_path, LIMIT), range(3)))
    assert len(made) == 1 and {len(source) for source in found} == {odd.COUNT}


def test_several_captions_and_numbers_of_classes(tmp_path):
    picture = odd.record(1).picture
    odd.write_tar(
        tmp_path / "0.tar",
        [
            *(("a/1.json", b'{"caption": ["one", "two"], "label": 7}'), ("a/1.png", picture)),
            *(("b/1.json", b'{"text": "three", "label": 2}'), ("b/1.png", picture)),
        ],
    )
    source = shards.shards("tar", f"{tmp_path}/0.tar", tmp_path, LIMIT)
    assert list(source.captions) == [("one", "two"), ("three",)] and source.num_classes == 8
    assert source[0]["caption"] == "one" and source[0]["label"] == 7 and source[1]["label"] == 2
    pq.write_table(pa.table({"png": [picture], "captions": [["one", "two"]], "label": [3]}), tmp_path / "0.parquet")
    source = shards.shards("parquet", f"{tmp_path}/0.parquet", tmp_path, LIMIT)
    assert list(source.captions) == [("one", "two")] and source[0]["label"] == 3
    contents = [odd.example(**{"image/encoded": picture, "captions/text": [b"one", b"two"], "label": 3})]
    odd.write_array_record(tmp_path / "0.array_record", contents)
    source = shards.shards("array_record", f"{tmp_path}/0.array_record", tmp_path, LIMIT)
    assert list(source.captions) == [("one", "two")] and source[0]["label"] == 3


@pytest.mark.parametrize(
    ("value", "captions", "label"),
    [
        *(("a", ("a",), "a"), (b"\xc3\xa4", ("ä",), "ä"), (None, (), None), ([], (), None)),
        *((["a", None, b"b"], ("a", "b"), None), ([None], (), None), (["a", 1], (), None), ({"en": "a"}, (), None)),
        *((3, (), "3"), (3.0, (), "3"), (3.5, (), None), (math.nan, (), None), (math.inf, (), None)),
        *((-1, (), None), (-1.0, (), None), ("-1", ("-1",), None), ("-1 °C", ("-1 °C",), "-1 °C")),
    ],
)
def test_values_of_fields_are_captions_or_classes(value, captions, label):
    assert rows.captions_of(value) == captions and rows.label_of(value) == label


@pytest.mark.parametrize("value", ["\ud83d", b"\xff"])
def test_what_is_no_utf_8_is_one_record_without_use(value):
    for read_field in (rows.captions_of, rows.label_of):
        with pytest.raises(UnicodeError):
            read_field(value)


def test_parquet_texts_may_be_bytes_and_one_that_is_no_utf_8_is_left_out(tmp_path, caplog):
    texts = pa.array([b"one", b"\xff", b"three"])
    broken = pa.StringArray.from_buffers(3, *texts.buffers()[1:])
    for name, column in (("bytes", texts), ("text", broken), ("lists", pa.ListArray.from_arrays([0, 1, 2, 3], broken))):
        caplog.clear()
        table = pa.table({"jpg": [odd.solid(number) for number in range(3)], "caption": column})
        pq.write_table(table, tmp_path / f"{name}.parquet")
        source = shards.shards("parquet", f"{tmp_path}/{name}.parquet", tmp_path, LIMIT)
        assert list(source.captions) == ["one", "three"] and source[1]["image"][0, 0, 0] == 2
        assert f"left out 1 entries: {tmp_path}/{name}.parquet row 1: 'utf-8' codec" in caplog.text


@pytest.mark.parametrize("kind", [tarfile.SYMTYPE, tarfile.LNKTYPE])
@pytest.mark.parametrize("linked", ["2.png", "2.txt"])
def test_a_link_in_a_tar_is_said(kind, linked, tmp_path, caplog):
    with tarfile.open(tmp_path / "0.tar", "w") as tar:
        for name in ("1.png", "1.txt", "2.png", "2.txt"):
            member, content = tarfile.TarInfo(name), odd.solid(1) if name.endswith("png") else b"a"
            if name == linked:
                member.type, member.linkname, content = kind, name.replace("2", "1"), b""
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    source = shards.shards("tar", f"{tmp_path}/0.tar", tmp_path, LIMIT)
    assert len(source) == 1 and list(source.captions) == ["a"]
    assert f"0.tar 2: a link, {linked}; write the tar with --dereference --hard-dereference" in caplog.text


def test_what_a_record_lacks_is_said(tmp_path, caplog):
    picture = odd.record(1).picture
    beside = {
        "0": ("json", b'{"text": 5, "label": [1]}'),
        "1": ("cls", b"1"),
        "2": ("txt", b"\xff"),
        "3": ("json", b"{"),
    }
    members = [("4.txt", b"no picture")]
    for key, (suffix, content) in beside.items():
        members += [(f"{key}.png", picture), (f"{key}.{suffix}", content)]
    odd.write_tar(tmp_path / "0.tar", members)
    with caplog.at_level(logging.WARNING):
        source = shards.shards("tar", f"{tmp_path}/0.tar", tmp_path, LIMIT)
    assert not source.captions and source.num_classes == 2
    with pytest.raises(BadRecord, match="no class"):
        source[0]
    assert source[1]["label"] == 1 and source.describe(1) == f"{tmp_path}/0.tar 1.png"
    lines = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert lines[0].startswith("left out 3 entries: ") and "0.tar 4: no picture among .txt; " in lines[0]
    assert lines[1:] == ["1 of 2 records have no class: they are not used"]
    caplog.clear()
    odd.write_tar(tmp_path / "1.tar", [("1.png", picture), ("1.txt", b"one"), ("2.png", picture), ("2.cls", b"2")])
    with caplog.at_level(logging.WARNING):
        source = shards.shards("tar", f"{tmp_path}/1.tar", tmp_path, LIMIT)
    assert list(source.captions) == ["one", ""] and source.num_classes == 0
    assert source[0]["caption"] == "one" and source[1]["caption"] == ""
    lines = [record.getMessage().partition(": ")[2] for record in caplog.records]
    assert lines == [
        "1 of 2 records have no caption, or an empty one",
        "1 of 2 records have no class: classes are not used, only captions",
    ]
    pq.write_table(pa.table({"jpg": [picture, None], "caption": ["a", None]}), tmp_path / "0.parquet")
    source = shards.shards("parquet", f"{tmp_path}/0.parquet", tmp_path, LIMIT)
    assert list(source.captions) == ["a", ""] and len(list(one_epoch(source, 1))) == 1
    with pytest.raises(BadRecord, match="no picture"):
        source[1]


def test_a_malformed_shard_is_one_line(tmp_path):
    def says(kind, name, message):
        with pytest.raises(ValueError, match=message) as error:
            shards.shards(kind, str(tmp_path / name), tmp_path, LIMIT)
        assert str(tmp_path / name) in str(error.value) and "\n" not in str(error.value)

    odd.tars(tmp_path / "data")
    content = (tmp_path / "data" / "00000.tar").read_bytes()
    for length, why in (10_300, "damaged or cut off after its last record"), (9_800, "unexpected end of data"):
        (tmp_path / "cut.tar").write_bytes(content[:length])
        says("tar", "cut.tar", f"expected a whole tar file, uncompressed; {why}")
    (tmp_path / "two.tar").write_bytes(2 * content)
    says("tar", "two.tar", "after its last record, or several tar files in one")
    (tmp_path / "text.tar").write_text("text " * 1000)
    says("tar", "text.tar", "expected a whole tar file, uncompressed; ")
    odd.write_tar(tmp_path / "texts.tar", [("1.txt", b"one"), ("1.mp3", b"")])
    says("tar", "texts.tar", "has no records; .*no picture among .txt, .mp3")
    odd.write_tar(tmp_path / "empty.tar", [])
    says("tar", "empty.tar", "has no records")
    pq.write_table(pa.table({"url": ["http://x"], "caption": ["a"]}), tmp_path / "urls.parquet")
    says("parquet", "urls.parquet", r"one column of pictures, such as image or jpg, got url \(string\), caption \(s")
    pq.write_table(pa.table({"left": [b"x"], "right": [b"y"]}), tmp_path / "two.parquet")
    says("parquet", "two.parquet", "expected one column of pictures")
    (tmp_path / "cut.parquet").write_bytes(b"PAR1 and no more")
    says("parquet", "cut.parquet", "expected Parquet, got an error: ")
    (tmp_path / "cut.array_record").write_bytes(b"nothing" * 1000)
    says("array_record", "cut.array_record", "expected a whole ArrayRecord file")
    odd.write_array_record(tmp_path / "damaged.array_record", [odd.example(image=random.Random(0).randbytes(9999))])
    content = bytearray((tmp_path / "damaged.array_record").read_bytes())
    content[5000] ^= 1
    (tmp_path / "damaged.array_record").write_bytes(content)
    says("array_record", "damaged.array_record", "records 0 to 0 are damaged; ")
    odd.write_array_record(tmp_path / "other.array_record", [b"\x82\xa3msgpack"])
    says("array_record", "other.array_record", "has no records; .* record 0: not a tf.train.Example")
    odd.write_array_record(tmp_path / "no.array_record", [odd.example(text=b"a")])
    says("array_record", "no.array_record", "has no records; .* no picture in bytes, .* features \\['text'\\]")
    for pattern in ("", f" {tmp_path}/*.tar", f"{tmp_path}/none*.tar", str(tmp_path), f"{tmp_path}/{{0..9}}.tar"):
        with pytest.raises(FileNotFoundError, match=f"no shards match {re.escape(repr(pattern))}; name files"):
            shards.shards("tar", pattern, tmp_path, LIMIT)
    assert not list(tmp_path.glob("index/*.arrow"))


def test_an_index_that_cannot_be_kept_is_one_line(patterns, tmp_path):
    (tmp_path / "index").write_text("a file, so that there can be no folder")
    with pytest.raises(OSError, match=rf"^cannot keep the index of shards in {tmp_path}/index .* by config.data.cache"):
        shards.shards("tar", patterns["tar"], tmp_path, LIMIT)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs the list of mapped files")
def test_copies_that_were_removed_are_closed(tmp_path):
    for number in range(24):
        table = pa.table({"jpg": [odd.solid(number)] * 20, "label": [number] * 20})
        pq.write_table(table, tmp_path / f"{number:02}.parquet")
    limit = 10 * (tmp_path / "00.parquet").stat().st_size
    source = shards.shards("parquet", f"{tmp_path}/*.parquet", tmp_path / "cache", limit)
    assert [source[20 * number]["label"] for number in range(24)] == list(range(24))
    mapped = {line.split()[5] for line in Path("/proc/self/maps").read_text().splitlines() if f"{tmp_path}" in line}
    assert 0 < len(mapped) <= 14  # a window of four more than fit


def test_copies_are_few_enough_and_made_again(tmp_path):
    pattern = odd.parquets(tmp_path / "data")
    with pytest.raises(
        ValueError, match=r"config.data.cache_gb must be at least \S+, for the 5 shards in .*, got 1e-06"
    ):
        shards.shards("parquet", pattern, tmp_path, 1000)
    made = []

    def make(number, file):
        made.append(number)
        file.write_bytes(bytes(100))

    held = copies.Copies(tmp_path / "copies" / "a", [100] * 10, make, 450)
    assert [held(number).stat().st_size for number in range(10)] == [100] * 10
    assert sorted(made) == list(range(10)) and len(list((tmp_path / "copies" / "a").iterdir())) <= 4
    held(0)
    assert made.count(0) == 2
    other = copies.Copies(tmp_path / "copies" / "b", [100] * 10, make, 450)
    other.announce([3, 1])
    other(3), other(1)
    assert len(list((tmp_path / "copies").glob("*/*"))) <= 4
    assert {file.name for file in (tmp_path / "copies" / "a").iterdir()} >= {"0", "1"}  # announced for a
    made.clear()
    assert copies.Copies(tmp_path / "copies" / "b", [100] * 10, make, 450)(3).exists() and not made


def test_the_copies_that_go_are_those_whose_last_use_is_longest_ago(tmp_path):
    held = copies.Copies(tmp_path / "a", [100] * 9, lambda number, file: file.write_bytes(bytes(100)), 350)
    for number in (4, 6, 2):
        held.announce([number])
        held(number)
        time.sleep(0.02)  # two times of a file system differ
    held.announce([4])
    held.announce([8])
    held(8)
    assert {file.name for file in (tmp_path / "a").iterdir()} == {"2", "4", "8"}


def test_a_copy_that_fails_says_why_and_may_succeed_later(tmp_path):
    answers = iter([OSError("the bucket is gone"), None])

    def make(number, file):
        if error := next(answers):
            raise error
        file.touch()

    held = copies.Copies(tmp_path / "a", [1], make, 10)
    with pytest.raises(OSError, match="the bucket is gone"):
        held(0)
    assert held(0).exists()


@pytest.fixture
def gcs(tmp_path):
    from tests import bucket  # skips these tests without gcsfs and the emulator

    with bucket.running(tmp_path / "home") as running:
        yield running


@pytest.mark.parametrize("kind", WRITERS)
def test_shards_in_a_bucket_are_those_on_a_disk(kind, gcs, patterns, tmp_path):
    here = shards.shards(kind, patterns[kind], tmp_path / "here", LIMIT)
    folder, _, names = patterns[kind].rpartition("/")
    paths.copy_into("gs://experiments/data", Path(folder))
    there = shards.shards(kind, f"gs://experiments/data/{names}", tmp_path / "there", LIMIT)
    assert list(there.captions) == list(here.captions)
    assert there.describe(0).startswith("gs://experiments/data/")
    for index in (1, 2, 55, odd.COUNT - 2):  # in Parquet, the odd ones are paths beside the shard
        np.testing.assert_array_equal(there[index]["image"], here[index]["image"])
        assert there[index]["label"] == here[index]["label"]
    paths.at("gs://experiments/data/unfinished-" + names.replace("*", "0")).write_bytes(b"")
    with pytest.raises(ValueError, match=r"^gs:.*unfinished-.*: expected "):
        shards.shards(kind, "gs://experiments/data/unfinished-*", tmp_path / "there", LIMIT)
    with pytest.raises(FileNotFoundError, match=r"no shards match 'gs://experiments/none/\*"):
        shards.shards(kind, "gs://experiments/none/*", tmp_path, LIMIT)


def test_shards_in_a_bucket_are_read_one_after_the_other_with_bounded_space(gcs, tmp_path, monkeypatch):
    count, each = 20, 10
    (tmp_path / "data").mkdir()
    for shard in range(count):
        numbers = [each * shard + number for number in range(each)]
        members = [(f"{number}.png", odd.solid(number)) for number in numbers]
        odd.write_tar(tmp_path / "data" / f"{shard:02}.tar", members)
    size = (tmp_path / "data" / "00.tar").stat().st_size
    paths.copy_into("gs://experiments/data", tmp_path / "data")
    source = shards.shards("tar", "gs://experiments/data/*.tar", tmp_path / "cache", 10 * size)
    (folder,) = (tmp_path / "cache" / "shards").iterdir()
    downloads, most, download = [], [], paths.download

    def counted(path, file):
        downloads.append(path)
        most.append(len(list(folder.iterdir())))
        download(path, file)

    monkeypatch.setattr(paths, "download", counted)
    source = shards.shards("tar", "gs://experiments/data/*.tar", tmp_path / "cache", 10 * size)
    batches = loader(source, 10, seed=1)
    images = np.concatenate([next(batches)["image"][:, 0, 0, 0] for _ in range(count)])
    assert sorted(images) == list(range(count * each))
    assert len(set(downloads)) >= count - 10 and len(downloads) <= count + 12 and max(most) <= 11
    first = [image // each for image in images[: 4 * each]]
    assert len(set(first)) == 4 and len({first[i] for i in range(8)}) > 1  # a window of four shards, mixed


ENDING = """
import sys, time
from pathlib import Path
from diffusion_jax import paths
from diffusion_jax.data import parquet_shards

class Slow:
    def __init__(self, file):
        self.file = file

    def read(self, *size):
        time.sleep(0.5)
        return self.file.read(*size)

    def __getattr__(self, name):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.file.close()

class Shard(type(Path())):
    def open(self, *mode):
        return Slow(super().open(*mode))

from threading import Thread
paths.at = Shard
Thread(target=parquet_shards.unpack, args=(sys.argv[1], Path(sys.argv[1] + ".copy")), daemon=True).start()
time.sleep(0.7)  # the footer is read, the pictures are not
"""


def test_a_program_ends_while_a_shard_is_copied(tmp_path):
    """Threads of Arrow that wait for a file of Python would never end."""
    table = pa.table({"jpg": [odd.solid(7)] * 100_000, "caption": ["seven"] * 100_000})
    pq.write_table(table, tmp_path / "0.parquet", row_group_size=1000)
    script = [sys.executable, "-c", ENDING, str(tmp_path / "0.parquet")]
    done = subprocess.run(script, cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_a_million_records_cost_no_memory(tmp_path):
    script = [sys.executable, "-m", "tests.data.million", str(tmp_path)]
    printed = subprocess.run(script, cwd=Path(__file__).parents[2], capture_output=True, text=True, check=True).stdout
    made, read, index, _ = map(float, printed.split())
    assert index > 100 > made and read < 40, printed  # in MB; as Python's own texts, the index takes twice its size
