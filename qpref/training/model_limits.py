"""Limits of a base that its data have to keep to: the vocabulary, and the positions that it has learned."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from qpref.errors import PolicyError
from qpref.policy.policy import Policy
from qpref.records import TokenizedExample


def refuse_beyond_limits(policy: Policy, examples: Sequence[TokenizedExample]) -> None:
    """Refuse examples with tokens or positions that the model has no embedding for.

    Raises:
        PolicyError: naming the first such example.
    """
    _refuse_unknown_tokens(policy, examples)
    _refuse_long_rows(policy, examples)


def _refuse_unknown_tokens(policy: Policy, examples: Sequence[TokenizedExample]) -> None:
    """Refuse data with token ids that the model has no embedding for.

    Raises:
        PolicyError: tokens were added to the tokenizer and the model wasn't resized.
    """
    embedded = int(policy.plain_model.get_input_embeddings().weight.shape[0])
    known = min(embedded, policy.head.num_tokens)
    for example in examples:
        largest = max(
            int(np.frombuffer(ids, dtype=np.intc).max()) for ids in (example.prompt, *example.branches) if ids
        )
        if largest >= known:
            raise PolicyError(
                f"{example.source}: token id {largest} is beyond the base's vocabulary: its embedding has {known} rows",
                "use the tokenizer that belongs to the base, or resize the base before training: "
                "model.resize_token_embeddings(len(tokenizer)), then save_pretrained",
            )


def _refuse_long_rows(policy: Policy, examples: Sequence[TokenizedExample]) -> None:
    """Refuse rows that are longer than the table of positions of a model that has learned them.

    Raises:
        PolicyError: a row has a position beyond it.
    """
    limit = policy.learned_positions()
    for example in examples:
        length = len(example.prompt) + max(map(len, example.branches))
        if limit is not None and length - 1 > limit:  # the last token is only predicted
            raise PolicyError(
                f"{example.source}: a row of {length} tokens, and the base has learned {limit} positions "
                "(max_position_embeddings)",
                f"set [data] max_length = {limit}, and max_prompt_length below it",
            )
