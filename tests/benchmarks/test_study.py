"""The study: what it runs, that it resumes, and that its page says what its transcripts do."""

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest

from nemo_slam.evaluation.comparison import compare_arms, verdict
from nemo_slam.evaluation.results_page import page
from nemo_slam.evaluation.text_metrics import Interval


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    for name in ("study", "study_settings", "study_results"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    import study

    return study


class KeepsTheLast:
    """Where trials have not been run: every arm keeps the last of its choices."""

    def choice(self, name, arm, labels):
        return list(self.tasks[name].choices_of(arm))[-1]


def plan(study, *arguments):
    return type("Plan", (KeepsTheLast, study.Plan), {})(study.parse_arguments(list(arguments)))


def all_steps(the_plan):
    return [*the_plan.preparation(), *the_plan.comparison()]


def test_the_plan_has_every_arm_with_equal_steps(study):
    the_plan, tasks = plan(study, "--folder", "/s"), study.STUDY.tasks
    steps = all_steps(the_plan)
    runs = [step for step in the_plan.comparison() if step.script == "speech_finetune.py"]
    per_seed = sum(len(task.labels) * (1 + len(task.arms)) for task in tasks.values())
    assert len(runs) == per_seed * len(study.STUDY.seeds) > 0
    for name in tasks:
        own = [step for step in runs if step.name.startswith(f"{name}_")]
        # Apart from where they start and what they keep, two arms get the same command, and as many to choose from.
        keys = {}
        for step in own:
            _, labels, arm, seed, choice = step.name.split("_")
            kept = tasks[name].choices_of(arm)[choice]
            given = tuple(a for a in step.arguments if a not in kept and not a.startswith(("init_from", "name=")))
            assert len(step.arguments) == len(given) + len(kept) + 1 + (arm != "scratch")
            assert len(tasks[name].choices_of(arm)) == len(tasks[name].choices)
            keys.setdefault((labels, seed), set()).add(given)
        assert all(len(found) == 1 for found in keys.values())
        assert f"trainer.max_steps={tasks[name].steps}" in own[0].arguments
    pretrained = [step.name for step in steps if step.script == "speech_pretrain.py"]
    assert pretrained == [f"pretrain {name}" for name in study.STUDY.arms]
    # Whatever a run starts from is made before it.
    made = set()
    for step in steps:
        needed = [a.removeprefix("init_from=") for a in step.arguments if a.startswith("init_from=")]
        assert set(needed) <= made
        made.add(str(step.output))


def test_the_arms_are_those_that_the_question_names(study):
    speech, stage1, stage2, one_stage = study.STUDY.arms.values()
    assert "model.objectives.masked_text=null" in speech.keys
    assert (stage1.config, stage2.config, stage2.after) == ("slam_stage1", "prompts_stage2", "stage1")
    assert one_stage == replace(stage2, after=None, keys=("model.quantizer.steps_before=0",))
    quick = study.STUDY.quick()
    assert {arm.steps for arm in quick.arms.values()} | {task.steps for task in quick.tasks.values()} == {2}
    assert quick.arms["stage2"].after == "stage1"


def test_an_unknown_arm_is_refused_with_those_that_are_there(study, capsys):
    with pytest.raises(SystemExit):
        plan(study, "--arms", "low_rate")
    assert "--arms: low_rate: expected some of scratch, speech, stage1, stage2, one-stage" in capsys.readouterr().err


def test_a_part_makes_only_what_it_needs(study):
    steps = all_steps(plan(study, "--arms", "stage2", "--tasks", "st", "--seeds", "5"))
    assert [s.name for s in steps if s.script.startswith("speech_")] == [
        *("pretrain stage1", "pretrain stage2", "st_all_stage2_5_usual")
    ]


def test_an_arms_ranks_are_of_the_same_speech_before_and_after(study):
    """As those of the fine-tuned model: the test utterances of the task."""
    there = {step.name: step.arguments[1] for step in all_steps(plan(study)) if "--probes" in step.arguments}
    for name, task in study.STUDY.tasks.items():
        for arm in ("scratch", *task.arms):
            before = there[f"{arm}: probes before {name}"]
            kept = list(task.choices_of(arm))[-1]
            assert before == there[f"{name}_{task.labels[0]}_{arm}_0_{kept}: probes"]
            assert before.endswith(f"{name}_test.json")


def test_every_override_is_a_key_of_its_config(study):
    from hydra import compose, initialize_config_dir

    conf = Path(__file__).parents[2] / "conf"
    for step in all_steps(plan(study, "--seeds", "0")):
        if step.script.startswith("speech_"):
            folder = conf / "finetuning" if "finetune" in step.script else conf
            flag, config, *overrides = step.arguments
            assert flag == "--config-name"
            with initialize_config_dir(str(folder), version_base="1.3"):
                compose(config, overrides=overrides)


def write_data(root):
    (root / "manifests").mkdir(parents=True)
    (root / "corpus.json").write_text(json.dumps({"speakers": "one a language"}))
    for name, number in (("es_train", 60), ("es_dev", 4), ("fr_dev", 4), ("es_test", 6), ("fr_test", 3)):
        rows = [
            {"audio_filepath": f"../a/{i}.wav", "duration": 4.0 * (i % 3 + 1), "text": "x", "lang": name[:2],
             "prompt_id": str(i), **({"translation": "y"} if i % 2 else {})}
            for i in range(number)
        ]  # fmt: skip
        (root / "manifests" / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_manifests_hold_short_test_utterances_and_few_labels(study, tmp_path):
    write_data(tmp_path / "data")
    study.write_manifests(plan(study, "--folder", str(tmp_path / "s")), tmp_path / "data")
    read = {p.stem: [json.loads(x) for x in p.read_text().splitlines()] for p in (tmp_path / "s/manifests").iterdir()}
    assert [row["prompt_id"] for row in read["asr_test"]] == ["0", "1", "3", "4"]
    assert [(row["lang"], row["prompt_id"]) for row in read["st_test"]] == [("es", "1"), ("es", "3"), ("fr", "1")]
    assert len({row["prompt_id"] for row in read["few_few"]}) == study.STUDY.few
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "s/manifests").iterdir()}
    study.write_manifests(plan(study, "--folder", str(tmp_path / "s")), tmp_path / "data")
    assert written == {path: path.stat().st_mtime_ns for path in (tmp_path / "s/manifests").iterdir()}
    assert [row["prompt_id"] for row in read["asr_dev"]] == ["0", "1", "2", "3"]
    assert read["asr_test"][0]["audio_filepath"] == str(tmp_path / "data" / "a" / "0.wav")


