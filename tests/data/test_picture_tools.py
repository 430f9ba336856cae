"""The tools on pictures (smaller copies, edges, faces) against what the original wrote for the same pictures."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest
from PIL import Image

from library import messages
from library.data.edges import edges
from library.data.face_detectors import FoundFace
from library.data.resizing import parse_areas
from library.messages import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
RESIZE = json.loads((GOLDEN / "tools_resize.json").read_text(encoding="utf-8"))
CANNY = json.loads((GOLDEN / "tools_canny.json").read_text(encoding="utf-8"))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """run(script, *argv) in a folder of the test: (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)

    def start(script: str, *argv: object) -> tuple[int, str]:
        module: Any = importlib.import_module(f"tools.{script}")
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            messages.run(lambda: module.main(module.parse(module.SCRIPT)))
        except SystemExit as stop:
            code = int(stop.code or 0)
        return code, capsys.readouterr().err

    return start


def refused(run: Any, script: str, *argv: object, says: str) -> str:
    """The one line of a tool that must stop."""
    code, text = run(script, *argv)
    assert (code, "Traceback" in text) == (1, False), text
    line = text.splitlines()[-1]
    assert line.startswith("error: ")
    for words in says.split("|"):
        assert words in line, line
    return line


def gradient(size: tuple[int, int]) -> np.ndarray:
    width, height = size
    x, y = np.meshgrid(np.arange(width), np.arange(height))
    channels = (
        x * 255 // max(width - 1, 1),
        y * 255 // max(height - 1, 1),
        (x + y) * 255 // max(width + height - 2, 1),
    )
    return np.stack(channels, -1).astype(np.uint8)


def save(path: Path, size: list[int], mode: str = "RGB") -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = "JPEG" if path.suffix.lower() in (".jpg", ".jpeg") else path.suffix[1:].upper()
    Image.fromarray(gradient((size[0], size[1]))).convert(mode).save(path, kind)


def contents(folder: Path) -> dict[str, Any]:
    """Name -> size and mode of a picture, with its pixels' hash, or a text."""
    found: dict[str, Any] = {}
    for path in sorted(folder.iterdir()) if folder.exists() else ():
        if path.suffix in (".png", ".jpg") and path.read_bytes()[:3] in (b"\x89PN", b"\xff\xd8\xff"):
            with Image.open(path) as file:
                pixels = np.asarray(file.convert("RGB"))
                digest = hashlib.sha256(pixels.tobytes()).hexdigest()
                found[path.name] = {"size": list(file.size), "mode": file.mode, "sha256": digest}
        else:
            found[path.name] = {"text": path.read_text(encoding="utf-8", errors="replace")}
    return found


def resize_expected(case: dict) -> dict[str, Any] | None:
    """What a case gives here; None where the whole tool is refused."""
    expected = dict(case["outputs"])
    argv = case["argv"]
    if argv[1:2] in (["32"], ["32X32"]):
        return None
    if case["error"] == "IsADirectoryError":  # folders are left out, so the rest is done
        return expected
    if "bad.png" in case["others"]:  # left out and named; the original stopped
        return {"a+32x32.jpg": {"size": [39, 26], "mode": "RGB"}}
    if not case["source_path_absolute"]:  # the folder was joined twice
        absolute = next(c for c in RESIZE["resize"] if c["argv"] == argv and c["source_path_absolute"])
        return dict(absolute["outputs"])
    if "a.PNG" in case["files"]:  # pictures in any case of letters
        return {"a+32x32.jpg": {"size": [39, 26], "mode": "RGB"}, "b+32x32.jpg": {"size": [39, 26], "mode": "RGB"}}
    if {"a.png", "a.jpg"} <= case["files"].keys():  # in the order of names, so that the last one is known
        return {"a+32x32.jpg": {"size": [39, 26], "mode": "RGB"}}
    return expected


