"""Meaning and remedy of each finding code, for the pages that list findings and for docs/data.md.

The codes of the readers, the row formats and the tokenizer come first, then those of the checks that come with qpref.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Explanation:
    """Meaning of a code, as a sentence about the row or the source, and the remedy."""

    meaning: str
    remedy: str


OTHER = Explanation(
    "A check of another package found this; its message says what.",
    "See that package's documentation. Its options are in `[checks.NAME]`.",
)
"""Explanation of the codes of third-party validators."""

_FIX_OR_SKIP = "Fix the row in its file, or leave it out: `--fix`, or `[data] skip_bad`."

CODES: Mapping[str, Explanation] = {
    "unreadable": Explanation(
        "The row cannot be parsed: invalid JSON or UTF-8, too long, more or fewer fields than the header.",
        "Write the file again with a JSON or CSV library, or name its reader in `[data] reader`.",
    ),
    "separator": Explanation(
        "A table's header has another separator between its columns than the suffix promises, and is read with it.",
        "Nothing, if the columns are right; `.tsv` is for tabs.",
    ),
    "commas": Explanation(
        "A comma follows each object of a file with one object a line; it is read without them.",
        "Nothing, or remove the commas: other tools refuse such a file.",
    ),
    "unknown_format": Explanation(
        "The row has the columns of no format.",
        'Map its columns to qpref\'s names: `columns = { prompt = "question" }`.',
    ),
    "not_text": Explanation(
        "The row has images, videos or sounds, on which its responses may depend.", "Leave the row out with `--fix`."
    ),
    "missing_column": Explanation(
        "The row lacks a column that `[data] columns` or `[data.contest]` names.",
        "Correct the name in `columns`; give a source with other names a `[[data.train]]` table of its own.",
    ),
    "not_a_pair": Explanation(
        "The row lacks a column that its format needs, or has it with a wrong type.",
        "Fill the column, or set `[data] format` if the row was taken for another format.",
    ),
    "not_an_example": Explanation(
        "The row has a label but no completion, or a column with a wrong type.",
        "Fill the column, or set `[data] format` if the row was taken for another format.",
    ),
    "not_a_message": Explanation("A message has no known role, or no text.", _FIX_OR_SKIP),
    "role_order": Explanation(
        "Turns are out of order, or a response isn't one assistant turn.",
        "Let user and assistant alternate, with the user's turn last in the prompt; join turns of the same role.",
    ),
    "different_prompts": Explanation(
        "The conversations start differently, or not with the prompt.",
        "Give the row one prompt, with `chosen` and `rejected` as the responses to it.",
    ),
    "empty": Explanation("The prompt or a response is empty, or the chat template leaves nothing of it.", _FIX_OR_SKIP),
    "control_character": Explanation(
        "A text has a control character other than tab, newline and carriage return.",
        "Look for a lost backslash (`\\frac` written as `\\f`) or a wrong encoding, and export the row again.",
    ),
    "bad_label": Explanation(
        "The label is none that its format knows, or two labels contradict each other.",
        "Write true or false, 1 or 0, or the format's own words.",
    ),
    "unlisted_verdict": Explanation(
        "The verdict is none of those that its contest or its format lists.",
        "List it in `[data.contest]`: in `first_wins`, `second_wins` or `tie`.",
    ),
    "refused_source": Explanation(
        "Some verdicts fit no outcome, so the others may name the wrong side; no row of the source is used.",
        "Say who won in `[data.contest]`, with every verdict that the source has.",
    ),
    "assumed_verdict": Explanation(
        "`[data] columns` renames columns to those of a format, whose verdicts count in one of two ways.",
        "Say who won in `[data.contest]`, with the file's own columns.",
    ),
    "one_sided_verdicts": Explanation(
        "All verdicts of the source name the same side.",
        "Compare the rows that `qpref check` prints with the data: a wrong reading would look like this.",
    ),
    "swapped_score": Explanation(
        "A score, rating, rank or verdict beside the label says that the rejected response is the better one.",
        "If most rows do, the two sides are swapped: map `chosen` and `rejected` the other way. Else read the rows.",
    ),
    "bad_number": Explanation("A weight, margin, rank or score is no usable number.", _FIX_OR_SKIP),
    "tied": Explanation(
        "All responses have the same score, or the verdict is a tie, so none is preferred.",
        "Leave the row out: a tie has nothing to learn a preference from.",
    ),
    "unread_key": Explanation(
        "Messages of the source have texts under keys that aren't read, so the model doesn't see them.",
        "Move the texts into `content`, or into `reasoning_content` where the model thinks before it answers.",
    ),
    "unpaired": Explanation(
        "The row is a single completion with a label, and the loss needs pairs.",
        "Choose a loss on single completions: `qpref losses` lists both kinds.",
    ),
    "masked": Explanation(
        "Every token of a response is masked, so that nothing of it counts.",
        "Leave the row out, or mask less: a part of each response has to count.",
    ),
    "bad_mask": Explanation(
        "A mask isn't spans of the response's text, or has no definite position in the rendered response.",
        'Compare it with the text, in characters from 0; or mark parts of the content with `"train": false`.',
    ),
    "too_long": Explanation(
        "The tokens of the prompt, or of prompt and response, are over the recipe's maximum.",
        'Raise `[data] max_length`, or set `on_overflow = "drop"` or `"truncate"`.',
    ),
    "control_token": Explanation(
        "A text holds a token that only the chat template may write, such as an end of turn.",
        "Remove the token from the text: another template's rendering has to go back to plain turns.",
    ),
    "template": Explanation(
        "The chat template refuses the row, or drops or changes a part of it.",
        "Compare the row with what the model's template renders; change the row, or use another template.",
    ),
    "no_template": Explanation(
        "The row is a conversation or has tools, calls or reasoning, and there is no chat template.",
        "Use a base with a chat template, or rows with one text as the prompt.",
    ),
    "no_stop": Explanation(
        "The tokenizer has no end-of-sequence token, so no response has an end to learn.",
        "Set `eos_token` in the base's tokenizer_config.json.",
    ),
    "boundary": Explanation(
        "The last token of the prompt and the first of the response would be one token together.",
        "Usually nothing: the response is tokenized alone, as it is generated.",
    ),
    "identical": Explanation(
        "Chosen and rejected are the same text, or the same tokens once they are truncated.",
        'Leave the row out: it has no preference. With `[checks] identical = "warn"` it stays.',
    ),
    "nearly_identical": Explanation(
        "Chosen and rejected differ only in case, punctuation or indentation.",
        "Leave the row out, unless the preference is about just that.",
    ),
    "too_similar": Explanation(
        "Chosen and rejected are more alike than `[checks] max_similarity`.",
        "Read some of them: small edits can be good pairs; copies with noise teach little.",
    ),
    "too_short": Explanation(
        "Responses are shorter than their minimum in `[checks]`; a Chinese character counts as several Latin ones.",
        'Lower the minimum or set `too_short = "off"` where short answers are meant.',
    ),
    "duplicate": Explanation(
        "The row repeats an earlier one: same prompt, same responses.",
        "Keep one of them; to train on a row more often, give it a `weight`.",
    ),
    "contradictory": Explanation(
        "Another row prefers the other one of the same two responses, or gives the completion the other label.",
        "Keep the label that you trust, or neither row.",
    ),
    "cyclic": Explanation(
        "The preferences go in a circle: A over B, B over C, C over A.",
        "Nothing, if annotators disagree; leave the weakest out, if scores can tell.",
    ),
    "few_prompts": Explanation(
        "The source has few distinct prompts for its number of rows.",
        "Add prompts, and split by prompt with `heldout_share`, which keeps a prompt's rows together.",
    ),
    "leaked_pair": Explanation(
        "A whole training row is in the held-out data too.",
        "Take it out of the training data: held-out metrics are too good otherwise.",
    ),
    "leaked_prompt": Explanation(
        "A prompt of the training data is in the held-out data too.",
        "Split by prompt: `heldout_share`, or a held-out set of other prompts.",
    ),
    "near_leak": Explanation(
        "A training prompt contains most of a held-out one.",
        "Compare the two; take one out where it is the same task.",
    ),
    "length_bias": Explanation(
        "The length of a response predicts whether it is preferred.",
        "Balance the lengths, or use a loss that normalizes them.",
    ),
    "one_class": Explanation(
        "All single completions have the same label.", "Add completions of the other label: the loss needs both."
    ),
    "class_balance": Explanation(
        "One label of single completions is rare.",
        "Balance the two with the loss's weights for desirable and undesirable completions, or add rows.",
    ),
    "placeholder": Explanation(
        "A whole response is a placeholder, such as N/A or [image].", "Leave the row out with your own filter."
    ),
    "no_word": Explanation("A response has no letter or digit.", "Leave the row out, unless signs are the answer."),
    "garbled": Explanation(
        "A response has characters of a broken encoding.",
        "Decode the source as UTF-8 again; text that was decoded wrongly can often be repaired with `ftfy`.",
    ),
    "unseen": Explanation(
        "A response has control characters, zero-width characters or direction overrides.",
        "Remove them: the model would learn to write them.",
    ),
    "turn_markers": Explanation(
        "Texts hold the control tokens or labels of a chat template, or responses go on with the user's next turn.",
        "Remove the markers, and write several turns as messages; cut a response where the next turn starts.",
    ),
    "lost_backslash": Explanation(
        "A LaTeX command lost its backslash to an escape: `\\times` was read as a tab and `imes`.",
        "Write the file with a JSON library, which doubles backslashes; texts in a program as raw strings.",
    ),
    "markup": Explanation("A response has HTML tags or entities left in it.", "Convert the HTML to plain text."),
    "echo": Explanation(
        "A response starts with the whole prompt.", "Remove the prompt from the response: some exports join the two."
    ),
    "repetition": Explanation(
        "A response is stuck in a loop.", "Leave the row out if the response is chosen; as rejected it may be meant."
    ),
    "refusal": Explanation(
        'A preferred response refuses, or says "as an AI language model".',
        "Decide whether the model should learn to refuse this; if not, leave the row out.",
    ),
    "suspected_swap": Explanation(
        "The reference finds rejected far more likely than chosen, compared with the other pairs.",
        "Read the row: a fluent answer may be on the wrong side.",
    ),
}
"""Code -> its explanation. docs/data.md shows the same table."""


def explanation_of(code: str) -> Explanation:
    """Return the explanation of a code, a general one for the codes of third-party validators."""
    return CODES.get(code, OTHER)


def markdown_table() -> str:
    """Format the codes as a Markdown table."""
    lines = ["| code | meaning | what to do |", "|---|---|---|"]
    lines += [f"| `{code}` | {entry.meaning} | {entry.remedy} |" for code, entry in CODES.items()]
    return "\n".join(lines)
