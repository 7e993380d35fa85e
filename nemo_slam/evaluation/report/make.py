"""From run folders to a report; ``scripts/report.py`` calls :func:`make`."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from nemo_slam.evaluation.report.examples import Examples, nothing, read_examples
from nemo_slam.evaluation.report.page import render
from nemo_slam.evaluation.report.runs import Run, read_runs
from nemo_slam.evaluation.report.transcripts import Transcripts, read


def default_path(folders: Sequence[Path]) -> Path:
    """``report.html`` in the run folder, or in the folder that holds all of them."""
    return Path(os.path.commonpath([folder.resolve() for folder in folders])) / "report.html"


def make(
    folders: Sequence[Path],
    out: Path,
    transcripts: Sequence[Path] = (),
    translations: Sequence[Path] = (),
    with_model: bool = True,
) -> list[Run]:
    """Write the report of these run folders, whole or not at all.

    Args:
        transcripts, translations: files of ``scripts/transcribe.py``, against the keys ``text`` and ``translation``.
        with_model: restore each run's newest weights for the panels that need them.

    Raises:
        FileNotFoundError, ValueError: something given is not what it should be.
    """
    runs = read_runs(folders)
    texts: list[Transcripts] = [read(path, "text") for path in transcripts]
    texts += [read(path, "translation") for path in translations]
    found: list[Examples] = [read_examples(run) if with_model else nothing("left out: --without-model") for run in runs]
    page = render(runs, found, texts)
    out.parent.mkdir(parents=True, exist_ok=True)
    part = out.with_name(out.name + ".part")
    part.write_text(page, encoding="utf-8")
    os.replace(part, out)
    return runs
