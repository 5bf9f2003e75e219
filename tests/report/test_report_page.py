"""The page is whole, safe, honest and small, for runs of every kind."""

from __future__ import annotations

import html
import json
import re
import xml.etree.ElementTree as ET
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from synthetic_runs import CONTINUED, FINISHED, HOSTILE, RUNS, SEVEN_B, UNFINISHED, write_run

from xgen.errors import DataError, StorageError
from xgen.report import write_report
from xgen.report.markup import SHOWN_CHARACTERS, escape

VOID = {"meta", "link", "br"}
SECTIONS = {"loss", "context", "position", "matrix", "health", "samples", "scale", "run", "log", "recipe"}


class Page(HTMLParser):
    """The page as a browser's parser sees it: elements, attributes and texts."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.said: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open, f"</{tag}> closes nothing"
        assert self.open[-1] == tag, f"</{tag}> closes <{self.open[-1]}>"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] != "style":
            self.said.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", "".join(self.said))

    def ids(self) -> list[str]:
        return [attributes["id"] for _, attributes in self.elements if attributes.get("id")]


@pytest.fixture
def read(page_of):
    return lambda name: Page(page_of(name).read_text(encoding="utf-8"))


@pytest.mark.parametrize("name", RUNS)
def test_elements_are_closed_in_order_and_ids_are_unique(read, name):
    page = read(name)
    assert page.open == []
    assert len(page.ids()) == len(set(page.ids()))


@pytest.mark.parametrize("name", RUNS)
def test_the_page_loads_nothing_and_runs_nothing(read, name):
    for tag, attributes in read(name).elements:
        assert tag not in {"script", "iframe", "object", "embed", "img", "base", "form", "a"}
        for attribute, value in attributes.items():
            assert not attribute.startswith("on")
            if attribute in {"href", "src", "srcset", "data", "action"}:
                assert value == "data:,", (tag, attribute, value)
    policy = next(a["content"] for tag, a in read(name).elements if tag == "meta" and a.get("http-equiv"))
    assert policy.startswith("default-src 'none'")


@pytest.mark.parametrize("name", RUNS)
def test_every_drawing_is_wellformed_named_described_and_not_empty(page_of, name):
    drawings = re.findall(
        r'<svg class="plot.*?</svg>(?=<svg class="plot|<figcaption)', page_of(name).read_text(), re.DOTALL
    )
    assert len(drawings) >= 2
    for drawing in drawings:
        root = ET.fromstring(drawing)
        space = "{http://www.w3.org/2000/svg}"
        title, description = root.find(f"{space}title"), root.find(f"{space}desc")
        assert root.get("role") == "img"
        assert root.get("aria-labelledby") == f"{title.get('id')} {description.get('id')}"
        assert title.text
        assert description.text
        assert len(list(root.iter())) > 10
        assert "nan" not in "".join(element.get("points", "") + element.get("d", "") for element in root.iter())


def test_a_finished_run_has_every_part_and_its_numbers(read):
    page = read("finished")
    assert set(page.ids()) >= SECTIONS
    assert "Longer context helps: with 256 tokens of context instead of 64" in page.text
    assert "is 0.050 nats per token lower (95\xa0% interval 0.030 to 0.070".replace("\xa0", " ") in page.text
    assert "fails past them: at 256 tokens its loss is 1.800 nats per token higher" in page.text
    assert "needs 1.91 bits per byte at a context of 256; xz -9e needs 2.09" in page.text
    assert "parameters (1.07M of 6.9B)" in page.text
    assert "not finished" not in page.text
    assert page.text.count("Ruler.") >= 5


def test_a_run_without_gain_claims_none(read):
    page = read("no-gain")
    assert "No gain from longer context is shown" in page.text
    assert "includes 0" in page.text
    assert "Longer context helps" not in page.text
    assert "does not measurably fail past them" in page.text
    assert "That is 11 % more" in page.text


def test_a_run_harmed_by_context_says_so(read):
    page = read("worse")
    assert "Longer context does harm here" in page.text
    assert "does not fail past them" in page.text


def test_an_unfinished_run_says_so_first_and_shows_what_there_is(read):
    page = read("unfinished")
    assert (
        "This run is not finished: 700K of 1.23M tokens (57 %), in stage ‘128’. It was stopped (SIGTERM)" in page.text
    )
    assert "Measured after training; not there yet." in page.text
    assert "bits per byte" not in page.text.split("What the run shows")[0]
    assert set(page.ids()) >= {"loss", "health", "samples"}


def test_a_resumed_run_tells_of_it(read):
    page = read("resumed")
    assert "The log tells of 2 resumes, from 369K and 983K tokens." in page.text


def test_a_run_of_one_stage_has_no_switch(read):
    page = read("one-stage")
    assert "At the switch" not in page.text
    assert "one stage of length 64" in page.text


def test_a_continued_run_tells_training_from_the_rope_and_both_sides_of_the_old_length(read):
    page = read("continued")
    assert set(page.ids()) >= {*SECTIONS, "continued", "figure-since", "figure-position"}
    past, within = "Past the 64 tokens that ‘old’ was trained on (positions 64 to 512), ", "Within the 64 tokens"
    assert past + "the new rope and training together lowered the loss" in page.text
    assert past + "the new rope alone lowered the loss on held-out text from 3.900 to 3.400 nats" in page.text
    assert past + "training with that rope lowered the loss on held-out text from 3.400 to 2.200 nats" in page.text
    assert within in page.text
    assert page.text.index(past) < page.text.index(within)
    assert "Its rotary frequencies were changed: rope_theta from 500 to 10000." in page.text
    assert page.text.count("The upright line is the length that the model came with.") == 2
    assert "64: old length" in page.text


def test_a_run_of_fresh_weights_has_nothing_of_a_continued_one(read):
    page = read("finished")
    assert "continued" not in page.ids()
    assert "upright line" not in page.text


@pytest.mark.parametrize(("learnt", "said"), [(0.4, "raised the loss"), (-0.002, "is not shown to change the loss")])
def test_what_did_not_help_a_continued_model_is_not_praised(tmp_path, learnt, said):
    page = Page(write_report(write_run(tmp_path / "run", replace(CONTINUED, learnt=learnt))).read_text("utf-8"))
    assert f"(positions 64 to 512), training with that rope {said}" in page.text


def test_without_long_enough_documents_the_same_last_tokens_tell_of_a_continued_run(tmp_path):
    folder = write_run(tmp_path / "run", CONTINUED)
    path = folder / "evals" / "after_training.json"
    value = json.loads(path.read_text())
    rows = [row for row in value["since_start"] if row["measure"] == "fixed_target" or row["from"] == 1]
    path.write_text(json.dumps({**value, "since_start": rows}))
    page = Page(write_report(folder).read_text("utf-8"))
    assert "Past the 64 tokens that ‘old’ was trained on (after reading 497 to 512), the new rope and" in page.text
    assert "the same tokens’ loss by context" in page.text
    assert "was measured:" not in page.text


def test_a_continued_run_without_measurements_past_the_old_length_says_so(tmp_path):
    folder = write_run(tmp_path / "run", CONTINUED)
    path = folder / "evals" / "after_training.json"
    value = json.loads(path.read_text())
    rows = [row for row in value["since_start"] if row["from"] == 1]
    path.write_text(json.dumps({**value, "since_start": rows}))
    assert "No loss past 64 tokens was measured" in Page(write_report(folder).read_text("utf-8")).text
    path.unlink()
    assert "there is no such measurement" in Page(write_report(folder).read_text("utf-8")).text
    (folder / "start.json").write_text("{}")
    with pytest.raises(DataError, match=r"start\.json"):
        write_report(folder)


@pytest.mark.parametrize(
    "evil",
    [
        HOSTILE.description,
        HOSTILE.place[:100],
        HOSTILE.notes["optimizer.learning_rate"],
        *HOSTILE.checkpoints,
        *HOSTILE.sources.values(),
        HOSTILE.tokenizer,
        HOSTILE.reason,
        HOSTILE.document[:100],
        HOSTILE.samples[0][0],
    ],
)
def test_hostile_text_is_shown_as_text(read, evil):
    shown = re.sub(r"\s+", " ", html.unescape(escape(evil)))
    assert shown in read("hostile").text


def test_no_character_of_the_page_can_turn_it_around_or_break_it(page_of):
    text = page_of("hostile").read_text(encoding="utf-8")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", text)


def test_a_very_long_text_is_cut_with_its_rest_counted(read):
    assert f"… {20_000 - SHOWN_CHARACTERS:,} more characters in events.jsonl" in read("hostile").text


def test_a_7b_run_of_hundreds_of_thousands_of_steps_stays_small(page_of):
    assert sum(SEVEN_B.steps) > 370_000
    assert page_of("seven-b").stat().st_size < 2_000_000


def test_thinning_a_7b_run_hides_neither_its_spike_nor_its_range(page_of):
    """The top of the bands, read off the drawing, is the greatest single step after the opening."""
    page = page_of("seven-b")
    losses = np.array(
        [json.loads(line)["loss"] for line in (page.parent / "metrics.jsonl").open()][
            len(range(0, sum(SEVEN_B.steps))) // 3 :
        ]
    )
    drawing = re.search(
        r'<figure id="figure-loss">(<svg.*?</svg>)(?=<svg class="plot narrow)', page.read_text(), re.DOTALL
    )
    root = ET.fromstring(drawing[1])
    ticks = {
        float(element.text): float(element.get("y")) - 4
        for element in root.iter("{http://www.w3.org/2000/svg}text")
        if element.get("text-anchor") == "end"
        and element.get("class") is None
        and element.text.replace(".", "").isdigit()
    }
    low, high = min(ticks), max(ticks)
    bands = [element for element in root.iter() if element.get("class") == "band t1"]
    top = min(float(pair.split(",")[1]) for band in bands for pair in band.get("points").split())
    spike = low + (ticks[low] - top) / (ticks[low] - ticks[high]) * (high - low)
    assert spike == pytest.approx(losses.max(), abs=0.03)
    assert spike > np.median(losses) + 1.5


def test_what_is_thinned_is_said(read):
    page = read("seven-b")
    assert re.search(r"mean of 2,\d{3} steps and the band reaches from the lowest to the highest", page.text)
    assert "40 of 375 evaluations, evenly spaced" in page.text
    assert re.search(r"12 of 37\d, evenly spaced; all are in events.jsonl", page.text)


def test_the_same_run_gives_the_same_bytes(tmp_path):
    one, other = (write_report(write_run(tmp_path / name)) for name in ("one", "other"))
    assert one.read_bytes() == other.read_bytes()


def test_a_run_that_has_only_begun_gives_a_page(tmp_path):
    folder = write_run(tmp_path / "run", replace(UNFINISHED, until=0))
    (folder / "events.jsonl").unlink()
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "This run has no finished step yet." in page.text
    assert "events.jsonl is missing" in page.text


@pytest.mark.parametrize("steps", [1, 2, 3, 30])
def test_a_run_of_few_steps_gives_a_page(tmp_path, steps):
    folder = write_run(tmp_path / "run", replace(UNFINISHED, until=steps * UNFINISHED.batch_tokens))
    assert "not finished" in Page(write_report(folder).read_text(encoding="utf-8")).text


def test_losses_that_are_no_numbers_are_gaps_and_told(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "metrics.jsonl"
    path.write_text(re.sub(r'"loss": [\d.]+', '"loss": NaN', path.read_text(), count=7))
    assert "In 7 steps the loss was not a finite number" in Page(write_report(folder).read_text(encoding="utf-8")).text


def test_measurements_that_found_no_document_long_enough_say_why(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "evals" / "after_training.json"
    value = json.loads(path.read_text())
    path.write_text(json.dumps({**value, "by_position": [], "fixed_target": [], "fixed_target_gain": []}))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "Not measured: the held-out documents do not allow it." in page.text
    assert value["notes"][0] in page.text
    assert "Longer context" not in page.text.split("What the run shows")[0]


def test_intervals_that_are_not_known_are_not_drawn_and_nothing_is_concluded(tmp_path):
    folder = write_run(tmp_path / "run")
    path = folder / "evals" / "after_training.json"
    path.write_text(re.sub(r'"(low|high)": -?[\d.]+', r'"\1": null', path.read_text()))
    page = Page(write_report(folder).read_text(encoding="utf-8"))
    assert "Whether longer context helps is not known" in page.text


def test_many_stages_have_their_colours_and_labels(tmp_path):
    names = [f"s{i}" for i in range(9)]
    run = replace(
        FINISHED, names=names, lengths=[32 * 2**i for i in range(9)], tokens=[131_072] * 9, batch_tokens=2_048
    )
    page = Page(write_report(write_run(tmp_path / "run", run)).read_text(encoding="utf-8"))
    assert page.text.count("At the switch to") == 8


def test_no_run_folder_is_an_error(tmp_path):
    with pytest.raises(DataError, match="no run folder"):
        write_report(tmp_path)


def test_a_page_that_cannot_be_written_leaves_the_old_one_whole(tmp_path, monkeypatch):
    page = write_report(write_run(tmp_path / "run"))
    before = page.read_bytes()

    def full(self: Path, *_: object, **__: object) -> None:
        self.write_bytes(b"<!doctype")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(StorageError, match=r"report.html: No space left on device; free some space"):
        write_report(page.parent)
    assert page.read_bytes() == before
