"""A report in Markdown as one page of HTML that opens from disk and from an e-mail: its pictures are inside."""

import re
from base64 import b64encode
from html import escape
from pathlib import Path

from markdown_it import MarkdownIt

STYLE = """
:root { --page: #fbfbfa; --card: #fff; --text: #1d2329; --soft: #5b6670; --edge: #e1e5e8; --wash: #f1f5f8;
  color-scheme: light dark; }
@media (prefers-color-scheme: dark) { :root { --page: #12171c; --card: #1a2027; --text: #e3e8ec; --soft: #a3adb6;
  --edge: #2e3740; --wash: #1f272e; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--page); color: var(--text);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
main { max-width: 1160px; margin: 0 auto; padding: 30px 20px 60px; }
h1 { font-size: clamp(1.45rem, 1.1rem + 1.6vw, 2.15rem); line-height: 1.2; }
h2 { font-size: 1.32rem; margin: 2.2em 0 .5em; }
p, li { max-width: 86ch; }
pre { background: var(--wash); border: 1px solid var(--edge); border-radius: 6px; padding: 7px 11px;
  white-space: pre-wrap; overflow-wrap: anywhere; }
code { font: .85em ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--edge); border-radius: 8px; margin: 1em 0; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; font-variant-numeric: tabular-nums; }
th, td { padding: 5px 11px; text-align: left; border-bottom: 1px solid var(--edge); white-space: nowrap; }
th { background: var(--wash); color: var(--soft); font-weight: 620; white-space: normal; vertical-align: bottom; }
td.words { white-space: normal; min-width: 15em; }
tr:last-child td { border-bottom: none; }
img { display: block; max-width: 100%; background: #fff; border: 1px solid var(--edge); border-radius: 8px;
  padding: 8px; margin: 1em 0; }
@media print { .scroll { overflow: visible; } th, td { white-space: normal; padding: 3px 5px; }
  table { font-size: 8pt; } img, tr { break-inside: avoid; } h2 { break-after: avoid; } }
"""


def page(text: str, folder: Path) -> str:
    """The page of a Markdown text whose pictures are PNG files in ``folder``. HTML in the text stays text."""
    body = MarkdownIt("commonmark", {"html": False}).enable("table").render(text)
    body = body.replace("<table>", '<div class="scroll"><table>').replace("</table>", "</table></div>")
    body = re.sub(r"<td>(?=[^<]{25})", '<td class="words">', body)
    body = re.sub(r'src="([^":/]+\.png)"', lambda found: f'src="{_inside(folder / found[1])}"', body)
    title = next((line.removeprefix("# ") for line in text.splitlines() if line.startswith("# ")), "Report")
    head = f'<meta charset="utf-8"><meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
    head += f"<style>{STYLE}</style>"
    whole = f'<html lang="en"><head>{head}</head>\n<body><main>\n{body}</main></body></html>'
    return f"<!doctype html>\n{whole}\n"


def _inside(picture: Path) -> str:
    return f"data:image/png;base64,{b64encode(picture.read_bytes()).decode()}"
