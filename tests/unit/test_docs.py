"""The documentation: generated reference, navigation, links, and files that pages name."""

from __future__ import annotations

import re
import runpy
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from s2s_scale.settings.commands import all_commands
from s2s_scale.settings.options import options_of
from s2s_scale.settings.profiles import LauncherProfile

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(path.relative_to(DOCS).as_posix() for path in DOCS.rglob("*.md"))
MOST_README_LINES = 160
FOREIGN_FLAGS = set(
    "accelerator-type zone version worker nproc_per_node num_gpus module ntasks-per-node nodes "
    "signal dist help name no_name results clock size rows steps runs seed markdown xla xla_python "
    "xla_backend_optimization_level".split()
)
"""Flags of other programs, of benchmarks and of tests that pages name."""


@pytest.fixture(scope="module")
def hook() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(DOCS / "generate.py")))


def page(name: str) -> str:
    return (DOCS / name).read_text(encoding="utf-8")


def test_pages_are_those_of_the_navigation(hook: SimpleNamespace) -> None:
    found: list[str] = []

    def collect(entry: object) -> None:
        if isinstance(entry, str):
            found.append(entry)
        for inner in entry.values() if isinstance(entry, dict) else ():
            for part in inner if isinstance(inner, list) else [inner]:
                collect(part)

    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]
    collect({"": nav})
    assert len(found) == len(set(found)) > 30
    outside = {name for name in found if name not in PAGES}
    assert outside == {"CONTRIBUTING.md", "CHANGELOG.md"} <= set(hook.published())
    assert set(PAGES) <= set(found)


@pytest.mark.parametrize("name", sorted(all_commands()))
def test_the_reference_has_every_option_with_type_default_and_help(
    name: str, hook: SimpleNamespace
) -> None:
    text = hook.expand(page(f"reference/commands/{name}.md"))
    assert "<!-- generate" not in text
    command = all_commands()[name]
    assert hook.escape(command.description) in text
    entries = dict(re.findall(r"^`--(\w+)[^\n]*\n\n:   (.+)$", text, re.MULTILINE))
    options = {option.name: option for option in command.options()}
    assert entries.keys() == options.keys()
    for flag, entry in entries.items():
        option = options[flag]
        assert "type: " in entry and ("default: " in entry) is not option.required
        assert entry.startswith(hook.escape(str(option.help), frozenset(options)))
        assert all(f"`{choice}`" in entry for choice in option.choices or ())


def test_every_command_has_a_page(hook: SimpleNamespace) -> None:
    overview = hook.expand(page("reference/commands/index.md"))
    for name in all_commands():
        assert f"({name}.md)" in overview
        assert f"reference/commands/{name}.md" in PAGES


def test_the_profiles_page_has_every_profile_and_every_key(hook: SimpleNamespace) -> None:
    text = hook.expand(page("reference/profiles.md"))
    shipped = sorted((ROOT / "launchers" / "profiles").glob("*.yaml"))
    assert len(shipped) > 20
    assert all(f"\n| `{path.stem}` |" in text for path in shipped)
    keys = [option.name for option in options_of(LauncherProfile)]
    assert all(f"\n| `{key}` |" in text for key in [*keys, "extends"])


def test_the_deepspeed_page_has_every_configuration(hook: SimpleNamespace) -> None:
    text = hook.expand(page("reference/deepspeed.md"))
    shipped = sorted((ROOT / "ds_configs").glob("*.json"))
    assert shipped
    assert all(f'??? note "`{path.stem}`"' in text for path in shipped)


def test_help_texts_become_markdown(hook: SimpleNamespace) -> None:
    names = frozenset({"metrics"})
    assert hook.escape("Use --metrics or --x.", names) == "Use [`--metrics`](#metrics) or `--x`."
    assert hook.escape("a <b> & [c] *d*") == r"a &lt;b&gt; &amp; \[c\] \*d\*"
    assert hook.escape("see `a*b <c>`") == "see `a*b <c>`"


@pytest.mark.parametrize(
    ("source", "link", "expected"),
    [
        ("results.md", "../benchmarks/results/learning.png", "benchmarks/results/learning.png"),
        ("how-to/faults.md", "../../CONTRIBUTING.md#style", "../CONTRIBUTING.md#style"),
        ("CONTRIBUTING.md", "docs/explanation/loss.md", "explanation/loss.md"),
        ("how-to/faults.md", "../results.md#killed-runs", "../results.md#killed-runs"),
        ("results.md", "https://example.org/a.md", "https://example.org/a.md"),
    ],
)
def test_links_of_the_repository_become_links_of_the_site(
    source: str, link: str, expected: str, hook: SimpleNamespace
) -> None:
    assert hook.site_links(f"see [x]({link}).", source) == f"see [x]({expected})."


@pytest.mark.parametrize(
    "name", [*(f"docs/{page}" for page in PAGES), "README.md", "CONTRIBUTING.md"]
)
def test_links_and_files_that_a_page_names_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s:#]+)(?:#[^)\s]*)?\)", prose):
        assert ((ROOT / name).parent / link).exists(), link
    for path in re.findall(r"`(tests/[\w/.]+|launchers/[\w/.-]+\.\w+|ds_configs/[\w.]+)`", prose):
        assert (ROOT / path).exists(), path
    for module in re.findall(r"python -m ((?:benchmarks|tests)[\w.]*)", prose):
        place = ROOT / module.replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists(), module


@pytest.mark.parametrize("name", [f"docs/{page}" for page in PAGES] + ["README.md"])
def test_flags_that_a_page_names_exist(name: str) -> None:
    known = {flag for command in all_commands().values() for flag in command.options_by_name()}
    text = (ROOT / name).read_text(encoding="utf-8")
    found = set(re.findall(r"(?<![\w-])--([a-z][\w-]*)", re.sub(r"<!--.*?-->", "", text)))
    assert found - known - FOREIGN_FLAGS == set()


def test_the_readme_is_short_and_begins_with_two_commands() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= MOST_README_LINES
    start = text[text.index("## Set up and go") :]
    block = re.search(r"```bash\n(.*?)```", start, re.DOTALL)
    assert block is not None
    assert [line.split("#")[0].strip() for line in block[1].splitlines()] == [
        "make demo",
        "make test",
    ]
