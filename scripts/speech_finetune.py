"""Fine-tune a pre-trained encoder inside a stock NeMo model.

    python scripts/speech_finetune.py --config-name asr_ctc init_from=runs/slam_stage2/slam_stage2.nemo
    python scripts/speech_finetune.py --config-name asr_ctc model=tiny init_from=runs/slam_stage1/slam_stage1.nemo
    python scripts/speech_finetune.py --config-name asr_ctc model=tiny   # from scratch, on a CPU, in minutes

The run folder is exp_manager.exp_dir/name; the same command again resumes there. ``--cfg job`` prints the config.
"""

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="../conf/finetuning", config_name="asr_ctc", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from nemo_slam.finetuning.finetune import finetune

    finetune(cfg)


if __name__ == "__main__":
    main()
