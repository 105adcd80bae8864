"""Every kind of view on a tiny model: what it shows, what it refuses, runs that are paused and taken up, figures for print."""

import asyncio
import json
import subprocess
import sys
import time
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import tiny
import torch
from panel import PATIENCE, Panel
from printed import page_width, printed_sizes

import vqlib
from vqlib import explore
from vqlib.calibrator.runs import Record
from vqlib.figures.styles import VENUES


@pytest.fixture(scope="module")
def pipe():
    return tiny.pipeline()


@pytest.fixture(scope="module")
def models(pipe):
    def make(k, d):
        return vqlib.harden(vqlib.quantize(pipe.transformer, vqlib.VQConfig(k=k, d=d, candidates=1)))

    return {"k-means": {2: partial(make, 16, 2), 3: partial(make, 64, 2)}, "flat": make(16, 2)}


def test_images_follow_bits_seed_and_class(pipe, models, tmp_path):
    view = explore.images(pipe, models, count=4, steps=3, out=tmp_path)
    first = view.still()
    assert "k-means, 2 bits" in first.caption and "bits a weight" in first.caption and "seeds 0 … 3" in first.caption
    assert first.data["class"].tolist() == list("abcd") and (first.data["mean_difference"] > 0).all()
    captions = [first.caption]
    for change in ({"bits": 3}, {"seed": 5}, {"subject": "j"}, {"guidance_scale": 4.0}, {"method": "flat"}):
        view.set(**change)
        view.wait(PATIENCE)
        captions.append(view.shown.caption)
    assert len(set(captions)) == len(captions)
    assert view.shown.data["class"].tolist() == ["j"] * 4 and view.shown.data["seed"].tolist() == [5, 6, 7, 8]
    view.set(bits="full precision")
    view.wait(PATIENCE)
    assert view.shown.data["mean_difference"].tolist() == [0.0] * 4


def test_bits_that_a_method_lacks_become_the_nearest(pipe, models, tmp_path):
    only = {"k-means": models["k-means"], "other": {3: models["flat"]}}
    view = explore.images(pipe, only, count=4, steps=3, out=tmp_path)
    view.set(method="other")
    assert view.settings["bits"] == 3
    view.wait(PATIENCE)
    with pytest.raises(ValueError, match="no models"):
        explore.images(pipe, {})
    with pytest.raises(ValueError, match="bits=7 is not one of"):
        explore.images(pipe, models, bits=7)


def test_every_mix_of_methods_has_its_own_images(pipe, models, tmp_path):
    mixed = {"full precision": models["flat"], "k-means": models["k-means"]}
    view = explore.images(pipe, mixed, count=4, steps=3, out=tmp_path)
    assert view.settings["bits"] == 2
    assert (view.still().data["mean_difference"] > 0).all()  # a method of that name is not the reference


def test_images_show_previews_while_they_are_made(pipe, models, tmp_path):
    view = explore.images(pipe, models, count=4, steps=20, out=tmp_path)
    view.still()
    panel = Panel(view)
    view.set(seed=1)
    view.wait(PATIENCE)
    assert any(png and "step 1 of 20" in caption for png, caption in panel.seen)
    assert "seeds 1 … 4" in panel.seen[-1][1] and panel.done == 1


def test_codebook_shows_the_error_and_use_of_each_layer(pipe, models, tmp_path):
    packed = models["flat"]
    view = explore.codebook(pipe.transformer, packed, out=tmp_path)
    name = view.settings["layer"]
    view.still()
    layer = packed.get_submodule(name)
    error = vqlib.reconstruction_error(pipe.transformer.get_submodule(name).weight, layer)
    assert view.shown.table["error"].item() == pytest.approx(error, rel=1e-5)
    assert view.shown.data["count"].sum() == layer.count
    student = vqlib.quantize(pipe.transformer, vqlib.VQConfig(k=8, d=4, candidates=2))
    wide = explore.codebook(pipe.transformer, student, out=tmp_path)
    before = wide.still().caption
    assert len(wide.controls[1].options) == 6 and "d=4" in before
    with torch.no_grad():
        wide.layers[wide.settings["layer"]].codebook.mul_(3)  # as a calibration trains it
    assert wide.still().caption != before
    with pytest.raises(ValueError, match="no quantized layer"):
        explore.codebook(pipe.transformer, pipe.transformer)


