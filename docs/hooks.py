"""What mkdocs adds to the pages in this folder: the configuration reference, pages from elsewhere in the repository,
and a table of contents of the pages that exist."""

from __future__ import annotations

import ast
import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).resolve().parents[1]
NAVIGATION = {
    "": ["index.md", "readme.md"],
    "Start": ["installation.md", "quickstart.md", "concepts.md", "architecture.md"],
    "Use": ["data.md", "pretraining.md", "finetuning.md", "export.md", "scaling.md", "recipes/"],
    "Look up": ["configuration.md", "api.md", "kernels.md"],
    "When in doubt": [
        *("learning.md", "debugging.md", "faults.md", "results.md", "ablations.md"),
        *("model_card.md", "contributing.md", "changelog.md"),
    ],
}
TITLES = {"index.md": "Home", "readme.md": "README", "kernels.md": "Kernels", "data.md": "Data"}
ELSEWHERE = {"readme.md": "README.md", "kernels.md": "kernels/README.md", "changelog.md": "CHANGELOG.md"}
"""Pages of the site that lie outside this folder."""

CONFIGS = {  # a file stands where it is named first; under fine-tuning come those of all folders
    "Pre-training": ["run/*", "slam_*", "*"],
    "Model": ["model/slam", "model/base", "model/tiny", "model/*"],
    "Data": ["data/prompts", "data/*"],
    "Fine-tuning": ["finetuning/run/*", "finetuning/*", "finetuning/data/*", "finetuning/*/*"],
}
DOCUMENTED = {  # part of a config -> the class whose docstring tells what its keys mean
    "model": "ModelSettings",
    "train_ds.speech": "SpeechConfig",
    "train_ds.text": "TextConfig",
    "train_ds.pairs": "PairsConfig",
    "validation_ds.speech": "SpeechConfig",
    "validation_ds.text": "TextConfig",
    "validation_ds.pairs": "PairsConfig",
    "guard": "StepGuard",
}


# ---- mkdocs' events --------------------------------------------------------------------------------


def on_config(config: Any) -> Any:
    navigation: list[Any] = []
    for title, names in NAVIGATION.items():
        pages: list[Any] = []
        for name in names:
            if name.endswith("/"):
                pages += sorted(str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs" / name).glob("*.md"))
            elif name in ELSEWHERE or (ROOT / "docs" / name).is_file():
                pages.append({TITLES[name]: name} if name in TITLES else name)
        navigation += pages if not title else [{title: pages}]
    named = {name for names in NAVIGATION.values() for name in names}
    others = sorted(path.name for path in (ROOT / "docs").glob("*.md") if path.name not in named)
    if others:
        navigation.append({"More": others})
    config.nav = navigation
    return config


def on_files(files: Any, config: Any) -> Any:
    from mkdocs.structure.files import File

    for name, source in ELSEWHERE.items():
        files.append(File.generated(config, name, content=(ROOT / source).read_text(encoding="utf-8")))
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Any) -> str:
    if page.file.src_uri == "configuration.md":
        markdown = markdown.replace("<!-- reference -->", configuration_reference())
    own = ROOT / ELSEWHERE.get(page.file.src_uri, f"docs/{page.file.src_uri}")
    return re.sub(
        r"\[([^\]]+)\]\((?!\w+:|#)([^)#\s]+)(#[^)\s]*)?\)",
        lambda link: _link(link, own, Path(page.file.src_uri)),
        markdown,
    )


def _link(link: re.Match[str], own: Path, page: Path) -> str:
    """A relative link as the repository has it, to where the site has that file; what it lacks is named, not linked."""
    label, target, anchor = link[1], (own.parent / link[2]).resolve(), link[3] or ""
    docs = ROOT / "docs"
    sources = {(ROOT / source).resolve(): name for name, source in ELSEWHERE.items()}
    up = "../" * (len(page.parts) - 1)
    if target in sources:
        return f"[{label}]({up}{sources[target]}{anchor})"
    if target.is_relative_to(docs):
        return f"[{label}]({up}{target.relative_to(docs)}{anchor})"
    name = target.relative_to(ROOT) if target.is_relative_to(ROOT) else target.name
    return f"{label} (`{name}`)" if str(name) not in label else f"`{name}`"


# ---- configuration reference -------------------------------------------------------------------------


def configuration_reference() -> str:
    """All keys of all files under conf/: value, and what the comment beside it or the class that reads it says."""
    parts, seen = [], set()
    documentation = docstrings()
    for title, patterns in CONFIGS.items():
        parts.append(f"## {title}\n")
        for pattern in patterns:
            for path in sorted((ROOT / "conf").glob(f"{pattern}.yaml")):
                if path not in seen:
                    seen.add(path)
                    parts.append(_file(path, documentation))
    missing = [str(path.relative_to(ROOT)) for path in (ROOT / "conf").rglob("*.yaml") if path not in seen]
    if missing:
        raise ValueError(f"docs/hooks.py: CONFIGS has no section for {', '.join(sorted(missing))}")
    return "\n".join(parts)


