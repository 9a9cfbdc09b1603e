"""GET /: the web page for browsers, what to try for everyone else; and the files that the page is made of.

Knows files and headers; knows nothing of what the page does. Everything in the folder `page` with a known media type
is read once, at the start, and only those names are ever looked up: no path of a request reaches the file system. The
files stand under a path that holds a digest of them all, so that a browser may keep them for good, and a new version of
Tern is a new path.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

from fastapi import APIRouter, Request
from fastapi.responses import PlainTextResponse, Response
from starlette.exceptions import HTTPException

from tern.server.health import what_to_try
from tern.server.openapi import described
from tern.server.state import AppState

FOLDER = Path(__file__).with_name("page")
INDEX = "index.html"

MEDIA_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".mjs": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
    ".woff2": "font/woff2",
}
"""What the page's files are; a file with another ending (a licence, the list of libraries) is not served."""

POLICY = "; ".join(
    (
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "font-src 'self'",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
        "require-trusted-types-for 'script'",
        "trusted-types dompurify",
    )
)
"""What a browser lets the page do: its own files and its own server, no script or style in the markup, and no text made
into markup except by the sanitizer."""

SECURITY_HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
}

FOR_GOOD = "public, max-age=31536000, immutable"
ASK_EVERY_TIME = "no-cache"


@dataclass(frozen=True)
class PageFile:
    """One file as it is sent: its bytes, media type, and a tag that changes with them."""

    content: bytes
    media_type: str
    tag: str

    def response(self, request: Request, caching: str) -> Response:
        """The file, or 304 for a browser that has it."""
        headers = {**SECURITY_HEADERS, "Cache-Control": caching, "ETag": self.tag}
        if self.tag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self.content, media_type=self.media_type, headers=headers)


@dataclass(frozen=True)
class Page:
    """The page's document, its other files by path inside the folder, and the digest of all of them."""

    index: PageFile
    files: dict[str, PageFile]
    digest: str


def read_page(folder: Path = FOLDER) -> Page:
    """The page in `folder`; its document's `{assets}` become the path that the other files are served under."""
    files: dict[str, PageFile] = {}
    whole = hashlib.sha256()
    for path in sorted(folder.rglob("*")):
        media_type = MEDIA_TYPES.get(path.suffix)
        if media_type is None or not path.is_file():
            continue
        name, content = path.relative_to(folder).as_posix(), path.read_bytes()
        files[name] = PageFile(content, media_type, _tag(content))
        whole.update(name.encode() + b"\0" + hashlib.sha256(content).digest())
    digest = whole.hexdigest()[:16]
    markup = files.pop(INDEX).content.replace(b"{assets}", f"page/{digest}".encode())
    return Page(PageFile(markup, MEDIA_TYPES[".html"], _tag(markup)), files, digest)


def _tag(content: bytes) -> str:
    return f'"{hashlib.sha256(content).hexdigest()[:32]}"'


def wants_html(request: Request) -> bool:
    """Whether a browser is asking; curl and most programs accept anything and are told what to try, as text."""
    return "text/html" in request.headers.get("accept", "")


def routes(state: AppState) -> APIRouter:
    """The family's routes; none asks for an API key: the page asks its user for one when the API does."""
    router = APIRouter()
    page = read_page()

    @router.get(
        "/",
        response_class=PlainTextResponse,
        **described("The page", meaning="A page to chat on for who accepts text/html, else commands to try, as text."),
    )
    async def first_page(http: Request) -> Response:
        if wants_html(http):
            response = page.index.response(http, ASK_EVERY_TIME)
        else:
            response = PlainTextResponse(what_to_try(state, str(http.base_url).rstrip("/")))
        response.headers["Vary"] = "Accept"
        return response

    @router.get(
        "/page/{digest}/{name:path}",
        response_class=PlainTextResponse,
        **described("A file of the page", meaning="What the page is made of, never changing.", errors=(404,)),
    )
    async def page_file(digest: str, name: str, http: Request) -> Response:
        file = page.files.get(name) if digest == page.digest else None
        if file is None:
            raise HTTPException(404)
        return file.response(http, FOR_GOOD)

    return router
