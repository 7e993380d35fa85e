"""A pre-trained encoder as a stock NeMo ASR ``.nemo``, ready for NeMo's own fine-tuning scripts."""

from __future__ import annotations

from pathlib import Path

from nemo.core.classes import ModelPT
from nemo.utils.model_utils import import_class_by_path
from omegaconf import OmegaConf, open_dict

from nemo_slam.finetuning.finetune import MINIMUM_INITIALISED
from nemo_slam.finetuning.pretrained import encoder_node, initialise_encoder, read_pretrained
from nemo_slam.finetuning.task import check_tokenizer
from nemo_slam.training.initialise import LoadReport
from nemo_slam.training.pretrain import save_nemo

TARGETS = {"ctc": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE"}
DROPOUT = {"conformer": {"dropout": 0.1}}


def build_stock_model(source: str | Path, to: str, tokenizer: str | Path) -> tuple[ModelPT, LoadReport]:
    """A stock model with the encoder of ``source``; its decoder is as initialised.

    Args:
        source: a ``.nemo`` of pre-training.
        to: a key of TARGETS.
        tokenizer: a folder of ``scripts/train_tokenizer.py``.

    Raises:
        FileNotFoundError, ValueError: of the file, the target or the tokenizer.
    """
    if to not in TARGETS:
        raise ValueError(f"--to: {to!r} is not one of {', '.join(TARGETS)}")
    tokenizer = check_tokenizer(tokenizer, "--tokenizer")
    pretrained = read_pretrained(source)
    node = {
        "target": TARGETS[to],
        "sample_rate": 16000,
        "tokenizer": {"dir": str(tokenizer), "type": "bpe"},
        "preprocessor": pretrained.preprocessor,
        "encoder": encoder_node(DROPOUT, pretrained),
        "decoder": {
            "_target_": "nemo.collections.asr.modules.ConvASRDecoder",
            "feat_in": None,
            "num_classes": -1,
            "vocabulary": [],
        },
    }
    model = import_class_by_path(TARGETS[to])(cfg=OmegaConf.create(node))
    report = initialise_encoder(model.encoder, pretrained, MINIMUM_INITIALISED)
    # transcribe() reads validation_ds, and NeMo's fine-tuning scripts fill these in.
    common = {"manifest_filepath": None, "sample_rate": 16000, "batch_size": 8, "use_start_end_token": False}
    with open_dict(model.cfg):
        model.cfg.train_ds = {**common, "shuffle": True}
        model.cfg.validation_ds = {**common, "shuffle": False}
    return model, report


def export_nemo(source: str | Path, to: str, tokenizer: str | Path, out: str | Path) -> LoadReport:
    """Write :func:`build_stock_model` to ``out``."""
    out = Path(out)
    if out.suffix != ".nemo":
        raise ValueError(f"{out}: the file must end in .nemo")
    model, report = build_stock_model(source, to, tokenizer)
    out.parent.mkdir(parents=True, exist_ok=True)
    save_nemo(model, out)
    return report
