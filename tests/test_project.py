"""The project as a whole: what documents promise exists, requirements match imports, nothing of one machine is here."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[1]
DOCUMENTS = sorted(
    [ROOT / "README.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/**/*.md"), *ROOT.glob("kernels/**/*.md")]
)


def tree() -> list[Path]:
    """The project's files: those that git tracks, or, where there is no repository (an image), all that it would."""
    listing = subprocess.run(["git", "-C", str(ROOT), "ls-files", "-z"], capture_output=True, text=True)
    if listing.returncode == 0 and listing.stdout:
        return [ROOT / name for name in listing.stdout.split("\0") if name and (ROOT / name).is_file()]
    outputs = {".git", ".venv", "data", "runs", "build", "dist"}
    return [
        path
        for path in ROOT.rglob("*")
        if path.is_file()
        and path.relative_to(ROOT).parts[0] not in outputs
        and not re.search(r"/(__pycache__|\.\w+_cache|\.hypothesis|[^/]*\.egg-info)/", str(path))
    ]


def texts() -> list[tuple[Path, str]]:
    suffixes = {".py", ".md", ".yaml", ".toml", ".txt", ".cff", ".sh", ""}
    return [(path, path.read_text(encoding="utf-8")) for path in tree() if path.suffix in suffixes]