def calibration(pipe, out, iterations=6, candidates=2):
    student = vqlib.quantize(pipe.transformer, vqlib.VQConfig(k=8, d=4, candidates=candidates, kmeans_iterations=2))
    settings = vqlib.CalibrationConfig(iterations=iterations, batch_size=2, steps=4)
    return vqlib.calibrate(pipe, student, settings, out=out)


def test_a_run_is_paused_resumed_stopped_and_taken_up_again(pipe, tmp_path):
    view = explore.run(calibration(pipe, tmp_path / "run", iterations=100_000), tmp_path)
    assert "running: iteration" in view.still().caption and "left" in view.shown.caption
    view.pause()
    held = -1
    while held != len(view.records):  # the step that is being made
        held = len(view.records)
        time.sleep(0.7)
    assert len(view.records) == held and view.state == "paused"
    view.resume()
    end = time.monotonic() + PATIENCE
    while len(view.records) == held and time.monotonic() < end:
        time.sleep(0.01)
    view.stop()
    view.wait(PATIENCE)
    assert f"stopped: iteration {len(view.records)} of 100000" in view.shown.caption and len(view.records) > held
    again = calibration(pipe, tmp_path / "run", iterations=100_000)
    assert again.iteration == len(view.records)  # nothing lost, and the folder is free
    again.close()


def test_a_finished_run_gives_the_packed_model_and_its_records(pipe, tmp_path):
    view = explore.run(calibration(pipe, tmp_path / "run"), tmp_path)
    packed = view.finish()
    assert view.state == "finished" and "iteration 6 of 6" in view.shown.caption
    assert vqlib.size_report(packed).attrs["bits_per_weight"] < 3
    assert [r.iteration for r in vqlib.read_records(tmp_path / "run")] == list(range(1, 7))
    assert "iteration 6 of 6" in explore.run(calibration(pipe, tmp_path / "run"), tmp_path).still().caption


def test_a_cell_that_awaits_a_run_leaves_the_loop_free(pipe, tmp_path):
    async def cells():
        view = explore.run(calibration(pipe, tmp_path / "run", iterations=100_000), tmp_path)
        view.still()
        asyncio.get_running_loop().call_later(0.2, view.stop)  # what a click does meanwhile
        return view, await view.finished()

    view, packed = asyncio.run(cells())
    assert view.state == "stopped" and f"stopped: iteration {len(view.records)} of" in view.shown.caption
    assert vqlib.size_report(packed).attrs["bits_per_weight"] < 3


def test_an_interrupt_of_a_waiting_cell_pauses_the_run(pipe, tmp_path):
    async def cells():
        view = explore.run(calibration(pipe, tmp_path / "run", iterations=100_000), tmp_path)
        waiting = asyncio.create_task(view.finished())
        await asyncio.sleep(0.2)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        state = view.state
        view.stop()
        await view.finished()
        return state

    assert asyncio.run(cells()) == "paused"


def test_a_run_that_made_no_step_says_so(pipe, tmp_path):
    done = calibration(pipe, None)
    for _ in done:
        pass
    view = explore.run(done, tmp_path)
    with pytest.raises(ValueError, match="finished: no step was made here"):
        view.still()
    assert vqlib.size_report(view.finish()).attrs["bits_per_weight"] < 3


def test_a_run_that_fails_says_why(pipe, tmp_path, monkeypatch):
    broken = calibration(pipe, tmp_path / "run")
    monkeypatch.setattr(broken.trajectory, "inputs", lambda: 1 / 0)
    view = explore.run(broken, tmp_path)
    with pytest.raises(ZeroDivisionError):
        view.wait(PATIENCE)
    with pytest.raises(ZeroDivisionError):
        view.still()


