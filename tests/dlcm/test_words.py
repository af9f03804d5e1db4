import random
import unicodedata

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm import cut, words
from dlcm.tokens import Tokenizer
from dlcm.words import WordEncoder, pattern_of

SAMPLES = [
    "",
    " ",
    "it's we're I'll they've don't I'm he'd 'sabc 'S ''s 'll' x'd'd",
    "a  b   c \n\n d\t e \r\n  f\n",
    "def f(x): return x**2 + 3.14e-10  # comment\n\n\nclass A:\n    pass\n",
    "naïve café — “quotes” it’s 3½ x² \u00a0 a\u00a0b \u2003 c",
    "漢字かな交じり文。これは 文 です。\n次の行\n",
    "Съешь ещё этих мягких французских булок, да выпей чаю. 'sё 'sя",
    "\x00\x01\x1c\x1d\x7f\x80\x85 \x0b\x0c a\x00 a\x00\x00 a",
    "🙂🙂 emoji 👩‍👩‍👧 end ",
    "trailing   ",
    "   leading",
    "\n\n\n",
    "\u3000\u3000 \u00a0x\u2003\u2003",
    "a" * 50 + " " + "9" * 40 + "!" * 30,
    "<|endoftext|> is text",
    *("w" * n + " " + "é" * n for n in (7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 255, 256, 300)),
]
EOT = 9_999


@pytest.fixture(scope="module")
def trained():
    return Tokenizer.train([sample * 3 for sample in SAMPLES], 600).backend


def with_pattern(trained, pattern):
    from tokenizers import Regex, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    other = Backend.from_str(trained.to_str())
    other.encode_special_tokens = True
    if pattern != "gpt2":
        other.pre_tokenizer = pre_tokenizers.Sequence(
            [pre_tokenizers.Split(Regex(pattern), "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)]
        )
    return other


@pytest.fixture(scope="module", params=["gpt2", cut.LLAMA3], ids=["gpt2", "llama3"])
def backend(trained, request):
    return with_pattern(trained, request.param)


@pytest.fixture(scope="module")
def warm(backend):
    return new_encoder(backend)


def new_encoder(backend):
    return WordEncoder(backend, pattern_of(backend), np.dtype(np.uint16), EOT)


def encoded(encoder, texts):
    ids, counts = encoder.encode([text.encode() for text in texts])
    assert counts.sum() == len(ids)
    return [piece.tolist() for piece in np.split(ids, np.cumsum(counts)[:-1])] if texts else []


def expected(backend, texts):
    return [[EOT, *item.ids] for item in backend.encode_batch_fast(texts, add_special_tokens=False)]


def test_ids_are_those_of_the_tokenizer(backend):
    encoder = new_encoder(backend)
    for _ in range(2):  # from the tokenizer, then from the table
        assert encoded(encoder, SAMPLES) == expected(backend, SAMPLES)


@pytest.mark.many
@pytest.mark.parametrize(
    "alphabet",
    [
        "ab1'. \n",
        "sdtlrevm' x\n",
        "aé’ '\n\t1.\u00a0",
        "a \u2003\u3000\x85\n",
        "'smяß٣½🙂 \u2028\u200b",
        "'sStTLlſKß1\n\r! ",
        "a1! \n\r\t\u3000—",
        "12٣½ ",
        "".join(map(chr, range(128))),
    ],
)
def test_ids_are_those_of_the_tokenizer_on_random_text(backend, warm, alphabet):
    generator = random.Random(0)
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(40))) for _ in range(3_000)]
    assert encoded(warm, texts) == expected(backend, texts)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(st.lists(st.text(st.characters(exclude_categories=["Cs"])), max_size=4))
def test_ids_are_those_of_the_tokenizer_on_any_text(backend, warm, texts):
    assert encoded(warm, texts) == expected(backend, texts)


@pytest.mark.slow
def test_characters_are_cut_as_the_tokenizer_cuts_them(backend, warm):
    codes = [*range(0x3400), *range(0x3400, 0xD800, 61), *range(0xE000, 0x110000, 61)]
    generator = random.Random(0)
    around = ["a", "1", "!", " ", "\n", "é", "'", "'s", "\u2003"]
    texts = ["".join(generator.choice(around) + chr(code) for code in codes[i::50]) for i in range(50)]
    assert encoded(warm, texts) == expected(backend, texts)


def test_a_library_that_knows_another_unicode_is_asked_character_by_character(monkeypatch):
    guessed = cut.Cutter("gpt2")
    monkeypatch.setattr(cut, "_guess", lambda char: cut._OTHER)
    asked = cut.Cutter("gpt2")
    for page in (0x00, 0x400, 0x600, 0x2000, 0x3000, 0xFF00, 0x1F600):
        for cutter in (guessed, asked):
            cutter._ask(page)
        np.testing.assert_array_equal(asked._class_of[page : page + 256], guessed._class_of[page : page + 256])
    kinds = {char: asked._class_of[ord(char)] for char in "ж٣—\u2003"}
    assert kinds == {"ж": cut._LETTER, "٣": cut._DIGIT, "—": cut._OTHER, "\u2003": cut._WHITE}
    assert unicodedata.category("٣") == "Nd"


def test_words_that_share_a_place_and_a_memory_that_is_full_change_nothing(backend, monkeypatch):
    monkeypatch.setattr(words, "_TABLES", {2: 8, 4: 2, 8: 2})
    monkeypatch.setattr(words, "_SPARE_IDS", 100)
    monkeypatch.setattr(words, "_BLOCK", 50)
    encoder = new_encoder(backend)
    for _ in range(3):
        assert encoded(encoder, SAMPLES) == expected(backend, SAMPLES)
    assert encoder._limit < 100 + 12 * 64
    assert encoder._used < encoder._limit + 400


@pytest.mark.slow
def test_a_word_that_comes_again_and_again_is_asked_for_once_while_others_come_and_go(backend, monkeypatch):
    monkeypatch.setattr(words, "_TABLES", {2: 64, 4: 16, 8: 16})
    encoder = new_encoder(backend)
    asked = []
    real = encoder._learn
    monkeypatch.setattr(encoder, "_learn", lambda new: asked.extend(new) or real(new))
    for i in range(500):
        encoder.encode([f"again {i}".encode()])
    assert asked.count(b"again") == 1
    assert len(asked) > 500


def test_no_texts_and_empty_texts(warm):
    assert [part.tolist() for part in warm.encode([])] == [[], []]
    assert encoded(warm, ["", "", "a"])[:2] == [[EOT], [EOT]]


def test_only_tokenizers_that_cut_by_a_known_pattern_have_one(trained):
    from tokenizers import AddedToken, models, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    def changed(change):
        other = Backend.from_str(trained.to_str())
        change(other)
        return pattern_of(other)

    assert pattern_of(trained) == "gpt2"
    assert pattern_of(with_pattern(trained, cut.LLAMA3)) == "llama3"
    assert pattern_of(with_pattern(trained, cut.LLAMA3 + "|x")) is None
    assert changed(lambda t: setattr(t, "normalizer", normalizers.NFC())) is None
    assert changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace())) is None
    assert changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True))) is None
    assert changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(False, use_regex=False))) is None
    assert changed(lambda t: t.add_tokens([AddedToken("word", special=False)])) is None
    assert changed(lambda t: setattr(t, "model", models.BPE({"a": 0, "b": 1}, []))) is None  # bytes are missing
