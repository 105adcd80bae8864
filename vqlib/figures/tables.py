"""DataFrames to tables: LaTeX (booktabs) and CSV side by side, or Markdown. Unknown cells stay empty."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

import pandas as pd

from vqlib.system.files import write_bytes

LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"$<$", ">": r"$>$", "|": r"$|$", "×": r"$\times$",
    "±": r"$\pm$", "−": r"$-$", "–": "--", "—": "---", "≤": r"$\leq$", "≥": r"$\geq$", "≈": r"$\approx$",
    "→": r"$\rightarrow$", "↑": r"$\uparrow$", "↓": r"$\downarrow$", "λ": r"$\lambda$", "σ": r"$\sigma$",
    "·": r"$\cdot$", "…": r"\ldots{}", "é": r"\'e", "°": r"$^\circ$", "²": r"$^2$", "†": r"$\dagger$", "\n": " ",
})  # fmt: skip
ARROWS = {"min": "↓", "max": "↑"}


def save_table(
    df: pd.DataFrame, stem: str | Path, caption: str = "", label: str = "", wide: bool = False, **look
) -> dict[str, Path]:
    """Write `<stem>.csv` (full precision) and `<stem>.tex` (ready to \\input); returns {suffix: path}. See `latex`."""
    stem = Path(stem).expanduser()
    contents = {"csv": _flat(df).to_csv(index=False), "tex": latex(df, caption, label, wide, **look)}
    return {kind: write_bytes(stem.parent / f"{stem.name}.{kind}", text.encode()) for kind, text in contents.items()}


def latex(df: pd.DataFrame, caption: str = "", label: str = "", wide: bool = False, **look) -> str:
    """A whole `table` environment with booktabs rules, by pandas' Styler; `look` is best, formats, within of `markdown`.

    Text is escaped, numbers are right-aligned; `wide`: across both columns.
    """
    cells, bold, groups = _printed(df, escape, **look)
    cells.columns = bold.columns = [_stacked(name) for name in cells]
    align = "".join("r" if pd.api.types.is_numeric_dtype(kind) else "l" for kind in _flat(df).dtypes)
    styled = cells.style.hide(axis="index").apply(
        lambda _: bold.map({True: "textbf:--rwrap", False: ""}.get), axis=None
    )
    place = {"position": "t", "position_float": "centering", "environment": "table*" if wide else "table"}
    text = styled.to_latex(column_format=align, hrules=True, caption=escape(caption), label=label or None, **place)
    head, rule, body = text.partition("\\midrule\n")
    # What a row begins with is never taken for an argument of the \\ or the rule before it, as [ and * would be.
    rows = [f"{{}}{line}" if line[:1] in ("[", "*") else line for line in body.splitlines(keepends=True)]
    for i in reversed(range(1, len(groups))):
        if groups[i] != groups[i - 1]:
            rows.insert(i, rule)
    if wide:
        head = head.replace("\\centering\n", "\\centering\n\\small\n\\setlength{\\tabcolsep}{4pt}\n")
    return "".join(["% needs \\usepackage{booktabs}\n", head, rule, *rows])


def markdown(
    df: pd.DataFrame,
    best: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
    within: pd.Series | None = None,
) -> str:
    """The same table for a README or a notebook.

    `best`: column -> 'min' or 'max', in bold; `formats`: column -> spec such as '.2f'; `within`: one value a row, the best
    of each value is bold, rules part them in LaTeX; rows without a value are not compared.
    """
    cells, bold, _ = _printed(df, _escape_markdown, best, formats, within)
    rule = ["---:" if pd.api.types.is_numeric_dtype(kind) else "---" for kind in _flat(df).dtypes]
    rows = cells.where(~bold, "**" + cells + "**").to_numpy().tolist()
    return "".join(f"| {' | '.join(row)} |\n" for row in [list(cells), rule, *rows])


def escape(text: str) -> str:
    """Text that LaTeX prints as it stands here. Characters it cannot type are left to \\usepackage[utf8]{inputenc}."""
    return str(text).translate(LATEX)


def _stacked(header: str) -> str:
    """A LaTeX heading in two lines where it has a comma."""
    first, comma, second = header.partition(", ")
    return rf"\shortstack[r]{{{first}\\{second}}}" if comma else header


def _escape_markdown(text: str) -> str:
    return str(text).replace("|", r"\|").replace("\n", " ")


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


def _groups(df: pd.DataFrame, within: pd.Series | None) -> list:
    """The group of each row, found by its index, None for a row that is not compared; one group without `within`.

    Raises ValueError where a row has no value in `within`.
    """
    if within is None:
        return [""] * len(df)
    if len(within) != len(df):
        raise ValueError(f"within has {len(within)} values for {len(df)} rows")
    if isinstance(within, pd.Series) and not within.index.equals(df.index):
        if not df.index.is_unique or not df.index.isin(within.index).all():
            raise ValueError(f"within has another index than the {len(df)} rows of the table")
        within = within.reindex(df.index)
    return [None if pd.isna(value) else value for value in within]


def _printed(
    df: pd.DataFrame,
    escaped: Callable[[str], str],
    best: Mapping[str, str] | None = None,
    formats: Mapping[str, str] | None = None,
    within: pd.Series | None = None,
) -> tuple[pd.DataFrame, pd.DataFrame, list]:
    """Printed cells under their headings, which of them are bold, and each row's group.

    Cells of a group that print like its best value are bold together.
    """
    best, formats, groups, df = dict(best or {}), dict(formats or {}), _groups(df, within), _flat(df)
    for name, given in {**best, **formats}.items():
        if name not in df:
            raise ValueError(f"no column {name!r} (given {given!r}); columns: {', '.join(map(str, df.columns))}")
    cells = pd.DataFrame({name: [_print(v, formats.get(name), escaped) for v in df[name]] for name in df}, dtype=object)
    bold = pd.DataFrame(False, index=cells.index, columns=cells.columns)
    group = pd.Series(groups, index=cells.index, dtype=object)
    for name, direction in best.items():
        if direction not in ARROWS:
            raise ValueError(f"best[{name!r}]={direction!r} is not 'min' or 'max'")
        values = pd.to_numeric(df[name]).astype(float)
        winners = cells[name].where(values == values.groupby(group).transform(direction))
        bold[name] = cells[name] == winners.groupby(group).transform("first")
    headings = [escaped(f"{name} {ARROWS[best[name]]}" if name in best else name) for name in df]
    return cells.set_axis(headings, axis=1), bold.set_axis(headings, axis=1), groups


def _print(value: object, spec: str | None, escaped: Callable[[str], str]) -> str:
    if value is None or value is pd.NA or value != value:  # NaN is the only value that differs from itself
        return ""
    if spec is None and isinstance(value, float):
        spec = ".4g" if abs(value) < 1e4 else ".0f"
    return escaped(format(value, spec) if spec else str(value))
