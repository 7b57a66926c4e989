"""Paths in a bucket behave like local ones, files there appear whole, and an outage loses nothing."""

import json
import logging
import os
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest
from tensorboardX.proto.event_pb2 import Event

from diffusion_jax import paths
from diffusion_jax.app.workdir import locked, make_writable
from diffusion_jax.training import averages, loop
from diffusion_jax.training.checkpoints import Checkpoints
from tests.training import linear


@pytest.fixture
def gcs(tmp_path):
    from tests import bucket  # skips these tests without gcsfs and the emulator

    with bucket.running(tmp_path / "home") as running:
        yield running


@pytest.fixture(params=["local", "bucket"])
def folder(request, tmp_path):
    """A folder on the disk and in a bucket."""
    if request.param == "local":
        return tmp_path / "run"
    request.getfixturevalue("gcs")
    return paths.at("gs://experiments/run")


@pytest.mark.parametrize("address", ["s3://bucket/run", "gs:/bucket/run", "http://host/run", "gs://", "gs:///run"])
def test_other_addresses_are_refused_and_not_taken_for_local_folders(address):
    with pytest.raises(ValueError, match=r"expected .*gs://BUCKET/PATH"):
        paths.at(address)


def test_the_home_folder_is_meant_as_in_a_shell(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "1.tar").touch()
    assert paths.at("~/runs") == tmp_path / "runs" and paths.local("~", "--workdir") == tmp_path
    assert paths.at("a/~/b") == Path("a/~/b")
    assert [path for path, _, _ in paths.matching("~/*.tar")] == [tmp_path / "1.tar"]


def test_a_bucket_without_gcsfs_says_what_to_install(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "gcsfs.core", None)
    paths._filesystem.cache_clear()
    with pytest.raises(ModuleNotFoundError, match=r"gs://BUCKET/PATH, need gcsfs: run pip install gcsfs"):
        paths.at("gs://without-gcsfs/run")
    paths._filesystem.cache_clear()


def test_what_must_be_local_refuses_a_bucket_in_one_line():
    with pytest.raises(ValueError, match=r"^config.data.path: expected a local path, got gs://b/x; copy it to .*$"):
        paths.local("gs://b/x", "config.data.path")
    assert paths.local("x", "config.data.path") == paths.at("x")


def test_a_file_is_always_whole(folder):
    make_writable(folder)
    paths.write(folder / "note.txt", "old")
    with pytest.raises(ZeroDivisionError), paths.written(folder / "note.txt") as file:
        file.write_text("half")
        raise ZeroDivisionError
    assert (folder / "note.txt").read_text() == "old"
    paths.write(folder / "note.txt", b"new")
    assert [(path.name, path.read_text()) for path in folder.iterdir()] == [("note.txt", "new")]


def test_an_error_of_writing_names_the_file_and_not_the_temporary_one(tmp_path):
    with pytest.raises(FileNotFoundError) as error:
        paths.write(tmp_path / "missing" / "note.txt", "text")
    assert error.value.filename == str(tmp_path / "missing" / "note.txt")


def test_a_folder_is_copied_and_replaced(folder, tmp_path):
    source = tmp_path / "source"
    (source / "below").mkdir(parents=True)
    (source / "a").write_text("1")
    (source / "below" / "b").write_text("2")
    paths.copy_into(folder, source)
    assert (folder / "a").read_text() == "1" and (folder / "below" / "b").read_text() == "2"
    (source / "a").unlink()
    (source / "c").write_text("3")
    for _ in range(2):
        paths.replace_folder(folder, source)
        assert sorted(path.name for path in folder.iterdir()) == ["below", "c"]
        assert (folder / "below" / "b").read_text() == "2" and (folder / "c").read_text() == "3"