def code_blocks(document: Path) -> str:
    return "\n".join(re.findall(r"^```(?:bash|console|sh)?\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL))


def pyproject() -> dict:
    tomllib = pytest.importorskip("tomllib", reason="pyproject.toml is read with tomllib, which Python 3.11 has")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())


def requirement_names(lines: list[str]) -> set[str]:
    """Package names of requirement lines, normalised.

    >>> requirement_names(["nemo_toolkit[asr]>=3.0", "G722>=1.2"])
    {'nemo-toolkit', 'g722'}
    """
    names = (re.match(r"\s*([A-Za-z0-9][\w.-]*)", line) for line in lines)
    return {re.sub(r"[-_.]+", "-", name[1]).lower() for name in names if name}


# ---- commands ------------------------------------------------------------------------------------


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_documented_commands_exist(document):
    """Make targets, scripts, config names and config groups that code blocks and inline code of a document name."""
    text = code_blocks(document) + "\n" + "\n".join(re.findall(r"`([^`\n]+)`", document.read_text()))
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for target in re.findall(r"(?:^|\s)make ([a-z][a-z-]*)\b", text):
        assert target in targets, f"{document.name} names `make {target}`; the Makefile has {sorted(targets)}"
    for line in re.findall(r"(?:python3?|torchrun) (?!-m)[^\n]*\.py[^\n]*(?:\\\n[^\n]*)*", text):
        script = re.search(r"((?:scripts|docker|kernels|benchmarks)/\S*\.py)", line)
        assert script, f"{document.name}: no script of this project in `{line}`"
        assert (ROOT / script[1]).is_file(), f"{document.name} names {script[1]}, which does not exist"
        folder = ROOT / "conf" / ("finetuning" if "finetune" in script[1] else "")
        for name in re.findall(r"--config-name[ =]([a-z]\w*)", line):
            assert (folder / f"{name}.yaml").is_file(), f"{document.name} names the config {name}"
        for group, name in re.findall(r"\b(model|data)=([a-z]\w*)", line):
            assert (folder / group / f"{name}.yaml").is_file(), f"{document.name} names {group}={name}"


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_relative_links_lead_somewhere(document):
    for link in re.findall(r"\]\((?!https?:|#|mailto:)([^)#\s]+)[^)]*\)", document.read_text()):
        assert (document.parent / link).exists(), f"{document.name} links to {link}"


def timed(command: list[str]) -> tuple[float, subprocess.CompletedProcess]:
    """Processor seconds of a command: what it takes on an idle machine, whatever else runs on this one."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, result


@pytest.mark.parametrize(
    "script", ["speech_pretrain.py", "speech_finetune.py", "prepare_data.py", "train_tokenizer.py"]
)
def test_help_answers_at_once(script):
    seconds, result = timed([sys.executable, "-X", "importtime", f"scripts/{script}", "--help"])
    assert result.returncode == 0, result.stderr
    loaded = {line.rpartition("|")[2].strip() for line in result.stderr.splitlines()}
    assert not loaded & {"torch", "numpy", "nemo", "lhotse", "sentencepiece"}
    assert f"scripts/{script}" in result.stdout or f"usage: {script}" in result.stdout
    assert seconds < 2.5


@pytest.mark.parametrize(
    "override", ["model.optm.lr=1", "trainer.max_step=5", "model=tinny", "model.conformer.d_modle=8"]
)
def test_a_misspelt_key_answers_at_once(override):
    seconds, result = timed([sys.executable, "scripts/speech_pretrain.py", override])
    assert result.returncode != 0
    assert override.partition("=")[0].rpartition(".")[0] in result.stderr + result.stdout
    assert override.split("=")[0].split(".")[-1] in result.stderr + result.stdout
    assert seconds < 2.5


def test_importing_the_package_imports_neither_torch_nor_nemo():
    probe = "import sys, nemo_slam; print([m for m in ('torch', 'nemo', 'lightning', 'numpy') if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True, cwd=ROOT)
    assert result.stdout.strip() == "[]"


# ---- requirements --------------------------------------------------------------------------------


def third_party_imports(folders: list[str]) -> dict[str, Path]:
    """Top-level modules from elsewhere that the Python files of some folders import, with one file that does."""
    found = {}
    for path in tree():
        if path.suffix != ".py" or path.relative_to(ROOT).parts[0] not in folders:
            continue
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.level == 0 else []
            found.update({name.partition(".")[0]: path for name in names})
    siblings = {path.stem for path in tree() if path.suffix == ".py"} | {"nemo_slam", "slam_kernels"}
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names | siblings}


@pytest.mark.parametrize(
    ("folders", "optional"),
    [(["nemo_slam", "kernels", "scripts"], ["te", "synthetic"]), (["tests"], ["te", "synthetic", "dev"])],
    ids=["package", "tests"],
)
def test_every_import_is_a_declared_requirement(folders, optional):
    project = pyproject()["project"]
    lines = [*project["dependencies"], *(line for name in optional for line in project["optional-dependencies"][name])]
    declared = requirement_names(lines) | {"apex"}  # optional, and never from the package index
    distributions = importlib.metadata.packages_distributions()
    brought = {"yaml": "omegaconf", "nemo": "nemo-toolkit", "transformer_engine": "transformer-engine"}
    for module, path in third_party_imports(folders).items():
        names = requirement_names([brought[module]] if module in brought else distributions.get(module, [module]))
        assert names & declared, f"{path.relative_to(ROOT)} imports {module}, which pyproject.toml does not require"


def test_apex_is_no_requirement():
    project = pyproject()["project"]
    optional = [line for lines in project["optional-dependencies"].values() for line in lines]
    constraints = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    assert "apex" not in requirement_names([*project["dependencies"], *optional, *constraints])


def test_constraints_pin_what_is_required():
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[^\s;]+(; python_version >= \"3\.\d+\")?", line) for line in lines)
    assert len(requirement_names(lines)) == len(lines), "a package is pinned twice"
    project = pyproject()["project"]
    required = requirement_names([*project["dependencies"], *project["optional-dependencies"]["dev"]])
    assert required <= requirement_names(lines)


def test_one_version_everywhere():
    version = pyproject()["project"]["version"]
    import nemo_slam

    assert nemo_slam.__version__ == version
    assert str(yaml.safe_load((ROOT / "CITATION.cff").read_text())["version"]) == version
    assert re.search(rf"^## \[?{re.escape(version)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)


def test_every_package_is_packaged():
    """A folder of modules without an __init__.py is left out of a wheel without a word."""
    for path in tree():
        parts = path.relative_to(ROOT).parts
        if path.suffix == ".py" and (parts[0] == "nemo_slam" or parts[:2] == ("kernels", "slam_kernels")):
            assert (path.parent / "__init__.py").is_file(), f"{path.relative_to(ROOT)} is in no package"


# ---- the tree ------------------------------------------------------------------------------------


def test_no_file_names_a_path_of_one_machine():
    homes = r"/(?:home|Users)/[a-z]|/root/|file:///"
    own = {f"{ROOT}/", f"{Path.home()}/"} - {
        "/workspace/nemo_slam/"
    }  # the container's folder, which the documents name
    machine = re.compile("|".join([homes, *map(re.escape, own)]))
    for path, text in texts():
        if path == Path(__file__):
            continue
        for number, line in enumerate(text.splitlines(), 1):
            assert not machine.search(line), f"{path.relative_to(ROOT)}:{number}: {line.strip()}"


def test_no_document_names_a_package_index():
    hosts = re.compile(r"pypi\.org|pythonhosted|download\.pytorch|/simple\b|--(?:extra-)?index-url \w+://")
    for path, text in texts():
        if path != Path(__file__):
            assert not hosts.search(text), f"{path.relative_to(ROOT)}: {hosts.search(text)}"


def test_lint_covers_the_tree():
    """No file is exempt from all rules, and ruff leaves out only what is not ours."""
    ruff = pyproject()["tool"]["ruff"]
    assert ruff["line-length"] == 120
    assert set(ruff["extend-exclude"]) <= {"data", "runs"}
    assert "per-file-ignores" not in ruff["lint"]
    for path, text in texts():
        if path.suffix == ".py":
            assert not re.search(r"^# (ruff|flake8): noqa *$|^# mypy: ignore-errors", text, re.MULTILINE), path


def test_files_are_short():
    """A file has one subject; the limit is where reading gets hard, not a target."""
    for path in tree():
        if path.suffix == ".py":
            lines = len(path.read_text().splitlines())
            assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines"
