"""Two and three processes with uneven shares train as one process on the global batch does."""

import pytest
import torch
import torch.multiprocessing as multiprocessing
from rank_worker import STEPS, work

SPEECH = (1.0, 1.7, 1.2, 0.3)  # the last is shorter than a span: nothing of it is masked
SHARES = {
    1: [{"speech": [0, 1, 2, 3], "text": [0, 1, 2, 3], "pairs": [0, 1, 2, 3]}],
    2: [{"speech": [0, 1, 2], "text": [1, 2, 3], "pairs": [0, 1, 2, 3]}, {"speech": [3], "text": [0], "pairs": []}],
    3: [
        {"speech": [0, 2], "text": [2], "pairs": [0, 2, 3]},
        {"speech": [3], "text": [0, 1, 3], "pairs": [1]},
        {"speech": [1], "text": [], "pairs": []},
    ],
}
OBJECTIVES = {
    "stream": {"masked_speech": {}, "masked_text": {}, "translation_lm": {}, "matching": {}},
    "in_batch": {"matching": {"negatives": "in_batch"}},
}
"""By where matching's negatives come from."""


@pytest.fixture(scope="module")
def runs():
    """What every rank of every world wrote: {negatives: {world: [rank's results]}}."""
    return {}


@pytest.fixture
def results(runs, model_config, make_batch, tmp_path):
    """One, two and three processes, all started from one server that has imported NeMo once."""
    if not runs:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["nemo_slam.models.pretraining"])
        pairs = ((0.8, 5, 7), (1.4, 12, 10), (1.1, 9, 9), (0.9, 6, 5))
        batch = make_batch(speech=SPEECH, text=(9, 14, 30, 3), pairs=pairs)
        batch.pairs.text_classes = torch.tensor([0, 1, 0, 2])  # pairs 0 and 2 say the same
        configs = {name: model_config(objectives=chosen) for name, chosen in OBJECTIVES.items()}
        processes = [
            context.Process(target=work, args=(rank, world, configs, batch, shares, tmp_path))
            for world, shares in SHARES.items()
            for rank in range(world)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join(timeout=240)
        assert [process.exitcode for process in processes] == [0] * 6
        written = {world: [torch.load(tmp_path / f"{world}_{rank}.pt") for rank in range(world)] for world in SHARES}
        for name in OBJECTIVES:
            runs[name] = {world: [rank[name] for rank in ranks] for world, ranks in written.items()}
    return runs


def test_the_shares_are_uneven(results):
    """One rank masks no frame of its speech, one has no pair."""
    results = results["stream"]
    for world, idle, without in ((2, 1, 1), (3, 1, 2)):
        first = [rank["counts"][0] for rank in results[world]]
        assert first[idle]["masked_speech/codes"] == 0
        assert first[without]["matching"] == first[without]["translation_lm/codes"] == 0
        for name, count in results[1][0]["counts"][0].items():
            if not name.endswith(("diversity", "total")):
                assert sum(counts[name] for counts in first) == count > 0


def test_a_rank_with_one_pair_takes_its_negative_from_others(results):
    """So that every pair has one of the batch, however the ranks share them, and a pair's is not its own text."""
    for ranks in results["in_batch"].values():
        for number in range(STEPS):
            assert sum(rank["counts"][number]["matching/in_batch total"] for rank in ranks) == 4
            assert sum(rank["counts"][number]["matching/contrast"] for rank in ranks) == 4
    assert results["in_batch"][3][1]["counts"][0]["matching"] == 2  # its pair and the negative


@pytest.mark.parametrize("negatives", list(OBJECTIVES))
@pytest.mark.parametrize("world", [2, 3])
def test_losses_and_first_gradients(results, negatives, world):
    (alone,) = results[negatives][1]
    for rank in results[negatives][world]:
        assert rank["losses"][0] == pytest.approx(alone["losses"][0], abs=1e-9, rel=1e-9)
        for name, gradient in alone["gradients"].items():
            torch.testing.assert_close(
                rank["gradients"][name], gradient, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
            # A bias on all keys shifts every score of a query alike: no gradient.
            assert gradient.abs().max() > 1e-12 or name.endswith("linear_k.bias"), name


@pytest.mark.parametrize("negatives", list(OBJECTIVES))
@pytest.mark.parametrize("world", [2, 3])
def test_five_steps_keep_the_weights_equal(results, negatives, world):
    (alone,) = results[negatives][1]
    assert len(alone["losses"]) == STEPS
    assert alone["losses"][-1] != alone["losses"][0]
    for rank in results[negatives][world]:
        for ours, reference in zip(rank["losses"], alone["losses"], strict=True):
            assert ours == pytest.approx(reference, abs=1e-9, rel=1e-9)
        for name, weight in alone["weights"].items():
            torch.testing.assert_close(
                rank["weights"][name], weight, rtol=1e-9, atol=1e-9, msg=lambda m, n=name: f"{n}: {m}"
            )
