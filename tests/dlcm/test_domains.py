"""Labels of source code and prose, against Python's own tokenizer and parser, and on other text."""

import ast
import io
import sysconfig
import tokenize
import warnings
from pathlib import Path

import numpy as np
import pytest

from dlcm.domains import CODE, PROSE, StreamLabels, label_bytes, label_tokens
from dlcm.shards import Split
from dlcm.tokens import Tokenizer

STDLIB = Path(sysconfig.get_path("stdlib"))
SOURCE = '''\
"""Module text, with a word that is spelt import."""
import os  # why it is imported

URL = "http://host/#anchor"
TABLE = [
    "not a docstring",
    """nor this one""",
]


class Reader:
    r"""Reads."""

    path: str = 'a # b'
    "What an attribute is."

    def read(self, x=("(", '#')):
        """Read it.

        def looks_like_code(): pass
        """
        # (an open bracket, and don't
        return f"{x!r}#{self.path}"  # done


def one_line(): "short"
'''
PROSE_OF_SOURCE = [
    '"""Module text, with a word that is spelt import."""',
    "# why it is imported",
    'r"""Reads."""',
    '"What an attribute is."',
    '"""Read it.\n\n        def looks_like_code(): pass\n        """',
    "# (an open bracket, and don't",
    "# done",
    '"short"',
]


def prose_of(text: bytes) -> list[str]:
    """The stretches labelled prose."""
    labels = label_bytes(text)
    assert labels.shape == (len(text),)
    edges = np.flatnonzero(np.diff(labels, prepend=CODE, append=CODE))
    return [text[a:b].decode() for a, b in edges.reshape(-1, 2)]


def reference(data: bytes) -> np.ndarray:
    """Comments by `tokenize`, strings that are statements by `ast`."""
    labels = np.zeros(len(data), np.uint8)
    starts = np.cumsum([0, *(len(line) + 1 for line in data.split(b"\n"))])
    for token in tokenize.generate_tokens(io.StringIO(data.decode(), newline="").readline):
        if token.type == tokenize.COMMENT:
            start = starts[token.start[0] - 1] + len(token.line[: token.start[1]].encode())
            labels[start : start + len(token.string.encode())] = PROSE
    for node in ast.walk(ast.parse(data)):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str):
            value = node.value
            start = starts[value.lineno - 1] + value.col_offset
            labels[start : starts[value.end_lineno - 1] + value.end_col_offset] = PROSE
    return labels


def test_comments_and_docstrings_are_prose_and_other_strings_are_code():
    assert prose_of(SOURCE.encode()) == PROSE_OF_SOURCE


@pytest.mark.slow
def test_labels_of_the_standard_library_agree_with_its_own_tokenizer_and_parser():
    files = sorted(
        path for folder in ("", "asyncio", "email", "json", "unittest") for path in (STDLIB / folder).glob("*.py")
    )
    n_bytes = n_differing = n_files = 0
    for path in files[3::12]:
        data = path.read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            expected = reference(data)
        n_bytes, n_files = n_bytes + len(data), n_files + 1
        n_differing += int((label_bytes(data) != expected).sum())
    assert n_files >= 15
    assert n_differing < 0.005 * n_bytes


@pytest.mark.many
@pytest.mark.parametrize("name", ["argparse.py", "subprocess.py", "json/encoder.py", "logging/config.py"])
def test_a_piece_cut_out_of_a_source_is_labelled_as_it_is_in_the_whole(name):
    """As a large file is cut into documents: at any line, so also inside a docstring or a bracket."""
    data = (STDLIB / name).read_bytes()
    whole = label_bytes(data)
    line_ends = np.flatnonzero(np.frombuffer(data, np.uint8) == ord("\n")) + 1
    n_bytes = n_agreeing = 0
    for start in line_ends[:-40:23]:
        piece = data[start : start + 6000]
        n_agreeing += int((label_bytes(piece) == whole[start : start + 6000]).sum())
        n_bytes += len(piece)
    assert n_agreeing > 0.98 * n_bytes


@pytest.mark.parametrize(
    "broken",
    [
        SOURCE.replace("]\n", "\n", 1),  # a bracket is never closed
        SOURCE.replace("class Reader:", "class Reader: ]))"),
        SOURCE.replace("import os ", "import os; s = 'no end ;"),
        SOURCE.replace("path: str", "\x00\xff path"),
    ],
)
def test_a_broken_source_keeps_the_labels_of_what_is_whole(broken):
    assert [text for text in PROSE_OF_SOURCE[2:] if text not in prose_of(broken.encode())] == []


def test_a_source_whose_docstring_does_not_end_is_prose_to_its_end():
    text = 'import os\n\ndef f():\n    """Begins and\n    goes on'
    assert prose_of(text.encode()) == ['"""Begins and\n    goes on']


