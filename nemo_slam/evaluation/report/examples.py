"""A few validation examples through a run's newest weights: what its masks, codes and pairs look like from inside.

Shape legend: F mel channels, T feature frames, R encoder rows of one utterance (40 ms each), L tokens of one text,
K codes, n texts.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from nemo_slam.data.batch import PairBatch, StepBatch
from nemo_slam.evaluation.report.runs import Run

if TYPE_CHECKING:
    from nemo_slam.models.masking import MaskedRows
    from nemo_slam.models.pretraining import SLAMPretrainingModel
    from nemo_slam.models.step import StepOutputs

BATCHES = 3
"""Validation batches that the code histogram is counted over."""
CANDIDATES = 12
PAIRS = 2
SPECTROGRAM_SECONDS = 5.0
"""The utterance nearest in length to this is shown."""


@dataclass(frozen=True)
class MaskedUtterance:
    """*Shape:* mel (F, T); mask (R,) bool; codes, predicted (R,) int64, -1 where nothing is masked."""

    mel: np.ndarray
    mask: np.ndarray
    codes: np.ndarray
    predicted: np.ndarray
    num_codes: int

    @property
    def spans(self) -> list[tuple[int, int]]:
        """(first row, one past the last) of each run of masked rows."""
        edges = np.flatnonzero(np.diff(np.concatenate([[0], self.mask.astype(int), [0]])))
        return [(int(a), int(b)) for a, b in edges.reshape(-1, 2)]

    @property
    def right(self) -> float:
        return float((self.codes == self.predicted)[self.mask].mean()) if self.mask.any() else 0.0


@dataclass(frozen=True)
class PairSimilarity:
    """*Shape:* cosine (L, R) of centred rows; ``tokens`` are its L pieces."""

    cosine: np.ndarray
    tokens: list[str]
    text: str


@dataclass(frozen=True)
class Retrieval:
    """*Shape:* probability (n, n) that text j belongs to utterance i; best (n,); correct (n,) bool, where an equal text
    counts as the own one."""

    probability: np.ndarray
    best: np.ndarray
    correct: np.ndarray


@dataclass
class Examples:
    """What there is to show of a run's model.

    Attributes:
        source: the weights' file and their step, or why there is nothing.
        code_counts: (K,) how often each code was a target.
        missing: by panel (``codes``, ``spectrogram``, ``similarity``, ``retrieval``), why it is not there.
    """

    source: str
    code_counts: np.ndarray | None = None
    spectrogram: MaskedUtterance | None = None
    similarity: list[PairSimilarity] = field(default_factory=list)
    retrieval: Retrieval | None = None
    trained_on_pairs: bool = False
    missing: dict[str, str] = field(default_factory=dict)


PANELS = ("codes", "spectrogram", "similarity", "retrieval")


def nothing(reason: str) -> Examples:
    """No example, for one reason."""
    return Examples(reason, missing=dict.fromkeys(PANELS, reason))


def weights_of(run: Run) -> tuple[Path, str] | None:
    """The newest weights of a run: the ``.nemo`` if it is at least as new as the last checkpoint, else that."""
    from nemo_slam.training.checkpoints import finished_checkpoints

    checkpoints = finished_checkpoints(run.folder / "checkpoints")
    archives = sorted(run.folder.glob("[!.]*.nemo"), key=lambda path: path.stat().st_mtime)
    if archives and (not checkpoints or archives[-1].stat().st_mtime >= checkpoints[-1][1].stat().st_mtime):
        return archives[-1], archives[-1].name
    return (checkpoints[-1][1], f"checkpoint of step {checkpoints[-1][0]}") if checkpoints else None


def restore(run: Run, weights: Path) -> SLAMPretrainingModel:
    """The run's model with these weights, ready to evaluate, on the GPU if there is one."""
    from omegaconf import OmegaConf

    from nemo_slam.archive import for_any_machine
    from nemo_slam.models.pretraining import SLAMPretrainingModel
    from nemo_slam.training.initialise import load_weights, read_weights

    tokenizer = Path(run.setting("model.tokenizer.model_path") or "")
    if not tokenizer.is_file():
        raise FileNotFoundError(
            f"the tokenizer {tokenizer} is not here; make the report in the folder that the run was started from"
        )
    config = OmegaConf.create(run.config["model"])
    for_any_machine(config)
    model = SLAMPretrainingModel(config)
    load_weights(model, read_weights(weights), weights, minimum=1.0)
    return model.to("cuda" if torch.cuda.is_available() else "cpu").eval()


