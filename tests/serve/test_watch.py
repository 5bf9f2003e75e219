"""The live page over HTTP: it shows what the report shows, keeps up with the run, reads only, and lets nobody in."""

from __future__ import annotations

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import httpx
import pytest
from micro_runs import assert_one_error, run_process
from starlette.testclient import TestClient
from synthetic_runs import FINISHED, RUNS, UNFINISHED, write_run
from watching import Writer, until, watched

from xgen.report.page import render
from xgen.report.read import read_run
from xgen.serve.watch.app import Watch
from xgen.serve.watch.parts import MEASURED, PARTS
from xgen.serve.web import Guard

ADDRESSES = ("/", "/state.json", "/part/loss", "/events", "/report.css", "/watch.css", "/watch.js")


@contextmanager
def page_of(folder: Path) -> Iterator[TestClient]:
    watch = Watch(folder)
    with TestClient(Guard(watch.application(), "127.0.0.1"), base_url="http://127.0.0.1:8001") as client:
        while watch.look():
            pass
        yield client


def digests(client: TestClient) -> dict[str, str]:
    return client.get("/state.json").json()["parts"]


def pictures(folder: Path) -> dict[str, tuple[str, int]]:
    """Every file of a folder by its content and the time it was changed."""
    return {
        str(path.relative_to(folder)): (hashlib.sha256(path.read_bytes()).hexdigest(), path.stat().st_mtime_ns)
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.mark.parametrize("name", [name for name in RUNS if name != "seven-b"])
def test_the_page_holds_every_section_of_the_report_letter_by_letter(tmp_path, name):
    folder = write_run(tmp_path / "run", RUNS[name])
    before = pictures(folder)
    report = render(read_run(folder))
    sections = dict(re.findall(r'(?s)<section id="([a-z]+)">(.*?)</section>', report))
    assert len(sections) >= 8
    with page_of(folder) as client:
        page = client.get("/").text
    for ident, markup in sections.items():
        if ident in MEASURED and RUNS[name].measured is False:
            assert f'<section id="{ident}">' not in page
        else:
            assert f'<section id="{ident}">{markup}</section>' in page
    for sentence in re.findall(r"<li>(.*?)</li>", report):
        assert f"<li>{sentence}</li>" in page
    assert pictures(folder) == before


class Suspicious(HTMLParser):
    """Collects whatever in a page could run or load something."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        if tag in ("img", "iframe", "object", "embed", "base", "form", "style", "a") or "style" in values:
            self.found.append(tag)
        self.found += [name for name in values if name.startswith("on")]
        self.loaded += [values[name] or "" for name in ("src", "href") if name in values]


@pytest.mark.parametrize("name", ["hostile", "finished"])
def test_no_text_of_a_run_becomes_anything_that_runs_or_loads(tmp_path, name):
    with page_of(write_run(tmp_path / "run", RUNS[name])) as client:
        answer = client.get("/")
        parts = [client.get(f"/part/{part}").text for part in PARTS]
    page = Suspicious()
    page.feed(answer.text)
    assert page.found == []
    assert set(page.loaded) == {"data:,", "/report.css", "/watch.css", "/watch.js"}
    for markup in parts:
        part = Suspicious()
        part.feed(markup)
        assert (part.found, part.loaded) == ([], [])
        assert "<script" not in markup
    assert "unsafe" not in answer.headers["content-security-policy"]


def test_only_the_parts_that_changed_have_another_digest_and_everything_else_is_304(tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 100)
    watch = Watch(writer.folder)
    with TestClient(Guard(watch.application(), "127.0.0.1"), base_url="http://127.0.0.1:8001") as client:
        before = digests(client)
        tags = {address: client.get(address).headers["etag"] for address in ("/", "/state.json", "/part/recipe")}
        for address, tag in tags.items():
            assert client.get(address, headers={"if-none-match": tag}).status_code == 304
        writer.write(10)
        watch.look()
        after = digests(client)
        assert before["loss"] != after["loss"]
        assert before["top"] != after["top"]
        assert [before[name] for name in ("recipe", "scale")] == [after[name] for name in ("recipe", "scale")]
        assert client.get("/state.json", headers={"if-none-match": tags["/state.json"]}).status_code == 200
        assert client.get("/part/recipe", headers={"if-none-match": tags["/part/recipe"]}).status_code == 304
        for name, digest in after.items():
            answer = client.get(f"/part/{name}")
            assert answer.headers["etag"] == f'"{digest}"'
            assert answer.headers["content-type"].startswith("text/html")


@pytest.mark.parametrize("address", ADDRESSES)
def test_every_address_reads_only(tmp_path, address):
    with page_of(write_run(tmp_path / "run", UNFINISHED)) as client:
        assert client.head(address).status_code == 200
        for method in ("POST", "PUT", "PATCH", "DELETE", "OPTIONS"):
            assert client.request(method, address).status_code == 405
        assert client.get(address, headers={"host": "evil.example"}).status_code == 421
        assert client.get(address, headers={"sec-fetch-site": "cross-site"}).status_code == 403


@pytest.mark.parametrize(
    "address",
    [
        "/recipe.toml",
        "/metrics.jsonl",
        "/part/recipe.toml",
        "/part/..%2f..%2frecipe.toml",
        "/part/%2fetc%2fpasswd",
        "/part/",
        "/part/loss%00",
        "/watch.py",
        "/..%2fapp.py",
        "/docs",
    ],
)
def test_no_address_reaches_a_file(tmp_path, address):
    with page_of(write_run(tmp_path / "run", UNFINISHED)) as client:
        answer = client.get(address)
    assert answer.status_code == 404
    assert "batch_tokens" not in answer.text


def test_a_run_that_has_just_begun_has_a_page_and_so_has_one_that_is_being_prepared(tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 0)
    with page_of(writer.folder) as client:
        assert ">Starting<" in client.get("/").text
        assert "No step has been finished yet" in client.get("/part/loss").text
    prepared = tmp_path / "prepared"
    prepared.mkdir()
    (prepared / ".lock").touch()
    with page_of(prepared) as client:
        assert ">Preparing<" in client.get("/").text
        assert client.get("/state.json").json()["title"] == "preparing · XGen"
        assert client.get("/part/loss").text == ""


def test_what_cannot_be_read_is_told_on_the_page(tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 100)
    writer.say("evaluation", loss="<b>low</b>", loss_by_position={})
    with page_of(writer.folder) as client:
        page = client.get("/").text
    assert "is &#x27;&lt;b&gt;low&lt;/b&gt;&#x27;, not a number" in page
    assert '<section id="health">' in page
    assert ">Running<" in page
    with (writer.folder / "metrics.jsonl").open("a") as file:
        file.write('{"step": 1}\n')
    with page_of(writer.folder) as client:
        assert "line 101: no tokens" in client.get("/").text


def test_the_stream_tells_of_growth_of_silence_and_of_the_end(tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 100)
    with watched(writer.folder) as server, httpx.Client(base_url=server.address, timeout=30) as client:

        def state() -> str:
            return str(client.get("/state.json").json()["state"])

        with client.stream("GET", "/events") as stream:
            assert stream.headers["content-type"].startswith("text/event-stream")
            assert stream.headers["cache-control"] == "no-store"
            lines = (line for line in stream.iter_lines() if line.startswith("data:"))
            seen = {next(lines)}
            for act, wanted in (
                (lambda: writer.write(10), "running"),
                (lambda: writer.grow_old(1000), "silent"),
                (lambda: writer.write(10), "running"),
                (lambda: writer.say("stopped", reason="SIGTERM"), "stopped"),
                (lambda: writer.say("resumed", reason="asked for"), "starting"),
            ):
                act()
                begin = time.monotonic()
                told = next(lines)
                assert told not in seen
                seen.add(told)
                assert time.monotonic() - begin < 10
                until(lambda wanted=wanted: state() == wanted, wanted, 10)
            begin = time.monotonic()
            assert server.stop() == 0
            assert list(lines) == []
            assert time.monotonic() - begin < 5  # an open page does not hold the server up


def test_the_page_survives_its_folder(tmp_path):
    writer = Writer(tmp_path / "run", UNFINISHED, 100)
    watch = Watch(writer.folder)
    with TestClient(Guard(watch.application(), "127.0.0.1"), base_url="http://127.0.0.1:8001") as client:
        os.rename(writer.folder, tmp_path / "elsewhere")
        watch.look()
        assert client.get("/state.json").json()["state"] == "preparing"
        os.rename(tmp_path / "elsewhere", writer.folder)
        watch.look()
        assert client.get("/state.json").json()["state"] == "running"
        assert "100" in client.get("/part/top").text


def test_what_cannot_be_watched_is_one_error(tmp_path):
    assert_one_error(run_process("watch", tmp_path / "none"), 2, f"there is no folder {tmp_path / 'none'}", "--run")
    assert_one_error(run_process("watch", tmp_path), 2, "no run folder", "--run")
    folder = write_run(tmp_path / "run", UNFINISHED)
    with watched(folder) as server:
        port = server.address.rstrip("/").rpartition(":")[2]
        assert_one_error(run_process("watch", folder, "--port", port), 2, f"port {port}", "--port, 0 for any free one")


def test_a_step_more_costs_as_little_after_100_000_steps(tmp_path):
    """Read is what was added, and making the changed page takes less than 0.3 s of this processor."""
    steps = 100_000
    made = replace(FINISHED, tokens=tuple(2048 * part for part in (50_000, 30_000, 40_000)), until=steps * 2048)
    folder = write_run(tmp_path / "run", replace(made, measured=False, pieces=200))
    watch = Watch(folder)
    while watch.look():
        pass
    watch.shown()
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    seconds, read = [], []
    for number in range(1, 6):
        line = {**last, "step": last["step"] + number, "tokens": last["tokens"] + 2048 * number}
        with (folder / "metrics.jsonl").open("a") as metrics:
            metrics.write(json.dumps(line) + "\n")
        begun, before = time.process_time(), bytes_read()
        watch.look()
        shown = watch.shown()
        seconds.append(time.process_time() - begun)
        read.append(bytes_read() - before)
        assert f"{steps + number:,}" in shown.parts["top"]
    print(f"an update after {steps:,} steps: {sorted(seconds)[2]:.3f} s of processor time, {max(read):,} bytes read")
    assert sorted(seconds)[2] < 0.3
    assert max(read) < 20_000


def bytes_read() -> int:
    """What this process has read from files so far."""
    return int(re.search(r"rchar: (\d+)", Path("/proc/self/io").read_text())[1])
