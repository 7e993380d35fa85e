"""The whole path: a pre-trained .nemo becomes a stock NeMo model that resumes exactly, restores and transcribes."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from hydra import compose, initialize_config_dir
from nemo.collections.asr.models import ASRModel, EncDecCTCModelBPE
from tones import write_corpus

from nemo_slam.config import ConfigError
from nemo_slam.data.bad_rows import EmptyStreamError
from nemo_slam.finetuning.finetune import finetune
from nemo_slam.finetuning.loader import TrainingDataset
from nemo_slam.finetuning.speech_task import SpeechTask
from nemo_slam.training.initialise import read_weights

CONF = Path(__file__).parents[2] / "conf" / "finetuning"


def config(corpus, exp_dir, *overrides, name="asr_ctc"):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            name,
            overrides=[
                "model=tiny",
                "data.prepare=null",
                f"data.train_ds.manifest_filepath={corpus}",
                f"data.validation_ds.manifest_filepath={corpus}",
                "data.train_ds.frames_per_step=300",
                "data.num_workers=0",
                "tokenizer.vocab_size=16",
                "trainer.max_steps=6",
                "trainer.log_every_n_steps=1",
                "trainer.val_check_interval=4",
                "trainer.accelerator=cpu",
                "checkpoint.every_n_steps=2",
                f"exp_manager.exp_dir={exp_dir}",
                "exp_manager.create_tensorboard_logger=false",
                *overrides,
            ],
        )


def scratch(corpus, exp_dir, *overrides, name="asr_ctc"):
    """A very small encoder of its own, for what needs no pre-trained one."""
    small = ["conformer.d_model=16", "conformer.d_ff=32", "conformer.n_heads=2", "conformer.conv_norm_groups=4"]
    layers = ["speech_encoder.num_layers=1", "speech_encoder.conv_channels=4", "multimodal_encoder.num_layers=1"]
    encoder = [f"model.encoder.{key}" for key in [*small, *layers]]
    return config(corpus, exp_dir, *encoder, *overrides, name=name)


def rows(run_folder):
    with open(run_folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def straight(corpus, tmp_path_factory):
    """A run folder of six steps from a pre-trained encoder that is frozen for two, and the encoder's weights before."""
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    folder = tmp_path_factory.mktemp("straight")
    torch.manual_seed(5)
    nemo = folder / "slam.nemo"
    SLAMPretrainingModel(pretraining_node(folder, corpus)).save_to(str(nemo))
    overrides = [f"init_from={nemo}", "freeze_encoder_steps=2", "model.encoder.conformer.dropout=0.1"]
    return finetune(config(corpus, folder, *overrides)), overrides


def pretraining_node(folder, corpus):
    from omegaconf import OmegaConf

    from nemo_slam.data.tokenizer import train_tokenizer

    spm = train_tokenizer([corpus], folder / "spm", 16, allow_smaller=True)
    return OmegaConf.create(
        {
            "preprocessor": {
                "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
                "features": 80,
                "dither": 0.0,
                "pad_to": 0,
            },
            "tokenizer": {"model_path": str(spm / "tokenizer.model")},
            "conformer": {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4},
            "speech_encoder": {"num_layers": 1, "conv_channels": 4},
            "text_encoder": {"vocab_size": 16},
            "multimodal_encoder": {"num_layers": 1},
            "quantizer": {"num_codes": 8, "code_dim": 8},
            "objectives": {"masked_speech": {}},
        }
    )


