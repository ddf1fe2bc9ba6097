"""Whether anything was awaited."""

import trio


class Steps(trio.abc.Instrument):
    """Counts the steps that tasks have done: one ends where something is awaited."""

    count = 0

    def after_task_step(self, task: trio.lowlevel.Task) -> None:
        self.count += 1
