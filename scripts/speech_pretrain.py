"""Pre-train SLAM.

    python scripts/speech_pretrain.py --config-name slam_stage1                                # the paper's stage 1
    python scripts/speech_pretrain.py --config-name slam_stage1 model=tiny                     # on a CPU, in minutes
    python scripts/speech_pretrain.py --config-name slam_stage2 init_from=runs/slam_stage1/slam_stage1.nemo

The run folder is exp_manager.exp_dir/name; the same command again resumes there. ``--cfg job`` prints the resolved
config.
"""

from pathlib import Path

from omegaconf import DictConfig

from nemo_slam import command_line


@command_line.main(str(Path(__file__).resolve().parents[1] / "conf"), "slam_stage1")
def main(cfg: DictConfig) -> None:
    command_line.check_run_keys(cfg)
    from nemo_slam.training.pretrain import pretrain

    pretrain(cfg)


if __name__ == "__main__":
    main()
