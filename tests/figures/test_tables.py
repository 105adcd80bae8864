"""Tables: bold best, escaping, unknown cells empty, files whole."""

import pandas as pd
import pytest

from vqlib.figures.tables import escape, latex, markdown, save_table

TABLE = pd.DataFrame(
    {
        "method": ["full_precision", "k-means & more", "VQ4DiT"],
        "FD": [1.16, 8.0, 1.789],
        "accuracy": [94.0, None, 91.0],
        "bits": [32, 2, 2],
    }
)
BEST = {"FD": "min", "accuracy": "max"}


def test_latex_is_a_whole_booktabs_table():
    text = latex(TABLE, caption="50 % of it", label="tab:main", best=BEST, formats={"FD": ".2f"})
    lines = text.splitlines()
    assert lines[1] == r"\begin{table}[t]" and lines[-1] == r"\end{table}"
    assert r"\begin{tabular}{lrrr}" in lines and r"\caption{50 \% of it}" in lines and r"\label{tab:main}" in lines
    assert [line for line in lines if "rule" in line] == [r"\toprule", r"\midrule", r"\bottomrule"]
    assert r"method & FD $\downarrow$ & accuracy $\uparrow$ & bits \\" in lines
    assert r"full\_precision & \textbf{1.16} & \textbf{94} & 32 \\" in lines
    assert r"k-means \& more & 8.00 &  & 2 \\" in lines  # the unknown accuracy is empty
    assert r"VQ4DiT & 1.79 & 91 & 2 \\" in lines
    assert r"\begin{table*}[t]" in latex(TABLE, wide=True)


def test_cells_that_print_alike_are_bold_together():
    text = markdown(pd.DataFrame({"FD": [1.001, 1.004, 2.0]}), best={"FD": "min"}, formats={"FD": ".2f"})
    assert text == "| FD ↓ |\n| ---: |\n| **1.00** |\n| **1.00** |\n| 2.00 |\n"


def test_a_column_without_figures_has_no_best():
    text = markdown(pd.DataFrame({"sFID": [None, None]}, dtype=float), best={"sFID": "min"})
    assert "**" not in text and text.endswith("|  |\n|  |\n")


def test_best_must_name_a_column_and_a_direction():
    with pytest.raises(ValueError, match="no column 'FID'.*method, FD"):
        latex(TABLE, best={"FID": "min"})
    with pytest.raises(ValueError, match=r"best\['FD'\]='low' is not"):
        latex(TABLE, best={"FD": "low"})


def test_every_special_character_is_escaped():
    assert escape(r"a_b & 5% $x$ #1 {y} ~ ^ \z") == (
        r"a\_b \& 5\% \$x\$ \#1 \{y\} \textasciitilde{} \textasciicircum{} \textbackslash{}z"
    )
    assert markdown(pd.DataFrame({"a|b": ["c|d"]})) == "| a\\|b |\n| --- |\n| c\\|d |\n"


def test_save_table_writes_both_and_keeps_full_precision_in_csv(tmp_path):
    paths = save_table(TABLE, tmp_path / "new" / "main.v2", best=BEST, formats={"FD": ".1f"})
    assert {kind: path.name for kind, path in paths.items()} == {"csv": "main.v2.csv", "tex": "main.v2.tex"}
    pd.testing.assert_frame_equal(pd.read_csv(paths["csv"]), TABLE)
    assert "1.2" in paths["tex"].read_text() and "1.16" not in paths["tex"].read_text()
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["main.v2.csv", "main.v2.tex"]  # no leftovers


def test_each_group_has_its_own_best_and_a_rule_before_it():
    within = pd.Series([None, "2 bits", "2 bits"])
    text = markdown(TABLE, best={"FD": "min"}, formats={"FD": ".2f"}, within=within)
    assert "**1.79**" in text and text.count("**") == 2  # full precision is smaller, and not compared
    lines = latex(TABLE, best={"FD": "min"}, within=within).splitlines()
    assert lines.count(r"\midrule") == 2 and lines[lines.index(r"\midrule", 8) + 1].startswith("k-means")


def test_an_index_that_says_something_is_kept_and_row_numbers_are_not(tmp_path):
    df = pd.DataFrame({"bits": [2, 3, 2], "fd": [1.0, 2.0, 3.0]})
    grouped = df.groupby("bits")[["fd"]].mean()
    assert save_table(grouped, tmp_path / "t")["csv"].read_text() == "bits,fd\n2,2.0\n3,2.0\n"
    assert "| 2 | 2 |" in markdown(grouped) and "2 & 2 " in latex(grouped)
    assert markdown(df[df["fd"] > 1]).splitlines()[0] == "| bits | fd |"
    assert "| ours | 1 |" in markdown(pd.DataFrame({"fd": [1.0]}, index=["ours"]))


def test_groups_follow_their_rows_through_a_sort():
    df = pd.DataFrame({"method": list("abcd"), "fd": [4.0, 3.0, 2.0, 1.0]})
    within = pd.Series([0, 0, 1, 1])
    text = markdown(df.sort_values("fd"), best={"fd": "min"}, within=within)
    assert "**3**" in text and "**1**" in text and "**2**" not in text
    with pytest.raises(ValueError, match="within has 3 values for 4 rows"):
        markdown(df, within=within[:3])
    with pytest.raises(ValueError, match="within has another index than the 4 rows"):
        markdown(df, within=within.set_axis([7, 8, 9, 10]))


def test_two_columns_of_one_name_are_refused():
    with pytest.raises(ValueError, match="two columns are called 'fd'"):
        markdown(pd.DataFrame([[1, 2]], columns=["fd", "fd"]))


def test_what_a_row_begins_with_is_no_argument_of_the_rule_before_it():
    lines = latex(pd.DataFrame({"a": ["[x]", "*y", "z"], "b": [1, 2, 3]})).splitlines()
    assert [line for line in lines if line.endswith(r"\\")][1:] == [r"{}[x] & 1 \\", r"{}*y & 2 \\", r"z & 3 \\"]
