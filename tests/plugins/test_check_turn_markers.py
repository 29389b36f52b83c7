"""Texts that are formatted already are counted by family; texts about templates and scripts are left alone."""

import time
from dataclasses import replace

import pytest

from qpref.records import Message
from qpref_plugins import check_text
from qpref_plugins.check_text.template_tokens import FAMILIES, FAMILY_OF, find_token
from tests.plugins.check_cases import findings, lines, pair, reported, severities, single

ASK = "How do I keep a cut loaf from going stale?"
GOOD = "Wrap the loaf in a cotton cloth, and slice only what you eat."
BAD = "A loaf cannot go stale as long as nobody looks at it."


def told(*rows, **options):
    """Messages of the turn markers in some rows, with a family's first token alone in brackets."""
    return [
        message.replace("(such as ", "(")
        for code, _, message in reported(check_text, rows, **options)
        if code == "turn_markers"
    ]


def families(prompt, chosen=GOOD, rejected=BAD):
    """The families and labels that one row is formatted with."""
    found = told(pair(prompt, chosen, rejected))
    return sorted(
        message.split(", with ")[-1].split(", at")[0] if ", with " in message else message for message in found
    )


FORMATTED = {
    "ChatML (<|im_start|>)": (f"<|im_start|>user\n{ASK}<|im_end|>\n<|im_start|>assistant\n", f"{GOOD}<|im_end|>"),
    "Llama 2 or Mistral ([INST])": (f"<s>[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\n{ASK} [/INST]", f"{GOOD} </s>"),
    "Llama 3 (<|begin_of_text|>)": (
        f"<|start_header_id|>user<|end_header_id|>\n\n{ASK}<|eot_id|>", f"{GOOD}<|eot_id|>"),
    "Llama 4 (<|header_start|>)": (f"<|header_start|>user<|header_end|>\n\n{ASK}<|eot|>", f"{GOOD}<|eot|>"),
    "Gemma (<start_of_turn>)": (
        f"<bos><start_of_turn>user\n{ASK}<end_of_turn>\n<start_of_turn>model\n", f"{GOOD}<end_of_turn>"),
    "Gemma 4 (<|turn>)": (f"<|turn>user\n{ASK}<turn|>\n<|turn>model\n", f"{GOOD}<turn|>"),
    "Phi-3, Zephyr or GLM-4 (<|user|>)": (f"<|user|>\n{ASK}<|end|>\n<|assistant|>\n", f"{GOOD}<|end|>"),
    "gpt-oss (<|start|>)": (f"<|start|>user<|message|>{ASK}<|end|>", f"<|channel|>final<|message|>{GOOD}<|return|>"),
    "DeepSeek (<｜User｜>)": (f"<｜User｜>{ASK}<｜Assistant｜>", f"{GOOD}<｜end▁of▁sentence｜>"),
    "Command R (<|START_OF_TURN_TOKEN|>)": (
        f"<|START_OF_TURN_TOKEN|><|USER_TOKEN|>{ASK}<|END_OF_TURN_TOKEN|>", f"{GOOD}<|END_OF_TURN_TOKEN|>"),
    "Granite (<|start_of_role|>)": (f"<|start_of_role|>user<|end_of_role|>{ASK}<|end_of_text|>", GOOD),
    "Kimi (<|im_user|>)": (f"<|im_user|>user<|im_middle|>{ASK}", GOOD),
    "EXAONE ([|system|])": (f"[|user|]{ASK}\n[|assistant|]", f"{GOOD}[|endofturn|]"),
    "Hunyuan (<|hy_User|>)": (f"<|hy_User|>{ASK}<|hy_Assistant|>", GOOD),
    "OpenAssistant (<|prompter|>)": (f"<|prompter|>{ASK}<|endoftext|>", GOOD),
    "OpenChat (<|end_of_turn|>)": (f"GPT4 Correct User: {ASK}<|end_of_turn|>GPT4 Correct Assistant:", GOOD),
    "OpenChatKit (<human>:)": (f"<human>: {ASK}\n<bot>:", GOOD),
    "StableLM (<|USER|>)": (f"<|USER|>{ASK}<|ASSISTANT|>", GOOD),
    "InternLM (<eoh>)": (f"{ASK}<eoh>", f"{GOOD}<eoa>"),
    "Apertus (<|user_start|>)": (f"<|user_start|>{ASK}<|user_end|><|assistant_start|>", f"{GOOD}<|assistant_end|>"),
    "MiniMax (]~b])": (f"]~b]user\n{ASK}[e~[\n]~b]ai\n", f"{GOOD}[e~["),
    "an end-of-sequence token (</s>)": (ASK, f"{GOOD}</s>"),
    "Alpaca (### Instruction:)": (f"### Instruction:\n{ASK}\n\n### Response:\n", GOOD),
    "### Human:": (f"### Human: {ASK}\n### Assistant: In cloth.\n### Human: Why?", GOOD),
    "### User:": (f"### System:\nBe brief.\n\n### User:\n{ASK}\n\n### Assistant:\nWhat loaf?", GOOD),
    "### Assistant: at the end": (f"### Topic\nBread\n### User:\n{ASK}\n\n### Assistant:\n", GOOD),
    "### Answer: at the end": (f"### Question:\n{ASK}\n\n### Answer:", GOOD),
    "Vicuna (USER: ... ASSISTANT:)": (f"A chat between a user and an assistant. USER: {ASK} ASSISTANT:", GOOD),
    "Human: ... Assistant:": (f"Human: {ASK}\n\nAssistant:", GOOD),
    "User: ... Assistant:": (f"User: {ASK}\nAssistant: In cloth.\nUser: Why?\nAssistant:", GOOD),
    "Question: ... Answer:": (f"Question: {ASK}\nAnswer:", GOOD),
    "Q: ... A:": (f"Q: {ASK}\nA: ", GOOD),
    "用户: ... 助手:": ("用户：怎样保存切开的面包？\n助手：", GOOD),
    "Пользователь: ... Ассистент:": ("Пользователь: Как хранить хлеб?\nАссистент:", GOOD),
}  # fmt: skip


