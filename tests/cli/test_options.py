"""Wrong values of every option: refused before any work begins, with the option's name and what to write."""

from __future__ import annotations

import argparse
import json

import pytest
from torch import nn

from vltprune.cli import main as cli

EVAL = ["eval", "--task", "nlvr", "--model", "blip_nlvr_tiny", "--data", "synthetic:test"]
FEATURES = ["features", "vit_tiny_patch16_224_evit", "PHOTOS"]
EXPORT = ["export", "vit_tiny_patch16_224"]
PRUNE = ["prune", "vit_tiny_patch16_224", "--data", "PHOTOS", "--reduction", "0.5"]
COMPRESS = [
    "compress",
    "--task",
    "nlvr",
    "--model",
    "blip_nlvr_tiny",
    "--data",
    "synthetic:train:8",
    "--val",
    "synthetic:val:8",
]
ABLATE = [
    "ablate",
    "--grid",
    "preset=evit; reduction=0.5",
    "--task",
    "nlvr",
    "--model",
    "blip_nlvr_tiny",
    "--data",
    "synthetic:test:8",
]
PREDICT = ["predict", "LEFT", "RIGHT", "a circle"]
CHAT = ["chat", "blip_nlvr_tiny", "LEFT", "RIGHT", "a circle"]
RUNS = (["demo"], PREDICT, CHAT, ["info", "blip_tiny"], ["macs", "blip_tiny"], FEATURES, PRUNE, EVAL, ABLATE, COMPRESS)
WHOLE = "is no whole number above 0: write 1 or more"
SHARE = "is no fraction: write a number between 0 and 1, such as 0.5"
SEED = "is no seed: write a whole number from 0"
PAIR = "write name=value, such as image_size=96"