def transcripts(path, wrong, reference="text"):
    """Ten words each; the first ``wrong[i]`` words of utterance i are wrong."""
    words = list("abcdefghij")
    lines = [
        {"audio_filepath": f"{i}.wav", reference: " ".join(words), "pred_text": " ".join(["x"] * n + words[n:])}
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


ARMS = ("scratch", "speech", "stage1", "stage2", "one-stage")
FINISHED = {
    **{
        key: {"scratch": (5, 4), "speech": (4, 3), "stage1": (5, 4), "stage2": (7, 6), "one-stage": (5, 4)}
        for key in ("asr", "short")
    },
    "few": {"scratch": (5, 4), "speech": (5, 4), "stage1": (5, 4), "stage2": (2, 1), "one-stage": (5, 4)},
    "st": {"scratch": (5, 5), "stage2": (3, 2), "one-stage": (5, 5)},
}
"""Wrong words of ten, by task, arm and seed."""


DEV = {
    "trained": {"scratch": 4, "speech": 4, "stage1": 7, "stage2": 5, "one-stage": 7},
    "usual": dict.fromkeys(ARMS, 4),
    **{choice: dict.fromkeys(ARMS, 6) for choice in ("frozen", "dropout", "afresh", "masked", "light")},
}
"""Wrong words of ten on the dev utterances, by choice and arm."""


def finish(the_plan, data_root):
    """What all runs of a study would leave; the arms' utterances differ by a constant, so intervals are points."""
    for part in (the_plan.preparation, the_plan.comparison):
        for step in part():
            leave(step, the_plan.folder, data_root)


def leave(step, folder, data_root):
    step.output.parent.mkdir(parents=True, exist_ok=True)
    file = folder / "state" / f"{step.name.replace(': ', '-').replace(' ', '-')}.json"
    file.parent.mkdir(exist_ok=True)
    seconds = {"speech_pretrain.py": 600.0, "speech_finetune.py": 60.0}.get(step.script, 0.0)
    file.write_text(json.dumps({"seconds": seconds}))
    train = {"manifest_filepath": f"{data_root}/manifests/es_train.json", "frames_per_step": 3000}
    if step.script == "speech_pretrain.py":
        train = {"speech": train, "text": {"text_filepath": ["text/train.txt"]}, "pairs": None}
    if step.script.startswith("speech_"):
        (step.output.parent / "config.yaml").write_text(json.dumps({"data": {"train_ds": train}}))
        commit = "1" * 40 if step.script == "speech_pretrain.py" else "2" * 40
        (step.output.parent / "environment.json").write_text(json.dumps({"commit": commit}))
    elif "--probes" in step.arguments:
        step.output.write_text(json.dumps({"effective_rank": 37.0 if "before" in step.name else 12.0}))
    else:
        run, _, split = step.name.partition(": ")
        task, _, arm, seed, choice = run.split("_")
        number = DEV[choice][arm] if split == "dev" else FINISHED[task][arm][int(seed)]
        transcripts(step.output, [number] * 9, "translation" if task == "st" else "text")


def test_the_page_says_what_the_numbers_say(study, tmp_path, monkeypatch):
    """Words of one letter: a wrong word is a wrong letter of 19, with the spaces."""
    import study_results
    from torch import nn

    from nemo_slam.evaluation import transcription

    monkeypatch.setattr(transcription, "restore", lambda path: nn.Linear(1000, 1000, bias=False))
    write_data(tmp_path / "data")
    the_plan = study.Plan(study.parse_arguments(["--folder", str(tmp_path / "s"), "--seeds", "0", "1"]))
    tasks = {name: replace(task, metrics=("wer",), steps=77) for name, task in the_plan.tasks.items()}
    the_plan.tasks, the_plan.study = tasks, replace(the_plan.study, tasks=tasks)
    finish(the_plan, tmp_path / "data")
    found = study_results.results(the_plan, tmp_path / "data")
    study_results.write(found, tmp_path / "out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "results.json").read_text())["settings"] == json.loads(
        json.dumps(asdict(the_plan.study))
    )
    text = (tmp_path / "out" / "results.md").read_text()
    assert (
        "* Spanish recognition (CTC), all labels (60 utterances), WER minus scratch: better: speech (-10.0); worse: "
        "stage2 (+20.0); not clear of zero: stage1 (+0.0), one-stage (+0.0).\n"
    ) in text
    assert "translation" not in text.split("## ")[0].partition("English text")[0]
    assert (
        "English text, all labels (30 utterances), WER minus scratch: better: stage2 (-25.0); not clear of zero: "
        "one-stage (+0.0)." in text
    )
    assert "**Speakers: one a language.**" in text
    assert "2 seed(s) (0, 1). **Each arm was pre-trained once**" in text
    assert "| speech | 35.00 [35.00, 35.00] | 40.0, 30.0 | -10.00 [-10.00, -10.00], better | 37.0 | 12.0 |" in text
    assert "1.00 M parameters, 77 steps of 30 s of speech; 9 test utterances. WER: lower is better." in text
    steps = {name: arm.steps for name, arm in study.STUDY.arms.items()}
    assert (
        f"| stage2 | stage1 {steps['stage1']}, then stage2 {steps['stage2']} | 20.0 | 1.0 | 1.0 | 1.0 | 1.0 |" in text
    )
    assert "| scratch | none | 0.0 | 1.0 | 1.0 | 1.0 | 1.0 |" in text
    assert "Pre-training read es_train.json, train.txt." in text
    assert f"The runs are of commit {'1' * 13}, {'2' * 13}." in text
    assert (
        "Settings tried, WER of the dev utterances: scratch: trained 40.0, light 60.0, dropout 60.0, kept trained; "
        "speech: trained 40.0, frozen 60.0, dropout 60.0, kept trained; stage1: trained 70.0, frozen 60.0, dropout "
        "60.0, kept frozen; "
    ) in text
    assert (
        " The first seed's run with what was kept is one of those compared. What they mean: trained "
        "`model.encoder.conformer.dropout=0.0`, light `model.encoder.conformer.dropout=0.0 "
        "model.spec_augment.freq_width=15 model.spec_augment.time_masks=2`, dropout "
        "`model.encoder.conformer.dropout=0.1`, frozen `model.encoder.conformer.dropout=0.0 "
        "freeze_encoder_steps=300`.\n"
    ) in text
    assert "Not all settings were fixed beforehand" in text
    # Two seeds of two tasks with five arms and two with three; with the first seed two tasks' two other choices.
    hours = (4 * 600 + 60 * (1 + 2 * (2 * 5 + 2 * 3) + 2 * (5 + 5))) / 3600
    assert f"{hours:.2f} hours in all" in text

    # Of the page nothing stays the same when the numbers turn round.
    for table in found["tables"]:
        for row in table["arms"].values():
            difference = row["wer"]["difference"]
            if difference is not None:
                row["wer"]["difference"] = {
                    "value": -difference["value"],
                    "low": -difference["high"],
                    "high": -difference["low"],
                }
    assert "better: stage2 (-20.0); worse: speech (+10.0)" in page(found)


def test_the_page_is_that_of_the_result_file():
    root = Path(__file__).parents[2]
    found = json.loads((root / "benchmarks" / "results" / "results.json").read_text())
    assert (root / "docs" / "results.md").read_text() == page(found)


def test_other_utterances_cannot_be_compared(tmp_path):
    files = {"scratch": [transcripts(tmp_path / "a", [1, 2])], "other": [transcripts(tmp_path / "b", [1, 2, 3])]}
    with pytest.raises(ValueError, match="cannot pair 2 utterances with 3"):
        compare_arms(files, ("wer",), "text", "scratch")
    with pytest.raises(ValueError, match="holds other utterances"):
        compare_arms({"scratch": [files["scratch"][0], files["other"][0]]}, ("wer",), "text", "scratch")
