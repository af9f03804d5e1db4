import gzip
import io
import json
import os
import sys
from pathlib import Path

import pytest

from dlcm.config import DataConfig
from dlcm.corpus import BLOCK_CHARS, WHOLE_FILE_BYTES, cut_text, open_source
from dlcm.errors import UserError


def documents(corpus, **fields):
    return list(open_source(DataConfig(corpus=str(corpus), **fields)).documents())


def write_jsonl(path, texts, key="text"):
    path.write_text("".join(json.dumps({key: text, "other": 1}, ensure_ascii=False) + "\n" for text in texts))


def test_joining_the_blocks_of_a_text_gives_it_back_and_blocks_end_at_line_ends():
    text = "".join(f"line {i} öäü\r\n" for i in range(5000)) + "no line end"
    blocks = list(cut_text(io.StringIO(text, newline=""), 1000))
    assert "".join(blocks) == text
    assert all(block.endswith("\n") and 900 < len(block) <= 1000 for block in blocks[:-1])


def test_a_line_longer_than_a_block_is_cut_inside():
    blocks = list(cut_text(io.StringIO("x" * 2500 + "\ny"), 1000))
    assert [len(block) for block in blocks] == [1000, 1000, 502]


def test_a_single_text_file_gives_many_documents_and_loses_nothing(tmp_path):
    path = tmp_path / "book.txt"
    text = "".join(f"paragraph {i} of a book\n" for i in range(4000))
    path.write_text(text)
    found = documents(path)
    assert "".join(found) == text
    assert len(found) == len(text) // BLOCK_CHARS + 1


def test_files_of_a_folder_are_documents_and_only_large_ones_are_cut(tmp_path):
    (tmp_path / "b").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / ".git" / "x.txt").write_text("hidden")
    (tmp_path / "b" / "small.md").write_text("small\n" * 10_000)
    (tmp_path / "large.txt").write_text("large\n" * (WHOLE_FILE_BYTES // 6 + 1))
    (tmp_path / "a.bin").write_bytes(b"\0")
    (tmp_path / "z.jsonl").write_text('{"text": "row"}\n')
    found = documents(tmp_path)
    assert found.count("small\n" * 10_000) == 1
    assert sum(text.startswith("large") for text in found) == WHOLE_FILE_BYTES // BLOCK_CHARS + 1
    assert "row" in found
    assert "hidden" not in found


def test_documents_without_a_visible_character_are_left_out(tmp_path):
    write_jsonl(tmp_path / "x.jsonl", ["a", "", " \n\t", "b"])
    assert documents(tmp_path / "x.jsonl") == ["a", "b"]


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_jsonl_is_read_plain_and_compressed(tmp_path, suffix):
    texts = [f"text {i} ü" for i in range(100)]
    write_jsonl(tmp_path / "x.jsonl", texts, key="body")
    raw = (tmp_path / "x.jsonl").read_bytes()
    path = tmp_path / f"y.jsonl{suffix}"
    if suffix == ".gz":
        raw = gzip.compress(raw)
    elif suffix == ".zst":
        import zstandard

        raw = zstandard.ZstdCompressor().compress(raw[:1000]) + zstandard.ZstdCompressor().compress(raw[1000:])
    path.write_bytes(raw)
    assert documents(path, text_key="body") == texts


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_a_damaged_compressed_file_is_named(tmp_path, suffix):
    import zstandard

    path = tmp_path / f"x.jsonl{suffix}"
    raw = b'{"text": "a"}\n' * 5000
    packed = gzip.compress(raw) if suffix == ".gz" else zstandard.ZstdCompressor().compress(raw)
    path.write_bytes(packed[:10] + b"\xff\xff\xff" + packed[13:])
    with pytest.raises(UserError, match=rf"x\.jsonl{suffix}.*damaged"):
        documents(path)
    path.write_bytes(b"no such format at all")
    with pytest.raises(UserError, match=rf"x\.jsonl{suffix}"):
        documents(path)


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
@pytest.mark.parametrize("n_frames", [1, 3])
def test_a_compressed_file_that_ends_too_early_is_named(tmp_path, suffix, n_frames):
    """Wherever it was cut: inside the last frame, and so near its end that nothing but the checksum is missing."""
    import zstandard

    path = tmp_path / f"x.jsonl{suffix}"
    pack = gzip.compress if suffix == ".gz" else zstandard.ZstdCompressor(write_checksum=True).compress
    packed = b"".join(
        pack(b"".join(b'{"text": "%d %d"}\n' % (part, i * i) for i in range(3000))) for part in range(n_frames)
    )
    path.write_bytes(packed)
    assert len(documents(path)) == 3000 * n_frames
    for cut in (len(packed) - 2, len(packed) - 200):
        path.write_bytes(packed[:cut])
        with pytest.raises(UserError, match=rf"x\.jsonl{suffix}: damaged after line"):
            documents(path)


def test_a_line_nested_too_deeply_is_named(tmp_path):
    (tmp_path / "x.jsonl").write_text('{"text": "a"}\n{"text": ' + "[" * 200_000 + "\n")
    with pytest.raises(UserError, match=r"x\.jsonl:2: not valid JSON"):
        documents(tmp_path / "x.jsonl")


def test_linked_folders_are_read_once_and_a_link_back_is_no_trap(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "b.txt").write_text("b")
    root = tmp_path / "root"
    root.mkdir()
    (root / "a.txt").write_text("a")
    (root / "linked").symlink_to(tmp_path / "elsewhere")
    (root / "linked again").symlink_to(tmp_path / "elsewhere")
    (root / "up").symlink_to(root)
    assert documents(root) == ["a", "b"]


def test_parquet_is_read_and_a_missing_column_named(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"content": [f"row {i}" for i in range(600)], "n": list(range(600))}), path)
    assert documents(path, text_key="content") == [f"row {i}" for i in range(600)]
    with pytest.raises(UserError, match=r"x\.parquet: no column 'contents'; did you mean 'content'\?"):
        documents(path, text_key="contents")
    with pytest.raises(UserError, match="key 'n' holds int"):
        documents(path, text_key="n")
    path.write_bytes(b"not parquet")
    with pytest.raises(UserError, match="not a parquet file"):
        documents(path)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b"{broken", r"x\.jsonl:2: not valid JSON"),
        (b"[1]", r"x\.jsonl:2: expected a JSON object, found list"),
        (b'{"txt": "a"}', r"x\.jsonl:2: no key 'text'; did you mean 'txt'\?"),
        (b'{"text": 3}', r"x\.jsonl:2: key 'text' holds int"),
        (b'{"text": "\xff"}', r"x\.jsonl:2: not UTF-8"),
        (b'{"text": "\\ud800"}', r"x\.jsonl:2: .*surrogate"),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path, line, message):
    path = tmp_path / "x.jsonl"
    path.write_bytes(b'{"text": "good"}\n' + line + b"\n")
    with pytest.raises(UserError, match=message):
        documents(path)


