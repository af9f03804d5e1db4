import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dlcm.errors import UserError
from dlcm.tokens import EOT, Tokenizer, parse_tokenizer, vocab_size_of

TEXTS = [f"def f_{i}(x):\n    return x + {i}  # größer, ☃ und 数\n" for i in range(200)] + [
    "The quick brown fox. " * 20
]


@pytest.fixture(scope="module")
def bpe() -> Tokenizer:
    return Tokenizer.train(TEXTS, 320)


@pytest.fixture(params=["bytes", "bpe"])
def tokenizer(request, bpe) -> Tokenizer:
    return bpe if request.param == "bpe" else Tokenizer()


ODD = [
    "",
    " ",
    "\n\n\t x",
    "a\r\nb",
    "naïve ☃ 数 🎉",
    "\x00\x7f",
    f"x {EOT} y",
    "e\u0301 not normalised",
    "  trailing  ",
]


@pytest.mark.parametrize("text", ODD)
def test_decoding_gives_the_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(st.text())
def test_decoding_gives_any_text_back(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


@pytest.mark.parametrize("text", ODD)
def test_the_bytes_of_the_tokens_are_the_bytes_of_the_text(tokenizer, text):
    table, ids = tokenizer.token_bytes(), tokenizer.encode(text)
    assert b"".join(table[i] for i in ids) == text.encode()
    assert tokenizer.byte_lengths[ids].sum() == len(text.encode())


def test_no_text_encodes_to_the_end_of_text(tokenizer):
    assert tokenizer.eot_id not in tokenizer.encode(f"before {EOT}after{EOT}").tolist()
    assert tokenizer.token_bytes()[tokenizer.eot_id] == b""
    assert tokenizer.decode([tokenizer.eot_id]) == ""


def test_a_batch_is_encoded_as_its_texts_are(tokenizer):
    for ids, text in zip(tokenizer.encode_batch(TEXTS), TEXTS):
        np.testing.assert_array_equal(ids, tokenizer.encode(text))
        assert ids.dtype == tokenizer.dtype


def test_sizes_are_those_that_the_config_promises(bpe):
    assert Tokenizer().vocab_size == vocab_size_of("bytes") == 257
    assert bpe.vocab_size == vocab_size_of("bpe-320") == 320
    assert len(bpe.token_bytes()) == 320
    assert vocab_size_of("bpe-4_096") == 4096
    assert vocab_size_of("hub:some/model") is None


def test_a_saved_tokenizer_is_the_same_tokenizer(bpe, tmp_path):
    path = tmp_path / "tokenizer.json"
    bpe.save(path)
    again = Tokenizer.load(path)
    assert (again.fingerprint, again.vocab_size, again.eot_id) == (bpe.fingerprint, bpe.vocab_size, bpe.eot_id)
    np.testing.assert_array_equal(again.encode(TEXTS[0]), bpe.encode(TEXTS[0]))
    assert vocab_size_of(str(path)) == 320
    assert parse_tokenizer(str(path)) == ("file", path)


def test_training_is_deterministic_and_the_fingerprint_tells_tokenizers_apart(bpe):
    assert Tokenizer.train(TEXTS, 320).fingerprint == bpe.fingerprint
    assert len({Tokenizer().fingerprint, bpe.fingerprint, Tokenizer.train(TEXTS[:50], 320).fingerprint}) == 3


def test_a_tokenizer_without_an_end_of_text_gets_an_id_for_it(tmp_path):
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models, pre_tokenizers, trainers

    backend = Backend(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    backend.train_from_iterator(
        TEXTS, trainers.UnigramTrainer(vocab_size=120, special_tokens=["<unk>"], unk_token="<unk>")
    )
    backend.enable_padding(length=50)
    backend.enable_truncation(3)
    path = tmp_path / "unigram.json"
    backend.save(str(path))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.eot_id == tokenizer.vocab_size - 1 == backend.get_vocab_size()
    assert vocab_size_of(str(path)) == tokenizer.vocab_size
    text = "The quick brown fox."
    ids = tokenizer.encode(text)
    assert len(ids) > 3
    assert b"".join(tokenizer.token_bytes()[i] for i in ids).decode().strip() == text


@pytest.mark.slow
def test_large_vocabularies_are_kept_in_32_bits(tmp_path):
    vocab = {f"w{i}": i for i in range(70_000)} | {"</s>": 70_000}
    data = {
        "version": "1.0",
        "added_tokens": [],
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "w0"},
        "pre_tokenizer": {"type": "Whitespace"},
    }
    path = tmp_path / "words.json"
    path.write_text(json.dumps(data))
    tokenizer = Tokenizer.load(path)
    assert tokenizer.dtype == np.uint32
    assert tokenizer.eot_id == 70_000
    assert tokenizer.encode("w69999 w1").tolist() == [69_999, 1]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("byte", "unknown tokenizer 'byte'; did you mean 'bytes'"),
        ("bpe4096", "did you mean 'bpe-4096'"),
        ("bpe-100", "at least bpe-300"),
        ("hub:", "unknown tokenizer"),
        ("none/tokenizer.json", "none/tokenizer.json: no such file"),
    ],
)
def test_an_unknown_tokenizer_is_named_with_the_way_out(spec, message):
    with pytest.raises(UserError, match=message):
        vocab_size_of(spec)


@pytest.mark.parametrize("content", ["{", "{}", '{"model": {"vocab": 3}}', "\x00"])
def test_a_file_that_is_no_tokenizer_is_refused(tmp_path, content):
    path = tmp_path / "tokenizer.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        vocab_size_of(str(path))
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer\.json"):
        Tokenizer.load(path)


def test_a_hub_tokenizer_that_cannot_be_fetched_says_so(monkeypatch):
    def offline(*_):
        raise RuntimeError("no connection")

    monkeypatch.setattr("dlcm.tokens.Tokenizer.__init__", lambda *_: None)
    import tokenizers

    monkeypatch.setattr(tokenizers, "Tokenizer", type("Backend", (), {"from_pretrained": staticmethod(offline)}))
    with pytest.raises(UserError, match=r"hub:owner/name cannot be fetched \(no connection\)"):
        Tokenizer.from_hub("owner/name")
