"""A validator that has been started; whatever it raises becomes an error that names it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from qpref.data.example_rows import ExampleRow
from qpref.errors import PluginError
from qpref.hooks.types import RowCheck, Split
from qpref.recipe.choices import Choice
from qpref.records import Finding


@dataclass(frozen=True, slots=True)
class RunningCheck:
    """A started validator; its exceptions become PluginErrors that name it."""

    validator: Choice
    check: RowCheck

    @classmethod
    def of(cls, validator: Choice) -> RunningCheck:
        try:
            return cls(validator, validator.plugin.record.start(validator.options))
        except (Exception, SystemExit) as error:
            raise _failure(validator, error) from error

    @property
    def skips_refused(self) -> bool:
        return bool(self.validator.plugin.record.skips_refused)

    @property
    def may_refuse(self) -> bool:
        """True where an option of the check is the severity "error"."""
        return "error" in getattr(self.validator.options, "__dict__", {}).values()

    def look(self, example: ExampleRow, split: Split) -> list[Finding]:
        """Return the findings of an example; most have none, and a generator would cost more than a simple check."""
        try:
            found = list(self.check.look(example, split))
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise _failure(self.validator, error) from error
        return list(self._findings(lambda: found)) if found else found

    def finish(self) -> Iterator[Finding]:
        return self._findings(self.check.finish)

    def _findings(self, find: Callable[..., Iterable[Finding]], *arguments: Any) -> Iterator[Finding]:
        """Yield findings one at a time: there may be one for each row."""
        try:
            for finding in find(*arguments):
                if not isinstance(finding, Finding):
                    raise PluginError(f"{self.validator.plugin.offer} yields {type(finding).__name__}, not Finding")
                yield finding
        except PluginError:
            raise
        except (Exception, SystemExit) as error:
            raise _failure(self.validator, error) from error


def _failure(validator: Choice, error: BaseException) -> PluginError:
    return PluginError(f"{validator.plugin.offer} failed: {type(error).__name__}: {error}")
