"""A world of one's own: the policy finds a hidden number. Train on it with examples/guess.yaml."""

from backtalk.envs.python import PythonEnv, PythonWorld
from backtalk.tasks.task import Task


class Guess(PythonEnv):
    def guess(self, number: int) -> str:
        """Compare a number with the hidden one."""
        hidden = self.task.metadata["hidden"]
        self.done = number == hidden
        return "right" if self.done else "too low" if number < hidden else "too high"

    def reward(self) -> float:
        return float(self.done)


class GuessWorld(PythonWorld):
    env = Guess

    def all_tasks(self) -> list[Task]:
        text = "Find my number, from 0 to 99."
        return [Task(id=f"guess/{number}", instruction=text, metadata={"hidden": number}) for number in range(100)]
