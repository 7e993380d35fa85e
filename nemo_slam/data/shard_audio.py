"""The audio of a manifest's row as a member of a tar file: as it is, or cut out of a longer recording."""

from __future__ import annotations

import io
import re
from pathlib import Path

import numpy as np
import soundfile

from nemo_slam.data.audio import MISSING_TOLERANCE, AudioError
from nemo_slam.data.manifest import audio_path, parse_row

_SIXTEEN_BITS = ("PCM_S8", "PCM_U8", "PCM_16", "ULAW", "ALAW")
_MORE_BITS = ("PCM_24", "PCM_32", "ALAC_16", "ALAC_20", "ALAC_24", "ALAC_32")


def make_member(manifest: Path, raw: bytes, number: int, codec: str) -> tuple[str, bytes]:
    """Name and bytes of a row's audio. NeMo splits names at the first full stop, and gives ``-sub`` a meaning."""
    row = parse_row(raw, need_text=False)
    path = audio_path(manifest, row)
    stem = re.sub(r"[^\w-]", "_", path.stem).replace("-sub", "_sub")[:80]
    name = f"{number:09d}_{stem}"
    try:
        with soundfile.SoundFile(path) as file:
            start, wanted = round(row.offset * file.samplerate), round(row.duration * file.samplerate)
            tolerance = round(MISSING_TOLERANCE * file.samplerate)
            if start + wanted > file.frames + tolerance:
                raise AudioError(
                    f"{path}: {file.frames / file.samplerate:.3f} s long, the row ends at "
                    f"{row.offset + row.duration:.3f} s"
                )
            whole = start == 0 and file.frames <= wanted + tolerance
            suffix = path.suffix.lower()
            if whole and (codec == "keep" or suffix == ".flac"):
                return name + suffix, path.read_bytes()
            if start > 0:
                file.seek(start)
            encoded = _flac(file, file.frames - start if whole else min(wanted, file.frames - start), path)
    except AudioError:
        raise
    except (soundfile.SoundFileError, RuntimeError, TypeError, ValueError) as error:
        raise AudioError(f"{path}: not readable as audio ({str(error).rsplit(': ', 1)[-1]})") from None
    return f"{name}.flac", encoded


def _flac(file: soundfile.SoundFile, frames: int, path: Path) -> bytes:
    """The next frames as a FLAC file: 16 bits where the source has no more, else 24, beyond full scale clipped."""
    exact = file.subtype in _SIXTEEN_BITS
    if exact or file.subtype in _MORE_BITS:
        samples = file.read(max(frames, 0), dtype="int16" if exact else "int32", always_2d=True)
    else:
        # Asked for integers, libsndfile hands over what is stored as floating point unscaled: silence, of -1 to 1.
        values = file.read(max(frames, 0), dtype="float64", always_2d=True)
        if not np.isfinite(values).all():
            raise AudioError(f"{path}: holds samples that are NaN or infinite")
        samples = np.clip(np.round(values * 2**23), -(2**23), 2**23 - 1).astype(np.int32) << 8
    if len(samples) == 0:
        raise AudioError(f"{path}: holds no samples there")
    encoded = io.BytesIO()
    soundfile.write(encoded, samples, file.samplerate, format="FLAC", subtype="PCM_16" if exact else "PCM_24")
    return encoded.getvalue()
