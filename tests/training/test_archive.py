# SPDX-License-Identifier: Apache-2.0
"""Archives of stories: whole or in volumes they read like the text files in them; what is wrong with one is named."""

import errno
import hashlib
import io
import json
import shutil

import datasets
import multivolumefile
import numpy as np
import py7zr
import pytest
from helpers.damage import flip

from training import untrusted
from training.files import STAGED_PREFIX
from training.text import archive, sources
from training.text.sources import load_stories, source_provenance
from training.text.story_writer import write_stories
from training.text.tokenizer import train_tokenizer
from training.text.windows import pack_windows


TRAIN = list(write_stories(40, seed=1))
VALIDATION = list(write_stories(10, seed=2))
MEMBERS = {
    "data/README.txt": "not to be read",
    "data/traindataset.txt": "".join(json.dumps(story) + "\n" for story in TRAIN),
    "data/valdataset.txt": "".join(json.dumps(story) + "\n" for story in VALIDATION),
}
VOLUME = 1500  # bytes


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(folder))
    return folder / "archives"


def packed(members=MEMBERS, **options):
    """The bytes of an archive."""
    content = io.BytesIO()
    with py7zr.SevenZipFile(content, "w", **options) as file:
        for name, text in members.items():
            file.writestr(text, name)
    return content.getvalue()


CONTENT = packed()


def cut(folder, content=CONTENT, size=VOLUME, name="stories.7z"):
    """Write the volumes as `7z -v` would; returns them in order."""
    folder.mkdir(exist_ok=True)
    volumes = []
    for number, start in enumerate(range(0, len(content), size), start=1):
        volumes.append(folder / f"{name}.{number:03d}")
        volumes[-1].write_bytes(content[start : start + size])
    return volumes


def texts(source, **options):
    return [row["text"] for row in load_stories(str(source), **options)]


def test_volumes_read_like_the_text_in_them(tmp_path, cache):
    volumes = cut(tmp_path / "a")
    assert len(volumes) > 3
    for streaming in (False, True):
        assert texts(volumes[0], streaming=streaming) == TRAIN
        for split in ("validation", "valid", "val"):
            assert texts(volumes[0], split=split, streaming=streaming) == VALIDATION
    unpacked = sorted(path.name for path in cache.rglob("*.txt"))
    assert unpacked == ["traindataset.txt", "valdataset.txt"]
    assert not list(cache.rglob("parts"))


def test_one_file_and_a_folder_of_volumes_do_as_well(tmp_path):
    (tmp_path / "Stories.7Z").write_bytes(CONTENT)
    assert texts(tmp_path / "Stories.7Z", split="validation") == VALIDATION
    folder = cut(tmp_path / "a [1]")[0].parent  # a name that would be a pattern
    (folder / "LICENSE").write_text("x")
    assert texts(folder) == TRAIN
    assert texts(folder, split="validation") == VALIDATION


def test_volumes_that_the_library_has_cut_are_read(tmp_path):
    with multivolumefile.open(tmp_path / "babi.7z", "wb", volume=VOLUME) as target:
        with py7zr.SevenZipFile(target, "w") as file:
            for name, text in MEMBERS.items():
                file.writestr(text, name)
    assert not (tmp_path / "babi.7z.001").exists()
    assert texts(tmp_path / "babi.7z.0001") == TRAIN


@pytest.mark.parametrize("before_the_end", [1, 5, 20, 33])
def test_a_border_may_fall_into_the_list_of_members(tmp_path, before_the_end):
    volumes = cut(tmp_path / "a", size=len(CONTENT) - before_the_end)
    assert len(volumes) == 2
    assert texts(volumes[0], split="validation") == VALIDATION


def test_windows_are_those_of_the_plain_text(tmp_path):
    tokenizer = train_tokenizer(TRAIN, 300)
    (tmp_path / "plain.txt").write_text(MEMBERS["data/traindataset.txt"])
    plain = pack_windows(load_stories(str(tmp_path / "plain.txt")), tokenizer, 32)
    windows = pack_windows(load_stories(str(cut(tmp_path / "a")[0])), tokenizer, 32)
    assert len(windows) > 10
    assert np.array_equal(windows["input_ids"][:], plain["input_ids"][:])


