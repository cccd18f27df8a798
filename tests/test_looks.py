from immunonet import _looks

TABLE = [("kind", "n"), ("a & b", "12"), ("<i>", "3")]


def test_columns_are_aligned_and_lines_do_not_trail() -> None:
    assert _looks.text(TABLE, "", "more").split("\n") == ["kind   n", "a & b  12", "<i>    3", "more"]


def test_markup_is_escaped_and_sets_no_colours() -> None:
    made = _looks.markup("t < 1", TABLE, "", "a > b")
    assert "<strong>t &lt; 1</strong>" in made
    assert ">a &amp; b</td>" in made
    assert "&lt;i&gt;" in made
    assert made.count("<tr>") == 3
    assert made.endswith("<div>a &gt; b</div>")
    assert "color" not in made