def read_examples(run: Run) -> Examples:
    """Everything that the run's model and validation data allow; what they do not, with the reason."""
    if not run.is_pretraining:
        return nothing("a fine-tuned model: see its transcripts")
    found = weights_of(run)
    if found is None:
        return nothing("the run has no checkpoint and no .nemo")
    if not run.setting("model.validation_ds"):
        return nothing("the run's config names no validation data")
    try:
        model = restore(run, found[0])
        batches = validation_batches(run, model)
        with torch.no_grad():
            return examples(model, batches, found[1])
    except torch.OutOfMemoryError:
        return nothing("the GPU has no room for the model beside what runs on it; CUDA_VISIBLE_DEVICES= takes the CPU")
    except (OSError, ValueError, RuntimeError) as error:  # the last is torch's, of a damaged file
        return nothing(f"{found[1]} or the validation data cannot be read: {error}")


def validation_batches(run: Run, model: SLAMPretrainingModel) -> list[StepBatch]:
    """The first batches of the run's validation data: the streams of its objectives, and pairs if the config has
    them."""
    from nemo_slam.data.loader import ValidationDataset, build_streams

    node = run.setting("model.validation_ds")
    wanted = {*model.streams, "pairs"}
    chosen = {name: streams for name, streams in node.items() if name in wanted and streams is not None}
    streams = build_streams(
        chosen, seed=int(run.config.get("seed", 0)), tokenizer=model.tokenizer_model, split="validation"
    )
    dataset, device = ValidationDataset(streams), next(model.parameters()).device
    return [dataset[i].to(device) for i in range(min(BATCHES, len(dataset)))]


def examples(model: SLAMPretrainingModel, batches: list[StepBatch], source: str) -> Examples:
    """All panels from these batches."""
    result = Examples(source)
    name = next((n for n in ("masked_speech", "translation_lm") if n in model.objectives), None)
    if name is None:
        reason = "no objective of this run masks speech"
        result.missing |= {"codes": reason, "spectrogram": reason}
    else:
        result.code_counts, result.spectrogram = masked_speech(model, batches, name)
    pairs = next((batch.pairs for batch in batches if batch.pairs is not None and len(batch.pairs) > 1), None)
    result.trained_on_pairs = "pairs" in model.streams
    if pairs is None:
        reason = "the run's validation data hold no pairs"
        result.missing |= {"similarity": reason, "retrieval": reason}
        return result
    result.similarity = similarities(model, pairs)
    if "matching" in model.objectives:
        result.retrieval = retrieve(model, pairs)
    else:
        result.missing["retrieval"] = "no matching objective in this run"
    return result


def masked_speech(
    model: SLAMPretrainingModel, batches: list[StepBatch], name: str
) -> tuple[np.ndarray, MaskedUtterance | None]:
    """How often each code is a target over the batches, and one utterance of the first that has any."""
    assert model.speech_loss is not None
    counts = np.zeros(model.speech_loss.code_head.out_features, np.int64)
    shown: MaskedUtterance | None = None
    for batch in batches:
        speech = getattr(batch, "speech" if name == "masked_speech" else "pairs")
        if speech is None or len(speech) == 0:
            continue
        outputs = model(batch)
        masked = outputs.masked_speech[name]
        codes = target_codes(model, outputs, masked, name)
        counts += np.bincount(codes, minlength=len(counts))
        if shown is None:
            multimodal = next(key for key, request in outputs.multimodal.items() if request.speech == name)
            rows = outputs.hidden.index_select(0, outputs.to_multimodal(multimodal, "speech", masked.index))
            predicted = model.speech_loss.code_head(rows).argmax(-1).cpu().numpy()
            first_pair = len(batch.speech) if batch.speech is not None else 0
            first = 0 if name == "masked_speech" else first_pair
            shown = _utterance(outputs, masked, name, codes, predicted, first, len(counts))
    return counts, shown


def target_codes(model: SLAMPretrainingModel, outputs: StepOutputs, masked: MaskedRows, name: str) -> np.ndarray:
    """*Shape:* (M,) the codes that the masked rows are to predict."""
    from nemo_slam.modules.random_projection import RandomProjectionQuantizer

    loss = model.speech_loss
    assert loss is not None
    if isinstance(loss.quantizer, RandomProjectionQuantizer):
        return loss.quantizer(outputs.stacked_mel(masked.index)).cpu().numpy()
    return loss.targets(outputs, masked, name).code_ids.cpu().numpy()


