"""Whether a tokenizer fits the texts of a corpus: a few unknown tokens are expected, many mean that it is another's."""

from __future__ import annotations

from nemo_slam.data.bad_rows import DataError
from nemo_slam.data.token_file import Tokenizer

OF_PRETRAINING = (
    "it was trained on other text. Train one on this text (scripts/train_tokenizer.py) or name another "
    "(data.tokenizer.model_path)"
)
OF_SOURCES = "it is the one that the encoder was trained with. Fine-tune an encoder of such text"
OF_TARGETS = "it was trained on other text. Train one on this manifest (model.tokenizer.dir=null does) or name another"


def refuse_other_text(
    unknown: int, total: int, most: float, where: str, tokenizer: Tokenizer, way_out: str
) -> None:
    """
    Args:
        unknown, total: numbers of tokens in the texts that are kept.
        most: share that may be unknown, ``max_unknown`` of the stream's config.
        where: section and key of these texts.
        way_out: whose tokenizer it is, and what to do instead.

    Raises:
        DataError: more of the tokens are unknown.
    """
    if unknown > most * total:
        raise DataError(
            f"{where}: {unknown} of {total} tokens are unknown to the tokenizer {tokenizer.path}: {way_out}; or allow "
            f"more than {100 * most:g}% (max_unknown)"
        )
