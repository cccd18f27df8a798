"""The page itself, in a real browser: every test asks a server on this machine, and nothing else is asked."""

from __future__ import annotations

import asyncio
import io
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fastapi
import pytest
import torch
import uvicorn
from PIL import Image
from torch import nn

from immunonet import RAILS, DkNN, Maturation, Sentinel, data, explorer

CHROMIUM = Path(os.environ.get("CHROMIUM", "/usr/bin/chromium"))
pytestmark = [
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"no Chromium at {CHROMIUM}; $CHROMIUM names another"),
    # Gradio's own: how it counts visits is no longer needed in pandas.
    pytest.mark.filterwarnings("ignore:'future.no_silent_downcasting' is deprecated"),
    pytest.mark.filterwarnings("ignore:The copy keyword is deprecated"),
]
NAMES = ("nought <i>", "one ${1+1}", "two {{value}}")
DESKTOP, PHONE = {"width": 1280, "height": 900}, {"width": 360, "height": 740}
SLOW = 20_000


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Sequential(nn.Flatten(), nn.Linear(36, 16), nn.ReLU(), nn.Linear(16, 3)).eval()


class Fails(DkNN):
    """Fails on a white antigen, in a way that nobody foresaw."""

    def answer(self, x: Any, seed: int | None = None) -> Any:
        if float(x.min()) > 0.99:
            raise RuntimeError("a secret of ours")
        return super().answer(x, seed)


