"""The page: what stands where, and what is asked for when a visitor does something."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ParamSpec, TypeVar

import gradio as gr
from torch import nn

from immunonet import _check, data
from immunonet.defences.base import Defence
from immunonet.explorer import panels
from immunonet.explorer.desk import DRAWING, FILE, QUERIES, STRENGTH, TEST, Desk, Source
from immunonet.explorer.serving import asset
from immunonet.memory.sentinel import Sentinel

P = ParamSpec("P")
R = TypeVar("R")

_LOG = logging.getLogger(__name__)
# Visitors that may wait.
WAITING = 32
# How often, in seconds, uploads are deleted, and how old they are then at least.
KEPT = (600, 3600)
LEAD = """
# How an immune response answers
Give {title} an antigen, which is what an immune system calls whatever it meets: here, an image. Attack it, and watch
how it is answered.
"""
PAD = """
<div class="im-pad">
  <div class="im-sheet">
    <canvas width="280" height="280" tabindex="0" role="application" data-width="{width}"
      aria-label="Drawing pad: draw by finger, pen or mouse; by keyboard, arrows move the brush, and it draws while the
      space bar is held"></canvas>
    <span class="im-cursor"></span>
  </div>
  <p>Draw large, white on black. By keyboard: arrows move the brush, the space bar held down draws.</p>
  <button type="button">Clear the drawing</button>
