"""The ablations: what they run, and that their page and pictures say what the runs' files do."""

import json
from pathlib import Path

import ablations
import pytest
from ablations_page import HELD_OUT, RECOGNITION, page, pictures
from ablations_records import held_out, read_record, settings_of, write_record
from ablations_results import results, write
from ablations_settings import ABLATIONS, BASE, UNTRAINED
from steps import note_file

ROOT = Path(__file__).parents[2]


def plan(*arguments):
    return ablations.Plan(ablations.parse_arguments(list(arguments)))


def test_a_variant_differs_from_the_base_by_its_own_keys_alone():
    the_plan = plan("--folder", "/a")
    base = the_plan.pretraining(BASE, 1)
    for name, variant in ABLATIONS.variants.items():
        step = the_plan.pretraining(name, 1)
        own = [a for a in step.arguments if not a.startswith("name=")]
        rest = [a for a in base.arguments if not a.startswith("name=")]
        assert [a for a in own if a not in variant.keys] == rest
        assert [a for a in own if a not in rest] == list(variant.keys)
        assert step.wrapper == (() if variant.norm is None else ("benchmarks/with_norm.py", variant.norm))
        assert (name == BASE) == (not variant.keys and variant.norm is None)
    assert not [a for a in base.arguments if "init_from" in a]
    assert f"trainer.max_steps={ABLATIONS.steps}" in base.arguments


def test_every_arm_is_judged_by_the_same_commands():
    the_plan = plan("--folder", "/a")
    for seed in ABLATIONS.seeds:
        for part in range(2):
            given = set()
            for arm in the_plan.arms:
                step = the_plan.judging(arm, seed)[part]
                own = [a for a in step.arguments if not a.startswith("init_from=")]
                given.add(tuple(a.replace(f"_{arm}_{seed}", "") for a in own))
                assert step.wrapper == the_plan.wrapper(arm)
            assert len(given) == 1
        started = [a for a in the_plan.judging("no_ctc", seed)[0].arguments if a.startswith("init_from=")]
        assert started == [f"init_from={the_plan.pretraining('no_ctc', seed).output}"]
        assert not [a for a in the_plan.judging(UNTRAINED, seed)[0].arguments if a.startswith("init_from=")]
    train, transcripts = the_plan.judging(BASE, 0)
    assert f"trainer.max_steps={ABLATIONS.task_steps}" in train.arguments
    manifests = ("data/prompts/manifests/es_test.json", "data/prompts/manifests/es_dev.json")
    assert transcripts.arguments[:3] == (str(train.output), *manifests)


def test_each_step_has_what_it_needs_and_a_note_of_its_own():
    the_plan = plan("--folder", "/a")
    steps, made = the_plan.steps(), set()
    for step in steps:
        needed = [
            a.removeprefix("init_from=") for a in step.arguments if a.removeprefix("init_from=").endswith(".nemo")
        ]
        assert set(needed) <= made
        made.add(str(step.output))
    assert len({note_file(step, the_plan.folder) for step in steps}) == len(steps)
    assert len(steps) == len(ABLATIONS.seeds) * (3 * len(ABLATIONS.variants) + 2)
    # Where it stops, the seeds that are done have all arms.
    seeds = [step.name.partition(":")[0].rpartition("_")[2] for step in steps]
    assert seeds == sorted(seeds)


def test_a_part_and_a_quick_one():
    steps = plan("--variants", "batch_norm", "--seeds", "5", "--quick").steps()
    names = ["pretrain_batch_norm_5", "finetune_batch_norm_5", "finetune_batch_norm_5: transcripts"]
    assert [step.name for step in steps] == names
    assert all("trainer.max_steps=2" in step.arguments for step in steps[:2])
    assert all(step.shown.startswith("python benchmarks/with_norm.py batch_norm scripts/") for step in steps)


def test_every_override_is_a_key_of_its_config_that_the_model_accepts():
    from hydra import compose, initialize_config_dir

    from nemo_slam import command_line
    from nemo_slam.models.settings import model_settings

    for step in plan("--seeds", "0").steps():
        if step.script.startswith("speech_"):
            folder = ROOT / "conf" / ("finetuning" if "finetune" in step.script else "")
            flag, name, *overrides = step.arguments
            assert flag == "--config-name"
            with initialize_config_dir(str(folder), version_base="1.3"):
                cfg = compose(name, overrides=overrides)
            if "finetune" in step.script:
                command_line.check_finetuning_keys(cfg)
            else:
                command_line.check_run_keys(cfg)
                model_settings(cfg.model)


# ---- results ---------------------------------------------------------------------------------------


def test_held_out_figures_are_those_of_the_last_validation(tmp_path):
    metrics = tmp_path / "metrics.csv"
    metrics.write_text(
        "step,loss,val_loss,val_ctc,val_probe/contrastive_accuracy,val_probe/contrastive_accuracy_other_context,"
        "val_matching/accuracy\n"
        "200,,9,4.5,0.5,0.25,\n400,,8,2.5,0.75,0.5,\n400,7,,,,,\n"
    )
    assert held_out(metrics) == {"contrastive margin, points": 25.0, "CTC loss, nat a character": 2.5}
    metrics.write_text("step,loss,val_loss\n20,7,\n")
    with pytest.raises(ValueError, match=r"metrics.csv has no row with val_loss: the run was never validated"):
        held_out(metrics)


