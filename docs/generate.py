"""MkDocs hook: reference pages made from the code, and files of the site from outside ``docs/``.

A page holds ``<!-- generate: NAME -->`` where generated text goes: ``commands``, ``command train``
(or any other command), ``profiles``, ``deepspeed`` or ``versions``.

Links are written as they work in the repository, such as ``../benchmarks/results/learning.png``.
Files that match ``PUBLISHED`` are part of the site at the same path, and links to and from them
are rewritten. Importing this module imports neither MkDocs nor torch; nothing uses a network.
"""

from __future__ import annotations

import functools
import html
import posixpath
import re
import sys
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING

ROOT = Path(__file__).resolve().parents[1]
if str(ROOT) not in sys.path:
    sys.path.insert(0, str(ROOT))

from s2s_scale import __version__  # noqa: E402
from s2s_scale.cli.help import FIRST_GROUPS, command_help  # noqa: E402
from s2s_scale.settings.commands import Command, all_commands  # noqa: E402
from s2s_scale.settings.options import Option  # noqa: E402
from s2s_scale.settings.profiles import resolve, shipped_folder  # noqa: E402
from s2s_scale.utils import package_version  # noqa: E402

if TYPE_CHECKING:
    from mkdocs.config.defaults import MkDocsConfig
    from mkdocs.structure.files import Files
    from mkdocs.structure.pages import Page

PUBLISHED = (
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "benchmarks/results/*.md",
    "benchmarks/results/*.png",
)
"""Files outside ``docs/`` that the site has too, as patterns below the repository's root."""
MARKER = re.compile(r"^<!-- generate: ([\w -]+) -->$", re.MULTILINE)
LINK = re.compile(r"\]\(([^)\s:#]+)(#[^)\s]*)?\)")
ETC = "[--flag\xa0value\xa0…]"
TYPE_NAMES = {"int": "N", "float": "X", "str": "TEXT", "dict": "JSON"}


# ---- Hooks, called by MkDocs ----


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the published files to those of ``docs/``."""
    from mkdocs.structure.files import File

    for path in published():
        source = str(ROOT / path)
        files.append(File.generated(config, path, abs_src_path=source))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Fill in the generated parts, and rewrite the links that leave or enter ``docs/``."""
    return site_links(expand(markdown), page.file.src_uri)


