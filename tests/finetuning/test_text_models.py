"""Text in: translation and classification from a pre-trained .nemo, resumed exactly, restored, equal alone and in a
batch."""

import csv
import json
import os
import signal
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from nemo.core.classes import ModelPT

from nemo_slam.config import ConfigError
from nemo_slam.data.bad_rows import DataError, EmptyStreamError
from nemo_slam.finetuning.finetune import finetune
from nemo_slam.finetuning.loader import TrainingDataset
from nemo_slam.finetuning.text_encoder import SLAMTextEncoder
from nemo_slam.finetuning.text_model import TextModel
from nemo_slam.packing import SequenceLayout
from nemo_slam.training.initialise import read_weights

CONF = Path(__file__).parents[2] / "conf" / "finetuning"
NODE = {
    "conformer": {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4, "dropout": 0.0},
    "text_encoder": {"vocab_size": 20, "dropout": 0.0},
    "multimodal_encoder": {"num_layers": 2},
    "pad_multiple": 8,
}


def noisy(encoder):
    with torch.no_grad():
        for parameter in encoder.parameters():  # the modality table starts at zero, norms at one: hide nothing
            parameter.add_(0.1 * torch.randn_like(parameter))
    return encoder.double().eval()


@pytest.mark.parametrize(("cls", "lengths"), [(False, [[5], [9], [1]]), (True, [[4], [7]]), (True, [[3, 4], [6, 1]])])
def test_encoder_is_the_layers_applied_to_each_row_alone(cls, lengths):
    torch.manual_seed(0)
    encoder = noisy(SLAMTextEncoder(**NODE, cls=cls, texts=len(lengths[0])))
    sizes = torch.tensor(lengths)
    tokens = torch.randint(0, 20, (len(lengths), int(sizes.sum(1).max()) + 2))
    found, ends = encoder(tokens, sizes)
    for row, parts in enumerate(lengths):
        pieces = [encoder.multimodal_encoder.cls] if cls else []
        position = place = 0
        for number, size in enumerate(parts):
            if number:
                pieces.append(encoder.separator)
                position += 1
            own = tokens[row, place : place + size]
            text = encoder.text_encoder(own, torch.arange(position, position + size))
            pieces.append(text + encoder.multimodal_encoder.modality[1])
            position, place = position + size, place + size
        rows = torch.cat(pieces)
        assert ends[row] == len(rows)
        layout = SequenceLayout.build(np.array([len(rows)]))
        tail = rows.new_zeros(layout.num_rows - len(rows), 32)
        expected = encoder.multimodal_encoder(torch.cat([rows, tail]), layout)[: len(rows)]
        torch.testing.assert_close(found[row, : len(rows)], expected, rtol=0, atol=1e-9)
        assert not found[row, len(rows) :].any()


def test_a_wrong_number_of_texts_is_named():
    encoder = SLAMTextEncoder(**NODE)
    with pytest.raises(ValueError, match="say 2 texts in a row, the encoder was built for 1"):
        encoder(torch.zeros(1, 4, dtype=torch.int64), torch.tensor([[2, 2]]))


WORDS = {"uno": "one", "dos": "two", "tres": "three", "si": "yes", "no": "not"}


@pytest.fixture(scope="module")
def manifest(tmp_path_factory):
    """Texts, their translations word by word, and whether the first word is said again (a class), by a second text."""
    rng = np.random.default_rng(0)
    rows = []
    for number in range(24):
        words = [list(WORDS)[i] for i in rng.integers(0, 5, number % 6 + 2)]
        second = words if number % 2 else words[::-1]
        rows.append(
            {
                "text": " ".join(words),
                "translation": " ".join(WORDS[word] for word in words),
                "second": " ".join(second),
                "label": number % 2,
                "lang": "es",
            }
        )
    path = tmp_path_factory.mktemp("texts") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def pretrained(manifest, tmp_path_factory):
    """A .nemo of pre-training on text, with its tokenizer inside."""
    from omegaconf import OmegaConf

    from nemo_slam.data.tokenizer import train_tokenizer
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    folder = tmp_path_factory.mktemp("pretrained")
    spm = train_tokenizer([manifest], folder / "spm", 18, allow_smaller=True)
    node = {
        "preprocessor": {
            "_target_": "nemo.collections.asr.modules.AudioToMelSpectrogramPreprocessor",
            "features": 80,
            "dither": 0.0,
        },
        "tokenizer": {"model_path": str(spm / "tokenizer.model")},
        "conformer": {"d_model": 32, "d_ff": 64, "n_heads": 2, "conv_norm_groups": 4},
        "speech_encoder": {"num_layers": 1, "conv_channels": 4},
        "text_encoder": {"vocab_size": 20},
        "multimodal_encoder": {"num_layers": 1},
        "quantizer": {"num_codes": 8, "code_dim": 8},
        "objectives": {"masked_text": {}},
    }
    torch.manual_seed(3)
    model = SLAMPretrainingModel(OmegaConf.create(node))
    model.save_to(str(folder / "slam.nemo"))
    return folder / "slam.nemo"


