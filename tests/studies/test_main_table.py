"""The main table: its rows, made once, by several processes, resumed, and read back in order."""

import dataclasses
from types import SimpleNamespace

import pytest
import tiny

from vqlib.config import RECIPES, CalibrationConfig
from vqlib.studies import bench, main_table, row_tasks
from vqlib.studies.baselines.gptq import GPTQ
from vqlib.studies.few_bits import MOVING, OURS, choices
from vqlib.studies.main_table import TABLES, Bench, Row, TableConfig, make_table, read_table
from vqlib.studies.processes import Here, Processes

SMALL = TableConfig(
    images=130, steps=1, iterations=2, distillation=2, hessian_batches=1, bootstrap=3, longer=((2, 129),), longer_methods=(),
    methods=(("GPTQ", (2,)), ("k-means", (2,)), ("VQ4DiT", (2,))),
)  # fmt: skip


def test_rows_start_with_full_precision_then_most_bits_first_and_longer_sampling_last():
    config = TableConfig(
        methods=(("k-means", (4, 2)), ("VQ4DiT", (2,))), longer=((100, 1000),), longer_methods=(("VQ4DiT", 2),)
    )
    rows = [(row.method, row.bits, row.steps, row.images) for row in config.rows()]
    assert rows == [
        ("full precision", None, 50, 5000), ("k-means", 4, 50, 5000), ("k-means", 2, 50, 5000), ("VQ4DiT", 2, 50, 5000),
        ("full precision", None, 100, 1000), ("VQ4DiT", 2, 100, 1000),
    ]  # fmt: skip
    assert str(Row("k-means", 2, 50, 5000)) == "k-means, 2 bits, 50 steps, 5000 images"
    with pytest.raises(ValueError, match="method 'AWQ' is not one of full precision, RTN"):
        Bench(TableConfig(methods=(("AWQ", (2,)),)), "nowhere", tiny.pipeline())
    with pytest.raises(ValueError, match=r"RTN at 5 bits: a group's size is known for \[2, 3, 4\] bits"):
        Bench(TableConfig(methods=(("RTN", (5,)),)), "nowhere", tiny.pipeline())
    with pytest.raises(ValueError, match="100 images against 10000 of the reference are too few for 128"):
        Bench(TableConfig(images=100), "nowhere", tiny.pipeline())  # before anything is trained
    assert config.replace(methods=[["GPTQ", [4]]]).methods == (("GPTQ", (4,)),)
    paper = TableConfig(recipe="paper")  # which has no last stage
    assert not any("distilled" in row.method for row in paper.rows()) and "last stage" not in paper.caption


def test_the_bundled_table_has_what_the_paper_compares():
    rows = TABLES["dit-mini-fashion"].rows()
    assert {row.images for row in rows if row.steps == 50} == {5000} and {row.steps for row in rows} == {50, 100, 250}
    for bits in (4, 3, 2):
        methods = {"RTN", "GPTQ", "k-means", "VQ4DiT", "VQ4DiT, distilled"}
        assert methods <= {row.method for row in rows if row.bits == bits}
    two = {row.method for row in rows if row.bits == 2}
    assert {"codebook only", "GPTVQ-like", "GPTVQ-like, calibrated"} <= two
    shared = TableConfig(
        methods=(("VQ4DiT", (2,)),), base=CalibrationConfig(batch_size=4, steps=25, guidance_scale=4.0), seed=7
    ).caption
    assert "500 iterations of calibration (recipe best; batch 4, 25 steps, CFG 4.0, seed 7). †" in shared
    last = TableConfig(methods=(("VQ4DiT, distilled", (2,)),), distillation=7).caption
    assert "seed 0), 7 of the last stage where it is distilled. †" in last
    large = TABLES["dit-xl-2-256"]
    assert large.last_stage().activation_checkpointing and not TableConfig().last_stage().activation_checkpointing
    assert TABLES["dit-xl-2-256"].model == "facebook/DiT-XL-2-256" and TABLES["dit-xl-2-256"].images == 10_000


