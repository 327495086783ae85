"""What MkDocs does besides Markdown: formulas become MathML, `{{ ... }}` becomes numbers and figures of the results.

    {{ accuracy digits microbatch/bn }}                     mean ± standard deviation over seeds, in percent
    {{ accuracy digits noniid/bn train/averages }}          on another split, or with other statistics
    {{ difference digits microbatch/brn microbatch/bn }}    in points
    {{ figure projection }}                                 one of `figures.FIGURES`
    {{ table limits }}                                      one of `numbers.TABLES`
    {{ test tests/test_docs_site.py test_name }}            the source of a test

An unknown name ends the build. Nothing in a page is fetched by the browser from elsewhere.
"""

from __future__ import annotations

import ast
import html
import re
import sys
from pathlib import Path
from typing import Any

import latex2mathml.converter

sys.path.insert(0, str(Path(__file__).parent))
import figures
import numbers_of_results as numbers

ROOT = Path(__file__).parents[2]


def on_page_markdown(markdown: str, **_: Any) -> str:
    """`{{ ... }}` -> Markdown or HTML."""
    return re.sub(r"\{\{ (\w+) (.+?) \}\}", lambda found: _VALUES[found[1]](*found[2].split()), markdown)


def on_page_content(content: str, **_: Any) -> str:
    r"""What arithmatex has found, `\(...\)` and `\[...\]`, -> MathML."""
    return re.sub(
        r'<(span|div) class="arithmatex">\\([(\[])(.*?)\\[)\]]</\1>',
        lambda found: _formula(html.unescape(found[3]), block=found[2] == "["),
        content,
        flags=re.DOTALL,
    )


def on_post_page(output: str, **_: Any) -> str:
    """Material names its makers in every page; a reader's browser need not know."""
    return re.sub(r"<meta name=\"generator\"[^>]*>", "", output)


def _formula(latex: str, block: bool) -> str:
    mathml = latex2mathml.converter.convert(latex.strip(), display="block" if block else "inline")
    mathml = mathml.replace(' xmlns="http://www.w3.org/1998/Math/MathML"', "")
    return f"<div class=formula>{mathml}</div>" if block else mathml


def _test(path: str, name: str) -> str:
    source = (ROOT / path).read_text(encoding="utf-8")
    found = next(node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef) and node.name == name)
    lines = source.splitlines()[found.lineno - 1 : found.end_lineno]
    body = "\n".join(f"    {line}" for line in ["```python", *lines, "```"])
    return f'??? note "The test: `{name}` in `{path}`"\n\n{body}\n'


_VALUES = {
    "accuracy": numbers.accuracy,
    "difference": numbers.difference,
    "table": lambda name: numbers.TABLES[name](),
    "figure": lambda name: figures.FIGURES[name](),
    "test": _test,
}
