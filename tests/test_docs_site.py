"""The docs site: it builds, its pictures are true, and a browser shows every page whole without asking anybody."""

from __future__ import annotations

import functools
import http.server
import json
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

import batchrenorm as brn

ROOT = Path(__file__).parent.parent
PAGES = sorted(page.stem for page in (ROOT / "docs").glob("*.md"))


@pytest.fixture(autouse=True)
def _scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts" / "docs"))


def test_the_picture_of_the_gradient_is_the_gradient() -> None:
    pytest.importorskip("matplotlib", reason="the extra 'docs' is not installed")
    from figures import GAMMA, MU, SIGMA, projection

    drawn = projection()
    x, dy, weight, mean, var = (torch.tensor(v, dtype=torch.float64) for v in (drawn.x, drawn.dy, GAMMA, MU, SIGMA**2))
    x.requires_grad_()
    y = brn.batch_renorm(
        x[:, None], mean.view(1), var.view(1), weight.view(1), training=True, eps=0.0, r_max=100.0, d_max=100.0
    )
    (dx,) = torch.autograd.grad(y, x, dy[:, None])
    assert np.abs(drawn.dx - dx.numpy()).max() < 1e-14
    # It is perpendicular to the plane that is drawn, and not by being small.
    assert abs(drawn.dx @ np.ones(3)) < 1e-14
    assert abs(drawn.dx @ drawn.x) < 1e-14
    assert np.linalg.norm(drawn.dx) > 0.3 * np.linalg.norm(drawn.scaled) > 0.1


def test_numbers_of_the_docs_are_of_the_committed_results() -> None:
    pytest.importorskip("matplotlib", reason="the extra 'docs' is not installed")
    import numbers_of_results as numbers

    table = (ROOT / "README.md").read_text(encoding="utf-8")
    for arm, label in (
        ("microbatch/bn", "BN, normalised in groups of 4"),
        ("microbatch/brn", "BRN, normalised in groups of 4"),
    ):
        assert f"| {label} | {numbers.accuracy('digits', arm)} |" in table
    assert len({tuple(sorted(r["config"]["clip"].items())) for r in numbers.records("choosing")}) == 6
    assert {len(values) for values in numbers.sweep().values()} == {3}
    assert not any(r["commit"].endswith("-dirty") for r in numbers.records("choosing"))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    for module in ("mkdocs", "material", "mkdocstrings", "latex2mathml", "matplotlib"):
        pytest.importorskip(module, reason="the extra 'docs' is not installed")
    target = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(target)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return target


def test_pages_are_built_whole(site: Path) -> None:
    for name in PAGES:
        page = (site / f"{name}.html").read_text(encoding="utf-8")
        assert "{{" not in page, name
        assert "arithmatex" not in page, name
        assert "merror" not in page, name
        assert "generator" not in page, name
        # Of what a page loads nothing is elsewhere; a link may be.
        loaded = re.findall(r"<(?:script|img|iframe|source)\b[^>]*\bsrc=[\"']?([^\"' >]+)", page)
        loaded += re.findall(r"<link\b(?![^>]*canonical)[^>]*\bhref=[\"']?([^\"' >]+)", page)
        assert loaded, name
        assert not [url for url in loaded if re.match(r"(\w+:)?//", url)], name
    mathematics = (site / "mathematics.html").read_text(encoding="utf-8")
    assert mathematics.count("<math") > 15
    assert mathematics.count("<svg role") == 3
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import)\s*[\"']?(https?:)?//", sheet.read_text(encoding="utf-8")), sheet


# In a browser: every page in a frame of a phone's and of a desk's width; it writes down what does not fit.
_HARNESS = """<!doctype html><title>harness</title><pre id=found></pre><script>
const pages = PAGES, found = [];
async function look(page, width) {
  const frame = document.createElement("iframe");
  frame.style.width = width + "px"; frame.style.height = "800px"; frame.style.border = 0;
  document.body.append(frame);
  await new Promise(done => { frame.onload = done; frame.src = page + ".html"; });
  await new Promise(done => setTimeout(done, 100));
  const doc = frame.contentDocument, root = doc.documentElement, content = doc.querySelector("article");
  const wide = [...content.querySelectorAll("p, li, h1, h2, h3, h4, figure, svg, .formula, table")]
    .filter(e => !e.closest(".md-typeset__scrollwrap") && e.getBoundingClientRect().right > width + 1)
    .map(e => e.tagName + " " + e.textContent.trim().slice(0, 40));
  found.push({page, width, overflow: Math.max(0, root.scrollWidth - width), wide,
    flat: [...doc.querySelectorAll("math, figure svg")].filter(e => !e.closest("details:not([open])") &&
      !(e.getBoundingClientRect().height > 4)).length,
    foreign: frame.contentWindow.performance.getEntriesByType("resource").map(e => e.name)
      .filter(url => !url.startsWith(location.origin))});
  frame.remove();
}
(async () => {
  for (const page of pages) for (const width of [390, 1280]) await look(page, width);
  document.getElementById("found").textContent = JSON.stringify(found);
})();
</script>"""


@pytest.fixture
def address(site: Path) -> Iterator[str]:
    (site / "harness.html").write_text(_HARNESS.replace("PAGES", json.dumps(PAGES)), encoding="utf-8")

    class Quiet(http.server.SimpleHTTPRequestHandler):
        def log_message(self, format: str, *args: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(site)))
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_pages_in_a_browser(address: str, scheme: str, tmp_path: Path) -> None:
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if browser is None:
        pytest.skip("no Chromium is installed")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run"]
    command += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    command += ["--blink-settings=preferredColorScheme=" + {"dark": "0", "light": "1"}[scheme]]
    command += [f"--user-data-dir={tmp_path}", "--virtual-time-budget=60000", "--dump-dom", f"{address}/harness.html"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    written = re.search(r"<pre id=\"found\">(.*?)</pre>", done.stdout, re.DOTALL)
    assert written is not None, done.stderr[-2000:]
    assert written[1], done.stderr[-2000:]
    found = json.loads(written[1].replace("&amp;", "&").replace("&lt;", "<").replace("&gt;", ">"))
    assert len(found) == 2 * len(PAGES)
    assert [f for f in found if f["overflow"] or f["wide"] or f["flat"] or f["foreign"]] == []
