"""The runner: a script sees what it would see from Python itself, with our classes allowed."""

import subprocess
import sys
import textwrap

import pytest


def run(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "nemo_slam.runner", *map(str, arguments)], capture_output=True, text=True, timeout=120
    )


@pytest.fixture
def script(tmp_path):
    def write(text):
        path = tmp_path / "folder" / "script.py"
        path.parent.mkdir()
        (path.parent / "neighbour.py").write_text("VALUE = 7\n")
        path.write_text(textwrap.dedent(text))
        return path

    return write


def test_script_gets_its_arguments_its_folder_and_its_name(script):
    path = script("""
        import sys
        import neighbour
        print(__name__, sys.argv, neighbour.VALUE, __file__)
    """)
    done = run(path, "a=1", "--flag")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == f"__main__ {[str(path), 'a=1', '--flag']} 7 {path}"


def test_our_prefix_is_registered_and_no_nemo_is_imported_for_it(script):
    path = script("""
        import sys
        assert "nemo" not in sys.modules
        from nemo_slam.allowlist import MODULE, _Finder
        assert any(isinstance(finder, _Finder) for finder in sys.meta_path)
    """)
    done = run(path)
    assert done.returncode == 0, done.stderr


def test_exit_status_and_errors_are_the_scripts_own(script):
    done = run(script("raise SystemExit(5)"))
    assert done.returncode == 5


@pytest.mark.parametrize(("arguments", "status"), [(["none.py"], 2), ([], 2), (["--help"], 0)])
def test_usage(arguments, status):
    done = run(*arguments)
    assert done.returncode == status
    assert "none.py is not a file" in done.stderr if arguments == ["none.py"] else "nemo_slam.runner" in done.stdout


STOCK = """
    # What NeMo's transcribe_speech.py does, by its own helpers; the script itself is not in the package.
    import json
    from dataclasses import dataclass
    from typing import Optional

    import torch
    from nemo.collections.asr.parts.utils.transcribe_utils import get_inference_dtype, prepare_audio_data, setup_model
    from nemo.core.config import hydra_runner

    @dataclass
    class Config:
        model_path: Optional[str] = None
        pretrained_name: Optional[str] = None
        audio_dir: Optional[str] = None
        dataset_manifest: Optional[str] = None
        audio_type: str = "wav"
        audio_key: str = "audio_filepath"
        append_pred: bool = False
        presort_manifest: bool = True
        output_filename: Optional[str] = None

    @hydra_runner(config_name="Config", schema=Config)
    def main(cfg):
        device = torch.device("cpu")
        model, _ = setup_model(cfg, device)
        model = model.eval().to(get_inference_dtype("bfloat16", device))
        files, _ = prepare_audio_data(cfg)
        found = model.transcribe(files, batch_size=2, verbose=False)
        with open(cfg.output_filename, "w") as out:
            for file, hypothesis in zip(files, found):
                out.write(json.dumps({"audio_filepath": file, "pred_text": hypothesis.text}) + "\\n")

    main()
"""


@pytest.mark.slow
def test_a_stock_script_restores_our_encoder_and_transcribes(script, model_config, tmp_path):
    import json

    import numpy as np
    import soundfile

    from nemo_slam.data.tokenizer import train_on_lines
    from nemo_slam.export import export_nemo
    from nemo_slam.models.pretraining import SLAMPretrainingModel

    SLAMPretrainingModel(model_config()).save_to(str(tmp_path / "slam.nemo"))
    spm = train_on_lines(["one two three", "press star two"] * 20, tmp_path / "spm", 24, allow_smaller=True)
    export_nemo(tmp_path / "slam.nemo", "ctc", spm, tmp_path / "ctc.nemo")
    (tmp_path / "audio").mkdir()
    for number, seconds in enumerate((1.0, 1.7)):
        noise = 0.1 * np.random.default_rng(number).standard_normal(int(16000 * seconds))
        soundfile.write(tmp_path / "audio" / f"{number}.wav", noise, 16000)
    path = script(STOCK)
    arguments = [f"model_path={tmp_path}/ctc.nemo", f"audio_dir={tmp_path}/audio"]
    arguments.append(f"output_filename={tmp_path}/out.json")

    done = run(path, *arguments)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "out.json").read_text().splitlines()]
    assert sorted(line["audio_filepath"] for line in lines) == [f"{tmp_path}/audio/{i}.wav" for i in (0, 1)]

    alone = subprocess.run([sys.executable, str(path), *arguments], capture_output=True, text=True, timeout=120)
    assert alone.returncode != 0  # without the runner NeMo refuses the class, so the test above means something
    assert "nemo_slam" in alone.stderr