def test_provenance_is_that_of_the_volumes(tmp_path, cache):
    volumes = cut(tmp_path / "a")
    provenance = source_provenance(str(volumes[0]), split="validation")
    assert (provenance["kind"], provenance["name"], provenance["split"]) == ("archive", volumes[0].name, "validation")
    assert provenance["files"] == {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in volumes}
    assert list(provenance["files"]) == [path.name for path in volumes]
    assert str(tmp_path) not in json.dumps(provenance)
    assert source_provenance(str(tmp_path / "a"))["name"] == "a"
    assert not cache.exists()  # asking for it unpacks nothing


def test_an_archive_is_unpacked_once_and_a_changed_one_again(tmp_path, monkeypatch):
    volumes = cut(tmp_path / "a")
    assert texts(volumes[0]) == TRAIN
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    with monkeypatch.context() as patch:
        patch.setattr(archive, "_unpack", None)  # calling it would fail
        assert texts(tmp_path / "b") == TRAIN
        with pytest.raises(TypeError):
            texts(volumes[0], split="validation")
    shutil.rmtree(tmp_path / "a")
    volumes = cut(tmp_path / "a", packed({"train.txt": '"Other."\n'}))
    assert texts(volumes[0]) == ["Other."]


def test_an_unpacked_file_that_has_changed_is_unpacked_again(tmp_path, cache, caplog):
    volumes = cut(tmp_path / "a")
    assert texts(volumes[0]) == TRAIN
    (file,) = cache.rglob("traindataset.txt")
    flip(file)
    assert texts(volumes[0]) == TRAIN
    assert "traindataset.txt has changed since it was written): it is removed and made again" in caplog.text


def test_a_full_disk_is_not_called_a_damaged_archive(tmp_path, monkeypatch):
    def extract(self, path, targets):
        raise OSError(errno.ENOSPC, "no space left on device")

    monkeypatch.setattr(py7zr.SevenZipFile, "extract", extract)
    with pytest.raises(OSError, match="no space left"):
        texts(cut(tmp_path / "a")[0])


@pytest.mark.parametrize("fault", ["killed", "full disk"])
def test_a_file_half_unpacked_is_never_read(tmp_path, cache, monkeypatch, fault):
    volumes = cut(tmp_path / "a")
    original = archive._unpack

    def interrupted(stream, path, split, forms, folder):
        original(stream, path, split, forms, folder)
        file = folder / "traindataset.txt"
        file.write_text(file.read_text()[:100])
        raise OSError(errno.ENOSPC, "no space left on device")

    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space left"):
        patch.setattr(archive, "_unpack", interrupted)
        if fault == "killed":  # then nothing is tidied up either
            patch.setattr("training.files.shutil.rmtree", lambda *arguments, **options: None)
        texts(volumes[0])
    leftovers = [path for path in cache.iterdir() if path.name.startswith(STAGED_PREFIX)]
    assert len(leftovers) == (fault == "killed")
    assert texts(volumes[0]) == TRAIN
    assert not [path for path in cache.iterdir() if path.name.startswith(STAGED_PREFIX)]


def test_a_missing_volume_is_named(tmp_path):
    volumes = cut(tmp_path / "a")
    for missing in (volumes[2], volumes[-1], volumes[0]):
        content = missing.read_bytes()
        missing.unlink()
        source = volumes[0] if missing != volumes[0] else tmp_path / "a"
        for function in (load_stories, source_provenance):
            with pytest.raises(ValueError, match=rf"{missing.name} is missing.*(all volumes)"):
                function(str(source))
        missing.write_bytes(content)
    assert texts(volumes[0]) == TRAIN
    for volume in volumes[1:]:
        volume.unlink()
    with pytest.raises(ValueError, match=r"stories\.7z\.002 is missing \(or stories\.7z\.001 is cut off\)"):
        texts(volumes[0])


