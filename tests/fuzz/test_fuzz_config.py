"""Damaged configs: what is parsed is what was written, or a ConfigError names the key."""

from __future__ import annotations

import copy
import dataclasses
import math
import random
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from fuzzing import VALUES, damaged, inputs, told
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nemo_slam.command_line import check_finetuning_keys, check_run_keys
from nemo_slam.config import ConfigError, parse
from nemo_slam.data.config import NEGATIVES, parse_streams
from nemo_slam.models.settings import ModelSettings

CONF = Path(__file__).resolve().parents[2] / "conf"
AUDIO = {"manifest_filepath": ["a.json", "b.json"], "frames_per_step": 2000}
STREAMS: dict[str, dict[str, Any]] = {
    "speech": {**AUDIO, "tarred_audio_filepaths": "a_{0..3}.tar", "min_duration": 0.5, "max_duration": 16, "window": 4},
    "text": {"text_filepath": "t.txt", "tokens_per_step": 4096, "max_tokens": 128, "min_tokens": 2, "cache_dir": None},
    "pairs": {
        **AUDIO,
        "max_tokens": 64,
        "max_unknown": 0.2,
        "negatives": "mixed",
        "neighbours": 3,
        "cache_dir": "/tmp/x",
    },
}
WHOLE = {"frames_per_step", "tokens_per_step", "max_tokens", "min_tokens", "window", "neighbours"}
DEFAULTS = {"min_duration": 0.3, "max_duration": 20.0, "max_tokens": 256, "min_tokens": 1, "negatives": "nearest"}
DEFAULTS |= {"max_unknown": 0.05, "neighbours": 8, "window": 16, "cache_dir": None, "tarred_audio_filepaths": None}
KEYS = {
    "speech": {*AUDIO, "tarred_audio_filepaths", "min_duration", "max_duration", "window", "cache_dir"},
    "text": {"text_filepath", "tokens_per_step", "max_tokens", "min_tokens", "max_unknown", "window", "cache_dir"},
}
KEYS["pairs"] = KEYS["speech"] | {"max_tokens", "max_unknown", "negatives", "neighbours"}
NEEDED = {"speech": {*AUDIO}, "text": {"text_filepath", "tokens_per_step"}, "pairs": {*AUDIO}}
BAD = object()


# ---- the oracle: the rules of each key, written out ----------------------------------------------------


def plain_value(key: str, value: Any) -> Any:
    """What a key's value becomes, or BAD."""
    number = type(value) in (int, float)
    if key in WHOLE:
        return int(value) if number and 1 <= value < 2**31 and value == int(value) else BAD
    if key in ("min_duration", "max_duration"):
        return float(value) if number and (type(value) is float or abs(value) < 2**1023) else BAD
    if key == "max_unknown":
        return float(value) if number and 0 <= value <= 1 else BAD
    if key == "cache_dir":
        return value if value is None or isinstance(value, str) else BAD
    if key == "negatives":
        return value if isinstance(value, str) and value in NEGATIVES else BAD
    if value is None and key == "tarred_audio_filepaths":
        return None
    paths = [value] if isinstance(value, str) else value
    good = isinstance(paths, list) and paths and all(isinstance(p, str) and p for p in paths)
    return list(paths) if good else BAD


def plain_stream(kind: str, node: Any) -> dict[str, Any] | None:
    """All values of a stream's config, or None if it is none."""
    if not isinstance(node, dict) or not NEEDED[kind] <= {*node} <= KEYS[kind]:
        return None
    values = {key: plain_value(key, value) for key, value in node.items()}
    values = {key: DEFAULTS.get(key) for key in KEYS[kind]} | values
    if BAD in values.values():
        return None
    if kind != "text" and not 0 <= values["min_duration"] <= values["max_duration"]:
        return None
    if kind == "text" and values["min_tokens"] > values["max_tokens"]:
        return None
    return values


def changed(generator: random.Random, node: dict[Any, Any]) -> None:
    """Changes one key somewhere in a config: its value, its name, whether it is there."""
    while True:
        key = generator.choice([*node])
        if not isinstance(node[key], dict) or not node[key] or generator.random() < 0.2:
            break
        node = node[key]
    kind = generator.randrange(6)
    if kind < 3:
        node[key] = generator.choice(VALUES)
    elif kind == 3:
        del node[key]
    elif kind == 4:
        node[generator.choice([f"{key}s", str(key)[1:] or "x", str(key).upper(), "", " ", "a.b", "é", "${x}"])] = (
            node.pop(key)
        )
    else:
        node[generator.choice(["x", 1, None, True, 1.5, "seed", "_target_", "defaults"])] = generator.choice(VALUES)


# ---- the tests -----------------------------------------------------------------------------------


