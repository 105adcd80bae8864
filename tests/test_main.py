import json
import shutil
import time
from pathlib import Path

import numpy as np
import pytest

from vqlib import __main__ as shell
from vqlib.calibrator.runs import read_records
from vqlib.config import OTHER_TRAJECTORIES, RECIPES, recipe_vq
from vqlib.studies import experiments

SMALL = ["--set", "vq.k=8", "--set", "vq.d=4", "--set", "vq.kmeans_iterations=2", "--set", "calibration.iterations=2"]
SMALL += ["--set", "calibration.batch_size=1", "--set", "calibration.steps=2", "--set", "sampling.steps=2"]
JOB = ["--preset", "dit-mini-fashion-w2", *SMALL, "--set", "images=3"]


def run(command, folder, *more):
    shell.main([command, *JOB, "--out", str(folder), *more])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The folder of a calibrated small job."""
    out = tmp_path_factory.mktemp("jobs") / "job"
    run("calibrate", out)
    return out


def test_calibrate_leaves_records_and_a_packed_model_that_is_found_again(folder, monkeypatch, capsys):
    assert len(read_records(folder / "calibration")) == 2
    config = json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]
    assert config["k"] == 8 and config["provenance"]["calibration"]["iterations"] == 2
    monkeypatch.setattr("vqlib.studies.experiments.quantize", lambda *_: pytest.fail("quantized again"))
    run("calibrate", folder)
    assert f"packed: {folder / 'packed'}" in capsys.readouterr().out


def test_distill_adds_a_last_stage_and_another_length_is_another_model(folder, tmp_path):
    run("calibrate", tmp_path, "--distill", "2")
    assert [record.output_loss > 0 for record in read_records(tmp_path / "distillation")] == [True, True]
    config = json.loads((tmp_path / "packed" / "config.json").read_text())["quantization_config"]
    made = config["provenance"]
    assert made["distillation"]["iterations"] == 2
    for size in ("batch_size", "steps", "guidance_scale"):  # as --set has them, not as the preset
        assert made["distillation"][size] == made["calibration"][size]
    for made, asked in ((tmp_path, []), (folder, ["--distill", "2"]), (tmp_path, ["--distill", "3"])):
        with pytest.raises(SystemExit, match="was made with distillation(.iterations)?="):
            run("calibrate", made, *asked)
    with pytest.raises(
        SystemExit, match="--distill 2: quantize has no last stage, estimate, calibrate, sample, evaluate, table have"
    ):
        run("quantize", tmp_path, "--distill", "2")


def test_quantize_is_k_means_alone(tmp_path):
    run("quantize", tmp_path)
    config = json.loads((tmp_path / "k-means" / "packed" / "config.json").read_text())["quantization_config"]
    assert config["provenance"]["calibration"] is None and not (tmp_path / "calibration").exists()


def test_sample_writes_images_as_adm_reads_them(folder):
    run("sample", folder)
    images = np.load(folder / "samples.npz")["arr_0"]
    assert images.shape == (3, 32, 32, 1) and images.dtype == np.uint8 and images.std() > 0


def test_sampling_that_was_killed_goes_on(folder, monkeypatch):
    run("sample", folder)
    whole, sampler = np.load(folder / "samples.npz")["arr_0"], experiments.sample_batches
    (folder / "samples.npz").unlink()
    batches = ["--set", "sampling.batch_size=2"]

    def killed(*arguments, **more):
        yield next(sampler(*arguments, **more))
        raise KeyboardInterrupt

    monkeypatch.setattr(experiments, "sample_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        run("sample", folder, *batches)
    seen = []
    monkeypatch.setattr(
        experiments,
        "sample_batches",
        lambda p, labels, *a, **o: seen.append(len(labels)) or sampler(p, labels, *a, **o),
    )
    run("sample", folder, *batches)
    assert seen == [1] and np.array_equal(np.load(folder / "samples.npz")["arr_0"], whole)
    assert not any((folder / "unfinished").iterdir())
    monkeypatch.setattr(experiments, "sample_batches", killed)
    with pytest.raises(KeyboardInterrupt):
        run("sample", folder, *batches)
    run("sample", folder, *batches, "--set", "images=1")  # of a batch of two
    assert np.array_equal(np.load(folder / "samples.npz")["arr_0"], whole[:1])


def test_estimate_needs_no_weights_and_prints_sizes_and_the_quoted_figure(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(shell, "estimate", lambda source, job, device: f"{source.hidden} on {device}")
    shell.main(["estimate", "--preset", "dit-xl-2-256-w2", "--device", "cpu", "--out", str(tmp_path)])
    out = capsys.readouterr().out
    assert out.startswith("1152 on cpu") and "2553.35 -> 162.08 MiB" in out and "FID 12.42 with 10000 images" in out


@pytest.mark.parametrize(
    "given, expected", [([], "cuda"), (["--device", "cpu"], "cpu"), (["--device", "cuda:1"], "cuda:1")]
)
@pytest.mark.parametrize("command", ["quantize", "calibrate", "sample", "evaluate", "table", "estimate"])
def test_every_command_uses_a_gpu_where_there_is_one_or_the_device_it_is_given(
    tmp_path, monkeypatch, command, given, expected
):
    class Loaded(Exception):
        pass

    def load(name, vae, device, **_):
        raise Loaded(str(device))

    monkeypatch.setattr(shell.models, "load", load)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    with pytest.raises(Loaded, match=f"^{expected}$"):
        preset = ["--preset", "dit-mini-fashion-w2", "--model", "dit-mini-fashion"]
        shell.main([command, *preset, "--out", str(tmp_path), *given])


def test_table_and_evaluate_pass_the_settings_on(folder, monkeypatch, capsys):
    seen = []
    monkeypatch.setattr(shell, "measure", lambda *a, **o: seen.append(a) or Row())
    run("evaluate", folder, "--set", "images=200")
    _, _, images, place, sampling, reference = seen[0]
    assert (images, place, sampling.steps, reference) == (200, folder / "metrics", 2, "fashion-mnist-test")
    table = shell.pd.DataFrame({"FD": [1.5]})
    monkeypatch.setattr(shell, "make_table", lambda config, *a, **o: seen.append(config) or table)
    shell.main(["table", "--preset", "dit-mini-fashion-w3", "--set", "calibration.iterations=2", "--out", str(folder)])
    assert seen[1].methods == (("k-means", (3,)), ("VQ4DiT", (3,))) and seen[1].iterations == 2
    assert (folder / "table" / "table.tex").exists() and "| 1.5 |" in capsys.readouterr().out


def test_a_table_has_the_last_stage_where_it_is_asked_for_and_the_recipe_has_one(tmp_path, monkeypatch):
    seen, asked = [], ["table", "--preset", "dit-mini-fashion-w3", "--out", str(tmp_path), "--distill", "7"]
    monkeypatch.setattr(shell, "make_table", lambda config, *a, **o: seen.append(config) or shell.pd.DataFrame())
    shell.main([*asked, "--recipe", "best"])
    assert seen[0].methods[-1] == ("VQ4DiT, distilled", (3,)) and len(seen[0].methods) == 3
    assert seen[0].last_stage().iterations == 7 and seen[0].calibration().iterations == 500
    with pytest.raises(SystemExit, match="vqlib table: the recipe does not distill; of .* these do: .'best'."):
        shell.main(asked)


def test_evaluate_says_what_to_expect_where_that_is_known(tmp_path, monkeypatch, capsys):
    for name in ("_load", "_calibrated", "require_fitting"):
        monkeypatch.setattr(shell, name, lambda *_: None)
    monkeypatch.setattr(shell, "measure", lambda *a, **o: Row())
    others = ("--set", "calibration.iterations=2"), ("--distill", "2"), ("--model", "another of its shape")
    for changes, expected in (((), True), *((other, False) for other in others)):
        shell.main(["evaluate", "--preset", "dit-mini-fashion-w2", *changes, "--out", str(tmp_path)])
        assert ("expected: FD-5k (fashion) 1.29" in capsys.readouterr().out) is expected


def test_a_table_refuses_settings_that_would_not_reach_it(folder, capsys):
    with pytest.raises(SystemExit, match="vqlib table: --set vq.k: a table takes images, reference, vq.bits"):
        run("table", folder)


def test_a_model_that_cannot_be_had_ends_in_one_line(tmp_path):
    with pytest.raises(SystemExit, match="^vqlib calibrate: .*nowhere"):
        shell.main(
            [
                "calibrate",
                "--preset",
                "dit-mini-fashion-w2",
                "--model",
                str(tmp_path / "nowhere"),
                "--out",
                str(tmp_path),
            ]
        )


class Row:
    def to_row(self, **conditions):
        return conditions


def test_a_recipe_changes_the_settings_it_is_made_of():
    options = shell._parser().parse_args(["calibrate", "--preset", "dit-xl-2-256-w3", "--recipe", "release"])
    job = shell._job(options)
    assert job.calibration == RECIPES["release"].calibration.replace(checkpoint_every=50)
    assert (job.vq.bits, job.vq.candidates, job.vq.ratio_start) == (3, 2, "distance")
    assert options.out.name == "dit-xl-2-256-w3"
    for bits in (2, 3):
        options = shell._parser().parse_args(["calibrate", "--preset", f"dit-mini-fashion-w{bits}", "--recipe", "best"])
        assert shell._job(options).vq == recipe_vq("best", bits)


def asked(*arguments):
    """The job that these arguments stand for."""
    return shell._job(shell._parser().parse_args(arguments))


def test_every_stage_of_a_job_follows_the_presets_trajectory_whatever_the_recipe():
    """FLUX is told guidance as an input: calibrated at another one it is another model."""
    preset = ["--preset", "flux.1-dev-w2"]
    for more in ([], ["--recipe", "best"]):
        job = asked("calibrate", *preset, *more, "--distill", "100")
        for stage in (job.calibration, job.distillation):
            assert (stage.batch_size, stage.steps, stage.guidance_scale) == (4, 28, job.sampling.guidance_scale)
    assert job.calibration.freeze_rule == "schedule" and job.distillation.iterations == 100
    own = asked("calibrate", *preset, "--recipe", "release").calibration
    assert (own.steps, own.guidance_scale) == (28, RECIPES["release"].calibration.guidance_scale)


def test_a_seed_is_that_of_every_stage_and_the_last_one_has_other_trajectories():
    job = ["calibrate", "--preset", "dit-mini-fashion-w2", "--recipe", "best", "--distill", "100"]
    for more, seed in (([], 0), (["--seed", "3"], 3), (["--set", "calibration.seed=1"], 1)):
        made = asked(*job, *more)
        assert (made.calibration.seed, made.distillation.seed) == (seed, seed + OTHER_TRAJECTORIES)


def test_what_is_told_of_a_job_under_way_names_its_stage(folder, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(shell, "REPORT_EVERY", 0.01)
    job, told = asked("calibrate", *JOB, "--distill", "5"), ""
    with shell._watching(tmp_path, job):
        for stage in ("calibration", "distillation"):
            copy = shutil.copytree(folder / "calibration", tmp_path / "copy")
            if stage == "distillation":  # what it trains on is not the blocks' loss
                records = (copy / "records.jsonl").read_text().replace('"output_loss": null', '"output_loss": 7.5')
                (copy / "records.jsonl").write_text(records)
            Path(copy).rename(tmp_path / stage)
            for _ in range(500):
                told += capsys.readouterr().out
                if f"{stage}, iteration" in told:
                    break
                time.sleep(0.01)
    assert [line.partition(":")[0] for line in told.splitlines()] == [
        "calibration, iteration 2 of 2",
        "distillation, iteration 2 of 5",
    ]
    assert told.splitlines()[1].startswith("distillation, iteration 2 of 5: loss 7.5,")


def test_a_table_calibrates_as_the_job_does(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(shell, "_load", lambda *_: None)
    monkeypatch.setattr(shell, "make_table", lambda config, *a, **o: seen.append(config) or shell.pd.DataFrame())
    sizes = ["--set", "calibration.batch_size=2", "--set", "calibration.guidance_scale=2.5"]
    mini, flux = ["--preset", "dit-mini-fashion-w2"], ["--preset", "flux.1-dev-w2"]
    flux += ["--set", "reference=fashion-mnist-test"]
    for job in ([*flux, "--recipe", "best", "--seed", "3"], [*flux, *sizes], [*mini, "--recipe", "release"]):
        shell.main(["table", *job, "--out", str(tmp_path)])
        assert seen[-1].calibration() == asked("calibrate", *job).calibration
    with pytest.raises(SystemExit, match="--set calibration.batch_size: a table has recipe 'release' with its own"):
        shell.main(["table", *mini, *sizes, "--recipe", "release", "--out", str(tmp_path)])


@pytest.mark.parametrize(
    "more, message",
    [
        (["--set", "iterations=3"], "'iterations' is not vq.…"),
        (["--set", "iterations"], "write NAME=VALUE"),
        (["--model", "no-such-model"], "'no-such-model' is neither"),
    ],
)
def test_mistakes_end_with_one_line(tmp_path, more, message):
    with pytest.raises(SystemExit, match=message):
        run("quantize", tmp_path, *more)


def test_imagenet_needs_a_reference_of_the_users(tmp_path):
    with pytest.raises(ValueError, match="dit-xl-2-256-w2 has no reference of its own: give --set reference="):
        shell._reference(shell.preset("dit-xl-2-256-w2"))


@pytest.mark.parametrize("command", ["evaluate", "table"])
@pytest.mark.parametrize(
    "more, message",
    [
        (["--set", "reference=nowhere.npz"], "no reference at .*nowhere.npz"),
        (["--set", "images=100"], "100 images against 10000 of the reference are too few"),
        (["--device", "cuda:77"], "device 'cuda:77' is not here"),
    ],
)
def test_what_cannot_be_used_is_said_before_anything_is_computed(tmp_path, monkeypatch, command, more, message):
    monkeypatch.setattr(shell.models, "load", lambda *_, **__: pytest.fail("loaded a model"))
    with pytest.raises(SystemExit, match=f"^vqlib {command}: {message}"):
        shell.main([command, "--preset", "dit-mini-fashion-w2", "--out", str(tmp_path / "job"), *more])
    assert not (tmp_path / "job" / "calibration").exists()


@pytest.mark.parametrize(
    "command, more, message",
    [
        ("sample", ["--set", "images=0"], "images=0: there is nothing to sample"),
        ("sample", ["--set", "sampling.steps=2000"], "steps=2000 is outside 1 … 1000"),
        (
            "evaluate",
            ["--set", "images=500", "--set", "sampling.guidance_channels=99"],
            "guidance_channels=99 but the latents",
        ),
        ("calibrate", ["--distill", "2", "--set", "distillation.steps=2000"], "steps=2000 is outside 1 … 1000"),
        ("table", ["--set", "images=500", "--set", "sampling.steps=2000"], "steps=2000 is outside 1 … 1000"),
        ("table", ["--set", "images=500", "--set", "calibration.steps=2000"], "steps=2000 is outside 1 … 1000"),
        ("calibrate", ["--workers", "2"], "--on, --store and --workers are table's alone"),
        ("table", ["--on", "ray", "--workers", "4", "--set", "images=500"], "--workers 4 is of --on local"),
        ("calibrate", ["--distill", "-1"], "--distill -1 must be 0 or more"),
    ],
)
def test_what_a_later_stage_would_refuse_is_refused_first(tmp_path, monkeypatch, command, more, message):
    monkeypatch.setattr("vqlib.studies.experiments.quantize", lambda *_, **__: pytest.fail("quantized"))
    with pytest.raises(SystemExit, match=message):
        shell.main([command, "--preset", "dit-mini-fashion-w2", "--out", str(tmp_path / "job"), *more])


def test_a_place_that_cannot_be_written_is_said_before_anything_is_computed(tmp_path, monkeypatch):
    monkeypatch.setattr(shell.models, "load", lambda *_, **__: pytest.fail("loaded a model"))
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(SystemExit, match="^vqlib calibrate: .*file"):
        shell.main(["calibrate", "--preset", "dit-mini-fashion-w2", "--out", str(tmp_path / "file" / "job")])


def test_codes_that_do_not_fit_are_said_before_second_moments_are_gathered(tmp_path, monkeypatch):
    monkeypatch.setattr("vqlib.studies.experiments.input_hessians", lambda *_: pytest.fail("gathered second moments"))
    with pytest.raises(SystemExit, match=r"in_features 192 is not divisible by d=5 \(transformer_blocks.0"):
        run("calibrate", tmp_path, "--recipe", "best", "--set", "vq.d=5")
