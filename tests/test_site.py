"""The site of the documents: every link in it leads somewhere, and every public module has a page."""

import ast
import html
import re
import subprocess
import sys

import pytest

from tests.command_line import ROOT

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    made = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not made.returncode, made.stdout
    return folder


def text(page):
    return " ".join(html.unescape(re.sub(r"<[^>]+>", "", page.read_text())).split())


def test_every_public_module_has_a_page_with_its_docstring(site):
    pages = {page.parent.name: text(page) for page in site.glob("api/*/index.html")}
    for file in (ROOT / "diffusion_jax").rglob("*.py"):
        name = ".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")
        words = re.findall(r"\w+", ast.get_docstring(ast.parse(file.read_text())).partition("\n\n")[0])
        assert " ".join(words) in " ".join(re.findall(r"\w+", pages.pop(name))), f"{name} lacks its docstring"
    assert not pages


def test_a_page_lists_the_arguments_of_a_docstring(site):
    file = site / "api" / "diffusion_jax.core.guidance" / "index.html"
    assert "<li><code>phi</code>: in [0, 1]. 0 is plain guidance.</li>" in re.sub(r"</?p>|\n", "", file.read_text())
    assert "dynamic_threshold float | None: percentile in [0, 1], for pixel models." in text(file)


def test_the_readme_is_the_first_page_and_leads_to_the_documents(site):
    page = (site / "index.html").read_text()
    assert 'src="samples.png"' in page and (site / "samples.png").exists()
    for target in re.findall(r'href="((?:few_steps|BUILD|data|examples)[^"#]*)', page):
        assert (site / target).exists()
    assert 'href="few_steps/"' in page and 'href="BUILD/"' in page and 'href="examples/quickstart.ipynb"' in page


def test_the_site_loads_nothing_from_the_network(site):
    loaded = re.compile(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:")
    for page in site.rglob("*.html"):
        assert not loaded.search(page.read_text()), page
