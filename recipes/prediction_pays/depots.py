"""A world in which knowing the map pays: depots at fixed places, too few turns to look for them, codes that change.

`ls` and `cat` work on a tree of folders that is the same in every task, and `submit` takes the code of the depot that
the instruction names. The codes are drawn anew for each task, so an answer cannot be known by heart; the places can.
"""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from backtalk.envs.python import PythonEnv, PythonWorld
from backtalk.envs.terminal import TerminalConfig
from backtalk.tasks.task import Task

FOLDERS = ("alder", "birch", "cedar", "elm")
DEPOTS = (
    *("anchor", "basket", "candle", "dagger", "engine", "funnel", "garden", "hammer", "island", "jacket", "kettle"),
    *("ladder", "magnet", "needle", "orange", "pencil", "quiver", "ribbon", "saddle", "teapot", "urchin", "violin"),
    *("window", "yogurt"),
)
ROOT = "/srv"
COPIES = 25  # tasks for each depot, which differ in their codes


class Depots(PythonEnv):
    """One machine: a tree of folders, and in each depot's folder a file with its code."""

    system = TerminalConfig().system_prompt

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.solved = False
        self.files: dict[str, str] = task.metadata["files"]
        self.listings: dict[str, Sequence[str]] = task.metadata["listings"]
        self.told: dict[str, str] = task.metadata.get("told", {})

    def bash(self, command: str) -> str:
        """Run a command in a shell."""
        name, _, path = command.strip().partition(" ")
        path = path.strip().rstrip("/") or ROOT
        if name == "ls":
            found = self.listings.get(path)
            return f"ls: {path}: No such file or directory" if found is None else "\n".join(found)
        if name == "cat":
            told = self.told.get(path.removesuffix("/code").rpartition("/")[2])
            problem = f"moved to {told}/code" if told else "No such file or directory"
            return self.files.get(path, f"cat: {path}: {problem}")
        return f"bash: {name}: command not found"

    def submit(self, answer: str) -> str:
        """Submit the answer and end."""
        self.done, self.solved = True, answer.strip() == self.task.metadata["code"]
        return ""

    def reward(self) -> float:
        """Return 1 for the right code."""
        return float(self.solved)


class DepotWorld(PythonWorld):
    """``depth`` is the number of folders on the way to a depot, 1 or 2.

    With ``redrawn`` every task has a map of its own, so knowing one is of no use. With ``lying`` what `ls` prints is of
    another folder, always the same other one: as many words, each as often, and no knowledge of the map. With ``told``
    a `cat` at a wrong place says where the depot is, as the command that reads it would; lying, another one's folder.
    """

    env = Depots

    def __init__(self, depth: int = 1, redrawn: bool = False, lying: bool = False, told: bool = False) -> None:
        self.depth, self.redrawn, self.lying, self.told = depth, redrawn, lying, told

    def all_tasks(self) -> list[Task]:
        """Return the tasks: each depot as often as any other."""
        return [self.task(depot, number) for depot in DEPOTS[: 12 * self.depth] for number in range(COPIES)]

    def task(self, depot: str, number: int) -> Task:
        """Return a task: the code of one depot."""
        name = f"depots{self.depth}/{depot}/{number}"
        draw = Random(name)
        places = self.places(Random(name if self.redrawn else "map"))
        codes = {other: str(draw.randrange(1000, 10000)) for other in places}
        files = {f"{place}/code": codes[other] for other, place in places.items()}
        metadata = {"files": files, "listings": self.listed(places), "code": codes[depot]}
        if self.told:
            metadata["told"] = self.told_places(places)
        return Task(
            id=name,
            instruction=f"Each depot has a file named code in its folder, somewhere below {ROOT}. "
            f"Submit the code of the depot {depot}.",
            metadata=metadata,
        )

    def places(self, draw: Random) -> dict[str, str]:
        """Return the folder of each depot, over four folders, or sixteen folders in folders."""
        depots = list(DEPOTS[: 12 * self.depth])
        draw.shuffle(depots)
        size = len(FOLDERS)
        ways = [
            f"/{FOLDERS[i % size]}" + (f"/{FOLDERS[i // size % size]}" if self.depth == 2 else "") for i in range(24)
        ]
        return {depot: f"{ROOT}{way}/{depot}" for depot, way in zip(depots, ways, strict=False)}

    def told_places(self, places: dict[str, str]) -> dict[str, str]:
        """Return where each depot is said to be: at its place, or lying in the folder of the next depot."""
        if not self.lying:
            return places
        following = [*places][1:] + [*places][:1]
        return {
            depot: f"{places[other].rpartition('/')[0]}/{depot}" for depot, other in zip(places, following, strict=True)
        }

    def listed(self, places: dict[str, str]) -> dict[str, list[str]]:
        """Return what `ls` prints of each folder."""
        children: dict[str, set[str]] = {}
        for place in places.values():
            parts = place.split("/")
            for n in range(2, len(parts)):
                children.setdefault("/".join(parts[:n]), set()).add(parts[n])
        inner = sorted(path for path in children if path != ROOT)
        shown = dict(zip(inner, [*inner[1:], inner[0]], strict=True)) if self.lying else {path: path for path in inner}
        listed = {path: sorted(children[shown[path]]) for path in inner}
        return {ROOT: sorted(children[ROOT]), **listed, **{place: ["code"] for place in places.values()}}
