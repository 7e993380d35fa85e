"""Fine-tune a pre-trained encoder: inside a stock NeMo model for speech, in a model of ours for text.

    python scripts/speech_finetune.py --config-name asr_ctc init_from=runs/slam_stage2/slam_stage2.nemo
    python scripts/speech_finetune.py --config-name asr_ctc model=tiny init_from=runs/slam_stage1/slam_stage1.nemo
    python scripts/speech_finetune.py --config-name asr_ctc model=tiny   # from scratch, on a CPU, in minutes

Configs: asr_ctc, asr_rnnt, asr_hybrid (speech to text), st (speech to a translation), mt (text to a translation),
text_classification (text to a label). The run folder is exp_manager.exp_dir/name; the same command again resumes there.
``--cfg job`` prints the config.
"""

from pathlib import Path

from omegaconf import DictConfig

from nemo_slam import command_line


@command_line.main(str(Path(__file__).resolve().parents[1] / "conf" / "finetuning"), "asr_ctc")
def main(cfg: DictConfig) -> None:
    command_line.check_finetuning_keys(cfg)
    from nemo_slam.finetuning.finetune import finetune

    finetune(cfg)


if __name__ == "__main__":
    main()
