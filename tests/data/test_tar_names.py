"""How rows of manifests find members of tar files: as NeMo names them, and never another recording's.

A member's content says what it is, so what a row finds is read, not computed.
"""

from __future__ import annotations

import io
import os
import tarfile
import tracemalloc
from pathlib import Path

import pytest

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import Row, RowError
from nemo_slam.data.tar import TarMembers


def write_tar(path: Path, members: dict[str, str]) -> Path:
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info, data = tarfile.TarInfo(name), content.encode()
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def row(name: str, shard_id: int | None = None) -> Row:
    return Row(name, 1.0, shard_id=shard_id)


class Shards:
    """Tar files and their members' content by row."""

    def __init__(self, folder: Path, *shards: dict[str, str]):
        self.paths = [write_tar(folder / f"audio_{i}.tar", members) for i, members in enumerate(shards)]
        self.members = TarMembers(self.paths)

    def read(self, name: str, shard_id: int | None = None) -> str:
        tar, offset, size = self.members.find(row(name, shard_id))
        return self.paths[tar].read_bytes()[offset : offset + size].decode()


def nemo_shard(recordings: list[str], shard: int, codec: str | None) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """A shard as NeMo's convert_to_tarred_audio_dataset.py makes it of rows of recordings (no --slice_with_offset).

    Folders and full stops become underscores; a recording is stored once a shard, and its further rows are -sub<n>,
    counted from 1 in each shard; --force_codec gives members another extension, but not rows. Returns the members, and
    each row's name with the content that it must find.
    """
    members: dict[str, str] = {}
    rows, count = [], {}
    for recording in recordings:
        base, extension = os.path.splitext(recording)
        base = base.replace("/", "_").replace(".", "_")
        content = f"{recording} of shard {shard}"
        number = count[recording] = count.get(recording, -1) + 1
        if number == 0:
            members[f"{base}.{codec}" if codec else base + extension] = content
        rows.append((f"{base}-sub{number}{extension}" if number else base + extension, content))
    return members, rows


@pytest.mark.parametrize("codec", [None, "flac"])
def test_shards_that_nemo_makes(tmp_path, codec):
    """One recording in several shards, too: NeMo shuffles rows, not recordings."""
    wanted = [
        ["/data/spk1/utt.wav", "/data/spk2/utt.wav", "/data/long.1.wav", "/data/long.1.wav", "/data/long.1.wav"],
        ["/data/long.1.wav", "/data/spk3/utt.wav", "/data/long.1.wav"],
    ]
    made = [nemo_shard(recordings, shard, codec) for shard, recordings in enumerate(wanted)]
    shards = Shards(tmp_path, *(members for members, _ in made))
    rows = [(name, shard, content) for shard, (_, found) in enumerate(made) for name, content in found]
    assert [name for name, _, _ in rows[2:5]] == ["_data_long_1.wav", "_data_long_1-sub1.wav", "_data_long_1-sub2.wav"]
    assert [shards.read(name, shard) for name, shard, _ in rows] == [content for _, _, content in rows]


@pytest.mark.parametrize(
    ("name", "members", "expected"),
    [
        ("spk1/utt.wav", ["spk1/utt.wav", "spk2/utt.wav", "utt.wav"], "spk1/utt.wav"),
        ("/data/spk1/utt.wav", ["spk1/utt.wav", "spk2/utt.wav", "utt.wav"], "spk1/utt.wav"),
        ("/data/spk1/utt.wav", ["data/spk1/utt.wav"], "data/spk1/utt.wav"),
        ("../wavs/utt.wav", ["./utt.wav"], "./utt.wav"),
        ("utt.wav", ["./utt.wav"], "./utt.wav"),
        ("utt.wav", ["utt.flac", "utt.wav"], "utt.wav"),
        ("spk1/utt.wav", ["utt.flac", "spk2/utt.wav"], "utt.flac"),
        ("x-sub2.wav", ["x.wav"], "x.wav"),
        ("x-sub2.wav", ["x-sub2.wav", "x.wav"], "x-sub2.wav"),
        ("\u00fc\u4e00.wav", ["\u00fc\u4e00.wav"], "\u00fc\u4e00.wav"),
        ("s/" * 80 + "utt.wav", ["s/" * 80 + "utt.wav"], "s/" * 80 + "utt.wav"),
    ],
)
def test_the_member_of_a_row(tmp_path, name, members, expected):
    assert Shards(tmp_path, {m: m for m in members}).read(name) == expected


