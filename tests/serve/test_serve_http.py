"""The server over HTTP: every error in one shape, the key, origins, limits, and what it tells of itself."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from served import ADAPTER, NAME, WINDOW, asked, running
from starlette.testclient import TestClient

from xgen.serve.app import Server
from xgen.serve.logs import JsonLines
from xgen.serve.options import Options
from xgen.serve.web import POLICY

BODY = {"prompt": "the fox", "max_tokens": 2}
CHAT = {"messages": [{"role": "user", "content": "the fox"}], "max_tokens": 2}
JSON = {"content-type": "application/json"}
POSTS = ("/v1/completions", "/v1/chat/completions", "/tokenize", "/detokenize", "/apply-template")


@pytest.fixture(scope="module")
def client() -> Any:
    with asked() as (found, _):
        yield found


def check_error(response: Any, status: int, code: str | None) -> dict[str, Any]:
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert error["message"]
    assert error["type"]
    assert error["code"] == code
    assert {"message", "type", "param", "code"} <= set(error)
    return error


@pytest.mark.parametrize(
    ("method", "path", "given", "status", "code"),
    [
        ("POST", "/v1/completions", {"content": b"{", "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"content": b'{"prompt": "\xff"}', "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"content": b"[" * 10**5, "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"content": b'{"prompt": NaN}', "headers": JSON}, 400, "invalid_json"),
        ("POST", "/v1/completions", {"json": [1]}, 400, "invalid_type"),
        ("POST", "/v1/completions", {"json": {}}, 400, "missing_required_parameter"),
        ("POST", "/v1/completions", {"json": BODY | {"suffix": "x"}}, 400, "unsupported_parameter"),
        ("POST", "/v1/completions", {"json": BODY | {"x": 1}}, 400, "unknown_parameter"),
        ("POST", "/v1/completions", {"json": BODY | {"max_tokens": 1000}}, 400, "context_length_exceeded"),
        ("POST", "/v1/completions", {"json": BODY | {"model": "x"}}, 404, "model_not_found"),
        ("POST", "/v1/completions", {"content": b"{}"}, 415, "unsupported_media_type"),
        ("POST", "/v1/completions", {"data": {"prompt": "x"}}, 415, "unsupported_media_type"),
        (
            "POST",
            "/tokenize",
            {"content": b"{}", "headers": JSON | {"content-encoding": "gzip"}},
            415,
            "unsupported_media_type",
        ),
        ("POST", "/tokenize", {"json": {}}, 400, "invalid_combination"),
        ("POST", "/tokenize", {"json": {"content": "a", "messages": CHAT["messages"]}}, 400, "invalid_combination"),
        ("POST", "/detokenize", {"json": {"tokens": [-1]}}, 400, "invalid_value"),
        ("POST", "/apply-template", {"json": {"messages": []}}, 400, "invalid_value"),
        ("GET", "/v1/models/none", {}, 404, "model_not_found"),
        ("GET", "/nothing", {}, 404, "not_found"),
        ("GET", "/v1/completions", {}, 405, "method_not_allowed"),
        ("DELETE", "/health", {}, 405, "method_not_allowed"),
        ("POST", "/", {}, 405, "method_not_allowed"),
    ],
)
def test_every_error_has_the_shape_that_clients_expect(
    client: TestClient, method: str, path: str, given: dict[str, Any], status: int, code: str
) -> None:
    check_error(client.request(method, path, **given), status, code)


def test_a_method_that_is_not_allowed_is_told_which_are(client: TestClient) -> None:
    assert "POST" in client.get("/v1/completions").headers["allow"]


def test_it_tells_of_itself(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    props = client.get("/props").json()
    assert (props["model"], props["context_length"], props["chat"], props["slots"]) == (NAME, WINDOW, True, 4)
    assert [one["id"] for one in client.get("/v1/models").json()["data"]] == [NAME, ADAPTER]
    assert client.get(f"/v1/models/{ADAPTER}").json()["parent"] == NAME
    assert client.get("/openapi.json").json()["openapi"].startswith("3.1")


def test_an_adapter_is_asked_by_its_name(client: TestClient) -> None:
    texts = [client.post("/v1/completions", json=BODY | {"model": name, "seed": 1}).json() for name in (NAME, ADAPTER)]
    assert [one["model"] for one in texts] == [NAME, ADAPTER]
    assert texts[0]["choices"] != texts[1]["choices"]


def test_text_and_ids_go_both_ways(client: TestClient) -> None:
    text = "the fox, 日本 🦊"
    found = client.post("/tokenize", json={"content": text}).json()
    assert found["count"] == len(found["tokens"])
    assert found["max_model_len"] == WINDOW
    assert client.post("/detokenize", json={"tokens": found["tokens"]}).json() == {"content": text}
    rendered = client.post("/apply-template", json={"messages": CHAT["messages"]}).json()
    assert rendered["prompt"] == "<user>the fox\n<assistant>"
    assert client.post("/tokenize", json={"messages": CHAT["messages"]}).json()["tokens"] == rendered["tokens"]


def test_the_page_runs_its_own_files_and_no_path_leads_out_of_them(client: TestClient) -> None:
    page = client.get("/")
    assert page.headers["content-type"].startswith("text/html")
    assert page.headers["content-security-policy"] == POLICY
    assert page.headers["x-content-type-options"] == "nosniff"
    assert client.get("/page/api.js").headers["content-type"].startswith(("text/javascript", "application/javascript"))
    for path in (
        "..%2f..%2fapp.py",
        "../app.py",
        "%2e%2e/app.py",
        "..\\app.py",
        "/etc/passwd",
        "%00",
        "__init__.py",
        "",
    ):
        response = client.get(f"/page/{path}")
        assert response.status_code == 404
        assert "import" not in response.text


def test_with_a_key_only_the_page_and_health_are_open() -> None:
    with asked(options=Options(api_key="sesame")) as (client, _):
        for path in ("/", "/page/api.js", "/health", "/openapi.json"):
            assert client.get(path).status_code == 200
        for given in (
            {},
            {"authorization": "Bearer wrong"},
            {"authorization": "sesame"},
            {"authorization": "Basic sesame"},
        ):
            for path in ("/props", "/metrics", "/v1/models", "/nothing"):
                response = client.get(path, headers=given)
                check_error(response, 401, "invalid_api_key")
                missing = response.json()["error"]["message"].startswith("this server needs its API key")
                assert missing == ("wrong" not in str(given)), "a wrong key is not a missing one"
                assert response.headers["www-authenticate"] == "Bearer"
            check_error(client.post("/v1/completions", json=BODY, headers=given), 401, "invalid_api_key")
        good = {"authorization": "bearer sesame"}
        assert client.post("/v1/completions", json=BODY, headers=good).status_code == 200
        assert client.get("/openapi.json").json()["security"] == [{"key": []}]


def test_a_key_may_be_of_any_alphabet() -> None:
    # The last byte of this one in UTF-8 is a space in Latin-1.
    with asked(options=Options(api_key="voilà")) as (client, _):
        assert client.get("/props", headers={b"authorization": "Bearer voilà".encode()}).status_code == 200
        assert client.get("/props", headers={"authorization": "Bearer voil"}).status_code == 401


def test_pages_of_other_sites_are_let_in_by_name_only() -> None:
    other, mine = {"origin": "https://other.example"}, {"origin": "http://127.0.0.1"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "authorization, x-own"}
    with asked() as (client, _):
        assert client.post("/v1/completions", json=BODY, headers=mine).status_code == 200
        check_error(client.post("/v1/completions", json=BODY, headers=other), 403, "origin_not_allowed")
        check_error(client.options("/v1/completions", headers=other | ask), 403, "origin_not_allowed")
        check_error(client.get("/props", headers={"origin": "null"}), 403, "origin_not_allowed")
        check_error(client.get("/props", headers={"sec-fetch-site": "cross-site"}), 403, "refused")
        check_error(client.get("/props", headers={"host": "rebound.example"}), 421, "refused")
    with asked(options=Options(allow_origins=("https://other.example",))) as (client, _):
        let = client.options("/v1/completions", headers=other | ask | {"sec-fetch-site": "cross-site"})
        assert let.status_code == 204
        assert let.headers["access-control-allow-origin"] == "https://other.example"
        assert let.headers["access-control-allow-headers"] == "authorization, x-own"
        answer = client.post("/v1/completions", json=BODY, headers=other)
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://other.example"
        assert "origin" in answer.headers["vary"].lower()
        wrong = client.post("/v1/completions", json={}, headers=other)
        assert wrong.headers["access-control-allow-origin"], "a page may read what was wrong"
        check_error(client.get("/props", headers={"origin": "https://third.example"}), 403, "origin_not_allowed")


def test_a_body_that_is_too_large_is_refused_before_it_is_read() -> None:
    with asked(options=Options(max_body=1000)) as (client, _):
        for path in POSTS:
            check_error(client.post(path, content=b"x" * 1001, headers=JSON), 413, "body_too_large")
        pieces = (b"x" * 600 for _ in range(2))
        check_error(client.post("/tokenize", content=pieces, headers=JSON), 413, "body_too_large")
        assert client.post("/tokenize", json={"content": "x" * 900}).status_code == 200


def test_while_the_model_loads_only_health_and_the_page_answer() -> None:
    server = Server(Options())
    client = TestClient(server, base_url="http://127.0.0.1")
    response = client.get("/health")
    assert (response.status_code, response.json()) == (503, {"status": "loading"})
    assert client.get("/").status_code == 200
    assert "xgen_ready 0.0" in client.get("/metrics").text
    for path in POSTS:
        response = client.post(path, json=BODY)
        check_error(response, 503, "loading")
        assert int(response.headers["retry-after"]) >= 1
    check_error(client.get("/v1/models"), 503, "loading")
    with running() as found:
        server.model = found.model
        assert client.get("/health").json() == {"status": "ok"}
        assert client.post("/v1/completions", json=BODY).status_code == 200
        server.draining = True
        assert client.get("/health").json() == {"status": "draining"}
        check_error(client.post("/v1/completions", json=BODY), 503, "draining")


def test_lenient_leaves_out_what_it_does_not_know() -> None:
    with asked(lenient=True) as (client, _):
        assert client.post("/v1/completions", json=BODY | {"tools": [], "x": 1}).status_code == 200
        assert client.post("/v1/chat/completions", json=CHAT | {"reasoning_effort": "low"}).status_code == 200


def test_metrics_count_what_happened() -> None:
    def value(name: str) -> float:
        line = next(line for line in client.get("/metrics").text.splitlines() if line.startswith(name + " "))
        return float(line.split(" ")[-1])

    with asked() as (client, _):
        answers = [client.post("/v1/completions", json=BODY).json() for _ in range(3)]
        client.get("/unknown-paths-are-not-counted-by-name")
        assert value("xgen_output_tokens_total") == sum(one["usage"]["completion_tokens"] for one in answers)
        assert value('xgen_http_requests_total{path="/v1/completions",status="200"}') == 3
        assert value('xgen_http_requests_total{path="other",status="404"}') == 1
        assert value('xgen_requests_total{finished="length"}') == 3
        assert value("xgen_first_token_seconds_count") == 3
        assert value('xgen_first_token_seconds_bucket{le="+Inf"}') == 3
        assert value("xgen_running") == 0


class Lines(logging.Handler):
    """Keeps the log's lines."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonLines())
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def lines() -> Any:
    handler, logger = Lines(), logging.getLogger("xgen.serve")
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield handler.lines
    logger.removeHandler(handler)
    logger.setLevel(logging.NOTSET)


