"""Training rows that repeat held-out ones are found, exactly or nearly, in whatever batches they come."""

import random
import tracemalloc
from unicodedata import normalize

import pytest

from qpref.records import Message, PreferencePair
from qpref_plugins import check_leakage
from qpref_plugins.check_leakage import BATCH_BYTES, CheckLeakage, LeakageChecks
from qpref_plugins.check_leakage.index import MOST_PROMPTS
from qpref_plugins.check_leakage.shingles import plain, shingle
from tests.plugins.check_cases import findings, lines, pair, reported, severities, single, words

QUESTION = "Why does a loaf of rye bread rise more slowly than one of wheat, and what can a baker do about it?"


def held(*prompts):
    return [pair(prompt, f"chosen {line}", "held", line, "heldout.jsonl") for line, prompt in enumerate(prompts, 1)]


def trained(*prompts):
    return [pair(prompt, f"chosen {line}", "trained", line) for line, prompt in enumerate(prompts, 1)]


def plain_share(held_out, training):
    """The share of the held-out prompt's five-word sequences that the training prompt holds, by plain sets."""
    first, second = ([text.split()[start : start + 5] for start in range(len(text.split()) - 4)] for text in
                     (held_out, training))  # fmt: skip
    return len({tuple(one) for one in first} & {tuple(one) for one in second}) / len({tuple(one) for one in first})


@pytest.mark.parametrize(
    "prompt",
    [QUESTION, QUESTION.upper(), f"  {QUESTION}\n", QUESTION.replace(",", " -"), QUESTION.replace(" ", "\u00a0")],
    ids=repr,
)
def test_a_held_out_prompt_is_found_whatever_its_case_and_punctuation(prompt):
    assert reported(check_leakage, trained("Hello there", prompt), held("What is up?", QUESTION)) == [
        ("leaked_prompt", 2, "this prompt is in the held-out set too, at heldout.jsonl:2")
    ]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Yes?", "No?"),
        ("...", "!!!"),
        ("What is 1 + 1?", "What is 1 + 2?"),
        ("\u0915\u093f", "\u0915\u093e"),
        ("é", "e"),
        ("What is 5 + 3?", "What is 5 - 3?"),
        ("What is 5*3?", "What is 5/3?"),
        ("Is a < b?", "Is a > b?"),
        ("Is it 5%?", "Is it 5?"),
        ("Solve x = -3.", "Solve x = 3."),
        ("What is a pointer in C?", "What is a pointer in C++?"),
        ("What is a class in C++?", "What is a class in C#?"),
        ("What does \U0001f602 mean?", "What does \U0001f62d mean?"),
        ("3 × 4 是多少？", "3 ÷ 4 是多少？"),
        ("x → y 是什么？", "x ← y 是什么？"),
        ("ก่า คืออะไร", "ก้า คืออะไร"),
    ],
    ids=repr,
)
def test_another_short_prompt_is_no_leak(one, other):
    assert reported(check_leakage, trained(other), held(one)) == []


def test_prompts_need_not_be_ascii():
    prompts = ["Pourquoi le pain lève-t-il ?", "为什么面包会膨胀?", "Почему хлеб поднимается?"]
    changed = [f"{prompt.upper()} " for prompt in prompts]
    assert lines(check_leakage, "leaked_prompt", trained(*changed), held(*prompts)) == [1, 2, 3]


def test_chinese_prompts_leak_nearly():
    prompt = "请用简单的语言解释为什么黑麦面包比小麦面包发酵得更慢并给出三个建议"
    assert lines(check_leakage, "near_leak", trained(prompt + "谢谢"), held(prompt)) == [1]


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("Is it **5**, or more?", "Is it 5, or more"),
        ("Rye - why?", "Rye: why"),
        ("为什么面包，会膨胀？", "为什么 面包会膨胀"),
        ("ทำไม ขนมปังจึงขึ้นฟู?", "ทำไมขนมปังจึงขึ้นฟู"),
        ("Ｗｈｙ１", "why1"),
        ("caf\u00e9", "CAFE\u0301"),
        ("5 + 3 = ?", "5 +3 =?"),
    ],
    ids=repr,
)
def test_the_same_prompt_is_found_in_any_script(one, other):
    assert lines(check_leakage, "leaked_prompt", trained(other), held(one)) == [1]