WRONG = {BASE: (5, 5), "no_ctc": (6, 7), "no_matching": (3, 4), "no_contrastive": (3, 5), UNTRAINED: (9, 9)}
"""Wrong words of ten, by arm and seed, in every test utterance."""


def leave(step, data_root, gain):
    """What a run would leave."""
    step.output.parent.mkdir(parents=True, exist_ok=True)
    note = note_file(step, step.output.parents[1])
    note.parent.mkdir(exist_ok=True)
    note.write_text(json.dumps({"seconds": 240.0 if step.script == "speech_pretrain.py" else 60.0}))
    arm, _, seed = step.name.partition(":")[0].partition("_")[2].rpartition("_")
    manifests = f"{data_root}/manifests"
    if step.script == "speech_pretrain.py":
        streams = {
            "speech": {"manifest_filepath": f"{manifests}/es_train.json", "frames_per_step": 700},
            "text": {"text_filepath": "train.txt", "tokens_per_step": 30},
            "pairs": {"manifest_filepath": [f"{manifests}/es_train.json"], "frames_per_step": 500},
        }
        objectives = {"ctc": {"weight": 1.0}, "matching": None, "masked_text": {"weight": 0.03}}
        config = {"data": {"train_ds": streams}, "model": {"objectives": objectives}}
        ctc = "" if arm == "no_ctc" else str(2.0 + int(seed))
        rows = f"step,val_loss,val_ctc,val_masked_speech/code_information_gain\n9,1,{ctc},{gain}\n"
        (step.output.parent / "metrics.csv").write_text(rows)
    elif step.script == "speech_finetune.py":
        config = {"data": {"train_ds": {"manifest_filepath": f"{manifests}/es_train.json"}}}
    else:
        words, wrong = list("abcdefghij"), WRONG[arm][int(seed)]
        said = {"text": "".join(words), "pred_text": "".join([*"x" * wrong, *words[wrong:]])}
        rows = [{"audio_filepath": f"{i}.wav", **said} for i in range(9)]
        step.output.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    (step.output.parent / "config.yaml").write_text(json.dumps(config))
    made = {"commit": "3" * 40, "torch": "2.13.0", "nemo_toolkit": "3.0.0", "CPU": "a CPU"}
    (step.output.parent / "environment.json").write_text(json.dumps(made))


