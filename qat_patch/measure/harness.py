"""Tasks of EleutherAI's lm-evaluation-harness, in several attentions."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Attention = Callable[[], contextlib.AbstractContextManager[Any]]
"""Switches to an attention, such as `handle.disabled`."""
_SEEDS = ("random_seed", "numpy_random_seed", "torch_random_seed", "fewshot_random_seed")


def run_tasks(
    load: Callable[[], tuple[torch.nn.Module, Any, Mapping[str, Attention]]],
    tasks: Sequence[str],
    *,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    limit: int | None = None,
    batch_size: int = 1,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Run tasks on a language model, once with each attention.

    Args:
        load: gives the model, its tokenizer, and by name what puts an attention into force; called when it is known that the
            tasks exist.
        tasks: their names.
        include_path: a folder with the user's own tasks.
        num_fewshot: examples in the prompt; None: the task's number.
        limit: use only this many documents of a task, from the first.
        batch_size: sequences per forward pass.
        seed: seed of all random numbers.

    Returns:
        The harness's numbers, by attention and task.

    Raises:
        ValueError: lm-eval is not installed or does not know a task.
    """
    try:
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ValueError(f"lm-evaluation-harness cannot be imported ({error}); pip install 'qat-patch[harness]'") from error
    manager = TaskManager(include_path=include_path)
    if unknown := sorted(set(tasks) - set(manager.match_tasks(list(tasks)))):
        raise ValueError(f"tasks: lm-eval has no {', '.join(unknown)}; `lm_eval ls tasks` lists what it has")
    model, tokenizer, attentions = load()
    lm = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=batch_size)
    results: dict[str, dict[str, Any]] = {}
    for name, attention in attentions.items():
        with attention():
            found = simple_evaluate(
                lm,
                tasks=list(tasks),
                num_fewshot=num_fewshot,
                limit=limit,
                task_manager=manager,
                **dict.fromkeys(_SEEDS, seed),
            )
        results[name] = {
            task: {metric: value for metric, value in values.items() if isinstance(value, int | float)}
            for task, values in found["results"].items()
        }
    return results