def test_resume_after_a_kill_is_as_if_never_stopped(straight, corpus, tmp_path, monkeypatch):
    expected, overrides = straight
    get = TrainingDataset.__getitem__

    def killed(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return get(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDataset, "__getitem__", killed)
        with pytest.raises(SystemExit, match="143"):
            finetune(config(corpus, tmp_path, *overrides))
    run_folder = tmp_path / "asr_ctc"
    assert not (run_folder / "asr_ctc.nemo").exists()
    assert rows(run_folder)[-1]["step"] == "2"  # batch 2 was loaded ahead of step 3

    assert finetune(config(corpus, tmp_path, *overrides)) == run_folder
    assert rows(run_folder) == rows(expected)
    weights, wanted = (read_weights(folder / "asr_ctc.nemo") for folder in (run_folder, expected))
    assert weights.keys() == wanted.keys()
    assert [name for name in wanted if not torch.equal(weights[name], wanted[name])] == []


def test_rates_differ_and_the_encoder_begins_late(straight):
    training = [row for row in rows(straight[0]) if row["loss"]]
    assert [row["step"] for row in training] == list("123456")
    encoder = [float(row["lr_encoder"]) for row in training]
    assert encoder[0] == 0.0  # steps 1 and 2 are frozen; row k shows the rate of step k + 1
    assert encoder[1] > 0
    assert all(float(row["lr"]) > rate for row, rate in zip(training, encoder, strict=True))


def test_frozen_run_keeps_the_pretrained_encoder(straight, corpus, tmp_path):
    run_folder = finetune(config(corpus, tmp_path, *straight[1], "freeze_encoder_steps=6"))
    before = read_weights(straight[1][0].removeprefix("init_from="))
    after = read_weights(run_folder / "asr_ctc.nemo")
    parts = [name for name in before if name.startswith(("speech_encoder", "multimodal_encoder"))]
    assert parts
    assert all(torch.equal(before[name], after[f"encoder.{name}"]) for name in parts)
    trained = read_weights(straight[0] / "asr_ctc.nemo")
    assert any(not torch.equal(before[name], trained[f"encoder.{name}"]) for name in parts)


def test_the_last_layers_may_start_afresh(straight, corpus, tmp_path):
    keys = [straight[1][0], "freeze_encoder_steps=1", "trainer.max_steps=1", "reinit_last_layers=1"]
    run_folder = finetune(config(corpus, tmp_path, *keys))
    before = read_weights(straight[1][0].removeprefix("init_from="))
    after = read_weights(run_folder / "asr_ctc.nemo")
    other = {
        name
        for name in before
        if name.startswith(("speech_encoder", "multimodal_encoder"))
        and not torch.equal(before[name], after[f"encoder.{name}"])
    }
    assert other
    assert all(name.startswith("multimodal_encoder.layers.0.") for name in other)
    with pytest.raises(ConfigError, match="reinit_last_layers goes with init_from"):
        finetune(scratch(corpus, tmp_path, "reinit_last_layers=1"))


def test_result_is_a_stock_model_with_the_pretrained_features(straight):
    path = straight[0] / "asr_ctc.nemo"
    model = ASRModel.restore_from(str(path), map_location="cpu")
    assert type(model) is EncDecCTCModelBPE
    assert model.cfg.encoder.conformer.d_model == 32
    assert model.cfg.preprocessor.pad_to == 0
    assert model.cfg.validation_ds.shuffle is False
    assert not [name for name in read_weights(path) if "_extra_state" in name]
    model.setup_optimization({"name": "adamw", "lr": 1e-5})  # as NeMo's own fine-tuning does
    assert {group["lr"] for group in model._optimizer.param_groups} == {1e-5}


def speak(model):
    """Give an untrained model's greedy output something to say, by chance, instead of blanks only."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        layer = model.decoder.decoder_layers[0]
        layer.weight.copy_(torch.randn(layer.weight.shape, generator=generator))
        layer.bias.zero_()
    return model.eval()


@pytest.fixture
def waves(tmp_path):
    """Paths and arrays of 1.0, 2.3 and 1.6 s."""
    rng = np.random.default_rng(0)
    paths, arrays = [], []
    for seconds in (1.0, 2.3, 1.6):
        samples = (0.1 * rng.standard_normal(int(16000 * seconds))).astype(np.float32)
        paths.append(str(tmp_path / f"{seconds}.wav"))
        soundfile.write(paths[-1], samples, 16000, subtype="FLOAT")
        arrays.append(samples)
    return paths, arrays


def test_transcribe_gives_each_utterance_the_same_text_however_it_comes(straight, waves):
    model = speak(ASRModel.restore_from(str(straight[0] / "asr_ctc.nemo"), map_location="cpu"))
    paths, arrays = waves
    together = [h.text for h in model.transcribe(paths, batch_size=3, verbose=False)]
    assert len(set(together)) == 3
    assert all(together)
    assert [model.transcribe(path, verbose=False)[0].text for path in paths] == together
    assert [h.text for h in model.transcribe(arrays, batch_size=3, verbose=False)] == together
    assert [h.text for h in model.transcribe(paths[::-1], batch_size=2, verbose=False)] == together[::-1]


def test_logits_are_identical_after_save_and_restore(straight, waves, tmp_path):
    model = speak(ASRModel.restore_from(str(straight[0] / "asr_ctc.nemo"), map_location="cpu"))
    model.save_to(str(tmp_path / "again.nemo"))
    again = ASRModel.restore_from(str(tmp_path / "again.nemo"), map_location="cpu").eval()
    audio = torch.from_numpy(waves[1][1])[None]
    with torch.no_grad():
        length = torch.tensor([audio.shape[1]])
        first, second = (m(input_signal=audio, input_signal_length=length)[0] for m in (model, again))
    assert torch.equal(first, second)


def test_script_transcribes_with_errors_beside(straight, waves, tmp_path):
    """The part of scripts/transcribe.py that is not argument parsing."""
    from nemo_slam.evaluation.transcription import find_items, restore, transcribe, write_line

    (tmp_path / "bad.wav").write_text("no audio")
    model = speak(restore(straight[0] / "asr_ctc.nemo"))
    items = list(transcribe(model, find_items([tmp_path / "bad.wav", *waves[0]]), batch_size=2))
    assert "not readable as audio" in items[0].problem
    expected = [h.text for h in model.transcribe(waves[0], batch_size=3, verbose=False)]
    assert [json.loads(write_line(item))["pred_text"] for item in items[1:]] == expected


def test_a_pretraining_model_cannot_transcribe(straight):
    from nemo_slam.evaluation.transcription import restore

    with pytest.raises(ValueError, match=r"SLAMPretrainingModel, which does not transcribe: .*speech_finetune"):
        restore(straight[1][0].removeprefix("init_from="))


def test_bad_audio_is_left_out_and_listed(corpus, tmp_path):
    manifest = write_corpus(tmp_path / "data", rows=6)
    (tmp_path / "data" / "3.wav").write_text("no audio")
    with open(manifest, "a") as file:
        file.write("{broken\n")
    run_folder = finetune(scratch(manifest, tmp_path, "data.validation_ds=null", "trainer.max_steps=5"))
    listed = [json.loads(line) for line in (run_folder / "bad_rows.jsonl").read_text().splitlines()]
    assert {(row["line"], row["stream"]) for row in listed} == {(4, "train"), (7, "train")}
    assert (run_folder / "asr_ctc.nemo").exists()


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.train_ds.manifest_filepath={}/xx.json", r"xx\.json does not exist; in .* there are manifest\.json"),
        ("model.tokenizer.dir={}/none", r"holds no tokenizer\.model; train a tokenizer with scripts"),
        ("data.train_ds.text_key=summary", "has a string 'summary'"),
        ("init_from={}/none.nemo", r"init_from: .*none\.nemo does not exist"),
        ("exp_manager.exp_dir={}/manifest.json/runs", r"json/runs/asr_ctc cannot be made \(.*exp_manager\.exp_dir"),
    ],
)
def test_what_cannot_work_says_so_at_once(corpus, tmp_path, override, message):
    with pytest.raises((OSError, EmptyStreamError), match=message):
        finetune(scratch(corpus, tmp_path, override.format(corpus.parent)))


@pytest.mark.parametrize("key", ["model.sample_rate", "model.preprocessor.sample_rate"])
def test_features_of_another_rate_are_refused(corpus, tmp_path, key):
    with pytest.raises(ValueError, match=f"{key} is 8000, but all audio is read as 16000 Hz"):
        SpeechTask(scratch(corpus, tmp_path, f"{key}=8000"), tmp_path, None).model_node()
    assert not list(tmp_path.iterdir())


def test_a_tokenizer_of_an_earlier_start_is_not_taken_for_another(corpus, tmp_path):
    """A start that ended before its first checkpoint leaves one, and the next may ask for another."""
    task = SpeechTask(scratch(corpus, tmp_path), tmp_path / "run", None)
    folder = task.tokenizer_dir()
    made = (folder / "tokenizer.model").stat().st_mtime_ns
    assert SpeechTask(task.cfg, tmp_path / "run", None).tokenizer_dir() == folder
    assert (folder / "tokenizer.model").stat().st_mtime_ns == made
    for override, message in (
        ("tokenizer.vocab_size=14", r"vocab_size 16, not 14\. Give the new run another name"),
        ("data.train_ds.text_key=translation", "key text, not translation"),
    ):
        with pytest.raises(ConfigError, match=message):
            SpeechTask(scratch(corpus, tmp_path, override), tmp_path / "run", None).tokenizer_dir()


def test_a_fine_tune_that_loads_nothing_stops(straight, corpus, tmp_path):
    """The architecture is read, but the weights have names that the encoder does not know."""
    import io
    import tarfile

    source = straight[1][0].removeprefix("init_from=")
    renamed = {f"module.{name}": tensor for name, tensor in read_weights(source).items()}
    buffer = io.BytesIO()
    torch.save(renamed, buffer)
    with tarfile.open(source) as old, tarfile.open(tmp_path / "renamed.nemo", "w") as new:
        for member in old:
            if member.isfile():
                content = old.extractfile(member).read()
                if member.name.endswith("model_weights.ckpt"):
                    content = buffer.getvalue()
                member.size = len(content)
                new.addfile(member, io.BytesIO(content))
    with pytest.raises(ValueError, match=r"0 tensors, 0 parameters \(0\.0% of the model\)(?s:.*)below the 95% wanted"):
        finetune(config(corpus, tmp_path, f"init_from={tmp_path}/renamed.nemo"))
    assert not (tmp_path / "asr_ctc" / "metrics.csv").exists()


TRANSDUCER = ["model.decoder.prednet.pred_hidden=8", "model.joint.jointnet.joint_hidden=8"]
TRANSDUCER += [f"data.{split}_ds.max_duration=0.7" for split in ("train", "validation")]  # its loss is slow on a CPU
TRANSLATOR = [f"model.transf_decoder.{key}" for key in ("hidden_size=16", "inner_size=16", "max_sequence_length=24")]


@pytest.mark.parametrize(
    ("name", "target", "overrides"),
    [
        ("asr_rnnt", "EncDecRNNTBPEModel", TRANSDUCER),
        ("asr_hybrid", "EncDecHybridRNNTCTCBPEModel", TRANSDUCER),
        ("st", "EncDecTransfModelBPE", [*TRANSLATOR, "data.train_ds.text_key=translation", "tokenizer.vocab_size=20"]),
    ],
)
def test_other_stock_models_take_the_encoder(corpus, tmp_path, waves, name, target, overrides):
    """Trained, validated and saved; restored, they give each utterance the same text alone and in a batch."""
    from nemo_slam.evaluation.transcription import find_items, restore, transcribe

    steps = ["trainer.max_steps=2", "trainer.val_check_interval=2"]
    run_folder = finetune(scratch(corpus, tmp_path, *overrides, *steps, name=name))
    assert [row["step"] for row in rows(run_folder)] == ["1", "2", "2"]
    model = restore(run_folder / f"{name}.nemo")
    assert type(model).__name__ == target
    assert model.cfg.train_ds.use_start_end_token == (name == "st")  # what NeMo's own scripts begin from
    assert not [key for key in model.state_dict() if "_extra_state" in key]
    together = [item.row["pred_text"] for item in transcribe(model, find_items(waves[0]), batch_size=3)]
    assert [next(transcribe(model, find_items([path]))).row["pred_text"] for path in waves[0]] == together
    for audio in waves:  # NeMo's own door: paths, then arrays
        stock = model.transcribe(audio, batch_size=3, verbose=False)
        assert [getattr(found, "text", found) for found in stock] == together


def test_a_tokenizer_without_sequence_symbols_is_refused_for_translation(corpus, tones_tokenizer, tmp_path):
    cfg = scratch(corpus, tmp_path, *TRANSLATOR, f"model.tokenizer.dir={tones_tokenizer}", name="st")
    with pytest.raises(ValueError, match=r"no <s>, </s> and <pad>.*--sequence-symbols"):
        finetune(cfg)


def test_a_resume_with_other_data_is_refused(straight, corpus, tmp_path):
    other = write_corpus(tmp_path / "other", rows=7, seed=3)
    (tmp_path / "asr_ctc" / "checkpoints").mkdir(parents=True)
    for checkpoint in (straight[0] / "checkpoints").glob("step_*.ckpt"):
        (tmp_path / "asr_ctc" / "checkpoints" / checkpoint.name).symlink_to(checkpoint)
    with pytest.raises(ValueError, match=r"checkpoints of a run with other data: stream train"):
        finetune(config(other, tmp_path, *straight[1], f"model.tokenizer.dir={straight[0]}/tokenizer"))
    assert not (tmp_path / "asr_ctc" / "config.yaml").exists()  # what is refused does not describe the run


def test_the_start_up_table_says_what_auto_picked(corpus, tmp_path, caplog):
    import logging

    logger = logging.getLogger("nemo_logger")
    logger.addHandler(caplog.handler)
    try:
        finetune(scratch(corpus, tmp_path, "trainer.max_steps=1"))
    finally:
        logger.removeHandler(caplog.handler)
    assert "torch (kernels: auto)" in caplog.text
    assert "sdpa (attention: auto)" in caplog.text


def test_early_stopping_keeps_the_best_weights(corpus, tmp_path):
    """With a rate of zero nothing ever improves on the first validation: it stops after the second one more."""
    still = ["model.optim.lr=0.0", "model.optim_param_groups.encoder.lr=0.0", "model.optim.sched.min_lr=0.0"]
    overrides = [*still, "trainer.max_steps=9", "trainer.val_check_interval=1", "early_stopping.patience=2"]
    run_folder = finetune(scratch(corpus, tmp_path, *overrides))
    assert rows(run_folder)[-1]["step"] == "3"
    best = torch.load(run_folder / "checkpoints" / "best.pt", weights_only=True)
    assert best["step"] == 1
    saved = read_weights(run_folder / "asr_ctc.nemo")
    assert all(torch.equal(saved[name], tensor) for name, tensor in best["weights"].items())
    finetune(scratch(corpus, tmp_path, *overrides))
    assert rows(run_folder)[-1]["step"] == "3", "a run that has stopped stays so"


def test_a_figure_that_is_never_logged_cannot_be_monitored(corpus, tmp_path):
    cfg = scratch(
        corpus, tmp_path, "early_stopping.patience=1", "early_stopping.monitor=val_bleu", "trainer.val_check_interval=1"
    )
    with pytest.raises(ValueError, match=r"logs no 'val_bleu', but val_loss, val_wer"):
        finetune(cfg)