@pytest.mark.parametrize("family", FORMATTED)
def test_a_row_that_is_formatted_for_a_family_is_named_by_it_once(family):
    assert families(*FORMATTED[family]) == [family]


def test_every_family_of_tokens_has_a_case():
    assert {name for name in FORMATTED if name.split(" (")[0] in FAMILIES} == {
        f"{name} ({tokens[0]})" for name, tokens in FAMILIES.items()
    }


@pytest.mark.parametrize("token", FAMILY_OF)
def test_every_token_is_found_by_its_place(token):
    assert find_token(f"{GOOD}{token}\n") == (token, "end")
    assert find_token(f" {token}{GOOD}") == (token, "start")
    assert find_token(f"{GOOD}\n{token}{GOOD}") == (token, "line")
    assert find_token(f"{GOOD} {token} {GOOD}") == (token, "inside")
    assert find_token(f"{GOOD} '{token}' and `{token}` {GOOD}") is None


def test_a_token_inside_a_response_counts_unless_the_texts_are_about_it():
    inside = "Wrap the loaf <|eot_id|> in a cotton cloth."
    assert families(ASK, inside) == ["Llama 3 (<|begin_of_text|>)"]
    assert told(pair(inside, GOOD, BAD), pair("What does <|eot_id|> mean?", inside, BAD)) == []
    assert told(pair(ASK, f"{inside} It is a special token.", BAD)) == []


@pytest.mark.parametrize(
    "prompt",
    [f"System: Be brief.\nUser: {ASK}\nAssistant:", f"user: {ASK}\nassistant:", f"**User:** {ASK}\n**Assistant:**",
     f"USER: {ASK}\nASSISTANT: Cloth.\nUSER: Why?"],
    ids=repr,
)  # fmt: skip
def test_labels_may_follow_a_system_turn_in_any_case(prompt):
    assert len(told(pair(prompt, GOOD, BAD))) == 1


@pytest.mark.parametrize(
    "preamble", ["Below is an instruction that describes a task.\n\n### Instruction:\n", "### Instruction:\n"]
)
@pytest.mark.parametrize("end", ["\n\n### Response:", "\n\n### Context:\nA bakery.\n\n### Response:\n", ""])
def test_alpacas_parts_may_be_spread(preamble, end):
    assert families(preamble + ASK + end) == ["Alpaca (### Instruction:)"]
    assert families(ASK, f"### Response:\n{GOOD}") == ["Alpaca (### Instruction:)"]
    assert families(ASK, f"{GOOD}\n\n### Instruction:\nName a knot.\n\n### Response:\nBowline.") != []