@pytest.mark.parametrize("index", [0, 1, -1])
def test_a_volume_that_is_cut_off_is_named(tmp_path, index):
    volume = cut(tmp_path / "a")[index]
    volume.write_bytes(volume.read_bytes()[:-40])
    there = f"{len(CONTENT):,} bytes, of which {len(CONTENT) - 40:,} are there"
    with pytest.raises(ValueError, match=rf"{volume.name} is cut off, the archive has {there}: get the file again"):
        texts(tmp_path / "a")


def test_a_single_file_that_is_cut_off_is_named(tmp_path):
    (tmp_path / "a.7z").write_bytes(CONTENT[:-1])
    with pytest.raises(ValueError, match=r"a\.7z is cut off, .*: get the file again"):
        texts(tmp_path / "a.7z")


def test_the_first_volume_has_to_be_named(tmp_path):
    volumes = cut(tmp_path / "a")
    with pytest.raises(ValueError, match=r"002 is not the first volume of its archive: name stories\.7z\.001"):
        texts(volumes[1])
    with pytest.raises(ValueError, match="elsewhere.7z.001' does not exist: name a file"):
        texts("elsewhere.7z.001")


# Which byte is changed, from the start or the end: in the list's checksum, the packed text, the list of members. (An
# archive holds the time at which it was made, and its length varies with it: no name of a test may depend on that.)
@pytest.mark.parametrize("position", [30, 100, "middle", -10])
@pytest.mark.parametrize("filters", [None, [{"id": py7zr.FILTER_BZIP2}], [{"id": py7zr.FILTER_ZSTD}]])
def test_a_damaged_archive_is_refused(tmp_path, cache, position, filters):
    content = bytearray(packed(filters=filters))
    content[len(content) // 2 if position == "middle" else position] ^= 0xFF
    volumes = cut(tmp_path / "a", bytes(content))
    with pytest.raises(ValueError, match=r"stories\.7z\.001: the archive is damaged \(.+\): get "):
        texts(volumes[0])
    assert not list(cache.rglob("*.txt"))


def test_what_is_no_archive_is_refused(tmp_path):
    (tmp_path / "a.7z").write_bytes(b"PK\3\4" + bytes(100))
    with pytest.raises(ValueError, match=r"a\.7z is no 7z archive, it begins with b'PK"):
        texts(tmp_path / "a.7z")
    (tmp_path / "a.7z").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a\.7z is no 7z archive, it begins with b''"):
        texts(tmp_path / "a.7z")


def test_an_encrypted_archive_is_refused(tmp_path):
    (tmp_path / "a.7z").write_bytes(packed(password="secret"))
    with pytest.raises(ValueError, match=r"a\.7z is encrypted: unpack it"):
        texts(tmp_path / "a.7z")


@pytest.mark.parametrize(
    "name", ["../train.txt", "data/../../train.txt", "/train.txt", "..\\train.txt", "C:\\train.txt"]
)
@pytest.mark.parametrize("others", [{}, MEMBERS])
def test_members_that_would_leave_the_folder_are_refused(tmp_path, cache, monkeypatch, name, others):
    monkeypatch.setattr(py7zr.py7zr, "check_archive_path", lambda name: True)  # the library would not write it
    content = packed({**others, name: '"Evil."\n'})
    monkeypatch.undo()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(cache.parent))
    (tmp_path / "a.7z").write_bytes(content)
    with pytest.raises(ValueError, match="would be written outside the folder: do not trust this archive"):
        texts(tmp_path / "a.7z")
    assert not list(tmp_path.rglob("train*.txt"))


@pytest.mark.parametrize(
    ("members", "split", "message"),
    [
        (
            MEMBERS,
            "test",
            "no split 'test', but 'data/README.txt', .*'data/valdataset.txt': set split to one of",
        ),
        ({"a/valdataset.txt": "x"}, "train", r"no file for split 'train' .* but 'a/valdataset.txt': unpack it"),
        ({"train.csv": "x"}, "train", "no file for split 'train'"),
        ({"a/train.txt": "x", "b/train.txt": "x"}, "train", "several files for split .* but 'a/train.txt', 'b/train"),
    ],
)
def test_a_missing_split_is_reported_with_those_that_exist(tmp_path, members, split, message):
    (tmp_path / "a.7z").write_bytes(packed(members))
    with pytest.raises(ValueError, match=message):
        texts(tmp_path / "a.7z", split=split)


