"""The guesses that stand beside the objectives' figures, against plain counting."""

import math
from collections import Counter

import numpy as np
import pytest
import torch

from nemo_slam.data.token_file import TokenReader, TokenWriter
from nemo_slam.objectives.base import Histogram, Loss, ObjectiveOutput
from nemo_slam.objectives.metrics import MetricAccumulator


@torch.no_grad()
def test_unigram_guess(build_model, make_batch):
    model, batch = build_model(), make_batch()
    corpora = {"text": torch.randint(0, 48, (400,)) % 7, "pairs": 40 + torch.randint(0, 48, (300,)) % 3}
    model.set_unigrams({name: torch.bincount(c, minlength=48) for name, c in corpora.items()})
    outputs = model(batch)
    for name, stream in (("masked_text", "text"), ("translation_lm", "pairs")):
        seen = Counter(corpora[stream].tolist())
        total = len(corpora[stream]) + 48
        masked = outputs.tokens[outputs.masked_text[name].index].tolist()
        commonest = max(range(48), key=lambda t: seen[t])
        found = {m.name: m for m in model.objectives[name](outputs).metrics}
        guess, entropy = found[f"{name}/token_accuracy_by_unigram"], found[f"{name}/tokens_by_unigram"]
        assert len(masked) == guess.count == entropy.count >= 5
        assert guess.total == masked.count(commonest)
        assert entropy.total.item() == pytest.approx(-sum(math.log((seen[t] + 1) / total) for t in masked), rel=1e-6)


def test_the_guess_is_no_part_of_a_checkpoint(build_model):
    model = build_model()
    before = set(model.state_dict())
    model.set_unigrams({"text": torch.ones(48), "pairs": torch.ones(48)})
    assert set(model.state_dict()) == before


@pytest.mark.parametrize("tokens", [0, 50, 100, 5000])
def test_counts_of_a_token_file(tmp_path, tokens):
    ids = np.random.default_rng(0).integers(0, 9, tokens)
    with TokenWriter(tmp_path, "<u2") as writer:
        for part in np.array_split(ids, 7):
            writer.append(part.tolist())
    counts = TokenReader(tmp_path, "<u2").counts(12, at_most=100, stretches=4)
    if tokens <= 100:
        assert counts.tolist() == [int((ids == t).sum()) for t in range(12)]
    else:  # the first 25, the last 25, and two stretches between at equal steps
        chosen = np.concatenate([ids[s : s + 25] for s in (0, 1658, 3316, 4975)])
        assert counts.tolist() == [int((chosen == t).sum()) for t in range(12)]


def test_usage_and_share_of_the_commonest_code():
    codes = [3, 3, 3, 1, 0, 3, 1, 3]
    output = ObjectiveOutput(
        [Loss("codes", torch.tensor(8.0), torch.tensor(8.0))],
        histograms=[Histogram("code", torch.bincount(torch.tensor(codes), minlength=8), "codes")],
    )
    figures = MetricAccumulator()
    figures.update(output, {})
    found = figures.flush()
    entropy = -sum(n / 8 * math.log(n / 8) for n in Counter(codes).values())
    assert found["code_usage"] == 3 / 8
    assert found["code_top_share"] == 5 / 8
    assert found["code_perplexity"] == pytest.approx(math.exp(entropy))
    assert found["code_information_gain"] == pytest.approx(entropy - 1.0)
