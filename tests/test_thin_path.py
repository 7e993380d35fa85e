"""The whole thin path in one process: stage 1, resume, stage 2, a stock NeMo CTC model, transcripts."""

import json
import math
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

FINETUNING = Path(__file__).resolve().parents[1] / "conf" / "finetuning"


def finetune_config(corpus, exp_dir, *overrides):
    small = [
        "model=tiny",
        "data.prepare=null",
        f"data.train_ds.manifest_filepath={corpus}/train.json",
        f"data.validation_ds.manifest_filepath={corpus}/dev.json",
        "data.train_ds.frames_per_step=400",
        "data.num_workers=0",
        "tokenizer={model_type: unigram, vocab_size: 30}",  # characters of a word of 100 ms are too many for CTC
        "trainer.log_every_n_steps=1",
        f"exp_manager.exp_dir={exp_dir}",
    ]
    with initialize_config_dir(str(FINETUNING), version_base="1.3"):
        return compose("asr_ctc", [*small, *overrides])


@pytest.mark.slow
def test_from_audio_to_transcripts(pretrain_config, corpus, tmp_path):
    from nemo.collections.asr.models import ASRModel, EncDecCTCModelBPE

    from nemo_slam.finetuning.finetune import finetune
    from nemo_slam.training.pretrain import pretrain

    run = pretrain(pretrain_config(1, "trainer.max_steps=4", "checkpoint.every_n_steps=2"))
    assert pretrain(pretrain_config(1, "trainer.max_steps=6")) == run  # goes on in the same folder
    lines = (run / "metrics.csv").read_text().splitlines()
    steps = [int(line.split(",")[0]) for line in lines[1:]]
    assert sorted(set(steps)) == list(range(1, 7))
    for name in ("config.yaml", "slam_stage1.nemo", "checkpoints/step_000000006.ckpt"):
        assert (run / name).is_file(), name
    assert list(run.glob("events.out.tfevents*"))

    second = pretrain(pretrain_config(2, "trainer.max_steps=4", f"init_from={run}/slam_stage1.nemo"))
    header, *rows = (second / "metrics.csv").read_text().splitlines()
    for loss in (
        "masked_speech/contrastive",
        "masked_speech/codes",
        "masked_text/tokens",
        "translation_lm/tokens",
        "matching",
    ):
        column = header.split(",").index(loss)
        values = [float(row.split(",")[column]) for row in rows if row.split(",")[1]]
        assert any(math.isfinite(value) for value in values), loss

    tuned = finetune(finetune_config(corpus, tmp_path, f"init_from={second}/slam_stage2.nemo", "trainer.max_steps=4"))
    model = ASRModel.restore_from(str(tuned / "asr_ctc.nemo"), map_location="cpu")
    assert type(model) is EncDecCTCModelBPE
    files = [str(corpus / json.loads(line)["audio_filepath"]) for line in (corpus / "dev.json").open()]
    together = [h.text for h in model.transcribe(files, batch_size=4, verbose=False)]
    alone = [model.transcribe([file], verbose=False)[0].text for file in files]
    assert together == alone
    assert len(together) == len(files)
