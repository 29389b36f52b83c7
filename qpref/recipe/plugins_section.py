"""The recipe's `[plugins]` table."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from qpref.recipe.section import Section


class FileSection(Section):
    """A plugin file and its content, as recipe.lock.toml has it."""

    path: str = Field(min_length=1, description="Path of the file.")
    sha256: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{64}$",
        description="Expected SHA-256; a file with any other content is refused. Default: not checked.",
    )


class PluginsSection(Section):
    """Plugins without a distribution."""

    files: list[Annotated[str, Field(min_length=1)] | FileSection] = Field(
        default_factory=list,
        description="Python files with losses, checks, readers or sinks of your own, such as `my_loss.py`. They are "
        "executed: train by a recipe of somebody else only after reading them. A table `{ path, sha256 }` refuses any "
        "other content.",
    )

    def tables(self) -> list[FileSection]:
        """List the files, each as a table."""
        return [FileSection(path=file) if isinstance(file, str) else file for file in self.files]
