"""The text stream's index and token file, tokenised by several processes: the same as training builds alone.

Sources are cut at line ends into pieces. A piece's result is a folder that appears by one rename, so a run that was
killed goes on with the pieces that are missing. Merged in order they are the index that `TextStream` opens.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import shutil
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path

from nemo_slam.data.bad_rows import BadRow
from nemo_slam.data.config import TextConfig
from nemo_slam.data.index import INDEX_VERSION, Index, IndexBuilder
from nemo_slam.data.manifest import expand_paths
from nemo_slam.data.shard_files import CHECKSUMS, describe_files, digest_of, write_json
from nemo_slam.data.text import COLUMNS, open_text_index, scan_text
from nemo_slam.data.token_file import TOKENS_FILE, Tokenizer

logger = logging.getLogger(__name__)

PIECE_BYTES = 16 << 20


@dataclass(frozen=True)
class Piece:
    """Whole lines of a source: its number, what it is counted from, and the stretch of bytes."""

    source: int
    lines_before: int
    begin: int
    end: int


def make_token_files(
    config: TextConfig, tokenizer: Path, work: Path, workers: int, piece_bytes: int = PIECE_BYTES
) -> Index:
    """Builds the index of a text stream, or opens it if it is there.

    Args:
        config: the stream's; paths, token limits and cache_dir must be those of the training.
        tokenizer: a SentencePiece model.
        work: folder for pieces; those of this build are removed at the end, and kept by a kill.
        workers: processes.
        piece_bytes: about the size of a piece.
    """
    sources, model = expand_paths(config.text_filepath), Tokenizer(tokenizer)

    def scan(builder: IndexBuilder) -> None:
        pieces = [piece for number, path in enumerate(sources) for piece in cut(number, path, piece_bytes)]
        files = [[str(p.absolute()), p.stat().st_size, p.stat().st_mtime_ns] for p in sources]
        folder = work / digest_of(
            [INDEX_VERSION, files, piece_bytes, model.digest, config.min_tokens, config.max_tokens]
        )
        folder.mkdir(parents=True, exist_ok=True)
        results = [folder / f"{number:06d}" for number in range(len(pieces))]
        missing = [number for number, path in enumerate(results) if not path.exists()]
        if len(missing) < len(pieces):
            logger.info("%d of %d pieces are there already", len(pieces) - len(missing), len(pieces))
        with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
            jobs = [
                pool.submit(_tokenise, pieces[n], sources[pieces[n].source], config, tokenizer, results[n])
                for n in missing
            ]
            try:
                for done, job in enumerate(as_completed(jobs), start=1):
                    job.result()
                    logger.info("%d of %d pieces tokenised", done, len(missing))
            except BaseException:  # said now, not when all others are done
                pool.shutdown(cancel_futures=True)
                raise
        _merge(builder, sources, pieces, results, model)
        shutil.rmtree(folder)

    index = open_text_index(config, sources, model, scan)
    if not (index.folder / CHECKSUMS).exists():
        write_json(index.folder / CHECKSUMS, describe_files(index.folder, sorted(index.folder.iterdir())))
    return index


def cut(number: int, path: Path, piece_bytes: int) -> Iterator[Piece]:
    """Pieces of a source, cut at line ends."""
    begin = lines = 0
    with open(path, "rb") as file:
        while block := file.read(piece_bytes):
            block += file.readline()
            yield Piece(number, lines, begin, begin + len(block))
            begin, lines = begin + len(block), lines + block.count(b"\n")


def _tokenise(piece: Piece, path: Path, config: TextConfig, tokenizer: Path, out: Path) -> None:
    """A small index of the piece alone."""
    part = out.with_name(f"{out.name}.part-{os.getpid()}")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    text = part / f"text{path.suffix}"
    with open(path, "rb") as file:
        file.seek(piece.begin)
        text.write_bytes(file.read(piece.end - piece.begin))
    builder = IndexBuilder(part, COLUMNS)
    scan_text(builder, [text], config, Tokenizer(tokenizer))
    builder.finish()
    text.unlink()
    part.rename(out)


def _merge(
    builder: IndexBuilder, sources: Sequence[Path], pieces: Sequence[Piece], results: Sequence[Path], model: Tokenizer
) -> None:
    """Feeds the pieces' rows to the builder in the order of the sources."""
    totals, size = {"split_lines": 0, "unknown_tokens": 0}, 0
    with open(builder.folder / f"{TOKENS_FILE}.bin", "wb") as tokens:
        for number, path in enumerate(sources):
            for piece, folder in zip(pieces, results, strict=True):
                if piece.source != number:
                    continue
                index = Index(folder)
                rows = zip(index.length.tolist(), index.start.tolist(), index.line.tolist(), strict=True)
                for length, start, line in rows:
                    builder.add(length, size + start, number, piece.lines_before + line)
                for row in index.bad_rows():
                    builder.add_bad(BadRow(str(path), piece.lines_before + row.line, row.reason))
                builder.filtered.update(index.meta["filtered"])
                for key in totals:
                    totals[key] += index.meta[key]
                with open(folder / f"{TOKENS_FILE}.bin", "rb") as file:
                    shutil.copyfileobj(file, tokens, 1 << 20)
                size += index.meta["arrays"]["tokens"][1]
            builder.end_source()
    builder.arrays["tokens"] = (model.dtype, size)
    builder.meta |= totals
