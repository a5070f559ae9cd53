"""Named moves of the walk: each makes another assignment out of one, or nothing.

A move sees the space and a ``random.Random`` and nothing else. Choices of one size of mesh are
sorted by seconds, and moves prefer the front of the list: the slow end is long and rarely right.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping

from planner.mesh import DeviceMesh
from planner.search.options import Assignment, Option, OptionSpace

Move = Callable[[Assignment, OptionSpace, random.Random], "Assignment | None"]


def replaced(assignment: Assignment, i: int, option: Option) -> Assignment:
    return (*assignment[:i], option, *assignment[i + 1 :])


def pick(space: OptionSpace, call: str, mesh: DeviceMesh, rng: random.Random) -> Option:
    """An option of ``call`` on ``mesh``: half of the picks are among the fastest few."""
    choices = space.choices[call][mesh.num_devices]
    index = min(int(rng.expovariate(0.3)), len(choices) - 1)
    if rng.random() < 0.2:
        index = rng.randrange(len(choices))
    return space.option(call, mesh, choices[index])


def with_layout(space: OptionSpace, call: str, of: Option) -> Option | None:
    """The fastest option of ``call`` in the layout of another option; None if it has none."""
    for choice in space.choices[call].get(of.mesh.num_devices, ()):
        if choice.axes == of.choice.axes:
            return space.option(call, of.mesh, choice)
    return None


def change_anywhere(
    assignment: Assignment, space: OptionSpace, rng: random.Random
) -> Assignment | None:
    """One call gets any mesh and any strategy."""
    i = rng.randrange(len(assignment))
    call = space.calls[i].name
    return replaced(assignment, i, pick(space, call, rng.choice(space.meshes[call]), rng))


def change_strategy(
    assignment: Assignment, space: OptionSpace, rng: random.Random
) -> Assignment | None:
    """One call gets another strategy or other micro-batches on its mesh."""
    i = rng.randrange(len(assignment))
    return replaced(assignment, i, pick(space, space.calls[i].name, assignment[i].mesh, rng))


def move_mesh(assignment: Assignment, space: OptionSpace, rng: random.Random) -> Assignment | None:
    """One call keeps its strategy and goes to another mesh of the same size."""
    i = rng.randrange(len(assignment))
    here = assignment[i]
    mesh = rng.choice(space.meshes_by_size[here.mesh.num_devices])
    return replaced(assignment, i, space.option(here.call, mesh, here.choice))


def join_role(assignment: Assignment, space: OptionSpace, rng: random.Random) -> Assignment | None:
    """Two calls of one role share a layout, so that no weights move between them."""
    roles = [call.role for call in space.calls]
    i = rng.randrange(len(assignment))
    others = [j for j, role in enumerate(roles) if j != i and role is not None and role == roles[i]]
    if not others:
        return None
    option = with_layout(space, space.calls[i].name, assignment[rng.choice(others)])
    return None if option is None else replaced(assignment, i, option)


def together(
    assignment: Assignment, space: OptionSpace, role: str, like: Option
) -> Assignment | None:
    """All calls of a role in the layout of ``like``; None if one of them cannot."""
    for i, call in enumerate(space.calls):
        if call.role == role:
            option = like if call.name == like.call else with_layout(space, call.name, like)
            if option is None:
                return None
            assignment = replaced(assignment, i, option)
    return assignment


def change_role(
    assignment: Assignment, space: OptionSpace, rng: random.Random
) -> Assignment | None:
    """All calls of one role take one layout, on the mesh of one of them or anywhere."""
    i = rng.randrange(len(assignment))
    call = space.calls[i]
    if call.role is None:
        return None
    mesh = assignment[i].mesh if rng.random() < 0.5 else rng.choice(space.meshes[call.name])
    return together(assignment, space, call.role, pick(space, call.name, mesh, rng))


def copy_mesh(assignment: Assignment, space: OptionSpace, rng: random.Random) -> Assignment | None:
    """One call goes to the mesh of another, half of the time with its strategy."""
    i, j = rng.sample(range(len(assignment)), 2) if len(assignment) > 1 else (0, 0)
    call, mesh = space.calls[i].name, assignment[j].mesh
    if mesh.num_devices not in space.choices[call]:
        return None
    if rng.random() < 0.5:
        option = with_layout(space, call, assignment[j])
        return None if option is None else replaced(assignment, i, option)
    return replaced(assignment, i, pick(space, call, mesh, rng))


def split_pair(assignment: Assignment, space: OptionSpace, rng: random.Random) -> Assignment | None:
    """Two calls get neighbouring meshes that together make one mesh."""
    if len(assignment) < 2:
        return None
    i, j = rng.sample(range(len(assignment)), 2)
    first, second = space.calls[i].name, space.calls[j].name
    left = rng.choice(space.meshes[first])
    start = left.first + left.num_devices
    right = [mesh for mesh in space.meshes[second] if mesh.first == start]
    whole = [m for m in right if (m.num_devices + left.num_devices) in space.meshes_by_size]
    if not whole:
        return None
    changed = replaced(assignment, i, pick(space, first, left, rng))
    return replaced(changed, j, pick(space, second, rng.choice(whole), rng))


# Name -> (move, how often it is tried relative to the others).
MOVES: Mapping[str, tuple[Move, float]] = {
    "change_anywhere": (change_anywhere, 3.0),
    "change_strategy": (change_strategy, 3.0),
    "move_mesh": (move_mesh, 1.0),
    "join_role": (join_role, 1.0),
    "change_role": (change_role, 1.0),
    "copy_mesh": (copy_mesh, 2.0),
    "split_pair": (split_pair, 1.0),
}


def propose(assignment: Assignment, space: OptionSpace, rng: random.Random) -> Assignment | None:
    """One move by name and weight; None where it does not apply or changes nothing."""
    names = list(MOVES)
    (name,) = rng.choices(names, [MOVES[n][1] for n in names])
    found = MOVES[name][0](assignment, space, rng)
    if found is None or found == assignment or not space.allows(found):
        return None
    return found
