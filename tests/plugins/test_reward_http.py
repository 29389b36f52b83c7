"""The reward of a judge, with a server of our own on loopback."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from qpref.errors import PluginError
from qpref.records import Message, SampledResponse
from qpref.sampling.reward import Scorer
from qpref_plugins import reward_http

RESPONSES = [
    SampledResponse(prompt=(Message(role="user", content="?"),), text="a" * n, ended=True) for n in range(1, 6)
]


@pytest.fixture
def judge(monkeypatch):
    """A server whose `answers` are statuses or functions of the rows; the last one is for all further requests."""
    monkeypatch.setattr(reward_http, "WAITS", (0.0, 0.0, 0.0))

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            rows = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["responses"]
            server.asked.append((self.headers.get("Authorization"), rows))
            answer = server.answers.pop(0) if len(server.answers) > 1 else server.answers[0]
            body = b"" if isinstance(answer, int) else json.dumps(answer(rows)).encode()
            self.send_response(answer if isinstance(answer, int) else 200)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.answers = [], [lambda rows: {"rewards": [len(row["response"]) for row in rows]}]
    server.url = f"http://127.0.0.1:{server.server_port}/judge"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def test_responses_are_judged_in_batches(judge, monkeypatch):
    monkeypatch.setenv("JUDGE_TOKEN", "secret-of-mine")
    score = Scorer("http", {"url": judge.url, "batch_size": 2, "token_variable": "JUDGE_TOKEN"})
    assert score(RESPONSES) == [1.0, 2.0, 3.0, 4.0, 5.0]
    assert [len(rows) for _, rows in judge.asked] == [2, 2, 1]
    assert judge.asked[0] == ("Bearer secret-of-mine", [
        {"prompt": [{"role": "user", "content": "?"}], "response": "a", "ended": True},
        {"prompt": [{"role": "user", "content": "?"}], "response": "aa", "ended": True},
    ])  # fmt: skip
    assert "secret-of-mine" not in json.dumps(score.settings)


def test_a_busy_judge_is_asked_again_and_a_refusal_ends_it(judge):
    judge.answers[:0] = [503, 429]
    assert Scorer("http", {"url": judge.url})(RESPONSES) == [1.0, 2.0, 3.0, 4.0, 5.0]
    judge.answers[:] = [503]
    judge.asked.clear()
    with pytest.raises(PluginError, match="status 503"):
        Scorer("http", {"url": judge.url})(RESPONSES)
    assert len(judge.asked) == 4
    for refusal in (403, 307):
        judge.answers[:] = [refusal]
        judge.asked.clear()
        with pytest.raises(PluginError, match=f"status {refusal}"):
            Scorer("http", {"url": judge.url})(RESPONSES)
        assert len(judge.asked) == 1


@pytest.mark.parametrize("answer", [lambda rows: {"rewards": [1]}, lambda rows: [1, 2], lambda rows: {}])
def test_an_answer_without_a_reward_for_each_is_refused(judge, answer):
    judge.answers[:] = [answer]
    with pytest.raises(PluginError, match="no list `rewards` of 5"):
        Scorer("http", {"url": judge.url})(RESPONSES)


def test_a_token_that_is_not_set_and_a_judge_that_is_not_there_are_named(judge, monkeypatch):
    monkeypatch.delenv("NO_SUCH_TOKEN", raising=False)
    with pytest.raises(PluginError, match="NO_SUCH_TOKEN isn't set"):
        Scorer("http", {"url": judge.url, "token_variable": "NO_SUCH_TOKEN"})
    judge.shutdown()
    judge.server_close()
    with pytest.raises(PluginError, match="can't be reached"):
        Scorer("http", {"url": judge.url})(RESPONSES)