def pages() -> dict[str, Callable[[], Any]]:
    """Return what makes the pages, by their paths; the longest first, since "/" takes all that is left."""
    y = torch.arange(150) % 3
    patterns = torch.rand(3, 1, 6, 6, generator=torch.Generator().manual_seed(99))
    x = 0.6 * patterns[y] + 0.4 * torch.rand(150, 1, 6, 6, generator=torch.Generator().manual_seed(0))
    net, images = network(), data.Images(x[:9], y[:9], NAMES)
    maturation = Maturation(population=60, generations=3, neighbours=4)

    def rails() -> Any:
        defence = RAILS(net, "input", maturation=maturation, seed=0).fit(x, y)
        sentinel = Sentinel(net, "input", window=20, neighbours=2, false_alarm=0.05).fit(x)
        return explorer.build(defence, base=net, images=images, sentinel=sentinel)

    def other() -> Any:
        return explorer.build(Fails(net, "input", neighbours=9).fit(x, y), base=net)

    return {"/other": other, "/": rails}


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    """Return the address of a server of this process, which ends with the tests."""
    started: dict[str, Any] = {}
    ready = threading.Event()

    async def serve() -> None:
        # Gradio opens a loop of its own, and leaves it open, where none runs yet.
        app = fastapi.FastAPI(openapi_url=None)
        for path, page in pages().items():
            explorer.mount(app, page(), path)
        server = uvicorn.Server(uvicorn.Config(app, host="127.0.0.1", port=0, log_level="error"))
        work = asyncio.ensure_future(server.serve())
        while not server.started:
            await asyncio.sleep(0.01)
        started.update(server=server, port=server.servers[0].sockets[0].getsockname()[1])
        ready.set()
        await work

    thread = threading.Thread(target=lambda: asyncio.run(serve()), daemon=True)
    thread.start()
    assert ready.wait(60)
    yield f"http://127.0.0.1:{started['port']}"
    started["server"].should_exit = True
    thread.join(20)


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    sync_api = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install 'immunonet[dev]'")
    with sync_api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=str(CHROMIUM), headless=True, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def visit(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Return a function that opens a page; afterwards nothing else was asked, and nothing went wrong in any."""
    asked: list[str] = []
    wrong: list[str] = []
    contexts = []

    def opened(path: str = "/", size: dict[str, int] = DESKTOP, **how: Any) -> Any:
        context = browser.new_context(viewport=size, **how)
        contexts.append(context)
        page = context.new_page()
        page.set_default_timeout(SLOW)
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.goto(address + path)
        page.wait_for_selector("#im-go")
        return page

    yield opened
    for context in contexts:
        context.close()
    assert not [url for url in asked if not url.startswith((address, "data:", "blob:"))]
    assert not wrong


def wide(page: Any) -> int:
    return int(page.evaluate("document.documentElement.scrollWidth"))


def ground(page: Any) -> str:
    return str(page.evaluate("getComputedStyle(document.body).backgroundColor"))


# Of what is seen and works, what has no name: neither text, nor a label.
NAMELESS = """[...document.querySelectorAll("input, button, select, textarea, canvas, [role=img]")].filter(one =>
    one.checkVisibility() && !one.ariaLabel && !one.getAttribute("aria-labelledby") && !one.innerText?.trim() &&
    ![...one.labels ?? []].some(label => label.innerText.trim())).map(one => one.outerHTML)"""


def test_an_antigen_is_attacked_answered_and_asked_about(visit: Callable[..., Any]) -> None:
    """At a desk in the light, by keyboard; then as on a phone in the dark."""
    page = visit(color_scheme="light")
    assert ground(page) == "rgb(255, 255, 255)"
    reached: list[str] = []
    while "im-stop" not in reached and len(reached) < 40:
        page.keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.ariaLabel || document.activeElement.id"))
    assert {"im-go", "im-ask", "im-stop", "range slider for Strength of the attack"} <= set(reached)
    page.focus("#im-go")
    page.keyboard.press("Enter")
    page.wait_for_selector("#im-answers")
    text = page.inner_text("#im-story")
    for words in ("What was asked", "Generations", "Plasma cells", "credibility", "network alone"):
        assert words in text
    # Names are text, whatever they hold.
    assert all(name in text for name in NAMES)
    assert page.evaluate(NAMELESS) == []
    assert wide(page) == DESKTOP["width"]

    slider = page.get_by_label("generation", exact=True)
    assert page.inner_text(".im-play output") == "3 of 3"
    slider.focus()
    page.keyboard.press("ArrowLeft")
    assert page.inner_text(".im-play output") == "2 of 3"
    page.click(".im-play button")
    page.wait_for_function("document.querySelector('.im-play output').innerText === '3 of 3'")
    page.wait_for_function("document.querySelector('.im-play button').innerText.includes('Play')")
    slider.fill("0")
    page.get_by_label("number input for Number of the test image").fill("1")
    page.keyboard.press("Tab")
    page.wait_for_function("document.querySelector('#im-antigen img').alt.includes('one')")
    page.click("#im-go")
    page.wait_for_function("document.querySelector('#im-story').innerText.includes('The class is one')")
    assert page.inner_text(".im-play output") == "3 of 3"

    page.get_by_label("number input for Queries they have").fill("50")
    page.click("#im-ask")
    page.wait_for_function("/(fooled|gave up)/.test(document.querySelector('#im-watch').innerText)")
    assert page.locator("#im-watch polyline").count() == 2
    page.set_viewport_size(PHONE)
    page.emulate_media(color_scheme="dark")
    page.wait_for_function("getComputedStyle(document.body).backgroundColor !== 'rgb(255, 255, 255)'")
    assert wide(page) == PHONE["width"]


def test_a_digit_is_drawn_on_a_phone_and_errors_are_plain_words(
    visit: Callable[..., Any], caplog: pytest.LogCaptureFixture
) -> None:
    page = visit("/other/", PHONE, color_scheme="dark")
    assert ground(page) != "rgb(255, 255, 255)"
    page.click("#im-go")
    page.wait_for_selector(".toast-body")
    assert "The drawing is empty: draw something in the dark square first." in page.inner_text(".toast-body")
    page.click(".toast-close")  # it lies over the pad
    page.wait_for_selector(".toast-body", state="detached")
    pad = page.locator("#im-pad canvas")
    pad.scroll_into_view_if_needed()
    box = pad.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + 20)
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] - 20, steps=3)
    page.mouse.up()
    page.wait_for_selector("#im-antigen img")
    by_mouse = page.get_attribute("#im-antigen img", "src")
    page.click("#im-go")
    page.wait_for_selector("#im-answers")
    text = page.inner_text("#im-story")
    assert "Nearest known examples" in text
    assert "Generations" not in text
    page.get_by_role("button", name="Clear the drawing").click()
    page.wait_for_selector("#im-antigen img", state="detached")
    pad.focus()
    page.keyboard.down(" ")
    for _ in range(10):
        page.keyboard.press("ArrowRight")
    page.keyboard.up(" ")
    page.wait_for_selector("#im-antigen img")
    assert page.get_attribute("#im-antigen img", "src") != by_mouse
    assert wide(page) == PHONE["width"]
    assert page.evaluate(NAMELESS) == []

    page.get_by_label("a picture of yours").check()
    white = io.BytesIO()
    Image.new("L", (9, 9), 255).save(white, "PNG")
    for content, words in ((b"nonsense", "The picture cannot be read"), (white.getvalue(), "Something went wrong")):
        page.set_input_files("#im-file input[type=file]", {"name": "x.png", "mimeType": "image/png", "buffer": content})
        page.wait_for_selector("#im-file .file-preview")
        page.click("#im-go")
        page.wait_for_selector(f".toast-body:has-text('{words}')")
        if content == b"nonsense":
            page.locator("#im-file").get_by_role("button", name="Clear").first.click()
            page.wait_for_selector("#im-file input[type=file]", state="attached")
    assert "a secret of ours" not in page.inner_text("body")
    assert "a secret of ours" in caplog.text
