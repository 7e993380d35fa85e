"""Speech from eSpeak NG's shared library (PyPI package espeakng-loader; neither root nor a system package)."""

from __future__ import annotations

import ctypes

import numpy as np

from nemo_slam.data.corpora.files import SAMPLE_RATE, CorpusError

# speak_lib.h
_SYNCHRONOUS = 2
_DONT_EXIT = 0x8000  # report a failure instead of ending the process
_UTF8 = 1
_RATE, _PITCH = 1, 3
_POSITION_CHARACTER = 1
_CALLBACK = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.c_void_p)


class Espeak:
    """eSpeak NG. The library keeps state from one text to the next: the same calls in the same order from the start of
    a process give the same samples, a repeated call need not.

    >>> Espeak().say("hello world", voice="en-us+f2").dtype   # doctest: +SKIP
    dtype('int16')

    Raises:
        CorpusError: the package is missing or cannot be used.
    """

    def __init__(self) -> None:
        try:
            import espeakng_loader
        except ImportError as error:
            raise CorpusError(
                "synthetic speech needs eSpeak NG: `pip install espeakng-loader` (a wheel that holds the library)"
            ) from error
        try:
            self._library = ctypes.CDLL(espeakng_loader.get_library_path())
        except OSError as error:
            raise CorpusError(f"eSpeak NG's library cannot be loaded: {error}") from error
        data = espeakng_loader.get_data_path()
        self._rate = self._library.espeak_Initialize(_SYNCHRONOUS, 0, data.encode(), _DONT_EXIT)
        if self._rate <= 0:
            raise CorpusError(f"eSpeak NG cannot read its data in {data}; is that path longer than 150 characters?")
        self._samples: list[np.ndarray] = []
        self._callback = _CALLBACK(self._receive)  # kept: the library holds only a pointer to it
        self._library.espeak_SetSynthCallback(self._callback)

    def _receive(self, wave, count: int, _events) -> int:
        if wave and count > 0:
            self._samples.append(np.ctypeslib.as_array(wave, (count,)).copy())
        return 0

    def say(self, text: str, voice: str, rate: int = 160, pitch: int = 50) -> np.ndarray:
        """Reads ``text``.

        Args:
            text: what to say.
            voice: language and variant, as `fr+f2`. An unknown language is an error, but eSpeak NG passes over an
                unknown variant in silence.
            rate: words a minute.
            pitch: 0 to 100.

        Returns:
            16 kHz samples.
            *Shape:* (T,), int16.
        """
        self._check(self._library.espeak_SetVoiceByName(voice.encode()), f"set voice {voice!r}")
        self._check(self._library.espeak_SetParameter(_RATE, rate, 0), f"set rate {rate}")
        self._check(self._library.espeak_SetParameter(_PITCH, pitch, 0), f"set pitch {pitch}")
        self._library.espeak_ng_SetRandSeed(ctypes.c_long(1))  # the breath of some voices is noise
        self._samples = []
        content = text.encode() + b"\0"
        arguments = (content, ctypes.c_size_t(len(content)), 0, _POSITION_CHARACTER, 0, _UTF8, None, None)
        self._check(self._library.espeak_Synth(*arguments), f"say {text!r}")
        if not self._samples:
            raise CorpusError(f"eSpeak NG gave no sound for {text!r} in voice {voice}")
        return resample(np.concatenate(self._samples), self._rate)

    @staticmethod
    def _check(status: int, what: str) -> None:
        if status != 0:
            raise CorpusError(f"eSpeak NG could not {what} (status {status})")


def resample(samples: np.ndarray, rate: int) -> np.ndarray:
    """Resamples int16 ``samples`` (T,) from ``rate`` to 16 kHz."""
    if rate == SAMPLE_RATE:
        return samples
    import soxr

    return soxr.resample(samples, rate, SAMPLE_RATE)
