"""The page that shows an evaluation."""

from __future__ import annotations

import html
from collections.abc import Sequence

from immunonet.evaluation.records import Check, Row


def page(rows: Sequence[Row], verdict: Row, checks: Sequence[Check]) -> str:
    """Return an HTML page: the verdict, the sanity checks, and a table of all rows."""
    low, high = verdict.ci95
    lines = "".join(
        f"<li><b>{'pass' if check.passed else 'FAIL'}</b>: {html.escape(check.name)} ({html.escape(check.detail)})</li>"
        for check in checks
    )
    table = "".join(
        f"<tr><td>{html.escape(row.defence)}</td><td>{html.escape(row.attack)}</td><td>{row.knows}</td>"
        f"<td>{row.accuracy:.3f}</td><td>{row.ci95[0]:.3f} to {row.ci95[1]:.3f}</td>"
        f"<td>{1000 * row.seconds_per_image:.1f}</td></tr>"
        for row in (*rows, verdict)
    )
    runs = f", mean over {len(verdict.seeds)} seeds" if verdict.seeds else ""
    return f"""<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>Evaluation of {html.escape(verdict.defence)}</title>
<style>body {{ font: 16px/1.5 sans-serif; max-width: 50em; margin: 2em auto; padding: 0 1em }}
table {{ border-collapse: collapse }}
td, th {{ padding: .2em .8em; border-bottom: 1px solid #ccc; text-align: left }}</style>
</head><body>
<h1>{verdict.accuracy:.1%} right in the worst case</h1>
<p>{html.escape(verdict.defence)} on {verdict.n} images of {html.escape(verdict.dataset)}, perturbed by at most
{verdict.eps:.4g} ({verdict.norm}){runs}; 95 % interval {low:.1%} to {high:.1%}. An image counts only if it was right
without an attack and under every attack below. Protocol: {html.escape(verdict.settings["protocol"])}, a first
measurement and no claim of robustness.</p>
<h2>Sanity checks</h2><ul>{lines}</ul>
<h2>Attacks</h2>
<table>
<tr><th>defence</th><th>attack</th><th>knows</th><th>accuracy</th><th>95 % interval</th><th>ms per image</th></tr>
{table}</table>
</body></html>
"""
