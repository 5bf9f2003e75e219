"""What all servers share: who may ask, closed tables of files, sockets, a missing library."""

from __future__ import annotations

import socket

import pytest
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.testclient import TestClient

from xgen.serve import errors
from xgen.serve.errors import ServeError, check_installed
from xgen.serve.web import Guard, address_of, file_routes, host_name, is_loopback, is_own_name, open_socket, page_files


def client(host: str = "127.0.0.1", foreign_pages: bool = False) -> TestClient:
    files = page_files("xgen.report", {"/page.css": "style.css"})
    routes = [Route("/", lambda _: PlainTextResponse("here")), *file_routes(files)]
    guarded = Guard(Starlette(routes=routes), host, foreign_pages=foreign_pages)
    return TestClient(guarded, base_url="http://127.0.0.1:8001")


@pytest.mark.parametrize("name", ["localhost", "LOCALHOST", "127.0.0.1", "127.8.9.1", "[::1]", "localhost."])
@pytest.mark.parametrize("port", ["", ":8001"])
def test_the_machine_answers_to_its_loopback_names(name, port):
    assert client().get("/", headers={"host": name + port}).text == "here"


@pytest.mark.parametrize(
    "name", ["evil.example", "localhost.evil.example", "127.0.0.1.evil.example", "192.168.0.7", "", "[evil]", "127.0.0"]
)
def test_a_name_that_was_pointed_here_is_refused(name):
    answer = client().get("/", headers={"host": name})
    assert answer.status_code == 421
    assert "here" not in answer.text


def test_the_bound_host_is_allowed_and_all_addresses_mean_any_address_but_no_foreign_name():
    assert is_own_name("trainer", "trainer")
    assert is_own_name("10.0.0.5", "10.0.0.5")
    assert not is_own_name("10.0.0.6", "10.0.0.5")
    assert is_own_name("10.0.0.6", "0.0.0.0")
    assert is_own_name(socket.gethostname().lower(), "::")
    assert not is_own_name("evil.example", "0.0.0.0")


def test_host_headers_are_taken_apart():
    assert [host_name(one) for one in ("a:1", "A.", "[::1]:80", "[::1]", " b ")] == ["a", "a", "::1", "::1", "b"]
    assert [is_loopback(one) for one in ("localhost", "127.1.2.3", "::1", "0.0.0.0", "a")] == [True] * 3 + [False] * 2


@pytest.mark.parametrize("site", ["cross-site", "same-site"])
def test_scripts_of_other_sites_are_refused_and_links_from_them_are_not(site):
    asked = {"sec-fetch-site": site, "sec-fetch-mode": "no-cors"}
    assert client().get("/", headers=asked).status_code == 403
    assert client(foreign_pages=True).get("/", headers=asked).status_code == 200
    assert client().get("/", headers=asked | {"sec-fetch-mode": "navigate"}).status_code == 200
    assert client().get("/", headers={"sec-fetch-site": "same-origin", "sec-fetch-mode": "cors"}).status_code == 200


@pytest.mark.parametrize(("address", "host"), [("/", "127.0.0.1"), ("/nowhere", "127.0.0.1"), ("/", "evil.example")])
def test_every_answer_carries_the_policy(address, host):
    headers = client().get(address, headers={"host": host}).headers
    policy = headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe" not in policy
    assert "http" not in policy
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def test_files_come_from_the_table_alone_and_are_sent_once():
    asked = client()
    first = asked.get("/page.css")
    assert first.headers["content-type"].startswith("text/css")
    assert asked.get("/page.css", headers={"if-none-match": first.headers["etag"]}).status_code == 304
    assert asked.get("/page.css", headers={"if-none-match": f'"x", W/{first.headers["etag"]}'}).status_code == 304
    assert asked.get("/page.css", headers={"if-none-match": '"x"'}).content == first.content
    for address in (
        "/style.css",
        "/page.css%2f..",
        "/..%2fpage.py",
        "/%2e%2e%2fpage.py",
        "/etc/passwd",
        "/page.css%00",
    ):
        assert asked.get(address).status_code == 404, address


def test_a_taken_port_and_a_foreign_host_are_told_with_their_remedy():
    with open_socket("127.0.0.1", 0) as first:
        port = first.getsockname()[1]
        assert address_of(first) == f"http://127.0.0.1:{port}/"
        with pytest.raises(ServeError, match=rf"127\.0\.0\.1 port {port}: another program.*--port"):
            open_socket("127.0.0.1", port)
    with pytest.raises(ServeError, match=r"192\.0\.2\.1 port 0: .*--host"):
        open_socket("192.0.2.1", 0)
    with pytest.raises(ServeError, match=r"--host no such host: .*name an address"):
        open_socket("no such host", 0)


def test_a_missing_library_is_named_with_what_installs_it(monkeypatch):
    check_installed("starlette", "uvicorn")
    monkeypatch.setattr(errors, "find_spec", lambda name: None if name == "uvicorn" else object())
    with pytest.raises(ServeError, match=r"uvicorn must be installed; pip install 'xgen\[serve\]'"):
        check_installed("starlette", "uvicorn")
