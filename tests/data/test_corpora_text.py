"""Normalisation, Asterisk transcripts, the text stream's filter, and the readers of SWORD and WordNet."""

import random
import re
import struct
import zlib

import pytest

from nemo_slam.data.corpora.asterisk import parse_transcripts
from nemo_slam.data.corpora.files import CorpusError
from nemo_slam.data.corpora.layout import MAX_WORDS, filter_text
from nemo_slam.data.corpora.normalise import fold, normalise
from nemo_slam.data.corpora.sword import verses
from nemo_slam.data.corpora.wordnet import examples


@pytest.mark.parametrize(
    ("text", "language", "spoken"),
    [
        ("Please press 1 now.", "en", "please press one now"),
        ("press * to toggle pause, press # to enter", "en", "press star to toggle pause press pound to enter"),
        ("A.M.", "en", "a m"),
        ("a las 3 p.m. hoy", "es", "a las tres p m hoy"),
        ("3D audio disabled", "en", "three d audio disabled"),
        ("visit www.asterisk.org.", "en", "visit w w w dot asterisk dot org"),
        ("visite www.asterisk.org", "es", "visite w w w punto asterisk punto org"),
        ("o'clock, 'quoted' dogs'", "en", "o'clock quoted dogs"),
        ("Appuyez sur l’étoile; 0 ou 9 !", "fr", "appuyez sur l'étoile zéro ou neuf"),
        ("dix-sept", "fr", "dix sept"),
        ("¿En qué carpeta… el niño?", "es", "en qué carpeta el niño"),
        ("nin\u0303o", "es", "niño"),  # decomposed, comes out composed
        ("ÉCOLE", "fr", "école"),
        ("under_score", "en", "under score"),
        ("dial 500", "en", None),
        ("a 28.8 modem", "en", None),
        ("verse 3:16", "en", None),
        ("chapter ٣", "en", None),
        ("...", "en", None),
        ("", "fr", None),
    ],
)
def test_normalise(text, language, spoken):
    assert normalise(text, language) == spoken


def test_normalise_names_the_languages_it_has_rules_for():
    with pytest.raises(ValueError, match="'de': expected one of en, es, fr"):
        normalise("hallo", "de")


def test_normalising_twice_changes_nothing():
    for text in ("Press 1, or A.M.", "it's O'Brien's dogs' 3D", "www.asterisk.org"):
        once = normalise(text, "en")
        assert normalise(once, "en") == once


def test_fold_drops_case_and_diacritics():
    assert fold("Niño ÉCOLE") == fold("nino école") == "nino ecole"


TRANSCRIPTS = """; Core Sounds

activated: Activated.
ascending-2tone: [ascending tones]
beeperr: (ahooga)
confbridge-join: <beep ascending>
conf-hasleft: has left the conference.
demo-instruct: You can dial 500 to attempt.
dictate/both_help: press * to toggle pause
digits/1: one
digits/1f: una
digits/0: zero
digits/0: ten
empty-one:
for: Pour (emphase)
letters/a: a
phonetic/a_p: alpha
silence/1: (1 second of silence)
spy-agent: Agent
vm-Cust1: folder 5
vm-intro: Please leave a message. (simple tone sound plays) [beep]
vm-tempgreetactive: Your [temporary] greetings are in use
priv-callee: the polite menu (don't call), press 4
vm-record: At the tone, press the key.vm-review-nonurgent: Press 4 to remove.
vm-leavemsg:  Press 5 to leave a message
vm-why: Note: this holds a colon
no colon in this line
"""


def test_parse_transcripts():
    found = parse_transcripts(TRANSCRIPTS, "en")
    assert found.texts == {
        "activated": "activated",
        "conf-hasleft": "has left the conference",
        "dictate/both_help": "press star to toggle pause",
        "digits/1": "one",
        "digits/1f": "una",
        "digits/0": "zero",
        "for": "pour",
        "vm-Cust1": "folder five",
        "vm-intro": "please leave a message",
        "vm-record": "at the tone press the key",
        "vm-leavemsg": "press five to leave a message",
        "vm-why": "note this holds a colon",
    }
    assert found.left_out == {
        "no words": 4,
        "number that can be read in several ways": 1,
        "repeated prompt id": 1,
        "spelling, names or silence": 4,
        "bracket inside the sentence": 2,
        "not a transcript line": 1,
    }


def test_known_wrong_transcripts_are_left_out_in_their_language_only():
    line = "digits/h-80: soixante-dixième\n"
    assert parse_transcripts(line, "fr").texts == {}
    assert parse_transcripts(line, "fr").left_out == {"wrong transcript": 1}
    assert parse_transcripts(line, "es").texts == {"digits/h-80": "soixante dixième"}


