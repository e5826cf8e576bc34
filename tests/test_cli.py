"""Every command from end to end through main([...]), and one line with a way out for everything a user may get wrong."""

from __future__ import annotations

import html
import json
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open

import vltprune as vp
from vltprune import cli
from vltprune.commands import demo, inspect, pictures
from vltprune.data import SyntheticPairs
from vltprune.evaluate import draw
from vltprune.models import zoo

pytestmark = pytest.mark.filterwarnings("ignore::vltprune.UntrainedGuideWarning")


@pytest.fixture(scope="session")
def tiny_weights(tmp_path_factory):
    """Random weights under the names that come with the package."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("weights")
    dense = vp.create_model("blip_nlvr_tiny")
    vp.save(dense, folder / "blip_nlvr_tiny", dtype=torch.float16)
    pruned = vp.prune(dense, "madtp", guide="codebook(anchors=8)")
    vp.budget.fit_guide(pruned, [batch.inputs for batch in draw("val", 2)])
    for tag in ("p50", "p80"):
        vp.save(pruned, folder / f"blip_nlvr_tiny_madtp.{tag}", dtype=torch.float16)
    return folder


@pytest.fixture(autouse=True)
def _weights(tiny_weights, monkeypatch):
    monkeypatch.setattr(zoo, "WEIGHTS", tiny_weights)


@pytest.fixture
def pair(tmp_path):
    """The paths of two pictures."""
    paths = [tmp_path / "left.png", tmp_path / "right.jpg"]
    for path, pixels in zip(paths, SyntheticPairs("test", 1)[0].images, strict=True):
        Image.fromarray(pixels).resize((130, 70)).save(path)
    return [str(path) for path in paths]


@pytest.fixture
def photos(tmp_path):
    """A folder with three pictures of different sizes and modes, a broken one, a cut one, and a text."""
    folder = tmp_path / "photos"
    folder.mkdir()
    noise = np.random.default_rng(0).integers(0, 255, (90, 120, 3), np.uint8)
    Image.fromarray(noise).save(folder / "a.jpg")
    Image.fromarray(noise[..., 0]).resize((50, 200)).save(folder / "b.png")
    Image.fromarray(noise).convert("RGBA").save(folder / "c.webp")
    (folder / "broken.jpg").write_bytes(b"no picture at all")
    (folder / "cut.jpg").write_bytes((folder / "a.jpg").read_bytes()[:1500])
    (folder / "notes.txt").write_text("not a picture, and not to be complained of")
    return folder


def fails(capsys, *argv: str) -> str:
    """Runs a command that must end with exit code 2; its one line of complaint."""
    try:
        code = cli.main([*argv])
    except SystemExit as stop:
        code = stop.code
    err = capsys.readouterr().err
    assert code == 2, err
    assert "Traceback" not in err
    complaint = err.strip().splitlines()[-1]
    assert complaint.startswith("vltprune: error: ")
    return complaint


# --- the front desk


def test_without_a_command_it_helps(capsys):
    assert cli.main([]) == 0
    out = capsys.readouterr().out
    assert all(command in out for command in ("demo", "predict", "list", "info", "flops", "prune"))


@pytest.mark.parametrize("argv", [["--version"], ["--help"], *([c, "--help"] for c in ("demo", "predict", "prune"))])
def test_version_and_help(argv, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(argv)
    assert stop.value.code == 0
    assert "vltprune" in capsys.readouterr().out


def test_module_runs_and_the_library_stays_lean():
    ran = subprocess.run([sys.executable, "-m", "vltprune", "--version"], capture_output=True, text=True, check=True)
    assert ran.stdout.strip() == f"vltprune {vp.__version__}"
    probe = "import sys, vltprune; print([m for m in sys.modules if m.startswith('vltprune.commands') or m == 'tqdm'])"
    lean = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert "vltprune.commands" not in lean.stdout


def test_unknown_command_and_option(capsys):
    assert "bogus" in fails(capsys, "bogus")
    assert "--pears" in fails(capsys, "demo", "--pears", "3")
    assert "'0' is no whole number" in fails(capsys, "demo", "--pairs", "0")


def test_interrupt_ends_with_130(monkeypatch, capsys):
    def interrupted(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(inspect, "list_models", interrupted)
    assert cli.main(["list"]) == 130
    assert capsys.readouterr().err == "vltprune: interrupted\n"


def test_bugs_are_not_dressed_up_as_user_errors(monkeypatch):
    def buggy(*args, **kwargs):
        raise RuntimeError("a bug")

    monkeypatch.setattr(inspect, "list_models", buggy)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["list"])


def test_traceback_on_demand():
    with pytest.raises(LookupError, match="no model"):
        cli.main(["info", "nothing_of_the_kind", "--traceback"])


# --- list, info, flops


def test_list(capsys):
    assert cli.main(["list", "nlvr"]) == 0
    names = capsys.readouterr().out.split()
    assert {"blip_nlvr_base", "blip_nlvr_large", "blip_nlvr_tiny", "blip_nlvr_tiny_madtp.p80"} <= set(names)
    assert cli.main(["list", "vit_*_dinov2", "--library", "timm"]) == 0
    assert "vit_small_patch14_dinov2" in capsys.readouterr().out.split()
    assert cli.main(["list", "--parts"]) == 0
    assert "threshold" in capsys.readouterr().out
    assert "blip_bass" in fails(capsys, "list", "blip_bass")


def test_info_of_a_pruned_model(capsys):
    assert cli.main(["info", "blip_nlvr_tiny_madtp.p80"]) == 0
    out = capsys.readouterr().out
    for wanted in ("scorer   madtp", "image tower: 6 layers, width 128, 4 heads", "text tower: 4", "prunes", "fewer"):
        assert wanted in out


def test_info_of_a_dense_model_takes_its_arguments(capsys):
    assert cli.main(["info", "vit_tiny_patch16_224", "img_size=64", "depth=2"]) == 0
    out = capsys.readouterr().out
    assert "2 layers, width 192, 3 heads, a summary token" in out
    assert "pruned" not in out.replace("pruners", "")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["blip_nlvr_tinny"], "did you mean blip_nlvr_tiny"),
        (["blip_nlvr_tiny_madtp", "patchsize=8"], "did you mean patch_size"),
        (["blip_nlvr_tiny_madtp", "patch_size"], "write name=value"),
        (["blip_nlvr_tiny_madtp", "keep=ratio(rato=0.5)"], "did you mean ratio"),
        (["blip_nlvr_tiny_madtp", "scorer=madpt"], "did you mean madtp"),
        (["resnet18"], "no host takes it apart"),
        (["blip_nlvr_tiny_madtp.p80", "--pretrained", "nowhere.pth"], "there is no file nowhere.pth"),
    ],
)
def test_info_refusals(arguments, complaint, capsys):
    assert complaint in fails(capsys, "info", *arguments)


def test_flops_agrees_with_the_library(capsys):
    assert cli.main(["flops", "vit_tiny_patch16_224", "--image-size", "64"]) == 0
    out = capsys.readouterr().out
    model = vp.prune(vp.create_model("vit_tiny_patch16_224", img_size=64), "random")
    cost = vp.flops.count(model, torch.randn(1, 3, 64, 64))
    assert f"{cost.dense_total / 1e9:.3f} GMACs" in out
    assert "attention" in out


@pytest.mark.parametrize(
    ("arguments", "wanted"),
    [
        (["blip_nlvr_tiny_evit", "--image-size", "64", "--tokens", "9"], "two images and a sentence"),
        (["blip_tiny"], "(an image and a sentence)"),
        (["clip_vit_s_32_alt_random", "--tokens", "20"], "text tower"),
    ],
)
def test_flops_of_composites(arguments, wanted, capsys):
    assert cli.main(["flops", *arguments]) == 0
    assert wanted in capsys.readouterr().out


def test_flops_refusals(capsys):
    assert "reads no sentence" in fails(capsys, "flops", "vit_tiny_patch16_224", "--tokens", "4")
    assert "max_positions" in fails(capsys, "flops", "blip_nlvr_tiny", "--tokens", "99")
    assert "multiple" in fails(capsys, "flops", "blip_nlvr_tiny", "--image-size", "97")


# --- predict


def test_predict(pair, tmp_path, capsys):
    target = tmp_path / "out" / "kept.png"
    assert cli.main(["predict", *pair, "both images contain a red circle.", "--output", str(target)]) == 0
    out = capsys.readouterr().out
    assert re.match(r"(true|false)  \(probability of true: \d+\.\d%\)", out)
    assert re.search(r"left image +145 -> (\d+ ){5}\d+\n", out)
    assert re.search(r"text +8 -> (\d+ ){3}\d+\n", out)
    with Image.open(target) as drawn:
        assert drawn.width > 900


def test_predict_dense_into_a_folder(pair, tmp_path, capsys):
    argv = [
        "predict",
        *pair,
        "no image contains a star",
        "--model",
        "blip_nlvr_tiny",
        "--output",
        str(tmp_path / "new"),
    ]
    assert cli.main(argv) == 0
    assert "every token stays" in capsys.readouterr().out
    assert (tmp_path / "new" / "prediction.png").is_file()


def test_predict_answers_as_the_library(pair, tmp_path, capsys):
    sentence = "there are more stars in the left image than in the right image"
    images = [np.asarray(Image.fromarray(side)) for side in SyntheticPairs("test", 1)[0].images]
    for path, pixels in zip(pair, images, strict=True):
        Image.fromarray(pixels).save(path.replace("jpg", "png"))
    argv = [path.replace("jpg", "png") for path in pair]
    assert cli.main(["predict", *argv, sentence, "--output", str(tmp_path)]) == 0

    batch = draw("test", 1)[0]
    question = type(batch)(batch.pictures, (sentence,), batch.labels, batch.families)
    model = vp.create_model("blip_nlvr_tiny_madtp.p80", pretrained=True)
    chance = model(*question.inputs).softmax(-1)[0, 1]
    assert f"{chance:.1%}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("sentence", "options", "complaint"),
    [
        ("both images contain a pink circle", [], "'pink'"),
        ("both images contain a cirle", [], "nearest: circle"),
        ("", [], "empty sentence"),
        ("red " * 40, [], "max_positions=32"),
        ("a circle", ["--model", "blip_nlvr_tiny_madtpp"], "did you mean"),
        ("a circle", ["--model", "vit_tiny_patch16_224"], "use a blip_nlvr_tiny"),
        ("a circle", ["--pretrained", "nowhere"], "there is no file nowhere"),
    ],
)
def test_predict_refusals(sentence, options, complaint, pair, tmp_path, capsys):
    assert complaint in fails(capsys, "predict", *pair, sentence, "--output", str(tmp_path), *options)


def test_predict_needs_pictures(pair, photos, tmp_path, capsys):
    output = ["--output", str(tmp_path / "new")]
    assert "there is no picture nowhere.png" in fails(capsys, "predict", pair[0], "nowhere.png", "a circle", *output)
    assert "(it is a folder)" in fails(capsys, "predict", pair[0], str(tmp_path), "a circle", *output)
    broken = str(photos / "broken.jpg")
    assert f"cannot read {broken}" in fails(capsys, "predict", broken, pair[1], "a circle", *output)


@pytest.mark.parametrize(
    ("mode", "pixel", "wanted"),
    [
        ("RGB", (10, 20, 30), (10, 20, 30)),
        ("L", 128, (128, 128, 128)),
        ("LA", (128, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 0), (255, 255, 255)),
        ("RGBA", (255, 0, 0, 255), (255, 0, 0)),
        ("P", 0, (0, 0, 0)),
        ("1", 1, (255, 255, 255)),
        ("I;16", 65535, (255, 255, 255)),
        ("I;16", 32896, (128, 128, 128)),
        ("CMYK", (0, 0, 0, 255), (0, 0, 0)),
    ],
)
def test_pictures_of_every_mode_become_rgb(mode, pixel, wanted, tmp_path):
    path = tmp_path / ("a.tif" if mode == "CMYK" else "a.png")
    Image.new(mode, (7, 5), pixel).save(path)
    picture = pictures.read(path)
    assert (picture.mode, picture.size) == ("RGB", (7, 5))
    assert picture.getpixel((3, 3)) == wanted


def test_pictures_are_turned_as_their_camera_says(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by a quarter
    Image.new("RGB", (20, 10)).save(tmp_path / "a.jpg", exif=exif)
    assert pictures.read(tmp_path / "a.jpg").size == (10, 20)


# --- prune


def test_prune_a_timm_model_to_a_budget(photos, tmp_path, capsys):
    output = tmp_path / "out"
    argv = ["prune", "vit_tiny_patch16_224_madtp", str(photos), "--output", str(output), "--reduction", "0.4"]
    argv += ["--guide", "codebook(anchors=8)", "--keep", "ratio", "--batch-size", "2", "--pictures", "2"]
    assert cli.main(argv) == 0
    captured = capsys.readouterr()
    assert "RANDOM weights" in captured.err
    assert "placing its anchors" in captured.err
    assert "warning" not in captured.err
    assert "skipped 2 of 5 files" in captured.out
    assert all(f"cannot read {photos / name}" in captured.err for name in ("broken.jpg", "cut.jpg"))

    summary = json.loads((output / "summary.json").read_text())
    assert summary["macs_saved"] == pytest.approx(0.4, abs=0.02)
    assert list(summary["pictures"]) == ["a.jpg", "b.png", "c.webp"]
    assert set(summary["unreadable"]) == {"broken.jpg", "cut.jpg"}
    assert all(len(one["tokens"]) == 13 and one["tokens"][0] == 197 for one in summary["pictures"].values())
    with safe_open(output / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (3, 192)
        assert json.loads(file.metadata()["files"]) == list(summary["pictures"])
    assert sorted(path.name for path in (output / "pictures").iterdir()) == ["a.jpg.png", "b.png.png"]


@pytest.mark.parametrize(
    ("arguments", "width"),
    [
        (["clip_vit_s_32_alt", "--preset", "evit"], 256),
        (["blip_tiny_random", "--keep", "ratio(ratio=0.5)", "--at", "1,3"], 128),
        (["vit_tiny_patch16_224", "--scorer", "random", "--keep", "ratio", "--guide", "none", "--at", "0.5"], 192),
    ],
)
def test_prune_models_of_every_library(arguments, width, photos, tmp_path, capsys):
    output = tmp_path / "out"
    assert cli.main(["prune", *arguments, str(photos), "--output", str(output), "--limit", "1", "--pictures", "0"]) == 0
    assert "1 pictures" in capsys.readouterr().out
    assert not (output / "pictures").exists()
    with safe_open(output / "features.safetensors", "pt") as file:
        assert file.get_tensor("features").shape == (1, width)


def test_prune_gives_the_features_of_the_library(photos, tmp_path):
    """With every token kept, features are the dense model's under the library's own preprocessing."""
    import timm
    from timm.data import create_transform, resolve_data_config

    weights, output = tmp_path / "weights", tmp_path / "out"
    dense = timm.create_model("vit_tiny_patch16_224", num_classes=10).eval()
    vp.save(dense, weights)
    reset = timm.create_model("vit_tiny_patch16_224").eval()
    vp.save(reset, weights)
    argv = ["prune", "vit_tiny_patch16_224_random", str(photos), "--keep", "ratio(ratio=1.0)", "--limit", "1"]
    assert cli.main([*argv, "--pretrained", str(weights / "model.safetensors"), "--output", str(output)]) == 0

    image = create_transform(**resolve_data_config({}, model=reset))(Image.open(photos / "a.jpg"))
    reset.reset_classifier(0)
    with torch.no_grad(), safe_open(output / "features.safetensors", "pt") as file:
        torch.testing.assert_close(file.get_tensor("features"), reset(image[None]), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["vit_tiny_patch16_224_evit", "--preset", "madtp"], "names a preset already"),
        (["vit_tiny_patch16_224", "--preset", "evitt"], "did you mean evit"),
        (["vit_tiny_patch16_224_evit", "--at", "first"], "--at 'first'"),
        (["vit_tiny_patch16_224_evit", "--at", "40"], "depths 0 .. 11"),
        (["vit_tiny_patch16_224_evit", "--reduction", "1.5"], "between 0 and 1"),
        (["vit_tiny_patch16_224_evit", "--at", "11", "--reduction", "0.9"], "out of reach"),
        (["vit_tiny_patch16_224_evit", "--guide", "none", "--scorer", "madtp"], "reads the alignment guide"),
        (["vit_tiny_patch16_224_evit", "--pretrained", "nowhere.pth"], "there is no file nowhere.pth"),
        (["vit_tiny_patch16_22"], "did you mean"),
    ],
)
def test_prune_refusals(arguments, complaint, photos, tmp_path, capsys):
    model, *options = arguments
    argv = ["prune", model, str(photos), "--output", str(tmp_path / "out"), "--limit", "1", *options]
    assert complaint in fails(capsys, *argv)


def test_prune_needs_a_folder_of_pictures(photos, tmp_path, capsys):
    output = ["--output", str(tmp_path / "out")]
    (tmp_path / "empty").mkdir()
    assert "there is no folder" in fails(capsys, "prune", "vit_tiny_patch16_224_evit", str(photos / "a.jpg"), *output)
    assert "has no pictures" in fails(capsys, "prune", "vit_tiny_patch16_224_evit", str(tmp_path / "empty"), *output)
    for name in ("a.jpg", "b.png", "c.webp"):
        (photos / name).unlink()
    assert "none of the 2" in fails(capsys, "prune", "vit_tiny_patch16_224_evit", str(photos), *output)


# --- demo


@pytest.fixture(scope="session")
def shown(tiny_weights, tmp_path_factory):
    """The demo's folder and what it printed, on a handful of pairs."""
    folder = tmp_path_factory.mktemp("demo")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(zoo, "WEIGHTS", tiny_weights)
        patch.setattr(demo, "_CALIBRATION_PAIRS", 2)
        assert cli.main(["demo", "--pairs", "9", "--output", str(folder / "new")]) == 0
    return folder / "new"


