"""The examples in the project's documents."""

import ast
import re
import shlex
import textwrap

from tests.command_line import ROOT

DOCUMENTS = ["README.md", "BUILD.md", "CONTRIBUTING.md", "weights/emoji/README.md"]
DOCUMENTS += [str(path.relative_to(ROOT)) for path in sorted([*ROOT.glob("docs/*.md"), *ROOT.glob("configs/*.py")])]


def blocks(document):
    """The indented blocks of a document: markdown, or a Python file, of which the docstring counts."""
    text = (ROOT / document).read_text()
    text = ast.get_docstring(ast.parse(text)) or "" if document.endswith(".py") else text
    return [
        textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n(?:\n+(?=    ))?)+", text + "\n", re.MULTILINE)
    ]


def is_python(block):
    try:
        return bool(ast.parse(block))
    except SyntaxError:
        return False


def example(document, word, **replaced):
    """The names that the only Python example with this word leaves. replaced: some of its text, and by what."""
    (block,) = (block for block in blocks(document) if is_python(block) and word in block)
    for old, new in replaced.items():
        assert old in block
        block = block.replace(old, new)
    names = {}
    exec(compile(block, document, "exec"), names)
    return names


def commands(document):
    """Every command of the document's shell lines as its words, with the variables put in."""
    result, variables = [], {}
    for block in blocks(document):
        if is_python(block):
            continue
        on_hosts = re.sub(r'(?m)^all "(.*)"$', r"\1", block.replace("\\\n", ""))  # BUILD.md's name for every host
        for command in re.split(r"\n|&&", on_hosts):
            for name, value in variables.items():
                command = re.sub(rf"\${name}\b", value, command)
            defined = re.fullmatch(r'\s*(\w+)="(.*)"\s*', command)
            if defined:
                variables[defined[1]] = defined[2]
            elif "python" in command or "diffusion_jax --" in command:
                result.append(shlex.split(command, comments=True))
    return result


def flags_of(words):
    """The flags in the words of a command that is main.py's or diffusion_jax's; none of another one."""
    starts = [i for i, word in enumerate(words) if word.rpartition("/")[2] in ("main.py", "diffusion_jax")]
    return words[starts[-1] + 1 :] if starts else []