@pytest.mark.parametrize(
    ("role", "content"), [("system", "[INST] Be brief."), ("assistant", "Hello<|eot_id|>"), ("tool", "3<|im_end|>")]
)
def test_a_marker_in_any_turn_of_the_prompt_counts(role, content):
    row = pair(ASK, GOOD, BAD)
    assert len(told(replace(row, prompt=(Message(role=role, content=content), *row.prompt)))) == 1


def test_a_warning_counts_the_rows_of_a_source_and_names_the_first():
    rows = [pair(*FORMATTED["ChatML (<|im_start|>)"], BAD, line) for line in range(1, 8)] + [pair(ASK, GOOD, BAD, 8)]
    assert told(*rows) == [
        "7 of 8 training rows (87.5%) have a text that is formatted already, with ChatML (<|im_start|>), first at "
        "lines 1, 2, 3, 4, 5. The model's own chat template comes around it: remove the markers, and write several "
        "turns as messages"
    ]
    assert {one.source.line for one in findings(check_text, rows)} == {0}


@pytest.mark.parametrize(
    ("answer", "label"),
    [
        (f"{GOOD}\n\nHuman: thanks\n\nAssistant: You are welcome.", "Human:"),
        (f"{GOOD}\n\nHuman: thanks", "Human:"),
        (f"{GOOD}\n\nUser: And why?\n\nAssistant: It dries.", "User:"),
        (f"{GOOD}\nUSER: And why?\nASSISTANT: It dries.", "USER:"),
        (f"Assistant: {GOOD}\nUser: And why?\nAssistant: It dries.", "User:"),
        (f"{GOOD}\n\nuser: And why?\nassistant: It dries.", "user:"),
        ("Заверните.\n\nНапример.\n\nПользователь: Ещё?\nАссистент: Да.", "Пользователь:"),
        ("先把面包包好。\n\n用户：还有呢？\n\n助手：没有了。", "用户:"),
    ],
)
@pytest.mark.parametrize("side", ["chosen", "rejected", "completion"])
def test_a_response_that_goes_on_into_the_next_turn_is_counted(answer, label, side):
    rows = {
        "chosen": pair(ASK, answer, BAD, 4),
        "rejected": pair(ASK, GOOD, answer, 4),
        "completion": single(ASK, answer, False, 4),
    }
    message = told(rows[side])[-1]
    assert message.startswith("1 of 1 training row (100.0%) have a response that goes on into the next turn")
    assert message.endswith(f"({label}), at line 4. Cut it there")


def test_more_questions_are_a_next_turn_where_the_prompt_is_one():
    more = "Wrap it.\n\nQuestion: Why?\nAnswer: It dries."
    assert any("next turn (Question:)" in message for message in told(pair(f"Question: {ASK}\nAnswer:", more, BAD)))
    assert told(pair(ASK, more, BAD)) == []


HONEST = {
    "headings": f"{GOOD}\n\n### Response time\n\nA day.\n\n### Instructions for cloth\n\nWash it cold.",
    "lesson plan": "## Goals\nKnots.\n\n### Instruction:\nShow one.\n\n### Assessment:\nAsk for one.",
    "problem": "### Input:\n5 3\n\n### Output:\n8",
    "study guide": "### Question:\nWhat is a knot?\n\n### Answer:\nA loop.",
    "about roles": "### User roles\nAdmins and guests.\n### AI: a short history\nIt began early.",
    "script": "Bob: Hi.\nHuman: Hello.\nBob: What?\nAssistant: Nothing.",
    "announced": "An example:\n\nUser: Hi\nAssistant: Hello",
    "chromosomes": "The numbers differ.\n\nHuman: 46\n\nDog: 78\n\nFern: 1260",
    "alone": "The numbers differ.\nHuman: 46",
    "parts": "Three parts matter.\n\nUser: clicks\nModel: stores\nView: shows",
    "settings": "Write this:\nuser: root\nmodel: small",
    "keys": "It is short.\n\nuser: root\nai: off",
    "interval": "It lies in ]0, 1] or [e, b[.",
    "login": "Use these.\n\nUser: admin\nPassword: bread",
    "code": "Run it:\n```\n<|im_start|>user\nHi<|im_end|>\nUser: a\nAssistant: b\n### Instruction:\n```",
    "inline code": "A turn starts with `<|im_start|>` and ends with `<|im_end|>`",
    "sentence": "In its template, a turn starts with <|im_start|>, and then <|im_end|> closes it.",
    "definitions": "The tokens:\n<|im_start|>: starts a turn\n<|im_end|> - ends one.\n[INST] = instruction",
    "string": 'prompt = "<|im_start|>user"\nstop = ["</s>", "<|im_end|>"]',
    "closed interval": "It is in [INSTANT, END] and <start_of_day>.",
    "html": "It was <s>sold</s>",
    "pipes": "xs <| ys |> zs, and |user| <| 3",
    "answer": "Answer: 42",
    "note": "Note: wrap it.\nTip: slice it.\nNote: eat it.",
    "faq": "Q: Why?\nA: It dries.\n\nQ: How?\nA: In cloth.",
    "time": "At 10:30, User: nobody.",
}  # fmt: skip


