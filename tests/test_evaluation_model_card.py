"""Figures of a run in a model card: a local one, and one behind a stand-in for the Hub."""

import base64
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import huggingface_hub
import pytest
from packaging.version import Version


EVALUATION = Path(__file__).parents[1] / "evaluation"
sys.path.insert(0, str(EVALUATION))

from huggingface_hub import ModelCard  # noqa: E402

from model_card import push_results  # noqa: E402


CARD = """---
license: apache-2.0
tags:
- speech
---

# A voice

Words of its author.
"""


def summary(error_rate: float) -> dict:
    row = {"word_error_rate": error_rate, "character_error_rate": 0.5, "similarity_to_prompt": 0.515}
    return {
        "settings": {
            "recognizer": "openai/whisper-large-v3",
            "speaker_encoder": "microsoft/wavlm-base-plus-sv",
            "dataset": "someone/speech",
            "dataset_config": None,
            "split": "test",
        },
        "protocols": {
            "continuation": {
                "rows": {
                    "Ground truth": {**row, "guidance_scale": None, "word_error_rate": 77.0},
                    "SLED, guidance 2": {**row, "guidance_scale": 2.0},
                }
            }
        },
    }


def check(content: str, error_rate: float) -> None:
    card = ModelCard(content)
    assert "Words of its author." in card.text
    assert card.data.license == "apache-2.0" and card.data.tags == ["speech"]
    results = {result.metric_type: result for result in card.data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "wer": error_rate,
        "cer": 0.5,
        "speaker_similarity": 0.515,
    }
    assert results["wer"].metric_name == (
        "Word error rate (%): continuation, guidance 2, by openai/whisper-large-v3 and microsoft/wavlm-base-plus-sv"
    )
    assert (results["wer"].dataset_type, results["wer"].dataset_split) == ("someone/speech", "test")


def test_local_card_keeps_its_words_and_old_figures_are_replaced(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    push_results(str(tmp_path), summary(9.0))
    push_results(str(tmp_path), summary(1.59))
    check((tmp_path / "README.md").read_text(), 1.59)


def test_figures_of_others_stay(tmp_path):
    (tmp_path / "README.md").write_text(CARD)
    push_results(str(tmp_path), summary(9.0))
    other = summary(1.0)
    other["settings"]["dataset"] = "someone/else"
    push_results(str(tmp_path), other)
    results = ModelCard.load(tmp_path / "README.md").data.eval_results
    assert {(result.dataset_type, result.metric_value) for result in results if result.metric_type == "wer"} == {
        ("someone/speech", 9.0),
        ("someone/else", 1.0),
    }


def test_a_folder_without_a_card_gets_one(tmp_path):
    push_results(str(tmp_path), summary(2.0))
    assert len(ModelCard.load(tmp_path / "README.md").data.eval_results) == 3


class Hub(BaseHTTPRequestHandler):
    """As much of the Hub as reading and committing one file takes."""

    card = CARD

    def do_HEAD(self):
        self.do_GET(body=False)

    def do_GET(self, body=True):
        if not self.path.endswith("/README.md"):
            self.answer(b"{}")
            return
        self.answer(type(self).card.encode(), body, ETag=f'"{hash(type(self).card)}"', **{"X-Repo-Commit": "0" * 40})

    def do_POST(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        if "/preupload/" in self.path:
            files = [{"path": "README.md", "uploadMode": "regular", "shouldIgnore": False}]
            self.answer(json.dumps({"files": files}).encode())
        elif "/commit/" in self.path:
            assert self.headers["Authorization"] == "Bearer hf_test"
            entries = [json.loads(line) for line in content.splitlines()]
            file = next(entry["value"] for entry in entries if entry["key"] == "file")
            type(self).card = base64.b64decode(file["content"]).decode()
            self.answer(json.dumps({"commitUrl": "http://127.0.0.1/c/1", "commitOid": "1" * 40}).encode())
        else:
            self.answer(b"{}")

    def answer(self, content, body=True, **headers):
        self.send_response(200)
        for name, value in {
            "Content-Length": str(len(content)),
            "Content-Type": "application/json",
            **headers,
        }.items():
            self.send_header(name, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_):
        pass


@pytest.mark.skipif(
    Version(huggingface_hub.__version__) < Version("2"),
    reason="before 2.0, huggingface_hub validates cards at the Hub's own address, whatever HF_ENDPOINT says",
)
@pytest.mark.parametrize("rounds", [1, 2])
def test_card_on_the_hub(tmp_path, rounds):
    Hub.card = CARD
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    environment = {
        **os.environ,
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "HF_TOKEN": "hf_test",
        "HF_HOME": str(tmp_path),
        "HF_HUB_OFFLINE": "0",
        "PYTHONPATH": str(EVALUATION),
    }
    figures = [summary(rate) for rate in (9.0, 1.59)[-rounds:]]
    program = "import json, sys; from model_card import push_results\n"
    program += "for figures in json.load(sys.stdin): push_results('someone/voice', figures)"
    try:
        subprocess.run(
            [sys.executable, "-c", program], input=json.dumps(figures), text=True, env=environment, check=True
        )
    finally:
        server.shutdown()
        server.server_close()
    check(Hub.card, 1.59)
