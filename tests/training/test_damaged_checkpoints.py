"""A checkpoint that is not as it was written is refused by name; one that cannot be written leaves the others whole."""

from __future__ import annotations

import errno
import tarfile
import zipfile
from datetime import timedelta
from pathlib import Path

import pytest
import torch

from nemo_slam.training import checkpoints as module
from nemo_slam.training import guards
from nemo_slam.training.checkpoints import StreamedCheckpointIO
from nemo_slam.training.guards import disk_advice
from nemo_slam.training.initialise import read_weights
from nemo_slam.training.parallel import ShardedStrategy


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    path = tmp_path / "step_000000004.ckpt"
    StreamedCheckpointIO().save_checkpoint({"weights": torch.arange(4096.0), "step": 4}, path)
    return path


def test_a_whole_one_is_read(saved):
    found = StreamedCheckpointIO().load_checkpoint(saved)
    assert found["step"] == 4
    assert torch.equal(found["weights"], torch.arange(4096.0))


def test_one_changed_bit_of_a_weight_is_noticed(saved):
    """torch alone reads it without a word, as the last lines show."""
    with zipfile.ZipFile(saved) as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
    content = bytearray(saved.read_bytes())
    content[largest.header_offset + 8000] ^= 1
    saved.write_bytes(content)
    sharded = ShardedStrategy(1, timedelta(seconds=1))  # which reads the file itself
    sharded.checkpoint_io = StreamedCheckpointIO()
    for reader in (StreamedCheckpointIO(), sharded):
        message = r"step_000000004\.ckpt is damaged .*remove it, and the same command resumes"
        with pytest.raises(ValueError, match=message):
            reader.load_checkpoint(saved)
    assert not torch.equal(torch.load(saved)["weights"], torch.arange(4096.0))


@pytest.mark.parametrize("name", ["start.nemo", "start.ckpt"])
def test_a_start_from_a_changed_bit_is_refused(tmp_path, name):
    """init_from, by a .nemo too: a tar with such a file in it."""
    inner = tmp_path / "model_weights.ckpt"
    weights = {"layer.weight": torch.arange(4096.0)}
    torch.save({"state_dict": weights} if name.endswith(".ckpt") else weights, inner)

    def pack(path):
        if path.suffix == ".ckpt":
            inner.rename(path)
            return
        with tarfile.open(path, "w:") as archive:
            archive.add(inner, "./model_weights.ckpt")

    path = tmp_path / name
    pack(path)
    assert torch.equal(read_weights(path)["layer.weight"], weights["layer.weight"])
    content = bytearray(path.read_bytes())
    content[content.index(torch.arange(2000.0, 2100.0).numpy().tobytes())] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError, match=rf"init_from: .*{name} is damaged \(.*checksum\)"):
        read_weights(path)
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=rf"init_from: .*{name} is (damaged|not a \.nemo archive)"):
        read_weights(path)


@pytest.mark.parametrize("kind", [zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_part_that_claims_to_be_compressed_is_named(saved, kind):
    content = saved.read_bytes()
    entry = content.index(b"PK\x01\x02")  # of the first member, in the archive's directory
    saved.write_bytes(content[: entry + 10] + bytes([kind]) + content[entry + 11 :])
    with pytest.raises(ValueError, match=r"step_000000004\.ckpt is damaged"):
        StreamedCheckpointIO().load_checkpoint(saved)


@pytest.mark.parametrize("share", [0.0, 0.01, 0.5, 0.999])
def test_one_cut_short_is_named(saved, share):
    content = saved.read_bytes()
    saved.write_bytes(content[: int(len(content) * share)])
    with pytest.raises(ValueError, match=r"step_000000004\.ckpt is damaged"):
        StreamedCheckpointIO().load_checkpoint(saved)


def test_rubbish_anywhere_is_never_read_as_something_else(saved):
    generator = torch.Generator().manual_seed(0)
    content = saved.read_bytes()
    for _ in range(200):
        at = int(torch.randint(len(content), (), generator=generator))
        saved.write_bytes(content[:at] + bytes([content[at] ^ 0x55]) + content[at + 1 :])
        try:
            found = StreamedCheckpointIO().load_checkpoint(saved)
        except ValueError as error:
            named = "is damaged" in str(error) and saved.name in str(error)
            assert named, error  # noqa: PT017
            continue
        assert found["step"] == 4
        assert torch.equal(found["weights"], torch.arange(4096.0))


def test_a_missing_one_stays_a_missing_file(tmp_path):
    with pytest.raises(FileNotFoundError):
        StreamedCheckpointIO().load_checkpoint(tmp_path / "step_000000001.ckpt")


WRITER = RuntimeError(
    "[enforce fail at inline_container.cc:672] . unexpected pos 9 vs 0"
)  # what torch makes of a full disk


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), WRITER])
def test_no_room_names_the_file_and_leaves_no_part(tmp_path, monkeypatch, error):
    def full(checkpoint, path):
        Path(path).write_bytes(b"the beginning")
        raise error

    monkeypatch.setattr(module.torch, "save", full)
    part = tmp_path / "step_000000008.ckpt.part"
    with pytest.raises(OSError, match=r"cannot write the checkpoint .*step_000000008.*MiB are left.*Make room"):
        StreamedCheckpointIO().save_checkpoint({}, part)
    assert not part.exists()


def test_what_is_no_error_of_writing_passes(tmp_path, monkeypatch):
    def fail(checkpoint, path):
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    monkeypatch.setattr(module.torch, "save", fail)
    with pytest.raises(RuntimeError, match=r"^CUDA error"):
        StreamedCheckpointIO().save_checkpoint({}, tmp_path / "step_000000008.ckpt.part")


def test_a_full_disk_is_named_and_other_errors_pass(tmp_path):
    with (
        pytest.raises(OSError, match=rf"No space left on device: {tmp_path} has .* MiB.*/dev/shm.*Make room"),
        disk_advice(tmp_path),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(FileNotFoundError, match="gone"), disk_advice(tmp_path):
        raise FileNotFoundError(errno.ENOENT, "gone")


def test_a_full_disk_is_named_without_shared_memory_or_folder(tmp_path, monkeypatch):
    """The advice looks at what is there: nothing of its own may fail in the place of the error."""
    monkeypatch.setattr(guards, "SHARED_MEMORY", tmp_path / "shm")
    with (
        pytest.raises(OSError, match=rf"left on device: {tmp_path} has [\d.]+ MiB left\. Make room; the same") as found,
        disk_advice(tmp_path / "runs" / "name"),
    ):
        raise OSError(errno.ENOSPC, "No space left on device")
    assert "shm" not in str(found.value)
    assert found.value.__cause__.errno == errno.ENOSPC
