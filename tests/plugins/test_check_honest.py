"""Honest responses in many scripts, code, mathematics, tables, poems and tool calls have no finding of their own."""

import json
import time
from dataclasses import replace
from unicodedata import normalize

import pytest

from qpref.records import Message
from qpref_plugins import check_text
from tests.plugins.check_cases import pair, reported

WHY = "Why does bread rise?"
OTHER = "Nobody has told me, and so I have to leave that open for today."

SENTENCES = {
    "Chinese": ("面包为什么会发起来？", "酵母把糖变成气体，面筋把气体留在面团里，所以面包就发起来了。"),
    "Japanese": ("パンはなぜ膨らむのですか。", "酵母が糖をガスに変え、グルテンがそのガスを閉じ込めるからです。"),
    "Korean": ("빵은 왜 부풀어 오르나요?", "효모가 당을 기체로 바꾸고, 글루텐이 그 기체를 가두기 때문입니다."),
    "Thai": ("ทำไมขนมปังจึงขึ้นฟู", "ยีสต์เปลี่ยนน้ำตาลเป็นก๊าซ และกลูเตนกักก๊าซนั้นไว้ในแป้ง"),
    "Khmer": (
        "ហេតុអ្វីនំប៉័ងឡើង",
        "មេ\u200bបង្កើត\u200bឧស្ម័ន\u200bពី\u200bស្ករ (yeast\u200b) ហើយ \u200b\u200bម្សៅ\u200bរក្សា\u200bឧស្ម័ន\u200bនោះ។",
    ),
    "Burmese": ("ပေါင်မုန့် ဘာကြောင့် ပွသလဲ", "တဆေးက သကြားကို\u200bဓာတ်ငွေ့ အဖြစ် ပြောင်းပေးသည်။"),
    "Hindi": ("रोटी क्यों फूलती है?", "खमीर चीनी को गैस में बदलता है, और आटे का ग्लूटेन उस गैस को रोक लेता है।"),
    "Tamil": ("ரொட்டி ஏன் உப்புகிறது?", "ஈஸ்ட் சர்க்கரையை வாயுவாக மாற்றுகிறது, மாவு அதைத் தக்க வைக்கிறது."),
    "Arabic": (
        "لماذا ينتفخ الخبز؟", "تحوّل الخميرة السكر إلى غاز، ويحبس الغلوتين (\u2068gluten\u2069) هذا الغاز في العجين."),
    "Persian": ("چرا نان پف می\u200cکند؟", "مخمر قند را به گاز تبدیل می\u200cکند و خمیر آن را نگه می\u200cدارد."),
    "Hebrew": ("למה הלחם תופח?", "השמרים הופכים סוכר לגז, והגלוטן (\u202agluten\u202c) שומר אותו בבצק."),
    "Greek": ("Γιατί φουσκώνει το ψωμί;", "Η μαγιά μετατρέπει τη ζάχαρη σε αέριο, και η γλουτένη το κρατά."),
    "Russian": ("Почему хлеб поднимается?", "Дрожжи превращают сахар в газ, а клейковина удерживает его в тесте."),
    "Georgian": ("რატომ ფუვდება პური?", "საფუარი შაქარს აირად აქცევს, ცომი კი მას ინახავს."),
    "Amharic": ("ዳቦ በምድጃ ውስጥ ለምን ይነፋል?", "እርሾ ስኳርን ወደ ጋዝ ይቀይራል፤ ሊጡም ጋዙን ይይዛል።"),
    "Vietnamese": ("Tại sao bánh mì nở?", "Men biến đường thành khí, và gluten giữ khí đó lại trong bột."),
    "German": ("Warum geht Brot auf?", "Hefe macht aus Zucker Gas; der „Kleber“ hält es groß“, sagt „Äpfel“-Otto."),
    "French": ("Pourquoi le pain lève-t-il ?", "« LIBERTÉ », dit la pâte : la levure crée du gaz… et voilà l’été”."),
    "Turkish": ("Ekmek neden kabarır?", "Maya şekeri gaza çevirir; İstanbul’da “ığdır” da öyle der."),
    "Icelandic": ("Af hverju lyftist brauð?", "Gerið breytir sykri í gas – „Ð“ og „Þ“ eru stafir."),
}  # fmt: skip


