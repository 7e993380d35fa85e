"""What fine-tuning takes out of a .nemo, and what it refuses."""

import io
import os
import pickle
import tarfile

import pytest
import torch
import yaml

from nemo_slam.archive import read_config
from nemo_slam.finetuning.pretrained import encoder_node, encoder_weights, initialise_encoder, read_pretrained
from nemo_slam.models.encoder import SLAMEncoder
from nemo_slam.models.pretraining import SLAMPretrainingModel

RUN_TIME = {"conformer": {"dropout": 0.3, "d_model": 999}, "pad_multiple": 4}


def archive(path, **members: bytes):
    """A tar with the given members."""
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name.replace("__", "/"))
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return path


def test_architecture_comes_from_the_file_and_dropout_from_the_config(pretrained_nemo):
    pretrained = read_pretrained(pretrained_nemo)
    node = encoder_node(RUN_TIME, pretrained)
    assert node["conformer"]["d_model"] == 32
    assert node["conformer"]["dropout"] == 0.3
    assert node["pad_multiple"] == 4
    assert pretrained.preprocessor["features"] == 80


def test_every_weight_of_the_encoder_is_loaded(pretrained_nemo, model_config):
    pretrained = read_pretrained(pretrained_nemo)
    node = encoder_node({"conformer": {}}, pretrained)
    node.pop("_target_")
    encoder = SLAMEncoder(**node)
    report = initialise_encoder(encoder, pretrained, 1.0)
    assert not report.left
    assert not report.unexpected
    with tarfile.open(pretrained_nemo) as tar:
        original = torch.load(tar.extractfile("./model_weights.ckpt"), weights_only=True)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, original[name]), name


def test_the_last_layers_may_keep_their_random_weights(model_config, tmp_path):
    SLAMPretrainingModel(model_config(multimodal_encoder={"num_layers": 2})).save_to(str(tmp_path / "slam.nemo"))
    pretrained = read_pretrained(tmp_path / "slam.nemo")
    node = encoder_node({"conformer": {}}, pretrained)
    node.pop("_target_")
    encoder = SLAMEncoder(**node)
    before = {name: tensor.clone() for name, tensor in encoder.state_dict().items()}
    report = initialise_encoder(encoder, pretrained, 1.0, reinit_last_layers=1)
    assert not report.left  # they are in the file all the same
    last = "multimodal_encoder.layers.1."
    assert any(name.startswith(last) for name in before)
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, (before if name.startswith(last) else pretrained.weights)[name]), name
    with pytest.raises(ValueError, match=r"must be 0 to 2, the multimodal layers: 3"):
        initialise_encoder(encoder, pretrained, 1.0, reinit_last_layers=3)


def test_an_encoder_fine_tuned_on_pairs_of_texts_hands_on_its_separator():
    from nemo_slam.finetuning.text_encoder import SLAMTextEncoder

    conformer = {"d_model": 16, "d_ff": 32, "n_heads": 2, "conv_norm_groups": 4}
    node = {"conformer": conformer, "text_encoder": {"vocab_size": 8}, "multimodal_encoder": {"num_layers": 1}}
    own = SLAMTextEncoder(**node, texts=2).state_dict()
    weights = {**{f"encoder.{name}": tensor for name, tensor in own.items()}, "head.1.bias": torch.zeros(3)}
    assert encoder_weights(weights, "text").keys() == own.keys()


def test_too_little_loaded_stops_and_says_what_fits(pretrained_nemo):
    pretrained = read_pretrained(pretrained_nemo)
    narrow = {**pretrained.architecture["conformer"], "d_model": 16}
    encoder = SLAMEncoder(**{**pretrained.architecture, "conformer": narrow})
    with pytest.raises(ValueError, match=r"below the 95% wanted.*same model size"):
        initialise_encoder(encoder, pretrained, 0.95)


def test_a_model_without_our_encoder_is_named(tmp_path):
    config = yaml.safe_dump({"target": "other.Model", "encoder": {"feat_in": 80}}).encode()
    path = archive(tmp_path / "other.nemo", **{"model_config.yaml": config})
    with pytest.raises(ValueError, match=r"other\.nemo \(other\.Model\) has no SLAM speech encoder.*speech_pretrain"):
        read_pretrained(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [(b"no archive", "is not a .nemo archive"), (None, "does not exist")],
)
def test_what_is_no_archive_is_named(tmp_path, content, message):
    path = tmp_path / "x.nemo"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises((ValueError, FileNotFoundError), match=f"init_from: .*{message}"):
        read_pretrained(path)


class Bomb:
    """Pickles into a call that leaves a file behind."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


def valid_config() -> bytes:
    return yaml.safe_dump(
        {"preprocessor": {}, "conformer": {}, "speech_encoder": {}, "multimodal_encoder": {}}
    ).encode()


def test_a_pickle_in_place_of_weights_is_not_run(tmp_path):
    marker = tmp_path / "ran"
    buffer = io.BytesIO()
    torch.save({"speech_encoder.x": Bomb(marker)}, buffer)
    assert torch.load(io.BytesIO(buffer.getvalue()), weights_only=False) is not None
    assert marker.exists()  # the bomb works where pickles are run
    marker.unlink()
    for weights in (buffer.getvalue(), pickle.dumps(Bomb(marker))):
        path = archive(tmp_path / "bomb.nemo", **{"model_config.yaml": valid_config(), "model_weights.ckpt": weights})
        with pytest.raises((pickle.UnpicklingError, ValueError)):
            read_pretrained(path)
        assert not marker.exists()


def test_yaml_cannot_build_objects(tmp_path):
    marker = tmp_path / "ran"
    config = f'!!python/object/apply:os.system ["touch {marker}"]\n'.encode()
    with pytest.raises(ValueError, match="is not plain YAML"):
        read_config(archive(tmp_path / "bomb.nemo", **{"model_config.yaml": config}))
    assert not marker.exists()


def test_paths_that_leave_the_archive_are_never_written(tmp_path, monkeypatch):
    inside = tmp_path / "work"
    inside.mkdir()
    monkeypatch.chdir(inside)
    buffer = io.BytesIO()
    torch.save({"speech_encoder.x": torch.zeros(1)}, buffer)
    weights = buffer.getvalue()
    members = {"..__model_config.yaml": valid_config(), "..__..__model_weights.ckpt": weights, "__tmp__evil": b"x"}
    before = sorted(tmp_path.rglob("*"))
    path = archive(tmp_path / "walk.nemo", **members)
    assert read_pretrained(path).weights.keys() == {"speech_encoder.x"}
    assert sorted(tmp_path.rglob("*")) == sorted([*before, path])
    assert not os.path.exists("/tmp/evil")


def test_a_link_is_not_followed(tmp_path):
    secret = tmp_path / "secret.yaml"
    secret.write_bytes(valid_config())
    path = tmp_path / "link.nemo"
    with tarfile.open(path, "w") as tar:
        info = tarfile.TarInfo("model_config.yaml")
        info.type, info.linkname = tarfile.SYMTYPE, str(secret)
        tar.addfile(info)
    with pytest.raises(ValueError, match="holds no model_config"):
        read_config(path)