WRONG = [
    *(([*run, "--device", "cuda:99"], "--device", "is no device of this machine: it has cpu") for run in RUNS),
    *(([*run, "--dtype", "bf16"], "--dtype", "there is no dtype 'bf16'; did you mean bfloat16") for run in RUNS),
    *((["demo", "--pairs", value], "--pairs", WHOLE) for value in ("abc", "0", "-3", "1.5", "")),
    *((["demo", "--seed", value], "--seed", SEED) for value in ("abc", "-1", "1.5", str(2**70))),
    *(
        (["demo", "--threads", value], "--threads", says)
        for value, says in (("0", WHOLE), ("x", WHOLE), ("99999", "too many"))
    ),
    (["demo", "--output", ""], "--output", "it is empty"),
    (["predict", "nowhere.png", "RIGHT", "a circle"], "nowhere.png", "there is no "),
    ([*PREDICT, "--output", "kept.pdf"], "--output kept.pdf", "write an image file, such as kept.png, or a folder"),
    ([*PREDICT, "--output", "FILE/below"], "--output", "a file is in its way"),
    ([*PREDICT, "--pretrained", "nowhere.pth"], "nowhere.pth", "give a folder with model.safetensors"),
    (["chat", "blip_nlvr_tiny", "nowhere.png", "a circle"], "nowhere.png", "there is no "),
    ([*CHAT, "--picture", "read.txt"], "--picture", "write an image file"),
    ([*CHAT, "--max-new-tokens", "0"], "--max-new-tokens", WHOLE),
    ([*CHAT, "--processor", "nowhere"], "--processor", "there is no folder"),
    (["list", "--import", "no_such_module"], "no_such_module", "cannot import no_such_module: ModuleNotFoundError"),
    (["check", "scorer:random", "--examples", "0"], "--examples", WHOLE),
    (["check", "scorer:random", "--seed", "-1"], "--seed", SEED),
    *(([*run, "--selector", "topp"], "--selector", "did you mean top") for run in (FEATURES, PRUNE, CHAT)),
    (["list", "--library", "keras"], "--library", "choose from"),
    (["list", "--models", "--tags"], "--tags", "not allowed with argument"),
    (["info", "vit_tiny_patch16_224", "img_size"], "name=value", PAIR),
    (["info", "vit_tiny_patch16_224", "=3"], "name=value", PAIR),
    (["info", "vit_tiny_patch16_224", "img_size=abc"], "img_size='abc'", "cannot be built with"),
    (["info", "vit_tiny_patch16_224", "embed_dim=190"], "embed_dim=190", "cannot be built with"),
    (["info", "vit_tiny_patch16_224", "imgsize=96"], "imgsize=96", "cannot be built with"),
    (["info", "ViT-S-32-alt", "force_image_size=abc"], "force_image_size='abc'", "cannot be built with"),
    (["info", "blip_nlvr_tiny", "vision_depth=abc"], "vision_depth='abc'", "cannot be built with"),
    (["info", "blip_nlvr_tiny_madtp", "at=99"], "at=[99]", "depths 0 .. 5, or -6 .. -1 from the end"),
    (["macs", "vit_tiny_patch16_224", "--image-size", "big"], "--image-size", WHOLE),
    (["macs", "vit_tiny_patch16_224", "--tokens", "0"], "--tokens", WHOLE),
    (["features", "vit_tiny_patch16_224_evit", "nowhere"], "folder", "there is no folder 'nowhere'"),
    (["features", "vit_tiny_patch16_224_evit", "FILE"], "folder", "it is a file"),
    ([*FEATURES, "--preset", "evitt"], "--preset", "did you mean evit"),
    ([*FEATURES, "--scorer", "rando"], "--scorer", "did you mean random"),
    ([*FEATURES, "--keep", "ratio(rato=0.5)"], "--keep", "did you mean ratio"),
    ([*FEATURES, "--keep", "ratio(half)"], "--keep", "write name or name(key=value, ...)"),
    ([*FEATURES, "--keep", "ratio(0.5, 1, 2)"], "--keep", "takes ratio, decay, in this order, and 3 were given"),
    ([*FEATURES, "--keep", "ratio('half')"], "--keep", "ratio='half' must be a number"),
    ([*FEATURES, "--keep", "count"], "--keep", "write count=..."),
    ([*FEATURES, "--reducer", "none"], "--reducer", "write one of "),
    ([*FEATURES, "--guide", "codebok"], "--guide", "codebook"),
    *(
        ([*FEATURES, "--at", value], "--at", "such as --at 3,6,9")
        for value in ("first", "1;2", "1.5", "True", "", "None")
    ),
    ([*FEATURES, "--at", "40"], "at=[40]", "depths 0 .. 11"),
    *(
        ([*FEATURES, "--reduction", value], "--reduction", SHARE)
        for value in ("abc", "0", "1", "1.5", "-0.5", "nan", "50%")
    ),
    *(([*FEATURES, f"--{name}", "0"], f"--{name}", WHOLE) for name in ("limit", "batch-size", "calibrate-on")),
    ([*FEATURES, "--draw", "-1"], "--draw", WHOLE),
    ([*FEATURES, "--output", "FILE"], "--output", "a file is in its way"),
    (["prune", "vit_tiny_patch16_224", "--data", "PHOTOS"], "--reduction", "are required"),
    (["prune", "vit_tiny_patch16_224", "--reduction", "0.5"], "--data", "are required"),
    ([*PRUNE, "--data", "nowhere"], "--data", "there is no annotation file nowhere"),
    ([*PRUNE, "--data", "FILE", "--images", "nowhere"], "--images", "there is no folder nowhere"),
    ([*PRUNE, "--task", "nlv"], "--task", "choose from"),
    ([*PRUNE, "--vocabulary", "nowhere.txt"], "--vocabulary", "there is no file 'nowhere.txt'"),
    *(([*run, "--preset", "evitt"], "--preset", "did you mean evit") for run in (PRUNE, CHAT)),
    *(([*run, "--scorer", "rando"], "--scorer", "did you mean random") for run in (PRUNE, CHAT)),
    *(([*run, "--keep", "ratio(rato=0.5)"], "--keep", "did you mean ratio") for run in (PRUNE, CHAT)),
    *(([*run, "--reducer", "none"], "--reducer", "write one of ") for run in (PRUNE, CHAT)),
    *(([*run, "--guide", "codebok"], "--guide", "codebook") for run in (PRUNE, CHAT)),
    *(([*run, "--at", "first"], "--at", "such as --at 3,6,9") for run in (PRUNE, CHAT)),
    *(([*run, "--place", "mlp"], "--place", "choose from") for run in (FEATURES, PRUNE, CHAT)),
    ([*ABLATE, "--grid", "preset=evitt"], "--grid", "did you mean evit"),
    ([*ABLATE, "--task", "nlv"], "--task", "choose from"),
    ([*ABLATE, "--data", "nowhere"], "--data", "there is no annotation file nowhere"),
    ([*ABLATE, "--val", "nowhere"], "--val", "there is no annotation file nowhere"),
    ([*ABLATE, "--images", "nowhere"], "--images", "there is no folder nowhere"),
    ([*ABLATE, "--output", "FILE"], "--output", "a file is in its way"),
    ([*ABLATE, "--tolerance", "2"], "--tolerance", SHARE),
    ([*ABLATE, "--repeats", "-1"], "--repeats", "whole number"),
    *(([*ABLATE, f"--{name}", "0"], f"--{name}", WHOLE) for name in ("limit", "val-limit", "batch-size", "jobs")),
    *(([*PRUNE, "--reduction", value], "--reduction", SHARE) for value in ("abc", "0", "1", "1.5", "image=2")),
    *(([*run, f"--{name}", "0"], f"--{name}", WHOLE) for run in (PRUNE, EXPORT) for name in ("limit", "batch-size")),
    ([*EXPORT, "--format", "tensorrt"], "--format", "choose from"),
    ([*EXPORT, "--output", "a.bin"], "a.bin", "is not that of a format"),
    ([*EXPORT, "--batch", "0"], "--batch", WHOLE),
    ([*EXPORT, "--data", "nowhere"], "--data", "there is no folder 'nowhere'"),
    ([*EXPORT, "--data", "PHOTOS", "--quantile", "1.5"], "--quantile", "is no quantile"),
    ([*PRUNE, "--output", "FILE"], "--output", "a file is in its way"),
    ([*EVAL, "--task", "nlv"], "--task", "choose from"),
    ([*EVAL, "--data", "nowhere.json"], "--data", "there is no annotation file nowhere.json"),
    ([*EVAL, "--data", "PHOTOS"], "--data", "is a folder: give the annotation file in it"),
    ([*EVAL, "--data", "synthetic:nope"], "nope", "no split"),
    ([*EVAL, "--images", "nowhere"], "--images", "there is no folder nowhere"),
    ([*EVAL, "--images", "vqa=nowhere"], "--images", "there is no folder nowhere"),
    *(([*run, "--answers", "nowhere.json"], "--answers", "there is no file 'nowhere.json'") for run in (EVAL, ABLATE)),
    ([*EVAL, "--answers", "PHOTOS"], "--answers", "is a folder: give a file in it"),
    *(([*run, "--vocabulary", "nowhere.txt"], "--vocabulary", "there is no file") for run in (EVAL, ABLATE)),
    *(([*run, "--model-args", "image_size"], "--model-args", PAIR) for run in (EVAL, ABLATE)),
    ([*EVAL, "--model-args"], "--model-args", "expected at least one argument"),
    ([*EVAL, "--limit", "0"], "--limit", WHOLE),
    ([*EVAL, "--batch-size", "none"], "--batch-size", WHOLE),
    *(([*run, "--workers", "-1"], "--workers", WHOLE) for run in (EVAL, ABLATE)),
    ([*EVAL, "--k-test", "5"], "--k-test 5", "only retrieval has a second stage"),
    ([*EVAL, "--answers", "FILE"], "--answers", "goes with --task vqa"),
    ([*EVAL, "--model", "blip_nlvr_tinny"], "blip_nlvr_tinny", "did you mean blip_nlvr_tiny"),
    ([*EVAL, "--model", "blip_nlvr_tiny_evit", "--model-args", "keep=ratio(rato=0.5)"], "rato", "did you mean ratio"),
    ([*FEATURES[:1], "vit_tiny_patch16_22", "PHOTOS"], "vit_tiny_patch16_22", "did you mean"),
    ([*PRUNE, "--pretrained", "nowhere.pth"], "nowhere.pth", "give a folder with model.safetensors"),
    ([*PREDICT, "--model", "blip_nlvr_tinny"], "blip_nlvr_tinny", "did you mean blip_nlvr_tiny"),
    (["macs", "vit_tiny_patch16_22"], "vit_tiny_patch16_22", "did you mean"),
    (["info", "blip_nlvr_tiny_madtp", "keep=ratio(rato=0.5)"], "rato", "did you mean ratio"),
    ([*EVAL, "--k-test", "x"], "--k-test", WHOLE),
    *(
        ([*EVAL, "--device", value], "--device", "is no device of this machine: it has cpu")
        for value in ("gpu", "meta", "")
    ),
    ([*EVAL, "--output", "FILE"], "--output", "a file is in its way"),
    (["compress"], "--task caption|", "a compression config needs task, model, data, val"),
    (["compress", "--task", "nlvr", "--model", "x", "--data", "y"], "--val FILE", "a compression config needs val"),
    ([*COMPRESS, "--config", "nowhere.yaml"], "--config", "there is no file 'nowhere.yaml'"),
    ([*COMPRESS, "--config", "PHOTOS"], "--config", "is a folder"),
    ([*COMPRESS, "--task", "nvlr"], "--task", "choose from"),
    ([*COMPRESS, "--preset", "madtq"], "--preset", "did you mean madtp"),
    ([*PRUNE, "--preset", "sparsevlm(tokens=5)"], "--preset", "counts are published for 192, 128, 96, 64"),
    ([*COMPRESS, "--reduction", "1"], "--reduction", SHARE),
    ([*COMPRESS, "--reduction", "half"], "--reduction", SHARE),
    ([*COMPRESS, "--reduction", "image=0.5,text=2"], "--reduction", SHARE),
    ([*COMPRESS, "--reduction", "image=0.5,text=0"], "--reduction", SHARE),
    *(
        (
            [*COMPRESS, "--reduction", f"image=0.5,{more}"],
            "--reduction",
            "one for each tower, such as image=0.5,text=0.3",
        )
        for more in ("text", "image=0.3", "0.3=text", "")
    ),
    ([*COMPRESS, "--set", "reduction=a"], "--set: reduction='a'", "or one for each tower, such as reduction={'image'"),
    ([*COMPRESS, "--set", "reduction={'image': 1}"], "--set: reduction={'image': 1}", "between 0 and 1 for each tower"),
    ([*COMPRESS, "--reduction", "image=0.5", "--set", "budget=learned"], "--set: budget=", "write budget='controller'"),
    ([*COMPRESS, "--data", "nowhere.json"], "--data", "there is no annotation file nowhere.json"),
    ([*COMPRESS, "--val", "PHOTOS"], "--val", "is a folder: give the annotation file in it"),
    ([*COMPRESS, "--images", "nowhere"], "--images", "there is no folder nowhere"),
    ([*COMPRESS, "--val-images", "FILE"], "--val-images", "there is no folder"),
    ([*COMPRESS, "--output", "FILE"], "--output", "a file is in its way"),
    ([*COMPRESS, "--set"], "--set", "expected at least one argument"),
    ([*COMPRESS, "--set", "steps"], "--set", "write name=value"),
    ([*COMPRESS, "--set", "step=3"], "'step'", "did you mean steps"),
    ([*COMPRESS, "--set", "steps=abc"], "--set: steps='abc'", "must be a whole number, such as steps=2000"),
    ([*COMPRESS, "--set", "steps=1.5"], "--set: steps=1.5", "must be a whole number"),
    ([*COMPRESS, "--set", "steps=True"], "--set: steps=True", "must be a whole number"),
    ([*COMPRESS, "--set", "steps=0"], "--set: steps=0", "must be 1 or more"),
    ([*COMPRESS, "--set", "lr=fast"], "--set: lr='fast'", "must be a number, such as lr=0.0001"),
    ([*COMPRESS, "--set", "lr=-1"], "--set: lr=-1", "must be above 0"),
    (
        [*COMPRESS, "--set", "max_grad_norm=None"],
        "--set: max_grad_norm=None",
        "must be a number, such as max_grad_norm=1",
    ),
    ([*COMPRESS, "--set", "serve=a"], "--set: serve='a'", "must be a number, such as serve=0.5"),
    ([*COMPRESS, "--set", "serve=(2,)"], "--set: serve=(2,)", "between 0 and 1"),
    ([*COMPRESS, "--set", "freeze=3"], "--set: freeze=3", "must be text, such as freeze=text.*"),
    ([*COMPRESS, "--set", "augment=maybe"], "--set: augment='maybe'", "must be True or False"),
    ([*COMPRESS, "--set", "parts=drop"], "--set: parts='drop'", "must be a mapping"),
    ([*COMPRESS, "--set", "parts={'keep': 'ratoi'}"], "--set: parts={'keep': 'ratoi'}", "did you mean ratio"),
    ([*COMPRESS, "--set", "model_args=3"], "--set: model_args=3", "must be a mapping"),
    ([*COMPRESS, "--set", "dtype=8"], "--set: dtype=8", "must be text, such as dtype=bfloat16"),
    ([*COMPRESS, "--set", "dtype=bf16"], "--set: dtype='bf16'", "write dtype='float32', 'bfloat16' or 'float16'"),
    ([*COMPRESS, "--device", "cpu", "--dtype", "float16"], "dtype='float16'", "write dtype='bfloat16'"),
    ([*COMPRESS, "--set", "budget=soft"], "--set: budget='soft'", "write budget='controller'"),
    ([*COMPRESS, "--set", "val_limit=0"], "--set: val_limit=0", "must be 1 or more"),
    ([*COMPRESS, "--set", "seed=-1"], "--set: seed=-1", "must be 0 or more"),
    ([*COMPRESS, "--set", "pretrained=3"], "--set: pretrained=3", "must be text"),
]