def codes(prompt, *answers):
    """Codes of the findings about the responses, and about a pair of each with another one."""
    rows = [pair(prompt, answer, OTHER, line) for line, answer in enumerate(answers, 1)]
    return [code for code, _, _ in reported(check_text, rows)]


@pytest.mark.parametrize("language", SENTENCES)
@pytest.mark.parametrize("form", ["NFC", "NFD"])
def test_a_sentence_in_any_script_has_no_finding(language, form):
    prompt, answer = SENTENCES[language]
    assert codes(prompt, normalize(form, answer), normalize(form, f"{answer}\n\n{OTHER} {answer}")) == []


@pytest.mark.parametrize("language", SENTENCES)
def test_a_loop_is_found_in_any_script(language):
    prompt, answer = SENTENCES[language]
    assert codes(prompt, f"{answer} " * 12) == ["repetition"]


@pytest.mark.parametrize("language", SENTENCES)
def test_an_echo_is_found_in_any_script(language):
    prompt, answer = SENTENCES[language]
    assert codes(prompt, f"{prompt} {answer}") == ["echo"]


@pytest.mark.parametrize(
    "language", sorted(SENTENCES.keys() - {"German", "French", "Vietnamese", "Turkish", "Icelandic"})
)
@pytest.mark.parametrize("encoding", ["cp1252", "latin-1"])
def test_utf8_read_as_another_encoding_is_found_in_any_script(language, encoding):
    prompt, answer = SENTENCES[language]
    wrong = "".join(bytes([one]).decode(encoding, "ignore") or chr(one) for one in answer.encode())
    assert "garbled" in codes(prompt, wrong)


@pytest.mark.parametrize("text", ["zażółć gęślą jaźń", "příliš žluťoučký kůň", "çalışır, görür", "Привет, как дела?"])
@pytest.mark.parametrize("encoding", ["cp1252", "cp1251"])
def test_utf8_read_as_a_windows_encoding_is_found(text, encoding):
    wrong = "".join(bytes([one]).decode(encoding, "ignore") or chr(one) for one in text.encode())
    if encoding == "cp1252" or text[0] == "П":
        assert "garbled" in codes(WHY, wrong)
    assert codes(WHY, text) == []


JSON = json.dumps(
    [{"id": number, "name": f"loaf {number}", "fresh": True, "size": 3} for number in range(30)], indent=1
)
SONG = "\n\n".join(
    f"Verse {n} of the baker's day, with flour number {n} in play.\nRise, bread, rise, all day long!" for n in "abcdefg"
)
TABLE = "| part | does |\n|---|---|\n| yeast | gas<br>taste |\n| salt | taste &amp; order |\nThat is all."