def test_filter_text_against_a_search_of_every_prompt_in_every_line():
    draw = random.Random(3)
    words = ["uno", "dós", "tres", "á", "casa"]
    held_out = [" ".join(draw.choices(words, k=draw.randint(1, 5))) for _ in range(12)]
    lines = [" ".join(draw.choices(words, k=draw.randint(1, 9))) for _ in range(400)]
    kept, left_out = filter_text(lines, held_out)

    def holds(line: str, prompt: str) -> bool:
        line, prompt = fold(line), fold(prompt)
        return line == prompt or (len(prompt.split()) >= 3 and f" {prompt} " in f" {line} ")

    clean = [line for line in lines if not any(holds(line, prompt) for prompt in held_out)]
    assert kept == list(dict.fromkeys(clean))
    assert left_out["text of a dev or test prompt"] == len(lines) - len(clean) > 0
    assert left_out["repeated line"] == len(clean) - len(kept) > 0


def test_filter_text_compares_without_diacritics_and_by_whole_words():
    kept, _ = filter_text(["el numero es", "llamada", "en el número es más", "el numero estable"], ["el número es"])
    assert kept == ["llamada", "el numero estable"]


def test_filter_text_leaves_out_passages():
    long = " ".join(["word"] * (MAX_WORDS + 1))
    kept, left_out = filter_text([long, long[5:]], [])
    assert kept == [long[5:]]
    assert left_out == {f"longer than {MAX_WORDS} words": 1}


def _module(fragments_by_block: list[list[str]], testament: str = "nt") -> dict[str, bytes]:
    """A zText testament written from the format's description."""
    index, places, data = b"", struct.pack("<IIH", 0, 0, 0), b""
    for number, fragments in enumerate(fragments_by_block):
        block = b""
        for fragment in fragments:
            places += struct.pack("<IIH", number, len(block), len(fragment.encode()))
            block += fragment.encode()
        packed = zlib.compress(block)
        index += struct.pack("<III", len(data), len(packed), len(block))
        data += packed
    return {f"{testament}.bzs": index, f"{testament}.bzv": places, f"{testament}.bzz": data}


def test_verses_are_plain_and_in_order():
    files = _module(
        [
            ['<milestone type="x-importer" subType="x-osis2mod"/>'],
            [
                '<div sID="gen3" type="introduction"/> What is this book?',
                '<chapter n="1" osisID="Gen.1" sID="Gen.1"/>',
                '<title>A heading</title><w lemma="strong:H1">In the beginning</w>, <w lemma="x">God</w>'
                '<note placement="foot"><reference>1:1 </reference>See &lt;that&gt;.</note> created &amp; saw.',
            ],
            ['Señor, <q who="Jesus">“ven”</q>.<chapter eID="Rev.22"/><div eID="g" osisID="Rev" type="book"/>Glossary'],
        ]
    )
    assert list(verses(files)) == ["In the beginning, God created & saw.", "Señor, “ven”."]


def test_old_testament_comes_first():
    assert list(verses({**_module([["new"]], "nt"), **_module([["old"]], "ot")})) == ["old", "new"]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda files: files.pop("nt.bzv"), "do not fit together"),
        (lambda files: files.update({"nt.bzs": files["nt.bzs"][:-1]}), "do not fit together"),
        (lambda files: files.update({"nt.bzz": files["nt.bzz"][:-6]}), r"block 0 of nt.bzz"),
        (lambda files: files.update({"nt.bzv": struct.pack("<IIH", 0, 4, 60000)}), "behind the end of block 0"),
        (lambda files: files.update({"nt.bzv": struct.pack("<IIH", 9, 0, 4)}), "block 9 of nt.bzz"),
        (lambda files: files.clear(), "no zText module"),
    ],
)
def test_a_damaged_module_is_an_error(damage, message):
    files = _module([["a verse of some length"]])
    damage(files)
    with pytest.raises(CorpusError, match=message):
        list(verses(files))


def test_wordnet_examples():
    data = (
        b'  1 This software ... "not an example of use"\n'
        b'00002724 29 v 01 choke 0 002 @ 00001740 v 0000 | breathe badly; "She choked with emotion"; "I see"\n'
        b"00003133 29 v 01 pant 0 000 | no example\n"
    )
    assert list(examples(data)) == ["She choked with emotion"]
    assert re.fullmatch(r"she choked with emotion", normalise("She choked with emotion", "en"))