# what only the model that is built can refuse
BY_THE_MODEL = ("cannot be built with", "depths 0 .. 5, or -6 .. -1 from the end", "depths 0 .. 11")


@pytest.mark.parametrize(("argv", "name", "says"), WRONG, ids=[" ".join(argv[-2:]) for argv, _, _ in WRONG])
def test_wrong_values_are_refused_at_once(argv, name, says, pair, photos, tmp_path, monkeypatch, fails):
    if argv[0] == "compress":
        pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")

    def work(*_, **__):
        raise AssertionError("a model was built before the option was checked")

    if says not in BY_THE_MODEL:
        monkeypatch.setattr(nn.Module, "__init__", work)
    (tmp_path / "file").write_text("in the way")
    places = {"PHOTOS": str(photos), "FILE": str(tmp_path / "file"), "LEFT": pair[0], "RIGHT": pair[1]}
    places["FILE/below"] = str(tmp_path / "file" / "below")
    monkeypatch.chdir(tmp_path)
    complaint = fails(*(places.get(one, one) for one in argv))
    assert name in complaint and says in complaint
    assert "Errno" not in complaint
    assert not list(tmp_path.glob("compress/*")) and not list(tmp_path.glob("demo/*"))


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("- 1\n", "must hold the fields of a compression config, it holds list"),
        ("a: [1\n", "is not YAML"),
        ("\xff\xfe", "it is no text in UTF-8"),
        ("steps: many\n", "steps='many' must be a whole number, such as steps=2000"),
        ("steps: 2e3\nlr: quick\n", "lr='quick' must be a number"),
        ("stepps: 3\n", "did you mean steps"),
    ],
)
def test_files_of_wrong_fields_are_named(text, says, tmp_path, monkeypatch, fails):
    pytest.importorskip("accelerate", reason="training needs accelerate: pip install 'vltprune[train]'")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run.yaml").write_bytes(text.encode("latin-1"))
    complaint = fails(*COMPRESS, "--config", "run.yaml")
    assert says in complaint and ("run.yaml" in complaint or "stepps" in complaint)