def _utterance(
    outputs: StepOutputs,
    masked: MaskedRows,
    name: str,
    codes: np.ndarray,
    predicted: np.ndarray,
    first: int,
    num_codes: int,
) -> MaskedUtterance:
    """Cut one utterance out of a packed batch; ``first`` is where the input's utterances begin among the log-mels."""
    packed = outputs.packed_speech
    lengths = packed.lengths[name][:, 0]
    frames = outputs.mel_lengths[first : first + len(lengths)]
    chosen = int(np.abs(frames - SPECTROGRAM_SECONDS * 100).argmin())
    filled = [np.full(packed.layout.num_rows, -1, np.int64) for _ in range(2)]
    for column, values in zip(filled, (codes, predicted), strict=True):
        column[masked.index.cpu().numpy()] = values
    own = packed.starts[name][chosen, 0] + np.arange(lengths[chosen])
    mel = outputs.mel[first + chosen, :, : frames[chosen]].float().cpu().numpy()
    return MaskedUtterance(mel, filled[0][own] >= 0, filled[0][own], filled[1][own], num_codes)


def _centred(rows: Tensor) -> Tensor:
    """Rows of unit length about their mean: without that, all point the same way."""
    return torch.nn.functional.normalize(rows.float() - rows.float().mean(dim=0), dim=-1)


def similarities(model: SLAMPretrainingModel, pairs: PairBatch) -> list[PairSimilarity]:
    """Cosine of text rows with speech rows of the multimodal encoder's output, of true pairs, nothing masked."""
    import sentencepiece

    from nemo_slam.evaluation.probes import EncodedPairs

    encoded = EncodedPairs(model, pairs)
    lengths = pairs.lengths.numpy()
    hidden, packed = encoded.encode(range(len(pairs)), pairs.tokens, lengths, cls=True)
    sides = [_centred(hidden[torch.as_tensor(packed.rows_of("probe", s)).to(hidden.device)]) for s in (1, 2)]
    speech, text = (side.split(sizes.tolist()) for side, sizes in zip(sides, (encoded.lengths, lengths), strict=True))
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(model.tokenizer_model))
    texts = [part.tolist() for part in pairs.tokens.cpu().split(lengths.tolist())]
    # Long enough to show an order, short enough to read.
    order = sorted(range(len(pairs)), key=lambda i: (not 8 <= lengths[i] <= 24, abs(int(lengths[i]) - 16)))
    return [
        PairSimilarity(
            (text[i] @ speech[i].t()).cpu().numpy(),
            [pieces.id_to_piece(token) for token in texts[i]],
            pieces.decode(texts[i]),
        )
        for i in order[:PAIRS]
    ]


def retrieve(model: SLAMPretrainingModel, pairs: PairBatch) -> Retrieval:
    """Every chosen utterance with every chosen text, by the matching head."""
    from nemo_slam.evaluation.probes import EncodedPairs

    encoded = EncodedPairs(model, pairs)
    chosen = np.unique(np.linspace(0, len(pairs) - 1, CANDIDATES).round().astype(int))
    parts = pairs.tokens.split(pairs.lengths.tolist())
    texts = [parts[i] for i in chosen]
    lengths = pairs.lengths.numpy()[chosen]
    rows = [encoded.scores([int(i)] * len(chosen), torch.cat(texts), lengths) for i in chosen]
    scores = torch.stack(rows)
    best = scores.argmax(dim=1).cpu().numpy()
    correct = np.array([torch.equal(texts[b], texts[i]) for i, b in enumerate(best)])
    return Retrieval(scores.sigmoid().cpu().numpy(), best, correct)


def summary(examples: Examples) -> dict[str, Any]:
    """Figures of the panels, for captions."""
    found: dict[str, Any] = {}
    if examples.code_counts is not None and examples.code_counts.sum():
        share = examples.code_counts / examples.code_counts.sum()
        used = share[share > 0]
        found["perplexity"] = float(np.exp(-(used * np.log(used)).sum()))
        found["targets"] = int(examples.code_counts.sum())
        found["used"] = len(used)
    return found
