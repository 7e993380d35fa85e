"""What a script needs around ``hydra.main``: a misspelt override or key is refused in a second, with the nearest one.

Nothing heavy is imported here.
"""

from __future__ import annotations

import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import fields
from typing import Any

import hydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from nemo_slam.config import ConfigError, check_keys, shown, unknown_key
from nemo_slam.data.config import STREAMS
from nemo_slam.finetuning.config import SentencesConfig, TranscriptConfig

RUN_KEYS: dict[str, tuple[str, ...]] = {
    "": (
        *("name", "seed", "init_from", "model", "data", "trainer", "parallel"),
        *("exp_manager", "checkpoint", "guard", "probes"),
    ),
    "data": ("prepare", "root", "on_bad_row", "num_workers", "tokenizer", "train_ds", "validation_ds"),
    "data.tokenizer": ("model_path",),
    "exp_manager": ("exp_dir", "create_tensorboard_logger", "create_wandb_logger", "wandb_logger_kwargs"),
    "checkpoint": ("every_n_steps", "keep_last"),
    "guard": ("max_consecutive", "spike_factor", "history"),
}
"""What pre-training reads of the groups that no dataclass or library checks."""

FINETUNING_KEYS: dict[str, tuple[str, ...]] = {
    **{key: RUN_KEYS[key] for key in ("exp_manager", "checkpoint")},
    "": (
        *("name", "seed", "init_from", "reinit_last_layers", "freeze_encoder_steps", "early_stopping"),
        *("tokenizer", "source_tokenizer", "model", "data", "trainer", "parallel", "exp_manager", "checkpoint"),
    ),
    "data": ("prepare", "root", "language", "pair", "on_bad_row", "num_workers", "train_ds", "validation_ds"),
    "early_stopping": ("patience", "monitor", "mode"),
    "tokenizer": ("vocab_size", "model_type", "sequence_symbols"),
    "source_tokenizer": ("vocab_size",),
}
"""As `RUN_KEYS`, for fine-tuning."""

MOST_SEED = 1 << 31
"""Lightning takes 0 for a seed that does not fit 32 bits, and a rank's own is the seed plus its number."""

_FULL_ERROR = "HYDRA_FULL_ERROR"


def check_run_keys(cfg: DictConfig) -> None:
    """Refuse a key of a pre-training config that nothing reads, unless another value is built from it (``${key}``).

    The groups ``model``, ``parallel`` and ``trainer`` are checked by those who read them.

    Raises:
        ConfigError: with the nearest key that is read.
    """
    groups: dict[str, Iterable[str]] = dict(RUN_KEYS)
    for split in ("train_ds", "validation_ds"):
        groups[f"data.{split}"] = tuple(STREAMS)
        groups |= {f"data.{split}.{name}": [f.name for f in fields(config)] for name, config in STREAMS.items()}
    _check_groups(cfg, groups)


def check_finetuning_keys(cfg: DictConfig) -> None:
    """As `check_run_keys`, of a fine-tuning config. Stock models do not check the group ``model``.

    Raises:
        ConfigError: with the nearest key that is read.
    """
    stream = SentencesConfig if "source_tokenizer" in cfg else TranscriptConfig
    streams = {f"data.{split}": [f.name for f in fields(stream)] for split in ("train_ds", "validation_ds")}
    _check_groups(cfg, {**FINETUNING_KEYS, **streams})


def _check_groups(cfg: DictConfig, groups: Mapping[str, Iterable[str]]) -> None:
    seed = cfg.get("seed")
    if type(seed) is not int or not 0 <= seed < MOST_SEED:
        raise ConfigError(f"seed must be a whole number from 0 to 2^31 - 1, got {shown(seed)}")
    used = set(re.findall(r"\$\{([\w.]+)", OmegaConf.to_yaml(cfg)))
    for where, valid in groups.items():
        node = OmegaConf.select(cfg, where) if where else cfg
        if node is None:
            continue
        if not isinstance(node, Mapping):
            raise ConfigError(f"{where} must be a group of keys ({', '.join(valid)}), got {node!r}")
        inside = f"{where}." if where else ""
        check_keys(
            {key: None for key in node if f"{inside}{key}" not in used},
            [*valid],
            where or "the top level of the config",
        )


def main(config_path: str, config_name: str) -> Callable[[Callable[[DictConfig], Any]], Callable[[], None]]:
    """``hydra.main`` that refuses a misspelt override with the nearest key.

    Args:
        config_path: absolute path of the folder of configs.
        config_name: the default one.
    """

    def decorate(function: Callable[[DictConfig], Any]) -> Callable[[], None]:
        shortens = _FULL_ERROR not in os.environ

        def run(cfg: DictConfig) -> None:
            if shortens:  # from here on Hydra shortens tracebacks as usual
                os.environ.pop(_FULL_ERROR, None)
            try:
                function(cfg)
            except ConfigError as error:
                sys.exit(f"error: {error}")

        functools.update_wrapper(run, function)
        # Hydra takes the job's name from where the function was written.
        run.__code__ = run.__code__.replace(co_filename=function.__code__.co_filename)
        entry = hydra.main(version_base="1.3", config_path=config_path, config_name=config_name)(run)

        def start() -> None:
            os.environ.setdefault(_FULL_ERROR, "1")  # else Hydra prints its own sentence and leaves
            try:
                entry()
            except HydraException as error:
                sys.exit(f"error: {_explain(error)}")

        return start

    return decorate


def _explain(error: HydraException) -> str:
    """The sentence for an override that Hydra refused."""
    cause = error.__cause__
    parent, key, path = (getattr(cause, name, None) for name in ("parent_node", "key", "full_key"))
    if not isinstance(parent, DictConfig) or key is None or key in parent:
        return f"{error}{f': {cause}' if cause else ''}".replace("\n\n", "\n")
    where = str(path or key).rpartition(".")[0] or "the top level of the config"
    return f"{unknown_key(str(key), [str(k) for k in parent], where)}. {str(error).splitlines()[-1]}, if it is meant"
