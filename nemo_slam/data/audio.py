"""Audio in: any file that libsndfile reads, at any rate and channel count, to float32 mono at 16 kHz."""

from __future__ import annotations

import io
import os
import stat
from pathlib import Path

import numpy as np
import soundfile
import soxr

from nemo_slam.config import ConfigError

SAMPLE_RATE = 16_000

# Manifests round durations, and lossy codecs pad or trim a frame or two: this much may be missing, in seconds.
MISSING_TOLERANCE = 0.1


class AudioError(ValueError):
    """Audio that cannot be used; the message names the file and the reason."""


def check_sample_rate(rate: float, key: str) -> None:
    """Features must be of the rate that audio is read at, or they would take it for faster or slower speech.

    Raises:
        ConfigError: they are not.
    """
    if rate != SAMPLE_RATE:
        raise ConfigError(
            f"{key} is {rate}, but all audio is read as {SAMPLE_RATE} Hz: files of other rates are resampled, so leave "
            f"it at {SAMPLE_RATE}"
        )


def load_audio(
    source: str | Path | bytes, *, offset: float = 0.0, duration: float | None = None, name: str | None = None
) -> np.ndarray:
    """Reads a stretch of a file as mono at 16 kHz. Channels are averaged.

    Args:
        source: a path, or the bytes of a file.
        offset: where to start, in seconds.
        duration: how much to read, in seconds; None for all that follows.
        name: what to call the source in an error, for bytes.

    Returns:
        (T,) float32, T >= 1.

    Raises:
        AudioError: the file is missing, empty or not audio; it ends more than 0.1 s before offset + duration; the
            offset lies past its end; a sample is NaN or infinite.
    """
    name = name or (str(source) if isinstance(source, (str, Path)) else "audio bytes")
    samples, rate = _read(source, offset, duration, name)
    if not np.isfinite(samples).all():
        raise AudioError(f"{name}: holds samples that are NaN or infinite")
    mono = samples[:, 0] if samples.shape[1] == 1 else samples.mean(axis=1, dtype=np.float32)
    if rate != SAMPLE_RATE:
        try:
            mono = soxr.resample(mono, rate, SAMPLE_RATE)
        except (ValueError, RuntimeError) as error:
            raise AudioError(f"{name}: cannot be resampled from {rate} Hz ({error})") from None
    if len(mono) == 0:
        raise AudioError(f"{name}: no sample left at {SAMPLE_RATE} Hz")
    return np.ascontiguousarray(mono, dtype=np.float32)


def _size(path: str | Path, name: str) -> int:
    """Bytes of a regular file; a pipe would be waited for without end."""
    try:
        status = os.stat(path)
    except (OSError, ValueError) as error:
        raise AudioError(f"{name}: cannot be opened ({getattr(error, 'strerror', None) or error})") from None
    if not stat.S_ISREG(status.st_mode):
        raise AudioError(f"{name}: is not a file")
    return status.st_size


def _read(source, offset: float, duration: float | None, name: str) -> tuple[np.ndarray, int]:
    """The stretch as it is stored: samples (n, channels) float32, and the rate."""
    is_bytes = isinstance(source, (bytes, bytearray))
    if (len(source) if is_bytes else _size(source, name)) == 0:
        raise AudioError(f"{name}: the file is empty")
    try:
        with soundfile.SoundFile(io.BytesIO(source) if is_bytes else source) as file:
            start = round(offset * file.samplerate)
            if start > 0 and start >= file.frames:
                raise AudioError(
                    f"{name}: offset {offset:g} s lies past the end of the file ({file.frames / file.samplerate:.3f} s)"
                )
            wanted = file.frames - start if duration is None else round(duration * file.samplerate)
            if start > 0:
                file.seek(start)
            samples = file.read(min(wanted, file.frames - start), dtype="float32", always_2d=True)
            rate = file.samplerate
    except AudioError:
        raise
    except (soundfile.SoundFileError, OSError, RuntimeError, TypeError, ValueError) as error:
        # libsndfile's own sentence starts with "Error opening <file>: ", which says the name twice.
        raise AudioError(f"{name}: not readable as audio ({str(error).rsplit(': ', 1)[-1]})") from None
    if len(samples) == 0:
        raise AudioError(f"{name}: holds no samples")
    missing = (wanted - len(samples)) / rate
    if missing > MISSING_TOLERANCE:
        raise AudioError(
            f"{name}: truncated: {len(samples) / rate:.3f} s of audio where {wanted / rate:.3f} s are said"
        )
    return samples, rate
