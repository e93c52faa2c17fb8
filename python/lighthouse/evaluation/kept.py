"""The file of an evaluation, written after each part: the same command goes on where it was interrupted."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lighthouse.core.files import write_whole
from lighthouse.evaluation.measure import EvaluationSettings
from lighthouse.evaluation.results import PARTS, Evaluation, Part, part_from_json
from lighthouse.training.result import read_json

FILE = "evaluation.json"


@dataclass
class Kept:
    """What was measured so far, in `folder / evaluation.json`.

    `same` are the settings that parts of one evaluation share, by name; `about` is written down beside them.
    """

    folder: Path
    same: dict[str, Any]
    about: dict[str, Any]

    def __post_init__(self):
        """Raises `FileExistsError` if the folder holds an evaluation with other settings."""
        self.parts: dict[str, Any] = {}
        if self.folder.exists() and not self.folder.is_dir():
            raise FileExistsError(f"output_dir={str(self.folder)!r} is a file: a folder is needed")
        if not self.file.is_file():
            return
        found = read_json(self.file)
        before = found["settings"]
        differ = [
            f"{name} was {before.get(name)!r}, is {now!r}" for name, now in self.same.items() if before.get(name) != now
        ]
        if differ:
            raise FileExistsError(
                f"output_dir={str(self.folder)!r} holds an evaluation with other settings ({'; '.join(differ)}): name "
                "another folder, or delete it"
            )
        self.parts = {
            name: part_from_json(name, found["evaluation"][name]) for name in PARTS if found["evaluation"][name]
        }

    @property
    def file(self) -> Path:
        return self.folder / FILE

    def add(self, name: str, part: Part) -> None:
        self.parts[name] = part
        self.folder.mkdir(parents=True, exist_ok=True)
        write_whole(self.file, json.dumps(self.to_json(), indent=1) + "\n")

    def evaluation(self) -> Evaluation:
        """All parts, those that an earlier command measured too."""
        settings = {name: self.same[name] for name in EvaluationSettings().of_parts()}
        return Evaluation(self.same["context"], self.same["rows"], settings, **self.parts)

    def to_json(self) -> dict:
        return {**self.about, "settings": self.same, "evaluation": self.evaluation().to_json()}
