"""What mkdocs does not do by itself: the README as the first page, and the reference made from the code."""

from __future__ import annotations

import contextlib
import importlib
import io
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# page -> (title, what stands above the names, module whose public names are shown)
PAGES = {
    "operations": ("Operations", "`import diffdoctor`", "diffdoctor"),
    "detector": ("Detector", "`from diffdoctor.detector import ...`", "diffdoctor.detector"),
    "treat": ("Treatment", "`from diffdoctor.treat import ...`", "diffdoctor.treat"),
    "repairs": ("Repair", "`from diffdoctor.repairs import ...`", "diffdoctor.repairs"),
    "maps": ("Maps", "`from diffdoctor.maps import ...`", "diffdoctor.maps"),
}


def on_files(files, config):
    """Add the pages of the reference, and the first page."""
    from mkdocs.structure.files import File

    sys.path.insert(0, str(ROOT))
    pages = {f"reference/{name}.md": _names(*page) for name, page in PAGES.items()}
    pages["reference/commands.md"] = _commands()
    pages["index.md"] = _first_page()
    for name, text in pages.items():
        files.append(File.generated(config, name, content=text))
    return files


def on_page_markdown(markdown, page, **_):
    """Links out of docs/ to files of the repository become their names: the site stands alone."""
    return re.sub(r"\[([^]]+)\]\(\.\./[^)]*\)", r"\1", markdown)


def _first_page() -> str:
    text = (ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    # what is left are files beside the README
    return re.sub(
        r"\[([^]]+)\]\((?!https?:|#|[\w-]+\.md|images/)[^)]*\)|\[([^]]+)\]\(CONTRIBUTING\.md\)", r"\1\2", text
    )


def _names(title: str, above: str, module: str) -> str:
    package = importlib.import_module(module)
    parts = [f"# {title}", above]
    for name in sorted(package.__all__, key=str.lower):
        found = getattr(package, name)
        if hasattr(found, "__qualname__"):
            parts.append(f"::: {found.__module__}.{found.__qualname__}")
    return "\n\n".join(parts) + "\n"


def _commands() -> str:
    from diffdoctor.cli import COMMANDS, main

    parts = [
        "# Command line",
        "What `diffdoctor COMMAND --help` prints. Every option can stand in a YAML file, `--config`.",
    ]
    for command in COMMANDS:
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed), contextlib.suppress(SystemExit):
            main([*command.split(), "--help"])
        # argparse moves a terminal's cursor back before the value of an option that takes it after "="
        text = printed.getvalue().replace(" \b", "").rstrip()
        parts += [f"## diffdoctor {command}", f"```text\n{text}\n```"]
    return "\n\n".join(parts) + "\n"
