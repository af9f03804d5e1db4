import pytest

from dlcm.errors import UserError
from dlcm.yaml_io import load_yaml


def read(tmp_path, text):
    path = tmp_path / "x.yaml"
    path.write_text(text)
    return load_yaml(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("3e-3", 3e-3),
        ("1e6", 1e6),
        ("1.5E+9", 1.5e9),
        ("-2e-1", -0.2),
        (".5", 0.5),
        ("1_000_000", 1_000_000),
        ("1_0e2", 1000.0),
        ("-7", -7),
        ("0", 0),
        ("true", True),
        ("no", "no"),
        ("on", "on"),
        ("2024-01-02", "2024-01-02"),
        ("1:30", "1:30"),
        ("010", "010"),
        ("'3e-3'", "3e-3"),
        ("~", None),
        ("[1, 2e0, a]", [1, 2.0, "a"]),
    ],
)
def test_numbers_are_read_as_people_write_them(tmp_path, text, value):
    got = read(tmp_path, f"key: {text}\n")["key"]
    assert got == value
    assert type(got) is type(value)


def test_a_repeated_key_is_refused_with_its_line(tmp_path):
    with pytest.raises(UserError, match=r"x\.yaml:3:3: key 'b' stands twice"):
        read(tmp_path, "a:\n  b: 1\n  b: 2\n")


def test_a_merged_key_may_be_overridden(tmp_path):
    assert read(tmp_path, "base: &b {p: 1, q: 2}\nrun:\n  <<: *b\n  q: 3\n")["run"] == {"p": 1, "q": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2\nb: 3\n", r"x\.yaml:2:\d+: "),
        ("a: b: c\n", r"x\.yaml:1:5: mapping values are not allowed here"),
        ("- 1\n", "expected a mapping .* found list"),
        ("", "found nothing"),
        ("1: 2\n", "key 1 is not text"),
        ("a: !!python/object:os.system {}\n", r"x\.yaml:1:4: could not determine a constructor"),
        ("a: \x07\n", "not valid YAML"),
    ],
)
def test_a_bad_file_is_one_line_with_its_place(tmp_path, text, message):
    with pytest.raises(UserError, match=message) as error:
        read(tmp_path, text)
    assert "x.yaml" in str(error.value)


def test_a_missing_or_foreign_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        load_yaml(tmp_path / "none.yaml")
    with pytest.raises(UserError, match="not readable"):
        load_yaml(tmp_path)
    (tmp_path / "b.yaml").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(UserError, match="UTF-8"):
        load_yaml(tmp_path / "b.yaml")


def test_the_loader_of_others_is_left_alone():
    import yaml

    assert yaml.safe_load("a: yes") == {"a": True}