def test_every_row_is_made_once(tmp_path, monkeypatch):
    pipe, lines = tiny.pipeline(), []
    table = make_table(SMALL, tmp_path, report=lines.append, pipe=pipe)
    assert len(table) == len(lines) == len(SMALL.rows()) == 5
    assert table["method"].tolist() == [row.method for row in SMALL.rows()]
    assert table["images"].tolist() == [130] * 4 + [129] and table["steps"].tolist() == [1] * 4 + [2]
    assert "5 of 5 rows, about 0 min left" in lines[-1] and "FD" in lines[-1]
    quantized = table[table["bits"] == 2]
    assert (quantized["bits per weight"] > 2).all() and table["bits per weight"][0] == 32
    vq = table[table["method"].isin(["k-means", "VQ4DiT"])]
    assert vq["bits per weight"].nunique() == 1  # the same codes and codebooks
    assert table["FD (fashion)"].nunique() == 5 and (table["FD (fashion) low"] < table["FD (fashion)"]).all()
    assert table["seeds"][0] == "0–129" and {"CFG", "device", "extractor", "reference", "minutes"} <= set(table)

    monkeypatch.setattr(row_tasks.Evaluated, "run", lambda *_: pytest.fail("a finished row was made again"))
    again = make_table(SMALL, tmp_path, report=lines.append, pipe=pipe)
    assert again.equals(table) and len(lines) == 5
    more = Bench(SMALL.replace(longer=()), tmp_path, pipe)
    assert len(read_table(more)) == 4  # rows belong to no particular table
    changed = Bench(SMALL.replace(iterations=3), tmp_path, pipe)
    assert read_table(changed)["method"].tolist() == [
        "full precision",
        "k-means",
        "full precision",
    ]  # what calibration does not touch
    changed = dataclasses.replace(RECIPES["best"], vq=RECIPES["best"].vq.replace(candidates=3))
    monkeypatch.setitem(RECIPES, "best", changed)
    assert read_table(Bench(SMALL, tmp_path, pipe))["method"].tolist() == [
        "full precision",
        "GPTQ",
        "k-means",
        "full precision",
    ]
    monkeypatch.setitem(bench.GROUP_SIZES, 2, 64)
    assert read_table(Bench(SMALL, tmp_path, pipe))["method"].tolist() == [
        "full precision",
        "k-means",
        "full precision",
    ]


def test_the_other_methods_are_built_at_the_same_bits(tmp_path):
    bench = Bench(SMALL, tmp_path, tiny.pipeline())
    names = ["codebook only", "GPTVQ-like", "GPTVQ-like, calibrated"]
    made = [bench.build(Row(name, 2, 1, 130)) for name in ("k-means", *names)]
    assert len({one.bits_per_weight for one in made}) == 1
    made.append(bench.build(Row("VQ4DiT, distilled", 2, 1, 130)))
    assert 2 < made[-1].bits_per_weight < made[0].bits_per_weight  # its codebooks are halves
    first = "transformer_blocks.0.ff.net.0.proj"
    weights = [one.model.get_submodule(first).weight() for one in made]
    assert not any(weights[i].equal(weights[j]) for i in range(5) for j in range(i))
    assert len(list((tmp_path / "models").iterdir())) == 5
    with pytest.raises(ValueError, match="does not distill"):
        Bench(SMALL.replace(recipe="release"), tmp_path, bench.pipe).build(Row("VQ4DiT, distilled", 2, 1, 130))


def test_a_distilled_row_is_that_of_the_study_of_few_bits():
    bits, codes = (4, 3, 2), ("k 256, d 2", "k 64, d 2", "k 256, d 4")
    ours = {row.codes: row for row in choices() if row.group == OURS and row.last == MOVING}
    for bit, name in zip(bits, codes, strict=True):
        assert bench.METHODS["VQ4DiT, distilled"](TableConfig(seed=1), bit) == ours[name].method(1)


def test_two_workers_fill_one_table(tmp_path):
    config = TableConfig(images=140, steps=1, methods=(), longer=((2, 140),), longer_methods=(), bootstrap=0)
    lines = []
    table = make_table(config, tmp_path, workers=2, report=lines.append)
    assert table["steps"].tolist() == [1, 2] and len(lines) == 2


def test_a_gpu_has_one_worker(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(main_table, "run", lambda folder, tasks, place: places.append(place) or [])
    monkeypatch.setattr(main_table, "complete", list)
    monkeypatch.setattr(main_table, "read_table", lambda bench: bench.how.device)
    how = lambda device: SimpleNamespace(folder=tmp_path, how=SimpleNamespace(device=device), tasks=list)  # noqa: E731
    for device, place in (("NVIDIA H100", Here), ("cpu", Processes)):
        monkeypatch.setattr(main_table, "Bench", lambda *_, **__: how(device))
        assert make_table(SMALL, tmp_path, workers=2) == device
        assert isinstance(places.pop(), place)


def test_a_row_that_fails_is_named_once_the_others_are_made(tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("in_features 32 is not divisible by group_size=33 (blocks.0.attn1.to_q)")

    monkeypatch.setattr(GPTQ, "build", fails)
    pipe, few = tiny.pipeline(), SMALL.replace(longer=(), methods=(("GPTQ", (2,)), ("k-means", (2,))))
    with pytest.raises(
        RuntimeError, match=r"GPTQ, 2 bits, 1 steps, 130 images: images 0–129 of model GPTQ-\w+, which it"
    ) as e:
        make_table(few, tmp_path, pipe=pipe, report=lambda line: None)
    assert "not divisible by group_size=33 (blocks.0.attn1.to_q)" in str(e.value)
    made = read_table(Bench(few, tmp_path, pipe))["method"].tolist()
    assert made == ["full precision", "k-means"]
