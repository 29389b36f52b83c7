"""Examples for the validators' tests, and what a validator says of them."""

import random

from qpref.records import Message, PreferencePair, Source, UnpairedExample

VOCABULARY = ["".join(random.Random(seed).choices("abcdefghiklmnoprstuvw", k=2 + seed % 8)) for seed in range(3000)]


def words(rng, count):
    return " ".join(rng.choices(VOCABULARY, k=count))


def pair(prompt, chosen, rejected, line=1, path="pairs.jsonl", number=0):
    return PreferencePair(
        prompt=(Message(role="user", content=prompt),),
        chosen=(Message(role="assistant", content=chosen),),
        rejected=(Message(role="assistant", content=rejected),),
        number=number,
        source=Source(path=path, line=line),
    )


def single(prompt, completion, label, line=1, path="singles.jsonl"):
    return UnpairedExample(
        prompt=(Message(role="user", content=prompt),),
        completion=(Message(role="assistant", content=completion),),
        label=label,
        source=Source(path=path, line=line),
    )


def findings(module, train, heldout=(), **options):
    """All findings of the one validator that a plugin offers."""
    (validator,) = module.qpref_validators()
    check = validator.start(validator.options(**options))
    found = [finding for example in heldout for finding in check.look(example, "heldout")]
    found += [finding for example in train for finding in check.look(example, "train")]
    return found + list(check.finish())


def reported(module, train, heldout=(), **options):
    """(code, line, message) of each finding."""
    return [(one.code, one.source.line, one.message) for one in findings(module, train, heldout, **options)]


def lines(module, code, train, heldout=(), **options):
    """The lines that have a finding of this code."""
    return [line for found, line, _ in reported(module, train, heldout, **options) if found == code]


def severities(module, train, heldout=(), **options):
    return [one.severity for one in findings(module, train, heldout, **options)]