def config(name, manifest, exp_dir, *overrides):
    decoder = ["hidden_size=16", "inner_size=16", "max_sequence_length=24", "num_layers=1"]
    keys = {
        "mt": [*(f"model.transf_decoder.{key}" for key in decoder), "tokenizer.vocab_size=20"],
        "text_classification": ["data.train_ds.target_key=label", "data.train_ds.second_key=second"],
    }
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(
            name,
            overrides=[
                "model=tiny",
                "data.prepare=null",
                f"data.train_ds.manifest_filepath={manifest}",
                f"data.validation_ds.manifest_filepath={manifest}",
                "data.train_ds.tokens_per_step=60",
                "data.num_workers=0",
                "trainer.max_steps=6",
                "trainer.log_every_n_steps=1",
                "trainer.val_check_interval=4",
                "trainer.accelerator=cpu",
                "checkpoint.every_n_steps=2",
                f"exp_manager.exp_dir={exp_dir}",
                "exp_manager.create_tensorboard_logger=false",
                *keys[name],
                *overrides,
            ],
        )


def rows(run_folder):
    with open(run_folder / "metrics.csv", newline="") as file:
        return [{k: v for k, v in row.items() if "second" not in k} for row in csv.DictReader(file)]


TASKS = ["mt", "text_classification"]


@pytest.fixture(scope="module", params=TASKS)
def straight(request, manifest, pretrained, tmp_path_factory):
    """Name, run folder and overrides of six steps, the encoder frozen for two of them."""
    folder = tmp_path_factory.mktemp(request.param)
    overrides = [f"init_from={pretrained}", "freeze_encoder_steps=2", "model.encoder.conformer.dropout=0.1"]
    return request.param, finetune(config(request.param, manifest, folder, *overrides)), overrides


def test_resume_after_a_kill_is_as_if_never_stopped(straight, manifest, tmp_path, monkeypatch):
    name, expected, overrides = straight
    get = TrainingDataset.__getitem__

    def killed(self, number):
        if number == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return get(self, number)

    with monkeypatch.context() as patch:
        patch.setattr(TrainingDataset, "__getitem__", killed)
        with pytest.raises(SystemExit, match="143"):
            finetune(config(name, manifest, tmp_path, *overrides))
    assert not (tmp_path / name / f"{name}.nemo").exists()
    run_folder = finetune(config(name, manifest, tmp_path, *overrides))
    assert rows(run_folder) == rows(expected)
    weights, wanted = (read_weights(folder / f"{name}.nemo") for folder in (run_folder, expected))
    assert weights.keys() == wanted.keys()
    assert [key for key in wanted if not torch.equal(weights[key], wanted[key])] == []


def test_rates_differ_and_the_encoder_begins_late_from_the_pretrained_weights(straight, manifest, pretrained, tmp_path):
    name, run_folder, overrides = straight
    training = [row for row in rows(run_folder) if row["loss"]]
    encoder = [float(row["lr_encoder"]) for row in training]
    assert encoder[0] == 0.0
    assert encoder[1] > 0
    assert all(float(row["lr"]) > rate for row, rate in zip(training, encoder, strict=True))
    frozen = finetune(config(name, manifest, tmp_path, *overrides, "freeze_encoder_steps=6"))
    before, after, trained = (
        read_weights(p) for p in (pretrained, frozen / f"{name}.nemo", run_folder / f"{name}.nemo")
    )
    parts = [key for key in before if key.startswith(("text_encoder", "multimodal_encoder"))]
    assert "text_encoder.embedding.weight" in parts
    assert all(torch.equal(before[key], after[f"encoder.{key}"]) for key in parts)
    assert any(not torch.equal(before[key], trained[f"encoder.{key}"]) for key in parts)