def test_the_log_has_a_json_object_for_each_request_and_no_word_of_its_text(lines: list[str]) -> None:
    secret = {"messages": [{"role": "user", "content": "pass the sesame"}], "max_tokens": 2, "user": "sesame"}
    for options in (Options(), Options(log_prompts=True)):
        lines.clear()
        with asked(options=options) as (client, _):
            assert client.post("/v1/chat/completions", json=secret).status_code == 200
            assert client.post("/v1/chat/completions", json=secret | {"stream": True}).status_code == 200
            client.post("/v1/completions", json={"prompt": "sesame", "max_tokens": "sesame"})
            client.post("/v1/completions?key=sesame", content="sesame")
        whole, stream, wrong, _ = (json.loads(line) for line in lines)
        assert (whole["path"], whole["status"], whole["finished"]) == ("/v1/chat/completions", 200, ["length"])
        assert stream["completion_tokens"] == 2
        assert (wrong["status"], wrong["error"]) == (400, "invalid_value")
        assert len({json.loads(line)["id"] for line in lines}) == 4
        assert ("sesame" in "".join(lines)) == options.log_prompts


def test_a_fault_of_ours_is_logged_and_told_without_its_details(lines: list[str]) -> None:
    with asked() as (client, found):
        found.server.model = replace(found.model, translator=None)  # type: ignore[arg-type]
        check_error(client.post("/v1/completions", json=BODY), 500, "internal_error")
        assert any("AttributeError" in json.loads(line).get("traceback", "") for line in lines)
        found.server.model = found.model
        assert client.post("/v1/completions", json=BODY).status_code == 200


def test_no_file_of_the_page_is_missing_from_its_table(client: TestClient) -> None:
    folder = Path(__file__).parent.parent.parent / "src" / "xgen" / "serve" / "page"
    for file in folder.iterdir():
        if file.is_file():
            assert client.get("/" if file.name == "index.html" else f"/page/{file.name}").status_code == 200, file.name
