"""Record rollouts of a script, a person or a model behind an API, with the code that records those of training.

The one that decides is an ``rollout.Author``; ``rollout.capture_episode`` plays a task with it, and gives a trajectory.
"""
