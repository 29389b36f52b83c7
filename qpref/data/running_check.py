"""A validator that has been started; whatever it raises becomes an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from qpref.data.example_rows import RowRecord
from qpref.errors import PluginError
from qpref.hooks import border
from qpref.hooks.contract import finding_problem
from qpref.hooks.hang_watch import watch
from qpref.hooks.types import RowCheck, Split
from qpref.recipe.choices import Choice, SourceChoice
from qpref.records import Finding


@dataclass(frozen=True, slots=True)
class RunningCheck:
    """A started validator; its exceptions become PluginErrors that name it."""

    validator: Choice
    check: RowCheck

    @classmethod
    def of(cls, validator: Choice) -> RunningCheck:
        with border.guarded(validator.plugin.offer, _failure(validator), _change(validator)):
            return cls(validator, validator.plugin.record.start(validator.options))

    @property
    def skips_refused(self) -> bool:
        return bool(self.validator.plugin.record.skips_refused)

    @property
    def may_refuse(self) -> bool:
        """True where an option of the check is the severity "error"."""
        return "error" in getattr(self.validator.options, "__dict__", {}).values()

    def look(self, example: RowRecord, split: Split) -> list[Finding]:
        """Return the findings of an example; most have none, and a generator would cost more than a simple check."""
        watch.enter(self.validator.plugin.offer)
        try:
            found = list(self.check.look(example, split))
        except BaseException as error:  # noqa: BLE001 - the plugin border
            border.raise_named(error, self.validator.plugin.offer, _failure(self.validator), _is_plugin_error)
        finally:
            watch.leave()
        return list(self._findings(lambda: found)) if found else found

    def finish(self) -> Iterator[Finding]:
        return self._findings(self.check.finish)

    def _findings(self, find: Callable[..., Iterable[Finding]], *arguments: Any) -> Iterator[Finding]:
        """Yield findings one at a time: there may be one for each row."""
        offer = self.validator.plugin.offer
        failure = _failure(self.validator)
        for finding in border.guarded_items(offer, lambda: find(*arguments), failure, _is_plugin_error):
            if problem := finding_problem(finding):
                raise PluginError(f"{offer} yields {problem}")
            yield finding


def change_of_any(sources: Sequence[SourceChoice], validators: Sequence[Choice]) -> border.Failure:
    """Name the readers and checks of which one has changed something: those of other distributions, if any."""
    offers = {*(source.reader.offer for source in sources), *(validator.plugin.offer for validator in validators)}
    suspects = sorted(offer for offer in offers if offer.distribution != "qpref") or sorted(offers)
    who = "" if len(suspects) == 1 else "one of "
    return lambda change: PluginError(f"{who}{', '.join(map(str, suspects))} {change}")


def _is_plugin_error(error: BaseException) -> bool:
    return isinstance(error, PluginError)


def _failure(validator: Choice) -> border.Failure:
    return lambda error: PluginError(f"{validator.plugin.offer} failed: {error}")


def _change(validator: Choice) -> border.Failure:
    return lambda change: PluginError(f"{validator.plugin.offer} {change}")