def test_restored_it_answers_each_text_alike_alone_and_in_a_batch(straight):
    name, run_folder, _ = straight
    path = run_folder / f"{name}.nemo"
    model = ModelPT.restore_from(str(path), map_location="cpu").eval()
    assert not [key for key in read_weights(path) if "_extra_state" in key]
    texts = ["uno dos", "si no tres uno dos si", "tres", "no no si"]
    if name == "mt":
        with torch.no_grad():  # an untrained head says the same of everything: give it something to say, by chance
            head = model.log_softmax.mlp.layer0
            head.weight.copy_(torch.randn(head.weight.shape, generator=torch.Generator().manual_seed(1)))
        together = model.translate(texts)
        assert len(set(together)) > 1
        assert [model.translate([text])[0] for text in texts] == together
    else:
        pairs = [[text, "uno no"] for text in texts]
        with torch.no_grad():
            logits = model(*model.encode_texts(pairs))
            alone = torch.cat([model(*model.encode_texts([pair])) for pair in pairs])
        assert (logits[0] - logits[1]).abs().max() > 1e-4
        torch.testing.assert_close(alone, logits, rtol=0, atol=1e-5)
        assert model.answer(pairs) == [model.labels[i] for i in logits.argmax(-1).tolist()]


def test_validation_figures_are_the_libraries_own(straight, manifest):
    import sacrebleu

    name, run_folder, _ = straight
    model = ModelPT.restore_from(str(run_folder / f"{name}.nemo"), map_location="cpu").eval()
    data = [json.loads(line) for line in manifest.read_text().splitlines()]
    (last,) = [row for row in rows(run_folder) if row.get("val_loss")][-1:]
    assert last["step"] == "4"
    # The saved weights are those of step 6: validate with them again, through the model's own counts.
    model._validation = []
    from nemo_slam.finetuning.sentences import Sentences

    tokens = [np.concatenate([model.source_tokenizer.encode([t])[0] for t in texts]) for texts in _texts(name, data)]
    lengths = np.array([[len(model.source_tokenizer.encode([t])[0]) for t in texts] for texts in _texts(name, data)])
    if name == "mt":
        targets = [np.array(model.tokenizer.text_to_ids(row["translation"])) for row in data]
        batch = model.collate(Sentences(tokens, lengths, targets))
        with torch.no_grad():
            figures = model.validation_figures(model.validation_counts(batch).numpy())
        expected = sacrebleu.corpus_bleu(
            model.translate([row["text"] for row in data]), [[r["translation"] for r in data]]
        )
        assert figures["sacreBLEU"] == pytest.approx(expected.score)
    else:
        batch = model.collate(Sentences(tokens, lengths, [np.array([row["label"]]) for row in data]))
        with torch.no_grad():
            figures = model.validation_figures(model.validation_counts(batch).double().numpy())
        right = [a == str(row["label"]) for a, row in zip(model.answer(_texts(name, data)), data, strict=True)]
        assert figures["accuracy"] == pytest.approx(np.mean(right))


def test_counts_are_added_up_exactly():
    """float32 would lose the last one."""
    seen = {}

    class Model(TextModel):
        device = torch.device("cpu")

        def __init__(self):
            torch.nn.Module.__init__(self)
            self._validation = [torch.tensor([2.0**24, 1.0]).double(), torch.tensor([1.0, 1.0]).double()]

        def validation_figures(self, counts):
            seen["counts"] = counts.tolist()
            return {}

    Model().on_validation_epoch_end()
    assert seen["counts"] == [2**24 + 1, 2]


def _texts(name, data):
    return [[row["text"]] if name == "mt" else [row["text"], row["second"]] for row in data]


