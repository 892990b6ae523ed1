"""The handbook: every command in it parses, every link in it resolves, and the README stays short."""

import importlib
import re
import shlex
import textwrap
from pathlib import Path

import pytest

REPO = Path(__file__).parent.parent
PAGES = sorted([REPO / "README.md", *REPO.glob("docs/*.md"), *REPO.glob("*.md"), *REPO.glob(".github/*.md")])
PAGES = list(dict.fromkeys(PAGES))
# Not ours.
SHELL = {"mkdir", "git", "cd", "tail", "tee", "export", "source", "tensorboard", "pytest", "pip", "nvidia-smi"}


def fenced(page, *languages):
    """The fenced blocks of a page in one of the languages."""
    return [
        body for kind, body in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(), re.M | re.S) if kind in languages
    ]


def commands(page):
    """The shell commands of a page, as lists of words; those of a loop, for each value of its variable."""
    variable, values = "$", ["$"]  # outside of loops
    for block in fenced(page, "sh", "bash", ""):
        for line in re.sub(r"\\\n", " ", block).splitlines():
            words = []
            for word in [*split(line), ";"]:
                if re.fullmatch("[;&|()]+", word):
                    if words and words[0] == "for":
                        variable, values = f"${words[1]}", words[3:]
                    elif words == ["done"]:
                        variable, values = "$", ["$"]
                    elif words:
                        yield from (unrolled(words, variable, value) for value in values)
                    words = []
                elif word != "do" or words:
                    words.append(word)


def unrolled(words, variable, value):
    """Words with the value of a variable in its place: as several words where it stands alone."""
    return sum((value.split() if word == variable else [word.replace(variable, value)] for word in words), [])


def split(line):
    """The words of a shell line; its operators, such as ; and &&, are words of their own."""
    lexer = shlex.shlex(line, posix=True, punctuation_chars=True)
    lexer.whitespace_split = True
    return list(lexer)


ALL_COMMANDS = [
    pytest.param(words, id=f"{page.name}: {' '.join(words)[:70]}") for page in PAGES for words in commands(page)
]


def test_there_are_commands():
    assert len(ALL_COMMANDS) > 30


@pytest.mark.parametrize("words", ALL_COMMANDS)
def test_a_command_parses(words):
    """Scripts and flags by their own parsers, targets by the Makefile, requirement files by their names."""
    while re.fullmatch(r"\w+=\S*", words[0]):  # VARIABLE=value command
        words = words[1:]
    if words[0] == "timeout":
        words = words[2:]
    if words[0] == "make":
        targets = re.findall(r"^([\w-]+):", (REPO / "Makefile").read_text(), re.M)
        assert {word for word in words[1:] if "=" not in word} <= set(targets)
        return
    if words[0].endswith("pip") or words[0] == "pip":
        assert all((REPO / file).is_file() for flag, file in zip(words, words[1:], strict=False) if flag == "-r")
        return
    if words[0] == "torchrun":
        words = ["python", *words[next(i for i, word in enumerate(words) if word.endswith(".py")) :]]
    if not re.fullmatch(r"(.*/)?python[\d.]*", words[0]):
        assert words[0] in SHELL, words
        return
    if words[1] == "-c":
        compile(words[2], "-c", "exec")
        return
    if words[1] == "-m" and not words[2].startswith("tools."):
        assert words[2] in ("pytest", "venv", "pip", "tensorboard.main", "ruff"), words
        return
    name, arguments = (words[2], words[3:]) if words[1] == "-m" else (words[1].removesuffix(".py"), words[2:])
    if (REPO / name.replace(".", "/") / "__main__.py").is_file():
        name += ".__main__"
    parser = importlib.import_module(name).get_args_parser()
    if "--" in arguments:  # tools.sweep: flags of training follow
        place = arguments.index("--")
        importlib.import_module("train_ext_test0").get_args_parser().parse_args(arguments[place + 1 :])
        arguments = arguments[:place]
    if "--help" not in arguments:
        parser.parse_args(arguments)  # exits with its error line


def anchors(page):
    """The anchors of a page's headings, as GitHub makes them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    slugs = []
    for heading in re.findall(r"^#+ (.*)$", text, re.M):
        plain = re.sub(r"\[([^]]*)\]\([^)]*\)|[`*]", r"\1", heading).strip().lower()
        slugs.append(re.sub(r"[^\w\- ]", "", plain).replace(" ", "-"))
    return slugs


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            assert anchor in anchors(target), link


def test_python_blocks_compile():
    for page in PAGES:
        for block in map(textwrap.dedent, fenced(page, "python")):
            entries = re.match(r'"', block)  # of a table, such as DATASETS
            compile(f"_ = {{{block}}}" if entries else block, page.name, "exec")


def test_no_placeholder_is_left():
    assert not [page.name for page in PAGES if re.search(r"<!--|^[A-Z]{4,}$", page.read_text(), re.M)]


def test_every_page_is_in_the_readme_and_every_picture_on_a_page():
    readme, everything = (REPO / "README.md").read_text(), "".join(page.read_text() for page in PAGES)
    for file in (REPO / "docs").iterdir():
        assert f"docs/{file.name}" in readme if file.suffix == ".md" else file.name in everything, file.name


def test_the_readme_is_short():
    assert len((REPO / "README.md").read_text().splitlines()) <= 150
