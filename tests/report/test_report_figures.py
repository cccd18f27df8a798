from __future__ import annotations

import base64
import io

import numpy as np
import pytest
import torch
from PIL import Image
from report_samples import B, C, G, made_response

from immunonet.report import figures, images, learning_curves, response_figure, style
from immunonet.response import Trace


def decoded(uri: str) -> np.ndarray:
    kind, _, text = uri.partition(",")
    assert kind == "data:image/png;base64"
    return np.array(Image.open(io.BytesIO(base64.b64decode(text))))


def test_grey_image_spans_black_to_white() -> None:
    image = torch.tensor([[[-1.0, 0.0], [0.5, 1.0]]])
    pixels = decoded(images.png_uri(images.image_array(image, bounds=(-1, 1))))
    assert pixels.tolist() == [[0, 128], [191, 255]]


def test_colour_image_keeps_its_channels_and_their_bounds() -> None:
    image = torch.tensor([0.2, 1.0, 5.0]).reshape(3, 1, 1)
    pixels = decoded(images.png_uri(images.image_array(image, bounds=[(0, 1), (0, 1), (0, 10)])))
    assert pixels.tolist() == [[[51, 255, 128]]]


def test_grey_difference_is_scaled_to_its_largest_change() -> None:
    clean = torch.full((1, 1, 3), 0.5)
    pixels, largest = images.difference_array(clean, clean + torch.tensor([[[0.0, 0.2, -0.2]]]))
    assert largest == pytest.approx(0.2)
    colours = ["#" + bytes(pixel.tolist()).hex().upper() for pixel in pixels[0]]
    assert colours == ["#FFFFFF", images.BRIGHTER, images.DARKER]


def test_colour_difference_moves_each_channel_around_mid_grey() -> None:
    clean = torch.full((3, 1, 1), 0.5)
    pixels, largest = images.difference_array(clean, clean + torch.tensor([0.1, -0.1, 0.0]).reshape(3, 1, 1))
    assert pixels.tolist() == [[[255, 0, 128]]]
    assert largest == pytest.approx(0.1)


def test_no_difference_is_blank() -> None:
    pixels, largest = images.difference_array(torch.ones(1, 2, 2), torch.ones(1, 2, 2))
    assert largest == 0
    assert (pixels == 255).all()


def test_difference_of_two_shapes_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one shape, got \(1, 2, 2\) and \(1, 2, 3\)"):
        images.difference_array(torch.ones(1, 2, 2), torch.ones(1, 2, 3))


def test_mean_band_against_numpy() -> None:
    series = torch.rand(4, 9, generator=torch.Generator().manual_seed(0))
    mean, half = figures.mean_band(series)
    assert np.allclose(mean, series.double().numpy().mean(1))
    assert np.allclose(half, 1.96 * series.double().numpy().std(1, ddof=1) / 3)


def test_one_antigen_has_no_band() -> None:
    assert figures.mean_band(torch.rand(3, 1))[1].tolist() == [0, 0, 0]


def curves_of(trace: Trace) -> Trace:
    return Trace(trace.affinity_mean - 1, trace.affinity_best - 1, trace.votes, trace.entropy)


