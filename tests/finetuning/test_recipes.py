"""The configs of the paper's fine-tuning have the paper's hyper-parameters, and every page says what it must."""

import re
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

ROOT = Path(__file__).parents[2]
PAGES = [page for page in (ROOT / "docs" / "recipes").glob("*.md") if page.stem not in ("README", "pretraining")]


def config(name, *overrides):
    with initialize_config_dir(str(ROOT / "conf" / "finetuning"), version_base="1.3"):
        cfg = compose(name, list(overrides))
    return OmegaConf.create(OmegaConf.to_yaml(cfg))


@pytest.mark.parametrize(("name", "data"), [("st", "covost2"), ("mt", "prompts_text_translation")])
def test_translation_decoder(name, data):
    """SLAM, section 4.1."""
    cfg = config(name, f"data={data}")
    decoder = cfg.model.transf_decoder
    sizes = (decoder.num_layers, decoder.hidden_size, decoder.inner_size, decoder.num_attention_heads)
    assert sizes == (4, 384, 1536, 4)
    assert (cfg.tokenizer.vocab_size, cfg.tokenizer.sequence_symbols) == (8192, True)
    assert cfg.model.beam_search.beam_size > 1


def test_transducer_and_rates():
    """w2v-BERT, section 4.2."""
    cfg = config("asr_rnnt", "data=librispeech")
    assert (cfg.model.decoder.prednet.pred_hidden, cfg.model.decoder.prednet.pred_rnn_layers) == (640, 2)
    assert cfg.tokenizer.vocab_size == 1024
    encoder, rest = cfg.model.optim_param_groups.encoder, cfg.model.optim
    assert (encoder.lr, encoder.warmup_steps) == (3e-4, 5000)
    assert (rest.lr, rest.sched.warmup_steps) == (1e-3, 1500)
    augment = cfg.model.spec_augment
    assert (augment.freq_masks, augment.freq_width, augment.time_masks, augment.time_width) == (2, 27, 10, 0.05)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_pages_claim_nothing(page):
    """The published figure, or that none is at hand, and that it has not been reproduced here."""
    text = " ".join(page.read_text().lower().replace("*", "").split())
    assert re.search(r"not reproduced here|none has been reproduced here", text)
    assert re.search(r"published (wer|bleu)", text) or "none is stated" in text


def test_every_corpus_of_the_paper_has_a_page():
    named = {"librispeech", "covost2", "speechstew", "ami", "common_voice", "switchboard_callhome", "tedlium", "wsj"}
    assert {page.stem for page in PAGES} == named | {"glue"}
