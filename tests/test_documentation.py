"""The documentation site builds without a warning, and its commands run as far as they can here: in seconds."""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])


@pytest.fixture(scope="module")
def hooks():
    """docs/hooks.py as a module."""
    spec = importlib.util.spec_from_file_location("docs_hooks", ROOT / "docs" / "hooks.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


# ---- commands --------------------------------------------------------------------------------------


def commands(page: Path) -> list[list[str]]:
    """Every command of a page's code blocks and inline code that runs a script of ours, split into words."""
    text = page.read_text(encoding="utf-8").replace("\\\n", " ")
    pieces = re.findall(r"^ *```\w*\n(.*?)^ *```", text, re.MULTILINE | re.DOTALL) + re.findall(r"`([^`\n]+)`", text)
    found = []
    for line in "\n".join(pieces).splitlines():
        if re.match(r"\s*(?:\w+=\S+ )*(?:python3?|torchrun)\s.*scripts/\w+\.py", line):
            words = shlex.split(line, comments=True)
            found.append(words[next(i for i, word in enumerate(words) if word.startswith("scripts/")) :])
    return found


ALL = {tuple(command) for page in PAGES for command in commands(page)}
HYDRA = sorted(c for c in ALL if c[0] in ("scripts/speech_pretrain.py", "scripts/speech_finetune.py"))
OTHERS = sorted({c[0] for c in ALL} - {c[0] for c in HYDRA})


def test_there_are_commands():
    assert len(HYDRA) >= 8
    assert {"scripts/report.py", "scripts/transcribe.py", "scripts/evaluate.py"} <= set(OTHERS)


@pytest.mark.parametrize("command", HYDRA, ids=" ".join)
def test_training_commands_compose(command):
    """The config that a documented command names, with its overrides; what stands for the reader's own is left out."""
    script, *words = command
    folder, default = ("conf", "slam_stage1") if "pretrain" in script else ("conf/finetuning", "asr_ctc")
    name = words[words.index("--config-name") + 1] if "--config-name" in words else default
    own = re.compile(r"=.*\b[A-Z]{2,}\b|^\W*(KEY|NAME)\b")
    overrides = [w for w in words if "=" in w and not w.startswith("--") and not own.search(w)]
    with initialize_config_dir(str(ROOT / folder), version_base="1.3"):
        cfg = compose(name, overrides=[w for w in overrides if "|" not in w])
    for override in overrides:
        key, value = override.lstrip("+").split("=", 1)
        if "." in key:  # a group's choice leaves no key behind
            assert str(OmegaConf.select(cfg, key)) == str(yaml.safe_load(value))


@pytest.mark.parametrize("script", OTHERS)
def test_options_of_documented_commands_exist(script):
    own = [command for command in ALL if command[0] == script]
    shown = help_of(script)
    if "..." in shown.partition("\n\n")[0]:  # its options are those of subcommands
        shown += "".join(
            help_of(script, name) for name in {c[1] for c in own if len(c) > 1 and re.fullmatch("[a-z_]+", c[1])}
        )
    for command in own:
        for word in command:
            if word.startswith("--"):
                assert re.search(rf"{re.escape(word)}\b", shown), f"{script} has no option {word}"


def help_of(*words: str) -> str:
    result = subprocess.run([sys.executable, *words, "--help"], capture_output=True, text=True, cwd=ROOT)
    assert result.returncode == 0, result.stderr
    return result.stdout


# ---- figures ---------------------------------------------------------------------------------------


def test_cited_result_files_are_there_and_the_newest_of_their_kind():
    """A benchmark that was run again leaves figures to be mended where an older file is cited."""
    results = ROOT / "benchmarks/results"
    cited = {(page.name, name) for page in PAGES for name in re.findall(r"results/([\w.*-]+\.json)", page.read_text())}
    assert cited
    for page, name in sorted(cited):
        kind = re.sub(r"_\d{4}-\d\d-\d\dT\d{6}\.json$", "", name)
        stamped = re.compile(rf"{re.escape(kind)}_\d{{4}}-\d\d-\d\dT\d{{6}}\.json")
        newest = max((path.name for path in results.iterdir() if stamped.fullmatch(path.name)), default=name)
        assert (results / name).is_file(), f"{page} cites {name}, which does not exist"
        assert name == newest, f"{page} cites {name}; {newest} is newer"


# ---- configuration reference -----------------------------------------------------------------------


def test_every_key_of_every_config_is_in_the_reference(hooks):
    page = hooks.configuration_reference()
    for path in (ROOT / "conf").rglob("*.yaml"):
        name = str(path.relative_to(ROOT / "conf").with_suffix(""))
        section = re.search(rf"^### {re.escape(name)}\n(.*?)(?=^##|\Z)", page, re.MULTILINE | re.DOTALL)
        assert section, f"no section {name}"
        for key in leaves(yaml.safe_load(path.read_text())):
            if not key.startswith(("defaults", "hydra")):
                assert f"| `{key}` |" in section[1], f"{name} lacks {key}"


def leaves(node: object, prefix: str = "") -> list[str]:
    if not isinstance(node, dict) or not node:
        return [prefix[:-1]]
    return [leaf for key, value in node.items() for leaf in leaves(value, f"{prefix}{key}.")]


def test_comments_and_docstrings_become_descriptions(hooks):
    text = (
        "# Head.\n# @package _global_\na:\n  # Above.\n  # More.\n  b: 1  # beside\n  c: 'x # y'\nd: {e: 1}  # flow\n"
    )
    found = {key: (value, comment) for key, value, comment in hooks.keys(text)}
    assert found == {"a.b": ("1", "Above. More. beside"), "a.c": ("'x # y'", ""), "d.e": ("1", "flow")}
    entries = hooks.sections("One.\n\nAttributes:\n    a, b: two\n        lines.\n    c: one.\n\nMore: text.")
    assert entries == {"a": "two lines.", "b": "two lines.", "c": "one."}
    page = hooks.configuration_reference()
    assert re.search(r"`guard.max_consecutive` \| `10` \| [^|]*skipped updates in a row that stop the run", page)
    assert re.search(r"`model.speech_loss.num_distractors` \| `100` \| wrong targets for each masked frame", page)


# ---- the site ----------------------------------------------------------------------------------------


class Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.fetched: list[str] = []
        self.linked: list[str] = []

    def handle_starttag(self, tag, attrs):
        found = dict(attrs)
        if tag in ("script", "img") and found.get("src"):
            self.fetched.append(found["src"])
        if tag == "link" and found.get("rel") in ("stylesheet", "icon", "preconnect"):
            self.fetched.append(found["href"])
        if tag == "a" and found.get("href"):
            self.linked.append(found["href"])


def test_the_site_builds_and_fetches_nothing_from_elsewhere(tmp_path):
    pytest.importorskip("mkdocs", reason="the site needs the extra docs: pip install -e '.[docs]'")
    pytest.importorskip("mkdocstrings", reason="the site needs the extra docs: pip install -e '.[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stdout + result.stderr
    built = {path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*.html")}
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").with_suffix(".html").as_posix()
        assert name.replace("README", "index") in built
    assert {"readme.html", "kernels.html", "changelog.html"} <= built
    for name in built - {"404.html"}:
        parser = Links()
        parser.feed((tmp_path / name).read_text(encoding="utf-8"))
        assert all(not url.startswith(("http", "//")) for url in parser.fetched), name
        for url in parser.fetched + parser.linked:
            target = url.partition("#")[0]
            if target and not re.match(r"\w+:|/", target):
                assert (tmp_path / name).parent.joinpath(target).exists(), f"{name} links to {url}"
    for name, words in {"configuration.html": "masked_speech", "api.html": "cu_seqlens", "index.html": "SLAM"}.items():
        assert words in (tmp_path / name).read_text(encoding="utf-8")
