"""Tokenizers with the chat templates of `tests.data.chats`."""

import pytest

from tests.data.chats import CHATML, PLAIN
from tests.data.helpers import chat_tokenizer


@pytest.fixture(scope="module")
def chatml(tmp_path_factory):
    return chat_tokenizer(CHATML, tmp_path_factory.mktemp("chatml"))


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    return chat_tokenizer(PLAIN, tmp_path_factory.mktemp("plain"))
