"""The five hooks. Each is called once, when its plugin is loaded, takes no arguments, and yields records.

An exception inside a hook stops the command and names the plugin. Nothing here is called inside the training loop.
"""

from __future__ import annotations

from collections.abc import Iterable

import pluggy

from qpref.hooks.reader import Reader
from qpref.hooks.reward import Reward
from qpref.hooks.types import ListLoss, MetricSink, PairedLoss, UnpairedLoss, Validator

hookspec = pluggy.HookspecMarker("qpref")


@hookspec
def qpref_losses() -> Iterable[PairedLoss | ListLoss | UnpairedLoss]:  # type: ignore[empty-body]
    """Offer losses. Called when a recipe names one of them.

    The function that `build` returns determines the gradient. When it raises, or returns a wrong shape, a detached or a
    non-finite value, the run stops with an error that names the plugin, and keeps its last checkpoint.

        @hookimpl
        def qpref_losses():
            yield PairedLoss(name="hinge", summary="relu(1 - beta h)", options=HingeOptions, build=build)
    """


@hookspec
def qpref_validators() -> Iterable[Validator]:  # type: ignore[empty-body]
    """Offer checks of the data. Called when a recipe has a table `[checks.NAME]`.

    A finding of severity "error" refuses its row. When it raises, the run stops before any model loads.

        @hookimpl
        def qpref_validators():
            yield Validator(name="no-urls", summary="responses without links", options=Options, start=NoUrls)
    """


@hookspec
def qpref_metric_sinks() -> Iterable[MetricSink]:  # type: ignore[empty-body]
    """Offer destinations for metrics. Called when a recipe has an entry `[[sinks]]` of that name.

    A sink that raises or hangs is reported once and dropped; training continues, bit for bit as without it.

        @hookimpl
        def qpref_metric_sinks():
            yield MetricSink(name="csv", summary="one row per step", options=Options, open=open_csv)
    """


@hookspec
def qpref_readers() -> Iterable[Reader]:  # type: ignore[empty-body]
    """Offer file formats. Called when a data file has that suffix, or `[data] reader` names it.

    `read` yields rows and findings, and leaves the meaning of the columns to the core. When it raises, the run stops
    before any model loads.

        @hookimpl
        def qpref_readers():
            yield Reader(name="csv", summary="comma-separated values with a header", read=read_csv)
    """


@hookspec
def qpref_rewards() -> Iterable[Reward]:  # type: ignore[empty-body]
    """Offer rewards of responses. Called when `qpref sample --reward` names one.

    When the function raises, or doesn't return a finite number for each response, the command stops with an error that
    names the plugin, and keeps what it has sampled.

        @hookimpl
        def qpref_rewards():
            yield Reward(name="short", summary="minus the number of characters", options=Options, build=build)
    """
