"""Pre-train SLAM.

    python scripts/speech_pretrain.py --config-name slam_stage1                                # the paper's stage 1
    python scripts/speech_pretrain.py --config-name slam_stage1 model=tiny                     # on a CPU, in minutes
    python scripts/speech_pretrain.py --config-name slam_stage2 init_from=runs/slam_stage1/slam_stage1.nemo

The run folder is exp_manager.exp_dir/name; the same command again resumes there. ``--cfg job`` prints the resolved
config.
"""

import hydra
from omegaconf import DictConfig


@hydra.main(config_path="../conf", config_name="slam_stage1", version_base="1.3")
def main(cfg: DictConfig) -> None:
    from nemo_slam.training.pretrain import pretrain

    pretrain(cfg)


if __name__ == "__main__":
    main()