def test_every_option_is_in_the_table():
    """Options that take a value, of every command: each is tried with a wrong one above, or takes any text."""
    free = {("list", "pattern"), ("predict", "sentence"), ("predict", "right"), ("predict", "model"), ("eval", "model")}
    free |= {
        ("compress", "model"),
        *((command, "model") for command in ("info", "macs", "features", "prune", "export")),
    }
    free |= {("check", "part"), ("check", "args"), ("export", "tower"), ("chat", "model"), ("chat", "question")}
    alike = {"pretrained": "predict", "threads": "demo", "import": "list"}  # tried with one command
    tried = {(argv[0], option.strip("-").replace("-", "_")) for argv, name, _ in WRONG for option in (*argv, name)}
    tried |= {("info", "arguments"), ("predict", "left"), ("chat", "images")}
    subparsers = next(a for a in cli.build_parser()._actions if isinstance(a, argparse._SubParsersAction))
    for command, parser in subparsers.choices.items():
        for action in parser._actions:
            if action.nargs != 0 and (command, action.dest) not in free:
                assert (alike.get(action.dest, command), action.dest) in tried, f"{command} {action.dest}"


def test_what_is_right_is_taken(tmp_path):
    parse = cli.build_parser().parse_args
    args = parse([*FEATURES[:2], str(tmp_path), "--at=-1,0.5", "--guide", "None", "--reduction", ".5", "--draw", "0"])
    assert (args.at, args.guide, args.reduction, args.draw) == ((-1, 0.5), "none", 0.5, 0)
    assert parse([*COMPRESS, "--reduction", "0"]).reduction == 0.0
    assert parse([*COMPRESS, "--reduction", "image=0.5, text=.3"]).reduction == {"image": 0.5, "text": 0.3}
    assert parse([*EVAL, "--vocabulary", "org/name", "--device", "cpu", "--workers", "0"]).vocabulary == "org/name"
    (tmp_path / "run.json").write_text(json.dumps({"steps": 10}))
    args = parse([*COMPRESS, "--config", str(tmp_path / "run.json"), "--set", "lr=1e-4", "a=b=c"])
    assert args.set == ["lr=1e-4", "a=b=c"]