def test_text_that_is_not_utf8_is_refused_by_name(tmp_path):
    (tmp_path / "latin.txt").write_bytes("Größe".encode("latin-1"))
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8"):
        documents(tmp_path / "latin.txt")
    with pytest.raises(UserError, match=r"latin\.txt: not UTF-8"):
        documents(tmp_path)


@pytest.mark.parametrize(
    ("corpus", "message"),
    [
        ("stdlb", "unknown corpus 'stdlb'.*did you mean 'stdlib'"),
        ("package", "did you mean 'packages'"),
        ("hf:", "needs the name"),
        ("no/such/file.txt", "no/such/file.txt: no such file or folder"),
        ("missing.jsonl", "missing.jsonl: no such file or folder"),
        ("", "data.corpus: empty; give stdlib"),
        ("~nobody-of-this-name/x.txt", "data.corpus: ~nobody-of-this-name/x.txt: .*write the path out"),
    ],
)
def test_an_unknown_or_missing_corpus_is_named_with_the_way_out(corpus, message):
    with pytest.raises(UserError, match=message):
        open_source(DataConfig(corpus=corpus))


def test_an_empty_folder_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no readable text"):
        open_source(DataConfig(corpus=str(tmp_path)))


@pytest.mark.skipif(os.geteuid() == 0, reason="root reads everything")
def test_an_unreadable_file_is_named(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("text")
    path.chmod(0)
    with pytest.raises(UserError, match=r"x\.txt: not readable \(Permission denied\)"):
        open_source(DataConfig(corpus=str(path)))


def test_the_standard_library_comes_in_the_same_order_without_installed_packages():
    first, again = open_source(DataConfig()), open_source(DataConfig())
    assert first.files == again.files
    assert len(first.files) > 1000
    assert not any({"site-packages", "__pycache__"} & set(path.parts[len(first.root.parts) :]) for path in first.files)
    assert first.fingerprint() == again.fingerprint()


@pytest.mark.slow
def test_installed_packages_are_a_corpus():
    source = open_source(DataConfig(corpus="packages"))
    names = {path.name for path in source.files}
    assert "yaml" in {path.parent.name for path in source.files}
    assert "representer.py" in names
    assert not any(path.suffix == ".so" for path in source.files)


def test_the_fingerprint_changes_with_the_file_and_not_with_time(tmp_path):
    path = tmp_path / "x.txt"
    path.write_text("one")
    config = DataConfig(corpus=str(path))
    before = open_source(config).fingerprint()
    assert open_source(config).fingerprint() == before
    path.write_text("other")
    assert open_source(config).fingerprint() != before


def test_a_hub_data_set_is_streamed(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "set"
    folder.mkdir()
    write_jsonl(folder / "train.jsonl", ["first", "second"])
    assert documents(f"hf:{folder}") == ["first", "second"]
    with pytest.raises(UserError, match="no key 'body'"):
        documents(f"hf:{folder}", text_key="body")


def test_a_hub_data_set_that_cannot_be_reached_is_named(monkeypatch):
    def offline(*_, **__):
        raise ConnectionError("offline")

    monkeypatch.setattr("datasets.load_dataset", offline)
    with pytest.raises(UserError, match=r"hf:owner/name: cannot be loaded \(ConnectionError: offline\)"):
        documents("hf:owner/name")


def test_without_the_extra_a_hub_data_set_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(UserError, match=r"pip install 'dlcm-scaling\[hf\]'"):
        documents("hf:owner/name")


def test_a_large_file_is_read_in_constant_memory(tmp_path):
    import tracemalloc

    path = tmp_path / "big.txt"
    with path.open("w") as file:
        for i in range(200_000):
            file.write(f"a line of the large file, number {i}\n")
    assert path.stat().st_size > 7_000_000
    source = open_source(DataConfig(corpus=str(path)))
    tracemalloc.start()
    assert sum(len(text) for text in source.documents()) == path.stat().st_size
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000


def test_the_shared_prose_corpus_gives_many_documents(shared_data):
    path = shared_data / "corpus" / "wikitext2.txt"
    found = documents(path)
    assert "".join(found) == Path(path).read_text(encoding="utf-8")
    assert len(found) > 60