</div>
"""
BEFORE = """
<div class="im-panel"><p>Choose an antigen, and press <b>Attack and answer</b>: what happens is shown here.</p></div>
"""
UNSEEN = '<div class="im-panel"><p>The curve of scores is drawn here.</p></div>'
WATCH = """
### The sentinel
Who may not look inside can still ask, again and again, about near copies of one image, until an answer is wrong. The
sentinel scores each query by its distance to the nearest of those before it: honest ones are far from each other, an
attacker's are close, and what falls below the threshold is flagged. The attacker here asks about the antigen above,
within the strength above.
"""


def build(
    defence: Defence, *, base: nn.Module, images: data.Images | None = None, names: Sequence[str] = (),
    sentinel: Sentinel | None = None, shape: Sequence[int] | None = None, seconds: float = 20.0, at_once: int = 1,
    seed: int = 0,
) -> gr.Blocks:  # fmt: skip
    """Return the explorer of a defence as a page, to be shown by `mount` or `launch`.

    Args:
        defence: any fitted defence whose antigens are grey or colour images.
        base: the network that it defends, inputs `(B, *S)` to logits `(B, C)`.
        images: test images that visitors may take; None: they draw, or bring their own.
        names: one per class; none: those of the images, or else numbers.
        sentinel: a fitted one, whose twin each visitor's attacker meets; None: that part is left out.
        shape: of an antigen, (1, H, W) or (3, H, W), where neither images nor the defence tell it.
        seconds: that an attack may take, above 0; it takes as many steps, or queries, as fit.
        at_once: visitors that are served at once; others wait.
        seed: of attacks and answers; the same gives the same ones.

    Raises:
        ValueError or TypeError that names the argument, also where antigens are no images.
    """
    desk = Desk(
        defence=defence, base=base, images=images, names=names, sentinel=sentinel, shape=shape, seconds=seconds,
        seed=seed,
    )  # fmt: skip
    at_once = _check.integer("at_once", at_once)
    page: gr.Blocks
    with gr.Blocks(title="immunonet explorer", analytics_enabled=False, delete_cache=KEPT) as page:
        gr.Markdown(LEAD.format(title=defence.title), elem_classes="im-lead")
        work: dict[str, Any] = {"concurrency_limit": at_once, "concurrency_id": "work"}
        with gr.Row():
            with gr.Column(scale=1, min_width=280):
                source, strength = _antigen(desk), _strength(desk)
                knows = gr.Dropdown(
                    desk.knowledge, value=desk.knowledge[0][1], label="2. The attacker knows", filterable=False,
                    info="What the attack may look into. One who knows the defence is harder to withstand.",
                )  # fmt: skip
                go = gr.Button("Attack and answer", variant="primary", elem_id="im-go")
            with gr.Column(scale=3, min_width=280):
                told = gr.HTML(BEFORE, js_on_load=asset("generations.js"), elem_id="im-story")
        go.click(_told(desk), [*source, knows, strength], told, api_visibility="private", **work)
        if sentinel is not None:
            _sentinel(desk, source, strength, work)
    page.queue(max_size=WAITING, api_open=False)
    return page


def _antigen(desk: Desk) -> list[gr.components.Component]:
    """Lay out where an antigen comes from, and return the parts in the order of `Source`."""
    kinds, last = desk.sources, 0 if desk.images is None else len(desk.images) - 1
    kind = gr.Radio(kinds, value=kinds[0], label="1. The antigen is")
    place = gr.Slider(
        0, max(last, 1), value=0, step=1, label="Number of the test image", visible=_shown(kinds[0] == TEST), buttons=[]
    )
    width = round(280 * max(0.085, 1.6 / min(desk.antigen[1:])))
    drawing = gr.HTML(
        "", html_template=PAD.format(width=width), js_on_load=asset("pad.js"), elem_id="im-pad",
        visible=_shown(kinds[0] == DRAWING),
    )  # fmt: skip
    file = gr.File(
        label="Picture file", file_types=["image"], type="binary", height=120, visible=_shown(False), elem_id="im-file"
    )
    swap = gr.Checkbox(label="Take dark for light", info="For dark ink on white paper.", visible=_shown(False))
    preview = gr.HTML(elem_id="im-antigen")
    source: list[gr.components.Component] = [kind, place, drawing, file, swap]
    kind.change(
        lambda chosen: [gr.update(visible=_shown(name == chosen)) for name in (TEST, DRAWING, FILE, FILE)], kind,
        source[1:], api_visibility="private", show_progress="hidden",
    )  # fmt: skip
    quick: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
    for part in source:
        part.change(_previewed(desk), source, preview, **quick)  # type: ignore[attr-defined]
    if desk.images is not None:
        preview.value = _previewed(desk)(TEST, 0, None, None, False)
    return source


def _strength(desk: Desk) -> gr.Slider:
    return gr.Slider(
        0, STRENGTH, value=0.15, step=0.01, label="Strength of the attack", buttons=[],
        info="How far each pixel may move, as a share of its range. 0: no attack.",
    )  # fmt: skip


def _sentinel(desk: Desk, source: list[gr.components.Component], strength: gr.Slider, work: dict[str, Any]) -> None:
    gr.Markdown(WATCH, elem_classes="im-lead")
    with gr.Row():
        with gr.Column(scale=1, min_width=280):
            method = gr.Radio(desk.askers, value=desk.askers[-1], label="The attacker asks by")
            queries = gr.Slider(*QUERIES, value=300, step=50, label="Queries they have", buttons=[])
            refuses = gr.Checkbox(label="Refuse what is flagged", info="Else flags only mark.")
            ask = gr.Button("Let an attacker ask", variant="primary", elem_id="im-ask")
            stop = gr.Button("Stop", elem_id="im-stop")
        with gr.Column(scale=3, min_width=280):
            seen = gr.HTML(UNSEEN, elem_id="im-watch")
    asks = ask.click(
        _watched(desk), [*source, method, strength, queries, refuses], seen, api_visibility="private",
        show_progress="minimal", **work,
    )  # fmt: skip
    stop.click(None, cancels=[asks], api_visibility="private")


def _told(desk: Desk) -> Callable[..., str]:
    @plainly
    def answer(*values: Any) -> str:
        *source, knows, strength = values
        return panels.story(desk.story(Source(*source), knows, strength), names=desk.names, bounds=desk.bounds)

    return answer


def _previewed(desk: Desk) -> Callable[..., str]:
    def preview(*values: Any) -> str:
        try:
            given = desk.given(Source(*values))
        except (ValueError, TypeError):
            return ""  # not drawn or chosen yet; what is wrong is told when it is asked about
        label = None if given.truth is None else desk.names[given.truth]
        return panels.antigen(given.x, bounds=desk.bounds, label=label)

    return preview


def _watched(desk: Desk) -> Callable[..., Iterator[str]]:
    def watch(*values: Any) -> Iterator[str]:
        *source, method, strength, queries, refuses = values
        seen = plainly(desk.watch)(Source(*source), method, strength, queries, refuses)
        step = plainly(lambda: next(seen, None))
        while (now := step()) is not None:
            yield panels.watch(now, queries=int(queries))

    return watch


def plainly(handler: Callable[P, R]) -> Callable[P, R]:
    """Return a function whose errors a visitor reads in plain words; what we did not foresee goes to the log."""

    @functools.wraps(handler)
    def asked(*args: P.args, **keywords: P.kwargs) -> R:
        try:
            return handler(*args, **keywords)
        except (ValueError, TypeError) as error:
            text = str(error)
            raise gr.Error(f"{text[:1].upper()}{text[1:]}.", print_exception=False) from None
        except Exception as error:
            _LOG.exception("the explorer failed")
            raise gr.Error(
                "Something went wrong here, and was written to the log. Try another antigen or attack.",
                print_exception=False,
            ) from error

    return asked


def _shown(shown: bool) -> Any:
    # What is hidden keeps its state, such as a drawing.
    return True if shown else "hidden"
