"""How one picture becomes numbers: transparency, orientation, depth, size."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from immunonet._pictures import decode


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def one(content: bytes, **options: Any) -> Tensor:
    return decode([("it", content)], "here", **options)[0]


def noise(*shape: int, high: int = 256, kind: Any = np.uint8) -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, high, shape, dtype=kind)


def ink() -> np.ndarray[Any, Any]:
    drawing = np.zeros((8, 8, 4), np.uint8)
    drawing[2:6, 3:5, 3] = 255
    return drawing


def test_black_ink_on_a_transparent_canvas_is_seen() -> None:
    alpha = torch.from_numpy(ink()[..., 3] / np.float32(255))
    content = encoded(Image.fromarray(ink()))
    assert torch.equal(one(content), (1 - alpha).expand(3, -1, -1))
    assert torch.equal(one(content, background="white"), one(content))
    assert torch.equal(one(content, background="black"), torch.zeros(3, 8, 8))
    with pytest.raises(ValueError, match="background must be one of 'white', 'black', got 'pink'"):
        one(content, background="pink")


def test_half_transparent_is_mixed_with_the_background() -> None:
    rgba = noise(5, 6, 4)
    a = rgba[..., 3:] / 255
    for background, level in (("white", 255), ("black", 0)):
        expected = (rgba[..., :3] * a + level * (1 - a)) / 255
        found = one(encoded(Image.fromarray(rgba)), background=background).permute(1, 2, 0).numpy()
        np.testing.assert_allclose(found, expected, atol=1.01 / 255)  # Pillow computes it in whole numbers


@pytest.mark.parametrize("background", ["white", "black"])
def test_what_is_opaque_keeps_its_values(background: str) -> None:
    rgb = noise(6, 7, 3)
    opaque = np.dstack([rgb, np.full((6, 7), 255, np.uint8)])
    expected = torch.from_numpy(rgb).permute(2, 0, 1).float() / 255
    for image in (Image.fromarray(rgb), Image.fromarray(opaque)):
        assert torch.equal(one(encoded(image), background=background), expected)


def test_a_transparent_colour_of_grey_and_palette_images() -> None:
    grey = np.array([[0, 100], [200, 255]], np.uint8)
    found = one(encoded(Image.fromarray(grey), transparency=0))  # black is what is not there
    assert torch.equal(found, torch.tensor([[[255.0, 100], [200, 255]]]) / 255)
    palette = Image.fromarray(np.array([[0, 1], [1, 0]], np.uint8)).convert("P")
    palette.putpalette([0, 0, 0, 10, 20, 30])
    found = one(encoded(palette, transparency=0))
    assert (found * 255).round().permute(1, 2, 0).tolist()[0] == [[255, 255, 255], [10, 20, 30]]


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF"])
def test_a_photograph_is_turned_as_viewers_show_it(kind: str) -> None:
    upright = np.zeros((8, 8, 3), np.uint8)
    upright[:2] = 255
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it a quarter to the right
    lossless = {"JPEG": {"quality": 100}, "WEBP": {"lossless": True}}.get(kind, {})
    found = one(encoded(Image.fromarray(upright).rotate(90, expand=True), kind, exif=exif, **lossless))
    assert found[:, 0].mean() > 0.9
    assert found[:, -1].mean() < 0.1


def test_sixteen_bits_are_scaled() -> None:
    deep = noise(4, 5, high=65536, kind=np.uint16)
    deep[0, 0], deep[0, 1] = 0, 65535
    for kind in ("PNG", "TIFF"):
        found = one(encoded(Image.fromarray(deep), kind))
        np.testing.assert_allclose(found[0].numpy(), deep / 65535, atol=1e-7)
        assert found.min() == 0
        assert found.max() == 1
    shallow = noise(4, 5)
    both = decode([("a", encoded(Image.fromarray(deep))), ("b", encoded(Image.fromarray(shallow)))], "here")
    np.testing.assert_allclose(both[0, 0].numpy(), deep / 65535, atol=1e-7)
    assert torch.equal(both[1, 0], torch.from_numpy(shallow).float() / 255)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_images_of_no_known_range_are_refused(mode: str) -> None:
    content = encoded(Image.fromarray(np.full((2, 2), 70_000, np.int32)).convert(mode), "TIFF")
    with pytest.raises(ValueError, match=f"it is not a readable image .mode {mode} is neither grey of 8 or 16 bits"):
        one(content)


def test_a_size_is_the_centre_of_the_resized_image() -> None:
    wide = np.zeros((4, 12), np.uint8)
    wide[:, 4:8] = 200  # the centre square
    assert torch.equal(one(encoded(Image.fromarray(wide)), size=4), torch.full((1, 4, 4), 200 / 255))
    half = one(encoded(Image.fromarray(noise(8, 8))), size=4)
    assert half.shape == (1, 4, 4)
    # Halving is smoothing: a constant stays one, and the mean of the middle is kept roughly.
    assert torch.equal(
        one(encoded(Image.fromarray(np.full((8, 6, 3), 9, np.uint8))), size=3), torch.full((3, 3, 3), 9 / 255)
    )
    same = noise(5, 5, 3)
    assert torch.equal(one(encoded(Image.fromarray(same)), size=5), one(encoded(Image.fromarray(same))))
    deep = one(encoded(Image.fromarray(np.full((6, 6), 40_000, np.uint16))), size=3)
    torch.testing.assert_close(deep, torch.full((1, 3, 3), 40_000 / 65535))


def test_several_sizes_need_a_size() -> None:
    pictures = [(f"row {i}", encoded(Image.fromarray(noise(4 + i, 5)))) for i in range(3)]
    with pytest.raises(ValueError, match=r"row 1 is 5x5, but the images before it are 5x4: .*\(--size N\)"):
        decode(pictures, "here")
    assert decode(pictures, "here", size=4).shape == (3, 1, 4, 4)
    with pytest.raises(ValueError, match="size must be at least 1, got 0"):
        decode(pictures, "here", size=0)
    with pytest.raises(ValueError, match="here has no images"):
        decode([], "here")


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_a_truncated_file_is_named(kind: str) -> None:
    whole = encoded(Image.fromarray(noise(40, 40, 3)), kind)
    for content in (whole[: len(whole) // 2], b"", b"no image at all"):
        with pytest.raises(ValueError, match="row 3 is not a readable image"):
            decode([("row 3", content)], "here")
