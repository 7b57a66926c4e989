"""The site of the documents: every link in it works, and every public module has a page."""

import re
import subprocess
import sys

import pytest

from tests.command_line import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The folder of the built site."""
    folder = tmp_path_factory.mktemp("site")
    build = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(folder)]
    made = subprocess.run(build, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert not made.returncode, made.stdout
    return folder


def text(page):
    return re.sub(r"<[^>]+>", "", page.read_text())


@pytest.mark.slow
def test_every_public_module_has_a_page_with_its_docstring(site):
    modules = [file.relative_to(ROOT).with_suffix("") for file in (ROOT / "diffusion_jax").rglob("*.py")]
    names = {".".join(module.parts).removesuffix(".__init__") for module in modules}
    assert {page.parent.name for page in site.glob("api/*/index.html")} == names and len(names) > 100
    for name in names:
        assert "<p>" in (site / "api" / name / "index.html").read_text(), f"{name} has no docstring"


@pytest.mark.slow
def test_pages_list_the_arguments_of_a_docstring(site):
    page = text(site / "api" / "diffusion_jax.core.process" / "index.html")
    assert "sigma float" not in page and "sigma ArrayLike: standard deviation of the noise." in page


@pytest.mark.slow
def test_the_readme_is_the_first_page_and_leads_to_the_documents(site):
    page = (site / "index.html").read_text()
    assert 'src="samples.png"' in page and 'href="few_steps/"' in page and 'href="BUILD/"' in page


@pytest.mark.slow
def test_nothing_is_loaded_from_the_network(site):
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|img|iframe)[^>]* src=\"?https?:|<link[^>]* href=\"?https?:", page.read_text())
        assert not loaded, page
