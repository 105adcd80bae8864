"""The second bundled model: flow matching on colour emoji, with its own classifier, reference and card, through the whole chain."""

import re

import pytest
import torch

import vqlib
from vqlib.bundled.subjects import EMOJI, EMOJI_TEST, SUBJECTS
from vqlib.evaluation.extractors import load_extractor
from vqlib.evaluation.references import load_reference, reference_of
from vqlib.models.flow import FlowMatching
from vqlib.models.geometry import Geometry
from vqlib.models.pipeline import DATA
from vqlib.studies.experiments import class_labels, measure

FOLDER = DATA / EMOJI.model


@pytest.fixture(scope="module")
def pipe():
    return vqlib.load(EMOJI.model)


@pytest.fixture(scope="module")
def images(pipe):
    return vqlib.sample(pipe, class_labels(len(pipe.class_names), 120), range(120), steps=20, guidance_scale=1.5)


def test_it_loads_by_name_as_a_flow_of_eight_channels_with_named_classes(pipe):
    assert isinstance(pipe.schedule, FlowMatching) and pipe.latent_shape == (8, 8, 8)
    assert pipe.class_names == EMOJI.classes and pipe.null_class == 12
    assert pipe.denoiser.guided_channels(8) == 8 and pipe.denoiser.guided_channels(4) == 3


@pytest.mark.parametrize("subject", SUBJECTS.values(), ids=list(SUBJECTS))
def test_what_is_bundled_is_what_its_subject_says(subject):
    pipe = vqlib.load(subject.model)
    assert pipe.class_names == subject.classes
    assert Geometry.of(pipe.transformer.config) == Geometry.of(subject.build_transformer().config)
    assert pipe.vae.config.in_channels == subject.channels and pipe.vae.config.latent_channels == subject.latents
    assert reference_of(pipe.name) == subject.reference and reference_of(str(DATA / pipe.name)) == subject.reference
    assert load_reference(subject.reference).extractor == subject.extractor


def test_its_images_are_in_colour_and_taken_for_what_was_asked(pipe, images):
    assert images.shape == (120, 3, 32, 32) and images.dtype == torch.uint8
    assert (images.float().amax(1) - images.float().amin(1)).mean() > 10, "gray"
    logits = load_extractor("emoji")(images).logits
    right = (logits.argmax(1) == torch.tensor(class_labels(len(pipe.class_names), 120))).float().mean()
    assert right > 0.7, f"{right:.2f} of 120 images"


def test_its_reference_is_balanced_and_counted_by_the_card(pipe):
    reference = load_reference("emoji-test")
    assert reference.count == 12 * EMOJI_TEST and reference.size == (32, 32)
    guesses = load_extractor("emoji").module.classifier.head(reference.features).argmax(1)
    labels = torch.arange(12).repeat_interleave(EMOJI_TEST)
    card = (FOLDER / "MODEL_CARD.md").read_text()
    stated = float(re.search(r"Classifier: ([\d.]+)%", card)[1]) / 100
    assert (guesses == labels).float().mean().item() == pytest.approx(stated, abs=0.005)


def test_the_cards_trainings_are_the_subjects(pipe):
    card = (FOLDER / "MODEL_CARD.md").read_text()
    for name, config in EMOJI.configs.items():
        row = next(line for line in card.splitlines() if line.startswith(f"| {name} |")).split("|")
        assert [int(cell) for cell in row[3:6]] == [config.steps, config.batch, config.steps * config.batch]
    transformer = EMOJI.build_transformer()
    assert f"| sit | {sum(p.numel() for p in transformer.parameters())} |" in card
    licence = (FOLDER / "DATA_LICENSE").read_text()
    assert "Apache" in licence and "Creative Commons" in licence and "Noto" in licence and "Twemoji" in licence


def test_the_folder_is_small():
    assert sum(path.stat().st_size for path in FOLDER.rglob("*") if path.is_file()) <= 12_000_000


def test_rows_are_measured_against_its_own_reference(pipe, tmp_path):
    sampling = vqlib.SamplingConfig(steps=2, batch_size=50)
    found = measure(pipe, pipe.transformer, 100, tmp_path, sampling)
    assert found.reference == "emoji-test" and found.fd_name == "FD (emoji)" and found.accuracy is not None


def test_the_whole_chain_works_on_it(pipe, tmp_path):
    settings = vqlib.recipe("best", iterations=2, batch_size=2, steps=4)
    hessians = vqlib.input_hessians(pipe, settings, 1)
    vq = vqlib.recipe_vq("best", bits=2, kmeans_iterations=2)
    student = vqlib.quantize(pipe.transformer, vq, seed=0, hessians=hessians)
    packed = vqlib.calibrate(pipe, student, settings, out=tmp_path / "run").finish()
    last = vqlib.recipe_distillation("best", iterations=2, batch_size=2, steps=4)
    packed = vqlib.distill(pipe, packed, last, out=tmp_path / "last").finish()
    loaded = vqlib.load_transformer(vqlib.save(packed, tmp_path / "packed"))
    shown = [vqlib.sample(pipe.with_transformer(m), [0, 11], [5, 6], steps=3) for m in (packed, loaded)]
    assert torch.equal(*shown) and shown[0].shape == (2, 3, 32, 32)
    for name, value in packed.state_dict().items():
        assert torch.equal(value, loaded.state_dict()[name]), name
