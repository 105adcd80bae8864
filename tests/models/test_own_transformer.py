"""The README's adapter for a transformer of one's own is what it says: short, and enough for the whole chain."""

import re
from pathlib import Path

import pytest
import torch

import vqlib
from vqlib.config import CalibrationConfig, VQConfig
from vqlib.studies.experiments import packed_model
from vqlib.system.fingerprint import fingerprint

README = Path(__file__).resolve().parents[2] / "README.md"
ROUGH = VQConfig(k=8, d=2, candidates=2, kmeans_iterations=3)


@pytest.fixture(scope="module")
def example():
    text = README.read_text()
    code = re.search(r"```python\n(import torch, vqlib\n.*?)```", text, re.DOTALL)[1]
    assert len([line for line in code.splitlines() if line.strip()]) <= 40
    torch.manual_seed(0)
    names = {"__name__": "readme"}
    exec(compile(code, str(README), "exec"), names)
    return names


def test_the_readmes_transformer_is_calibrated_packed_and_sampled(example, tmp_path):
    pipe = example["pipe"]
    run = vqlib.calibrate(
        pipe, vqlib.quantize(pipe.transformer, ROUGH), CalibrationConfig(iterations=3, batch_size=2, steps=4)
    )
    assert all(min(record.block_losses) > 0 for record in run)
    packed = run.finish()
    folder = vqlib.save(packed, tmp_path / "packed")
    loaded = example["Mine"].from_pretrained(folder)
    images = [vqlib.sample(pipe.with_transformer(model), [0, 2], [1, 2], steps=3) for model in (packed, loaded)]
    assert torch.equal(*images)
    with pytest.raises(
        vqlib.CheckpointError, match="'Mine' is not a diffusers model; of one of your own give model_class"
    ):
        vqlib.load_transformer(folder)
    assert isinstance(vqlib.load_transformer(folder, model_class=example["Mine"]), example["Mine"])
    twice = [packed_model(pipe, ROUGH, None, tmp_path / "made") for _ in range(2)]
    assert fingerprint(twice[0]) == fingerprint(twice[1])
    handed = vqlib.calibrate(
        pipe,
        vqlib.quantize(pipe.transformer, ROUGH),
        CalibrationConfig(iterations=1, batch_size=2, steps=4, block_inputs="student"),
    )
    assert len(next(handed).block_losses) == 2


def test_without_its_adapter_it_is_refused_by_its_class(example):
    pipe = example["pipe"]
    message = r"mine: no adapter knows a Mine, only DiT.*Denoiser for it .*vqlib/models/ with a line in families.py"
    with pytest.raises(ValueError, match=message):
        vqlib.Pipeline("mine", pipe.transformer, pipe.vae, pipe.schedule, pipe.class_names)
