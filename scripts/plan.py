"""What a pre-training run needs: parameters, memory, work and time, computed from its config alone.

    python scripts/plan.py --gpus 64 --gpu h100 model=slam data=paper trainer.precision=bf16-mixed
    python scripts/plan.py --config-name slam_stage2 --gpus 1 model=base trainer.accumulate_grad_batches=4

Overrides are those of scripts/speech_pretrain.py. Nothing is measured: step time is the roofline, a lower limit.
docs/scaling.md says how far memory and operations are from measured ones.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

CONF = Path(__file__).resolve().parents[1] / "conf"


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    from nemo_slam.planning.hardware import GPUS

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE", help="as for scripts/speech_pretrain.py")
    parser.add_argument("--config-name", default="slam_stage1", help="default: %(default)s")
    parser.add_argument("--gpus", type=int, default=8, help="in all machines together; default: %(default)s")
    parser.add_argument("--gpus-per-node", type=int, default=8, help="default: %(default)s")
    parser.add_argument("--gpu", choices=sorted(GPUS), default="h100", help="default: %(default)s")
    parser.add_argument("--efficiency", type=float, default=0.5, help="share of the roofline's speed; default: 0.5")
    parser.add_argument("--speech-seconds", type=float, default=14.0, help="an utterance; default: %(default)s")
    parser.add_argument("--text-tokens", type=float, default=25.0, help="a text; default: %(default)s")
    parser.add_argument("--pair-seconds", type=float, default=12.0, help="speech of a pair; default: %(default)s")
    parser.add_argument("--pair-tokens", type=float, default=40.0, help="text of a pair; default: %(default)s")
    options = parser.parse_intermixed_args(arguments)
    for name, value in vars(options).items():
        if isinstance(value, (int, float)) and value <= 0:
            parser.error(f"--{name.replace('_', '-')} must be positive, got {value}")
    return options


def main() -> int:
    options = parse_arguments()
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    from nemo_slam.planning.hardware import GPUS
    from nemo_slam.planning.plan import Run, make_plan
    from nemo_slam.planning.report import report
    from nemo_slam.planning.workload import TypicalLengths

    try:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            cfg = compose(options.config_name, options.overrides)
        config = OmegaConf.to_container(cfg, resolve=True)
        run = Run(
            config,
            GPUS[options.gpu],
            options.gpus,
            options.gpus_per_node,
            TypicalLengths(options.speech_seconds, options.text_tokens, options.pair_seconds, options.pair_tokens),
            fused=config["model"]["conformer"]["kernels"] != "torch",
            efficiency=options.efficiency,
        )
        print(report(run, make_plan(run)))
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
