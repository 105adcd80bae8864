"""DataFrames to tables: LaTeX (booktabs) and CSV side by side, or Markdown. Unknown cells stay empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from vqlib.files import write_bytes

LATEX = {
    "\\": r"\textbackslash{}",
    "&": r"\&",
    "%": r"\%",
    "$": r"\$",
    "#": r"\#",
    "_": r"\_",
    "{": r"\{",
    "}": r"\}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"$<$",
    ">": r"$>$",
    "|": r"$|$",
    "×": r"$\times$",
    "±": r"$\pm$",
    "−": r"$-$",
    "–": "--",
    "—": "---",
    "≤": r"$\leq$",
    "≥": r"$\geq$",
    "≈": r"$\approx$",
    "→": r"$\rightarrow$",
    "↑": r"$\uparrow$",
    "↓": r"$\downarrow$",
    "λ": r"$\lambda$",
    "σ": r"$\sigma$",
    "·": r"$\cdot$",
    "…": r"\ldots{}",
    "é": r"\'e",
    "°": r"$^\circ$",
    "²": r"$^2$",
    "\n": " ",
}
ARROWS = {"min": "↓", "max": "↑"}

Formats = Mapping[str, str]
Best = Mapping[str, str]


def save_table(
    df: pd.DataFrame,
    stem: str | Path,
    caption: str = "",
    label: str = "",
    best: Best | None = None,
    formats: Formats | None = None,
    wide: bool = False,
) -> dict[str, Path]:
    """Write `<stem>.csv` (full precision) and `<stem>.tex` (ready to \\input); returns {suffix: path}.

    `best`: column -> 'min' or 'max', in bold; `formats`: column -> spec such as '.2f'; `wide`: across both columns.
    """
    stem = Path(stem)
    contents = {"csv": df.to_csv(index=False), "tex": latex(df, caption, label, best, formats, wide)}
    return {
        kind: write_bytes(stem.parent / f"{stem.name}.{kind}", text.encode()) for kind, text in contents.items()
    }


def latex(
    df: pd.DataFrame,
    caption: str = "",
    label: str = "",
    best: Best | None = None,
    formats: Formats | None = None,
    wide: bool = False,
) -> str:
    """A whole `table` environment with booktabs rules. Text is escaped, numbers are right-aligned."""
    cells, bold = _cells(df, best, formats, escape)
    head = " & ".join(_headers(df, best, escape))
    rows = [
        " & ".join(rf"\textbf{{{c}}}" if b else c for c, b in zip(*row, strict=True))
        for row in zip(cells, bold, strict=True)
    ]
    align = "".join("r" if pd.api.types.is_numeric_dtype(df[column]) else "l" for column in df)
    environment = "table*" if wide else "table"
    lines = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{{environment}}}[t]",
        r"\centering",
        *([rf"\caption{{{escape(caption)}}}"] if caption else []),
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *(rf"{row} \\" for row in rows),
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{{environment}}}",
    ]
    return "\n".join(lines) + "\n"


def markdown(df: pd.DataFrame, best: Best | None = None, formats: Formats | None = None) -> str:
    """The same table for a README or a notebook."""
    cells, bold = _cells(df, best, formats, _escape_markdown)
    rows = [[f"**{c}**" if b else c for c, b in zip(*row, strict=True)] for row in zip(cells, bold, strict=True)]
    rule = ["---:" if pd.api.types.is_numeric_dtype(df[column]) else "---" for column in df]
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in [_headers(df, best, _escape_markdown), rule, *rows]) + "\n"
    )


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands here. Characters it cannot type are left to \\usepackage[utf8]{inputenc}."""
    return "".join(LATEX.get(character, character) for character in str(text))


def _escape_markdown(text: str) -> str:
    return str(text).replace("|", r"\|").replace("\n", " ")


def _headers(df: pd.DataFrame, best: Best | None, escaped: Callable[[str], str]) -> list[str]:
    return [escaped(f"{column} {ARROWS[best[column]]}" if best and column in best else str(column)) for column in df]


def _cells(
    df: pd.DataFrame, best: Best | None, formats: Formats | None, escaped: Callable[[str], str]
) -> tuple[list[list[str]], list[list[bool]]]:
    """Printed cells and which of them are bold, row by row. Cells that print alike are bold together."""
    best, formats = dict(best or {}), dict(formats or {})
    for name, given in {**best, **formats}.items():
        if name not in df:
            raise ValueError(f"no column {name!r} (given {given!r}); columns: {', '.join(map(str, df.columns))}")
    for name, direction in best.items():
        if direction not in ARROWS:
            raise ValueError(f"best[{name!r}]={direction!r} is not 'min' or 'max'")
    columns, bold = [], []
    for name in df:
        printed = [_print(value, formats.get(name), escaped) for value in df[name]]
        winner = _winner(df[name], best.get(name))
        target = printed[winner] if winner is not None else None
        columns.append(printed)
        bold.append([text != "" and text == target for text in printed])
    return [list(row) for row in zip(*columns, strict=True)], [list(row) for row in zip(*bold, strict=True)]


def _winner(column: pd.Series, direction: str | None) -> int | None:
    """Position of the best known value; None where no best is asked for or nothing is known."""
    if direction is None or column.notna().sum() == 0:
        return None
    values = column.astype(float).to_numpy()
    known = [i for i, missing in enumerate(column.isna()) if not missing]
    return (min if direction == "min" else max)(known, key=lambda i: values[i])


def _print(value: object, spec: str | None, escaped: Callable[[str], str]) -> str:
    if value is None or value is pd.NA or value != value:  # NaN is the only value that differs from itself
        return ""
    if spec is not None:
        return escaped(format(value, spec))
    if isinstance(value, float):
        return escaped(f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}")
    return escaped(str(value))