def test_learning_curves_draw_the_means() -> None:
    response = made_response((1, 8, 8))
    assert response.trace is not None
    truth, wrong = torch.arange(B) % C, (torch.arange(B) + 1) % C
    clean = response.trace[0]
    left, right = learning_curves(clean, curves_of(clean), truth, wrong)
    true_line, wrong_line = left.axes[0].lines
    expected = np.mean([clean.affinity_mean[:, b, truth[b]].numpy() for b in range(B)], 0)
    assert np.allclose(true_line.get_ydata(), expected)
    expected = np.mean([clean.affinity_mean[:, b, wrong[b]].numpy() for b in range(B)], 0)
    assert np.allclose(wrong_line.get_ydata(), expected)
    assert np.allclose(right.axes[0].lines[0].get_ydata(), np.array(true_line.get_ydata()) - 1)
    votes = np.mean([clean.votes[:, b, truth[b]].numpy() for b in range(B)], 0)
    assert np.allclose(left.axes[1].lines[0].get_ydata(), votes)
    assert np.allclose(left.axes[2].lines[0].get_ydata(), clean.entropy.numpy().mean(1))
    assert list(left.axes[2].lines[0].get_xdata()) == list(range(G + 1))
    # Both sides share their scales, and everything drawn lies within them.
    for a, b in zip(left.axes, right.axes, strict=True):
        assert a.get_ylim() == b.get_ylim()
        for line in (*a.lines, *b.lines):
            assert a.get_ylim()[0] <= min(line.get_ydata()) <= max(line.get_ydata()) <= a.get_ylim()[1]


def test_learning_curves_of_constant_affinity_can_be_drawn() -> None:
    flat = Trace(torch.ones(3, 2, 2), torch.ones(3, 2, 2), torch.ones(3, 2, 2) / 2, torch.zeros(3, 2))
    left, _ = learning_curves(flat, flat, torch.zeros(2, dtype=torch.long), torch.ones(2, dtype=torch.long))
    assert left.axes[0].get_ylim() == (0, 2)


def test_learning_curves_refuse_other_antigens() -> None:
    trace = made_response((1, 8, 8)).trace
    assert trace is not None
    with pytest.raises(ValueError, match=r"same antigens, got \[5, 5, 4, 5\]"):
        learning_curves(trace[0], trace[0], torch.zeros(4, dtype=torch.long), torch.zeros(5, dtype=torch.long))


def test_svg_is_self_contained_and_reproducible() -> None:
    trace = made_response((1, 8, 8)).trace
    assert trace is not None
    truth = torch.zeros(B, dtype=torch.long)
    uris = [figures.svg_uri(learning_curves(trace[0], trace[0], truth, truth + 1)[0]) for _ in range(2)]
    assert uris[0] == uris[1]
    svg = base64.b64decode(uris[0].partition(",")[2]).decode()
    assert "votes for true class" in svg


def test_response_figure_shows_every_part(shape: tuple[int, ...]) -> None:
    response = made_response(shape)
    antigens = torch.rand(B, *shape)
    figure = response_figure(response, antigens, indices=[1, -1], cells=3, names=["ant", "bee", "cat"])
    pictures = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert len(pictures) == 2 * (1 + 3 + 3)
    drawn = {array.tobytes() for array in pictures}
    for tensor in (antigens[1], response.plasma.x[1, 0], response.memory.x[-1, 2]):
        assert images.image_array(tensor).tobytes() in drawn
    texts = " ".join(axes.get_title() + axes.get_xlabel() for axes in figure.axes)
    assert f"credibility {float(response.credibility[1]):.2f}" in texts
    assert ["ant", "bee", "cat"][int(response.labels[1])] in texts
    figure.savefig(io.BytesIO(), format="png")


def test_response_figure_shows_no_cells_of_what_was_recalled() -> None:
    response = made_response((1, 8, 8))
    for part in (response.plasma, response.memory):
        part.label[1] = part.origin[1] = -1
        part.affinity[1] = -torch.inf
    figure = response_figure(response, torch.rand(B, 1, 8, 8), indices=[0, 1], cells=3)
    assert sum(bool(axes.images) for axes in figure.axes) == 2 + 3 + 3


def test_hidden_cells_are_drawn_by_their_origin() -> None:
    response = made_response((1, 8, 8), cell_shape=(16, 2, 2))
    antigens, repertoire = torch.rand(B, 1, 8, 8), torch.rand(20, 1, 8, 8)
    figure = response_figure(response, antigens, repertoire=repertoire, indices=[0])
    drawn = {axes.images[0].get_array().tobytes() for axes in figure.axes if axes.images}
    assert images.image_array(repertoire[int(response.plasma.origin[0, 0])]).tobytes() in drawn
    with pytest.raises(ValueError, match=r"repertoire must be the training images \(N, 1, 8, 8\).*\(16, 2, 2\)"):
        response_figure(response, antigens)


