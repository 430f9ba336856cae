"""The tools on captions, tags and metadata files, against what the original wrote for the same files."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from library import messages
from library.data.text_cleaning import clean_caption, clean_tags
from library.messages import UserError

GOLDEN = Path(__file__).parents[1] / "golden"
CASES = json.loads((GOLDEN / "tools_captions.json").read_text(encoding="utf-8"))
SCANS = json.loads((GOLDEN / "tools_misc.json").read_text(encoding="utf-8"))["scan"]
# Lists of the file that captioners read, which are still to come.
LATER = {"git_remove_words"}

MERGE_CAPTIONS, MERGE_TAGS = "finetune/merge_captions_to_metadata.py", "finetune/merge_dd_tags_to_metadata.py"
CLEAN = "finetune/clean_captions_and_tags.py"


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """run(script, *argv) in a folder of the test: (exit code, standard error)."""
    monkeypatch.chdir(tmp_path)

    def start(script: str, *argv: object) -> tuple[int, str]:
        module: Any = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        source = Path(module.__file__).read_text(encoding="utf-8")
        monkeypatch.setattr(sys, "argv", [script, *map(str, argv)])
        capsys.readouterr()
        code = 0
        try:
            # the last line of the script, as `python SCRIPT` runs it
            exec(compile(source.rpartition('if __name__ == "__main__":\n    ')[2], script, "exec"), vars(module))
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
        assert words in line
    return line


def test_every_list_is_read() -> None:
    assert set(CASES) == {"about", "clean_tags", "clean_captions", "clean_main", "merge"} | LATER


def test_clean_tags() -> None:
    assert len(CASES["clean_tags"]) == 169
    wrong = [(c["in"], c["out"], clean_tags(c["in"])) for c in CASES["clean_tags"] if clean_tags(c["in"]) != c["out"]]
    assert not wrong


def test_clean_captions() -> None:
    assert len(CASES["clean_captions"]) == 73
    wrong = [(c["in"], c["out"]) for c in CASES["clean_captions"] if clean_caption(c["in"]) != c["out"]]
    assert not wrong


@pytest.mark.parametrize("tags", ["", "2girls, red_eyes, blue_eyes", "red_hair, blue_hair, girls", ", rating:safe"])
def test_tags_may_all_go(tags: str) -> None:
    assert clean_tags(tags) in ("", "2girls", "girls")


def test_several_ratings_are_said(run: Any, tmp_path: Path) -> None:
    for number, case in enumerate(CASES["clean_tags"]):
        if number % 8 and not case["says_multiple_ratings"]:
            continue
        (tmp_path / "in.json").write_text(json.dumps({"a": {"tags": case["in"], "caption": ""}}), encoding="utf-8")
        _, text = run(CLEAN, "in.json", "out.json")
        assert ("several ratings" in text) == case["says_multiple_ratings"], case["in"]


@pytest.mark.parametrize("case", CASES["clean_main"]["cases"], ids=lambda case: " ".join(case["argv"]))
def test_cleaning_a_file(run: Any, tmp_path: Path, case: dict) -> None:
    (tmp_path / "in.json").write_text(json.dumps(CASES["clean_main"]["in_json"]), encoding="utf-8")
    code, text = run(CLEAN, *case["argv"])
    # a missing file is an error here, and was a message with exit code 0
    assert code == (1 if "missing.json" in case["argv"] else case["returncode"])
    out = tmp_path / "out.json"
    assert out.exists() == case["out_written"]
    if case["out_written"]:
        assert out.read_bytes().decode() == case["out_text"]
    assert ("some_dir is not used" in text) == case["warned_three_args"]
    assert "Traceback" not in text
    if "--debug" in case["argv"]:
        assert "a, caption before: an anime woman" in text and "a, caption after: an girl" in text


def make_tree(root: Path, tree: dict[str, str]) -> None:
    (root / "tree").mkdir()
    for name, text in tree.items():
        path = root / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8", newline="")


@pytest.mark.parametrize("case", CASES["merge"], ids=lambda case: f"{case['script'][15:23]}: {case['case']}")
def test_merging(run: Any, tmp_path: Path, case: dict) -> None:
    make_tree(tmp_path, case["tree"])
    for name, content in (("in.json", case["in_json"]), ("out.json", case["out_json_before"])):
        if content is not None:
            (tmp_path / name).write_text(json.dumps(content), encoding="utf-8")
    code, text = run(case["script"], *case["argv"])
    member = "caption" if case["script"] == MERGE_CAPTIONS else "tags"
    out = tmp_path / "out.json"
    if case["case"] == "missing text file":  # told at the end; the original stopped without writing anything
        assert code == 0 and "1 pictures have no" in text and "tree/a.png" in text
        assert json.loads(out.read_text(encoding="utf-8")) == {"a": {}, "b": {member: "only b"}}
        return
    assert code == (1 if case["error"] else 0)
    if case["error"]:
        assert not out.exists() and text.splitlines()[-1].startswith("error: ")
        return
    assert out.read_bytes().decode() == case["out_text"]
    assert ("share an entry: a" in text) == (case["case"] == "two images share a stem")
    if "--debug" in case["argv"]:
        assert f"a: {case['out']['a'][member]}" in text


def test_an_old_value_stays_where_the_text_is_missing(run: Any, tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.png": ""})
    (tmp_path / "out.json").write_text('{"a": {"caption": "old"}}', encoding="utf-8")
    run(MERGE_CAPTIONS, "tree", "out.json")
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"a": {"caption": "old"}}


def test_an_extension_gets_its_dot(run: Any, tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.png": "", "a.txt": "x"})
    assert run(MERGE_TAGS, "tree", "out.json", "--caption_extension", "txt")[0] == 0
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == {"a": {"tags": "x"}}


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_text_files_with_and_without_mark(run: Any, tmp_path: Path, encoding: str) -> None:
    make_tree(tmp_path, {"猫.png": ""})
    (tmp_path / "tree" / "猫.caption").write_bytes("\u3000ein Kätzchen\r\nzwei\n".encode(encoding))
    (tmp_path / "out.json").write_bytes('{"猫": {"tags": "é"}}'.encode(encoding))
    assert run(MERGE_CAPTIONS, "tree", "out.json")[0] == 0
    expected = {"猫": {"tags": "é", "caption": "ein Kätzchen\nzwei"}}
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == expected


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("{", "is no valid JSON|mend the file"),
        ("[" * 100_000, "out.json"),
        ("[]", "holds no object"),
        ('{"a": []}', "the entry of a is no object"),
        (b"\xff{}", "is not UTF-8"),
    ],
)
def test_a_broken_metadata_file_stays(run: Any, tmp_path: Path, content: str | bytes, says: str) -> None:
    make_tree(tmp_path, {"a.png": "", "a.caption": "x", "a.txt": "x"})
    data = content if isinstance(content, bytes) else content.encode()
    (tmp_path / "out.json").write_bytes(data)
    for script in (MERGE_CAPTIONS, MERGE_TAGS):
        refused(run, script, "tree", "out.json", says=says)
    refused(run, CLEAN, "out.json", "out.json", says=says)
    assert (tmp_path / "out.json").read_bytes() == data


def test_a_text_that_is_no_text_leaves_the_earlier_file(run: Any, tmp_path: Path) -> None:
    make_tree(tmp_path, {"a.png": "", "b.png": "", "a.caption": "x"})
    (tmp_path / "tree" / "b.caption").write_bytes(b"un\xe9")
    (tmp_path / "out.json").write_text("{}", encoding="utf-8")
    refused(run, MERGE_CAPTIONS, "tree", "out.json", says="b.caption is not UTF-8|save it as UTF-8")
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == "{}"


def test_what_cannot_be_read_or_written(run: Any, tmp_path: Path) -> None:
    refused(run, MERGE_CAPTIONS, "nowhere", "out.json", says="nowhere does not exist")
    make_tree(tmp_path, {"a.png": "", "a.caption": "x"})
    refused(run, MERGE_CAPTIONS, "tree/a.png", "out.json", says="is a file, not a folder")
    refused(run, MERGE_CAPTIONS, "tree", "tree", says="tree")
    refused(run, MERGE_CAPTIONS, "tree", "tree/a.png/out.json", says="cannot be written")
    refused(run, MERGE_CAPTIONS, "tree", "out.json", "--in_json", "tree", says="is a folder")
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["a.caption", "a.png", "tree"]


def test_members_that_are_no_texts_stay(run: Any, tmp_path: Path) -> None:
    content = {"a": {"tags": ["x_y"], "caption": None}, "b": {"tags": "x_y"}}
    (tmp_path / "in.json").write_text(json.dumps(content), encoding="utf-8")
    code, text = run(CLEAN, "in.json", "out.json")
    assert code == 0 and "1 entries have no tags, the first one is a" in text
    content["b"]["tags"] = "x y"
    assert json.loads((tmp_path / "out.json").read_text(encoding="utf-8")) == content


@pytest.mark.parametrize("scan", SCANS, ids=lambda scan: str(scan["tree"])[:20])
def test_which_pictures_tools_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, scan: dict) -> None:
    from library.data.picture_search import find_pictures

    monkeypatch.chdir(tmp_path)
    if scan["tree"] is None:  # no such folder: an empty list in the original
        with pytest.raises(UserError, match="d does not exist"):
            find_pictures("d")
        return
    for name in scan["tree"]:
        path = tmp_path / "d" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"")
    for recursive, key in ((False, "flat"), (True, "recursive")):
        expected = [name for name in scan[key] if not (tmp_path / name).is_dir()]  # folders are no pictures
        if "c.Jpg" in scan["tree"]:  # endings count in any case of letters
            expected.insert(expected.index("d/b.JPG") + 1, "d/c.Jpg")
        assert find_pictures("d", recursive=recursive) == [str(Path(name)) for name in expected]


def test_merged_metadata_can_be_trained_on(run: Any, tmp_path: Path) -> None:
    """What the tools write is what the reader of metadata files understands."""
    from library.data.metadata_file import read_entries

    make_tree(tmp_path, {"a.png": "", "a.caption": "an anime woman\n", "a.txt": "long_hair"})
    Image.new("RGB", (64, 64)).save(tmp_path / "tree" / "a.png")
    run(MERGE_CAPTIONS, "tree", "one.json", "--full_path")
    run(MERGE_TAGS, "tree", "two.json", "--full_path", "--in_json", "one.json")
    run(CLEAN, "two.json", "three.json")
    entry = read_entries(tmp_path / "three.json")[0]
    assert (entry.key, entry.caption, entry.tags) == (str(Path("tree/a.png")), "an girl", "long hair")


def test_messages_are_quiet_in_a_quiet_process(run: Any, tmp_path: Path) -> None:
    make_tree(tmp_path, {})
    messages.set_quiet(True)
    try:
        assert run(MERGE_CAPTIONS, "tree", "out.json") == (0, "")
    finally:
        messages.set_quiet(False)
    assert (tmp_path / "out.json").read_text(encoding="utf-8") == "{}"