@pytest.mark.parametrize(
    ("name", "members"),
    [
        ("spk1/utt.wav", ["spk2/utt.wav"]),
        ("spk1/utt-sub1.wav", ["spk2/utt.wav"]),
        ("utt.wav", ["spk2/utt.wav"]),
        ("spk1/utt.wav", ["1/utt.wav"]),
        ("utt.wav", ["utt2.wav", "autt.wav"]),
        ("utt.wav", []),
    ],
)
def test_a_row_is_not_answered_by_another_recording(tmp_path, name, members):
    shards = Shards(tmp_path, {}, {m: m for m in members})
    with pytest.raises(
        RowError, match=rf"^{name}: in none of the tar files \(its shard is .*audio_1\.tar\): .*tar -tf"
    ):
        shards.read(name, 1)


@pytest.mark.parametrize(
    "names", [("spk1/utt.wav", "spk2/utt.wav"), ("utt.wav", "spk2/utt.wav"), ("utt.wav", "utt.ogg")]
)
def test_two_rows_do_not_share_a_member(tmp_path, names):
    """Whichever comes first: the other's audio may be missing, or not be there under this name."""
    for first, second in (names, names[::-1]):
        shards = Shards(tmp_path, {}, {"utt.wav": ""})
        shards.read(first)
        shards.read(first.replace("utt.", "utt-sub1."))
        shards.read(first)
        with pytest.raises(DataError, match=rf"^{second}: in .*audio_1\.tar .* a row of another name .*tar -tf"):
            shards.read(second)


def test_members_between_which_nothing_decides(tmp_path):
    shards = Shards(tmp_path, {"a.wav": "0", "b.wav": ""}, {"a.wav": "1", "b.flac": ""}, {"a.wav": "2"})
    assert [shards.read("a.wav", shard) for shard in (2, 0, 1)] == ["2", "0", "1"]
    for name, shard in [("a.wav", None), ("a-sub1.wav", None), ("b.ogg", None)]:
        with pytest.raises(
            RowError, match=rf"^{name}: fits \d members of the tar files, in .*audio_0\.tar; .*shard_id"
        ):
            shards.read(name, shard)
    assert shards.read("b.wav") == ""


def test_a_shard_without_the_member_is_not_answered_by_another_shard(tmp_path):
    """Names that begin anew in each shard: one that is cut off, one without the member, one that is not given."""
    shards = Shards(tmp_path, {"1.wav": "0"}, {"1.wav": "1"}, {"2.wav": ""})
    assert [shards.read("1.wav", shard) for shard in (0, 1)] == ["0", "1"]
    os.truncate(shards.paths[1], 100)
    shards.members = TarMembers(shards.paths)
    assert shards.read("1.wav", 0) == shards.read("1.wav") == "0"
    for shard, reason in [(1, r"its shard is .*1\.tar; not read"), (2, "its shard is"), (3, "none .* shard, 3")]:
        with pytest.raises(RowError, match=rf"^1\.wav: in none of the tar files \({reason}"):
            shards.read("1.wav", shard)


def test_numbers_that_are_not_those_of_shards(tmp_path):
    paths = [write_tar(tmp_path / f"{name}.tar", {f"{name}.wav": ""}) for name in ("audio_0_of_8", "audio_1_of_8")]
    assert [TarMembers(paths).find(row(f"audio_{i}_of_8.wav", i))[0] for i in range(2)] == [0, 1]


def test_memory_a_member(tmp_path, monkeypatch):
    """Names of 80 characters take none of it: 15 million members fit."""
    monkeypatch.setattr("nemo_slam.data.tar._AT_ONCE", 1)  # an open file's buffer is as large as its file system likes
    members, shards = 4000, 5
    paths = []
    for shard in range(shards):
        with open(tmp_path / f"audio_{shard}.tar", "wb") as file:
            for i in range(members // shards):
                file.write(tarfile.TarInfo(f"{'n' * 60}_{shard:05d}_{i:09d}.flac").tobuf())
            file.write(bytes(1024))
        paths.append(tmp_path / file.name)
    TarMembers(paths[:1])  # what is loaded on first use is not counted
    tracemalloc.start()
    try:
        found = TarMembers(paths)
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert found.find(row(f"{'n' * 60}_00003_000000799.flac"))[:2] == (3, 800 * 512)
    assert held / members < 50
    assert peak / members < 100
