"""Situations for policies, made by hand."""

import numpy as np

from planner.forecast import CriticalBatchForecast
from planner.menu import Menu
from planner.situation import Situation

JOB = 100_000.0


def forecast_of(critical_batch, error=0.05, samples=JOB / 4, seen=30):
    """A forecast that has seen the same φ for a while."""
    forecast = CriticalBatchForecast.unknown(np.array([JOB]))
    for place in np.linspace(samples / seen, samples, seen):
        forecast.observe(np.array([place]), np.array([critical_batch]), np.array([error]))
    return forecast


def situation_of(
    speeds,
    current,
    critical_batch,
    noise_scale=None,
    moves=(0.0, 0.0, 0.0),
    number=0,
    plug_in=None,
    error=0.05,
    throughput_error=None,
    objective="plain",
    samples=JOB / 4,
    trial_allowance=np.inf,
):
    """`speeds` are samples a second of each configuration; `current` runs, a quarter of the job is done."""
    menu = Menu.of(list(speeds))
    return Situation(
        menu=menu,
        samples_per_second=np.array([list(speeds.values())]),
        throughput_error=np.array([throughput_error or [0.0] * len(menu)]),
        unseen=np.array([[c != current for c in speeds]]),
        current=np.array([list(speeds).index(current)]),
        noise_scale=np.array([noise_scale or critical_batch / 2]),
        critical_batch=np.array([float(critical_batch)]),
        forecast=forecast_of(critical_batch, error, samples),
        samples_consumed=np.array([samples]),
        samples_left=np.array([JOB - samples]),
        samples_to_next=np.array([JOB / 200]),
        move_seconds=np.array(moves),
        trial_allowance=np.array([trial_allowance]),
        objective=objective,
        number=number,
        plug_in=None if plug_in is None else np.array([plug_in]),
    )
