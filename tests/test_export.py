"""export_nemo: a pre-trained encoder as a stock model."""

import json
import tarfile

import pytest
import torch
from nemo.collections.asr.models import ASRModel, EncDecCTCModelBPE
from omegaconf import open_dict

from nemo_slam.archive import read_config
from nemo_slam.data.tokenizer import train_on_lines
from nemo_slam.export import build_stock_model, export_nemo
from nemo_slam.models.pretraining import SLAMPretrainingModel
from nemo_slam.training.initialise import read_weights
from nemo_slam.training.pretrain import save_nemo


@pytest.fixture
def source(model_config, tmp_path):
    torch.manual_seed(2)
    path = tmp_path / "slam.nemo"
    SLAMPretrainingModel(model_config()).save_to(str(path))
    return path


@pytest.fixture
def tokenizer(tmp_path_factory):
    lines = ["one two three", "press star two"] * 20
    return train_on_lines(lines, tmp_path_factory.mktemp("spm"), 24, allow_smaller=True)


def test_stock_model_with_the_pretrained_encoder(source, tokenizer, tmp_path):
    out = tmp_path / "deep" / "ctc.nemo"
    report = export_nemo(source, "ctc", tokenizer, out)
    assert report.share == 1.0
    before, after = read_weights(source), read_weights(out)
    encoder = [name for name in before if name.startswith(("speech_encoder", "multimodal_encoder"))]
    assert {f"encoder.{name}" for name in encoder} == {name for name in after if name.startswith("encoder.")}
    assert all(torch.equal(before[name], after[f"encoder.{name}"]) for name in encoder)
    assert not [name for name in after if "_extra_state" in name]

    model = ASRModel.restore_from(str(out), map_location="cpu")
    assert type(model) is EncDecCTCModelBPE
    assert model.decoder.num_classes_with_blank == model.tokenizer.vocab_size + 1
    assert len(model.transcribe([torch.zeros(16000)], verbose=False)) == 1


def test_what_a_run_chose_for_its_machine_is_left_open_in_its_nemo(model_config, source, tokenizer, tmp_path):
    """Explicit choices are errors where they cannot be had: on a CPU, and on a GPU in fp32, which inference runs in."""
    chosen = {"kernels": "triton", "attention": "varlen", "compile": True, "dropout": 0.25}
    model, _ = build_stock_model(source, "ctc", tokenizer)
    with open_dict(model.cfg):
        model.cfg.encoder.conformer.update(chosen)
    pretrained = SLAMPretrainingModel(model_config(conformer={**model_config().conformer, **chosen, "fp8": "gemm"}))
    for each, node in ((model, "encoder"), (pretrained, None)):
        save_nemo(each, tmp_path / "run.nemo")
        config = read_config(tmp_path / "run.nemo")
        conformer = (config if node is None else config[node])["conformer"]
        assert {key: conformer[key] for key in chosen} == {
            "kernels": "auto", "attention": "auto", "compile": False, "dropout": 0.25
        }  # fmt: skip
        assert conformer.get("fp8", "none") == "none"
        if node is not None:
            restored = ASRModel.restore_from(str(tmp_path / "run.nemo"), map_location="cpu")
            assert len(restored.transcribe([torch.zeros(16000)], verbose=False)) == 1
    kept = {"kernels": "torch", "attention": "sdpa"}
    model.cfg.encoder.conformer.update(kept)
    save_nemo(model, tmp_path / "run.nemo")
    assert kept.items() <= read_config(tmp_path / "run.nemo")["encoder"]["conformer"].items()


def test_what_cannot_be_exported_is_named(source, tokenizer, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"--tokenizer: .*none holds no tokenizer\.model"):
        export_nemo(source, "ctc", tmp_path / "none", tmp_path / "x.nemo")
    with pytest.raises(ValueError, match=r"must end in \.nemo"):
        export_nemo(source, "ctc", tokenizer, tmp_path / "x.tar")
    with pytest.raises(ValueError, match=r"'tts' is not one of ctc"):
        export_nemo(source, "tts", tokenizer, tmp_path / "x.nemo")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["slam.nemo"]