@pytest.fixture
def found(tmp_path):
    """Results of five arms and two seeds; the utterances of an arm are all alike, so intervals are points."""
    (tmp_path / "data" / "manifests").mkdir(parents=True)
    (tmp_path / "data" / "corpus.json").write_text(json.dumps({"speakers": "one a language"}))
    rows = [{"duration": 360.0, "text": "x"}] * 5
    (tmp_path / "data" / "manifests" / "es_train.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = ["--folder", str(tmp_path / "a"), "--data-root", str(tmp_path / "data"), "--seeds", "0", "1"]
    the_plan = plan(*arguments, "--variants", *WRONG)
    the_plan.records = tmp_path / "records"
    for step in the_plan.steps():
        leave(step, tmp_path / "data", gain=0.25)
    records = {}
    for arm, seed in the_plan.order():
        write_record(the_plan, arm, seed, tmp_path / "data")
        records.setdefault(arm, []).append(read_record(the_plan, arm, seed))
    return results(the_plan, records)


def test_what_is_recorded_is_not_run_again(tmp_path, monkeypatch):
    """Without its run folders, as in a fresh clone; a record of other settings is refused."""
    (tmp_path / "corpus.json").write_text("{}")
    arguments = ["--quick", "--folder", str(tmp_path), "--data-root", str(tmp_path), "--seeds", "0", "--variants"]
    the_plan = plan(*arguments, BASE, UNTRAINED)
    the_plan.records.mkdir()
    record = {"seed": 0, "commit": "3" * 40, "CPU": "a CPU", "seconds": {}, "speakers": "", "labelled": 1}
    record |= {"trained_on": None, "held_out": {}, "errors": [1, 2], "characters": [10, 10]}
    ran = []

    def run(step, folder):
        ran.append(step.name)
        settings = {"settings": settings_of(the_plan, UNTRAINED)}
        the_plan.record(UNTRAINED, 0).write_text(json.dumps(record | settings))

    monkeypatch.setattr(ablations, "run", run)
    monkeypatch.setattr("ablations_records.write_record", lambda *rest: None)
    monkeypatch.setattr("sys.argv", ["ablations.py", *arguments, BASE, UNTRAINED])
    the_plan.record(BASE, 0).write_text(json.dumps(record | {"settings": settings_of(the_plan, BASE)}))
    ablations.main()
    assert ran == [step.name for step in the_plan.judging(UNTRAINED, 0)]
    assert (tmp_path / "ablations.md").is_file()
    the_plan.record(BASE, 0).write_text(json.dumps(record | {"settings": {}}))
    with pytest.raises(SystemExit, match=r"base_0.json is of other settings than ablations_settings.py. Delete it"):
        ablations.main()


@pytest.mark.parametrize("record", sorted((ROOT / "benchmarks/results/ablations").glob("*.json")), ids=lambda p: p.stem)
def test_a_record_is_of_the_settings_and_of_the_same_utterances(record):
    arm, _, seed = record.stem.rpartition("_")
    found = read_record(plan(), arm, int(seed))
    assert found["seed"] == int(seed)
    first = json.loads(min(record.parent.glob("*.json")).read_text())
    assert found["characters"] == first["characters"]
    assert len(found["errors"]) == len(found["characters"])


def test_the_page_says_what_the_numbers_say(found):
    text = page(found)
    assert "* Character error rate (CER) minus base, better: no_matching (-15.0).\n" in text
    assert "minus base, worse: no_ctc (+15.0), untrained (+40.0).\n" in text
    # Its interval is clear of zero, but one of its seeds is not below base.
    assert "minus base, not clear: no_contrastive (-10.0).\n" in text
    row = "| no_contrastive | no contrastive loss | 40.00 [40.00, 40.00] | 30.0, 50.0 | -10.00 [-10.00, -10.00] |"
    assert f"{row} 1 of 2 | not clear |\n" in text
    assert "| 50.00 [50.00, 50.00] | 50.0, 50.0 |  |  |  |\n" in text
    assert "| untrained | no pre-training: the encoder as it was drawn | 90.00" in text
    assert (
        f"{ABLATIONS.steps} steps of 7 s of speech (from 0.5 hours), 30 tokens of text and 5 s of pairs (from" in text
    )
    assert "0.5 hours: es_train.json). Weights: ctc 1, masked_text 0.03. Each variant changes one thing." in text
    assert f"Then {ABLATIONS.task_steps} steps of fine-tuning for Spanish recognition (`asr_ctc`, 5 utterances)" in text
    assert "CER of 9 utterances (test and dev" in text
    assert "**Speakers: one a language.**" in text
    assert "there are 2 (0, 1)" in text
    assert "| base | 0.25 (0.25 to 0.25) |  |  |  |  |  | 2.50 (2.00 to 3.00) |" in text
    assert "| no_ctc | 0.25 (0.25 to 0.25) |  |  |  |  |  |  |" in text
    assert "| base | 4.0 | 2.0 |" in text
    assert "| untrained | 0.0 | 2.0 |" in text
    # Two seeds of five arms, of two commands each, and of four pre-trainings.
    assert f"{2 * (4 * 240 + 5 * 2 * 60) / 3600:.2f} hours in all" in text

    for row in found["variants"].values():  # nothing stays the same when the numbers turn round
        if row["difference"] is not None:
            d = row["difference"]
            row["difference"] = {"value": -d["value"], "low": -d["high"], "high": -d["low"]}
            row["seeds"] = [
                2 * base - own for own, base in zip(row["seeds"], found["variants"][BASE]["seeds"], strict=True)
            ]
    assert "minus base, worse: no_matching (+15.0).\n" in page(found)


def test_pictures_follow_from_the_numbers_and_are_the_same_each_time(found):
    drawn = pictures(found)
    assert drawn == pictures(found)
    for name in (RECOGNITION, HELD_OUT):
        assert drawn[name].lstrip().startswith(b"<?xml")
    for arm in WRONG:
        assert f'id="seeds-{arm}"'.encode() in drawn[RECOGNITION]
        assert (f'id="difference-{arm}"'.encode() in drawn[RECOGNITION]) == (arm != BASE)
    found["variants"]["no_ctc"]["seeds"][0] += 20
    changed = pictures(found)
    assert changed[RECOGNITION] != drawn[RECOGNITION]
    assert changed[HELD_OUT] == drawn[HELD_OUT]
    found["variants"]["base"]["held_out"]["CTC loss, nat a character"][0] += 1
    assert pictures(found)[HELD_OUT] != drawn[HELD_OUT]


def test_files_are_where_the_page_looks_for_them(found, tmp_path):
    write(found, tmp_path / "numbers", tmp_path / "docs")
    assert json.loads((tmp_path / "numbers" / "ablations.json").read_text()) == json.loads(json.dumps(found))
    text = (tmp_path / "docs" / "ablations.md").read_text()
    for name in (RECOGNITION, HELD_OUT):
        assert f"(images/{name})" in text
        assert (tmp_path / "docs" / "images" / name).is_file()


def test_without_the_base_there_is_nothing_to_compare(tmp_path, found):
    del found["variants"][BASE]
    for row in found["variants"].values():
        row["difference"] = None
    found["base"] = None
    text = page(found)
    assert "minus base, " not in text.split("## What")[0]
    assert pictures(found)