@pytest.mark.parametrize("case", HONEST)
def test_honest_texts_have_no_markers(case):
    assert told(pair(ASK, HONEST[case], BAD), pair(ASK, BAD, HONEST[case]), pair(HONEST[case], GOOD, BAD)) == []


@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("Write a short scene: a human and an assistant argue.", "It is dusk.\n\nHuman: No!\n\nAssistant: Yes."),
        ("Give an example dialogue with a bot.", "Here you are.\n\nUser: Hi\nAssistant: Hello"),
        ("写一段用户和助手的对话", "好的。\n\n用户：你好\n助手：你好"),
        ("Convert this chat to ChatML: hi", "<|im_start|>user\nhi<|im_end|>"),
        ("Which token ends a turn of Llama 3?", "<|eot_id|>"),
        ("What does <|im_end|> do?", "It ends a turn:\n<|im_end|>"),
        ("How should I format the fine-tuning template for Alpaca?", "### Instruction:\n{x}\n\n### Response:\n{y}"),
        ("My chat template is broken, why?\n<|im_start|>user\nHi", "The turn has no end."),
        ("Question: is rye good? Answer with yes or no.", "Yes"),
        ("Summarize this:\nUser: Hi\nAssistant: Hello", "A greeting."),
        ("### Instruction:\nTranslate\n\n### Text:\nLoaf", "Brot"),
        ("Complete this.\nHuman: hi\nAssistant:", "Hello"),
    ],
)
def test_texts_about_templates_and_dialogues_have_no_markers(prompt, answer):
    assert told(pair(prompt, answer, BAD)) == []


@pytest.mark.parametrize(("severity", "shown"), [("error", ["error"]), ("warn", ["warning"]), ("off", [])])
def test_markers_have_the_severity_that_the_recipe_gives(severity, shown):
    row = pair(*FORMATTED["Gemma (<start_of_turn>)"], BAD, 3)
    assert severities(check_text, [row, pair(ASK, GOOD, BAD, 4)], turn_markers=severity) == shown


def test_as_an_error_each_row_is_refused_at_its_line():
    rows = [
        pair(ASK, GOOD, BAD, 1),
        pair(ASK, f"{GOOD}<|eot_id|>\n\nHuman: thanks", BAD, 2),
        pair(ASK, f"{GOOD}</s>", BAD, 3),
    ]
    assert lines(check_text, "turn_markers", rows, turn_markers="error") == [2, 3]
    assert "goes on into the next turn (Human:)" in told(rows[1], turn_markers="error")[0]


@pytest.mark.parametrize(
    "text",
    ["\n" * 200_000, "### " * 50_000, "<|im_start|> x " * 20_000, "\nUser: " * 20_000, "Q:\n" + "\nA" * 60_000,
     "USER: " * 30_000 + "ASSISTANT:", "```" * 60_000 + "<|im_end|> a", "### a" + " " * 200_000 + "#",
     "Human:" + "\n " * 90_000],
    ids=lambda text: text[:12],
)  # fmt: skip
def test_long_texts_cost_no_more_than_their_length(text):
    start = time.process_time()
    told(pair(text + "x", text + "x", text + "y"))
    assert time.process_time() - start < 2


@pytest.mark.parametrize(
    ("text", "token"),
    [("<bos><start_of_turn>user\nHi", "<start_of_turn>"), ("<s>[INST] Hi", "[INST]"), ("<bos>Hi", "<bos>")],
)
def test_the_token_after_the_one_that_begins_a_text_names_the_family(text, token):
    assert find_token(text) == (token, "start")