LONG_PROMPTS = {
    "Chinese": "请用简单的语言向一位面包师解释{}的含义，并给出三个日常生活中的例子和一个练习题",
    "Japanese": "パン職人にもわかるように、{}とは何かを簡単な言葉で説明し、日常の例を三つ挙げてください",
    "Thai": "ช่วยอธิบายความหมายของ{}ด้วยภาษาที่เข้าใจง่าย พร้อมยกตัวอย่างในชีวิตประจำวันสามตัวอย่าง",
    "Khmer": "សូមពន្យល់អត្ថន័យនៃ{}ជាភាសាសាមញ្ញ ហើយផ្តល់ឧទាហរណ៍បីក្នុងជីវិតប្រចាំថ្ងៃ",
}
THINGS = {
    "Chinese": ("通货膨胀", "光合作用"),
    "Japanese": ("物価の上昇", "光合成の仕組み"),
    "Thai": ("ภาวะเงินเฟ้อ", "การสังเคราะห์แสง"),
    "Khmer": ("អតិផរណា", "រស្មីសំយោគ"),
}


@pytest.mark.parametrize("language", LONG_PROMPTS)
def test_near_leaks_are_those_of_the_text_in_scripts_without_spaces(language):
    prompt, things = LONG_PROMPTS[language], THINGS[language]
    one, other = (prompt.format(thing) for thing in things)
    greeting = things[1]
    assert lines(check_leakage, "near_leak", trained(f"{greeting} {one} {greeting}"), held(one)) == [1]
    assert reported(check_leakage, trained(other), held(one)) == []


def test_the_same_row_in_another_unicode_form_is_a_whole_row():
    row = pair("Où ?", "Crème", "brûlée", 1)
    copy = pair(*(normalize("NFD", text) for text in ("Où ?", "Crème", "brûlée")), 1, "heldout.jsonl")
    assert [code for code, _, _ in reported(check_leakage, [row], [copy])] == ["leaked_pair"]


def test_a_whole_row_is_reported_as_such_alone():
    row = pair(QUESTION, "chosen", "rejected", 4)
    copy = pair(QUESTION, "chosen", "rejected", 9, "heldout.jsonl")
    assert reported(check_leakage, [row], [copy]) == [
        ("leaked_pair", 4, "this row is in the held-out set too, at heldout.jsonl:9")
    ]


def test_single_completions_leak_too():
    rows = [single(QUESTION, "a", True, 1), single(QUESTION, "a", False, 2)]
    assert [code for code, _, _ in reported(check_leakage, rows, [single(QUESTION, "a", True, 5)])] == [
        "leaked_pair",
        "leaked_prompt",
    ]


def test_a_ranking_is_reported_once():
    rows = [pair(QUESTION, "a", other, 3) for other in "bcd"]
    assert [code for code, _, _ in reported(check_leakage, rows, [pair(QUESTION, "a", "c", 1)])] == ["leaked_pair"]


def test_a_longer_prompt_that_holds_a_held_out_one_is_near():
    found = reported(check_leakage, trained(f"Please answer in short. {QUESTION} Thank you!"), held(QUESTION))
    assert found == [("near_leak", 1, "this prompt contains 100% of the held-out one at heldout.jsonl:1")]


@pytest.mark.parametrize(("num_kept", "codes"), [(44, ["near_leak"]), (43, [])])
def test_near_is_the_share_that_the_recipe_gives(num_kept, codes):
    # 54 words have 50 five-word sequences; the first 44 words hold 40 of them, which is 0.8.
    text = words(random.Random(1), 54).split()
    training = " ".join(text[:num_kept])
    assert plain_share(" ".join(text), training) == (num_kept - 4) / 50
    assert [code for code, _, _ in reported(check_leakage, trained(training), held(" ".join(text)))] == codes


def test_the_share_is_the_recipes():
    text = words(random.Random(1), 54).split()
    training = trained(" ".join(text[:29]))
    assert lines(check_leakage, "near_leak", training, held(" ".join(text)), min_overlap=0.5) == [1]


def test_repeating_a_sequence_does_not_add_to_the_share():
    text = words(random.Random(1), 54).split()
    assert reported(check_leakage, trained(" ".join(text[:12] * 20)), held(" ".join(text))) == []


