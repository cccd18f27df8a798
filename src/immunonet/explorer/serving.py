"""The explorer's page in a FastAPI app, and on this machine alone."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from importlib import resources
from typing import Any

import fastapi
import gradio as gr
import uvicorn

from immunonet import _check

HOST = "127.0.0.1"
# What a visitor may upload.
UPLOAD = "5mb"


def looks() -> dict[str, Any]:
    """Return the keyword arguments of `gradio.mount_gradio_app` that make the page what it is.

    Fonts are the system's, so that nothing is fetched from elsewhere; nobody's runs are kept.
    """
    theme = gr.themes.Default(
        primary_hue="blue",
        neutral_hue="slate",
        font=["ui-sans-serif", "system-ui", "sans-serif"],
        font_mono=["ui-monospace", "Consolas", "monospace"],
    )
    # Gradio's own greys and blues are too faint to be read by everybody (WCAG 2, 4.5 to 1).
    theme.set(
        body_text_color_subdued="*neutral_600", body_text_color_subdued_dark="*neutral_300",
        block_info_text_color="*neutral_600", block_info_text_color_dark="*neutral_300",
        block_label_text_color="*neutral_700", block_label_text_color_dark="*neutral_200",
        block_title_text_color="*neutral_800", block_title_text_color_dark="*neutral_100",
        button_primary_background_fill="*primary_700", button_primary_background_fill_hover="*primary_600",
        button_primary_background_fill_dark="*primary_700", button_primary_background_fill_hover_dark="*primary_600",
    )  # fmt: skip
    return {
        "theme": theme, "css": asset("style.css"), "footer_links": [], "run_history": False, "show_error": True,
        "max_file_size": UPLOAD, "ssr_mode": False, "mcp_server": False, "pwa": False, "enable_monitoring": False,
    }  # fmt: skip


def mount(app: fastapi.FastAPI, page: gr.Blocks, path: str = "/") -> fastapi.FastAPI:
    """Return `app` with an explorer's page at `path`; routes that were added before go first."""
    gr.mount_gradio_app(app, page, path, server_name=HOST, **looks())
    return app


def launch(page: gr.Blocks, *, port: int = 7860, ready: Callable[[str], object] = print) -> None:
    """Show an explorer's page on this machine alone until it is interrupted; `ready` is called with its address.

    `port` from 0 to 65535, 0: one that is free. OSError where it is taken.
    """
    port = _check.integer("port", port, least=0, most=65535)
    # Bound here, so that its number is known, and a port that is taken an error like any other.
    with socket.create_server((HOST, port)) as bound:
        asyncio.run(_serve(page, bound, ready))


async def _serve(page: gr.Blocks, bound: socket.socket, ready: Callable[[str], object]) -> None:
    # Gradio leaves a loop of its own open where none runs yet.
    app = mount(fastapi.FastAPI(openapi_url=None), page)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    ready(f"http://{HOST}:{bound.getsockname()[1]}")
    await server.serve(sockets=[bound])


def asset(name: str) -> str:
    """Return the text of a file of the page."""
    return resources.files("immunonet.explorer").joinpath("assets", name).read_text(encoding="utf-8")