def test_a_run_that_fails_while_its_picture_waits_to_be_drawn_gives_no_model(pipe, tmp_path, monkeypatch):
    """The thread that draws is in another cell: once the picture came after the error and stood for it."""
    broken = calibration(pipe, tmp_path / "run")
    inputs = broken.trajectory.inputs
    monkeypatch.setattr(broken.trajectory, "inputs", lambda: inputs() if broken.iteration < 2 else 1 / 0)
    view = explore.run(broken, tmp_path)
    view._thread.join(PATIENCE)
    assert view.state == "failed" and len(view.records) == 2
    with pytest.raises(ZeroDivisionError):
        view.finish()


def test_an_interpreter_ends_cleanly_under_views_that_are_busy(tmp_path):
    """Threads within torch's code were once ended in the midst of it, which aborts the process (exit code −6)."""
    script = f"""
import sys
sys.path.insert(0, {str(Path(tiny.__file__).parent)!r})
import tiny, vqlib
from vqlib import explore
pipe = tiny.pipeline()
student = vqlib.quantize(pipe.transformer, vqlib.VQConfig(k=8, d=4, candidates=2, kmeans_iterations=2))
run = vqlib.calibrate(pipe, student, vqlib.CalibrationConfig(iterations=100000, batch_size=2, steps=4), out={str(tmp_path / "run")!r})
live = explore.run(run)
view = explore.images(pipe, {{"k-means": vqlib.harden(student)}}, count=8, steps=1000)
view.set(seed=1)
live._first.wait()
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=PATIENCE)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    assert (tmp_path / "run" / "state.safetensors").exists()


def test_ratios_and_comparison_of_run_folders(pipe, tmp_path, monkeypatch):
    for name, candidates in (("one", 1), ("two", 2)):
        calibration(pipe, tmp_path / name / "calibration", candidates=candidates).finish()
    view = explore.ratios(tmp_path / "two" / "calibration", tmp_path)
    captions = {view.still().caption}
    layer = view.controls[1].options[1]
    for change in ({"step": 2}, {"layer": layer}):
        view.set(**change)
        view.wait(PATIENCE)
        captions.add(view.shown.caption)
    assert len(captions) == 3 and layer in view.shown.caption
    assert len(view.shown.data) == 6 and "iteration" in view.shown.data
    both = explore.compare(tmp_path / "one" / "calibration", tmp_path / "two" / "calibration", tmp_path)
    assert both.still().caption.endswith("candidates 1 / 2")  # and not the fingerprints that follow from it
    assert both.shown.table["run"].tolist() == ["one", "two"] == list(both.shown.data["run"].unique())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    at_home = explore.compare("~/one/calibration", "~/two/calibration", tmp_path)
    assert at_home.still().caption == both.shown.caption
    calibration(pipe, tmp_path / "three" / "calibration").finish()
    other = explore.ratios(tmp_path / "three" / "calibration", tmp_path)
    assert not set(view.export().values()) & set(other.export().values())
    (tmp_path / "three" / "calibration" / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match="run.json"):
        explore.compare("~/one/calibration", "~/three/calibration", tmp_path)
    with pytest.raises(ValueError, match="no ratios"):
        explore.ratios(tmp_path / "one" / "calibration")


def run_folder(folder, settings, layers, output_loss=None):
    folder.mkdir()
    (folder / "run.json").write_text(json.dumps(settings))
    entry = {"frozen": 0.0, "entropy": 0.5, "unused": 0, "histogram": [5, 5]}
    seen = {name: {**entry, "count": count, "moved": moved} for name, (count, moved) in layers.items()}
    records = [Record(i, [1.0], 0.0, seen, 1.0, 0, output_loss) for i in (1, 2)]
    (folder / "records.jsonl").write_text("".join(json.dumps(asdict(record)) + "\n" for record in records))
    return folder


def test_shares_of_winners_are_of_sub_vectors_not_of_layers(tmp_path):
    layers = {"blocks.0.attn1.to_q": (100, 0.9), "blocks.1.attn1.to_q": (800, 0.1), "blocks.1.ff.net.2": (100, 0.5)}
    view = explore.ratios(run_folder(tmp_path / "run", {}, layers))
    assert "all layers: 22% of the winners" in view.still().caption  # (90 + 80 + 50) / 1000
    lines = {line.get_label(): line.get_ydata()[0] for line in view.shown.draw(True).axes[2].lines}
    assert lines["q"] == pytest.approx(170 / 900) and lines["MLP 2"] == pytest.approx(0.5)


def test_a_comparison_keeps_every_setting_that_differs(tmp_path):
    runs = [
        run_folder(
            tmp_path / name,
            {"calibration": {"iterations": i, "steps": i}, "pipeline": {"process": {"class": name}, "d": {"class": i}}},
            {"blocks.0.attn1.to_q": (10, 0.5)},
            output_loss=0.25,
        )
        for i, name in enumerate(("a", "b"), 20)
    ]
    view = explore.compare(*runs)
    table = view.still() and view.shown.table
    assert table["iterations"].tolist() == [2, 2] and table["calibration.iterations"].tolist() == [20, 21]
    assert table["steps"].tolist() == [20, 21] and table["output loss"].tolist() == [0.25, 0.25]
    assert table["pipeline.process.class"].tolist() == ["a", "b"] and table["pipeline.d.class"].tolist() == [20, 21]


@pytest.fixture(scope="module")
def views(pipe, models, tmp_path_factory):
    """One of each kind, with a figure."""
    folder = tmp_path_factory.mktemp("views")
    live = explore.run(calibration(pipe, folder / "two"), folder)
    packed = live.finish()
    calibration(pipe, folder / "one", candidates=1).finish()
    made = [live, explore.ratios(folder / "two", folder), explore.compare(folder / "one", folder / "two", folder)]
    made += [
        explore.codebook(pipe.transformer, packed, out=folder),
        explore.images(pipe, models, 8, steps=2, out=folder),
    ]
    for view in made:
        view.still()
    return made


@pytest.mark.parametrize("venue, columns", [("ICML", 1), ("AAAI", 2)])
def test_every_view_prints_at_the_exact_width_with_its_fonts_and_readable_text(views, venue, columns):
    for view in views:
        pdf = view.export(venue, columns)["pdf"]
        width = VENUES[venue].column if columns == 1 else VENUES[venue].text
        assert page_width(pdf) == pytest.approx(width * 72, abs=0.01), view.name
        assert b"/FontFile2" in pdf.read_bytes() and b"/Type3" not in pdf.read_bytes(), view.name
        sizes = printed_sizes(pdf)
        assert sizes and 6 <= min(sizes) <= max(sizes) <= VENUES[venue].font_size, view.name


def test_a_run_without_records_is_refused(tmp_path):
    layer = {"count": 1, "frozen": 0.0, "moved": 0.0, "entropy": 0.0, "unused": 0}
    record = Record(1, [1.0], 0.0, {"a": layer}, 1.0, 0)
    for name, lines in (("empty", ""), ("full", json.dumps(asdict(record)) + "\n")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "run.json").write_text("{}")
        (tmp_path / name / "records.jsonl").write_text(lines)
    with pytest.raises(ValueError, match="no records yet"):
        explore.ratios(tmp_path / "empty")
    with pytest.raises(ValueError, match="empty holds no records yet"):
        explore.compare(tmp_path / "full", tmp_path / "empty")


def test_panels_have_a_control_for_every_setting(pipe, models, tmp_path, monkeypatch):
    from vqlib.explore import frontend

    shown = []
    monkeypatch.setattr("IPython.display.display", lambda *objects, **options: shown.append((objects[0], options)))
    view = explore.images(pipe, models, count=4, steps=3, out=tmp_path)
    frontend.show(view)
    still, box = shown[0][0], shown[1][0]
    assert set(still) == {"image/png", "text/plain"} and "vqlib-images" in box._dom_classes
    panel = view.listeners[0]
    assert list(panel.inputs) == list(view.settings)
    panel.inputs["seed"].value = 3  # what a slider does
    view.listeners[0]._still = Panel(view)  # no display to update here
    view.listeners[0]._still.update = lambda *a, **k: None
    view.wait(PATIENCE)
    assert view.settings["seed"] == 3 and "seeds 3 … 6" in panel.caption.value
    view.set(seed=4)
    assert panel.inputs["seed"].value == 4
