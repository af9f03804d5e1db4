"""`dlcm show`: terminal, HTML and JSON say the same, and no text can act on what shows it."""

import io
import json
import re
from html.parser import HTMLParser

import pytest
from rich.console import Console

from dlcm.config import RunConfig
from dlcm.inside import look_inside
from dlcm.show import BOTH, CONTROL, MARKS, OWN, inside_json, mark_of, print_inside, visible
from dlcm.show_html import format_html
from dlcm.train import train
from tests.dlcm.conftest import dense_config, small_config
from tests.dlcm.test_inside import TEXT, opened
from tests.dlcm.texts import write_texts

HOSTILE = '</span></div><script>alert(1)</script><img src=x onerror="alert(1)"> & &lt; \' " [bold red]\x1b[2J\x07\x00\x9b31m\u202e[/]\r\n'
VOID = {"meta", "input"}


class Page(HTMLParser):
    """Collects tags, attributes and the text of each shown text; refuses tags that do not close in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open, self.tags, self.texts, self.attributes, self.labels = [], set(), [], [], []
        self.feed(text)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.attributes += attrs
        if tag not in VOID:
            self.open.append((tag, dict(attrs).get("class")))
        if ("class", "text") in attrs:
            self.texts.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        if ("div", "text") in self.open:
            self.texts[-1] += data


def printed(looks, *, color: str | None = None, width: int = 100, **options) -> str:
    stream = io.StringIO()
    console = Console(file=stream, width=width, force_terminal=color is not None, color_system=color)
    print_inside(looks, console, **options)
    return stream.getvalue()


@pytest.fixture(scope="module")
def looks():
    return [look_inside(opened(name), TEXT) for name in ("learned", "word", "dense")]


def test_the_page_holds_the_text_once_a_run_and_nothing_that_runs_or_is_fetched(looks):
    page = Page(format_html(looks))
    assert page.texts == [TEXT] * 3
    assert page.tags & {"script", "link", "img", "iframe", "object", "a", "base", "form"} == set()
    assert [(name, value) for name, value in page.attributes if name.startswith("on") or name in ("src", "href")] == []
    assert ("content", "default-src 'none'; style-src 'unsafe-inline'") in page.attributes
    assert "url(" not in format_html(looks)
    assert "@import" not in format_html(looks)


def test_every_token_has_its_figures_in_a_title_and_every_concept_a_label(looks):
    inside = looks[0]
    page = Page(format_html([inside]))
    titles = [value for name, value in page.attributes if name == "title"]
    assert len(titles) == inside.n_tokens - 1
    for t, title in enumerate(titles, 1):
        assert f"{inside.nats_T[t]:.3f} nats" in title
        assert f"p {inside.prob_T[t]:.3f}" in title
        assert f"{inside.control_nats_T[t]:.3f} nats under the control" in title
        assert (MARKS[OWN] in title) == (mark_of(inside, t) == OWN)
        assert (MARKS[BOTH] in title) == (mark_of(inside, t) == BOTH)
        assert (MARKS[CONTROL] in title) == (mark_of(inside, t) == CONTROL)
    labels = [value for name, value in page.attributes if name == "aria-label"]
    # A concept that is the start of the text alone has nothing to show.
    assert len(labels) == inside.n_concepts - int(inside.begins_T[1])
    counts = [int(re.search(r": (\d+) token", label)[1]) for label in labels]
    assert sum(counts) == inside.n_tokens - 1


def test_text_is_text_in_the_page_whatever_it_holds():
    page = Page(format_html([look_inside(opened("learned"), HOSTILE)]))
    (shown,) = page.texts
    assert shown == visible(HOSTILE, keep="\n\t")
    assert page.tags & {"script", "img"} == set()
    assert not set(shown) & set("\x1b\x07\x00\x9b\u202e\r")
    assert all(not name.startswith("on") for name, _ in page.attributes)


@pytest.mark.parametrize("color", [None, "truecolor"])
def test_text_is_text_in_the_terminal_whatever_it_holds(color):
    inside = look_inside(opened("learned"), HOSTILE)
    shown = printed([inside], color=color, width=200, with_tokens=True)
    # What is left when colours are taken away is what a terminal would show.
    plain = re.sub(r"\x1b\[[0-9;]*m", "", shown)
    assert not set(plain) & set("\x1b\x07\x00\x9b\u202e\r")
    assert "[2J" in plain.replace(OWN, "").replace(BOTH, "").replace(CONTROL, "")
    squeezed = re.sub(rf"[{OWN}{BOTH}{CONTROL}\n ]", "", plain)
    assert re.sub("[\n ]", "", visible(HOSTILE).strip()) in squeezed.replace("↵", "")


def test_marks_say_who_begins_a_concept_without_colour(looks):
    inside = looks[0]
    shown = printed([inside], width=400)
    text = shown[shown.index("━\n") + 2 : shown.index("tokens per concept")]
    counts = {mark: text.count(mark) for mark in (OWN, BOTH, CONTROL)}
    expected = [mark_of(inside, t) for t in range(1, inside.n_tokens)]
    # The table of figures below has rules of the same sign as a concept's beginning.
    assert counts[BOTH] == expected.count(BOTH) > 0
    assert counts[CONTROL] == expected.count(CONTROL) > 0
    assert text[: text.index("┃")].count(OWN) == expected.count(OWN) > 0
    assert all(words in shown for words in MARKS.values())


def test_a_dense_run_shows_its_losses_and_no_concepts(looks):
    shown, page = printed([looks[2]], color="truecolor", with_tokens=True), format_html([looks[2]])
    assert "loss of each token" in shown
    for word in (BOTH, CONTROL, "begins"):
        assert word not in shown
    assert 'role="group"' not in page
    assert {("id", "v-prob"), ("id", "v-control"), ("id", "v-concepts")} & set(Page(page).attributes) == set()


def test_an_empty_text_is_shown_as_one():
    inside = look_inside(opened("learned"), "")
    assert "(an empty text)" in printed([inside])
    assert Page(format_html([inside])).texts == ["(an empty text)"]
    assert [row["text"] for row in inside_json(inside)["tokens"]] == [""]


@pytest.fixture(scope="module")
def run_dirs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("show")
    (folder / "texts").mkdir()
    write_texts(folder / "texts")
    data = {
        "corpus": str(folder / "texts"),
        "tokenizer": "bpe-400",
        "seq_len": 32,
        "validation_share": 0.3,
        "validation_tokens": 512,
    }
    for name, model in (("dlcm", small_config(vocab_size=400)), ("dense", dense_config(vocab_size=400))):
        train(RunConfig(model=model, data=data, train={"tokens": 512, "batch_tokens": 256}), folder / name)
    return folder / "dlcm", folder / "dense"


TOKEN = {
    "index": int,
    "id": int,
    "start": int,
    "text": str,
    "concept": int,
    "begins": bool,
    "prob": float,
    "nats": float,
    "control_begins": bool,
    "control_nats": float,
}
RUN = {
    "run_id": str,
    "checkpoint": str,
    "model": str,
    "detector": str,
    "compression_target": float,
    "seq_len": int,
    "n_tokens": int,
    "n_concepts": int,
    "tokens_per_concept": float,
    "threshold": float,
    "loss_nats": float,
    "bits_per_byte": float,
    "control_loss_nats": float,
    "boundaries": dict,
    "tokens": list,
}
ONLY_DLCM = {"detector", "compression_target", "n_concepts", "tokens_per_concept", "threshold"}
ONLY_DLCM |= {"control_loss_nats", "boundaries", "concept", "begins", "prob", "control_begins", "control_nats"}


def test_json_has_the_fields_of_its_schema_and_the_text_in_pieces(run_dirs, dlcm):
    text = "the of and to in is that it was for"
    status, out, err = dlcm("show", *run_dirs, "--text", text, "--json")
    assert status == 0, err
    record = json.loads(out)
    assert record["schema"] == 1
    assert record["text"] == text
    assert [run["model"] for run in record["runs"]] == ["dlcm", "dense"]
    for run in record["runs"]:
        absent = ONLY_DLCM if run["model"] == "dense" else set()
        assert {name: type(value) for name, value in run.items() if name not in absent} == {
            name: kind for name, kind in RUN.items() if name not in absent
        }
        assert all(run[name] is None for name in absent & set(RUN))
        start, *tokens = run["tokens"]
        assert start["nats"] is start["start"] is start["id"] is None
        for token in tokens:
            assert {n: type(v) for n, v in token.items() if n not in absent} == {
                n: kind for n, kind in TOKEN.items() if n not in absent
            }
            assert text[token["start"] :].startswith(token["text"])
        assert "".join(token["text"] for token in tokens) == text
        assert sum(token["nats"] for token in tokens) / len(tokens) == pytest.approx(run["loss_nats"])


def test_the_command_writes_the_page_the_record_and_both_to_the_terminal(run_dirs, dlcm, tmp_path):
    (tmp_path / "text.txt").write_text("the of and")
    page = tmp_path / "page.html"
    status, out, err = dlcm(
        "show",
        run_dirs[0],
        "--file",
        tmp_path / "text.txt",
        "--html",
        page,
        "--validation",
        "--against",
        run_dirs[1],
        "--tokens",
    )
    assert status == 0, err
    assert "learned, R = 3" in out
    assert "every token" in out
    assert "own less dense" in out
    assert Page(page.read_text()).texts == ["the of and"]
    assert json.loads((run_dirs[0] / "inside.json").read_text())["dense"]["run_id"].startswith("dense")


def test_what_does_not_go_together_is_refused_in_one_line(run_dirs, dlcm, tmp_path):
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    for arguments, words in (
        ([run_dirs[0]], "nothing to show"),
        ([run_dirs[0], "--text", "a", "--file", "b"], "both given"),
        ([run_dirs[0], "--text", "a", "--against", run_dirs[1]], "--against needs --validation"),
        ([run_dirs[0], "--validation", "--html", tmp_path / "x.html"], "--html needs --text"),
        ([run_dirs[0], "--file", tmp_path / "none.txt"], "No such file"),
        ([run_dirs[0], "--file", tmp_path / "latin.txt"], "byte 3 is not UTF-8"),
        ([tmp_path / "none", "--text", "a"], "run.json"),
        ([run_dirs[1], "--validation"], "no concepts"),
    ):
        status, _, err = dlcm("show", *arguments)
        assert status == 2
        assert words in err
        assert len(err.strip().splitlines()) == 1
    assert not (tmp_path / "x.html").exists()
