"""Stream configuration: strict about keys and values, and every key is read."""

from __future__ import annotations

import ast
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import nemo_slam.data
from nemo_slam.data.config import STREAMS, ConfigError, PairsConfig, SpeechConfig, parse_stream, parse_streams

SPEECH = {"manifest_filepath": "a.json", "frames_per_step": 100}
TEXT = {"text_filepath": "a.txt", "tokens_per_step": 100}


def test_dict_and_omegaconf_read_alike():
    node = {"speech": {**SPEECH, "max_duration": "${limit}"}, "pairs": {**SPEECH, "manifest_filepath": ["a", "b"]}}
    config = OmegaConf.create({"limit": 12, "train_ds": node})
    parsed = parse_streams(config.train_ds, "train_ds")
    assert parsed["speech"] == SpeechConfig(["a.json"], 100, max_duration=12.0)
    assert parsed["pairs"] == PairsConfig(["a", "b"], 100)
    node["speech"]["max_duration"] = 12
    assert parse_streams(node, "train_ds") == parsed


def test_a_stream_set_to_null_is_left_out():
    assert list(parse_streams({"speech": SPEECH, "text": None}, "train_ds")) == ["speech"]


@pytest.mark.parametrize(
    ("node", "message"),
    [
        (
            {"speech": {**SPEECH, "max_durration": 3}},
            "train_ds.speech: unknown key 'max_durration'; did you mean 'max_duration'?",
        ),
        ({"speach": SPEECH}, "train_ds: unknown key 'speach'; did you mean 'speech'?"),
        (
            {"text": {**TEXT, "frames_per_step": 4}},
            "train_ds.text: unknown key 'frames_per_step'; did you mean 'tokens_per_step'?",
        ),
        ({"speech": {"manifest_filepath": "a"}}, "train_ds.speech lacks the key 'frames_per_step'"),
        ({"speech": {**SPEECH, "frames_per_step": 0}}, "a whole number from 1 to 2^31 - 1, got 0"),
        ({"speech": {**SPEECH, "frames_per_step": 1.5}}, "speech.frames_per_step must be a whole number, got 1.5"),
        ({"speech": {**SPEECH, "frames_per_step": float("inf")}}, "must be a whole number, got inf"),
        ({"speech": {**SPEECH, "frames_per_step": True}}, "must be a whole number, got True"),
        ({"speech": {**SPEECH, "frames_per_step": None}}, "must be a whole number, got None"),
        ({"speech": {**SPEECH, "max_duration": "long"}}, "train_ds.speech.max_duration must be a number, got 'long'"),
        ({"speech": {**SPEECH, "min_duration": 30}}, "min_duration (30.0) must lie between 0 and max_duration (20.0)"),
        ({"speech": {**SPEECH, "max_duration": float("nan")}}, "must lie between 0 and max_duration (nan)"),
        ({"speech": {**SPEECH, "manifest_filepath": []}}, "must be a text or a list of them, got []"),
        ({"speech": {**SPEECH, "manifest_filepath": 3}}, "must be a text or a list of them, got 3"),
        ({"speech": {**SPEECH, "cache_dir": 3}}, "train_ds.speech.cache_dir must be a text or null, got 3"),
        ({"pairs": {**SPEECH, "negatives": "hard"}}, "must be one of nearest, rotated, random, mixed, got 'hard'"),
        ({"text": {**TEXT, "max_unknown": 5}}, "train_ds.text.max_unknown must be a share from 0 to 1, got 5"),
        ({"text": {**TEXT, "min_tokens": 300}}, "min_tokens (300) is above max_tokens (256)"),
        ({"speech": "a.json"}, "train_ds.speech must be a mapping"),
        ({}, "train_ds names no stream"),
        (None, "train_ds must be a mapping of keys to values (known: speech, text, pairs), got None"),
    ],
)
def test_errors_name_the_key(node, message):
    with pytest.raises(ConfigError) as error:
        parse_streams(node, "train_ds")
    assert message in str(error.value)


@pytest.mark.parametrize("kind", STREAMS)
def test_every_key_is_read(kind):
    """A key that nothing reads is a bug: each appears as an attribute `config.<key>` in the package."""
    folder = Path(nemo_slam.data.__file__).parent
    read = set()
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "config":
                read.add(node.attr)
    assert {f.name for f in fields(STREAMS[kind])} <= read


def test_parsing_imports_nothing_heavy():
    code = "import sys, nemo_slam.data.config; print([m for m in ('torch', 'numpy', 'nemo') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_parse_stream_alone():
    assert parse_stream(SpeechConfig, SPEECH, "here").manifest_filepath == ["a.json"]
