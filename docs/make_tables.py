"""Writes the README's table of decoding options, from their one declaration in the code.

python docs/make_tables.py            # rewrites the table in README.md
python docs/make_tables.py --print    # shows it
"""

import sys
from pathlib import Path

from perceptiondlm.generation_options import OPTIONS

README = Path(__file__).parents[1] / "README.md"
START, END = "<!-- decoding options: start -->", "<!-- decoding options: end -->"


def options_table() -> str:
    """Makes the Markdown table: name, default, which task, and what the option does."""
    rows = ["| option | default | for | what it does |", "|---|---|---|---|"]
    for name, declared in OPTIONS.items():
        default = "" if declared.default is None else f"`{declared.default!r}`"
        task = declared.metadata["task"] or "both"
        text = declared.metadata["text"].replace("|", "\\|")
        rows.append(f"| `{name}` | {default} | {task} | {text} |")
    return "\n".join(rows)


def with_table(text: str) -> str:
    """Puts the table between its two markers; raises ValueError where they are not there."""
    before, start, rest = text.partition(START)
    _, end, after = rest.partition(END)
    if not (start and end):
        raise ValueError(f"expected {START} ... {END} in the text, got none")
    return f"{before}{START}\n{options_table()}\n{END}{after}"


def main():
    """Rewrites the README, or prints the table."""
    if sys.argv[1:] == ["--print"]:
        print(options_table())
    else:
        README.write_text(with_table(README.read_text()))


if __name__ == "__main__":
    main()