@pytest.mark.parametrize("shape", [(4,), (2, 8, 8), (8, 8), (1, 1, 8, 8)])
def test_antigens_that_are_no_images_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"antigens must be images of shape \(1, H, W\) or \(3, H, W\)"):
        response_figure(made_response(shape), torch.rand(B, *shape))


def test_response_figure_refuses_what_does_not_fit() -> None:
    response, antigens = made_response((1, 8, 8)), torch.rand(B, 1, 8, 8)
    with pytest.raises(ValueError, match="those of the response, 5, got 4"):
        response_figure(response, antigens[:4])
    with pytest.raises(ValueError, match=r"indices must name some of the 5 antigens, got \[5\]"):
        response_figure(response, antigens, indices=[5])
    with pytest.raises(ValueError, match="names must hold one name per class, 3, got 2"):
        response_figure(response, antigens, names=["a", "b"])
    with pytest.raises(ValueError, match="cells must be at least 1"):
        response_figure(response, antigens, cells=0)


def test_many_classes_show_the_ten_with_most_votes() -> None:
    response = made_response((1, 8, 8))
    votes = torch.linspace(0, 1, 15).softmax(0).expand(B, 15)
    wide = type(response)(**{**vars(response), "votes": votes})
    figure = response_figure(wide, torch.rand(B, 1, 8, 8), indices=[0])
    bars = next(axes for axes in figure.axes if axes.patches)
    assert [label.get_text() for label in bars.get_yticklabels()] == [str(c) for c in range(5, 15)]


def test_points_stand_where_the_accuracies_are():
    def row(accuracy, *ci95):
        return {"accuracy": accuracy, "ci95": ci95}

    lines = {"one": {"clean": row(0.9, 0.8, 1), "attacked": row(0.2, 0.1, 0.3)}, "two": {"clean": row(0.7, 0.6, 0.8)}}
    axes, below = figures.accuracy_points({"net": lines, "other": {"three": {"attacked": row(0.5, 0.4, 0.6)}}}).axes
    assert tuple(panel.get_title(loc="left") for panel in (axes, below)) == ("net", "other")
    assert [bar.lines[0].get_xdata().tolist() for bar in below.containers] == [[0.5]]
    assert [text.get_text() for text in axes.figure.legends[0].get_texts()] == ["clean", "attacked"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["one", "two"]
    centres = {bar.get_label(): bar.lines[0].get_xdata().tolist() for bar in axes.containers}
    assert centres == {"clean": [0.9, 0.7], "attacked": [0.2]}
    ends = axes.containers[0].lines[2][0].get_segments()
    assert [segment[:, 0].tolist() for segment in ends] == [pytest.approx([0.8, 1.0]), pytest.approx([0.6, 0.8])]


def test_rejection_is_drawn_as_what_is_answered_against_what_is_held():
    levels = [{"accepted": 1.0, "held": 0.2, "ci95": [0.1, 0.3]}, {"accepted": 0.5, "held": 0.8, "ci95": [0.7, 0.9]}]
    first, second = figures.rejection_curves({"net": {"a": levels, "b": levels[:1]}, "other": {"a": levels}}).axes
    assert [line.get_xydata().tolist() for line in first.lines] == [[[1.0, 0.2], [0.5, 0.8]], [[1.0, 0.2]]]
    assert tuple(axes.get_title(loc="left") for axes in (first, second)) == ("net", "other")


def test_notebooks_show_a_figure_by_itself():
    pixels = Image.open(io.BytesIO(style.blank(3, 2)._repr_png_()))
    assert pixels.size == (300, 200)
