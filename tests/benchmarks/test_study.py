"""The study: what it runs, that it resumes, and that its page says what its transcripts do."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from nemo_slam.evaluation.comparison import compare_arms, page, verdict
from nemo_slam.evaluation.text_metrics import Interval


@pytest.fixture(scope="module")
def study():
    path = Path(__file__).parents[2] / "benchmarks" / "study.py"
    spec = importlib.util.spec_from_file_location("study_script", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["study_script"] = module
    spec.loader.exec_module(module)
    return module


def test_the_plan_has_every_arm_with_equal_steps(study):
    steps = study.plan(study.parse_arguments(["--folder", "/s"]))
    runs = [step for step in steps if step.script == "speech_finetune.py" and step.name != "random"]
    assert len(runs) == 4 * 2 * 3 + 2 * 3
    for task in ("asr", "st"):
        own = [step for step in runs if step.name.startswith(task)]
        assert len({next(a for a in step.arguments if a.startswith("trainer.max_steps")) for step in own}) == 1
    # Apart from where they start, two arms get the same command.
    by_name = {step.name: [a for a in step.arguments if not a.startswith(("init_from", "name="))] for step in runs}
    assert by_name["asr_few_scratch_1"] == by_name["asr_few_stage2_1"] == by_name["asr_few_speech_1"]
    pretrained = [step for step in steps if step.script == "speech_pretrain.py"]
    assert [step.name for step in pretrained] == ["pretrain speech", "pretrain stage1", "pretrain stage2"]
    assert "model.objectives.masked_text=null" in pretrained[0].arguments
    assert "init_from=/s/stage1/stage1.nemo" in pretrained[2].arguments
    # Whatever a run starts from is made before it.
    made = set()
    for step in steps:
        needed = [a.removeprefix("init_from=") for a in step.arguments if a.startswith("init_from=")]
        assert set(needed) <= made
        made.add(str(step.output))


def test_a_part_makes_only_what_it_needs(study):
    steps = study.plan(study.parse_arguments(["--arms", "stage2", "--tasks", "st", "--seeds", "5"]))
    assert [s.name for s in steps if s.script.startswith("speech_")] == [
        *("pretrain stage1", "pretrain stage2", "st_all_stage2_5")
    ]


def test_every_override_is_a_key_of_its_config(study):
    from hydra import compose, initialize_config_dir

    conf = Path(__file__).parents[2] / "conf"
    for step in study.plan(study.parse_arguments(["--seeds", "0"])):
        if step.script.startswith("speech_"):
            folder = conf / "finetuning" if "finetune" in step.script else conf
            flag, name, *overrides = step.arguments
            assert flag == "--config-name"
            with initialize_config_dir(str(folder), version_base="1.3"):
                compose(name, overrides=overrides)


def test_a_stopped_study_goes_on_and_refuses_other_settings(study, tmp_path, monkeypatch):
    calls = []

    class Done:
        returncode = 0

    def fake(command):
        calls.append(command)
        if len(calls) != 2:
            (tmp_path / command[-1]).write_text("x")
        return Done()

    monkeypatch.setattr(study.subprocess, "run", fake)
    first, second = (study.Step(n, "x.py", (n,), tmp_path / n) for n in ("one", "two"))
    study.run(first, tmp_path / "state")
    with pytest.raises(SystemExit, match="two ended with status 0; the same command again"):
        study.run(second, tmp_path / "state")
    study.run(first, tmp_path / "state")
    study.run(second, tmp_path / "state")
    assert [command[-1] for command in calls] == ["one", "two", "two"]
    note = json.loads((tmp_path / "state" / "two.json").read_text())
    assert note["done"]
    assert note["seconds"] > 0
    with pytest.raises(SystemExit, match="begun with other settings"):
        study.run(study.Step("one", "x.py", ("other",), tmp_path / "one"), tmp_path / "state")


def test_manifests_hold_short_test_utterances_and_few_labels(study, tmp_path):
    source = tmp_path / "data" / "manifests"
    source.mkdir(parents=True)
    for name, number in (("es_train", 60), ("es_test", 6), ("fr_test", 3)):
        rows = [
            {"audio_filepath": f"../a/{i}.wav", "duration": 4.0 * (i % 3 + 1), "text": "x", "lang": name[:2],
             "prompt_id": str(i), **({"translation": "y"} if i % 2 else {})}
            for i in range(number)
        ]  # fmt: skip
        (source / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study.write_manifests(tmp_path / "s", tmp_path / "data")
    read = {p.stem: [json.loads(x) for x in p.read_text().splitlines()] for p in (tmp_path / "s/manifests").iterdir()}
    assert [row["prompt_id"] for row in read["asr_test"]] == ["0", "1", "3", "4"]
    assert [(row["lang"], row["prompt_id"]) for row in read["st_test"]] == [("es", "1"), ("es", "3"), ("fr", "1")]
    assert len({row["prompt_id"] for row in read["es_train_40"]}) == 40
    assert read["asr_test"][0]["audio_filepath"] == str(tmp_path / "data" / "a" / "0.wav")


def transcripts(path, wrong):
    """Ten words each; the first ``wrong[i]`` words of utterance i are wrong."""
    words = list("abcdefghij")
    lines = [
        {"audio_filepath": f"{i}.wav", "text": " ".join(words), "pred_text": " ".join(["x"] * n + words[n:])}
        for i, n in enumerate(wrong)
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in reversed(lines)))
    return path


def test_differences_are_paired_and_pool_the_seeds(tmp_path):
    rng = np.random.default_rng(0)
    base = [rng.integers(2, 9, 60) for _ in range(2)]
    files = {
        "scratch": [transcripts(tmp_path / f"s{i}", wrong) for i, wrong in enumerate(base)],
        "better": [transcripts(tmp_path / f"b{i}", wrong - 1) for i, wrong in enumerate(base)],
        "noise": [transcripts(tmp_path / f"n{i}", rng.permutation(wrong)) for i, wrong in enumerate(base)],
    }
    table = compare_arms(files, ("wer",), "text", "scratch")
    scores = [10 * wrong.mean() for wrong in base]
    assert table["scratch"]["wer"]["seeds"] == pytest.approx(scores)
    assert table["scratch"]["wer"]["score"]["value"] == pytest.approx(np.mean(scores))
    assert table["scratch"]["wer"]["difference"] is None
    better = Interval(**table["better"]["wer"]["difference"])
    assert (better.value, better.low, better.high) == pytest.approx((-10.0,) * 3)
    assert verdict("wer", better) == "better"
    assert verdict("bleu", better) == "worse"
    assert verdict("wer", Interval(**table["noise"]["wer"]["difference"])) == "not clear of zero"

    for arm, rank in (("scratch", 30.0), ("better", 41.0), ("noise", 7.0)):
        table[arm]["effective_rank"] = rank
    study = {
        "seeds": [0, 1],
        "steps": {"stage1": 9, "stage2": 8, "asr": 7, "st": 6},
        "environment": {"device": "CPU (z, 2 cores)", "commit": "0123456789abcdef"},
        "rank_before_finetuning": {"scratch": 37.0, "better": 20.0, "noise": 6.5},
        "tables": {"asr, few labels": table},
        "commands": {"a": {"seconds": 90.0}, "b": {"seconds": 30.0}},
    }
    text = page(study)
    assert "One speaker a language" in text
    assert "| better | " in text
    assert "-10.00 [-10.00, -10.00], better | 20.0 | 41.0 |" in text
    assert "Spanish recognition (CTC), 40 labelled utterances" in text
    assert "| a | 1.5 |" in text
    assert "0.03 hours in all, on CPU (z, 2 cores); commit 0123456789ab" in text


def test_other_utterances_cannot_be_compared(tmp_path):
    files = {"scratch": [transcripts(tmp_path / "a", [1, 2])], "other": [transcripts(tmp_path / "b", [1, 2, 3])]}
    with pytest.raises(ValueError, match="cannot pair 2 utterances with 3"):
        compare_arms(files, ("wer",), "text", "scratch")
    with pytest.raises(ValueError, match="holds other utterances"):
        compare_arms({"scratch": [files["scratch"][0], files["other"][0]]}, ("wer",), "text", "scratch")