def _file(path: Path, documentation: dict[str, dict[str, str]]) -> str:
    text = path.read_text(encoding="utf-8")
    head = [line.lstrip("# ").rstrip() for line in _leading_comment(text) if "@package" not in line]
    prose = " ".join(line for line in head if line and "python scripts/" not in line)
    commands = [line for line in head if "python scripts/" in line]
    name = path.relative_to(ROOT / "conf").with_suffix("")
    lines = [f"### {name}\n", prose, ""]
    if commands:
        lines += ["```", *commands, "```", ""]
    rows = keys(text)
    rows = [row for row in rows if not row[0].startswith(("defaults", "hydra"))]
    if rows:
        lines += ["| key | value | |", "|---|---|---|"]
        lines += [
            f"| `{key}` | {_cell(value)} | {_cell(comment or described(key, name, documentation), code=False)} |"
            for key, value, comment in rows
        ]
    return "\n".join([*lines, ""])


def _leading_comment(text: str) -> list[str]:
    lines = []
    for line in text.splitlines():
        if not line.startswith("#"):
            break
        lines.append(line)
    return lines


def _cell(text: str, code: bool = True) -> str:
    text = text.replace("|", "\\|").replace("\n", " ")
    return f"`{text}`" if code and text else text


def keys(text: str) -> list[tuple[str, str, str]]:
    """(dotted key, value as written, comment) of each leaf of a YAML file; a comment stands above the key or beside it.

    >>> keys("# All.\\na:\\n  # Why.\\n  b: 1  # how much\\n")
    [('a.b', '1', 'Why. how much')]
    """
    lines, head = text.splitlines(), len(_leading_comment(text))
    found: list[tuple[str, str, str]] = []

    def comment(key: yaml.Node, end: int) -> str:
        """What stands above the key's line, and in its line after the character ``end``."""
        at, above = key.start_mark.line - 1, []
        while at >= head and lines[at].lstrip().startswith("#"):
            above.insert(0, lines[at].strip().lstrip("# "))
            at -= 1
        beside = re.search(r"\s#\s*(.*)$", text[end:].partition("\n")[0])
        return " ".join([*above, *([beside[1]] if beside else [])])

    def walk(node: yaml.Node, prefix: str, inherited: str) -> None:
        assert isinstance(node, yaml.MappingNode)
        for key, value in node.value:
            name = f"{prefix}{key.value}"
            if isinstance(value, yaml.MappingNode) and value.value:
                walk(value, f"{name}.", "" if value.flow_style else comment(key, key.end_mark.index))
                continue
            written = " ".join(text[value.start_mark.index : value.end_mark.index].split())
            own = comment(key, value.end_mark.index)
            found.append((name, written, " ".join(part for part in (inherited, own) if part)))
            inherited = ""

    root = yaml.compose(text)
    if isinstance(root, yaml.MappingNode):
        walk(root, "", "")
    return found


# ---- docstrings, read without an import ----------------------------------------------------------------


def docstrings() -> dict[str, dict[str, str]]:
    """Class -> key -> what its docstring says; a key whose type is another class of ours leads there by ``@``."""
    found: dict[str, dict[str, str]] = {}
    for path in sorted((ROOT / "nemo_slam").rglob("*.py")):
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef):
                entries = sections(ast.get_docstring(node) or "")
                for field in node.body:
                    if isinstance(field, ast.AnnAssign) and isinstance(field.target, ast.Name):
                        names = re.findall(r"\b[A-Z]\w+", ast.unparse(field.annotation))
                        entries |= {f"@{field.target.id}": name for name in names if name != "None"}
                found[node.name] = entries
    return found


def sections(docstring: str) -> dict[str, str]:
    """The entries under ``Attributes:`` or ``Args:``.

    >>> sections("Attributes:\\n    a, b: two\\n        things.\\n    c: one.")
    {'a': 'two things.', 'b': 'two things.', 'c': 'one.'}
    """
    match = re.search(r"(?:Attributes|Args):\n(.*?)(?:\n\s*\n|\Z)", docstring, re.DOTALL)
    entries: dict[str, str] = {}
    names: list[str] = []
    first = 0
    for line in match[1].splitlines() if match else []:
        start = re.match(r"\s*((?:\w+, )*\w+): (.*)", line)
        indent = len(line) - len(line.lstrip())
        if start and (not names or indent <= first):
            first = indent
            names = start[1].split(", ")
            entries |= dict.fromkeys(names, start[2].strip())
        else:
            entries |= {name: f"{entries[name]} {line.strip()}".strip() for name in names}
    return entries


def described(key: str, name: Path, documentation: dict[str, dict[str, str]]) -> str:
    """What the class that reads a key says about it; empty where none does."""
    for part, cls in DOCUMENTED.items():
        if not key.startswith(f"{part}.") or (part == "model" and name.parts[0] == "finetuning"):
            continue
        path = key.removeprefix(f"{part}.").split(".")
        for step in path[:-1]:
            cls = documentation.get(cls, {}).get(f"@{step}", "")
        return documentation.get(cls, {}).get(path[-1], "")
    return ""
