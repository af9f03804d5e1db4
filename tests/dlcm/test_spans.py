"""Tokens and the characters they stand for."""

import pytest
import tokenizers
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm.errors import UserError
from dlcm.spans import token_spans
from dlcm.tokens import Tokenizer

TEXTS = [
    "the cat sat on the mat. " * 20,
    "naïve café, 你好世界 🎉🎉 e\u0301 日本語 " * 20,
    "def f(x):\n\treturn x\r\n" * 20,
]


def word_pieces() -> Tokenizer:
    """A tokenizer whose tokens are not the bytes of the text: lower case, without accents, without white space."""
    words = ["[UNK]", "the", "cat", "caf", "##e", "##s", "a", "."]
    backend = tokenizers.Tokenizer(
        tokenizers.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]")
    )
    backend.normalizer = tokenizers.normalizers.BertNormalizer(lowercase=True, strip_accents=True)
    backend.pre_tokenizer = tokenizers.pre_tokenizers.BertPreTokenizer()
    return Tokenizer(backend)


TOKENIZERS = {"bytes": Tokenizer(), "bpe": Tokenizer.train(TEXTS, 400), "pieces": word_pieces()}
ANY_TEXT = st.text(st.one_of(st.characters(exclude_categories=["Cs"]), st.sampled_from(" \n\tthecaféé你🎉\u202e\x1b")))


@pytest.mark.slow
@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=150, deadline=None)
@given(text=ANY_TEXT)
def test_the_pieces_of_all_tokens_are_the_text_whatever_it_is(name, text):
    spans = token_spans(TOKENIZERS[name], text)
    assert spans.ids_T.tolist() == TOKENIZERS[name].encode(text).tolist()
    assert len(spans.starts) == len(spans.ids_T) + 1
    if len(spans.ids_T):
        assert "".join(spans.pieces()) == text


@pytest.mark.parametrize("name", ["bytes", "bpe"])
@pytest.mark.parametrize("text", TEXTS)
def test_a_character_stands_with_the_token_that_has_its_first_byte(name, text):
    tokenizer = TOKENIZERS[name]
    table, at, expected = tokenizer.token_bytes(), 0, []
    owner = []
    for i, token in enumerate(tokenizer.encode(text).tolist()):
        owner += [i] * len(table[token])
        expected.append("")
    for char in text:
        expected[owner[at]] += char
        at += len(char.encode())
    assert token_spans(tokenizer, text).pieces() == expected


def test_what_a_lossy_tokenizer_drops_goes_with_the_token_before():
    spans = token_spans(TOKENIZERS["pieces"], "  The Cafés a. ")
    assert spans.pieces() == ["  The ", "Caf", "é", "s ", "a", ". "]


def test_no_text_has_no_tokens():
    assert token_spans(TOKENIZERS["bpe"], "").starts.tolist() == [0]


def test_half_a_surrogate_pair_is_refused_with_its_place():
    with pytest.raises(UserError, match="character 2 is half a surrogate"):
        token_spans(TOKENIZERS["bytes"], "ab\ud800")
