"""The page is served, and what its makers would ask others for is not; modules with Gradio take seconds to import."""

from __future__ import annotations

import asyncio
import logging
import os
import threading
import urllib.request
from typing import Any

import pytest
import uvicorn
from torch import nn

from immunonet import explorer


async def built(**how: Any) -> Any:
    """Return a page; Gradio leaves a loop of its own open where none runs yet."""
    return explorer.build(**how)


def test_a_page_is_shown_on_this_machine_until_it_ends(
    make: Any, conv: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    from immunonet.explorer import serving

    servers: list[uvicorn.Server] = []

    class Kept(uvicorn.Server):
        def __init__(self, config: uvicorn.Config) -> None:
            super().__init__(config)
            servers.append(self)

    monkeypatch.setattr(serving.uvicorn, "Server", Kept)
    page = asyncio.run(built(defence=make("network"), base=conv, shape=(1, 6, 6)))
    told: list[str] = []
    ready = threading.Event()
    work = threading.Thread(
        target=explorer.launch, args=(page,), kwargs={"port": 0, "ready": lambda it: (told.append(it), ready.set())}
    )
    work.start()
    assert ready.wait(30)
    assert told[0].startswith("http://127.0.0.1:")
    with urllib.request.urlopen(told[0], timeout=30) as answer:
        text = answer.read().decode()
    assert "immunonet explorer" in text
    assert "fonts.googleapis" not in text
    with pytest.raises(OSError, match="in use"):
        explorer.launch(page, port=int(told[0].rpartition(":")[2]))
    servers[0].should_exit = True
    work.join(30)
    assert not work.is_alive()


def test_wrong_settings_are_told_before_anything_is_laid_out(make: Any, conv: nn.Module) -> None:
    with pytest.raises(ValueError, match="at_once must be at least 1, got 0"):
        explorer.build(make("network"), base=conv, shape=(1, 6, 6), at_once=0)
    with pytest.raises(ValueError, match="port must be at least 0 and at most 65535"):
        explorer.launch(None, port=65536)


def test_gradio_asks_nobody() -> None:
    from immunonet.explorer import serving

    assert os.environ["GRADIO_ANALYTICS_ENABLED"] == "False"
    looks = serving.looks()
    assert "http" not in looks["css"]
    assert not looks["theme"].font.startswith("'IBM")  # which Gradio would fetch


def test_errors_are_plain_words_and_what_nobody_foresaw_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    import gradio as gr

    from immunonet.explorer import app

    def fails(error: Exception) -> None:
        raise error

    with pytest.raises(gr.Error) as found:
        app.plainly(fails)(ValueError("the thing is <wrong>"))
    assert found.value.message == "The thing is <wrong>."
    assert not caplog.records
    with caplog.at_level(logging.ERROR), pytest.raises(gr.Error) as found:
        app.plainly(fails)(KeyError("secret"))
    assert "secret" not in str(found.value.message)
    assert "secret" in caplog.text
