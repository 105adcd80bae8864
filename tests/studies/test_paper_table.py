"""The compact table: one line a method and bits, quoted figures marked, unknown cells empty, groups for the bold face."""

import pandas as pd
import pytest

from vqlib.figures.tables import latex
from vqlib.studies.paper_table import PAPER, QUOTED, compact, export, quoted_figures

DISTANCE = "FD (fashion)"


def line(method, bits, steps=50, images=5000, fd=1.0):
    return {
        "method": method,
        "bits": bits,
        "bits per weight": (bits or 16) + 0.2,
        "size (MiB)": 2.0,
        "steps": steps,
        "CFG": 1.5,
        "seeds": f"0–{images - 1}",
        DISTANCE: fd,
        "IS (fashion)": 9.0,
        "precision": 0.5,
        "recall": 0.4,
        "accuracy": 0.9,
        "images": images,
    }


TABLE = pd.DataFrame(
    [
        line("full precision", None),
        line("GPTQ", 4),
        line("GPTQ", 2, fd=9.0),
        line("VQ4DiT", 2, fd=2.0),
        line("full precision", None, 100, 1000),
        line("VQ4DiT", 2, 100, 1000, fd=2.5),
        line("VQ4DiT", 2, 250, 500, fd=3.5),
    ]
).astype({"bits": "Int64"})


def test_one_line_a_method_with_the_other_steps_beside():
    frame, options = compact(TABLE)
    group = options["within"]
    assert frame["method"].tolist() == ["full precision", "GPTQ", "GPTQ", "VQ4DiT"]
    last = frame.iloc[3]
    assert last["FD-5k (fashion), 50 steps"] == 2.0 and last["FD-1k (fashion), 100 steps"] == 2.5
    assert last["FD-500 (fashion), 250 steps"] == 3.5 and pd.isna(frame.iloc[2]["FD-500 (fashion), 250 steps"])
    assert group.isna().tolist() == [True, False, False, False] and group.tolist()[1:] == [4, 2, 2]


def test_a_method_without_the_row_that_the_columns_are_named_by_is_left_out():
    rows = pd.DataFrame([line("full precision", None), line("VQ4DiT", 2, 100, 1000)]).astype({"bits": "Int64"})
    assert compact(rows)[0]["method"].tolist() == ["full precision"]


def test_quoted_figures_stand_in_marked_columns_beside_the_same_method_and_bits():
    frame, options = compact(TABLE, quoted_figures())
    column = "† FID, DiT-XL/2 256"
    cells = {(row["method"], None if pd.isna(row["bits"]) else row["bits"]): row[column] for _, row in frame.iterrows()}
    assert cells[f"{PAPER} †", 2] == "12.42" and cells["GPTQ", 2] == "> 300" and pd.isna(cells["GPTQ", 4])
    assert pd.isna(cells["VQ4DiT", 2])  # recipe `best`, which nobody has run there
    assert cells["full precision", None] == "2.27 (50k, 250 steps)"
    assert cells["RepQ-ViT †", 2] == cells["Q-DiT †", 2] == "> 300"
    assert frame.set_index("method").loc[f"{PAPER} †", "† FID, DiT-XL/2 512"] == "35.08"
    beside, _ = compact(pd.concat([TABLE, pd.DataFrame([line(PAPER, 2)])]), quoted_figures())
    assert beside.set_index("method").loc[PAPER, column] == "12.42" and f"{PAPER} †" not in set(beside["method"])
    only = frame[frame["method"].str.endswith("†")]
    assert only["FD-5k (fashion), 50 steps"].isna().all() and options["within"][only.index].isna().all()


def test_a_figure_without_a_number_is_not_quoted(tmp_path):
    rows = pd.read_csv(QUOTED)
    rows.loc[rows["method"] == "VQ4DiT", "fid"] = None
    rows.to_csv(tmp_path / "fid.csv", index=False)
    assert PAPER not in quoted_figures(tmp_path / "fid.csv").index.get_level_values("method")


def test_several_quoted_figures_stand_side_by_side_and_an_unknown_count_is_not_printed(tmp_path):
    rows = pd.read_csv(QUOTED)
    more = rows[(rows["method"] == "VQ4DiT") & (rows["resolution"] == 256)].assign(timesteps=50, fid=12.5, images=None)
    pd.concat([rows, more]).to_csv(tmp_path / "fid.csv", index=False)
    found = quoted_figures(tmp_path / "fid.csv").loc[(PAPER, 2)]
    assert found["† FID, DiT-XL/2 256"] == "12.42, 12.5 (50 steps)"


def test_the_best_of_each_bit_width_is_bold_and_full_precision_never():
    frame, options = compact(TABLE, quoted_figures())
    lines = latex(frame, **options).splitlines()
    bold = [(line.split(" & ")[:2], line.count(r"\textbf")) for line in lines if r"\textbf" in line]
    # GPTQ is alone at 4 bits; at 2, columns that tie are bold together
    assert bold == [(["GPTQ", "4"], 5), (["GPTQ", "2"], 4), (["VQ4DiT", "2"], 7)]
    assert lines.count(r"\midrule") == 4
    text = "\n".join(lines)
    assert r"\shortstack[r]{$\dagger$ FID\\DiT-XL/2 256}" in text and "$>$ 300" in text
    assert r"\shortstack[r]{FD-5k (fashion)\\50 steps $\downarrow$}" in text
    with pytest.raises(ValueError, match="within has 1 values for 7 rows"):
        latex(frame, within=options["within"][:1])


def test_export_writes_both_tables_as_csv_and_latex(tmp_path):
    paths = export(TABLE, "5 % of it", tmp_path)
    assert sorted(paths) == ["all_rows.csv", "all_rows.tex", "main_table.csv", "main_table.tex"]
    assert (
        len(pd.read_csv(paths["all_rows.csv"])) == 7 and r"\caption{5 \% of it}" in paths["main_table.tex"].read_text()
    )