HONEST = {
    "null in JSON": ("Give the value as JSON.", "null"),
    "Python's None": ("What does print([].sort()) show?", "None"),
    "undefined": ("What does this JavaScript function return?", "undefined"),
    "a list of names": ("Which types does it take? Answer as JSON.", '["text", "image", "audio"]'),
    "a JSON object": (WHY, '{"name": "yeast"}'),
    "YAML": (WHY, "{name: yeast}"),
    "a set": (WHY, "{input, output}"),
    "one of the labels": ("Is it fresh, stale or unknown?", "unknown"),
    "the label for nothing": ("List the errors; if there are none, write N/A.", "N/A"),
    "the slot that is asked for": ("Answer with [text] or [image].", "[image]"),
    "no loaf": ("How many loaves are left?", "None."),
    "nobody knows": ("Who wrote Beowulf?", "Unknown."),
    "sodium": ("What is the symbol of sodium?", "Na"),
    "the Spanish word": ("¿Qué trajo?", "Todo"),
    "emoji": ("Describe bread in emoji only.", "\U0001f35e\U0001f525"),
    "emoji in Chinese": ("用表情符号描述面包", "\U0001f35e"),
    "emoji in Arabic": ("صف الخبز بإيموجي", "\U0001f35e"),
    "an emoji for an emoji": ("\U0001f44d", "\U0001f60a"),
    "an operator": ("Which operator adds numbers?", "+"),
    "a quoted sign": ("Which is right here, ';' or ':'?", ";"),
    "infinity": ("What is the limit of x as x grows?", "∞"),
    "no element": ("Solve x + 1 = x.", "∅"),
    "a family": ("Tell me of them.", "A family \U0001f468\u200d\U0001f469\u200d\U0001f467 \u2764\ufe0f came."),
    "table": (WHY, TABLE),
    "document": ("Make me a bakery page.", "<!DOCTYPE html>\n<html><body><p>Bread</p></body></html>"),
    "page in Chinese": ("写一个网页", "<div>面包</div>好"),
    "generics": (WHY, "Use Map<String, List<Loaf>> and a<b>c."[:33]),
    "JSON rows": ("Write thirty loaves as JSON.", JSON),
    "SQL": (WHY, "\n".join(f"INSERT INTO loaves VALUES ({n}, 'rye {n}', TRUE);" for n in range(30))),
    "test cases": (WHY, "```python\n" + "\n".join(f"assert rise({n}) == {n * n % 97}" for n in range(30)) + "\n```"),
    "CSV table": (WHY, "\n".join(f"| {n} | rye | yes | {n * 7} |" for n in range(30))),
    "a refrain": ("Write a song about bread.", SONG),
    "as often as asked": ("Repeat 'bread rises in the oven' 40 times.", "bread rises in the oven " * 40),
    "matrix": (WHY, "\n".join("0 1 0 1 0 1 0 1 0 1" for _ in range(20))),
    "code that goes on": ("def rise(dough):\n    ", "def rise(dough):\n    return dough * 2"),
    "LaTeX": (WHY, r"$$\int_0^1 x^2\,dx = \frac{1}{3}$$ and $a < b$ & $c > d$"),
    "U+FFFD explained": ("What is U+FFFD in Unicode?", "It is \ufffd, the replacement character."),
    "an answer after all": (
        "Will it rain?",
        "I can't provide a forecast for sure, but the clouds from the west and the falling pressure make rain likely "
        "before the evening.",
    ),
    "not sure": ("Will it rain?", "I can't say for sure, but dark clouds come from the west, so take a coat."),
    "steps": ("Treat my knee?", "I cannot give medical advice. In general:\n1. Rest it for some days and keep it up.\n"
              "2. Cool it for ten minutes every few hours."),
    "cannot help but": (WHY, "I can't help but smile: yeast makes gas from sugar, and the dough holds it."),
    "an apology in a letter": (WHY, "Lo siento, pero no puedo ir a la fiesta, porque el pan está en el horno."),
    "about itself": ("Are you a person?", "No; as an AI language model, I have no body, but I can talk about bread."),
    "AI engineers": ("What job is that?", "As an AI engineer, she builds models that look at loaves."),
}  # fmt: skip


@pytest.mark.parametrize("case", HONEST)
def test_an_honest_response_has_no_finding(case):
    prompt, answer = HONEST[case]
    assert codes(prompt, answer) == []