def test_a_template_is_no_leak():
    rng = random.Random(2)
    template = words(rng, 80)
    num = MOST_PROMPTS + 1
    heldout = held(*(f"{template} {words(rng, 12)}" for _ in range(4 * num)))
    assert reported(check_leakage, trained(*(f"{template} {words(rng, 12)}" for _ in range(20))), heldout) == []


def test_what_fills_a_template_leaks():
    rng = random.Random(2)
    template, own = words(rng, 80), [words(rng, 12) for _ in range(50)]
    heldout = held(*(f"{template} {text}" for text in own))
    assert lines(check_leakage, "near_leak", trained(f"Hello! {template} {own[7]}"), heldout) == [1]


def with_system(system, question, line):
    base = pair(question, f"chosen {line}", "rejected", line)
    prompt = (Message(role="system", content=system), *base.prompt)
    return PreferencePair(prompt=prompt, chosen=base.chosen, rejected=base.rejected, source=base.source)


def test_a_shared_system_turn_is_no_leak():
    system = words(random.Random(3), 200)
    training = [with_system(system, "What is bread?", 1)]
    assert reported(check_leakage, training, [with_system(system, "What is butter?", 2)]) == []


def test_a_question_leaks_whatever_the_system_turn():
    training = [with_system("Be brief.", QUESTION, 1)]
    assert lines(check_leakage, "leaked_prompt", training, [with_system("Rhyme.", QUESTION, 2)]) == [1]


@pytest.mark.parametrize("num_rows", [3, 500])
def test_what_is_near_is_what_plain_sets_say(num_rows):
    rng = random.Random(num_rows)
    heldout = [words(rng, rng.randint(12, 60)) for _ in range(40)]
    training, expected = [], []
    for line in range(1, num_rows + 1):
        text = words(rng, 30).split()
        if line % 3 == 0:
            source = rng.choice(heldout).split()
            text = text[:9] + source[: rng.randint(len(source) // 2, len(source))] + text[9:]
        training.append(" ".join(text))
        if max(plain_share(one, training[-1]) for one in heldout) >= 0.8:
            expected.append(line)
    assert sum(map(len, training)) > BATCH_BYTES or num_rows == 3
    assert lines(check_leakage, "near_leak", trained(*training), held(*heldout)) == expected


def test_a_hash_depends_on_the_words_alone():
    lone = shingle([plain("one two three four five")])
    both = shingle([plain("Zero, one TWO  three four (five)"), plain("one two three four five six")])
    assert [*lone.hashes.tolist()] * 2 == both.hashes[1:3].tolist()
    assert both.prompt.tolist() == [0, 0, 1, 1]


def test_prompts_without_words_or_rows_do_no_harm():
    assert reported(check_leakage, trained("", "?", QUESTION), held("", "?")) == []
    assert reported(check_leakage, trained(QUESTION)) == []
    assert reported(check_leakage, [], held(QUESTION)) == []


CASES = {
    "leaked_pair": [pair(QUESTION, "chosen 1", "held", 1)],
    "leaked_prompt": trained(QUESTION),
    "near_leak": trained(f"Say: {QUESTION}"),
}


@pytest.mark.parametrize("code", CASES)
@pytest.mark.parametrize(("severity", "shown"), [("error", ["error"]), ("warn", ["warning"]), ("off", [])])
def test_every_check_has_the_severity_that_the_recipe_gives(code, severity, shown):
    assert severities(check_leakage, CASES[code], held(QUESTION), **{code: severity}) == shown
    if shown:
        assert {one.code for one in findings(check_leakage, CASES[code], held(QUESTION))} == {code}


def test_training_rows_take_no_memory_of_their_own():
    rng = random.Random(0)
    check = CheckLeakage(LeakageChecks())
    heldout = [words(rng, 80) for _ in range(2000)]
    texts = [words(rng, 80) for _ in range(500)]
    tracemalloc.start()
    for example in held(*heldout):
        check.look(example, "heldout")
    check.look(trained(texts[0])[0], "train")
    before = tracemalloc.get_traced_memory()[0]
    assert before < 4e6 + 3000 * len(heldout)
    for line in range(4_000):
        check.look(pair(texts[line % 500] + str(line), "a", "b", line), "train")
    assert list(check.finish()) == []
    assert tracemalloc.get_traced_memory()[0] - before < 5e5
    tracemalloc.stop()
