"""What finds faces in pictures: a package of neural networks, a cascade file of OpenCV, or a list made elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from library.data.plain_text import read_text
from library.messages import UserError

Point = tuple[float, float]
# (file name, uint8 (H, W, 3) BGR) -> faces.
Detector = Callable[[str, np.ndarray], "list[FoundFace]"]

# Points of the face that anime_face_detector gives.
_RIGHT_EYE, _LEFT_EYE = 11, 19
_CASCADE = {"scaleFactor": 1.1, "minNeighbors": 5, "minSize": (24, 24)}


@dataclass(frozen=True, slots=True)
class FoundFace:
    """A face that a detector found; pixels.

    Attributes:
        box: left, top, right, bottom.
        score: how sure the detector is, 0 to 1.
        right_eye, left_eye: those of the person, so the right one is on the left; None: not known.
    """

    box: tuple[float, float, float, float]
    score: float = 1.0
    right_eye: Point | None = None
    left_eye: Point | None = None


def make_detector(name: str, cascade_file: str | None, detections_file: str | None) -> Detector:
    """The detector of a name.

    Raises:
        UserError: its file or package is missing.
    """
    if name == "cascade":
        return _cascade(cascade_file)
    return _listed(detections_file) if name == "json" else _anime_face_detector()


def _anime_face_detector() -> Detector:
    try:
        from anime_face_detector import create_detector  # type: ignore[import-not-found]
    except ImportError as error:
        raise UserError(
            f"the package anime_face_detector cannot be imported ({error})",
            "install it, or use --detector cascade --cascade_file lbpcascade_animeface.xml, or --detector json",
        ) from error
    import torch

    detector = create_detector("yolov3", device="cuda:0" if torch.cuda.is_available() else "cpu")

    def find(_: str, image: np.ndarray) -> list[FoundFace]:
        return [_with_points(found["bbox"], found["keypoints"]) for found in detector(image)]

    return find


def _with_points(box: Any, points: Any) -> FoundFace:
    left, top, right, bottom, score = (float(value) for value in box)
    eyes = [(float(points[index][0]), float(points[index][1])) for index in (_RIGHT_EYE, _LEFT_EYE)]
    return FoundFace((left, top, right, bottom), score, *eyes)


def _cascade(path: str | None) -> Detector:
    if not path:
        raise UserError("--detector cascade needs --cascade_file", "give a cascade file of OpenCV (.xml)")
    if not os.path.isfile(path):
        raise UserError(f"--cascade_file {path} does not exist", "check the path")
    if not hasattr(cv2, "CascadeClassifier"):
        raise UserError(
            f"OpenCV {cv2.__version__} has no cascades",
            "install opencv-contrib-python-headless, or an OpenCV 4 package",
        )
    try:
        classifier = cv2.CascadeClassifier(path)
        if classifier.empty():
            raise UserError(f"--cascade_file {path} is no cascade of OpenCV", "give another file")
    except cv2.error as error:
        raise UserError(f"--cascade_file {path} is no cascade of OpenCV", "give another file") from error

    def find(_: str, image: np.ndarray) -> list[FoundFace]:
        grey = cv2.equalizeHist(cv2.cvtColor(image, cv2.COLOR_BGR2GRAY))
        boxes = classifier.detectMultiScale(grey, **_CASCADE)
        return [FoundFace((float(x), float(y), float(x + w), float(y + h))) for x, y, w, h in boxes]

    return find


def _listed(path: str | None) -> Detector:
    if not path:
        raise UserError("--detector json needs --detections_file", "give a JSON file: file name -> list of faces")
    if not os.path.isfile(path):
        raise UserError(f"--detections_file {path} does not exist", "check the path")
    try:
        content = json.loads(read_text(path))
    except ValueError as error:
        raise UserError(f"{path} is no valid JSON: {error}", "mend the file") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} holds no object", 'it must look like {"a.png": [{"bbox": [10, 20, 90, 100]}]}')
    faces = {}
    for name, entries in content.items():
        if not isinstance(entries, list):
            raise UserError(f"{path}: {name} has no list of faces", "give a list, [] for no face")
        faces[name] = [_listed_face(path, name, entry) for entry in entries]
    return lambda name, image: faces.get(Path(name).name, [])


def _listed_face(path: str, name: str, entry: Any) -> FoundFace:
    try:
        left, top, right, bottom = (float(value) for value in entry["bbox"])
        eyes = [entry.get(key) for key in ("right_eye", "left_eye")]
        points = [None if eye is None else (float(eye[0]), float(eye[1])) for eye in eyes]
        return FoundFace((left, top, right, bottom), float(entry.get("score", 1.0)), *points)
    except (TypeError, KeyError, ValueError, IndexError, AttributeError) as error:
        raise UserError(
            f"{path}: a face of {name} cannot be read",
            'it must look like {"bbox": [left, top, right, bottom], "score": 0.9, "right_eye": [x, y], '
            '"left_eye": [x, y]}',
        ) from error
