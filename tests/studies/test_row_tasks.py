"""A row from shards is the row of one pass, bit for bit; what was made is made of what the study says."""

import dataclasses

import families
import pytest
import tiny
import torch

from vqlib.config import SamplingConfig, VQConfig
from vqlib.evaluation.extractors import Features
from vqlib.models import pipeline
from vqlib.models.geometry import Geometry
from vqlib.studies import row_tasks
from vqlib.studies.baselines.baseline import FullPrecision
from vqlib.studies.engines import complete, run
from vqlib.studies.experiments import VectorQuantized, measure
from vqlib.studies.processes import Here
from vqlib.studies.row_tasks import Evaluated, Made, Measuring, Shard, reblocked
from vqlib.studies.sources import Source
from vqlib.studies.tasks import key_of, rows_of

REFERENCE, SAMPLING, IMAGES = "fashion-mnist-test", SamplingConfig(steps=1), 1100


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


def row(pipe, shard):
    made = Made(Measuring.of(pipe, REFERENCE, shard=shard), FullPrecision())
    return Evaluated(made, IMAGES, SAMPLING, bootstrap=3)


def figures(metrics):
    return {name: value for name, value in metrics.items() if name != "minutes"}


@pytest.fixture(scope="module")
def one_pass(pipe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("one-pass")
    return figures(measure(pipe, pipe.transformer, IMAGES, folder, SAMPLING, REFERENCE, bootstrap=3).to_dict())


@pytest.mark.parametrize("shard", [500, 1000])
def test_a_row_from_shards_is_the_row_of_one_pass(pipe, one_pass, tmp_path, shard):
    task = row(pipe, shard)
    complete(run(tmp_path, [task], Here()))
    found = rows_of(tmp_path).read(*task.made_of())
    assert figures(found["metrics"]) == one_pass and found["bits_per_weight"] == 32 and found["minutes"] > 0
    assert len(list((tmp_path / "features").iterdir())) == -(-IMAGES // shard)
    assert [(s.first, s.count) for s in task.after()][-1] == (IMAGES // shard * shard, IMAGES % shard)
    assert str(task.after()[0]).startswith(f"images 0–{shard - 1} of model FullPrecision-")
    assert row(pipe, 500).made_of() == row(pipe, 1000).made_of()  # the same row, whatever the shards


def test_features_that_were_lost_or_damaged_are_made_again(pipe, one_pass, tmp_path):
    task = row(pipe, 500)
    complete(run(tmp_path, [task], Here()))
    rows_of(tmp_path).path(*task.made_of()).unlink()
    first, second, _ = sorted((tmp_path / "features").iterdir())
    first.unlink()
    second.write_bytes(second.read_bytes()[:100])
    complete(run(tmp_path, [task], Here()))
    assert figures(rows_of(tmp_path).read(*task.made_of())["metrics"]) == one_pass


def test_shards_are_whole_batches_of_the_extractor(pipe):
    with pytest.raises(ValueError, match="shard=300 images: extractor 'fashion' takes multiples of 500"):
        Measuring.of(pipe, REFERENCE, shard=300)


def test_blocks_do_not_depend_on_the_parts():
    whole = Features(torch.arange(22.0).view(11, 2), torch.arange(11.0).view(11, 1), torch.arange(33.0).view(11, 3))
    parts = [Features(*(value[a:b] for value in vars(whole).values())) for a, b in ((0, 2), (2, 9), (9, 11))]
    found = list(reblocked(parts, 4))
    assert [len(block.features) for block in found] == [4, 4, 3]
    for name, value in vars(whole).items():
        assert torch.equal(torch.cat([getattr(block, name) for block in found]), value)
    without = [dataclasses.replace(part, spatial=None) for part in parts]
    assert all(block.spatial is None for block in reblocked(without, 4))


def test_a_pipeline_is_found_again_by_its_contents_only(pipe, monkeypatch):
    how = Measuring.of(pipe, REFERENCE)
    assert how.pipe() is pipe and how.source == dataclasses.replace(how.source, name="elsewhere")
    other = dataclasses.replace(how.source, transformer="0" * 64)
    loaded = []
    monkeypatch.setattr(pipeline, "load", lambda name, **options: loaded.append((name, options["device"])) or pipe)
    with pytest.raises(RuntimeError, match=f"tiny is another pipeline here: transformer=.*, the study's is {'0' * 64}"):
        other.open("cpu")
    with pytest.raises(RuntimeError, match="this worker computes on cpu, the study's rows on NVIDIA H100"):
        how.source.open("NVIDIA H100")
    assert loaded == [("tiny", "cpu")]


def test_models_shards_and_rows_belong_to_prompts_and_process():
    pipe = families.sd3()
    found = [row(one, 500) for one in (pipe, *families.others(pipe).values(), families.sd3())]
    for keys in ([key_of(t) for t in found], [key_of(t.after()[0]) for t in found], [t.made.name for t in found]):
        assert len(set(keys[:4])) == 4 and keys[4] == keys[0]


def test_a_worker_that_finds_another_pipeline_under_the_name_refuses_it(monkeypatch):
    pipe = families.sd3()
    source = Source.of(pipe)
    for what, other in families.others(pipe).items():
        monkeypatch.setattr(pipeline, "load", lambda name, other=other, **options: other)
        with pytest.raises(RuntimeError, match=f"SD3 is another pipeline here: {what}="):
            source.load("cpu")


def test_another_reference_than_the_study_was_begun_with_is_refused(pipe, tmp_path):
    made = Made(dataclasses.replace(Measuring.of(pipe, REFERENCE), reference_sha256="0" * 64), FullPrecision())
    with pytest.raises(RuntimeError, match="reference fashion-mnist-test is another one here than where the study was"):
        complete(run(tmp_path, [Evaluated(made, 140, SAMPLING)], Here()))


def test_the_transformer_that_was_built_last_is_let_go(pipe, tmp_path):
    made = row(pipe, 500).made
    assert made.build(tmp_path) is made.build(tmp_path)
    row_tasks.release()
    assert not row_tasks._built


def test_of_other_families_than_dits_the_memory_is_not_known():
    how = Measuring.of(families.pixart(), REFERENCE)
    assert Made(how, FullPrecision()).needs.memory == 0
    assert Made(Measuring.of(tiny.pipeline(), REFERENCE), FullPrecision()).needs.memory > 0


def test_memory_grows_with_the_batch_that_is_sampled_and_with_second_moments(pipe):
    how = dataclasses.replace(Measuring.of(pipe, REFERENCE), geometry=Geometry())  # DiT-XL/2's shape
    made = Made(how, FullPrecision())
    small, large = (Shard(made, SAMPLING.replace(batch_size=batch), 0, 1000).needs.memory for batch in (100, 400))
    assert large > small + (1 << 30) and small >= made.needs.memory
    plain, fed = (
        Made(how, VectorQuantized(VQConfig(assignment=a), None)).needs.memory for a in ("nearest", "error-feedback")
    )
    assert fed > plain + (2 << 30)
