"""Adds to the site of docs/ what stands elsewhere: README.md and other documents, and a page for each module."""

import ast
import posixpath
import re
from itertools import groupby
from pathlib import Path

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
ELSEWHERE = {  # page of the site -> file of the repository
    "index.md": "README.md",
    **{name: name for name in ("BUILD.md", "CONTRIBUTING.md", "weights/emoji/README.md", "weights/fast/README.md")},
    **{name: name for name in ("LICENSE", "examples/quickstart.ipynb")},
}
PAGE = {file: page for page, file in ELSEWHERE.items()}
LINK = re.compile(r"(?<=\]\()(?![a-z]+:)([^)#\s]+)")  # the path in [text](path#heading)
ARGUMENT = re.compile(r"([a-z_]\w*(?:, \w+)*): ")


def modules() -> dict[str, Path]:
    """{dotted name: file} of every module, a package before its modules."""
    files = {file.relative_to(ROOT).with_suffix(""): file for file in (ROOT / "diffusion_jax").rglob("*.py")}
    return dict(sorted((".".join(name.parts).removesuffix(".__init__"), file) for name, file in files.items()))


def on_config(config: MkDocsConfig) -> MkDocsConfig:
    """Put the modules at the end of the navigation, those of a folder together."""
    nav = []
    for folder, names in groupby(modules(), lambda name: name.split(".")[1:2]):
        pages = [{name.removeprefix("diffusion_jax."): f"api/{name}.md"} for name in names]
        nav += [{folder[0]: pages}] if len(pages) > 1 else pages
    config.nav.append({"API": ["api/index.md", *nav]})
    return config


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages that are not in docs/."""
    for page, file in ELSEWHERE.items():
        files.append(File.generated(config, page, abs_src_path=str(ROOT / file)))
    rows = ["# Modules\n", "Every public module with its functions and classes.\n", "| module | what |", "|---|---|"]
    for name, file in modules().items():
        files.append(File.generated(config, f"api/{name}.md", content=f"::: {name}\n"))
        summary = (ast.get_docstring(ast.parse(file.read_text())) or "").partition("\n\n")[0].replace("\n", " ")
        rows.append(f"| [{name}]({name}.md) | {summary} |")
    files.append(File.generated(config, "api/index.md", content="\n".join(rows)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links between files of the repository, as GitHub reads them, into links between pages."""
    here = page.file.src_uri
    if here.startswith("api/"):
        return markdown
    folder = posixpath.dirname(ELSEWHERE.get(here, f"docs/{here}"))

    def link(path: re.Match) -> str:
        file = posixpath.normpath(posixpath.join(folder, path[0]))
        if not (ROOT / file).is_file():
            return path[0]
        return posixpath.relpath(PAGE.get(file, file.removeprefix("docs/")), posixpath.dirname(here) or ".")

    return LINK.sub(link, markdown)


class Arguments(griffe.Extension):
    """Makes a list of the lines `name: shape, unit. Meaning.` of a docstring."""

    def on_object(self, *, obj: griffe.Object, **_) -> None:
        if obj.docstring:
            obj.docstring.value = listed(obj.docstring.value, types(obj) if obj.is_class else {})


def types(cls: griffe.Class) -> dict[str, str]:
    """{field of a class: its type}."""
    fields = ((name, member) for name, member in cls.members.items() if member.is_attribute)
    return {name: f" `{member.annotation}`" for name, member in fields if member.annotation}


def listed(docstring: str, types: dict[str, str]) -> str:
    """The docstring with its arguments as a list of Markdown, each with its type where that is not in a signature."""
    lines, inside = [], False
    for line in docstring.splitlines():
        argument = ARGUMENT.match(line) if lines else None
        continued = inside and line.startswith("  ")
        was_inside, inside = inside, bool(argument or continued)
        if inside != was_inside or line.startswith("Raises "):
            lines.append("")
        if argument:
            line = f"- `{argument[1]}`{types.get(argument[1], '')}: {line[argument.end() :]}"
        lines.append(f"  {line}" if continued else line)
    return "\n".join(lines)
