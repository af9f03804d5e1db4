import random

import numpy as np
import pytest

from dlcm import words
from dlcm.tokens import Tokenizer
from dlcm.words import WordEncoder, fits

SAMPLES = [
    "",
    " ",
    "it's we're I'll they've don't I'm he'd 'sabc 'S ''s 'll' x'd'd",
    "a  b   c \n\n d\t e \r\n  f\n",
    "def f(x): return x**2 + 3.14e-10  # comment\n\n\nclass A:\n    pass\n",
    "naïve café — “quotes” it’s 3½ x² \u00a0 a\u00a0b \u2003 c",
    "漢字かな交じり文。これは 文 です。\n次の行\n",
    "\x00\x01\x1c\x1d\x7f\x80\x85 \x0b\x0c",
    "🙂🙂 emoji 👩‍👩‍👧 end ",
    "trailing   ",
    "   leading",
    "\n\n\n",
    "a" * 50 + " " + "9" * 40 + "!" * 30,
    "<|endoftext|> is text",
]


@pytest.fixture(scope="module")
def backend():
    return Tokenizer.train([sample * 3 for sample in SAMPLES], 600).backend


def expected(backend, texts):
    return [item.ids for item in backend.encode_batch_fast(texts, add_special_tokens=False)]


def test_ids_are_those_of_the_tokenizer(backend):
    encoder = WordEncoder(backend, np.dtype(np.uint16))
    for _ in range(2):  # from the tokenizer, then from the table
        assert [ids.tolist() for ids in encoder.encode_batch(SAMPLES)] == expected(backend, SAMPLES)


@pytest.mark.parametrize("alphabet", ["ab1'. \n", "sdtlrevm' x\n", "aé’ '\n\t1.\u00a0", "".join(map(chr, range(128)))])
def test_ids_are_those_of_the_tokenizer_on_random_text(backend, alphabet):
    generator = random.Random(0)
    texts = ["".join(generator.choices(alphabet, k=generator.randrange(40))) for _ in range(3_000)]
    encoder = WordEncoder(backend, np.dtype(np.uint16))
    assert [ids.tolist() for ids in encoder.encode_batch(texts)] == expected(backend, texts)


def test_words_that_share_a_place_in_the_table_and_a_memory_that_is_full_change_nothing(backend, monkeypatch):
    monkeypatch.setattr(words, "_TABLE_BITS", 3)
    monkeypatch.setattr(words, "_MAX_KEPT", 10)
    encoder = WordEncoder(backend, np.dtype(np.uint16))
    for _ in range(3):
        assert [ids.tolist() for ids in encoder.encode_batch(SAMPLES)] == expected(backend, SAMPLES)
    assert len(encoder._words) < 200


def test_no_texts_and_empty_texts(backend):
    encoder = WordEncoder(backend, np.dtype(np.uint16))
    assert encoder.encode_batch([]) == []
    assert [len(ids) for ids in encoder.encode_batch(["", "", "a"])] == [0, 0, 1]


def test_only_tokenizers_that_cut_by_this_pattern_fit(backend):
    from tokenizers import AddedToken, normalizers, pre_tokenizers
    from tokenizers import Tokenizer as Backend

    def changed(change):
        other = Backend.from_str(backend.to_str())
        change(other)
        return fits(other)

    assert fits(backend)
    assert not changed(lambda t: setattr(t, "normalizer", normalizers.NFC()))
    assert not changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.Whitespace()))
    assert not changed(lambda t: setattr(t, "pre_tokenizer", pre_tokenizers.ByteLevel(add_prefix_space=True)))
    assert not changed(lambda t: t.add_tokens([AddedToken("word", special=False)]))