def is_from_original(case: dict, name: str) -> bool:
    """Whether an output of a list of sizes is not the first: made from the picture here, from the last result there."""
    labels = [item.strip() for item in case["argv"][1].split(",")] if case["argv"][:1] == ["--max_resolution"] else []
    labels = labels or ["512x512", "384x384", "256x256", "128x128"]
    return any(name.partition("+")[2].startswith(label) for label in labels[1:])


# Cases in which a later size of a list differs: made from the picture here, from the previous result there.
OTHER_SIZES = {3, 11, 13, 15, 19, 21, 23, 27, 33, 35, 37, 39, 80, 81, 82, 83, 94, 95, 96, 98, 125}
OTHER_PIXELS = {100, 101, 103, 104, 106, 107}


@pytest.mark.parametrize("number", range(126))
def test_smaller_copies(run: Any, tmp_path: Path, number: int) -> None:
    assert len(RESIZE["resize"]) == 126
    case = RESIZE["resize"][number]
    source, target = tmp_path / "in", tmp_path / "out"
    source.mkdir()
    for name, about in case["files"].items():
        save(source / name, about["size"], about["mode"])
    for name, text in case["others"].items():
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        (source / name).write_text(text, encoding="utf-8")
    given = source if case["source_path_absolute"] else source.name
    code, text = run("resize_images_to_resolution", given, target, *case["argv"])
    expected, found = resize_expected(case), contents(target)
    if expected is None:
        assert code == 1 and not found and "--max_resolution" in text
        return
    assert code == 0, text
    if case["error"] == "ValueError":  # a side below --divisible_by ended the run; here that result is left out
        assert "left out, a side would" in text and not found.keys() & case["outputs"].keys()
        return
    assert found.keys() == expected.keys()
    facts = [(name, key, about[key]) for name, about in expected.items() for key in about if key in found[name]]
    different = {name: key for name, key, value in facts if found[name][key] != value}
    assert all(is_from_original(case, name) for name in different)
    assert bool(different) == (number in OTHER_SIZES | OTHER_PIXELS)
    assert set(different.values()) <= ({"size", "sha256", "mean"} if number in OTHER_SIZES else {"sha256"})


def test_each_size_is_made_from_the_picture(run: Any, tmp_path: Path) -> None:
    save(tmp_path / "in" / "a.png", [100, 80])
    run("resize_images_to_resolution", "in", "list", "--max_resolution", "32x32, 64x64", "--save_as_png")
    run("resize_images_to_resolution", "in", "one", "--max_resolution", "64x64", "--save_as_png")
    assert contents(tmp_path / "list")["a+64x64.png"] == contents(tmp_path / "one")["a+64x64.png"]


