"""DataFrames to tables: LaTeX (booktabs) and CSV side by side, or Markdown. Unknown cells stay empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from vqlib.system.files import write_bytes

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
    "†": r"$\dagger$",
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
    within: pd.Series | None = None,
) -> dict[str, Path]:
    """Write `<stem>.csv` (full precision) and `<stem>.tex` (ready to \\input); returns {suffix: path}.

    `best`: column -> 'min' or 'max', in bold; `formats`: column -> spec such as '.2f'; `wide`: across both columns;
    `within`: one value a row, the best of each value is bold, rules part them; rows without a value are not compared.
    """
    stem, within = Path(stem).expanduser(), _aligned(df, within)
    df = _flat(df)
    contents = {"csv": df.to_csv(index=False), "tex": latex(df, caption, label, best, formats, wide, within)}
    return {kind: write_bytes(stem.parent / f"{stem.name}.{kind}", text.encode()) for kind, text in contents.items()}


def latex(
    df: pd.DataFrame,
    caption: str = "",
    label: str = "",
    best: Best | None = None,
    formats: Formats | None = None,
    wide: bool = False,
    within: pd.Series | None = None,
) -> str:
    """A whole `table` environment with booktabs rules. Text is escaped, numbers are right-aligned. See `save_table`."""
    groups = _groups(df, _aligned(df, within))
    df = _flat(df)
    cells, bold = _cells(df, best, formats, escape, groups)
    head = " & ".join(map(_stacked, _headers(df, best, escape)))
    rows = [
        " & ".join(rf"\textbf{{{c}}}" if b else c for c, b in zip(*row, strict=True)) + r" \\"
        for row in zip(cells, bold, strict=True)
    ]
    breaks = [i for i in range(1, len(groups)) if groups[i] != groups[i - 1]]
    for i in reversed(breaks):
        rows.insert(i, r"\midrule")
    align = "".join("r" if pd.api.types.is_numeric_dtype(df[column]) else "l" for column in df)
    environment = "table*" if wide else "table"
    lines = [
        "% needs \\usepackage{booktabs}",
        rf"\begin{{{environment}}}[t]",
        r"\centering",
        *([r"\small", r"\setlength{\tabcolsep}{4pt}"] if wide else []),
        *([rf"\caption{{{escape(caption)}}}"] if caption else []),
        *([rf"\label{{{label}}}"] if label else []),
        rf"\begin{{tabular}}{{{align}}}",
        r"\toprule",
        rf"{head} \\",
        r"\midrule",
        *rows,
        r"\bottomrule",
        r"\end{tabular}",
        rf"\end{{{environment}}}",
    ]
    return "\n".join(lines) + "\n"


def markdown(
    df: pd.DataFrame, best: Best | None = None, formats: Formats | None = None, within: pd.Series | None = None
) -> str:
    """The same table for a README or a notebook."""
    groups = _groups(df, _aligned(df, within))
    df = _flat(df)
    cells, bold = _cells(df, best, formats, _escape_markdown, groups)
    rows = [[f"**{c}**" if b else c for c, b in zip(*row, strict=True)] for row in zip(cells, bold, strict=True)]
    rule = ["---:" if pd.api.types.is_numeric_dtype(df[column]) else "---" for column in df]
    return (
        "\n".join("| " + " | ".join(row) + " |" for row in [_headers(df, best, _escape_markdown), rule, *rows]) + "\n"
    )


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands here. Characters it cannot type are left to \\usepackage[utf8]{inputenc}."""
    return "".join(LATEX.get(character, character) for character in str(text))


def _stacked(header: str) -> str:
    """A LaTeX heading in two lines where it has a comma."""
    first, comma, second = header.partition(", ")
    return rf"\shortstack[r]{{{first}\\{second}}}" if comma else header


def _escape_markdown(text: str) -> str:
    return str(text).replace("|", r"\|").replace("\n", " ")


def _headers(df: pd.DataFrame, best: Best | None, escaped: Callable[[str], str]) -> list[str]:
    return [escaped(f"{column} {ARROWS[best[column]]}" if best and column in best else str(column)) for column in df]


def _flat(df: pd.DataFrame) -> pd.DataFrame:
    """The table with an index that says something (a name, words) as its first columns; bare row numbers are dropped.

    Raises ValueError for two columns of one name.
    """
    says = any(name is not None for name in df.index.names) or not pd.api.types.is_integer_dtype(df.index.dtype)
    found = df.reset_index(drop=not (says and len(df)))
    twice = found.columns[found.columns.duplicated()]
    if len(twice):
        raise ValueError(f"two columns are called {twice[0]!r}")
    return found


def _aligned(df: pd.DataFrame, within: pd.Series | None) -> pd.Series | None:
    """`within` in the order of the table's rows, found by their index; ValueError where a row has no value there."""
    if within is not None and len(within) != len(df):
        raise ValueError(f"within has {len(within)} values for {len(df)} rows")
    if not isinstance(within, pd.Series) or within.index.equals(df.index):
        return within
    if not df.index.is_unique or not df.index.isin(within.index).all():
        raise ValueError(f"within has another index than the {len(df)} rows of the table")
    return within.reindex(df.index)


def _groups(df: pd.DataFrame, within: pd.Series | None) -> list:
    """The group of each row, None for a row that is not compared; one group where `within` is not given."""
    if within is None:
        return [""] * len(df)
    return [None if pd.isna(value) else value for value in within]


def _cells(
    df: pd.DataFrame, best: Best | None, formats: Formats | None, escaped: Callable[[str], str], groups: list
) -> tuple[list[list[str]], list[list[bool]]]:
    """Printed cells and which of them are bold, row by row. Cells of a group that print alike are bold together."""
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
        winners = _winners(df[name], best.get(name), groups)
        columns.append(printed)
        bold.append(
            [
                text != "" and text == printed[winners.get(g, i)] and g in winners
                for i, (text, g) in enumerate(zip(printed, groups, strict=True))
            ]
        )
    return [list(row) for row in zip(*columns, strict=True)], [list(row) for row in zip(*bold, strict=True)]


def _winners(column: pd.Series, direction: str | None, groups: list) -> dict:
    """Position of the best known value of each group; nothing where no best is asked for or nothing is known."""
    if direction is None:
        return {}
    found: dict = {}
    values = pd.to_numeric(column).astype(float).to_numpy()
    for i, group in enumerate(groups):
        if group is None or values[i] != values[i]:  # NaN is the only value that differs from itself
            continue
        held = found.get(group)
        if held is None or (values[i] < values[held] if direction == "min" else values[i] > values[held]):
            found[group] = i
    return found


def _print(value: object, spec: str | None, escaped: Callable[[str], str]) -> str:
    if value is None or value is pd.NA or value != value:  # NaN is the only value that differs from itself
        return ""
    if spec is not None:
        return escaped(format(value, spec))
    if isinstance(value, float):
        return escaped(f"{value:.4g}" if abs(value) < 1e4 else f"{value:.0f}")
    return escaped(str(value))