FAULTS = {
    "null": (WHY, "null", "placeholder"),
    "slot": (WHY, "[insert image of bread]", "placeholder"),
    "slot in code's neighbourhood": (WHY, "{{ name }}", "placeholder"),
    "emoji": (WHY, "\U0001f35e", "no_word"),
    "dots in Thai": ("ทำไมขนมปังจึงขึ้นฟู", "????", "no_word"),
    "table beside markup": (WHY, f"{TABLE}<br>Yes.", "markup"),
    "space in Latin words": (WHY, "bread\u200brises", "unseen"),
    "override in Arabic": (WHY, "الخبز \u202eabc\u202c ينتفخ", "unseen"),
    "direction without end": (WHY, "الخبز \u202aabc ينتفخ", "unseen"),
    "direction without need": (WHY, "bread \u202arises\u202c", "unseen"),
    "GBK of U+FFFD": (WHY, "面包锟斤拷锟斤拷发起来", "garbled"),
    "loop in code": (WHY, "```\n" + "x = rise(dough, oven)\n" * 30 + "```", "repetition"),
    "loop in a song": ("Write a song.", "Rise, bread, rise, all day long! " * 30, "repetition"),
    "loop in Chinese": ("面包为什么会发起来？", "因为面包里有酵母" * 20, "repetition"),
    "refusal and offer": (WHY, "I'm sorry, but I can't help with that. But I can help with other things, such as cakes "
                          "and the history of tea in the north of the country.", "refusal"),
    "refusal and morals": (WHY, "I cannot provide that. It is wrong and dangerous. Please talk to a baker.", "refusal"),
    "in Chinese": (WHY, "抱歉，我无法提供这方面的帮助。", "refusal"),
    "in Japanese": (WHY, "申し訳ありませんが、そのご質問にはお答えできません。", "refusal"),
    "in Korean": (WHY, "죄송하지만 그 요청은 도와드릴 수 없습니다.", "refusal"),
    "in Spanish": (WHY, "Lo siento, pero no puedo ayudarte con eso.", "refusal"),
    "in French": (WHY, "Je suis désolé, mais je ne peux pas vous aider.", "refusal"),
    "in German": (WHY, "Es tut mir leid, aber ich kann Ihnen dabei nicht helfen.", "refusal"),
    "in Russian": (WHY, "Извините, но я не могу с этим помочь.", "refusal"),
    "in Portuguese": (WHY, "Desculpe, mas não posso ajudar com isso.", "refusal"),
    "as a model in Chinese": (WHY, "作为一个人工智能，我没有味觉。", "refusal"),
}  # fmt: skip


@pytest.mark.parametrize("case", FAULTS)
def test_a_fault_is_found_by_its_code(case):
    prompt, answer, code = FAULTS[case]
    assert codes(prompt, answer) == [code]


def test_an_echo_is_of_the_last_turn():
    row = pair("Why does it rise so slowly?", "Why does it rise so slowly? It is cold.", OTHER)
    earlier = (Message(role="system", content="Be brief."), Message(role="user", content="Hi"))
    row = replace(row, prompt=(*earlier, Message(role="assistant", content="Hello"), *row.prompt))
    assert [code for code, _, _ in reported(check_text, [row])] == ["echo"]


def test_a_call_of_a_tool_has_no_finding():
    calls = [
        {"type": "function", "function": {"name": "rise", "arguments": {"loaf": number, "oven": "big"}}}
        for number in range(8)
    ]
    row = pair(WHY, "", OTHER)
    row = replace(row, chosen=(Message(role="assistant", content="", extra={"tool_calls": calls}),))
    assert reported(check_text, [row]) == []


@pytest.mark.parametrize(
    "text",
    ["I can't help with that" + "\n" * 99_000, "|" * 99_000, "a|" * 50_000 + "<", ";\n" * 50_000, "\n" * 99_000 + "x",
     "I can't " + "very " * 20_000, "é" * 99_000, "Ð°" * 2 + "Ð " * 40_000, "面" * 99_000, "\u200b" * 40_000 + "ก"],
    ids=lambda text: ascii(text[:9]),
)  # fmt: skip
def test_long_texts_cost_no_more_than_their_length(text):
    start = time.process_time()
    codes(text, text + "a", "a" + text)
    assert time.process_time() - start < 1