def test_a_folder_that_cannot_be_replaced_stays(tmp_path):
    folder, source = tmp_path / "report", tmp_path / "source"
    for place in (folder, source):
        place.mkdir()
        (place / "a").write_text(place.name)
    (source / "b").symlink_to("missing")
    with pytest.raises(OSError, match="No such file"):
        paths.replace_folder(folder, source)
    assert [path.read_text() for path in folder.iterdir()] == ["report"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report", "source"]


def test_what_a_bucket_has_is_copied_once_and_again_when_it_changes(gcs, tmp_path):
    model = paths.at("gs://experiments/model")
    paths.write(model / "config.json", "{}")
    paths.write(model / "checkpoints" / "1" / "state", "large")
    paths.write("gs://experiments/model-2/config.json", "of another")
    copy = paths.fetched(str(model))
    assert sorted(path.name for path in copy.rglob("*")) == ["config.json"]  # not what lies deeper
    gcs.fails = lambda method, path: "alt=media" in path  # a second download
    assert paths.fetched(model) == copy and copy.is_relative_to(tmp_path) and copy.name == "model"
    gcs.fails = lambda method, path: False
    paths.write(model / "config.json", '{"x": 1}')
    assert (paths.fetched(model) / "config.json").read_text() == '{"x": 1}' and not copy.exists()
    assert paths.fetched(model / "config.json").name == "config.json"
    assert paths.fetched(model, levels=3) != copy
    with pytest.raises(FileNotFoundError, match="gs://experiments/missing: no such file or folder"):
        paths.fetched("gs://experiments/missing")
    assert paths.fetched(tmp_path) == tmp_path


def test_a_bucket_that_does_not_exist_is_one_line(gcs):
    with pytest.raises(OSError, match=r"^there is no bucket gs://elsewhere$"):
        paths.at("gs://elsewhere/run")


def test_two_trainings_on_one_machine_cannot_share_a_bucket_folder(gcs):
    workdir = paths.at("gs://experiments/run")
    with (
        locked(workdir),
        pytest.raises(OSError, match=r"another training runs in gs://experiments/run"),
        locked(workdir),
    ):
        pass
    assert not workdir.exists()  # the lock is local


def fit(workdir, steps, **fields):
    task = loop.Task(
        name="linear",
        loss=linear.loss,
        params=linear.initial(),
        frozen=linear.FROZEN,
        batches=linear.batches(8),
        optimizer=optax.adam(0.05),
        snapshot=lambda params: np.zeros((8, 8, 3), np.uint8),
    )
    return loop.fit(task, workdir, linear.section(steps=steps, snapshot_every=4, **fields), seed=0)


def lines(workdir) -> list[dict]:
    """The metrics of a run, without times."""
    every = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return [linear.lasting(line) for line in every]


@pytest.fixture(scope="module")
def disk(tmp_path_factory):
    """A training of 12 steps on a local disk, stopped once: its folder and weights, and those after 8 steps."""
    folder = tmp_path_factory.mktemp("disk")
    return folder, fit(folder, 8, post_hoc=True), fit(folder, 12, post_hoc=True)


def board_steps(files) -> list[int]:
    """The steps of the loss in files of TensorBoard."""
    steps = []
    for data in map(Path.read_bytes, files):
        while data:  # a record: length, its checksum, an event, its checksum
            size = int.from_bytes(data[:8], "little")
            event = Event.FromString(data[12 : 12 + size])
            steps += [event.step for value in event.summary.value if value.tag == "loss"]
            data = data[16 + size :]
    return steps


@pytest.mark.slow
def test_a_training_goes_on_in_a_bucket_as_on_a_disk(gcs, disk):
    workdir, (local, after_8, after_12) = paths.at("gs://experiments/run"), disk
    jax.tree.map(np.testing.assert_array_equal, fit(workdir, 8, post_hoc=True), after_8)
    jax.tree.map(np.testing.assert_array_equal, fit(str(workdir), 12, post_hoc=True), after_12)
    assert lines(workdir) == lines(local) and [line["step"] for line in lines(workdir)] == [2, 4, 6, 8, 10, 12]
    for name in ("checkpoints", "samples", "averages"):
        names = sorted(path.name for path in (workdir / name).iterdir())
        assert names == sorted(path.name for path in (local / name).iterdir())
    averaged = [averages.load(place / "averages", 12, 0.1, linear.initial()) for place in (workdir, local)]
    jax.tree.map(np.testing.assert_array_equal, *averaged)
    restored = Checkpoints(workdir / "checkpoints").restore_ema(linear.initial())
    jax.tree.map(np.testing.assert_array_equal, restored, after_12)
    # TensorBoard: a file for each of the checkpoints 4, 8, and 12 of the second run, and for what follows the last
    files = sorted(paths.fetched(workdir / "tensorboard").iterdir())
    assert board_steps(files) == [2, 4, 6, 8, 10, 12] and len(files) == 5


def outage(gcs, seconds: float, after: int) -> None:
    """Let every request fail for a time, from the upload number `after` on."""
    uploads, start = [], []

    def fails(method: str, path: str) -> bool:
        uploads.extend([path] if method == "POST" else [])
        if len(uploads) >= after and not start:
            start.append(time.monotonic())
        return bool(start) and time.monotonic() < start[0] + seconds

    gcs.fails = fails


@pytest.mark.slow
@pytest.mark.parametrize("seconds, after", [(6, 4), (6, 20), (65, 8)])  # while a log or a checkpoint is written
def test_an_outage_loses_nothing_and_is_one_line(seconds, after, gcs, disk, caplog):
    workdir, (local, after_8, _) = paths.at("gs://experiments/run"), disk
    outage(gcs, seconds, after)
    with caplog.at_level(logging.WARNING):
        jax.tree.map(np.testing.assert_array_equal, fit(workdir, 8), after_8)
    assert gcs.num_failed
    assert lines(workdir) == lines(local)[:4] and Checkpoints(workdir / "checkpoints").latest_step() == 8
    said = [record.getMessage() for record in caplog.records if "bucket" in record.getMessage()]
    begin = "the bucket does not answer (Backend Error, 503): trying again for up to 4 minutes"
    assert said in ([], [begin, "the bucket answers again"])  # tensorstore repeats its requests without a word


@pytest.mark.slow
@pytest.mark.parametrize(
    "failing, error",
    [
        ("uploadType=multipart", ""),  # whole files: the log
        ("_METADATA", "could not save step 8 to gs://experiments/run/checkpoints: "),
    ],
)
def test_a_longer_outage_is_an_error_and_the_run_goes_on_later(failing, error, gcs, monkeypatch):
    workdir = paths.at("gs://experiments/run")
    fit(workdir, 4)
    monkeypatch.setattr(paths, "PATIENCE", 1)
    attempts = []

    def fails(method: str, path: str) -> bool:
        attempts.extend([path] if method == "POST" and failing in path else [])
        return attempts[-1:] == [path]

    gcs.fails = fails
    with pytest.raises(OSError, match=f"^{error}the bucket has not answered for .* s: Backend Error, 503") as raised:
        fit(workdir, 8)
    assert paths.is_outage(raised.value), "the command ends with a status that says: run it again"
    gcs.fails = lambda method, path: False
    assert error or len(attempts) <= 3, "the log is not waited for again when the run ends"
    assert Checkpoints(workdir / "checkpoints").latest_step() == 4
    fit(workdir, 8)
    assert [line["step"] for line in lines(workdir)] == [2, 4, 6, 8]


def test_processes_of_a_bucket_see_what_others_wrote(gcs):
    """No listing is kept: a checkpoint of another process or library appears at once."""
    folder = paths.at("gs://experiments/run")
    paths.write(folder / "a", "")
    assert not (folder / "b").exists() and len(list(folder.iterdir())) == 1
    import fsspec

    other = fsspec.get_filesystem_class("gcs")(skip_instance_cache=True)
    other.pipe_file(os.fspath(folder / "b"), b"")
    assert (folder / "b").exists() and len(list(folder.iterdir())) == 2


def test_a_pattern_gives_each_file_once_and_no_link_that_leads_nowhere(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    for name in ("a/1.tar", "a/b/2.tar"):
        (tmp_path / name).write_text(name)
    (tmp_path / "3.tar").symlink_to("a/1.tar")
    (tmp_path / "folder.tar").mkdir()
    found = paths.matching(f"{tmp_path}/**/**/*.tar")
    assert [(str(path.relative_to(tmp_path)), size) for path, size, _ in found] == [
        *(("3.tar", 7), ("a/1.tar", 7), ("a/b/2.tar", 9))
    ]
    (tmp_path / "4.tar").symlink_to("gone.tar")
    with pytest.raises(FileNotFoundError, match=r"4\.tar is a link to what is not there"):
        paths.matching(f"{tmp_path}/*.tar")