def test_associated_files_have_exactly_the_name(run: Any, tmp_path: Path) -> None:
    save(tmp_path / "in" / "[a].png", [20, 20])
    for name in ("[a].txt", "[a].b.txt", "a.txt"):
        (tmp_path / "in" / name).write_text(name, encoding="utf-8")
    run("resize_images_to_resolution", "in", "out", "--max_resolution", "16x16", "--copy_associated_files")
    names = {"[a]+16x16.jpg", "[a]+16x16.txt", "[a].txt", "[a].b.txt", "a.txt"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names


def test_photographs_are_copied_upright(run: Any, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    (tmp_path / "in").mkdir()
    Image.fromarray(gradient((40, 20))).save(tmp_path / "in" / "a.jpg", exif=exif)
    run("resize_images_to_resolution", "in", "out", "--max_resolution", "64x64", "--save_as_png")
    with Image.open(tmp_path / "out" / "a+64x64.png") as file:
        assert file.size == (20, 40) and not file.getexif()


def test_what_resizing_refuses(run: Any, tmp_path: Path) -> None:
    tool = "resize_images_to_resolution"
    refused(run, tool, "nowhere", "out", says="nowhere does not exist")
    save(tmp_path / "in" / "a.png", [20, 20])
    refused(run, tool, "in", "in", says="both source and destination|another folder")
    refused(run, tool, "in/a.png", "out", says="is a file, not a folder")
    refused(run, tool, "in", "in/a.png", says="in/a.png")
    refused(run, tool, "in", "out", "--divisible_by", 0, says="--divisible_by is 0")
    refused(run, tool, "in", "out", "--max_resolution", "64x64,", says="an empty item")
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "a.png").write_text("no picture", encoding="utf-8")
    refused(run, tool, "bad", "out2", says="no picture in bad can be read")
    assert [path.name for path in (tmp_path / "in").iterdir()] == ["a.png"]


@pytest.mark.parametrize("text", ["", "64", "64X64", "0x64", "64x64x64", "64x-1"])
def test_sizes_that_cannot_be_read(text: str) -> None:
    with pytest.raises(UserError, match="WIDTHxHEIGHT"):
        parse_areas(text)


def edge_picture(name: str) -> np.ndarray:
    x, y = np.meshgrid(np.arange(64), np.arange(48))
    if name == "blocks":
        v = ((x // 9 + y // 7) % 3) * 90 + (x * y) % 11
        channels = (v, 255 - v, (2 * v) % 256)
    elif name == "disc":
        v = np.where((x - 30) ** 2 + (y - 20) ** 2 < 150, 200, 40) + x
        channels = (v, v // 2, 255 - v)
    else:
        v = ((x**2 + 3 * y**2) // 17) % 256
        channels = (v, (v + 4 * y) % 256, (3 * v) % 256)
    return np.stack(channels, -1).clip(0, 255).astype(np.uint8)


@pytest.mark.parametrize("case", CANNY["cases"], ids=lambda c: f"{c['picture']} {c['thres1']} {c['thres2']}")
def test_edges(run: Any, tmp_path: Path, case: dict) -> None:
    picture = edge_picture(case["picture"])
    found = edges(picture, case["thres1"], case["thres2"])
    assert list(found.shape) == case["shape"]
    if case["rows"] is not None:
        assert ["".join("#" if v else "." for v in row) for row in found] == case["rows"]
    assert int((found > 0).sum()) == case["edge_pixels"]
    assert sorted({0, 255} & set(found.flat)) == case["values"]
    assert hashlib.sha256(found.tobytes()).hexdigest() == case["sha256"]
    Image.fromarray(picture).save(tmp_path / "猫.png")
    (tmp_path / "out.png").write_bytes(b"overwritten")
    options = ("--thres1", case["thres1"], "--thres2", case["thres2"])
    assert run("canny", "--input", "猫.png", "--output", "out.png", *options)[0] == 0
    with Image.open(tmp_path / "out.png") as file:
        assert file.mode == "L" and np.array_equal(np.asarray(file), found)


@pytest.mark.parametrize("case", [case["case"] for case in CANNY["errors"]])
def test_what_edges_refuse(run: Any, tmp_path: Path, case: str) -> None:
    save(tmp_path / "a.png", [20, 20])
    if case == "missing input file":
        refused(run, "canny", "--input", "b.png", "--output", "o.png", says="--input b.png does not exist")
    elif case == "output without extension":
        (tmp_path / "o").write_text("earlier", encoding="utf-8")
        refused(run, "canny", "--input", "a.png", "--output", "o", says="--output o|.png")
        assert (tmp_path / "o").read_text(encoding="utf-8") == "earlier"
    else:
        refused(run, "canny", says="--input, --output missing")


def test_edges_of_what_is_no_picture(run: Any, tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("no picture", encoding="utf-8")
    refused(run, "canny", "--input", "a.png", "--output", "o.png", says="cannot read picture a.png")
    refused(run, "canny", "--input", "a.png", "--output", "o.xyz", says="--output o.xyz")


def detections(case: dict, name: str) -> str:
    faces = [
        {
            "bbox": found["bbox"],
            "score": found["score"],
            "left_eye": found["left_eye_kp19"],
            "right_eye": found["right_eye_kp11"],
        }
        for found in case["detections"]
    ]
    return json.dumps({name: faces})


# Several faces and a scaled picture: the original computed all but the first with the size after scaling.
SCALED = (
    ["--crop_size", "128,96", "--resize_fit"],
    ["--crop_size", "500,350"],
    ["--crop_size", "500,350", "--resize_fit"],
    ["--crop_size", "128,128", "--resize_face_size", "40"],
    ["--crop_size", "128,128", "--resize_face_size", "160"],
)


def face_case(case: dict) -> str:
    return f"{' '.join(case['argv'])} {case['image_name']} {case['image_mode']} {len(case['detections'])}"


@pytest.mark.parametrize("case", RESIZE["face"], ids=face_case)
def test_faces(run: Any, tmp_path: Path, case: dict) -> None:
    name = case["image_name"]
    save(tmp_path / "in" / name, case["image_size"], case["image_mode"])
    (tmp_path / "found.json").write_text(detections(case, name), encoding="utf-8")
    options = ("--src_dir", "in", "--dst_dir", "out", "--detector", "json", "--detections_file", "found.json")
    code, text = run("detect_face_rotate", *options, *case["argv"])
    found = {path.name: path for path in sorted((tmp_path / "out").glob("*"))}
    if case["error"]:
        assert code == 1 and not found and text.splitlines()[-1].startswith("error: --")
        return
    assert code == 0, text
    if name == "f.jpeg":  # found like every other picture; the original looked for .png, .jpg and .webp
        assert list(found) == ["f_0048_0048_0080_0070.png"]
        return
    expected = case["outputs"]
    if case["argv"] in SCALED and len(case["detections"]) > 1:
        largest = max(case["detections"], key=lambda one: one["bbox"][2] - one["bbox"][0])["bbox"]
        assert len(found) == 3
        expected = {key: value for key, value in expected.items() if first_face(key, largest)}
        assert len(expected) == 1
    else:
        assert found.keys() == expected.keys()
    exact = cv2.__version__ >= "5" or "--rotate" not in case["argv"]
    for key, about in expected.items():
        pixels = cv2.imread(str(found[key]), cv2.IMREAD_UNCHANGED)
        assert list(pixels.shape) == about["shape"]
        assert np.allclose(pixels.reshape(-1, 3).mean(0), about["mean"], atol=0.1)
        assert not exact or hashlib.sha256(pixels.tobytes()).hexdigest() == about["sha256"], key


def first_face(name: str, box: list[int]) -> bool:
    """Whether a result's name states a face with the shape of this box."""
    width, height = (int(part) for part in name.removesuffix(".png").split("_")[-2:])
    return abs(width / height - (box[2] - box[0]) / (box[3] - box[1])) < 0.05


def test_every_face_is_cut_as_if_it_were_alone(run: Any, tmp_path: Path) -> None:
    several = next(c for c in RESIZE["face"] if c["argv"] == SCALED[0] and len(c["detections"]) > 1)
    save(tmp_path / "in" / "f.png", several["image_size"])
    options = ("--src_dir", "in", "--detector", "json", "--detections_file", "found.json", *several["argv"])
    (tmp_path / "found.json").write_text(detections(several, "f.png"), encoding="utf-8")
    run("detect_face_rotate", "--dst_dir", "all", *options)
    for one in several["detections"]:
        (tmp_path / "found.json").write_text(detections({"detections": [one]}, "f.png"), encoding="utf-8")
        run("detect_face_rotate", "--dst_dir", "single", *options)
    assert contents(tmp_path / "all") == contents(tmp_path / "single")
    assert len(contents(tmp_path / "all")) == 3


def test_faces_of_no_size_are_left_out(run: Any, tmp_path: Path) -> None:
    save(tmp_path / "in" / "f.png", [64, 64])
    (tmp_path / "found.json").write_text('{"f.png": [{"bbox": [5, 5, 5, 5]}]}', encoding="utf-8")
    options = ("--src_dir", "in", "--dst_dir", "out", "--detector", "json", "--detections_file", "found.json")
    assert run("detect_face_rotate", *options, "--crop_ratio", "2,2")[0] == 0
    assert not list((tmp_path / "out").iterdir())


def test_what_faces_refuse(run: Any, tmp_path: Path) -> None:
    tool = "detect_face_rotate"
    save(tmp_path / "in" / "f.png", [64, 64])
    folders = ("--src_dir", "in", "--dst_dir", "out")
    refused(run, tool, "--src_dir", "in", says="--dst_dir missing")
    refused(run, tool, *folders, says="anime_face_detector|--detector cascade")
    refused(run, tool, *folders, "--detector", "cascade", says="needs --cascade_file")
    refused(run, tool, *folders, "--detector", "cascade", "--cascade_file", "x.xml", says="x.xml does not exist")
    refused(run, tool, *folders, "--detector", "cascade", "--rotate", says="--rotate with --detector cascade")
    refused(run, tool, *folders, "--detector", "json", says="needs --detections_file")
    refused(run, tool, "--src_dir", "no", "--dst_dir", "out", says="no does not exist")
    path = tmp_path / "d.json"
    options = (*folders, "--detector", "json", "--detections_file", "d.json")
    for text, says in (
        ("{", "is no valid JSON"),
        ("[]", "holds no object"),
        ('{"f.png": [{"score": 1}]}', "a face of f.png cannot be read"),
        ('{"f.png": [3]}', "a face of f.png cannot be read"),
        ('{"f.png": 3}', "f.png has no list of faces"),
        ('{"f.png": [{"bbox": [1, 2, 3]}]}', "a face of f.png cannot be read"),
    ):
        path.write_text(text, encoding="utf-8")
        refused(run, tool, *options, says=says)
    assert not (tmp_path / "out").exists()
    (tmp_path / "in" / "f.png").write_text("no picture", encoding="utf-8")
    path.write_text("{}", encoding="utf-8")
    refused(run, tool, *options, says="no picture in in can be read")


def test_a_cascade(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With an OpenCV that has cascades, or one that stands in for it."""
    save(tmp_path / "in" / "f.png", [64, 64])
    (tmp_path / "c.xml").write_text("<x/>", encoding="utf-8")
    seen = []

    class Cascade:
        def __init__(self, path: str) -> None:
            assert path == "c.xml"

        def empty(self) -> bool:
            return False

        def detectMultiScale(self, grey: np.ndarray, **options: Any) -> list[tuple[int, ...]]:
            seen.append((grey.shape, options))
            return [(10, 12, 24, 26)]

    options = ("--src_dir", "in", "--dst_dir", "out", "--detector", "cascade", "--cascade_file", "c.xml")
    monkeypatch.setattr(cv2, "CascadeClassifier", Cascade, raising=False)
    assert run("detect_face_rotate", *options)[0] == 0
    assert seen == [((64, 64), {"scaleFactor": 1.1, "minNeighbors": 5, "minSize": (24, 24)})]
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["f_0022_0025_0024_0026.png"]
    monkeypatch.delattr(cv2, "CascadeClassifier")
    refused(run, "detect_face_rotate", *options, says="has no cascades|contrib")


def test_the_package_is_asked_as_it_wants(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(tmp_path / "in" / "f.png", [64, 64])
    points = np.zeros((28, 3))
    points[11], points[19] = (20, 30, 1), (40, 30, 1)

    class Package:
        @staticmethod
        def create_detector(name: str, device: str) -> Any:
            assert name == "yolov3"
            return lambda image: [{"bbox": np.array([10, 10, 50, 50, 0.95]), "keypoints": points}]

    monkeypatch.setitem(sys.modules, "anime_face_detector", Package)
    assert run("detect_face_rotate", "--src_dir", "in", "--dst_dir", "out", "--rotate")[0] == 0
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["f_0030_0030_0040_0040.png"]


def test_a_face_knows_its_eyes_by_default_not() -> None:
    assert FoundFace((0, 0, 1, 1)).left_eye is None
