"""lhotse Shar where it lies, here or in an object store: NeMo manifests whose rows name members of its tar files.

No audio is copied. With these manifests a Shar is tarred audio like any other: an index of it says where each
utterance lies, so any step's batch is found without reading those before it.
"""

from __future__ import annotations

import json
import re
import tarfile
from pathlib import Path
from typing import Any

import fsspec

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.remote import ask, is_remote, with_file
from nemo_slam.data.shard_files import write_whole

_SHARD = re.compile(r"(cuts|recording)(\.\d+)?\.(jsonl|jsonl\.gz|tar)")
_NO_AUDIO = {".nodata", ".nometa", ".json"}


def shar_manifests(source: str, out: Path) -> dict[str, Any]:
    """Writes ``out/manifest.NUMBER.json`` for each shard.

    Args:
        source: a folder that lhotse's SharWriter has filled, with ``recording`` among its fields, or its URL.
        out: a folder here.

    Returns:
        `rows`, `hours`, `without_audio` (cuts), and `manifests` and `tars`, the two values for the config.

    Raises:
        DataError: no Shar there, or one without audio; a line of its cuts is no cut.
    """
    shards = find_shards(source)
    out.mkdir(parents=True, exist_ok=True)
    rows, seconds, without = 0, 0.0, 0
    for number, (tag, (cuts, tar)) in enumerate(shards.items()):
        suffix, lines = None, []
        for cut in _read_cuts(cuts):
            if cut.get("recording") is None:
                without += 1
                continue
            suffix = suffix or _suffix(tar)
            lines.append(json.dumps(_row(cut, suffix, number), ensure_ascii=False) + "\n")
            seconds += cut["duration"]
        write_whole(out / f"manifest{tag}.json", "".join(lines).encode())
        rows += len(lines)
    folder = next(iter(shards.values()))[1].rpartition("/")[0]
    return {
        "rows": rows,
        "hours": seconds / 3600,
        "without_audio": without,
        "manifests": pattern(f"{out.absolute()}/manifest", [*shards], ".json"),
        "tars": pattern(f"{folder}/recording", [*shards], ".tar"),
    }


def find_shards(source: str) -> dict[str, tuple[str, str]]:
    """The cuts and the audio of each shard, by what tells shards apart in their names: ``.000007``, or nothing."""
    if is_remote(source):
        names = ask(source, lambda fs, path: [fs.unstrip_protocol(name) for name in fs.ls(path, detail=False)])
    else:
        names = [str(path) for path in Path(source).absolute().iterdir()] if Path(source).is_dir() else []
    found: dict[str, dict[str, str]] = {"cuts": {}, "recording": {}}
    for name in sorted(names):
        if match := _SHARD.fullmatch(name.rpartition("/")[2]):
            found[match[1]][match[2] or ""] = name
    if not found["cuts"] or found["cuts"].keys() != found["recording"].keys():
        raise DataError(
            f"{source} is no lhotse Shar with audio: {len(found['cuts'])} files cuts.NUMBER.jsonl.gz and "
            f"{len(found['recording'])} files recording.NUMBER.tar, expected as many, with the same numbers"
        )
    return {tag: (found["cuts"][tag], found["recording"][tag]) for tag in found["cuts"]}


def pattern(stem: str, tags: list[str], suffix: str) -> str:
    """One word for many files, as configs take it.

    >>> pattern("s3://b/recording", [".000000", ".000001"], ".tar")
    's3://b/recording._OP_000000..000001_CL_.tar'
    """
    numbers = [tag[1:] for tag in tags]
    if len(tags) == 1:
        return f"{stem}{tags[0]}{suffix}"
    if [int(n) for n in numbers] == list(range(int(numbers[0]), int(numbers[-1]) + 1)):
        return f"{stem}._OP_{numbers[0]}..{numbers[-1]}_CL_{suffix}"
    return f"[{','.join(stem + tag + suffix for tag in tags)}]"


def _read_cuts(url: str) -> list[dict[str, Any]]:
    def read(fs: Any, path: str) -> list[dict[str, Any]]:
        cuts = []
        with fsspec.open(url, "rt", compression="infer", encoding="utf-8") as file:
            for line, raw in enumerate(file, start=1):
                try:
                    cut = json.loads(raw)
                    if not (isinstance(cut["id"], str) and cut["duration"] > 0):
                        raise ValueError("no id, or no duration")
                except (ValueError, KeyError, TypeError) as error:
                    raise DataError(f"{url}:{line}: not a cut of lhotse ({error})") from None
                cuts.append(cut)
        return cuts

    return ask(url, read)


def _suffix(tar: str) -> str:
    """Of the members that hold audio: Shar names them by the cut and the codec."""

    def first(file: Any, size: int) -> str:
        with tarfile.open(fileobj=file, mode="r:") as members:
            for member in members:
                suffix = Path(member.name).suffix
                if suffix not in _NO_AUDIO:
                    return suffix
        raise DataError(f"{tar} holds no audio, but its cuts say so")

    return with_file(tar, first)


def _row(cut: dict[str, Any], suffix: str, shard: int) -> dict[str, Any]:
    """A cut's line of the manifest. SharWriter has cut its audio out: there is no offset any more."""
    said = sorted(cut.get("supervisions") or [], key=lambda supervision: supervision.get("start", 0.0))
    row = {"audio_filepath": f"{cut['id']}{suffix}", "duration": cut["duration"], "shard_id": shard}
    if texts := [supervision["text"] for supervision in said if supervision.get("text")]:
        row["text"] = " ".join(texts)
    if languages := {supervision["language"] for supervision in said if supervision.get("language")}:
        row["lang"] = sorted(languages)[0]
    return row