@pytest.mark.parametrize("name", TASKS)
def test_it_learns_from_scratch_with_early_stopping(name, manifest, tmp_path):
    """The task is word by word (or: is the second text the first?), so a tiny model gets better at once."""
    small = ["conformer.d_model=32", "conformer.d_ff=64", "conformer.n_heads=2", "conformer.conv_norm_groups=4"]
    small += ["multimodal_encoder.num_layers=1", "text_encoder.dropout=0.0"]
    keys = [*(f"model.encoder.{key}" for key in small), "source_tokenizer.vocab_size=20", "early_stopping.patience=3"]
    steps = ["trainer.max_steps=40", "trainer.val_check_interval=20", "model.optim.sched.warmup_steps=5"]
    steps += ["model.optim_param_groups.encoder.warmup_steps=5"]
    run_folder = finetune(config(name, manifest, tmp_path, *keys, *steps))
    losses = [float(row["val_loss"]) for row in rows(run_folder) if row.get("val_loss")]
    assert losses[-1] < 0.9 * (3.0 if name == "mt" else 0.7)
    assert (run_folder / "checkpoints" / "best.pt").exists()
    assert type(ModelPT.restore_from(str(run_folder / f"{name}.nemo"))).__module__.startswith("nemo_slam.finetuning")


@pytest.mark.parametrize(
    ("name", "override", "error", "message"),
    [
        (
            "mt",
            "data.train_ds.target_key=summary",
            EmptyStreamError,
            r"has a string 'summary' \(data\.train_ds\.target_key",
        ),
        ("mt", "data.train_ds.text_key=summary", DataError, r"rows\.jsonl:1: missing key 'summary'"),
        ("mt", "model.source_tokenizer.model_path=x", ValueError, "brings its own"),
        ("mt", "tokenizer.sequence_symbols=false", ValueError, r"no <s>, </s> and <pad>"),
        (
            "mt",
            "+data.train_ds.second_key=second",
            ConfigError,
            r"second_key=second: SLAMTranslationModel reads one text",
        ),
        (
            "text_classification",
            "data.validation_ds.second_key=null",
            ConfigError,
            r"data\.validation_ds has 1 text\(s\) a row \(text\), data\.train_ds 2 \(text, second\)",
        ),
        ("text_classification", "model.labels=[0,2]", DataError, r"rows\.jsonl:2: the label '1' is not one of 0, 2"),
        ("text_classification", "data.train_ds.target_key=kind", EmptyStreamError, "has a label 'kind'"),
        ("text_classification", "model.pool=max", ValueError, "pool: 'max' is not one of mean, cls"),
    ],
)
def test_what_cannot_work_says_so_at_once(name, override, error, message, manifest, pretrained, tmp_path):
    overrides = [f"init_from={pretrained}", "data.on_bad_row=raise", override]
    with pytest.raises(error, match=message):
        finetune(config(name, manifest, tmp_path, *overrides))


def test_a_target_tokenizer_of_other_text_is_refused(manifest, pretrained, tmp_path):
    from nemo_slam.data.tokenizer import train_on_lines

    lines = ["one yes not ten roses"] * 20  # no w as in two, no h as in three
    other = train_on_lines(lines, tmp_path / "spm", 24, allow_smaller=True, sequence_symbols=True)
    with pytest.raises(DataError, match=r"data\.train_ds, translation: .* unknown to the tokenizer .*spm/tokenizer"):
        finetune(config("mt", manifest, tmp_path, f"init_from={pretrained}", f"model.tokenizer.dir={other}"))


def test_an_encoder_without_text_is_named(straight, manifest, pretrained, tmp_path):
    """A recogniser has no text encoder to translate with."""
    from nemo_slam.data.tokenizer import train_on_lines
    from nemo_slam.export import export_nemo

    spm = train_on_lines(["one two three", "press star two"] * 20, tmp_path / "spm", 24, allow_smaller=True)
    export_nemo(pretrained, "ctc", spm, tmp_path / "ctc.nemo")
    with pytest.raises(ValueError, match=r"ctc\.nemo \(.*EncDecCTCModelBPE\) has no SLAM text encoder.*with text in"):
        finetune(config("mt", manifest, tmp_path, f"init_from={tmp_path}/ctc.nemo"))
