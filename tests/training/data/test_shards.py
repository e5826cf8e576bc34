"""Training from tar files: what is read, what a step sees, and what happens to what cannot be read."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from runs import annotations, config

from vltprune.data.annotations import parse_captioned, parse_statement
from vltprune.data.images import EncodedImage, load_image
from vltprune.data.shards import Shards, is_shard_address, iterate_samples, write_shards
from vltprune.evaluation.tasks import tasks
from vltprune.training import compress, compression
from vltprune.training.data.opener import RecordOpener
from vltprune.training.data.shards import ShardLoader
from vltprune.training.loop.checkpoints import Checkpoints

pytest.importorskip("webdataset", reason="shards need webdataset: pip install 'vltprune[train]'")

N = 11


def prepare(image):
    return torch.from_numpy(np.asarray(image.resize((8, 8)), np.float32)).permute(2, 0, 1)


def png(number: int) -> bytes:
    """An image that is identified by its red value."""
    file = io.BytesIO()
    Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "png")
    return file.getvalue()


def shard(file: Path, *members: tuple[str, bytes]) -> Path:
    with tarfile.open(file, "w") as tar:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return file


def captions(*numbers: int) -> list[tuple[str, bytes]]:
    """A sample for each number."""
    return [one for n in numbers for one in ((f"{n:03d}.png", png(n)), (f"{n:03d}.txt", f"red {n}".encode()))]


def loader(address: str | Path, batch_size: int = 4, seed: int = 0, augment: bool = False, **named) -> ShardLoader:
    return ShardLoader(
        Shards.from_address(str(address), parse_captioned), RecordOpener(prepare, seed, augment), batch_size, **named
    )


def ids(batches) -> list[list[str]]:
    return [[record.id for record in records] for records, _ in batches]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """N samples in three shards."""
    folder = tmp_path_factory.mktemp("shards")
    for place, (start, stop) in enumerate(pairwise((0, 3, 8, N))):
        shard(folder / f"{place}.tar", *captions(*range(start, stop)))
    return folder


@pytest.mark.parametrize("task", ["nlvr", "caption", "retrieval", "vqa"])
def test_annotations_come_back_from_shards(task, tmp_path):
    file, kind = annotations(task, tmp_path / "data"), tasks[task]
    right = kind.load_records(file, str(tmp_path / "data"), False)
    written = write_shards(file, tmp_path / "data", tmp_path / "shards", per_shard=3)
    assert [path.name for path in written] == [f"{task}-{place:06d}.tar" for place in range(3)]

    packed = Shards.from_address(f"{tmp_path}/shards/{task}-{{000000..000002}}.tar", kind.parse_entry)
    assert (
        packed.names
        == Shards.from_address(f"{tmp_path}/shards/*.tar", kind.parse_entry).names
        == tuple(map(str, written))
    )
    found = [
        packed.record(i, one)
        for i, one in enumerate(one for name in packed.names for one in iterate_samples(name, print))
    ]
    assert [replace(one, images=()) for one in found] == [replace(one, images=()) for one in right]
    for one, same in zip(found, right, strict=True):
        assert [image.tobytes() for image in one.load_images()] == [image.tobytes() for image in same.load_images()]


def test_what_is_written_is_told_from_what_is_not(tmp_path):
    file = tmp_path / "all.json"
    Image.new("RGB", (4, 4), "red").save(tmp_path / "a.bmp")
    file.write_text(json.dumps([{"image": "a.bmp", "caption": "red"}]))
    (written,) = write_shards(file, tmp_path, tmp_path / "shards")
    (sample,) = iterate_samples(str(written), print)
    assert set(sample.files) == {"png", "json"}
    assert load_image(EncodedImage("", sample.files["png"])).getpixel((0, 0)) == (255, 0, 0)
    file.write_text(json.dumps([{"caption": "red"}]))
    with pytest.raises(ValueError, match="entry 0: there is no 'image'"):
        write_shards(file, tmp_path, tmp_path / "shards")
    file.write_text(json.dumps([{"image": "b.jpg", "caption": "red"}]))
    with pytest.raises(FileNotFoundError, match=r"b\.jpg"):
        write_shards(file, tmp_path, tmp_path / "shards")


def test_forms_of_samples(tmp_path):
    two = {"sentence": "both", "label": "True"}
    members = [(f"a.{place}.PNG", png(place)) for place in (10, 2)] + [("a.json", json.dumps(two).encode())]
    (sample,) = iterate_samples(str(shard(tmp_path / "a.tar", *members)), print)
    record = Shards((), parse_statement).record(7, sample)
    assert (record.index, record.sentence, record.label) == (7, "both", 1)
    assert [image.getpixel((0, 0))[0] for image in record.load_images()] == [2, 10]

    both = [("b/1.png", png(1)), ("b/1.txt", b" said \n"), ("b/1.json", b'{"width": 8}')]
    (sample,) = iterate_samples(str(shard(tmp_path / "b.tar", *both)), print)
    record = Shards((), parse_captioned).record(0, sample)
    assert (record.captions, record.id) == (("said",), "b/1")


def test_addresses():
    for data in (
        "a.tar",
        "a-{0..9}.tar",
        "*.tgz",
        "a.tar.gz",
        "https://host/a",
        "pipe:cat a",
        "a.tar::b.tar",
        "s3://b/a",
    ):
        assert is_shard_address(data), data
    for data in ("a.json", "tar", "synthetic:train:16000x8", "/a/b.jsonl", "a.tar.d/x.json"):
        assert not is_shard_address(data), data


@given(
    seed=st.integers(0, 5),
    each=st.integers(1, 3),
    world=st.integers(1, 3),
    start=st.integers(0, 6),
    buffer=st.integers(1, 15),
    augment=st.booleans(),
)
def test_a_step_is_a_matter_of_seed_and_step(folder, seed, each, world, start, buffer, augment):
    settings = dict(batch_size=each * world, seed=seed, buffer=buffer, augment=augment)
    whole = list(loader(folder / "*.tar", **settings).batches(0, 7))
    ranks = [list(loader(folder / "*.tar", rank=r, world=world, **settings).batches(start, 7)) for r in range(world)]
    assert len(whole) == 7 and {len(one) for one in ranks} == {7 - start}
    for (records, images), *parts in zip(whole[start:], *ranks, strict=True):
        assert records == [record for some, _ in parts for record in some]
        assert torch.equal(images, torch.cat([part for _, part in parts]))
    drawn = [one for some in ids(whole) for one in some]
    for epoch in range(0, len(drawn) // N * N, N):
        assert len(set(drawn[epoch : epoch + N])) == N


def test_epochs_and_seeds_differ(folder):
    one, other = (ids(loader(folder / "*.tar", N, seed=seed).batches(0, 3)) for seed in (0, 1))
    assert len({tuple(some) for some in one + other}) == 6


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
def test_workers_take_steps_in_rotation(folder, tmp_path):
    whole, by_two = (list(loader(folder / "*.tar", augment=True, workers=n).batches(1, 6)) for n in (0, 2))
    assert ids(whole) == ids(by_two)
    assert all(torch.equal(images, same) for (_, images), (_, same) in zip(whole, by_two, strict=True))
    shard(tmp_path / "a.tar", *captions(0, 1, 2), ("x.txt", b"red"))
    some = loader(tmp_path / "a.tar", workers=2)
    list(some.batches(0, 4))
    assert len(some.skipped) == 1
    with pytest.raises(OSError, match=r"^cannot read the shard nowhere://a: .*no gopen handler"):
        list(loader("nowhere://a", workers=2).batches(0, 1))


def test_first_records_are_those_of_every_process(folder):
    few = [loader(folder / "*.tar", 4, rank=rank, world=2).first(5) for rank in range(2)]
    assert few[0] == few[1]
    assert ids([(few[0], None)]) == ids(loader(folder / "*.tar", 5).batches(0, 1))
    assert len({record.id for record in loader(folder / "*.tar").first(64)}) == N


def test_broken_samples_are_replaced_by_the_next_and_noted_once(tmp_path):
    broken = [("x.png", b"no image"), ("x.txt", b"red"), ("y.png", png(1)), ("y.json", b"{"), ("z.txt", b"red")]
    shard(tmp_path / "a.tar", *captions(0, 1, 2), *broken, ("w.png", png(1)), ("v.png", png(1)), ("v.json", b"[]"))
    shard(tmp_path / "b.tar", *captions(3, 4))
    some = loader(tmp_path / "*.tar", 4, seed=1)
    batches = list(some.batches(0, 9))
    assert {one for batch in ids(batches) for one in batch} == {f"{n:03d}" for n in range(5)}
    assert all(images.shape == (4, 1, 3, 8, 8) for _, images in batches)
    notes = sorted(map(str, some.skipped))
    assert len(notes) == 5
    for note, key, why in zip(
        notes, "vwxyz", ["a list", "neither json nor", "x.png as", "Expecting", "0 ima"], strict=True
    ):
        assert f"{tmp_path}/a.tar, {key}: " in note and why in note
    assert ids(loader(tmp_path / "*.tar", 4, seed=1).batches(6, 9)) == ids(batches)[6:]


def test_shards_that_end_too_early(tmp_path):
    whole = shard(tmp_path / "a.tar", *captions(0, 1), ("5.txt", b"red"), ("5.png", bytes(3000))).read_bytes()
    (tmp_path / "a.tar").write_bytes(whole[: whole.index(b"5.png") + 1200])
    shard(tmp_path / "b.tar", *captions(2))
    (tmp_path / "c.tar").write_bytes(b"")
    some = loader(tmp_path / "*.tar", 3)
    batches = ids(some.batches(0, 4))
    assert {one for batch in batches for one in batch} == {"000", "001", "002"}
    notes = "\n".join(map(str, some.skipped))
    assert f"{tmp_path}/a.tar: not a whole tar file: unexpected end of data" in notes
    assert f"{tmp_path}/c.tar: not a whole tar file: empty file" in notes
    assert f"{tmp_path}/a.tar, 5: it has 0 images, and needs 1" in notes
    assert len(some.skipped) == 3


@pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")  # from Python 3.12 on
@pytest.mark.parametrize("workers", [0, 2])
def test_shards_that_end_too_early_on_the_way_are_noted(workers, tmp_path):
    for place in range(6):
        shard(tmp_path / f"{place}.tar", *captions(*range(40 * place, 40 * place + 40)))
    for place in range(6):  # whichever comes last
        file = tmp_path / f"{place}.tar"
        file.write_bytes(file.read_bytes()[: 121 * 512 + 200])  # in a image
    some = loader(tmp_path / "*.tar", 4, buffer=1, workers=workers)
    list(some.batches(0, 8))
    early = len(some.skipped)
    assert early < 6
    list(some.batches(0, 55))
    ends = [note for note in some.skipped if "not a whole tar file" in str(note)]
    assert len(ends) == 6


def test_where_nothing_can_be_read(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*1\.tar"):
        shard(tmp_path / "0.tar", *captions(0))
        loader(tmp_path / "{0,1}.tar")
    with pytest.raises(FileNotFoundError, match=r"there is no shard .*\*\.tgz"):
        loader(tmp_path / "*.tgz")
    shard(tmp_path / "a.tar", ("a.txt", b"red"))
    with pytest.raises(OSError, match=r"20 records in a row cannot be opened; the last: .*a\.tar, a: it has 0 images"):
        list(loader(tmp_path / "a.tar").batches(0, 1))
    with pytest.raises(OSError, match=r"nothing can be read from the 1 shards, .*; the last: .*a\.tar, a: it has 0"):
        loader(tmp_path / "a.tar").first(3)
    (tmp_path / "b.tar").write_bytes(b"x" * 2000)
    with pytest.raises(
        OSError, match=r"nothing can be read from the 1 shards, .*; the last: .*b\.tar: not a whole tar"
    ):
        list(loader(tmp_path / "b.tar").batches(0, 1))
    with pytest.raises(OSError, match=r"nothing can be read from the 1 shards, .*c\.tar \.\.\.$"):
        loader(shard(tmp_path / "c.tar")).first(3)
    some = loader(tmp_path / "0.tar")
    (tmp_path / "0.tar").unlink()
    with pytest.raises(OSError, match=r"cannot read the shard .*0\.tar: No such file"):
        list(some.batches(0, 1))
    with pytest.raises(OSError, match=r"cannot read the shard nowhere://a: .*no gopen handler"):
        list(loader("nowhere://a").batches(0, 1))


def test_commands_and_their_failures(folder, tmp_path):
    piped = "::".join(f"pipe:cat {folder}/{place}.tar" for place in range(3))
    assert ids(loader(piped).batches(0, 3)) == ids(loader(folder / "*.tar").batches(0, 3))
    assert ids(loader(f"file://{folder}/{{0..2}}.tar").batches(0, 3)) == ids(loader(folder / "*.tar").batches(0, 3))
    with pytest.raises(OSError, match=r"cannot read the shard pipe:cat .*: what fetches it ended with exit 3"):
        list(loader(f"pipe:cat {folder}/1.tar; exit 3").batches(0, 2))


def test_a_resumed_run_from_shards_equals_an_uninterrupted_one(tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"data='a\.tar': samples in shards are not counted .* give steps, not epochs"):
        config("nlvr", tmp_path / "data", data="a.tar", steps=None, epochs=3)
    file = config("nlvr", tmp_path / "data").data
    write_shards(file, tmp_path / "data", tmp_path / "shards", per_shard=3)
    learned = {"parts": {"guide": "codebook(anchors=4)", "keep": "learned(threshold=-0.5)"}, "budget": "learned"}
    changes = {"augment": True, "steps": 5, "checkpoint_every": 3, **learned}  # there are two steps in all records
    settings = config("nlvr", tmp_path / "data", data=f"{tmp_path}/shards/*.tar", **changes)
    monkeypatch.setattr(compression, "finish", lambda run, model, val: model)  # what comes behind the last step
    right = compress(settings, tmp_path / "whole").state_dict()

    save = Checkpoints.save
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Checkpoints, "save", lambda self, step, state: (save(self, step, state), stop(step)))
        compress(settings, tmp_path / "cut")
    found = compress(settings, tmp_path / "cut").state_dict()
    assert right.keys() == found.keys()
    assert all(torch.equal(right[name], found[name]) for name in right)


def stop(step: int) -> None:
    if step == 3:
        raise KeyboardInterrupt