MODELS = ("dense", "MADTP 50%", "random 50%", "MADTP 80%", "random 80%", "random 80%, tuned weights")


def test_demo_writes_its_numbers(shown):
    results = json.loads((shown / "results.json").read_text())
    assert tuple(results["models"]) == MODELS
    assert results["pairs"] == 9
    dense = results["models"]["dense"]
    assert dense["macs_saved"] == 0
    assert dense["time_relative_to_dense"] == 1
    assert dense["tokens_kept"]["image"] == [145] * 7
    for target in (50, 80):
        assert results["models"][f"random {target}%"]["macs_saved"] == pytest.approx(target / 100, abs=0.03)
    for model in results["models"].values():
        assert 0 <= model["accuracy"] <= 1
        assert sum(model["accuracy_by_family"].values()) / 6 <= 1


def test_demo_report_is_self_contained(shown):
    page = (shown / "report.html").read_text()
    assert not re.search(r"https?:|<script|<link|@import|url\(", page)
    sources = re.findall(r'src="([^"]*)"', page)
    assert len(sources) == 8 * 3
    assert all(source.startswith("data:image/") for source in sources)


def test_demo_report_says_what_it_shows(shown):
    page = (shown / "report.html").read_text()
    assert all(html.escape(name) in page for name in MODELS)
    questions = [question for batch in draw("test", 9) for question in batch.sentences]
    assert sum(question in page for question in questions) == 8
    assert page.count("in truth: <b>") == 8


@pytest.mark.parametrize("command", ["demo", "predict", "prune"])
def test_output_is_checked_before_the_work(command, tmp_path, monkeypatch, pair, photos, capsys):
    def work(*args, **kwargs):
        raise AssertionError("the work began before the output was checked")

    monkeypatch.setattr(demo, "create_model", work)
    monkeypatch.setattr(pictures, "read", work)
    (tmp_path / "file").write_text("in the way")
    arguments = {"demo": [], "predict": [*pair, "a circle"], "prune": ["vit_tiny_patch16_224_evit", str(photos)]}
    complaint = fails(capsys, command, *arguments[command], "--output", str(tmp_path / "file" / "below"))
    assert "cannot write to the folder" in complaint
    assert "choose another --output" in complaint


def test_demo_without_weights_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(zoo, "WEIGHTS", tmp_path / "none")
    assert "no weights come with" in fails(capsys, "demo", "--output", str(tmp_path / "out"))
