"""What `ImmuneResponse.plot` and `animate` show."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from PIL import Image
from report_samples import B, made_response

from immunonet.response import ImmuneResponse, Trace

NAMES = ["ant", "bee", "cat"]


def answered(shape: tuple[int, ...], cell_shape: tuple[int, ...] | None = None) -> ImmuneResponse:
    return dataclasses.replace(made_response(shape, cell_shape), antigens=torch.rand(B, *shape))


@pytest.mark.parametrize(("shape", "panels"), [((1, 8, 8), 4 + 12), ((3, 8, 8), 4 + 12), ((4,), 3)])
def test_a_figure_shows_all_there_is(shape: tuple[int, ...], panels: int) -> None:
    r = answered(shape)
    figure = r.plot(-1, names=NAMES)
    assert len(figure.axes) == panels
    label = NAMES[int(r.labels[-1])]
    assert figure.get_suptitle().startswith(f"{label}, by the immune response; ")
    curves = {line.get_label(): line.get_ydata() for line in figure.axes[3 if len(shape) == 3 else 2].get_lines()}
    assert r.trace is not None
    assert curves.keys() == set(NAMES)
    assert curves["bee"] == pytest.approx(r.trace[0].votes[:, -1, 1].numpy())
    figure.canvas.draw()


def test_hidden_cells_are_shown_where_the_examples_are_known() -> None:
    r = answered((1, 8, 8), cell_shape=(5,))
    assert len(r.plot(0).axes) == 4
    assert len(r.plot(0, repertoire=torch.rand(20, 1, 8, 8)).axes) == 16


def test_what_was_recalled_has_no_cells_to_show() -> None:
    r = answered((1, 8, 8))
    r.recalled[0] = True
    figure = r.plot(0)
    assert len(figure.axes) == 2
    assert "from memory" in figure.get_suptitle()


def test_a_response_of_old_without_antigens_is_shown_as_well() -> None:
    assert len(dataclasses.replace(answered((1, 8, 8)), antigens=None).plot(0).axes) == 3


def test_an_animation_has_a_frame_for_each_generation(tmp_path: Path) -> None:
    r = answered((4,))
    assert r.trace is not None
    short = Trace(*(values[:3] for values in vars(r.trace[0]).values()))
    file = dataclasses.replace(r, trace=(short,)).animate(1, tmp_path / "evolved.gif", names=NAMES, seconds=0.2)
    with Image.open(file) as image:
        assert image.n_frames == 3
        assert image.info["duration"] == 200
    assert list(tmp_path.iterdir()) == [file]


def test_an_animation_needs_a_trace_that_is_there(tmp_path: Path) -> None:
    r = answered((4,))
    with pytest.raises(ValueError, match=r"layer must be at least 0 and at most 0, got 1"):
        r.animate(0, tmp_path / "a.gif", layer=1)
    with pytest.raises(ValueError, match="seconds must be"):
        r.animate(0, tmp_path / "a.gif", seconds=0)
    with pytest.raises(ValueError, match=r"ask respond\(x, trace=True\)"):
        dataclasses.replace(r, trace=None).animate(0, tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