def on_page_content(html: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Mark inline code that is a flag, which must not be broken after its dashes."""
    return re.sub(r"<code>(--\w+)</code>", r'<code class="flag">\1</code>', html)


# ---- Links ----


@functools.cache
def published() -> tuple[str, ...]:
    """Paths of the published files below the repository's root."""
    found = (path for pattern in PUBLISHED for path in sorted(ROOT.glob(pattern)))
    return tuple(path.relative_to(ROOT).as_posix() for path in found)


def site_links(markdown: str, page: str) -> str:
    """``markdown`` with its links as they must be in the site.

    ``page``: the page's path in the site. A link is resolved as it stands in the repository.
    """
    source = page if page in published() else f"docs/{page}"

    def rewrite(match: re.Match[str]) -> str:
        path, anchor = match[1], match[2] or ""
        target = posixpath.normpath(posixpath.join(posixpath.dirname(source), path))
        if target.startswith("docs/"):
            target = target.removeprefix("docs/")
        elif target not in published():
            return match[0]
        relative = posixpath.relpath(target, posixpath.dirname(page) or ".")
        return f"]({relative}{anchor})"

    return LINK.sub(rewrite, markdown)


# ---- Generated text ----


def expand(markdown: str) -> str:
    """``markdown`` with its ``<!-- generate: NAME -->`` lines replaced."""

    def generate(match: re.Match[str]) -> str:
        name, _, argument = match[1].partition(" ")
        if name == "command":
            return command_section(all_commands()[argument])
        return {
            "commands": commands_table,
            "profiles": profiles_table,
            "deepspeed": deepspeed_files,
            "versions": versions,
        }[match[1]]()

    return MARKER.sub(generate, markdown)


def versions() -> str:
    """What the generated text was made from."""
    transformers = package_version("transformers")
    return f"s2s-scale {__version__} with transformers {transformers}."


def commands_table() -> str:
    """A row per command, with a link to its page."""
    rows = [
        f"| [`{command.name}`]({command.name}.md) | {escape(command.summary)} |"
        for command in all_commands().values()
    ]
    return "\n".join(["| command | what it does |", "|---|---|", *rows])


def command_section(command: Command) -> str:
    """Usage, description, examples and all options of a command, grouped as in ``--help``."""
    usage = command_help(command, width=10_000).partition("\n")[0].removeprefix("usage: ")
    kept = re.sub(r"(--\S+) ([A-Z]+)", "\\1\xa0\\2", usage).replace("[--flag value …]", ETC)
    wrapped = textwrap.wrap(kept, 76, subsequent_indent="    ", break_on_hyphens=False)
    lines = [
        escape(command.description),
        "",
        "```text",
        *(line.replace("\xa0", " ") for line in wrapped),
        "```",
        "",
        "```bash",
        *command.examples,
        "```",
        "",
    ]
    options = command.options()
    groups: dict[str, list[Option]] = {group: [] for group in FIRST_GROUPS}
    for option in options:
        groups.setdefault(option.group, []).append(option)
    names = frozenset(option.name for option in options)
    for group, members in groups.items():
        if members:
            lines += [f"## {group.capitalize()}", ""]
            lines += [definition(option, names) for option in members]
    return "\n".join(lines)


def definition(option: Option, names: frozenset[str]) -> str:
    """An entry of a definition list: flag, help, type, default. ``names``: flags of the page."""
    flags = ", ".join(f"`--{name}{value_of(option)}`" for name in (option.name, *option.aliases))
    kinds = " or ".join(re.sub(r"list\[(\w+)\]", r"list of \1", kind) for kind in option.kinds)
    facts = [f"type: {kinds}"]
    if option.required:
        facts.append("**required**")
    elif option.default in (None, "", [], {}):
        facts.append("default: not set")
    else:
        values = option.default if isinstance(option.default, list) else [option.default]
        facts.append("default: " + " ".join(code(value) for value in values))
    if option.choices:
        facts.append("one of: " + ", ".join(code(choice) for choice in option.choices))
    if option.const is not None and not option.is_bool:
        facts.append(f"without a value: {code(option.const)}")
    return (
        f"{flags} {{: #{option.name} }}\n\n"
        f":   {escape(str(option.help), names)}<br><small>{'; '.join(facts)}</small>\n"
    )


def value_of(option: Option) -> str:
    """What stands after a flag, such as `` N``; nothing for a flag that is complete alone."""
    kinds = [kind for kind in option.kinds if kind != "bool" and not kind.startswith("list[")]
    if not kinds and not option.is_list:
        return ""
    kind = "dict" if "dict" in kinds else kinds[0] if kinds else option.item_kind
    name = TYPE_NAMES[kind] + " …" * option.is_list
    return f" [{name}]" if option.const is not None else f" {name}"


def profiles_table() -> str:
    """A row per profile that ships with the package."""
    lines = [
        "| profile | what for | backend, launcher | processes | precision |",
        "|---|---|---|---|---|",
    ]
    for path in sorted((shipped_folder("launchers") / "profiles").glob("*.yaml")):
        found = resolve(str(path))
        precision = "bf16" if found.arguments.get("bf16") else found.precision
        lines.append(
            f"| `{found.name}` | {escape(found.description)} | `{found.backend}`, "
            f"`{found.launcher}` | `{found.processes}` | `{precision}` |"
        )
    return "\n".join(lines)


def deepspeed_files() -> str:
    """Every shipped DeepSpeed configuration, folded."""
    parts = []
    for path in sorted(shipped_folder("ds_configs").glob("*.json")):
        text = path.read_text(encoding="utf-8").rstrip().replace("\n", "\n    ")
        parts.append(f'??? note "`{path.stem}`"\n\n    ```json\n    {text}\n    ```\n')
    return "\n".join(parts)


def code(value: object) -> str:
    """A value as inline code."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return f"`{text}`"


def escape(text: str, names: frozenset[str] = frozenset()) -> str:
    """Plain text as Markdown. Flags become code, with links to those in ``names``."""

    def flag(match: re.Match[str]) -> str:
        shown = f"`{match[0]}`"
        return f"[{shown}](#{match[1]})" if match[1] in names else shown

    parts = re.split(r"(`[^`]+`)", " ".join(text.split()))
    for place in range(0, len(parts), 2):  # the others are code already
        plain = html.escape(parts[place], quote=False)
        plain = re.sub(r"([\\*\[\]])", r"\\\1", plain)
        plain = re.sub(r"\b_|_\b", r"\\_", plain)
        parts[place] = re.sub(r"(?<![\w-])--([a-z]\w*)", flag, plain)
    return "".join(parts)
