"""Make the README's pictures from real commands: `python docs/make_pictures.py RUN [OTHER RUN]`.

The terminal shows what `qpref train` prints, so RUN's folder is trained again; a headless Chromium (Debian:
chromium-headless-shell) shows the report of all runs.
"""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from rich.console import Console
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
RECIPE = "recipes/quickstart.toml"
COLUMNS = 120
BROWSERS = ("chromium-headless-shell", "chromium", "chromium-browser", "google-chrome")
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>.{unique_id}-matrix {{ font-family: monospace; font-size: {char_height}px; line-height: {line_height}px; }}
.{unique_id}-title {{ font-size: 18px; font-weight: bold; font-family: sans-serif; }} {styles}</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
{chrome}
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">{backgrounds}
<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""
"""rich's own, without the font that it loads from the network."""


def terminal(run: Path) -> None:
    """Train the quickstart and keep what it prints as an SVG."""
    command = ["qpref", "train", RECIPE, "--output", str(run), "--overwrite"]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    console = Console(record=True, width=COLUMNS, file=io.StringIO())
    console.print(Text(f"$ qpref train {RECIPE}", style="bold green"))
    console.print(Text(done.stdout.rstrip().replace(str(run), "runs/quickstart")))
    PICTURES.mkdir(exist_ok=True)
    console.save_svg(str(PICTURES / "terminal.svg"), title="qpref", code_format=SVG)


def report(runs: list[Path]) -> None:
    """Show the report of the runs in a browser and keep the picture."""
    browser = next(path for name in BROWSERS if (path := shutil.which(name)))
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        subprocess.run(["qpref", "report", *map(str, runs), "--output", str(page)], check=True)
        subprocess.run(
            [browser, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1100,1000",
             f"--screenshot={PICTURES / 'report.png'}", page.as_uri()],
            check=True,
        )  # fmt: skip


if __name__ == "__main__":
    folders = [Path(name) for name in sys.argv[1:]]
    terminal(folders[0])
    report(folders)