def test_streams(tmp_path):
    seen: Counter[str] = Counter()
    for number, generator in inputs("config"):
        node = copy.deepcopy({k: STREAMS[k] for k in generator.sample([*STREAMS], generator.randint(1, 3))})
        for _ in range(generator.randint(0, 2)):
            if node:
                changed(generator, node)
        with told("config", number, node):
            seen[check_streams(node)] += 1
    if number > 1000:
        assert min(seen["parsed"], seen["refused"]) > number / 10, f"the inputs are one-sided: {seen}"


def check_streams(node: dict) -> str:
    named = {kind: value for kind, value in node.items() if value is not None}
    expected = {kind: plain_stream(kind, value) for kind, value in named.items() if kind in STREAMS}
    good = bool(named) and {*node} <= {*STREAMS} and None not in expected.values()
    if not good:
        with pytest.raises(ConfigError, match=r"^data\.train_ds") as refused:
            parse_streams(node, "data.train_ds")
        assert len(str(refused.value)) < 1000
        return "refused"
    found = parse_streams(node, "data.train_ds")
    assert {kind: vars(config) for kind, config in found.items()} == expected
    return "parsed"


def test_the_models_part():
    """Every key that is taken has the value that was written."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        whole = OmegaConf.to_container(compose("slam_stage2", ["model=tiny"]).model, resolve=True)
    fields = {f.name for f in dataclasses.fields(ModelSettings)}
    whole = {key: value for key, value in whole.items() if key in fields}
    parse(ModelSettings, whole, "model")
    seen: Counter[str] = Counter()
    for number, generator in inputs("config"):
        if number % 4:
            continue
        node = copy.deepcopy(whole)
        changed(generator, node)
        with told("config", number, node):
            try:
                same(parse(ModelSettings, node, "model"), node)
                seen["parsed"] += 1
            except ConfigError as error:
                seen["refused" if str(error).startswith("model") else "refused without a name"] += 1
    assert not seen["refused without a name"]
    if number > 1000:
        assert min(seen["parsed"], seen["refused"]) > 50, f"the inputs are one-sided: {seen}"


def same(found: Any, node: Mapping[str, Any]) -> None:
    for key, value in node.items():
        parsed = getattr(found, key)
        if dataclasses.is_dataclass(parsed) and (value is None or isinstance(value, dict)):
            same(parsed, value or {})
        elif isinstance(value, float) and math.isnan(value):
            assert math.isnan(parsed)
        else:
            assert parsed == ([value] if isinstance(parsed, list) and isinstance(value, str) else value), key


@pytest.mark.parametrize(
    ("config", "folder", "check"),
    [("slam_stage2", CONF, check_run_keys), ("asr_ctc", CONF / "finetuning", check_finetuning_keys)],
)
def test_a_key_that_nothing_reads_is_refused_wherever_it_stands(config, folder, check):
    with initialize_config_dir(str(folder), version_base="1.3"):
        whole = OmegaConf.to_container(compose(config), resolve=False)
    groups = ["", "data", "data.train_ds", "exp_manager", "checkpoint"]
    check(OmegaConf.create(whole))
    for number, generator in enumerate(random.Random(i) for i in range(25)):
        node: Any = copy.deepcopy(whole)
        group = generator.choice(groups)
        at = OmegaConf.to_container(OmegaConf.select(OmegaConf.create(node), group)) if group else node
        new = generator.choice([f"{generator.choice([*at])}x", "x", "é", " "])
        cfg = OmegaConf.create(node)
        OmegaConf.update(cfg, group, {new: generator.choice([1, None, "a"])}, merge=True) if group else cfg.update(
            {new: 1}
        )
        with told("config", number, f"{group}: {new!r}"), pytest.raises(ConfigError, match=f"unknown key '{new}'"):
            check(cfg)


def test_yaml_text():
    """A stream's YAML with bytes changed: refused by YAML or OmegaConf with their own errors, or checked as above."""
    text, seen = yaml.safe_dump(STREAMS).encode(), Counter()
    for number, generator in inputs("config"):
        if number % 32:
            continue
        content = damaged(generator, text).decode("utf-8", "replace")
        with told("config", number, content):
            try:
                node = OmegaConf.create(content)
            except (yaml.YAMLError, OmegaConfBaseException, ValueError, RecursionError):
                seen["no YAML"] += 1
                continue
            try:
                plain = OmegaConf.to_container(node, resolve=True)
            except OmegaConfBaseException:  # an interpolation that leads nowhere
                seen["unresolved"] += 1
                continue
            if isinstance(plain, dict) and "???" not in str(plain):
                seen[check_streams(plain)] += 1
    assert number < 1000 or min(seen["no YAML"], seen["parsed"], seen["refused"]) > 3, (
        f"the inputs are one-sided: {seen}"
    )
