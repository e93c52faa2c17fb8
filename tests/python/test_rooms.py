"""The rooms of the package depend on one another one way, and no two modules lead to each other (docs/design.md)."""

import ast
import re
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import lighthouse

PACKAGE = Path(lighthouse.wrapper.__file__).parent

DESIGN = Path(__file__).parents[2] / "docs" / "design.md"


def rooms_in_the_design() -> dict[str, set[str]]:
    """A room and those that it may use, from the table there; "" is what users import."""
    found: dict[str, set[str]] = {}
    for line in DESIGN.read_text().splitlines():
        row = re.fullmatch(r"\| `\.\.\./(\w*)/?` \|.*\| ([^|]*)\|", line)
        if row:
            found[row[1]] = set(found) if row[2].startswith("all") else set(re.findall(r"`(\w+)`", row[2]))
    return found


ROOMS = rooms_in_the_design()


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {name_of(path): path for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(module: str) -> str:
    part = module.split(".")[1] if "." in module else ""
    return part if (PACKAGE / part).is_dir() else ""


def imported_by(module: str) -> set[str]:
    """The modules of the package that it imports anywhere, inside of functions and for types alone too."""
    found = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            inside = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (inside & MODULES.keys()) or {node.module}
    return found & MODULES.keys()


@pytest.mark.parametrize("module", MODULES)
def test_a_module_uses_only_what_its_room_may(module):
    room = room_of(module)
    allowed = ROOMS[room] | {room}
    wrong = {other for other in imported_by(module) if room_of(other) not in allowed}
    assert not wrong, f"{module}, of room {room or 'lighthouse'!r}, imports {', '.join(sorted(wrong))}"


def test_no_modules_lead_to_each_other():
    graph = {module: imported_by(module) - {module} for module in MODULES}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(" -> ".join(error.args[1]))


def test_rooms_lead_one_way():
    TopologicalSorter(ROOMS).prepare()


def test_a_setting_stands_in_few_files():
    """`Method` describes the settings for every command, file, report and card: a new one is a line there."""
    files = [module for module, path in MODULES.items() if re.search(r"\bselect_topk\b", path.read_text())]
    assert len(files) <= 16, files
