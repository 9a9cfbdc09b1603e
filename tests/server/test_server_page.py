"""The web page's routes: who gets it, what a browser is to allow, what is cached, and that nothing else is served."""

from __future__ import annotations

import hashlib
import http.client
import json
import re
from pathlib import Path
from typing import Any

import pytest
from server_fakes import Live

from tern.server.page import FOLDER, MEDIA_TYPES, read_page

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
VENDOR = FOLDER / "vendor"
LIBRARIES: list[dict[str, Any]] = json.loads((VENDOR / "vendor.json").read_text(encoding="utf-8"))


def assets(server: Live) -> str:
    """The path that the page's files stand under."""
    page = server.client.get("/", headers=BROWSER).text
    found = re.search(r'src="(page/[0-9a-f]{16})/main\.js"', page)
    assert found, page
    return found[1]


def test_a_browser_gets_the_page_and_others_what_to_try(server: Live) -> None:
    page = server.client.get("/", headers=BROWSER)
    assert page.headers["content-type"] == "text/html; charset=utf-8"
    assert page.text.startswith("<!doctype html>")
    assert "{assets}" not in page.text
    for accept in ("*/*", "application/json", "text/plain"):
        other = server.client.get("/", headers={"Accept": accept})
        assert other.headers["content-type"].startswith("text/plain"), accept
        assert other.headers["vary"] == page.headers["vary"] == "Accept"


def test_the_policy_allows_the_page_s_own_files_alone(server: Live) -> None:
    for path in ("/", f"/{assets(server)}/main.js", f"/{assets(server)}/icons.svg"):
        headers = server.client.get(path, headers=BROWSER).headers
        rules = dict(rule.split(" ", 1) for rule in headers["content-security-policy"].split("; "))
        assert rules["default-src"] == rules["frame-ancestors"] == rules["base-uri"] == rules["form-action"] == "'none'"
        assert rules["script-src"] == rules["style-src"] == rules["connect-src"] == rules["font-src"] == "'self'"
        assert rules["img-src"] == "'self' data:"
        assert rules["require-trusted-types-for"] == "'script'"
        assert "unsafe" not in headers["content-security-policy"]
        assert headers["x-content-type-options"] == "nosniff"
        assert headers["referrer-policy"] == "no-referrer"


def test_the_markup_has_no_script_style_or_address_of_its_own() -> None:
    markup = (FOLDER / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<script>|<style|\sstyle=|\son\w+=|javascript:|https?:", markup)
    for path in FOLDER.glob("*.js"):
        text = path.read_text(encoding="utf-8")
        assert not re.search(r"\beval\(|new Function|innerHTML|outerHTML|insertAdjacentHTML|document\.write", text), (
            path.name
        )


def test_files_are_kept_for_good_and_the_page_is_asked_for(server: Live) -> None:
    page = server.client.get("/", headers=BROWSER)
    assert page.headers["cache-control"] == "no-cache"
    file = server.client.get(f"/{assets(server)}/page.css")
    assert file.headers["cache-control"] == "public, max-age=31536000, immutable"
    for path, answer in (("/", page), (f"/{assets(server)}/page.css", file)):
        again = server.client.get(path, headers={**BROWSER, "If-None-Match": answer.headers["etag"]})
        assert (again.status_code, again.content) == (304, b"")
        other = server.client.get(path, headers={**BROWSER, "If-None-Match": '"another"'})
        assert (other.status_code, other.content) == (200, answer.content)


def test_every_file_of_the_page_is_served_with_its_type(server: Live) -> None:
    base = assets(server)
    served = {
        path.relative_to(FOLDER).as_posix(): path
        for path in FOLDER.rglob("*")
        if path.suffix in MEDIA_TYPES and path.is_file()
    }
    assert len(served) > 60
    for name, path in served.items():
        if name == "index.html":
            continue
        response = server.client.get(f"/{base}/{name}")
        assert response.status_code == 200, name
        assert response.headers["content-type"] == MEDIA_TYPES[path.suffix]
        assert response.content == path.read_bytes()


@pytest.mark.parametrize(
    "name",
    [
        "index.html",
        "vendor/vendor.json",
        "vendor/katex/LICENSE",
        "../page.py",
        "..%2fpage.py",
        "%2e%2e/page.py",
        "vendor/../../page.py",
        "vendor/..%2f..%2fpage.py",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "..\\page.py",
        "main.js%00.css",
        "main.js/",
        "",
    ],
)
def test_nothing_else_is_served(server: Live, name: str) -> None:
    connection = http.client.HTTPConnection(
        server.client.base_url.netloc.decode(), timeout=30
    )  # sends paths as they are
    connection.request("GET", f"/{assets(server)}/{name}")
    response = connection.getresponse()
    body = response.read()
    connection.close()
    assert response.status == 404
    assert json.loads(body)["error"]["code"] == "not_found"


def test_another_version_s_files_are_not_there(server: Live) -> None:
    assert server.client.get("/page/0123456789abcdef/main.js").status_code == 404


def test_a_changed_file_changes_the_path(tmp_path: Path) -> None:
    (tmp_path / "index.html").write_text("{assets}/main.js", encoding="utf-8")
    (tmp_path / "main.js").write_text("1", encoding="utf-8")
    (tmp_path / "notes.txt").write_text("not served", encoding="utf-8")
    before = read_page(tmp_path)
    (tmp_path / "main.js").write_text("2", encoding="utf-8")
    after = read_page(tmp_path)
    assert before.digest != after.digest
    assert after.index.content == f"page/{after.digest}/main.js".encode()
    assert set(after.files) == {"main.js"}


@pytest.mark.parametrize("library", LIBRARIES, ids=lambda library: library["folder"])
def test_libraries_are_the_ones_that_the_list_names(library: dict[str, Any]) -> None:
    folder = VENDOR / library["folder"]
    there = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    sums = {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in there.items()}
    assert sums == library["files"]
    assert "LICENSE" in there
    assert library["version"]
    assert library["licence"]


def test_every_library_is_listed_and_the_page_stays_small() -> None:
    assert {path.name for path in VENDOR.iterdir() if path.is_dir()} == {each["folder"] for each in LIBRARIES}
    size = sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file())
    assert size < 1.5 * 2**20, size
