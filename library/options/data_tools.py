"""What the tools on pictures, captions and metadata files take: those of `finetune/`, `tools/canny.py` and others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from library.messages import UserError, log
from library.options.declare import option

DETECTORS = ("anime_face_detector", "cascade", "json")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextMergeConfig:
    """Caption or tag files that are collected in a metadata file."""

    train_data_dir: str = option("", "folder of pictures with text files beside them", flag="train_data_dir")
    out_json: str = option(
        "", "metadata file to write; one that is there is read first, unless --in_json is given", flag="out_json"
    )
    in_json: str | None = option(None, "metadata file whose entries are taken over")
    caption_extention: str | None = option(None, "old spelling of --caption_extension; replaces it when given")
    caption_extension: str = option(".caption", "ending of the text files beside the pictures")
    full_path: bool = option(False, "name pictures by their paths, instead of file names without ending")
    recursive: bool = option(False, "also pictures in all folders below; needs --full_path")
    debug: bool = option(False, "show the text of every picture")


@dataclass(frozen=True, kw_only=True, slots=True)
class TextCleanConfig:
    """Captions and tags of a metadata file that are cleaned."""

    in_json: str = option("", "metadata file to read", flag="in_json")
    out_json: str = option("", "metadata file to write", flag="out_json")
    debug: bool = option(False, "show every text that changes, before and after")


@dataclass(frozen=True, kw_only=True, slots=True)
class PictureResizeConfig:
    """Pictures that are made smaller."""

    src_img_folder: str = option("", "folder of pictures", flag="src_img_folder")
    dst_img_folder: str = option("", "folder for the results, made if it is not there", flag="dst_img_folder")
    max_resolution: str = option(
        "512x512,384x384,256x256,128x128",
        "largest areas as WIDTHxHEIGHT,WIDTHxHEIGHT,...; each gives one picture, whose shape is kept",
    )
    divisible_by: int = option(1, "cut the sides down to multiples of this many pixels")
    interpolation: str = option("area", "how pictures are resized", choices=("area", "cubic", "lanczos4"))
    save_as_png: bool = option(False, "write PNG instead of JPEG files")
    copy_associated_files: bool = option(
        False, "copy files with the name of a picture, such as captions, beside each of its results"
    )


@dataclass(frozen=True, kw_only=True, slots=True)
class EdgesConfig:
    """A picture whose edges are drawn."""

    input: str | None = option(None, "picture to read")
    output: str | None = option(None, "picture to write; its ending says the format")
    thres1: int = option(32, "threshold of the gradient below which there is no edge")
    thres2: int = option(224, "threshold of the gradient above which there is one")


@dataclass(frozen=True, kw_only=True, slots=True)
class FacesConfig:
    """Pictures whose faces are found, turned upright and cut out."""

    src_dir: str | None = option(None, "folder of pictures")
    dst_dir: str | None = option(None, "folder for the results, made if it is not there")
    rotate: bool = option(False, "turn each picture so that the eyes of the face are level")
    resize_fit: bool = option(False, "with --crop_size: shrink large pictures so that one side fits the cut")
    resize_face_size: int | None = option(None, "scale each picture so that its face gets this size in pixels")
    crop_size: str | None = option(None, "cut this size around the face: WIDTH,HEIGHT in pixels")
    crop_ratio: str | None = option(None, "cut around the face: WIDTH,HEIGHT in multiples of the face's size")
    min_size: int | None = option(None, "leave out faces smaller than this many pixels")
    max_size: int | None = option(None, "leave out faces of this many pixels and more")
    multiple_faces: bool = option(False, "number the faces in the names; all faces of a picture are written anyway")
    debug: bool = option(False, "draw a box around each face")
    detector: str = option(
        "anime_face_detector",
        "what finds faces: the package of that name, a cascade file of OpenCV, or a JSON file that lists them",
        choices=DETECTORS,
    )
    cascade_file: str | None = option(None, "cascade file for --detector cascade, e.g. lbpcascade_animeface.xml")
    detections_file: str | None = option(None, "JSON file for --detector json: file name -> list of faces")
    score_threshold: float = option(0.9, "leave out faces of which the detector is less sure than this, from 0 to 1")


def without_old_folder(argv: Sequence[str]) -> list[str]:
    """Arguments of the cleaning tool without the folder that its first releases took before the two files.

    Raises:
        UserError: more than three names.
    """
    names = [argument for argument in argv if not argument.startswith("-")]
    if len(names) > 3:
        given = " ".join(names)
        raise UserError(f"{len(names)} names are given ({given})", "give the file to read and the one to write")
    if len(names) < 3:
        return list(argv)
    log.warning("%s is not used: this tool takes the file to read and the one to write", names[0])
    rest = list(argv)
    rest.remove(names[0])
    return rest
