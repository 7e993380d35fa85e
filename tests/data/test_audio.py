"""Reading audio: rates, channels, offsets, and every way in which a file can be unusable."""

from __future__ import annotations

import os

import numpy as np
import pytest
import soundfile

from nemo_slam.data.audio import AudioError, load_audio


def sine(rate: int, seconds: float, frequency: float = 440.0) -> np.ndarray:
    return np.sin(2 * np.pi * frequency * np.arange(round(rate * seconds)) / rate).astype(np.float32)


@pytest.mark.parametrize("rate", [8_000, 16_000, 22_050, 44_100, 48_000])
def test_any_rate_becomes_16_khz(tmp_path, rate):
    soundfile.write(tmp_path / "a.wav", 0.5 * sine(rate, 1.0), rate, subtype="FLOAT")
    audio = load_audio(tmp_path / "a.wav")
    assert audio.dtype == np.float32
    assert abs(len(audio) - 16_000) <= 1
    inner = slice(2000, 14_000)  # the resampler's filter rings at the ends
    np.testing.assert_allclose(audio[inner], 0.5 * sine(16_000, 1.0)[inner], atol=5e-3)


def test_channels_are_averaged(tmp_path):
    left, right = sine(16_000, 0.5), sine(16_000, 0.5, 1000.0)
    soundfile.write(tmp_path / "a.wav", np.stack([left, right], 1), 16_000, subtype="FLOAT")
    np.testing.assert_allclose(load_audio(tmp_path / "a.wav"), (left + right) / 2, atol=1e-7)


@pytest.mark.parametrize("suffix", ["wav", "flac", "ogg"])
def test_offset_and_duration_select_a_stretch(tmp_path, suffix):
    steps = np.repeat(np.array([0.1, 0.2, 0.3, 0.4], np.float32), 16_000)
    soundfile.write(tmp_path / f"a.{suffix}", steps, 16_000)
    audio = load_audio(tmp_path / f"a.{suffix}", offset=2.0, duration=0.5)
    assert len(audio) == 8000
    assert np.median(audio) == pytest.approx(0.3, abs=0.02)


def test_bytes_read_like_the_file(tmp_path):
    soundfile.write(tmp_path / "a.flac", sine(8_000, 0.7), 8_000)
    np.testing.assert_array_equal(load_audio((tmp_path / "a.flac").read_bytes()), load_audio(tmp_path / "a.flac"))


def test_a_little_may_be_missing_but_not_more_than_a_tenth(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(16_000, 1.0), 16_000)
    assert len(load_audio(tmp_path / "a.wav", duration=1.09)) == 16_000
    with pytest.raises(AudioError, match=r"a\.wav: truncated: 1\.000 s of audio where 1\.200 s are said"):
        load_audio(tmp_path / "a.wav", duration=1.2)


@pytest.mark.parametrize("suffix", ["wav", "flac"])
def test_truncated_file(tmp_path, suffix):
    path = tmp_path / f"a.{suffix}"
    soundfile.write(path, np.random.default_rng(0).normal(0, 0.1, 32_000), 16_000)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(AudioError, match=r"a\.(wav|flac): (truncated|not readable)"):
        load_audio(path, duration=2.0)


def test_offset_past_the_end(tmp_path):
    soundfile.write(tmp_path / "a.wav", sine(16_000, 1.0), 16_000)
    with pytest.raises(AudioError, match=r"offset 1 s lies past the end of the file \(1\.000 s\)"):
        load_audio(tmp_path / "a.wav", offset=1.0, duration=0.5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_samples_that_are_not_numbers(tmp_path, value):
    samples = sine(16_000, 0.5)
    samples[100] = value
    soundfile.write(tmp_path / "a.wav", samples, 16_000, subtype="FLOAT")
    with pytest.raises(AudioError, match="NaN or infinite"):
        load_audio(tmp_path / "a.wav")


def test_no_samples(tmp_path):
    soundfile.write(tmp_path / "a.wav", np.zeros(0, np.float32), 16_000)
    with pytest.raises(AudioError, match="holds no samples"):
        load_audio(tmp_path / "a.wav")


def test_what_is_no_audio_file(tmp_path):
    (tmp_path / "text.wav").write_text("this is a text, not a waveform")
    (tmp_path / "empty.wav").touch()
    (tmp_path / "a.raw").write_bytes(b"\0" * 100)  # libsndfile wants to be told what is in a .raw file
    (tmp_path / "folder.wav").mkdir()
    os.mkfifo(tmp_path / "pipe.wav")
    for name, reason in {
        "text.wav": "not readable as audio",
        "a.raw": "not readable as audio",
        "empty.wav": "the file is empty",
        "folder.wav": "is not a file",
        "pipe.wav": "is not a file",
        "missing.wav": "cannot be opened .No such file",
        "nul\0.wav": "cannot be opened",
    }.items():
        with pytest.raises(AudioError, match=reason) as error:
            load_audio(str(tmp_path / name))
        assert name in str(error.value)


def test_only_the_stretch_is_read_of_a_long_file(tmp_path, monkeypatch):
    """A row of a second in a file of two hours costs a second."""
    with soundfile.SoundFile(tmp_path / "a.wav", "w", 8000, 1, "PCM_U8") as file:
        for _ in range(120):
            file.write(np.zeros(60 * 8000, np.float32))
    asked = []
    read = soundfile.SoundFile.read
    monkeypatch.setattr(soundfile.SoundFile, "read", lambda self, n, **kw: asked.append(n) or read(self, n, **kw))
    assert len(load_audio(tmp_path / "a.wav", offset=7000.0, duration=1.0)) == 16_000
    assert asked == [8000]