def test_only_ctc_models_become_ctc_in_onnx(source, tmp_path):
    from nemo_slam.export_onnx import export_onnx

    with pytest.raises(ValueError, match=r"SLAMPretrainingModel, which is no CTC model"):
        export_onnx(source, "ctc", tmp_path / "x.onnx")
    other = {
        "target": "nemo.collections.asr.models.ctc_bpe_models.EncDecCTCModelBPE",
        "encoder": {"_target_": "x.Other"},
    }
    (tmp_path / "model_config.yaml").write_text(json.dumps(other))  # JSON is YAML
    with tarfile.open(tmp_path / "other.nemo", "w") as archive:
        archive.add(tmp_path / "model_config.yaml", "model_config.yaml")
    with pytest.raises(ValueError, match=r"has the encoder x\.Other, not .*SLAMEncoder: NeMo's own export"):
        export_onnx(tmp_path / "other.nemo", "ctc", tmp_path / "x.onnx")
    with pytest.raises(ValueError, match=r"must end in \.onnx"):
        export_onnx(source, "encoder", tmp_path / "x.nemo")
    with pytest.raises(ValueError, match="'decoder' is not one of encoder, ctc"):
        export_onnx(source, "decoder", tmp_path / "x.onnx")


class Bomb:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.path}",)


def hostile(good, path, weights=None, extra=()):
    """A copy of a .nemo with other weights, and members with the names in ``extra``."""
    import io
    import tarfile

    with tarfile.open(good) as source, tarfile.open(path, "w") as target:
        for member in source:
            if not member.isfile():
                continue
            content = source.extractfile(member).read()
            if weights is not None and member.name.endswith("model_weights.ckpt"):
                content, member.size = weights, len(weights)
            target.addfile(member, io.BytesIO(content))
        for name in extra:
            info = tarfile.TarInfo(name)
            info.size = 1
            target.addfile(info, io.BytesIO(b"x"))
    return path


def test_hostile_archives_run_and_write_nothing(source, tokenizer, tmp_path):
    """A pickle for weights, and names that leave the folder, by every door that takes a .nemo."""
    import contextlib
    import io
    import pickle
    import tarfile

    from nemo_slam.evaluation.probing import probe_model
    from nemo_slam.evaluation.transcription import restore
    from nemo_slam.export_onnx import export_onnx

    good = tmp_path / "ctc.nemo"
    export_nemo(source, "ctc", tokenizer, good)
    marker, outside = tmp_path / "ran", tmp_path / "outside"
    buffer = io.BytesIO()
    torch.save({"encoder.x": Bomb(marker)}, buffer)
    torch.load(io.BytesIO(buffer.getvalue()), weights_only=False)
    assert marker.exists()  # the bomb works where pickles are run
    marker.unlink()

    doors = [
        restore,
        lambda path: export_nemo(path, "ctc", tokenizer, tmp_path / "x.nemo"),
        lambda path: export_onnx(path, "encoder", tmp_path / "x.onnx"),
        lambda path: probe_model(path, []),
    ]
    for weights in (buffer.getvalue(), pickle.dumps(Bomb(marker))):
        bomb = hostile(good, tmp_path / "bomb.nemo", weights=weights)
        for door in doors:
            with pytest.raises(Exception, match=r"(?i)weights|unpickl|pickle|archive|magic"):
                door(bomb)
            assert not marker.exists()

    walk = hostile(good, tmp_path / "walk.nemo", extra=(f"../../../../../..{outside}", str(outside)))
    for door in doors[:2]:
        with contextlib.suppress(tarfile.TarError, ValueError, RuntimeError):
            door(walk)  # refused, or restored without those members: never written
        assert not outside.exists()


def test_a_nemo_restores_on_a_cpu_as_any_stock_model(source, tokenizer, tmp_path):
    """In a process that imports nemo_slam and nothing else of ours."""
    import subprocess
    import sys

    export_nemo(source, "ctc", tokenizer, tmp_path / "ctc.nemo")
    script = (
        "import nemo_slam, numpy as np\n"
        "from nemo.collections.asr.models import ASRModel\n"
        f"model = ASRModel.restore_from({str(tmp_path / 'ctc.nemo')!r}, map_location='cpu')\n"
        "print(type(model).__name__, len(model.transcribe([np.zeros(16000, np.float32)], verbose=False)))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[-2:] == ["EncDecCTCModelBPE", "1"]
