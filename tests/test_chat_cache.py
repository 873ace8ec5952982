"""A document as the beginning of a user's message, compressed once, and questions that end the message."""

import pytest
from chat_tokenizer import write_chat_tokenizer
from command_line import assert_refused, runner
from hf_models import tiny_model

from unigist_jax.model.hf import save_hf


@pytest.fixture(scope="module")
def command(tmp_path_factory):
    return runner(tmp_path_factory.mktemp("output"))


def test_questions_behind_a_document_are_one_message_with_it(command, tmp_path):
    save_hf(tiny_model(vocab_size=596), tmp_path / "model")
    write_chat_tokenizer(tmp_path / "model")
    document = "def parse(argv):\n    return argv\n"
    (tmp_path / "document.txt").write_text(document)
    model, file = (f"--workdir={tmp_path}/model", "--platform=cpu"), tmp_path / "document.cache"
    source = f"--document={tmp_path}/document.txt", f"--output={file}"
    finished = command("compress", *model, *source, "--chat", "--system=Be brief.")
    assert finished.code == 0, finished.err
    asked = command("generate", *model, "--chat", f"--cache={file}", "--prompt=What?", "--max_new_tokens=7")
    assert asked.code == 0, asked.err
    whole = f"--prompt={document.rstrip()}\n\nWhat?"
    alone = command("generate", *model, "--chat", "--system=Be brief.", whole, "--max_new_tokens=7")
    assert asked.out.split("\n[")[0] == alone.out.split("\n[")[0] != ""
    assert_refused(command("compress", *model, *source, "--system=Be brief."), "--system='Be brief.' without --chat")
    plain = command("generate", *model, f"--cache={file}", "--prompt=What?")
    assert_refused(plain, f"{file} ends within a user's message", "give --chat")
