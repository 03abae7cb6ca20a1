"""Decides which waiting jobs start between two steps, and who takes part in the next step.

Nobody waits for the end of what is far longer:

    waiting   -->  starts beside what runs, while there are places
              -->  far shorter than all that holds a place: starts in a place of its own kind
              -->  not while somebody has fallen behind by all of the time that their steps take
    running   -->  those with the least work left, and those that are nearly as short, step
              -->  the others step when they have fallen too far behind their fair share

Everyone's fair share of the model's time is equal. So a short job goes before a long one, as long
as the long one has not been held up for too long.
"""

from collections.abc import Iterable, Sequence

from .runs import Run
from .tickets import Ticket

FAR_SHORTER = 8  # times cheaper: a job that need not wait for another
MAX_LAG = 1 / 16  # of its own time that a run may fall behind its fair share


def next_to_start(
    waiting: Iterable[Ticket], runs: Sequence[Run], max_rows: int
) -> tuple[list[Ticket], bool]:
    """Chooses the oldest job that may start, and those that can share its batch.

    Args:
        waiting: the oldest first.
        runs: what is under way.
        max_rows: rows of all runs together; as many again for far shorter jobs.

    Returns the tickets, none where nothing may start, and whether they are far shorter.
    """
    if any(run.needs_all for run in runs):
        return [], False
    waiting = [ticket for ticket in waiting if not (ticket.is_held and runs)]
    blocked = set()  # kinds of places for which an older job waits: the younger do not overtake it
    for place, first in enumerate(waiting):
        is_express = not first.needs_all and _is_far_shorter(first, runs)
        if is_express in blocked:
            continue
        room = _room(first, runs, is_express, max_rows)
        if first.rows <= room:
            return _with_companions(first, waiting[place + 1 :], room), is_express
        blocked.add(is_express)
    return [], False


def holds_back(runs: Iterable[Run]) -> bool:
    """Tells whether a run is so far behind its fair share that no job may start beside it."""
    return any(0 < run.expected_seconds <= run.lag for run in runs)


def num_companions_rows(waiting: Sequence[Ticket]) -> int:
    """Counts the rows of the oldest job and of all that could share its batch."""
    return sum(ticket.rows for ticket in waiting if ticket.key == waiting[0].key)


def _is_far_shorter(ticket: Ticket, runs: Sequence[Run]) -> bool:
    """Tells whether a job is far shorter than each run that holds a place."""
    holders = [run for run in runs if not run.is_express]
    return bool(holders) and all(ticket.cost * FAR_SHORTER <= run.work_left for run in holders)


def _room(ticket: Ticket, runs: Sequence[Run], is_express: bool, max_rows: int) -> int:
    """Counts the rows for which there is room; those that cannot run with others start alone."""
    if runs and ticket.needs_all:
        return 0
    rows = sum(run.rows for run in runs if run.is_express == is_express)
    if rows and not ticket.joins:
        return 0
    return max_rows - rows


def _with_companions(first: Ticket, others: Sequence[Ticket], room: int) -> list[Ticket]:
    batch, rows = [first], first.rows
    for ticket in others:
        is_alone = first.needs_all or ticket.needs_all
        if ticket.key == first.key and rows + ticket.rows <= room and not is_alone:
            batch.append(ticket)
            rows += ticket.rows
    return batch


def next_to_step(runs: Sequence[Run]) -> list[Run]:
    """Chooses the runs that take part in the next step."""
    least = min((run.work_left for run in runs), default=0)
    return [
        run
        for run in runs
        if run.work_left <= FAR_SHORTER * least or run.lag >= MAX_LAG * run.expected_seconds
    ]


def share_out(runs: Sequence[Run], seconds: float, taken_by: Sequence[Run], num_held_back: int = 0):
    """Notes who took how much of some seconds: of runs that stepped, each by its positions.

    Everyone else falls behind by a job's share. Jobs that may not start have a share, too.
    """
    total = sum(run.positions for run in taken_by)
    own = {id(run): seconds * run.positions / total for run in taken_by} if total else {}
    _fall_behind(runs, seconds, own, num_held_back)
    for run in taken_by:
        run.spend(own.get(id(run), 0.0), is_pass=True)


def spend_alone(runs: Sequence[Run], seconds: float, run: Run):
    """Notes seconds that one run took for itself, for the start or the end of a step."""
    _fall_behind(runs, seconds, {id(run): seconds})
    run.spend(seconds)


def _fall_behind(
    runs: Sequence[Run], seconds: float, own: dict[int, float], num_held_back: int = 0
):
    """Adds each run's share of some seconds to its lag, and takes off what it had of them."""
    jobs = sum(len(run.tickets) for run in runs) + num_held_back
    for run in runs:
        share = seconds * len(run.tickets) / jobs
        run.lag = max(0.0, run.lag + share - own.get(id(run), 0.0))
