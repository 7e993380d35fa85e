"""One shard of a tarred corpus: tar, index, manifest, and last its record; see ``sharding`` for the layout."""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from nemo_slam.data.audio import AudioError
from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.manifest import Files, RowError, parse_json
from nemo_slam.data.shard_audio import make_member
from nemo_slam.data.shard_files import describe_files, sizes_agree, write_json, write_whole


def make_shard(
    manifests: Sequence[Path],
    places: np.ndarray,
    first: int,
    out: Path,
    shard: int,
    codec: str,
    identity: str,
    probes: np.ndarray,
) -> None:
    """One shard: tar, index, manifest, and last the record with their checksums.

    Args:
        places: *Shape:* (n, 4), of its rows.
        first: how many rows lie in the shards before, for the members' names.
        codec: see ``ShardSettings``.
        identity: of the manifests and all settings.
        probes: *Shape:* (m, 4), of rows from all over the corpus.

    Raises:
        DataError: rows cannot be read, and what could be read before cannot either: a file system that is gone must not
            pass for so many bad rows, since a shard is made once.
    """
    files, bad, lines, offsets, seconds = Files(manifests), [], [], [], 0.0
    good = None
    part = out / f"audio_{shard}.tar.part-{os.getpid()}"
    with tarfile.open(part, "w", format=tarfile.GNU_FORMAT) as tar:
        for position, (number, line, offset, size) in enumerate(places.tolist()):
            raw = files.read(number, offset, size)
            try:
                name, blob = make_member(manifests[number], raw, first + position, codec)
            except (RowError, AudioError, OSError) as error:
                bad.append({"file": str(manifests[number]), "line": line, "reason": str(error)})
                continue
            good = position if good is None else good
            # No time, owner or mode of the source: the same bytes whenever and by whomever it is made.
            member = tarfile.TarInfo(name)
            member.size = len(blob)
            offsets.append(tar.offset)
            tar.addfile(member, io.BytesIO(blob))
            entry = parse_json(raw)
            if entry.get("offset") is not None:
                entry["source_audio_offset"] = entry.pop("offset")
            lines.append(json.dumps({**entry, "audio_filepath": name, "shard_id": shard}, ensure_ascii=False) + "\n")
            seconds += entry["duration"]
    known = probes if good is None else places[good : good + 1]
    if bad and not any(_readable_row(manifests, files, place, codec) for place in known.tolist()):
        part.unlink()
        raise DataError(
            f"shard {shard}: {len(bad)} of {len(places)} rows cannot be read, the first: {bad[0]['reason']}; nor can "
            "others now. Is the audio where the manifest says, its file system still there? The same command goes on"
        )
    index = np.array([*offsets, part.stat().st_size], "<u8").tobytes()
    tar_path = out / f"audio_{shard}.tar"
    manifest_path = out / "sharded_manifests" / f"manifest_{shard}.json"
    index_path = out / f"audio_{shard}.tar.idx"
    with open(part, "rb") as file:
        os.fsync(file.fileno())
    part.replace(tar_path)
    write_whole(index_path, index)
    write_whole(manifest_path, "".join(lines).encode())
    record = {
        "identity": identity,
        "rows": len(lines),
        "seconds": seconds,
        "bad": bad,
        "files": describe_files(out, (tar_path, index_path, manifest_path)),
    }
    write_json(record_path(out, shard), record)


def _readable_row(manifests: Sequence[Path], files: Files, place: Sequence[int], codec: str) -> bool:
    number, _, offset, size = place
    try:
        make_member(manifests[number], files.read(number, offset, size), 0, codec)
    except (RowError, AudioError, OSError):
        return False
    return True


def record_path(out: Path, shard: int) -> Path:
    """The file that says that a shard is made, and of what: written last."""
    return out / ".records" / f"{shard}.json"


def is_made(out: Path, shard: int, identity: str) -> bool:
    """Whether there is a record of a shard of these manifests and settings, and its files have their sizes."""
    path = record_path(out, shard)
    if not path.exists():
        return False
    record = json.loads(path.read_text())
    return record["identity"] == identity and sizes_agree(out, record["files"])