@pytest.mark.parametrize(
    ("stranger", "message"),
    [
        ("stories.7z.001.part", r"stories\.7z\.001\.part beside .* is no volume: move it"),
        ("stories.7z.000", "volumes of two archives lie in one folder"),
        ("other.7z", r"has to hold one archive, but holds other\.7z, stories\.7z\.001: name the file"),
        ("train.jsonl", r"holds an archive \(stories\.7z\.001\) and files of stories \(train\.jsonl\): name"),
    ],
)
def test_strangers_among_the_volumes_are_refused(tmp_path, stranger, message):
    volumes = cut(tmp_path / "a")
    (tmp_path / "a" / stranger).write_text('{"text": "x"}\n')
    with pytest.raises(ValueError, match=message):
        texts(volumes[0] if stranger.startswith("stories") else tmp_path / "a")


def test_a_mistake_in_the_text_names_file_and_line(tmp_path):
    (tmp_path / "a.7z").write_bytes(packed({"train.txt": '"good"\n"no end\n'}))
    with pytest.raises(ValueError, match=r"train\.txt:2: broken JSON"):
        texts(tmp_path / "a.7z")


def test_permissions_of_the_packer_do_not_matter(tmp_path):
    (tmp_path / "train.txt").write_text('"One."\n')
    (tmp_path / "train.txt").chmod(0o400)
    with py7zr.SevenZipFile(tmp_path / "a.7z", "w") as file:
        file.write(tmp_path / "train.txt", "train.txt")
    assert texts(tmp_path / "a.7z") == ["One."]
    unpacked = sources.local_files(str(tmp_path / "a.7z"), "train")[0]
    assert unpacked.stat().st_mode & 0o777 == 0o644


def test_an_archive_that_unpacks_without_end_is_refused_before_it_is_unpacked(tmp_path, cache, monkeypatch):
    monkeypatch.setattr(untrusted, "ALWAYS_UNPACKED", 2**20)
    (tmp_path / "a.7z").write_bytes(packed({"train.txt": '"A."\n' + "\n" * 2_000_000}))
    with pytest.raises(ValueError, match=r"a\.7z: [\d,]+ bytes unpack to 2,000,005 and more, over 100 times"):
        texts(tmp_path / "a.7z")
    assert not list(cache.rglob("*.txt"))


def test_an_archive_that_understates_what_it_unpacks_to_is_refused(tmp_path, cache, monkeypatch):
    (tmp_path / "a.7z").write_bytes(CONTENT)
    monkeypatch.setattr(archive, "ALWAYS_UNPACKED", 1000)
    monkeypatch.setattr(archive, "MOST_TIMES", 0)
    with pytest.raises(ValueError, match=r"a\.7z unpacks to more than it says of itself"):
        texts(tmp_path / "a.7z")
    assert not list(cache.rglob("*.txt"))


def test_a_lack_of_room_is_reported_before_anything_is_unpacked(tmp_path, cache, monkeypatch):
    (tmp_path / "a.7z").write_bytes(CONTENT)
    monkeypatch.setattr(archive.shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(100, 90, 10))
    with pytest.raises(OSError, match="there is room for 10") as error:
        texts(tmp_path / "a.7z")
    assert error.value.errno == errno.ENOSPC and not list(cache.rglob("*.txt"))


def test_a_volume_of_any_number_costs_no_time(tmp_path):
    volumes = cut(tmp_path / "a")
    (tmp_path / "a" / ("stories.7z." + "9" * 30)).write_bytes(b"x")
    with pytest.raises(ValueError, match=rf"{len(volumes) + 1:03d} is missing, but stories.7z.9+ is there"):
        texts(volumes[0])
