from __future__ import annotations

import base64
import io

import pytest
import torch
from PIL import Image

from immunonet import incoming
from immunonet.explorer import antigens

BOUNDS = incoming.bounds("bounds", (0.0, 1.0))


def encoded(colour: object, size: tuple[int, int] = (20, 20), mode: str = "L", kind: str = "PNG") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size, colour).save(file, kind)  # type: ignore[arg-type]
    return file.getvalue()


def address(image: Image.Image) -> str:
    file = io.BytesIO()
    image.save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 8, 8), (1, 8, 4), (3, 5, 9)])
@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_any_picture_becomes_an_antigen(shape: tuple[int, ...], mode: str) -> None:
    colour = {"L": 51, "RGB": (51, 51, 51), "RGBA": (51, 51, 51, 255)}[mode]
    found = antigens.read(encoded(colour, (30, 20), mode), shape, bounds=BOUNDS)
    assert found.shape == (1, *shape)
    torch.testing.assert_close(found, torch.full_like(found, 0.2), atol=1e-3, rtol=0)


def test_it_lies_within_the_bounds_and_dark_is_taken_for_light() -> None:
    bounds = incoming.bounds("bounds", [(-1.0, 1.0), (0.0, 2.0), (0.0, 255.0)])
    found = antigens.read(encoded((255, 255, 0), mode="RGB"), (3, 2, 2), bounds=bounds)
    assert found[0, :, 0, 0].tolist() == [1, 2, 0]
    swapped = antigens.read(encoded((255, 255, 0), mode="RGB"), (3, 2, 2), bounds=bounds, swap=True)
    assert swapped[0, :, 0, 0].tolist() == [-1, 0, 255]


def test_a_picture_in_the_antigens_proportions_is_kept_whole() -> None:
    pixels = torch.arange(8, dtype=torch.uint8).mul(30).reshape(2, 4)
    file = io.BytesIO()
    Image.fromarray(pixels.numpy()).save(file, "PNG")
    found = antigens.read(file.getvalue(), (1, 2, 4), bounds=BOUNDS)
    torch.testing.assert_close(found[0, 0], pixels / 255)


def test_the_middle_is_kept() -> None:
    wide = Image.new("L", (30, 10), 0)
    wide.paste(255, (10, 0, 20, 10))
    file = io.BytesIO()
    wide.save(file, "PNG")
    assert antigens.read(file.getvalue(), (1, 10, 10), bounds=BOUNDS).min() > 0.9


def test_grey_is_what_eyes_see() -> None:
    green, blue = (antigens.read(encoded(c, mode="RGB"), (1, 2, 2), bounds=BOUNDS) for c in ("#00ff00", "#0000ff"))
    assert green.mean() > 4 * blue.mean()


def test_what_is_no_picture_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for wrong in (b"", b"nonsense", encoded(9)[:40]):
        with pytest.raises(ValueError, match="the picture"):
            antigens.read(wrong, (1, 8, 8), bounds=BOUNDS)
    with pytest.raises(ValueError, match=r"must be images of shape \(1, H, W\) or \(3, H, W\)"):
        antigens.read(encoded(9), (4,), bounds=BOUNDS)
    monkeypatch.setattr(antigens, "PIXELS", 399)
    with pytest.raises(ValueError, match="at most 399 pixels, it has 20 x 20"):
        antigens.read(encoded(9), (1, 8, 8), bounds=BOUNDS)


def test_a_drawing_becomes_an_antigen() -> None:
    image = Image.new("RGBA", (280, 280), "black")
    image.paste("white", (140, 0, 280, 280))
    found = antigens.drawn(address(image), (1, 8, 8), bounds=BOUNDS)
    assert found.shape == (1, 1, 8, 8)
    assert found[0, 0, :, :3].max() < 0.01
    assert found[0, 0, :, 5:].min() > 0.99


@pytest.mark.parametrize(
    ("given", "told"),
    [
        (None, "is empty"),
        ("", "is empty"),
        (address(Image.new("L", (280, 280), 0)), "is empty"),
        ("http://elsewhere/x.png", "something else"),
        (7, "something else"),
        ("data:image/png;base64," + "A" * antigens.LETTERS, "something else"),
        ("data:image/png;base64,?", "damaged"),
        ("data:image/png;base64,AAAA", "cannot be read"),
    ],
)
def test_what_is_no_drawing_is_refused(given: object, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        antigens.drawn(given, (1, 8, 8), bounds=BOUNDS)