RUNNING = {
    "english": 'It was the best of times, it was the worst of times.\nThe clerk (a Mr. Hill) said: "No!"\n\nHe left at 9.',
    "german": "Über allen Gipfeln ist Ruh,\nin allen Wipfeln spürest du\nkaum einen Hauch.",
    "chinese": "今天的天气非常好,我们一起去公园散步。\n那里有很多人在唱歌跳舞。",
    "dialogue": "HAMLET:\nTo be, or not to be, that is the question:\nWhether 'tis nobler in the mind to suffer\n",
    "list": "# Shopping for the week\n\n- two loaves of bread\n- milk and some butter\n1. then go home again\n",
    "technical": "Call read() first, since x = 1 is only set there; then import the table.\nSee section 4.2 for more.\n",
    "one line": "The quick brown fox jumps over the lazy dog.",
}
SOURCES = {
    "c": '#include <stdio.h>\n\nint main(void) {\n    printf("%d\\n", 3);\n    return 0;\n}\n',
    "javascript": "const f = (a, b) => {\n  return a.map((x) => x + b);\n};\n\nexport default f;\n",
    "rust": "pub fn add(a: i32, b: i32) -> i32 {\n    let c = a + b;\n    c\n}\n",
    "shell": "set -e\nfor f in *.txt; do\n  echo \"$f\" | sed 's/a/b/' >> out.log\ndone\n",
    "sql": "SELECT a.id, COUNT(*) AS n\nFROM a JOIN b ON a.id = b.id\nWHERE b.x >= 3 GROUP BY a.id;\n",
    "json": '{\n  "name": "the long name of a thing",\n  "size": [1, 2, 3]\n}\n',
    "html": '<html>\n<body>\n<div class="a"><a href="x">y</a></div>\n</body>\n</html>\n',
    "numbers": "1.5, 2.25, 3.125\n4.5, 5.25, 6.125\n",
}


@pytest.mark.parametrize("name", RUNNING)
def test_running_text_in_any_language_is_prose(name):
    assert label_bytes(RUNNING[name].encode()).mean() == PROSE


@pytest.mark.parametrize("name", SOURCES)
def test_sources_in_other_languages_are_code(name):
    assert label_bytes(SOURCES[name].encode()).mean() == CODE


def test_a_document_of_both_is_labelled_by_paragraph_and_by_fence():
    text = (
        "How to use the reader in practice.\n\n```python\nfrom reader import Reader\nprint(Reader('a').read())\n```\n\n"
        "Then the old way, which still works:\n\n    int x = read(path, 3);\n    close(path);\n\nThat is all there is to say.\n"
    )
    prose = "".join(prose_of(text.encode()))
    assert "How to use" in prose
    assert "Then the old way" in prose
    assert "That is all" in prose
    assert "import Reader" not in prose
    assert "close(path)" not in prose


def test_public_prose_is_prose(shared_data):
    for name, least in (("shakespeare", 0.97), ("wikitext2", 0.93)):
        text = (shared_data / "corpus" / f"{name}.txt").read_bytes()[:400_000]
        assert label_bytes(text).mean() > least


def test_with_one_byte_a_token_the_labels_of_the_tokens_are_those_of_the_bytes_but_for_white_space():
    tokenizer = Tokenizer()
    ids = np.concatenate([[tokenizer.eot_id], tokenizer.encode(SOURCE)])
    labels = label_tokens(ids, tokenizer)
    np.testing.assert_array_equal(labels[1:], label_bytes(SOURCE.encode()))
    assert labels[0] == labels[1] == PROSE  # the end of text before it opens the document


def test_a_token_across_two_domains_belongs_to_its_first_visible_byte():
    tokenizer = Tokenizer.train([SOURCE] * 3, 420)
    ids = tokenizer.encode(SOURCE)
    by_byte, at = label_bytes(SOURCE.encode()), 0
    across = 0
    for i, label in zip(ids.tolist(), label_tokens(ids, tokenizer).tolist()):
        text = tokenizer.token_bytes()[i]
        visible = at + len(text) - len(text.lstrip()) if text.strip() else at
        assert label == by_byte[visible]
        across += len(set(by_byte[at : at + len(text)].tolist())) > 1
        at += len(text)
    assert at == len(SOURCE.encode())
    assert across


def test_places_in_the_stream_have_the_labels_of_their_documents():
    tokenizer = Tokenizer()
    texts = [SOURCE, RUNNING["english"], "x", SOURCES["c"]]
    documents = [np.concatenate([[tokenizer.eot_id], tokenizer.encode(text)]) for text in texts]
    stream = np.concatenate(documents).astype(np.uint16)
    offsets = np.cumsum([0, *map(len, documents)])
    labels = StreamLabels(Split("validation", stream, offsets, 0), tokenizer)
    index = np.arange(len(stream) - len(stream) % 6).reshape(6, -1)[::2, ::-1]
    expected = np.concatenate([label_tokens(document, tokenizer) for document in documents])
    np.testing.assert_array_equal(labels[index], expected[index])


@pytest.mark.parametrize("text", [b"", b"\n", b"   ", b"#", b'"', b'"""', b"'''\\", b"\\", b"\xff\xfe", b"(" * 5000])
def test_no_text_is_too_odd_to_be_labelled(text):
    assert label_bytes(text).shape == (len(text),)
    ids = np.frombuffer(text, np.uint8).astype(np.uint16)
    assert label_tokens(ids, Tokenizer()).shape == ids.shape
