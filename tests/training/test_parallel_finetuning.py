"""Fine-tuning in two processes: as in one, where the loss is a mean over the global batch, and never unlike."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir

from nemo_slam.config import ConfigError

CONF = Path(__file__).parents[2] / "conf" / "finetuning"
STEPS = 3
WORDS = {"uno": "one", "dos": "two", "tres": "three", "si": "yes", "no": "not"}


@pytest.fixture(scope="module")
def speech(tmp_path_factory):
    """Twelve utterances of one length, so that two ranks get equally many of a step's four."""
    folder = tmp_path_factory.mktemp("speech")
    rng = np.random.default_rng(0)
    lines = []
    for number in range(12):
        words = [list(WORDS)[i] for i in rng.integers(0, 5, 2)]
        soundfile.write(folder / f"{number}.wav", 0.1 * rng.standard_normal(9600), 16000)
        lines.append({"audio_filepath": f"{number}.wav", "duration": 0.6, "text": " ".join(words)})
    (folder / "rows.json").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder / "rows.json"


@pytest.fixture(scope="module")
def texts(tmp_path_factory):
    """Texts of two to seven words, so that ranks get unequally many."""
    rng = np.random.default_rng(0)
    chosen = [[list(WORDS)[i] for i in rng.integers(0, 5, n % 6 + 2)] for n in range(24)]
    lines = [{"text": " ".join(words), "translation": " ".join(WORDS[w] for w in words)} for words in chosen]
    path = tmp_path_factory.mktemp("texts") / "rows.json"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


# SGD: a key's bias has no gradient but noise, which Adam would turn into steps.
COMMON = [
    *("model=tiny", "data.prepare=null", "data.num_workers=0", "tokenizer.vocab_size=18"),
    *("model.optim.name=sgd", "model.optim.lr=0.05", "~model.optim.betas", "~model.optim.weight_decay"),
    *("model.optim.sched.warmup_steps=0", "model.optim_param_groups.encoder.lr=0.05"),
    *("freeze_encoder_steps=1", "model.optim_param_groups.encoder.warmup_steps=0"),
    "model.encoder.conformer={d_model: 32, d_ff: 64, n_heads: 2, conv_norm_groups: 4, dropout: 0.0}",
    "model.encoder.multimodal_encoder.num_layers=1",
    *(f"trainer.{key}" for key in ("accelerator=cpu", f"max_steps={STEPS}", "log_every_n_steps=1")),
    f"trainer.val_check_interval={STEPS}",
    "exp_manager.create_tensorboard_logger=false",
]
OWN = {
    "asr_ctc": [
        *("model.spec_augment=null", "data.train_ds.frames_per_step=240", "data.validation_ds.frames_per_step=240"),
        "model.encoder.speech_encoder={num_layers: 1, conv_channels: 4}",
    ],
    "mt": [
        *("source_tokenizer.vocab_size=18", "model.encoder.text_encoder.dropout=0.0"),
        *("data.train_ds.tokens_per_step=60", "data.validation_ds.tokens_per_step=120"),
        *(f"model.transf_decoder.{key}" for key in ("hidden_size=16", "inner_size=16", "max_sequence_length=24")),
    ],
}


@pytest.fixture
def launch(start_ranks, speech, texts, tmp_path):
    """A function (config's name, run's name, overrides of each rank) -> what each rank wrote."""

    def run(config, name, *ranks):
        rows = {"asr_ctc": speech, "mt": texts}[config]
        data = [f"data.{split}_ds.manifest_filepath={rows}" for split in ("train", "validation")]
        place = [f"name={name}", f"exp_manager.exp_dir={tmp_path}", f"trainer.devices={len(ranks)}"]
        with initialize_config_dir(str(CONF), version_base="1.3"):
            configs = [compose(config, [*COMMON, *OWN[config], *data, *place, *own]) for own in ranks]
        return start_ranks("nemo_slam.finetuning.finetune", configs)

    return run


def figures(run_folder):
    """Losses of each row of ``metrics.csv``, which rank 0 writes for all. BLEU is left out: of an untrained model, with
    next words nearly tied, it jumps with the last digit of the weights."""
    with (run_folder / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [{k: float(v) for k, v in row.items() if v and k in ("loss", "val_loss", "val_wer")} for row in rows]


@pytest.mark.parametrize(("config", "shares"), [("asr_ctc", [2, 2]), ("mt", None)])
def test_two_processes_fine_tune_as_one(launch, tmp_path, config, shares):
    """With the same global batch: gradients, losses, validation and weights. The stock recogniser's loss is a mean over
    a rank's utterances, so that holds for equal shares; our text models' is one over the global batch, for any."""
    (alone,) = launch(config, "alone", ())
    together = launch(config, "together", (), ())
    examples = [rank["examples"] for rank in together]
    assert sum(examples) == alone["examples"]
    assert examples == shares or (shares is None and examples[0] != examples[1])
    for rank in together:
        assert rank["error"] == alone["error"] == ""
        for kind in ("gradients", "weights"):
            assert rank[kind].keys() == alone[kind].keys() != set()
            for name, tensor in alone[kind].items():
                torch.testing.assert_close(
                    rank[kind][name], tensor, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
                )
    expected = figures(tmp_path / "alone")
    assert [("loss" in row, "val_loss" in row) for row in expected] == [(True, False)] * STEPS + [(False, True)]
    for row, reference in zip(figures(tmp_path / "together"), expected, strict=True):
        assert row == pytest.approx(reference, rel=1e-4, abs=1e-5)
    assert (tmp_path / "together" / "together.nemo").exists()


def test_ranks_with_other_configs_do_not_start(launch, tmp_path):
    """The rank and the key are named, on every rank, before the first step."""
    for rank in launch("asr_ctc", "unlike", (), ("model.optim.lr=0.5", "seed=7")):
        assert rank["error"].startswith("DisagreementError: the ranks were not started alike")
        assert "rank 1 (" in rank["error"]
        assert "config.model.optim.lr is 0.5, elsewhere 0.05" in rank["error"]
        assert "data.seed is 7, elsewhere 0" in rank["error"]
        assert rank["gradients"] == {}
    assert not (tmp_path / "unlike" / "metrics.csv").exists()


def test_shards_are_refused(speech, tmp_path):
    from nemo_slam.finetuning.finetune import finetune

    with initialize_config_dir(str(CONF), version_base="1.3"):
        cfg = compose("asr_ctc", [*COMMON, *OWN["asr_ctc"], "+parallel.strategy=fsdp2"])
    with pytest.raises(ConfigError, match=r"parallel\.strategy=fsdp2 is for pre-training alone"):
        finetune(cfg)
